"""Cards of exported files in Hugging Face's format: front matter in YAML, then Markdown."""

import collections
import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from bilevel_jax import files, selector
from bilevel_jax.data import rows
from bilevel_jax.export import kept_rows
from bilevel_jax.runtime import stored, weight_table
from bilevel_jax.text import visible

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
MAX_SOURCES = 20  # rows of the table of sources; the others are summed up
LICENCE = (
    "The selection does not change any rights: every row keeps the licence of its source. "
    "Check these licences before you share the file."
)
REPLACED = (
    "The model may have answered their questions itself for some of the time, so their weights say less about the responses of the "
    "data; "
    "method=offline weighs these."
)
COLUMNS = {
    "id": "of the row, as in weights/*.parquet",
    "weight": "N·σ(ω) at the end of the run: mean 1 over all rows",
    "rank": "1 is the heaviest",
    **weight_table.MEASURES,
    "masked": "whether the question was left to the model at the end of the run",
    "prompt": "the prompt for TRL's SFTTrainer",
    "completion": "the completion that SFTTrainer trains on",
    "refined": "whether the model generated the response",
    "original_response": "the response of the data",
}


@dataclasses.dataclass(frozen=True)
class Provenance:
    """The origin of an export."""

    workdir: pathlib.Path
    config: Mapping  # as in config.json
    command: str

    @property
    def config_hash(self) -> str:
        """SHA-256 of `config.json`, as `sha256sum` computes it."""
        return hashlib.sha256((self.workdir / "config.json").read_bytes()).hexdigest()

    def table(self) -> list[str]:
        """The origin as lines of a Markdown table."""
        config = self.config
        rule = f", selection.rule={config['selection']['rule']}" if config["method"] != "mixing" else ""
        if init := config["selection"]["init"]:
            rule = f", weights of `{init}`" + ("" if config["selection"]["freeze"] else rule)
        lora = config["lora"]
        rows = {
            "method": f"`{config['method']}`{rule}, {config['num_epochs']} epochs, seed {config['seed']}",
            "base model": f"`{config['model']['path']}`",
            "learned": f"LoRA, rank {lora['rank']}, alpha {lora['alpha']:g}, {lora['targets']}" if lora["rank"] else "all weights",
            "trusted rows": f"`{config['data']['upper']}`",
            "mixture": f"`{config['data']['lower']}`",
            "run": f"`{self.workdir}`",
            "SHA-256 of its config.json": f"`{self.config_hash}`",
            "command": f"`{self.command}`",
        }
        return _table(("", ""), rows.items())


def data_card(
    provenance: Provenance,
    out: pathlib.Path,
    selection: kept_rows.KeptRows,
    *,
    is_new: bool = False,
    num_replaced: int = 0,
    num_different: int | None = None,
) -> str:
    """The card of a file of kept rows.

    Args:
      out: the file.
      selection: what is in it.
      is_new: the run did not train on these rows.
      num_replaced: kept rows with the response of the data that were masked in the run.
      num_different: different rows in a file that repeats rows by weight; None if it does not.
    """
    kept, num_kept = selection.kept, int(selection.kept.sum())
    groups = {"all": np.ones(len(kept), bool), "kept": kept, "dropped": ~kept}
    head = _front_matter(
        pretty_name=f"Rows kept by {provenance.workdir.name}",
        license="unknown",
        task_categories=["text-generation"],
        tags=["bilevel_jax", "data-selection"],
        configs=[{"config_name": "default", "data_files": out.name}],
    )
    lines = [
        f"# {out.name}",
        "",
        "The rows of instruction data with the largest weights. Bilevel data selection learns one weight per training row, jointly",
        "with the model, so that fine-tuning on the weighted mixture does best on a small set of trusted rows (arXiv:2511.21056).",
        *(
            ["They were chosen among the heaviest half, round-robin over the trusted rows that they are most like."]
            if selection.round_robin
            else []
        ),
        *(f"Rows with the smallest `{name}` were left out first: {number}." for name, number in selection.num_left_out.items()),
        *([] if num_different is None else [_repeated(num_different, num_kept)]),
        *(["The run did not train on these rows. Their weights are predicted from its training rows."] if is_new else []),
        "",
        *provenance.table(),
        *_columns(selection, is_new, has_weight=num_different is None),
        *("", "## Counts", "", *_counts(groups), ""),
        *(*_by_source(selection.table["source"], kept), *_bad_rows(groups, selection.labels, provenance)),
    ]
    if selection.refined is not None:
        masked, refined = (selection.masked & kept).sum(), selection.refined.sum()
        lines += ["", f"{masked} of the kept rows are masked; {refined} of them have a response that the model generated."]
    if num_replaced:
        lines += ["", f"{num_replaced} of the kept rows were masked in the run. {REPLACED}"]
    lines += ["", "## Weights", "", *_weights(groups, selection.table["weight"].to_numpy()), "", "## Licence", "", LICENCE]
    return head + "\n".join(lines) + "\n"


def _columns(selection: kept_rows.KeptRows, is_new: bool, has_weight: bool) -> list[str]:
    """What the columns of the file are."""
    columns = ["id", *(["weight"] if has_weight else []), "rank", *([] if is_new else ["masked"])]
    columns += weight_table.known_measures(selection.table)
    columns += ["prompt", "completion"] if selection.form in ("chat", "text") else []
    columns += [] if selection.refined is None else ["refined", "original_response"]
    lines = ["", "## Columns", "", f"The fields of the data, and {_and(f'`{name}` ({COLUMNS[name]})' for name in columns)}."]
    if selection.renamed:
        lines.append(f"Renamed fields: {_and(f'`{name}` as `original_{name}`' for name in selection.renamed)}.")
    return lines


def model_card(provenance: Provenance, dtype: str, hub_base: str | None = None) -> str:
    """The card of a merged model. `hub_base` is the id of the base model if it is on the hub."""
    summary = stored.read_summary(provenance.workdir, needed=("rows", "steps"))
    names = {"upper_loss": "trusted rows", "lower_loss": "mixture, as it is", "lower_clean_loss": "mixture, right responses"}
    losses = [
        (name, f"{summary[f'start/{key}']:.4f}" if f"start/{key}" in summary else "", f"{summary[f'eval/{key}']:.4f}")
        for key, name in names.items()
        if f"eval/{key}" in summary
    ]
    head = _front_matter(
        library_name="transformers",
        pipeline_tag="text-generation",
        license="unknown",
        tags=["bilevel_jax", "lora", "merged"],
        **({"base_model": hub_base} if hub_base else {}),
    )
    lines = [
        f"# {provenance.workdir.name}",
        "",
        "A base model merged with the LoRA adapter of a bilevel fine-tuning run (arXiv:2511.21056). The merged weights were",
        f"computed in float32 and are stored in {dtype}.",
        "",
        "    model = transformers.AutoModelForCausalLM.from_pretrained(DIR)",
        "    tokenizer = transformers.AutoTokenizer.from_pretrained(DIR)",
        "",
        *provenance.table(),
        "",
        f"{summary['rows']} rows of the mixture, {summary['steps']} steps.{_best(provenance.config, summary)}",
    ]
    if losses:
        lines += ["", "## Held-out loss, nats per token", "", *_table(("", "base", "merged"), losses)]
    lines += ["", "## Licence", "", "The terms of the base model apply to this model, and those of the training rows may apply."]
    return head + "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------------------------------
# Parts
# --------------------------------------------------------------------------------------------------------------------


def _best(config, summary: Mapping) -> str:
    """Which step the adapter is of, where it is not the last one."""
    best = stored.kept_step(summary, config["eval"].get("keep_best", False))
    return "" if best is None else f" The adapter is that of step {best:.0f}, where the loss on trusted rows was lowest."


def _front_matter(**values) -> str:
    """Front matter in YAML, written as JSON, which is a subset."""
    return "".join(["---\n", *(f"{key}: {files.to_json(value, ensure_ascii=False)}\n" for key, value in values.items()), "---\n\n"])


def _table(header: Sequence[str], rows) -> list[str]:
    def line(cells):
        return "| " + " | ".join(visible(str(cell)).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return [line(header), line(["---"] * len(header)), *map(line, rows)]


def _and(items) -> str:
    *others, last = items
    return f"{', '.join(others)} and {last}" if others else last


def _repeated(num_different: int, number: int) -> str:
    return (
        f"Rows are repeated by weight (systematic resampling): {number} rows, {num_different} different ones. Each is there n·w/Σw "
        f"times, rounded up or down at random, with n = {number} and Σw over the kept rows. Do not weight them again."
    )


Groups = Mapping[str, np.ndarray]  # name -> which rows of the table are in it, [N] bool


def _counts(groups: Groups) -> list[str]:
    return _table(("", "rows"), [(name, is_in.sum()) for name, is_in in groups.items()])


def _by_source(sources: pa.ChunkedArray, is_kept: np.ndarray) -> list[str]:
    """Rows of each source, the largest first."""
    coded = sources.combine_chunks().dictionary_encode()
    index, names = coded.indices.to_numpy(), coded.dictionary.to_pylist()
    totals, kept = (
        collections.Counter(dict(zip(names, np.bincount(part, minlength=len(names)).tolist()))) for part in (index, index[is_kept])
    )
    order = [source for source, _ in totals.most_common()]
    counts = [((source or "(none)"), totals[source], kept[source]) for source in order[:MAX_SOURCES]]
    if order[MAX_SOURCES:]:
        rest = order[MAX_SOURCES:]
        counts.append((f"{len(rest)} others", sum(totals[s] for s in rest), sum(kept[s] for s in rest)))
    cells = [(name, number, num_kept, number - num_kept, f"{num_kept / number:.1%}") for name, number, num_kept in counts]
    return _table(("source", "rows", "kept", "dropped", "share kept"), cells)


def _bad_rows(groups: Groups, labels: np.ndarray, provenance: Provenance) -> list[str]:
    """A section on the rows that the data mark as bad; empty without labels. Training never reads the labels."""
    label, bad = provenance.config["data"]["label"], labels == 1
    if (labels == rows.UNLABELLED).all():
        return []
    shares = {name: bad[is_in].mean() for name, is_in in groups.items() if is_in.any()}
    sentence = ", ".join(f"{share:.1%} of {'all' if name == 'all' else f'the {name}'} rows" for name, share in shares.items())
    num_bad, bad_kept = bad.sum(), bad[groups["kept"]].sum()
    kept_shares = {
        "bad rows that are kept, of all bad": bad_kept / num_bad if num_bad else np.nan,
        "kept rows that are bad": bad_kept / groups["kept"].sum(),
    }
    return [
        "",
        "## Bad rows",
        "",
        f"The field `{label}` of the data marks bad rows; training does not read it. Bad rows are {sentence}.",
        "",
        *_table(("", "share"), [(name, "" if np.isnan(share) else f"{share:.1%}") for name, share in kept_shares.items()]),
    ]


def _weights(groups: Groups, weight: np.ndarray) -> list[str]:
    """Percentiles and ESS/N of the weights."""
    header = ("rows", *(f"p{p}" if 0 < p < 100 else ("min", "max")[p // 100] for p in PERCENTILES), "ESS/N")
    cells = []
    for name, is_in in groups.items():
        if is_in.any():
            weights = weight[is_in]
            spread = [f"{value:.3g}" for value in np.percentile(weights, PERCENTILES)]
            cells.append((name, *spread, f"{selector.effective_sample_size(weights / weights.sum()):.4f}"))
    return _table(header, cells)

"""Cards that lie beside what is exported, in the form of Hugging Face's: front matter in YAML, then Markdown for a person."""

import collections
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
SOURCES = 20  # rows of the table of sources; what is beyond is summed up
LICENCE = (
    "This selection adds no rights and takes none away: every row keeps the licence of the source it comes from. "
    "Look them up before you pass the file on."
)
COLUMNS = {
    "weight": "N·σ(ω) at the end of the run: mean 1 over all rows",
    "rank": "1 is the heaviest",
    "prompt": "what TRL's SFTTrainer conditions on",
    "completion": "what it learns",
    "refined": "whether the response is the model's own",
    "original_response": "the response of the data",
}


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where an export comes from."""

    workdir: pathlib.Path
    config: Mapping  # as in config.json
    command: str

    @property
    def config_hash(self) -> str:
        """SHA-256 of the resolved config: of the bytes of `config.json`, as `sha256sum` gives it."""
        return hashlib.sha256((self.workdir / "config.json").read_bytes()).hexdigest()

    def table(self) -> list[str]:
        config = self.config
        rule = f", selection.rule={config['selection']['rule']}" if config["method"] != "mixing" else ""
        rows = {
            "method": f"`{config['method']}`{rule}, {config['num_epochs']} epochs, seed {config['seed']}",
            "base model": f"`{config['model']['path']}`",
            "adapter": f"LoRA, rank {config['lora']['rank']}, alpha {config['lora']['alpha']:g}, {config['lora']['targets']}",
            "trusted rows": f"`{config['data']['upper']}`",
            "mixture": f"`{config['data']['lower']}`",
            "run": f"`{self.workdir}`",
            "SHA-256 of its config.json": f"`{self.config_hash}`",
            "made by": f"`{self.command}`",
        }
        return _table(("", ""), rows.items())


def data_card(
    facts: Provenance, out: pathlib.Path, table, found, kept, told, form: str, renamed: Sequence[str], unseen: bool = False
) -> str:
    """The card of a file of kept rows.

    Args:
      out: the file.
      table: of the run's last epoch, as written by `weights.write`.
      found: `rows.Row`s of the lower level, at least all those in the table.
      kept: `exporting.Kept`s.
      told: for each of them its columns `refined` and `original_response`, or nothing.
      form: as returned by `exporting.resolve_format`.
      renamed: fields that are `original_NAME` in the file.
      unseen: the rows are others than those of the run.
    """
    verdicts = table.to_pylist()
    ids = {one.row.id for one in kept}
    groups = {
        "all": verdicts,
        "kept": [verdict for verdict in verdicts if verdict["id"] in ids],
        "dropped": [verdict for verdict in verdicts if verdict["id"] not in ids],
    }
    columns = ["weight", "rank", *(["prompt", "completion"] if form in ("chat", "text") else [])]
    columns += list(told[0])
    head = _front_matter(
        pretty_name=f"Rows kept by {facts.workdir.name}",
        license="unknown",
        task_categories=["text-generation"],
        tags=["bilevel_jax", "data-selection"],
        configs=[{"config_name": "default", "data_files": out.name}],
    )
    lines = [
        f"# {out.name}",
        "",
        "Rows of instruction data that bilevel data selection weighed most: one weight per training row, learned jointly with the",
        "model so that fine-tuning on the weighted mixture does best on a small set of trusted rows (arXiv:2511.21056).",
        *(["The run never saw these rows: they are weighed by what it learned of the features of its own."] if unseen else []),
        "",
        *facts.table(),
        "",
        "## Columns",
        "",
        f"The fields of the data, and {_and(f'`{name}` ({COLUMNS[name]})' for name in columns)}.",
    ]
    if renamed:
        lines.append(f"Kept under another name: {_and(f'`{name}` as `original_{name}`' for name in renamed)}.")
    lines += ["", "## Counts", "", *_counts(groups), "", *_by_source(groups), *_bad_share(groups, found, facts)]
    if told[0]:
        masked, refined = sum(one.masked for one in kept), sum(columns["refined"] for columns in told)
        lines += ["", f"{masked} of the kept rows are masked; {refined} of them have the model's own response."]
    lines += ["", "## Weights", "", *_weights(groups), "", "## Licence", "", LICENCE]
    return head + "\n".join(lines) + "\n"


def model_card(facts: Provenance, dtype: str, hub_base: str | None = None) -> str:
    """The card of a merged model; `hub_base` is the base's id if it is on the hub."""
    summary = json.loads((facts.workdir / "summary.json").read_text())
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
        f"# {facts.workdir.name}",
        "",
        "A base model with the LoRA adapter of a bilevel fine-tuning run folded into its weights (arXiv:2511.21056), which were",
        f"computed in float32 and are stored in {dtype}.",
        "",
        "    model = transformers.AutoModelForCausalLM.from_pretrained(DIR)",
        "    tokenizer = transformers.AutoTokenizer.from_pretrained(DIR)",
        "",
        *facts.table(),
        "",
        f"{summary['rows']} rows of the mixture, {summary['steps']} steps.",
    ]
    if losses:
        lines += ["", "## Held-out loss, nats per token", "", *_table(("", "base", "merged"), losses)]
    lines += ["", "## Licence", "", "The terms of the base model hold for this one too, and those of the training rows may."]
    return head + "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------------------------------
# Parts
# --------------------------------------------------------------------------------------------------------------------


def _front_matter(**values) -> str:
    """YAML, written as the JSON that it includes."""
    return "".join(["---\n", *(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items()), "---\n\n"])


def _table(header: Sequence[str], rows) -> list[str]:
    def line(cells):
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return [line(header), line(["---"] * len(header)), *map(line, rows)]


def _and(items) -> str:
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last


def _counts(groups) -> list[str]:
    return _table(("", "rows"), [(name, len(verdicts)) for name, verdicts in groups.items()])


def _by_source(groups) -> list[str]:
    """Rows of each source, the largest first."""
    totals, kept = (collections.Counter(verdict["source"] for verdict in groups[name]) for name in ("all", "kept"))
    order = [source for source, _ in totals.most_common()]
    shown = [((source or "(none)"), totals[source], kept[source]) for source in order[:SOURCES]]
    if order[SOURCES:]:
        rest = order[SOURCES:]
        shown.append((f"{len(rest)} others", sum(totals[s] for s in rest), sum(kept[s] for s in rest)))
    rows = [(name, number, left, number - left, f"{left / number:.1%}") for name, number, left in shown]
    return _table(("source", "rows", "kept", "dropped", "share kept"), rows)


def _bad_share(groups, found, facts: Provenance) -> list[str]:
    """The share of rows that their own label calls bad, where there is one. Training never reads it."""
    label = facts.config["data"]["label"]
    marks = {row.id: row.fields.get(label) for row in found}
    if all(marks[verdict["id"]] is None for verdict in groups["all"]):
        return []
    shares = {name: np.mean([bool(marks[v["id"]]) for v in verdicts]) for name, verdicts in groups.items() if verdicts}
    told = ", ".join(f"{share:.1%} of {'all' if name == 'all' else f'the {name}'} rows" for name, share in shares.items())
    return ["", f"Marked bad, as they are in the data, by the field `{label}`, which training does not read: {told}."]


def _weights(groups) -> list[str]:
    """Percentiles of the weights, and ESS/N = (Σw)² / (N Σw²)."""
    header = ("rows", *(f"p{p}" if 0 < p < 100 else ("min", "max")[p // 100] for p in PERCENTILES), "ESS/N")
    rows = []
    for name, verdicts in groups.items():
        if verdicts:
            w = np.array([verdict["weight"] for verdict in verdicts])
            spread = [f"{value:.3g}" for value in np.percentile(w, PERCENTILES)]
            rows.append((name, *spread, f"{w.sum() ** 2 / (len(w) * (w**2).sum()):.4f}"))
    return _table(header, rows)

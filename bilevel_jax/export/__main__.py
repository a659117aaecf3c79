"""What a finished run leaves to others, as files that Hugging Face's libraries read.

    python -m bilevel_jax.export --workdir=DIR --selected=FILE.jsonl [--keep=0.8 --refined --format=auto|chat|text|original]
    python -m bilevel_jax.export --workdir=DIR --merged=DIR [--dtype=float32|bfloat16]

`--selected` writes the `keep` share of the training rows that weighs most, in stored order, as JSONL or Parquet: their own fields,
`weight`, `rank`, and the `prompt` and `completion` that TRL's SFTTrainer learns from (`exporting` says how). With `--refined`,
masked rows have the model's latest own response instead of that of the data, and say so. Masked rows are those that weighed least
when they were masked, so `--keep=1` is what goes with it. FILE.card.md beside it tells what it is.

Rows are matched to weights by content, so data that changed since the run is refused.

    python -m bilevel_jax.export --workdir=DIR --score-new=FILE --selected=FILE.jsonl [--keep=0.8 --format=...]

ranks other rows, which the run never saw, by what it learned of those that it did (`selection.parameterization=features`; with
`selection.unit=domain`, of their sources), and writes them in the same way; their mean weight is 1.

`--merged` writes a model directory (safetensors, config, tokenizer, README.md) that needs no PEFT.
"""

import pathlib
import shlex
import sys

from absl import flags

from bilevel_jax import cli
from bilevel_jax.export import selected_rows

FLAGS = flags.FlagValues()
WORKDIR = flags.DEFINE_string("workdir", None, "A finished run.", required=True, flag_values=FLAGS)
SELECTED = flags.DEFINE_string("selected", None, "JSONL or Parquet file to write the kept rows to.", flag_values=FLAGS)
KEEP = flags.DEFINE_float("keep", 0.8, "Share of the rows to keep, heaviest first.", flag_values=FLAGS)
SCORE_NEW = flags.DEFINE_string("score-new", None, "Rows to rank and select from instead of those trained on.", flag_values=FLAGS)
REFINED = flags.DEFINE_bool("refined", False, "Masked rows have the model's latest own response.", flag_values=FLAGS)
FORMAT = flags.DEFINE_enum(
    "format",
    "auto",
    list(selected_rows.FORMATS),
    "; ".join(f"{k}: {v}" for k, v in selected_rows.FORMATS.items()),
    flag_values=FLAGS,
)
MERGED = flags.DEFINE_string("merged", None, "Directory to write base and adapter to, as one model.", flag_values=FLAGS)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the merged weights.", flag_values=FLAGS)


def check_flags() -> None:
    """Refuses what has no meaning, before any work."""
    if not SELECTED.value and not MERGED.value:
        raise ValueError("nothing to do: give --selected=FILE.jsonl, --merged=DIR or both")
    for owner, names in ((SELECTED, ("keep", "score-new", "refined", "format")), (MERGED, ("dtype",))):
        idle = [name for name in names if FLAGS[name].present]
        if idle and not owner.value:
            raise ValueError(f"--{idle[0]} goes with --{owner.name}")
    if SCORE_NEW.value and REFINED.value:
        raise ValueError("--refined has no responses to rows that the run never saw; leave it or --score-new out")
    if not 0 < KEEP.value <= 1:
        raise ValueError(f"--keep={KEEP.value} must be in (0, 1]")
    if SELECTED.value and pathlib.Path(SELECTED.value).suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"--selected={SELECTED.value} must end in .jsonl or .parquet")


def logits_of_sources(workdir: pathlib.Path, file: str, found) -> list[float]:
    """The logit of each row's source, as the run's rows of that source have it."""
    from bilevel_jax.runtime import weight_table

    table = weight_table.latest(workdir)
    logits = dict(zip(table["source"].to_pylist(), table["logit"].to_pylist()))
    for row in found:
        if row.source not in logits:
            known = ", ".join(map(repr, logits))
            raise ValueError(f"--score-new: {file}:{row.line}: source {row.source!r} is none of those of {workdir}: {known}")
    return [logits[row.source] for row in found]


def rank_new(workdir: pathlib.Path, config, file: str):
    """The rows of a file that fit the model, and a table of their weights as `weights.table` makes it."""
    import numpy as np

    from bilevel_jax import features, sharding
    from bilevel_jax.data import levels, rows, templates
    from bilevel_jax.models import huggingface
    from bilevel_jax.runtime import weight_table

    by_domain = config.selection.get("unit", "sample") == "domain"
    if not by_domain and config.selection.get("parameterization", "table") != "features":
        raise ValueError(
            f"--score-new: {workdir} has a logit for each row trained on, and none for others; "
            "run with --config.selection.parameterization=features"
        )
    directory = huggingface.locate(config.model.path)
    tokenizer = templates.load_tokenizer(str(directory))
    found, report = rows.read_rows(file)
    found, examples = levels.usable(config, file, found, report, tokenizer)
    nothing = np.zeros(len(found))
    if by_domain:
        return found, weight_table.table(found, logits_of_sources(workdir, file, found), visits=nothing, masked=nothing)
    encoder, _ = features.read(workdir / features.FILE)
    phi = features.read_params(workdir / features.PARAMS_FILE)
    model, base = huggingface.load_model(str(directory), config.model.dtype)
    mesh = sharding.make_mesh(1)
    raw = features.pooled(model, base, examples, config.batch.micro_size, config.data.max_length, mesh)
    return found, weight_table.table(found, features.encode(encoder, raw) @ phi, visits=nothing, masked=nothing)


def export_selected(workdir: pathlib.Path, config, out: pathlib.Path, command: str) -> None:
    from bilevel_jax import files
    from bilevel_jax.data import levels, templates
    from bilevel_jax.export import cards
    from bilevel_jax.models import huggingface
    from bilevel_jax.runtime import weight_table

    found, table = (None, weight_table.latest(workdir)) if not SCORE_NEW.value else rank_new(workdir, config, SCORE_NEW.value)
    if table is None:
        raise FileNotFoundError(f"{workdir} has no weights/: direct mixing selects nothing")
    recorded = workdir / "responses.jsonl"
    if REFINED.value and not recorded.exists():
        raise FileNotFoundError(f"{recorded} is missing: method={config.method} generates nothing, so --refined has no responses")
    found = found or levels.reopen(config)
    kept = selected_rows.select(found, table, KEEP.value)
    told = [{} for _ in kept]
    if REFINED.value:
        kept, told = zip(*selected_rows.refine(kept, selected_rows.latest_responses(recorded)))
    chosen = [one.row for one in kept]

    form, tokenizer, template = FORMAT.value, None, None
    if form in ("auto", "text"):
        tokenizer = templates.load_tokenizer(str(huggingface.locate(config.model.path)))
        template = templates.resolve(config.data.template, tokenizer)
    form = selected_rows.resolve_format(form, chosen, template)
    columns = [
        {"weight": one.weight, "rank": one.rank, **more, **selected_rows.prompt_columns(one.row, form, tokenizer, template)}
        for one, more in zip(kept, told)
    ]
    records, renamed = selected_rows.join(chosen, columns, selected_rows.misread(form, chosen))
    late = selected_rows.write(out, records)
    facts = cards.Provenance(workdir, config, command)
    card = out.with_suffix(".card.md")
    files.write_atomically(card, cards.data_card(facts, out, table, found, kept, told, form, renamed, bool(SCORE_NEW.value)))

    print(f"{out}: {len(kept)} of {table.num_rows} rows kept")
    if REFINED.value:
        masked, refined = sum(one.masked for one in kept), sum(more["refined"] for more in told)
        hint = "" if masked or KEEP.value == 1 else "; the masked rows weigh least: --keep=1 keeps them"
        print(f"  {masked} of them are masked, {refined} of these have the model's response{hint}")
    for name in renamed:
        print(f"  field '{name}' is kept as 'original_{name}'")
    if late:
        print(f"  field '{late[0]}' first has a value after 10 MB, where datasets.load_dataset fails; it loads a .parquet file")
    print(f"{card}: counts, weights, provenance")


def export_merged(workdir: pathlib.Path, config, out: pathlib.Path, command: str) -> None:
    from bilevel_jax.export import cards, merged_model
    from bilevel_jax.models import huggingface

    base = huggingface.locate(config.model.path)
    on_hub = not pathlib.Path(config.model.path).is_dir() and base != huggingface.PACKAGE.parent / config.model.path
    card = cards.model_card(cards.Provenance(workdir, config, command), DTYPE.value, config.model.path if on_hub else None)
    number = merged_model.write_merged_model(base, workdir / "adapter", out, dtype=DTYPE.value, texts={"README.md": card})
    print(f"{out}: {config.model.path} with its adapter, {number / 1e6:.1f}M parameters in {DTYPE.value}")


def main() -> None:
    from bilevel_jax.runtime.workdir import read_finished

    check_flags()
    workdir = pathlib.Path(WORKDIR.value)
    config = read_finished(workdir)
    if MERGED.value:
        from bilevel_jax.export import merged_model

        merged_model.check_free(pathlib.Path(MERGED.value))
    command = f"python -m bilevel_jax.export {shlex.join(sys.argv[1:])}"
    if SELECTED.value:
        export_selected(workdir, config, pathlib.Path(SELECTED.value), command)
    if MERGED.value:
        export_merged(workdir, config, pathlib.Path(MERGED.value), command)


if __name__ == "__main__":
    cli.run(main, FLAGS)

"""Exports the selected rows or the merged model of a finished run, for Hugging Face libraries.

    python -m bilevel_jax.export --workdir=DIR --selected=FILE.jsonl [--keep=0.8 --drop_implausible=0.1 ...]
    python -m bilevel_jax.export --workdir=DIR --selected=FILE.jsonl --resampled [--seed=0]
    python -m bilevel_jax.export --workdir=DIR --score_new=FILE --selected=FILE.jsonl [--keep=0.8 --format=...]
    python -m bilevel_jax.export --workdir=DIR --merged=DIR [--dtype=float32|bfloat16]

`--selected` writes the heaviest rows and a card, FILE.card.md. Below one half, rows are taken from the heaviest half, in turn for
each trusted row. `--drop_implausible` leaves out the rows with the least likely responses. `--resampled` repeats the kept rows by
weight, for trainers that do not use weights. `--score_new` ranks rows that the run never saw, and needs
`selection.parameterization=features` or `selection.unit=domain`. `--merged` writes base and adapter as one model directory.
"""

import pathlib
import shlex
import sys

from absl import flags

from bilevel_jax import cli, files
from bilevel_jax.export import selected_rows
from bilevel_jax.text import say

FLAGS = flags.FlagValues()
WORKDIR = flags.DEFINE_string("workdir", None, "A finished run.", required=True, flag_values=FLAGS)
SELECTED = flags.DEFINE_string("selected", None, "JSONL or Parquet file for the kept rows.", flag_values=FLAGS)
KEEP = flags.DEFINE_float(
    "keep",
    0.8,
    "Share of the rows to keep: the heaviest, or, below 0.5, rows of the heaviest half round-robin over the trusted rows.",
    flag_values=FLAGS,
)
DROP_IMPLAUSIBLE = flags.DEFINE_float(
    "drop_implausible",
    0.0,
    "Share of the rows to leave out, those with the smallest `plausible`, whatever their weight.",
    flag_values=FLAGS,
)
DROP_DISSIMILAR = flags.DEFINE_float(
    "drop_dissimilar",
    0.0,
    "Share of the rows to leave out, those with the smallest `similar`, whatever their weight.",
    flag_values=FLAGS,
)
SCORE_NEW = flags.DEFINE_string(
    "score_new", None, "Files with new rows to rank and select, instead of the training rows.", flag_values=FLAGS
)
flags.DEFINE_alias("score-new", "score_new", flag_values=FLAGS)  # its former name
COLUMNS = flags.DEFINE_string(
    "columns", None, "Other names of columns in --score_new: question:query; by default data.columns of the run.", flag_values=FLAGS
)
REFINED = flags.DEFINE_bool("refined", False, "Use the latest generated responses of masked rows.", flag_values=FLAGS)
FORMAT = flags.DEFINE_enum(
    "format",
    "auto",
    list(selected_rows.FORMATS),
    "; ".join(f"{k}: {v}" for k, v in selected_rows.FORMATS.items()),
    flag_values=FLAGS,
)
RESAMPLED = flags.DEFINE_bool("resampled", False, "Repeat the kept rows by weight, as many in all as are kept.", flag_values=FLAGS)
SEED = flags.DEFINE_integer("seed", 0, "Seed of --resampled.", lower_bound=0, flag_values=FLAGS)
MERGED = flags.DEFINE_string("merged", None, "Directory for base and adapter as one model.", flag_values=FLAGS)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the merged weights.", flag_values=FLAGS)


def check_flags() -> None:
    """Raises a ValueError, before any work, if the flags contradict each other."""
    if not SELECTED.value and not MERGED.value:
        raise ValueError("nothing to do: give --selected=FILE.jsonl, --merged=DIR or both")
    of_selected = ("keep", "drop_implausible", "drop_dissimilar", "score_new", "refined", "resampled", "format")
    for needed, names in (("selected", of_selected), ("resampled", ("seed",)), ("merged", ("dtype",))):
        cli.refuse_without(FLAGS, needed, names)
    if SCORE_NEW.value and REFINED.value:
        raise ValueError("--refined has no responses for rows that the run never saw; remove it or --score_new")
    for flag in (DROP_IMPLAUSIBLE, DROP_DISSIMILAR):
        if SCORE_NEW.value and flag.value:
            raise ValueError(f"--{flag.name} has no numbers for rows that the run never saw; remove it or --score_new")
        if not 0 <= flag.value < 1:
            raise ValueError(f"--{flag.name}={flag.value} must be in [0, 1)")
    if not 0 < KEEP.value <= 1:
        raise ValueError(f"--keep={KEEP.value} must be in (0, 1]")
    if FLAGS["columns"].present and not SCORE_NEW.value:
        raise ValueError("--columns goes with --score_new")
    if SELECTED.value and pathlib.Path(SELECTED.value).suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"--selected={SELECTED.value} must end in .jsonl or .parquet")


def check_selected(workdir: pathlib.Path, config, out: pathlib.Path) -> None:
    """Raises a ValueError if `--selected` would replace rows that the run read, or be taken for a file that it writes."""
    from bilevel_jax.data import parts
    from bilevel_jax.runtime.workdir import OPENED

    inside = out.resolve().relative_to(workdir.resolve()).parts if out.resolve().is_relative_to(workdir.resolve()) else ()
    if inside and inside[0] in OPENED:
        raise ValueError(f"--selected={out} has the name of a file of the run; name another file")
    parts.refuse_overwriting(out, "--selected", config.data.upper, config.data.lower, *filter(None, [SCORE_NEW.value]))


def export_selected(workdir: pathlib.Path, config, out: pathlib.Path, command: str) -> None:
    """Writes the kept rows and their card, and prints what was written."""
    import numpy as np

    from bilevel_jax.export import cards, kept_rows, new_rows, records

    new = new_rows.rank(workdir, config, SCORE_NEW.value, COLUMNS.value) if SCORE_NEW.value else None
    selection = kept_rows.collect(
        workdir,
        config,
        keep=KEEP.value,
        drop_implausible=DROP_IMPLAUSIBLE.value,
        drop_dissimilar=DROP_DISSIMILAR.value,
        refined=REFINED.value,
        form=FORMAT.value,
        weight=not RESAMPLED.value,
        new=new,
    )
    kept, num_kept, num_different = selection.kept, int(selection.kept.sum()), None
    written: records.Records | records.Repeated = selection.records
    if RESAMPLED.value:
        copies = selected_rows.resample(selection.table["weight"].to_numpy()[selection.order], SEED.value)
        times = np.bincount(copies, minlength=num_kept)
        written, num_different = records.Repeated(selection.records, times), int((times > 0).sum())
    late = records.write(out, written)
    is_new, num_replaced = bool(new), 0
    if not is_new:
        replaced = kept & selected_rows.replaced(workdir, selection.table["id"])
        num_replaced = int((replaced if selection.refined is None else replaced & ~selection.refined).sum())
    provenance, card = cards.Provenance(workdir, config, command), out.with_name(f"{out.name}.card.md")
    text = cards.data_card(provenance, out, selection, is_new=is_new, num_replaced=num_replaced, num_different=num_different)
    files.write_atomically(card, text)

    say(f"{out}: {num_kept} of {selection.table.num_rows} rows kept")
    if selection.round_robin:
        say("  chosen among the heaviest half, round-robin over the trusted rows that they are most like")
    elif KEEP.value < selected_rows.ROUND_ROBIN:
        say("  by weight alone, because their nearest trusted rows are not known; half of the rows or more may train better")
    if num_different is not None:
        say(f"  {num_different} of them are in the file, repeated by weight; it has no column 'weight'")
    for name, number in selection.num_left_out.items():
        say(f"  {number} of the others are left out as {selected_rows.OPPOSITES[name]}")
    if selection.refined is not None:
        masked, refined = (selection.masked & kept).sum(), selection.refined.sum()
        hint = "" if masked or KEEP.value == 1 else "; masked rows have the smallest weights: --keep=1 keeps them"
        say(f"  {masked} of them are masked, {refined} of these have the model's response{hint}")
    if num_replaced:
        say(f"  warning: {num_replaced} of them were masked in the run. {cards.REPLACED}")
    for name in selection.renamed:
        say(f"  field '{name}' is kept as 'original_{name}'")
    if late:
        say(f"  field '{late[0]}' first has a value after 10 MB, where datasets.load_dataset fails; it loads a .parquet file")
    say(f"{card}: counts, weights, provenance")


def export_merged(workdir: pathlib.Path, config, out: pathlib.Path, command: str) -> None:
    """Writes base and adapter as one model with its card, and prints what was written."""
    from bilevel_jax.export import cards, merged_model
    from bilevel_jax.models import huggingface

    base = huggingface.locate(config.model.path)
    on_hub = not pathlib.Path(config.model.path).is_dir() and base != huggingface.PACKAGE.parent / config.model.path
    card = cards.model_card(cards.Provenance(workdir, config, command), DTYPE.value, config.model.path if on_hub else None)
    num_params = merged_model.write_merged_model(base, workdir / "adapter", out, dtype=DTYPE.value, texts={"README.md": card})
    say(f"{out}: {config.model.path} with its adapter, {num_params / 1e6:.1f}M parameters in {DTYPE.value}")


def main() -> None:
    from bilevel_jax.runtime.workdir import read_finished

    check_flags()
    workdir = pathlib.Path(WORKDIR.value)
    config = read_finished(workdir)
    if SELECTED.value:
        out = pathlib.Path(SELECTED.value)
        out.parent.mkdir(parents=True, exist_ok=True)
        files.check_out(out, "--selected")
        check_selected(workdir, config, out)
    if MERGED.value:
        from bilevel_jax.export import merged_model

        if not config.lora.rank:
            raise ValueError(f"--merged: the run learned all weights (lora.rank=0); {workdir / 'model'} is that model already")
        merged_model.check_free(pathlib.Path(MERGED.value))
    command = f"python -m bilevel_jax.export {shlex.join(sys.argv[1:])}"
    if SELECTED.value:
        export_selected(workdir, config, pathlib.Path(SELECTED.value), command)
    if MERGED.value:
        export_merged(workdir, config, pathlib.Path(MERGED.value), command)


if __name__ == "__main__":
    cli.run(main, FLAGS)

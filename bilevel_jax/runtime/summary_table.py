"""The table that is printed at the end of a run: losses before and after, the selector, generated responses, least trusted rows."""

import contextlib
import itertools
import pathlib

from bilevel_jax import text
from bilevel_jax.data import matching, streaming
from bilevel_jax.runtime import metrics, weight_table
from bilevel_jax.runtime.workdir import read_config

LOSSES = {"upper_loss": "trusted rows", "lower_loss": "mixture, as it is", "lower_clean_loss": "mixture, right answers"}
RIGHT = {"upper_right": "trusted rows", "lower_clean_right": "mixture"}
PAIR_LOSSES = {"upper_pair_loss": "trusted pairs", "lower_pair_loss": "mixture, as it is"}
PAIRS = {"upper_pair_accuracy": "trusted pairs", "lower_pair_accuracy": "mixture, as it is"}
FILES = {  # in a workdir, as they are named to the user
    "report.html": "report.html (open it in a browser)",
    "adapter": "adapter/ (PEFT)",
    "model": "model/",
    "weights": "weights/*.parquet",
    "responses.jsonl": "responses.jsonl",
    "metrics.jsonl": "metrics.jsonl",
    "summary.json": "summary.json",
    "tensorboard": "tensorboard/",
}


def summary_table(summary: dict, workdir: str | pathlib.Path) -> str:
    """The closing table of a finished run.

    Args:
      summary: content of its summary.json, possibly of an earlier version.
      workdir: its directory.
    """
    workdir = pathlib.Path(workdir)
    summary = metrics.with_current_keys(summary)
    lines = [f"{'held-out loss, nats per token':<34}{'before':>9}{'after':>9}"]
    lines += _before_and_after(summary, LOSSES, ".4f")
    if "best_step" in summary:
        lines.append(f"{'step of the lowest loss, trusted':<34}{summary['best_step']:>18} of {summary['steps']}")
    if losses := _before_and_after(summary, PAIR_LOSSES, ".4f"):
        lines += ["", "held-out loss of pairs", *losses]
    if right := _before_and_after(summary, RIGHT, ".1%"):
        lines += ["", "held-out questions answered right", *right]
    if pairs := _before_and_after(summary, PAIRS, ".1%"):
        lines += ["", "held-out pairs ranked correctly", *pairs]
    lines += _selector(summary)
    lines += _responses(summary)
    seconds = {key.removeprefix("time/"): value for key, value in summary.items() if key.startswith("time/")}
    lines += ["", f"{'seconds':<34}" + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())]
    lines += _least_trusted(workdir)
    lines += ["", f"in {workdir}: {', '.join(text for name, text in FILES.items() if (workdir / name).exists())}"]
    return "\n".join(lines)


def _before_and_after(summary: dict, names: dict[str, str], form: str) -> list[str]:
    """A line for each measure of the summary that has a name."""
    return [
        f"  {name:<32}{summary[f'start/{key}']:>9{form}}{summary[f'eval/{key}']:>9{form}}"
        for key, name in names.items()
        if {f"start/{key}", f"eval/{key}"} <= summary.keys()
    ]


def _line(name: str, value: str) -> str:
    return f"  {name:<37}{value:>13}"


def _selector(summary: dict) -> list[str]:
    """Distribution of the weights and, if the data have labels, how well the weights rank bad rows."""
    lines = []
    if {"selector/ess", "selector/weight_min", "selector/weight_max"} <= summary.keys():
        low, high = summary["selector/weight_min"], summary["selector/weight_max"]
        lines += ["", "weights of the rows"]
        lines.append(_line("effective sample size / N", f"{summary['selector/ess']:.4f}"))
        lines.append(_line("smallest and largest weight", f"{low:.3g} to {high:.3g}"))
    if {"selector/auroc", "selector/bad_kept"} <= summary.keys():
        lines.append(_line("AUROC for rows labelled bad", f"{summary['selector/auroc']:.4f}"))
        if "selector/auroc_plausible" in summary:  # not in files of earlier versions
            lines.append(_line("the same by plausible, not by weight", f"{summary['selector/auroc_plausible']:.4f}"))
        lines.append(_line("bad rows that are kept, of all bad", f"{summary['selector/bad_kept']:.1%}"))
    if "selector/bad_among_kept" in summary:  # not in files of earlier versions
        lines.append(_line("kept rows that are bad, of all kept", f"{summary['selector/bad_among_kept']:.1%}"))
    return lines


def _responses(summary: dict) -> list[str]:
    """Number of generated responses, and how many of them are correct if the data have labels and correct responses."""
    lines = []
    if "online/responses" in summary:
        lines += ["", "questions answered by the model"]
        lines.append(_line("generated responses", f"{summary['online/responses']:.0f}"))
    if "online/correction_rate" in summary:
        lines.append(_line("correct where the data are bad", f"{summary['online/correction_rate']:.1%}"))
    return lines


def _least_trusted(workdir: pathlib.Path, count: int = 5) -> list[str]:
    """The rows with the smallest weights after the last epoch."""
    table = weight_table.latest(workdir)
    if table is None or weight_table.is_equal(table):
        return []
    least = table.sort_by([("rank", "descending")]).slice(0, count)
    rows, questions = least.to_pylist(), {}
    with contextlib.suppress(ValueError, OSError):  # the data are no longer available: show the ids without the questions
        matched = matching.match(streaming.reopen(read_config(workdir)), least["id"], strict=False)
        questions = {row.id: row.question for _, row in itertools.islice(matched, len(rows))}
    lines = [
        f"  {row['id']:<20}{row['weight']:<10.3g}{text.one_line(row['source'], 16):<18}"
        + text.one_line(questions.get(row["id"], ""), 60)
        for row in rows
    ]
    return ["", "least trusted rows (id, weight, source, question)", *(line.rstrip() for line in lines)]

"""What a person sees at the end of a run: losses before and after, what the selector found, the rows it trusts least."""

import pathlib

from bilevel_jax import text
from bilevel_jax.data import levels
from bilevel_jax.runtime import weight_table
from bilevel_jax.runtime.workdir import read_config


def summary_table(summary: dict, workdir: str | pathlib.Path) -> str:
    """The closing table of a finished run."""
    workdir = pathlib.Path(workdir)
    lines = [f"{'held-out loss, nats per token':<34}{'before':>9}{'after':>9}"]
    names = {"upper_loss": "trusted rows", "lower_loss": "mixture, as it is", "lower_clean_loss": "mixture, right answers"}
    for key, name in names.items():
        if f"eval/{key}" in summary:
            lines.append(f"  {name:<32}{summary[f'start/{key}']:>9.4f}{summary[f'eval/{key}']:>9.4f}")
    pairs = {"upper_pair_accuracy": "trusted pairs", "lower_pair_accuracy": "mixture, as it is"}
    if told := [key for key in pairs if f"eval/{key}" in summary]:
        lines += ["", "held-out pairs told apart"]
        lines += [f"  {pairs[key]:<32}{summary[f'start/{key}']:>9.1%}{summary[f'eval/{key}']:>9.1%}" for key in told]
    if "selector/ess" in summary:
        lines += ["", "selector"]
        lines.append(f"  {'effective sample size / N':<32}{summary['selector/ess']:>18.4f}")
        low, high = summary["selector/weight_min"], summary["selector/weight_max"]
        lines.append(f"  {'weights, lightest to heaviest':<32}{f'{low:.3g} to {high:.3g}':>18}")
    if "selector/auroc" in summary:
        lines.append(f"  {'AUROC against the planted truth':<32}{summary['selector/auroc']:>18.4f}")
        lines.append(f"  {'bad rows among those kept':<32}{summary['selector/bad_kept']:>18.1%}")
    if "online/responses" in summary:
        lines += ["", "questions asked again"]
        lines.append(f"  {'answers of the model itself':<32}{summary['online/responses']:>18.0f}")
    if "online/correction_rate" in summary:
        lines.append(f"  {'right ones where the data are bad':<33}{summary['online/correction_rate']:>17.1%}")
    seconds = {key.removeprefix("time/"): value for key, value in summary.items() if key.startswith("time/")}
    lines += ["", f"{'seconds':<34}" + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())]
    lines += _lightest(workdir)
    left = "adapter/ (PEFT), weights/*.parquet, metrics.jsonl, summary.json, tensorboard/"
    lines += ["", f"in {workdir}: report.html (open it in a browser), {left}"]
    return "\n".join(lines)


def _lightest(workdir: pathlib.Path, count: int = 5) -> list[str]:
    """The last epoch's least trusted rows."""
    table = weight_table.latest(workdir)
    if table is None:
        return []
    lightest = table.sort_by([("rank", "descending")]).slice(0, count).to_pylist()
    try:
        questions = {row.id: row.question for row in levels.reopen(read_config(workdir))}
    except (ValueError, OSError):  # the data went away meanwhile; their ids are still worth showing
        questions = {}
    lines = [
        f"  {row['id']:<20}{row['weight']:<10.3g}{text.one_line(row['source'], 16):<18}"
        + text.one_line(questions.get(row["id"], ""), 60)
        for row in lightest
    ]
    return ["", "least trusted rows (id, weight, source, question)", *(line.rstrip() for line in lines)]

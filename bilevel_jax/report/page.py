"""Renders a run, finished or not, as one HTML page: `report.html`.

The page has no script and loads nothing; its content security policy forbids both. Rows and responses are untrusted: markup,
control and bidirectional characters in them are escaped.
"""

import json
import pathlib
from collections.abc import Iterable

import jinja2
import numpy as np

from bilevel_jax import files
from bilevel_jax.data import rows as data_rows
from bilevel_jax.report import cells, corners, panels, run_data, shown_rows
from bilevel_jax.report.run_data import RunData
from bilevel_jax.runtime import stored, weight_table
from bilevel_jax.text import one_line, say, visible

MAX_SOURCES = 40  # in the table


# --------------------------------------------------------------------------------------------------------------------
# Head
# --------------------------------------------------------------------------------------------------------------------


def method_text(run: RunData) -> str:
    """What the run did, for a reader who does not know the method."""
    if run.config.method == "mixing":
        return (
            "Direct mixing, the baseline: the model was trained on the trusted rows and the mixture at a fixed ratio. "
            "All rows have the same weight."
        )
    selection = run.config.selection
    unit = {"domain": "source", "turn": "answer"}.get(selection.unit, "row")
    weights, purpose = (
        f"the run learned one weight for each {unit} of the mixture",
        ", so that the model does best on the trusted rows",
    )
    if selection.freeze or selection.rule == "uniform":
        equal = "all rows of the mixture had the same weight (the control)"
        weights, purpose = "each row of the mixture had a given weight, which stayed as it was" if selection.freeze else equal, ""
    elif selection.rule == "metagradient":
        weights += " before it, by training several times"
    else:
        weights += ", jointly with the model"
    if run.config.method == "offline":
        return f"Data selection: {weights}{purpose}."
    ratio = f"{run.config.online.ratio:.0%}"
    dynamic = run.config.method == "dynamic"
    which = f"the {ratio} of the rows with the smallest weights" if dynamic else f"a fixed random {ratio} of the rows"
    return f"Data selection with self-refinement: {weights}, and the model regenerated the responses of {which}."


def _first_and_last(run: RunData, key: str) -> tuple[float, float] | None:
    """A held-out loss before training and at the end."""
    values = run_data.series(run.events, f"eval/{key}")[1]
    if len(values) < 2:
        return None
    return values[0], run.summary.get(f"eval/{key}", values[-1])  # of the adapter that is kept, not of the last step


def result_text(losses: tuple[float, float] | None, right: tuple[float, float] | None = None) -> str:
    """The held-out loss on trusted rows, before and after, and the share of their questions answered right, if measured."""
    if losses is None:
        return "The run has not measured a loss after the start yet."
    before, after = losses
    if before <= 0:
        return f"The loss on held-out trusted rows went from {before:.4f} to {after:.4f}."
    change = after / before - 1
    if abs(change) < 0.005:
        text = f"The loss on held-out trusted rows stayed at {after:.4f}."
    else:
        verb, percent = ("fell", f"−{-change:.0%}") if change < 0 else ("rose", f"+{change:.0%}")
        text = f"The loss on held-out trusted rows {verb} from {before:.4f} to {after:.4f} ({percent})."
    return text if right is None else f"{text} Of their questions {right[0]:.1%} were answered right before, {right[1]:.1%} after."


def best_text(run: RunData) -> str:
    """Which step the adapter is of, where it is not the last one (`eval.keep_best`)."""
    best = stored.kept_step(run.summary, run.config.eval.keep_best)
    if best is None:
        return ""
    return f" The adapter is that of step {best:.0f} of {run.summary['steps']:.0f}, where the loss on trusted rows was lowest."


def tiles(run: RunData) -> list[tuple[str, str, str]]:
    """(name, value, note) of the numbers at the head of the page."""
    cells = []
    upper, lower = (run_data.loss_key(run, level) for level in ("upper", "lower"))
    has_right = lower == "lower_loss" and _first_and_last(run, "lower_clean_loss")
    losses = {upper: "Loss on trusted rows"}
    losses |= {"lower_clean_loss": "Mixture, right answers"} if has_right else {lower: "Mixture, as it is"}
    for key, name in losses.items():
        if values := _first_and_last(run, key):
            cells.append((name, f"{values[0]:.3g} → {values[1]:.3g}", f"{run_data.unit(key)}, held out"))
    if run.tables:
        last = run_data.epoch_metrics(run, max(run.tables))
        cells.append(("Effective sample size", f"{last['ess']:.1%}", "of the rows; 100% = equal weights"))
        if "auroc" in last and run_data.has_ranking(run):
            label = one_line(run.config.data.label, 20)
            cells.append(("AUROC", f"{last['auroc']:.3f}", f"chance that a row marked “{label}” has a smaller weight"))
    num_responses, num_right, num_bad = (
        sum(run_data.series(run.events, f"online/{name}")[1]) for name in ("responses", "bad_right", "bad_answered")
    )
    if num_responses:
        note = f"{num_right / num_bad:.0%} right where the data are bad" if num_bad else "by the model"
        cells.append(("Responses generated", f"{num_responses:,.0f}", note))
    seconds = sum(run_data.time_split(run).values())
    if seconds:
        cells.append(("Time", f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s", "from start to end"))
    return cells


# --------------------------------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------------------------------


def empty_reasons(run: RunData, compared: list[dict]) -> dict[str, str]:
    """Why a section is empty, in one line; "" for a section with content."""
    reasons = dict.fromkeys(("losses", "weights", "sources", "rows", "corners", "lengths", "responses", "time"), "")
    if not run.events:
        reasons["losses"] = "Nothing is logged yet."
    if not run.tables:
        mixing = run.config.method == "mixing"
        reason = "Direct mixing has no weights." if mixing else "No epoch is finished yet, so there are no weights."
        reasons |= dict.fromkeys(("weights", "sources", "rows", "corners", "lengths"), reason)
    elif not run_data.has_ranking(run):
        reason = "All weights are equal, as selection.rule=uniform leaves them, so the rows have no ranking."
        reasons |= dict.fromkeys(("sources", "rows", "lengths"), reason)
    else:
        if len(np.unique(run.tables[max(run.tables)]["source"])) < 2:
            reasons["sources"] = "All rows have the same source."
        if not run_data.in_data(run).any():
            reasons["lengths"] = run.notice
    if run.tables and not corners.measures(run.tables[max(run.tables)]):
        reasons["corners"] = "The tables of weights do not have these numbers, which earlier versions did not write."
    if run.config.method not in ("online", "dynamic"):
        reasons["responses"] = f"With method={run.config.method} the model generates no responses."
    elif not compared:
        reasons["responses"] = run.notice or "No responses to masked rows are recorded yet."
    if not run.summary:
        reasons["time"] = "Known when the run is finished."
    return reasons


def render(run: RunData) -> str:
    """The report as HTML."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    )
    compared = cells.compared_responses(run) if run.tables else []
    reasons, epochs = empty_reasons(run, compared), list(run.tables)
    lengths = {} if reasons["lengths"] else run_data.response_lengths(run)
    measures = [] if reasons["corners"] else corners.measures(run.tables[max(run.tables)])
    shares = [] if reasons["sources"] else run_data.source_shares(run)
    return environment.get_template("report.html.jinja").render(
        run=run,
        method_text=method_text(run),
        result_text=result_text(_first_and_last(run, run_data.loss_key(run, "upper")), _first_and_last(run, "upper_right"))
        + best_text(run),
        tiles=tiles(run),
        last_step=max((event["step"] for event in run.events), default=0),
        reasons=reasons,
        figures=panels.figures(run, lengths),
        epochs=epochs,
        metrics={epoch: run_data.epoch_metrics(run, epoch) for epoch in epochs},
        extremes={} if reasons["rows"] else {epoch: cells.extremes(run, epoch) for epoch in epochs},
        sources=[(one_line(name, 60), num_rows, share) for name, num_rows, share in shares[:MAX_SOURCES]],
        num_more_sources=max(0, len(shares) - MAX_SOURCES),
        repeated=run_data.repeated_rows(run),
        measures={name: weight_table.MEASURES[name] for name in measures},
        corners=cells.corner_rows(run) if measures else [],
        unlike=cells.unlike_rows(run) if measures else [],
        max_dots=corners.MAX_DOTS,
        lengths=lengths,
        token_weighted=cells.token_weighted_responses(run) if run.tables else [],
        compared=compared,
        num_compared=shown_rows.ROWS if run.tables and len(run.labels) > shown_rows.ALL else 0,
        seconds=run_data.time_split(run),
        settings=json.loads(run.config.to_json()),
        visible=visible,
    )


def write(workdir: pathlib.Path, rows: Iterable[data_rows.Row] | None = None) -> pathlib.Path:
    """Writes `report.html` into a workdir and returns its path; prints which rows are missing, if any.

    Arguments and errors as for `run_data.read`.
    """
    file, run = workdir / "report.html", run_data.read(workdir, rows)
    if run.notice:
        say(one_line(run.notice, 1000))
    files.write_atomically(file, render(run))
    return file

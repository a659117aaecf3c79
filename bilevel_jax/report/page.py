"""Renders a run, finished or not, as one HTML page: `report.html`.

The page has no script and loads nothing; its content security policy forbids both. Rows and responses are untrusted: markup,
control and bidirectional characters in them are escaped.
"""

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jinja2
import markupsafe
import numpy as np

from bilevel_jax import files
from bilevel_jax.data import rendering
from bilevel_jax.data import rows as data_rows
from bilevel_jax.report import corners, plots, run_data, shown_rows
from bilevel_jax.report.run_data import RunData
from bilevel_jax.runtime import weight_table
from bilevel_jax.text import one_line, say, visible

NUM_TINTS = 5  # tints from a weight of 1 to a weight of 0
NUM_COMPARED = 8  # generated responses shown next to those of the data
SHORT, LONG = 160, 2000  # characters of a text, folded and unfolded
MAX_SHORT_LINES = 5
MAX_FIGURE_SOURCES, MAX_TABLE_SOURCES = 12, 40
MAX_CURVES = 5  # epochs in the histogram


# --------------------------------------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------------------------------------


class Text(NamedTuple):
    """A text of a row, escaped except for markup, which the template escapes."""

    short: str  # folded
    full: str  # unfolded; "" if `short` is the complete text
    num_cut: int  # characters that `full` leaves out


def text_of(text: str) -> Text:
    if len(text) <= SHORT and text.count("\n") < MAX_SHORT_LINES:
        return Text(visible(text), "", 0)
    return Text(one_line(text, SHORT), visible(text[:LONG]), max(0, len(text) - LONG))


def _learned_earlier(run: RunData, row: data_rows.Row, masked: bool) -> bool:
    """Whether the run learned the answers before the response of a row."""
    # Runs of earlier versions have no such keys.
    one_answer = run.config.data.learn == "last" or run.config.selection.unit == "turn"
    if masked or row.rejected is not None or one_answer:
        return False
    return any(role == "assistant" for role, _ in row.messages)


def _marked_question(row: data_rows.Row) -> str:
    """The question of a row, with the answers in it between marks."""
    answer = f"{rendering.OPENING}{{}}{rendering.CLOSING}"
    return "\n\n".join(answer.format(text) if role == "assistant" and text.strip() else text for role, text in row.messages)


def row_cells(run: RunData, table: Mapping[str, np.ndarray], i: int) -> dict:
    """Row `i` of a weight table, with the texts of the row, as the template shows it."""
    row = run.rows.get(table["id"][i])
    label = run.config.data.label
    masked = bool(table["masked"][i]) if "masked" in table else False
    marked = row is not None and _learned_earlier(run, row, masked)
    return {
        "id": visible(str(table["id"][i])),
        "weight": float(table["weight"][i]),
        "rank": int(table["rank"][i]),
        **{name: float(table[name][i]) for name in weight_table.MEASURES if not np.isnan(table[name][i])},
        "visits": int(table["visits"][i]),
        "source": one_line(str(table["source"][i]), 40),
        "masked": masked,
        "marked": marked,
        "question": text_of(_marked_question(row) if marked else row.question) if row else None,
        "response": text_of(row.response) if row else None,
        "bad": data_rows.mark(row, label) if row else None,
    }


def extremes(run: RunData, epoch: int) -> tuple[list[dict], list[dict]]:
    """The heaviest rows of an epoch, heaviest first, and the lightest rows, lightest first."""
    table = run.tables[epoch]
    first, last = shown_rows.extremes(table)
    return [row_cells(run, table, i) for i in first], [row_cells(run, table, i) for i in last]


def unlike_rows(run: RunData) -> list[dict]:
    """The rows of the last epoch that are least like the trusted ones."""
    table = run.tables[max(run.tables)]
    return [row_cells(run, table, i) for i in shown_rows.unlike(table)]


def corner_rows(run: RunData) -> list[tuple[corners.Corner, list[dict]]]:
    """The corners of the last epoch, each with its most extreme rows."""
    table = run.tables[max(run.tables)]
    split = corners.split(table, run_data.labels(run), run_data.in_data(run))
    return [(corner, [row_cells(run, table, i) for i in corner.examples]) for corner in split]


def _tinted_pieces(text: str, token_weights: Mapping) -> list[tuple[str, int]]:
    """(text, tint) pieces of a response. The tint is 0 for weights of 1 and more, NUM_TINTS - 1 for weights near 0.

    Args:
      token_weights: a row of the token table: `weight`, `start` and `stop` of each token.
    """
    end = token_weights["start"][0]
    pieces = [(visible(text[:end]), 0)] if end else []
    for stop, weight in zip(token_weights["stop"], token_weights["weight"]):
        # A piece includes the characters between this token and the previous one, which are mostly spaces.
        pieces.append((visible(text[end:stop]), min(NUM_TINTS - 1, int(NUM_TINTS * max(0.0, 1 - weight)))))
        end = max(end, stop)
    return pieces


def token_weighted_responses(run: RunData) -> list[dict]:
    """The responses whose token weights have the smallest ESS/T, with tinted pieces."""
    if run.tokens is None:
        return []
    table, weights = run.tables[max(run.tables)], run.tokens["weight"].to_numpy()
    ess = shown_rows.token_ess(run.tokens)
    index_of = {row_id: i for i, row_id in enumerate(table["id"])}
    ids = run.tokens["id"].to_pylist()
    order = [i for i in np.argsort(ess, kind="stable") if len(weights[i]) > 1 and ids[i] in run.rows and ids[i] in index_of]
    responses = []
    for i in order[: shown_rows.NUM_TOKEN_WEIGHTED]:
        pieces = _tinted_pieces(run.rows[ids[i]].response, run.tokens.slice(i, 1).to_pylist()[0])
        responses.append(row_cells(run, table, index_of[ids[i]]) | {"pieces": pieces, "ess": float(ess[i])})
    return responses


def compared_responses(run: RunData) -> list[dict]:
    """Masked rows whose latest generated response has the fewest words in common with that of the data; ties by weight."""
    table = run.tables[max(run.tables)]
    latest: dict[str, dict] = {}
    for response in run.responses:  # ordered by step; of several samples of a step, the first counts
        if response["id"] not in latest or response["step"] > latest[response["id"]]["step"]:
            latest[response["id"]] = response
    indices = [i for i, row_id in enumerate(table["id"]) if row_id in latest and table["masked"][i] and row_id in run.rows]
    common = {i: run_data.words_in_common(run.rows[table["id"][i]].response, latest[table["id"][i]]["text"]) for i in indices}
    compared = []
    for i in sorted(indices, key=lambda i: (common[i], table["weight"][i]))[:NUM_COMPARED]:
        row, response = run.rows[table["id"][i]], latest[table["id"][i]]
        truth = row.fields.get(run.config.data.truth)
        compared.append(
            row_cells(run, table, i)
            | {"generated": text_of(response["text"]), "step": response["step"], "common": common[i]}
            | {"truth": text_of(truth) if isinstance(truth, str) else None}
            | {"right": response["text"].strip() == truth.strip() if isinstance(truth, str) else None}
        )
    return compared


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
    weights = "the run learned one weight for each row of the mixture, jointly with the model"
    if run.config.selection.freeze:
        weights = "each row of the mixture had a given weight, which stayed as it was"
    if run.config.method == "offline":
        purpose = "" if run.config.selection.freeze else ", so that the model does best on the trusted rows"
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
    best, steps = run.summary.get("best_step"), run.summary.get("steps")
    if not run.config.eval.keep_best or best is None or best == steps:
        return ""
    return f" The adapter is that of step {best:.0f} of {steps:.0f}, where the loss on trusted rows was lowest."


def tiles(run: RunData) -> list[tuple[str, str, str]]:
    """(name, value, note) of the numbers at the head of the page."""
    cells = []
    losses = {"upper_loss": "Loss on trusted rows", "lower_clean_loss": "Mixture, right answers"}
    if not _first_and_last(run, "lower_clean_loss"):
        losses["lower_loss"] = "Mixture, as it is"
    for key, name in losses.items():
        if values := _first_and_last(run, key):
            cells.append((name, f"{values[0]:.3g} → {values[1]:.3g}", "nats per token, held out"))
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
# Figures
# --------------------------------------------------------------------------------------------------------------------

Panels = list[tuple[str, str]]  # (title, SVG)


def loss_panels(run: RunData) -> Panels:
    panels = []
    for level, name in (("upper", "trusted rows"), ("lower", "mixture")):
        held_out = {"held out": run_data.series(run.events, f"eval/{level}_loss")}
        right = run_data.series(run.events, "eval/lower_clean_loss")
        if level == "lower" and right[0]:
            held_out = {"held out, as it is": held_out["held out"], "right answers": right}
        train = run_data.series(run.events, f"train/{level}_loss")
        if train[0] or any(line[0] for line in held_out.values()):
            panels.append((f"Loss on {name}", plots.losses(f"Loss on {name}", train, held_out)))
    return panels


def _kinds(run: RunData, bad: np.ndarray | None, values: np.ndarray) -> dict[str, np.ndarray]:
    """Values of other rows and of bad rows, by name; empty unless there are both."""
    if bad is None or not bad.any() or bad.all():
        return {}
    return {"other rows": values[~bad], f"marked {one_line(run.config.data.label, 12)}": values[bad]}


def weight_panels(run: RunData) -> Panels:
    panels = []
    ess = run_data.series(run.events, "selector/ess")
    if len(ess[0]) > 1:
        title = "Effective sample size by epoch"
        panels.append((title, plots.ess(title, ess)))
        names = "p01", "p10", "p50", "p90", "p99"
        quantiles = {name: run_data.series(run.events, f"selector/weight_{name}")[1] for name in names}
        if all(len(values) == len(ess[0]) for values in quantiles.values()):
            title = "Percentiles of the weights by epoch"
            panels.append((title, plots.spread(title, ess[0], quantiles)))
    if run.tables:
        epochs = list(run.tables)
        shown = sorted({epochs[i] for i in np.linspace(0, len(epochs) - 1, MAX_CURVES).round().astype(int)})
        title = "Histogram of the weights by epoch"
        panels.append((title, plots.histogram(title, {f"epoch {epoch}": run.tables[epoch]["weight"] for epoch in shown})))
        last = run.tables[epochs[-1]]
        if kinds := _kinds(run, run_data.labels(run), last["weight"]):
            title = "Final weights of marked rows and of other rows"
            panels.append((title, plots.histogram(title, kinds, kinds=True)))
    return panels


def corner_panels(run: RunData) -> Panels:
    """Plausible and useful of each row, or plausible and weight where useful is not known."""
    table = run.tables[max(run.tables)] if run.tables else {}
    if not table or not corners.measures(table):
        return []
    has_useful = "useful" in corners.measures(table)
    rows, bad = corners.known_rows(table), run_data.labels(run)
    lines = float(np.median(table["plausible"][rows])), 0.0 if has_useful else None
    rows = corners.sample(rows)
    dots = np.stack([table["plausible"][rows], table["useful" if has_useful else "weight"][rows]], axis=1).astype(float)
    kinds = _kinds(run, None if bad is None else bad[rows], dots) or {"rows": dots}
    title = f"Plausible and {'useful' if has_useful else 'weight'}, a dot for each row"
    return [(title, plots.scatter(title, ("plausible", "useful" if has_useful else "weight (mean 1)"), kinds, lines))]


def source_panels(run: RunData) -> Panels:
    if not run.tables:
        return []
    moved = sorted(run_data.source_shares(run)[:MAX_FIGURE_SOURCES], key=lambda item: item[2][0] - item[2][-1])
    if len(moved) < 2:
        return []
    names = [one_line(name, 22) or "(none)" for name, _, _ in moved]
    title = "Share of the total weight by source"
    return [(title, plots.sources(title, names, np.stack([shares for _, _, shares in moved])))]


def figures(run: RunData, lengths: Mapping[str, list[float]]) -> dict[str, list[tuple[str, markupsafe.Markup]]]:
    """(title, SVG) of the figures of each section. A section without data has no figures."""
    panels = {
        "losses": loss_panels(run),
        "weights": weight_panels(run),
        "sources": source_panels(run),
        "corners": corner_panels(run),
    }
    if run.tables and lengths:
        title = "Length of the responses by epoch"
        panels["lengths"] = [(title, plots.lengths(title, list(run.tables), lengths))]
    seconds = run_data.time_split(run)
    if seconds:
        panels["time"] = [("Share of the time", plots.times("Seconds by activity", seconds))]
    return {section: [(title, markupsafe.Markup(svg)) for title, svg in items] for section, items in panels.items() if items}


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
        reason = "All weights are equal (the selector was frozen), so the rows have no ranking."
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
    compared = compared_responses(run) if run.tables else []
    reasons, epochs = empty_reasons(run, compared), list(run.tables)
    lengths = {} if reasons["lengths"] else run_data.response_lengths(run)
    measures = [] if reasons["corners"] else corners.measures(run.tables[max(run.tables)])
    shares = [] if reasons["sources"] else run_data.source_shares(run)
    return environment.get_template("report.html.jinja").render(
        run=run,
        method_text=method_text(run),
        result_text=result_text(_first_and_last(run, "upper_loss"), _first_and_last(run, "upper_right")) + best_text(run),
        tiles=tiles(run),
        last_step=max((event["step"] for event in run.events), default=0),
        reasons=reasons,
        figures=figures(run, lengths),
        epochs=epochs,
        metrics={epoch: run_data.epoch_metrics(run, epoch) for epoch in epochs},
        extremes={} if reasons["rows"] else {epoch: extremes(run, epoch) for epoch in epochs},
        sources=[(one_line(name, 60), num_rows, share) for name, num_rows, share in shares[:MAX_TABLE_SOURCES]],
        num_more_sources=max(0, len(shares) - MAX_TABLE_SOURCES),
        repeated=run_data.repeated_rows(run),
        measures={name: weight_table.MEASURES[name] for name in measures},
        corners=corner_rows(run) if measures else [],
        unlike=unlike_rows(run) if measures else [],
        max_dots=corners.MAX_DOTS,
        lengths=lengths,
        token_weighted=token_weighted_responses(run) if run.tables else [],
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

"""A run on one page, finished or not: `report.html`.

The page stands alone: no script, and nothing is fetched, which its content security policy forbids besides. Rows and answers are
untrusted: whatever comes from them is escaped, and what a browser would obey instead of show is written out.
"""

import collections
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jinja2
import markupsafe
import numpy as np

from bilevel_jax import files
from bilevel_jax.data import rows as data_rows
from bilevel_jax.report import plots, run_data
from bilevel_jax.report.run_data import Run
from bilevel_jax.text import one_line, visible

COUNT = 5  # rows shown from either end of an epoch's ranking
WEIGHED = 8  # responses shown with the weights of their words
TINTS = 5  # steps from a weight of 1 to one of 0
CHANGED = 8  # answers shown beside those of the data
SHORT, LONG = 160, 2000  # characters of a text: at first sight, and opened
MOST_LINES = 5  # at first sight
MOST_SOURCES = 12, 40  # in the figure, in the table
MOST_CURVES = 5  # epochs in the histogram


class Text(NamedTuple):
    """A text from a row, safe but for markup: at first sight, and opened."""

    short: str
    full: str  # "" where `short` is all there is
    cut: int  # characters that even `full` leaves out


def text_of(text: str) -> Text:
    if len(text) <= SHORT and text.count("\n") < MOST_LINES:
        return Text(visible(text), "", 0)
    return Text(one_line(text, SHORT), visible(text[:LONG]), max(0, len(text) - LONG))


def verdict(run: Run, table: Mapping[str, np.ndarray], i: int) -> dict:
    """A row as the tables show it."""
    row = run.rows.get(table["id"][i])
    field = run.config.data.label
    return {
        "id": visible(str(table["id"][i])),
        "weight": float(table["weight"][i]),
        "rank": int(table["rank"][i]),
        "visits": int(table["visits"][i]),
        "source": one_line(str(table["source"][i]), 40),
        "masked": bool(table["masked"][i]) if "masked" in table else False,
        "question": text_of(row.question) if row else None,
        "response": text_of(row.response) if row else None,
        "bad": bool(row.fields[field]) if row and row.fields.get(field) is not None else None,
    }


def extremes(run: Run, epoch: int) -> tuple[list[dict], list[dict]]:
    """The heaviest rows of an epoch, heaviest first, and the lightest, lightest first."""
    table = run.tables[epoch]
    best = np.argsort(table["rank"])
    number = min(COUNT, len(best) // 2)
    return [verdict(run, table, i) for i in best[:number]], [verdict(run, table, i) for i in best[::-1][:number]]


def weighed_words(run: Run) -> list[dict]:
    """The responses whose words weigh least alike, by the effective share of their tokens T/Σv², each as (text, tint) pieces:
    0 for a weight of 1 and more, `TINTS` - 1 for one near 0."""
    if run.tokens is None:
        return []
    table, column = run.tables[max(run.tables)], run.tokens["weight"].combine_chunks()
    length, flat = column.value_lengths().to_numpy(), column.flatten().to_numpy()
    squares = np.bincount(np.repeat(np.arange(len(length)), length), flat**2, len(length))
    share = length / np.where(squares > 0, squares, np.inf)
    place_of = {row_id: i for i, row_id in enumerate(table["id"])}
    ids = run.tokens["id"].to_pylist()
    known = [i for i in np.argsort(share, kind="stable") if length[i] > 1 and ids[i] in run.rows and ids[i] in place_of]
    found = []
    for i in known[:WEIGHED]:
        text, of_row = run.rows[ids[i]].response, run.tokens.slice(i, 1).to_pylist()[0]
        pieces, end = [], of_row["start"][0]
        lead = [(visible(text[:end]), 0)] if end else []
        for stop, weight in zip(of_row["stop"], of_row["weight"]):  # with what stands before it, spaces mostly
            pieces.append((visible(text[end:stop]), min(TINTS - 1, int(TINTS * max(0.0, 1 - weight)))))
            end = max(end, stop)
        found.append(verdict(run, table, place_of[ids[i]]) | {"pieces": lead + pieces, "effective": float(share[i])})
    return found


def changed(run: Run) -> list[dict]:
    """Masked rows whose latest own answer has the fewest words in common with that of the data; of equals, the lightest first."""
    table = run.tables[max(run.tables)]
    latest: dict[str, dict] = {}
    for answer in run.answers:  # in the order of steps; of several answers to a question, the first
        if answer["id"] not in latest or answer["step"] > latest[answer["id"]]["step"]:
            latest[answer["id"]] = answer
    known = [i for i, row_id in enumerate(table["id"]) if row_id in latest and table["masked"][i] and row_id in run.rows]
    common = {i: run_data.words_in_common(run.rows[table["id"][i]].response, latest[table["id"][i]]["text"]) for i in known}
    found = []
    for i in sorted(known, key=lambda i: (common[i], table["weight"][i]))[:CHANGED]:
        row, answer = run.rows[table["id"][i]], latest[table["id"][i]]
        truth = row.fields.get(run.config.data.truth)
        found.append(
            verdict(run, table, i)
            | {"refined": text_of(answer["text"]), "step": answer["step"], "common": common[i]}
            | {"truth": text_of(truth) if isinstance(truth, str) else None}
            | {"right": answer["text"].strip() == truth.strip() if isinstance(truth, str) else None}
        )
    return found


def overview(run: Run) -> dict:
    """The head of the page: what was done, what came of it, and a few large numbers."""
    method, events = run.config.method, run.events
    what = {
        "mixing": "Direct mixing, the baseline: the model learned from the trusted rows and from the mixture at a fixed ratio, "
        "and no row was weighed.",
        "offline": "Data selection: together with the model, one weight was learned for every row of the mixture, so that the "
        "model does best on rows that you trust.",
    }
    refined = "Self-refining: as in data selection every row of the mixture was weighed, and "
    if method in ("online", "dynamic"):
        which = "weighed least" if method == "dynamic" else "a fixed random draw had chosen"
        what[method] = f"{refined}the {run.config.online.ratio:.0%} of the questions that {which} were answered anew by the model."
    tiles = []

    def before_and_after(key: str, name: str) -> tuple[float, float] | None:
        values = run_data.series(events, f"eval/{key}")[1]
        if len(values) > 1:
            tiles.append((name, f"{values[0]:.3g} → {values[-1]:.3g}", "nats per token, held out"))
        return (values[0], values[-1]) if len(values) > 1 else None

    trusted = before_and_after("upper_loss", "Loss on trusted rows")
    if not before_and_after("lower_clean_loss", "Mixture, right answers"):
        before_and_after("lower_loss", "Mixture, as it is")
    if run.tables:
        last = run_data.epoch_measures(run, max(run.tables))
        tiles.append(("Effective sample size", f"{last['ess']:.1%}", "of the rows; 100% = all weigh the same"))
        if "auroc" in last and run_data.ranked(run):
            label = one_line(run.config.data.label, 20)
            tiles.append(("AUROC", f"{last['auroc']:.3f}", f"chance that a row marked “{label}” weighs less"))
    responses = sum(run_data.series(events, "online/responses")[1])
    if responses:
        right, asked = (sum(run_data.series(events, f"online/{name}")[1]) for name in ("bad_right", "bad_answered"))
        note = f"{right / asked:.0%} right where the data are bad" if asked else "by the model itself"
        tiles.append(("Answers renewed", f"{responses:,.0f}", note))
    seconds = sum(run_data.time_split(run).values())
    if seconds:
        tiles.append(("Time", f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s", "from the start to the end"))
    result = "No loss is known yet after the start."
    if trusted:
        change = trusted[1] / trusted[0] - 1
        moved = f"{'fell' if change < 0 else 'rose'} from {trusted[0]:.4f} to {trusted[1]:.4f} ({change:+.0%})".replace("-", "−")
        result = f"The loss on trusted rows that were held out {moved if abs(change) >= 0.005 else f'stayed at {trusted[1]:.4f}'}."
    return {"what": what[method], "result": result, "tiles": tiles, "last_step": max((e["step"] for e in events), default=0)}


def figures(run: Run, lengths: Mapping[str, list[float]]) -> dict[str, list[tuple[str, markupsafe.Markup]]]:
    """(title, SVG) by section; a section without data has none."""
    events, found = run.events, collections.defaultdict(list)
    for level, name in (("upper", "trusted rows"), ("lower", "mixture")):
        held_out = {"held out": run_data.series(events, f"eval/{level}_loss")}
        right = run_data.series(events, "eval/lower_clean_loss")
        if level == "lower" and right[0]:
            held_out = {"held out, as it is": held_out["held out"], "right answers": right}
        train = run_data.series(events, f"train/{level}_loss")
        if train[0] or any(line[0] for line in held_out.values()):
            found["losses"].append((f"Loss on {name}", plots.losses(f"Loss on {name}", train, held_out)))
    ess = run_data.series(events, "selector/ess")
    if len(ess[0]) > 1:
        title = "Effective sample size over time"
        found["ess"].append((title, plots.ess(title, ess)))
        names = "p01", "p10", "p50", "p90", "p99"
        quantiles = {name: run_data.series(events, f"selector/weight_{name}")[1] for name in names}
        if len(quantiles["p50"]) == len(ess[0]):
            found["ess"].append(("Weights over time", plots.spread("Weights over time", ess[0], quantiles)))
    if run.tables:
        epochs = list(run.tables)
        chosen = sorted({epochs[i] for i in np.linspace(0, len(epochs) - 1, MOST_CURVES).round().astype(int)})
        curves = {f"epoch {epoch}": run.tables[epoch]["weight"] for epoch in chosen}
        found["ess"].append(("Weights by epoch", plots.histogram("Histogram of the weights by epoch", curves)))
        last = run.tables[epochs[-1]]
        bad = run_data.marks(run, last)
        if bad is not None and bad.any() and not bad.all():
            kinds = {"other rows": last["weight"][~bad], f"marked {one_line(run.config.data.label, 12)}": last["weight"][bad]}
            title = "Weights in the end, by what the data say of the row"
            found["ess"].append((title, plots.histogram(title, kinds, kinds=True)))
        moved = sorted(run_data.source_shares(run)[: MOST_SOURCES[0]], key=lambda item: item[2][0] - item[2][-1])
        if len(moved) > 1:
            names = [one_line(name, 22) or "(none)" for name, _, _ in moved]
            shares = np.stack([share for _, _, share in moved])
            title = "Share of all weight by source"
            found["sources"].append((title, plots.sources(title, names, shares)))
        if lengths:
            title = "Length of the answers by epoch"
            found["lengths"].append((title, plots.lengths(title, epochs, lengths)))
    seconds = run_data.time_split(run)
    if seconds:
        found["time"].append(("Share of the time", plots.times("Seconds by activity", seconds)))
    return {section: [(title, markupsafe.Markup(svg)) for title, svg in panels] for section, panels in found.items()}


def reasons(run: Run, pairs: list[dict]) -> dict[str, str]:
    """Why a section has nothing to show, in one line; "" for one that has."""
    found = dict.fromkeys(("losses", "weights", "sources", "rows", "lengths", "answers", "time"), "")
    if not run.events:
        found["losses"] = "Nothing is logged yet."
    if not run.tables:
        mixes = run.config.method == "mixing"
        nothing = "Direct mixing weighs no rows." if mixes else "No epoch is finished yet, so there are no weights to show."
        found |= dict.fromkeys(("weights", "sources", "rows", "lengths"), nothing)
    elif not run_data.ranked(run):
        equal = "All weights are equal (the selector was frozen), so that no row comes before another."
        found |= dict.fromkeys(("sources", "rows", "lengths"), equal)
    else:
        if len(np.unique(run.tables[max(run.tables)]["source"])) < 2:
            found["sources"] = "All rows come from one source."
        if not run.rows:
            found["lengths"] = run.notice
    if run.config.method not in ("online", "dynamic"):
        found["answers"] = f"With method={run.config.method} the model answers no questions itself."
    elif not pairs:
        found["answers"] = run.notice or "No answers to masked questions are recorded yet."
    if not run.summary:
        found["time"] = "Known when the run is finished."
    return found


def render(run: Run) -> str:
    """The report as HTML."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    )
    pairs = changed(run) if run.tables else []
    missing, epochs = reasons(run, pairs), list(run.tables)
    lengths = {} if missing["lengths"] else run_data.answer_lengths(run)
    shares = [] if missing["sources"] else run_data.source_shares(run)
    return environment.get_template("report.html.jinja").render(
        run=run,
        overview=overview(run),
        missing=missing,
        figures=figures(run, lengths),
        epochs=epochs,
        measures={epoch: run_data.epoch_measures(run, epoch) for epoch in epochs},
        extremes={} if missing["rows"] else {epoch: extremes(run, epoch) for epoch in epochs},
        sources=[(one_line(name, 60), rows, share) for name, rows, share in shares[: MOST_SOURCES[1]]],
        more_sources=max(0, len(shares) - MOST_SOURCES[1]),
        lengths=lengths,
        words_of=weighed_words(run) if run.tables else [],
        changed=pairs,
        seconds=run_data.time_split(run),
        settings=json.loads(run.config.to_json()),
        visible=visible,
    )


def write(workdir: pathlib.Path, rows: Iterable[data_rows.Row] | None = None) -> pathlib.Path:
    """Writes `report.html` from what is in a workdir, and returns its path; arguments and errors as for `reporting.read`."""
    file = workdir / "report.html"
    files.write_atomically(file, render(run_data.read(workdir, rows)))
    return file

"""The figures of each section of the report."""

from collections.abc import Mapping

import markupsafe
import numpy as np

from bilevel_jax.report import corners, plots, run_data
from bilevel_jax.report.run_data import RunData
from bilevel_jax.text import one_line

MAX_SOURCES = 12
MAX_CURVES = 5  # epochs in the histogram

Panels = list[tuple[str, str]]  # (title, SVG)


def loss_panels(run: RunData) -> Panels:
    panels = []
    for level, name in (("upper", "trusted rows"), ("lower", "mixture")):
        key = run_data.loss_key(run, level)
        held_out = {"held out": run_data.series(run.events, f"eval/{key}")}
        right = run_data.series(run.events, "eval/lower_clean_loss")
        pairs = key.endswith("pair_loss")
        if level == "lower" and right[0] and not pairs:
            held_out = {"held out, as it is": held_out["held out"], "right answers": right}
        # A sum over the tokens of a response is of another size than the mean over tokens that held-out rows have.
        comparable = run.config.loss.reduction == "mean" or pairs
        train = run_data.series(run.events, f"train/{level}_loss") if comparable else ([], [])
        if train[0] or any(line[0] for line in held_out.values()):
            panels.append((f"Loss on {name}", plots.losses(f"Loss on {name}", train, held_out, run_data.unit(key))))
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
        known, bad = run_data.in_data(run), run_data.labels(run)  # rows that are missing have no label
        if kinds := _kinds(run, None if bad is None else bad[known], last["weight"][known]):
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
    lines = float(np.median(table["plausible"][rows])), 0.0 if has_useful else None  # as the corners are split
    if bad is not None:
        rows = rows[run_data.in_data(run)[rows]]  # rows that are missing have no label
    rows = corners.sample(rows)
    dots = np.stack([table["plausible"][rows], table["useful" if has_useful else "weight"][rows]], axis=1).astype(float)
    kinds = _kinds(run, None if bad is None else bad[rows], dots) or {"rows": dots}
    title = f"Plausible and {'useful' if has_useful else 'weight'}, a dot for each row"
    return [(title, plots.scatter(title, ("plausible", "useful" if has_useful else "weight (mean 1)"), kinds, lines))]


def source_panels(run: RunData) -> Panels:
    if not run.tables:
        return []
    moved = sorted(run_data.source_shares(run)[:MAX_SOURCES], key=lambda item: item[2][0] - item[2][-1])
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

"""The figures of a report: inline SVG of phone width, its colours named by the style sheet of the page, so light or dark.

Every figure is one small panel. The page puts as many side by side as there is room for. Names that come from rows are never read
as mathematics, and matplotlib escapes them.
"""

import io
import re
import warnings
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

INK, MUTED, GRID, BLUE, RED, GREEN = "#1d2430", "#5d6675", "#e3e6ea", "#2f6fb5", "#c04a2f", "#2e8264"
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", BLUE: "--blue", RED: "--red", GREEN: "--green"}
WIDTH, HEIGHT = 4.4, 2.6  # inches of 72 points; a point is about a pixel on a phone
MOST_POINTS = 300  # of a line; more are averaged in groups
BINS = 40
PERCENT = ticker.FuncFormatter(lambda value, _: f"{100 * value:.3g}%")
STYLE = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9.5, "axes.linewidth": 0.8}
styled = matplotlib.rc_context(STYLE)  # decorates what draws; pyplot and its global figures are never touched


# --------------------------------------------------------------------------------------------------------------------
# From a figure to SVG
# --------------------------------------------------------------------------------------------------------------------


def _panel(x: str = "", y: str = "", height: float = HEIGHT):
    """A figure of one panel with a quiet grid, and its axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(length=0, labelcolor=MUTED)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(x, color=MUTED)
    axes.set_ylabel(y, color=MUTED)
    return figure, axes


def _svg(figure: Figure, label: str) -> str:
    """The figure as an `<svg>` element; the same figure gives the same text.

    Args:
      label: what it shows, for those who do not see it; plain words, no markup.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": label}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the letters are drawn by the browser, which has more of them
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _for_the_page(buffer.getvalue(), label)


def _for_the_page(text: str, label: str) -> str:
    """A file of matplotlib as an element of a page. Whatever is looked for holds a `<`, which no name from a row does by now."""
    head, body = re.fullmatch(r".*?(<svg.*?>)(.*)", text, re.DOTALL).groups()
    view = re.search(r'viewBox="[^"]*"', head)[0]
    body = re.sub(r"<!--.*?-->|<style.*?</style>|<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # nothing refers to them, and several figures share a page
    body = re.sub(r'(<text style="[^"]*?)font-family: [^;"]*;? ?', r"\1", body)
    body = re.sub(r"<(?:path|use|text)[^<>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), body)  # hundredths of a point
    body = re.sub(r"\s*\n\s*", " ", body)
    for color, variable in VARIABLES.items():
        body = body.replace(color, f"var({variable})")
    return f'<svg role="img" aria-label="{label}" {view}>{body}'


def _epochs(axes, last: float) -> None:
    """Whole epochs where there are several."""
    if last >= 2:
        axes.xaxis.set_major_locator(ticker.MaxNLocator(nbins=8, integer=True))


def _legend(axes) -> None:
    """Above the panel, where it hides nothing."""
    legend = axes.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, frameon=False, labelcolor=INK,
        handlelength=1.4, columnspacing=1.2, borderaxespad=0.2, handletextpad=0.5,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)


def thinned(values: Sequence[float]) -> np.ndarray:
    """At most MOST_POINTS values, means of equal groups of neighbours (the last group may be smaller)."""
    values = np.asarray(values, float)
    group = -(-len(values) // MOST_POINTS)
    return np.array([values[i : i + group].mean() for i in range(0, len(values), group)]) if group > 1 else values


# --------------------------------------------------------------------------------------------------------------------
# The figures
# --------------------------------------------------------------------------------------------------------------------

Line = tuple[Sequence[float], Sequence[float]]  # epochs, values


@styled
def losses(label: str, train: Line, held_out: Mapping[str, Line]) -> str:
    """The loss of a level: as logged in training, and the held-out ones by name."""
    figure, axes = _panel("epoch", "nats per token")
    if len(train[0]):
        axes.plot(thinned(train[0]), thinned(train[1]), color=MUTED, linewidth=1, alpha=0.55, label="in training")
    for (name, (x, y)), color in zip(held_out.items(), (BLUE, GREEN)):
        axes.plot(x, y, color=color, linewidth=1.8, marker="o", markersize=4.5, label=name)
    _epochs(axes, max(max(x, default=0) for x, _ in (train, *held_out.values())))
    _legend(axes)
    return _svg(figure, label)


@styled
def ess(label: str, line: Line) -> str:
    figure, axes = _panel("epoch", "ESS / N")
    axes.plot(thinned(line[0]), thinned(line[1]), color=BLUE, linewidth=1.8)
    axes.set_ylim(min(0.5, min(line[1]) - 0.05), 1.02)
    _epochs(axes, max(line[0]))
    axes.yaxis.set_major_formatter(PERCENT)
    return _svg(figure, label)


@styled
def spread(label: str, x: Sequence[float], quantiles: Mapping[str, Sequence[float]]) -> str:
    """Percentiles of the weights over time; `quantiles` has p01, p10, p50, p90 and p99."""
    figure, axes = _panel("epoch", "weight")
    x, q = thinned(x), {name: thinned(values) for name, values in quantiles.items()}
    axes.fill_between(x, q["p01"], q["p99"], color=BLUE, alpha=0.15, linewidth=0, label="98% of the rows")
    axes.fill_between(x, q["p10"], q["p90"], color=BLUE, alpha=0.3, linewidth=0, label="80%")
    axes.plot(x, q["p50"], color=BLUE, linewidth=1.8, label="the median row")
    axes.set_ylim(bottom=0)
    _epochs(axes, max(x))
    _legend(axes)
    return _svg(figure, label)


@styled
def histogram(label: str, groups: Mapping[str, np.ndarray], kinds: bool = False) -> str:
    """Weights of groups of rows, each group's shares adding up to 1: the epochs of a run, the last one boldest, or two kinds of
    rows. What is heavier than nearly all rows counts in the last bar."""
    figure, axes = _panel("weight (1 = as much as the average row)", "share of these rows" if kinds else "share of rows")
    heaviest = max(2.0, *(np.quantile(weights, 0.999) for weights in groups.values()))
    edges = np.linspace(0, heaviest, BINS + 1)
    strength = np.linspace(0.3, 1, len(groups)) if len(groups) > 1 else [1.0]
    for i, (name, weights) in enumerate(groups.items()):
        share = np.histogram(np.minimum(weights, heaviest), edges)[0] / len(weights)
        if kinds:
            axes.stairs(share, edges, fill=True, color=(GREEN, RED)[i], alpha=0.5, label=name)
        else:
            last = i == len(groups) - 1
            axes.stairs(share, edges, color=BLUE, alpha=strength[i], linewidth=1.8 if last else 1.1, label=name)
    axes.yaxis.set_major_formatter(PERCENT)
    axes.set_xlim(0, heaviest)
    _legend(axes)
    return _svg(figure, label)


@styled
def sources(label: str, names: Sequence[str], shares: np.ndarray) -> str:
    """Each source's share of all weight [S, 1 + epochs], from its share of rows (a ring) to the last epoch (a dot)."""
    figure, axes = _panel("share of all weight", height=0.75 + 0.27 * len(names))
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    for y, row in enumerate(shares):
        color = GREEN if row[-1] >= row[0] else RED
        axes.plot(row, np.full(len(row), y), color=color, linewidth=2, alpha=0.5)
        axes.plot(row[1:-1], np.full(len(row) - 2, y), ".", color=color, markersize=4, alpha=0.6)
        axes.plot(row[0], y, "o", markersize=5, markerfacecolor="none", markeredgecolor=MUTED)
        axes.plot(row[-1], y, "o", markersize=6, color=color)
    axes.set_yticks(range(len(names)), names, color=INK, parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(PERCENT)
    return _svg(figure, label)


@styled
def lengths(label: str, epochs: Sequence[int], means: Mapping[str, Sequence[float]]) -> str:
    """Mean length of the answers of several groups of rows, by epoch."""
    figure, axes = _panel("epoch", "words")
    for (name, values), color in zip(means.items(), (BLUE, MUTED, RED)):
        axes.plot(epochs, values, color=color, linewidth=1.8, marker="o", markersize=4.5, label=name)
    axes.set_xticks(epochs if len(epochs) < 12 else epochs[:: len(epochs) // 10])
    _legend(axes)
    return _svg(figure, label)


@styled
def times(label: str, seconds: Mapping[str, float]) -> str:
    """Where the time went, the longest first."""
    figure, axes = _panel("seconds", height=0.7 + 0.27 * len(seconds))
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    places = range(len(seconds))
    axes.barh(places, list(seconds.values()), height=0.6, color=BLUE)
    total = sum(seconds.values()) or 1.0
    for y, value in zip(places, seconds.values()):
        axes.annotate(f"{value / total:.0%}", (value, y), (5, 0), textcoords="offset points", va="center", color=MUTED)
    axes.set_yticks(places, list(seconds), color=INK)
    axes.set_ylim(len(seconds) - 0.5, -0.5)
    axes.margins(x=0.12)
    return _svg(figure, label)

"""The figures of a report: inline SVG, one small panel each, as wide as a phone.

Colours are variables of the page's style sheet, so figures follow its light and dark scheme. Names from rows are never parsed as
mathematics, and matplotlib escapes them.
"""

import io
import re
import warnings
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib import patches, ticker
from matplotlib.figure import Figure
from matplotlib.path import Path

INK, MUTED, GRID, BLUE, RED, GREEN = "#1d2430", "#5d6675", "#e3e6ea", "#2f6fb5", "#c04a2f", "#2e8264"
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", BLUE: "--blue", RED: "--red", GREEN: "--green"}
WIDTH, HEIGHT = 4.4, 2.6  # inches of 72 points; a point is about a pixel on a phone
MAX_POINTS = 300  # of a line; more points are averaged in groups
BINS = 40
PERCENT = ticker.FuncFormatter(lambda value, _: f"{100 * value:.3g}%")
styled = matplotlib.rc_context(  # a decorator; pyplot and its global figures are not used
    {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9.5, "axes.linewidth": 0.8}
)


# --------------------------------------------------------------------------------------------------------------------
# SVG
# --------------------------------------------------------------------------------------------------------------------


def _panel(x: str = "", y: str = "", height: float = HEIGHT):
    """A figure of one panel, and its axes."""
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
    """The figure as an `<svg>` element. The same figure always gives the same text.

    Args:
      label: description for screen readers, without markup.
    """
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": label}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser draws the text, and has more fonts
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    return _embed(buffer.getvalue(), label)


def _embed(text: str, label: str) -> str:
    """Turns an SVG file of matplotlib into an element of a page.

    Every pattern contains a `<`. Names from rows contain none here, because matplotlib has escaped them.
    """
    _, head, body = re.split("(<svg.*?>)", text, maxsplit=1, flags=re.DOTALL)
    view = re.findall(r'viewBox="[^"]*"', head)[0]
    body = re.sub(r"<!--.*?-->|<style.*?</style>|<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # unused, and not unique on a page with several figures
    body = re.sub(r'(<text style="[^"]*?)font-family: [^;"]*;? ?', r"\1", body)
    body = re.sub(r"<(?:path|use|text)[^<>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), body)  # 0.01 points
    body = re.sub(r"\s*\n\s*", " ", body)
    for color, variable in VARIABLES.items():
        body = body.replace(color, f"var({variable})")
    return f'<svg role="img" aria-label="{label}" {view}>{body}'


def _epochs(axes, last: float) -> None:
    """Integer ticks, if there are several epochs."""
    if last >= 2:
        axes.xaxis.set_major_locator(ticker.MaxNLocator(nbins=8, integer=True))


def _legend(axes) -> None:
    """A legend above the panel."""
    legend = axes.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, frameon=False, labelcolor=INK,
        handlelength=1.4, columnspacing=1.2, borderaxespad=0.2, handletextpad=0.5,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)


def thinned(values: Sequence[float]) -> np.ndarray:
    """At most MAX_POINTS values: means of groups of neighbours of equal size (the last group may be smaller)."""
    array = np.asarray(values, float)
    group = -(-len(array) // MAX_POINTS)
    return np.array([array[i : i + group].mean() for i in range(0, len(array), group)]) if group > 1 else array


# --------------------------------------------------------------------------------------------------------------------
# The figures
# --------------------------------------------------------------------------------------------------------------------

Line = tuple[Sequence[float], Sequence[float]]  # epochs, values


@styled
def losses(label: str, train: Line, held_out: Mapping[str, Line], unit: str) -> str:
    """The losses of a level: of training, and held-out ones by name."""
    figure, axes = _panel("epoch", unit)
    if len(train[0]):
        axes.plot(thinned(train[0]), thinned(train[1]), color=MUTED, linewidth=1, alpha=0.55, label="in training")
    for (name, (x, y)), color in zip(held_out.items(), (BLUE, GREEN)):
        axes.plot(x, y, color=color, linewidth=1.8, marker="o", markersize=4.5, label=name)
    _epochs(axes, max(max(x, default=0) for x, _ in (train, *held_out.values())))
    _legend(axes)
    return _svg(figure, label)


@styled
def ess(label: str, line: Line) -> str:
    """ESS/N over time."""
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
    epochs, q = thinned(x), {name: thinned(values) for name, values in quantiles.items()}
    axes.fill_between(epochs, q["p01"], q["p99"], color=BLUE, alpha=0.15, linewidth=0, label="98% of rows")
    axes.fill_between(epochs, q["p10"], q["p90"], color=BLUE, alpha=0.3, linewidth=0, label="80%")
    axes.plot(epochs, q["p50"], color=BLUE, linewidth=1.8, label="median")
    axes.set_ylim(bottom=0)
    _epochs(axes, max(epochs))
    _legend(axes)
    return _svg(figure, label)


@styled
def histogram(label: str, groups: Mapping[str, np.ndarray], kinds: bool = False) -> str:
    """Histograms of the weights of groups of rows, each normalised to 1. The last bin includes outliers.

    Args:
      groups: weights by name: of epochs, or of two kinds of rows.
      kinds: draws two kinds of rows, filled; otherwise epochs, the last one boldest.
    """
    figure, axes = _panel("weight (mean 1)", "share of these rows" if kinds else "share of rows")
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
def scatter(label: str, names: tuple[str, str], kinds: Mapping[str, np.ndarray], lines: tuple[float, float | None]) -> str:
    """A dot for each row, and dashed lines at x and y (None: no line). Outliers are drawn at the edge.

    Args:
      names: of the axes.
      kinds: [rows, 2] by name: of one kind of rows, or of other rows and bad rows.
    """
    figure, axes = _panel(*names)
    axes.grid(visible=False)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(nbins=5))
    low, first, last, high = np.quantile(np.concatenate([*kinds.values()]), (0, 0.01, 0.99, 1), axis=0)
    margin = np.where(last > first, 0.25 * (last - first), 0.5)
    low, high = np.maximum(low, first - margin), np.minimum(high, last + margin)
    for (name, dots), color in zip(kinds.items(), (BLUE,) if len(kinds) == 1 else (GREEN, RED)):
        # Lines without length and with round ends are one short element. Markers would be an element each.
        path = Path(np.clip(dots, low, high).repeat(2, axis=0), np.tile([Path.MOVETO, Path.LINETO], len(dots)))
        path.should_simplify = False  # it would remove them
        axes.add_patch(
            patches.PathPatch(path, fill=False, edgecolor=color, linewidth=4, capstyle="round", alpha=0.55, clip_on=False)
        )
        axes.plot([], [], "o", color=color, markersize=4.5, label=name)
    axes.axvline(lines[0], color=MUTED, linewidth=1, linestyle="--")
    if lines[1] is not None:
        axes.axhline(lines[1], color=MUTED, linewidth=1, linestyle="--")
    axes.set_xlim(low[0] - 0.2 * margin[0], high[0] + 0.2 * margin[0])
    axes.set_ylim(low[1] - 0.2 * margin[1], high[1] + 0.2 * margin[1])
    _legend(axes)
    return _svg(figure, label)


@styled
def sources(label: str, names: Sequence[str], shares: np.ndarray) -> str:
    """Each source's share of the total weight [S, 1 + epochs], from its share of rows (a ring) to the last epoch (a dot)."""
    figure, axes = _panel("share of the total weight", height=0.75 + 0.27 * len(names))
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
    """Mean length of the responses of several groups of rows, by epoch."""
    figure, axes = _panel("epoch", "words")
    for (name, values), color in zip(means.items(), (BLUE, MUTED, RED)):
        axes.plot(epochs, values, color=color, linewidth=1.8, marker="o", markersize=4.5, label=name)
    axes.set_xticks(epochs if len(epochs) < 12 else epochs[:: len(epochs) // 10])
    _legend(axes)
    return _svg(figure, label)


@styled
def times(label: str, seconds: Mapping[str, float]) -> str:
    """Seconds by activity, the longest first."""
    figure, axes = _panel("seconds", height=0.7 + 0.27 * len(seconds))
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    positions = range(len(seconds))
    axes.barh(positions, list(seconds.values()), height=0.6, color=BLUE)
    total = sum(seconds.values()) or 1.0
    for y, value in zip(positions, seconds.values()):
        axes.annotate(f"{value / total:.0%}", (value, y), (5, 0), textcoords="offset points", va="center", color=MUTED)
    axes.set_yticks(positions, list(seconds), color=INK)
    axes.set_ylim(len(seconds) - 0.5, -0.5)
    axes.margins(x=0.12)
    return _svg(figure, label)

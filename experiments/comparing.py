"""Compares the runs of a table: means beside the paper's numbers, claims with their paired tests, and the standard figure."""

import math
import pathlib
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from experiments import runs, significance
from experiments.paper.published import OF_PAPER

SIGNIFICANT = 0.05
RULE = (
    "Claims: differences are paired over seeds, with their 95% interval by Student's t in brackets; p is that of the "
    "two-sided paired t-test, corrected by Holm for all claims of the table. The paper's effect is that of its own cells, for "
    "losses and times as a share of the second cell's value. *Holds*: the sign is the claim's and p < 0.05; *smaller than the "
    "paper's*: the interval ends before the paper's effect; *reversed*: the other sign and p < 0.05. Else *excluded*: the "
    "interval ends before the paper's effect; *compatible*: it does not, and 0 is outside of it; *undecided*: neither, or the "
    "paper has no number."
)


class Run(NamedTuple):
    """A finished run of a cell, which is one setting of a table."""

    workdir: pathlib.Path
    values: dict[str, float]  # the summary, and measures that a table adds


class Results(NamedTuple):
    """All runs of a table on one task."""

    task: str
    runs: dict[str, dict[int, Run]]  # cell -> seed
    commands: dict[str, str]  # cell -> its command, with SEED for the seed
    failures: list[str]
    commits: list[str]  # of the code that produced the runs

    def values(self, cell: str, key: str) -> dict[int, float]:
        """The measure by seed, without the runs that lack it."""
        return {seed: run.values[key] for seed, run in self.runs.get(cell, {}).items() if key in run.values}


class Claim(NamedTuple):
    """The claim that a measure is lower, or higher, in one cell than in another."""

    text: str
    cell: str
    than: str
    key: str
    higher: bool = False
    than_key: str = ""  # the other cell's measure, if it differs from `key`


# --------------------------------------------------------------------------------------------------------------------
# Claims
# --------------------------------------------------------------------------------------------------------------------


class Paper(NamedTuple):
    """The paper's values, by cell and key of a measure, which say how large an effect is expected."""

    values: Mapping[str, Mapping[str, float]]
    relative: bool = True  # effects are shares of the other cell's value; else differences

    def effect(self, claim: Claim, other: float) -> float | None:
        """The paper's difference, for an `other` cell of this mean here; None if the paper has no such claim.

        A cell with the default selector has the values of the paper's selector.
        """

        def value(cell: str, key: str) -> float | None:
            return self.values.get(OF_PAPER.get(cell, cell), {}).get(key)

        claimed, than = value(claim.cell, claim.key), value(claim.than, claim.than_key or claim.key)
        if claimed is None or than is None:
            return None
        difference = claimed - than
        if difference == 0 or (difference > 0) != claim.higher:
            return None
        return difference / than * other if self.relative else difference


def paper_values(entries: Mapping[str, Sequence[str]], keys: Sequence[str]) -> dict[str, dict[str, float]]:
    """The first number of each of the paper's entries, by cell and key: 0.88 of `0.88 ± 0.010`."""
    return {cell: {key: float(entry.split()[0]) for key, entry in zip(keys, row)} for cell, row in entries.items()}


class Verdict(NamedTuple):
    difference: float  # mean over seeds of (claimed cell - other cell)
    spread: float  # its standard deviation
    low: float  # its 95% interval
    high: float
    agreeing: int  # seeds whose difference has the claimed sign
    seeds: int
    p: float
    corrected: float  # p by Holm
    effect: float | None  # the paper's
    word: str  # holds, ..., smaller than the paper's, reversed, excluded, compatible, undecided, untested


def judge(results: Results, claims: Sequence[Claim], paper: Paper | None = None) -> list[Verdict | None]:
    """A verdict for each claim of a page; None where no seed has both measures."""
    measured = [_differences(results, claim) for claim in claims]
    tests = [significance.paired(values) if values else None for values in measured]
    corrected = significance.holm([test.p if test else float("nan") for test in tests])
    verdicts: list[Verdict | None] = []
    for claim, values, test, p in zip(claims, measured, tests, corrected):
        if test is None:
            verdicts.append(None)
            continue
        agreeing = sum((value > 0) if claim.higher else (value < 0) for value in values)
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        others = results.values(claim.than, claim.than_key or claim.key).values()
        effect = paper.effect(claim, statistics.mean(others)) if paper else None
        word = "untested" if math.isnan(test.p) and (len(values) < 2 or test.mean) else _word(claim, test, float(p), effect)
        interval = (test.low, test.high) if len(values) > 1 else (float("nan"), float("nan"))
        verdicts.append(Verdict(test.mean, spread, *interval, agreeing, len(values), test.p, float(p), effect, word))
    return verdicts


def _differences(results: Results, claim: Claim) -> list[float]:
    """Of the seeds that have both measures; NaN stands for one that was not measured."""
    claimed, other = results.values(claim.cell, claim.key), results.values(claim.than, claim.than_key or claim.key)
    differences = [claimed[seed] - other[seed] for seed in sorted(claimed.keys() & other.keys())]
    return [value for value in differences if not math.isnan(value)]


def _word(claim: Claim, test: significance.Difference, corrected: float, effect: float | None) -> str:
    ends_before = effect is not None and (test.high < effect if effect > 0 else test.low > effect)
    if corrected < SIGNIFICANT:
        if (test.mean > 0) != claim.higher:
            return "reversed"
        return "holds, smaller than the paper's" if ends_before else "holds"
    if effect is None:
        return "undecided"
    if ends_before:
        return "excluded"
    return "undecided" if test.low <= 0 <= test.high else "compatible"


def verdicts(results: Results, claims: Sequence[Claim], paper: Paper | None = None) -> list[str]:
    """Lines of a Markdown table of claims."""
    rows = []
    for claim, verdict in zip(claims, judge(results, claims, paper)):
        if verdict is None:
            rows.append([claim.text, "not measured", "", "", "", ""])
            continue
        p = "" if math.isnan(verdict.corrected) else f"{verdict.corrected:.3f}" if verdict.corrected >= 0.001 else "< 0.001"
        difference = f"{verdict.difference:+.4f}"
        if not math.isnan(verdict.low):
            difference += f" [{verdict.low:+.4f}, {verdict.high:+.4f}]"
        effect = "" if verdict.effect is None else f"{verdict.effect:+.4f}"
        rows.append([claim.text, difference, effect, f"{verdict.agreeing} of {verdict.seeds}", p, verdict.word])
    return runs.markdown(["claim", "difference", "the paper's effect", "seeds that agree", "p (Holm)", "verdict"], rows)


# --------------------------------------------------------------------------------------------------------------------
# The table and the standard figure
# --------------------------------------------------------------------------------------------------------------------


def rows(
    results: Results, columns: Mapping[str, str], published: Mapping[str, Sequence[str]] | None = None, beside: Sequence[str] = ()
) -> list[str]:
    """Lines of a Markdown table with a row per cell: the paper's entries, then mean and standard deviation of each measure.

    Args:
      columns: heading -> key of the runs' values. Columns that no cell has are left out.
      published: cell -> the paper's entries, one for each heading of `beside`.
      beside: headings of the paper's entries.
    """
    published = published or {}
    columns = {heading: key for heading, key in columns.items() if any(results.values(cell, key) for cell in results.runs)}
    body = []
    for cell, by_seed in results.runs.items():
        paper = published.get(cell, [""] * len(beside))
        summaries = [run.values for run in by_seed.values()]
        body.append([cell, *paper, *(runs.entry(summaries, key) for key in columns.values())])
    return runs.markdown(["", *(f"paper: {name}" for name in beside), *columns], body)


OURS, CONTROL = "#2f6fb5", "#8a93a0"


def without_seeds(results: Results, key: str) -> dict[str, list[float]]:
    """The measure of every cell by seed, with the effect of the seed removed.

    Seeds draw different data, some harder than others, which shifts all cells. The mean over cells of a seed, less the mean over
    all seeds, is subtracted. Only seeds that every cell with the measure has are used; means of cells over these do not change.
    """
    by_cell = {cell: values for cell in results.runs if (values := results.values(cell, key))}
    seeds = sorted(set.intersection(*(set(values) for values in by_cell.values()))) if by_cell else []
    seed_mean = {seed: statistics.mean(values[seed] for values in by_cell.values()) for seed in seeds}
    overall_mean = statistics.mean(seed_mean.values()) if seeds else 0.0
    return {cell: [values[seed] - seed_mean[seed] + overall_mean for seed in seeds] for cell, values in by_cell.items()}


def dots(figure: Figure, results: Results, columns: Mapping[str, str], published: Collection[str]) -> None:
    """Draws a panel per measure: a dot per seed (`without_seeds`), a bar for the mean, cells of the paper in colour."""
    names = list(results.runs)
    measures = {heading: by_cell for heading, key in columns.items() if (by_cell := without_seeds(results, key))}
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for panel, (heading, by_cell) in zip(panels, measures.items()):
        for y, cell in enumerate(names):
            values, color = by_cell.get(cell, []), OURS if cell in published else CONTROL
            panel.plot(values, [y] * len(values), "o", color=color, markersize=4, alpha=0.6, markeredgewidth=0)
            if values:
                panel.plot([statistics.mean(values)], [y], "|", color=color, markersize=13, markeredgewidth=2)
        panel.set_title(heading, fontsize=9)
        panel.grid(axis="x", color="#e3e6ea", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(length=0)
        panel.locator_params(axis="x", nbins=4)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel("dots: seeds, with the effect of the seed removed; bars: means", fontsize=8, color=CONTROL)

"""Compares the runs of a table: means beside the paper's numbers, claims with their paired tests, and the standard figure."""

import math
import pathlib
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import scipy.stats
from matplotlib.figure import Figure

from experiments import runs

SIGNIFICANT, WEAK = 0.05, 0.2
RULE = (
    "Claims: differences are paired over seeds, p is that of Student's two-sided paired t-test, uncorrected. *Holds*: the sign is "
    f"the claim's and p < {SIGNIFICANT}; *weakly*: the same with p < {WEAK}; *reversed*: the other sign and p < {SIGNIFICANT}; "
    "else *not shown*."
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


class Verdict(NamedTuple):
    difference: float  # mean over seeds of (claimed cell - other cell)
    spread: float  # its standard deviation
    agreeing: int  # seeds whose difference has the claimed sign
    seeds: int
    p: float
    word: str  # holds, weakly, not shown, reversed, or untested


def paired_test(results: Results, claim: Claim) -> Verdict | None:
    """The paired test of a claim; None if no seed has both measures."""
    claimed, other = results.values(claim.cell, claim.key), results.values(claim.than, claim.than_key or claim.key)
    differences = [claimed[seed] - other[seed] for seed in sorted(claimed.keys() & other.keys())]
    differences = [value for value in differences if not math.isnan(value)]  # NaN: not measured
    if not differences:
        return None
    mean = statistics.mean(differences)
    right = mean > 0 if claim.higher else mean < 0
    agreeing = sum((value > 0) if claim.higher else (value < 0) for value in differences)
    if len(differences) < 2 or len(set(differences)) == 1:  # no spread to test against
        word = "untested" if len(differences) < 2 or mean else "not shown"
        return Verdict(mean, 0.0, agreeing, len(differences), float("nan"), word)
    p = float(scipy.stats.ttest_1samp(differences, 0.0).pvalue)
    word = "not shown"
    if p < SIGNIFICANT:
        word = "holds" if right else "reversed"
    elif p < WEAK and right:
        word = "weakly"
    return Verdict(mean, statistics.stdev(differences), agreeing, len(differences), p, word)


def verdicts(results: Results, claims: Sequence[Claim]) -> list[str]:
    """Lines of a Markdown table of claims."""
    rows = []
    for claim in claims:
        verdict = paired_test(results, claim)
        if verdict is None:
            rows.append([claim.text, "not measured", "", "", ""])
            continue
        p = "" if math.isnan(verdict.p) else f"{verdict.p:.3f}" if verdict.p >= 0.001 else "< 0.001"
        difference = f"{verdict.difference:+.4f} ± {verdict.spread:.4f}"
        rows.append([claim.text, difference, f"{verdict.agreeing} of {verdict.seeds}", p, verdict.word])
    return runs.markdown(["claim", "difference", "seeds that agree", "p", "verdict"], rows)


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

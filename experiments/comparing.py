"""What came of the runs of a table: means beside the paper's numbers, claims with their paired tests, and the usual figure."""

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
    """A finished run of a cell."""

    workdir: pathlib.Path
    values: dict[str, float]  # its summary, and what a table adds


class Results(NamedTuple):
    task: str
    runs: dict[str, dict[int, Run]]  # cell -> seed
    commands: dict[str, str]  # cell -> what runs it, for any SEED
    failures: list[str]
    commits: list[str]  # of the code that made the runs

    def values(self, cell: str, key: str) -> dict[int, float]:
        """The measure by seed, where there is one."""
        return {seed: run.values[key] for seed, run in self.runs.get(cell, {}).items() if key in run.values}


class Claim(NamedTuple):
    """That a measure is lower in one cell than in another, or higher."""

    text: str
    cell: str
    than: str
    key: str
    higher: bool = False
    than_key: str = ""  # the other cell's measure, where it is another one


# --------------------------------------------------------------------------------------------------------------------
# Claims
# --------------------------------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    difference: float  # mean over seeds of the claimed cell less the other
    spread: float  # its standard deviation
    agreeing: int  # seeds whose difference has the claimed sign
    seeds: int
    p: float
    word: str  # holds, weakly, not shown, reversed, or untested


def paired_test(results: Results, claim: Claim) -> Verdict | None:
    """The paired test of a claim; None where a side has no runs."""
    mine, theirs = results.values(claim.cell, claim.key), results.values(claim.than, claim.than_key or claim.key)
    differences = [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]
    differences = [value for value in differences if value == value]  # NaN: nothing to measure
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
    """Lines of a table of claims."""
    rows = []
    for claim in claims:
        found = paired_test(results, claim)
        if found is None:
            rows.append([claim.text, "not measured", "", "", ""])
            continue
        p = "" if found.p != found.p else f"{found.p:.3f}" if found.p >= 0.001 else "< 0.001"
        size = f"{found.difference:+.4f} ± {found.spread:.4f}"
        rows.append([claim.text, size, f"{found.agreeing} of {found.seeds}", p, found.word])
    return runs.markdown(["claim", "difference", "seeds that agree", "p", "verdict"], rows)


# --------------------------------------------------------------------------------------------------------------------
# The table and the usual figure
# --------------------------------------------------------------------------------------------------------------------


def rows(
    results: Results, columns: Mapping[str, str], published: Mapping[str, Sequence[str]] | None = None, beside: Sequence[str] = ()
) -> list[str]:
    """Lines of a table: of each cell the paper's entries, then mean and standard deviation of each measure that any cell has.

    Args:
      columns: heading -> key of the runs' values.
      published: cell -> the paper's entries, one for each heading of `beside`.
    """
    published = published or {}
    there = {heading: key for heading, key in columns.items() if any(results.values(cell, key) for cell in results.runs)}
    body = []
    for cell, found in results.runs.items():
        theirs = published.get(cell, [""] * len(beside))
        body.append([cell, *theirs, *(runs.entry([run.values for run in found.values()], key) for key in there.values())])
    return runs.markdown(["", *(f"paper: {name}" for name in beside), *there], body)


OURS, CONTROL = "#2f6fb5", "#8a93a0"


def without_seeds(results: Results, key: str) -> dict[str, list[float]]:
    """The measure of every cell by seed, less what a seed adds to all cells: seeds are other draws of the data, hard or easy ones.

    Only seeds that all cells with the measure have; means of cells over these stay what they are.
    """
    by_cell = {cell: found for cell in results.runs if (found := results.values(cell, key))}
    seeds = sorted(set.intersection(*(set(found) for found in by_cell.values()))) if by_cell else []
    added = {seed: statistics.mean(found[seed] for found in by_cell.values()) for seed in seeds}
    usual = statistics.mean(added.values()) if seeds else 0.0
    return {cell: [found[seed] - added[seed] + usual for seed in seeds] for cell, found in by_cell.items()}


def dots(figure: Figure, results: Results, columns: Mapping[str, str], published: Collection[str]) -> None:
    """A panel for each measure: a dot for each seed (`without_seeds`), a bar for the mean; the paper's cells in colour."""
    names = list(results.runs)
    shown = {heading: found for heading, key in columns.items() if (found := without_seeds(results, key))}
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for panel, (heading, found) in zip(panels, shown.items()):
        for y, cell in enumerate(names):
            values, color = found.get(cell, []), OURS if cell in published else CONTROL
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
    figure.supxlabel("dots: seeds, less what a seed adds to all cells; bars: means", fontsize=8, color=CONTROL)

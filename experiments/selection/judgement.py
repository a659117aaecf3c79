"""Statistics and pages of the tests of selection rules: means with intervals, paired tests with Holm's correction."""

import pathlib
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.stats

from bilevel_jax import files
from experiments import runs, tables
from experiments.significance import holm

RESAMPLES = 2000


def interval(values: Sequence[float]) -> str:
    """Mean and 95% interval of Student's t over seeds; the value alone for one seed."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return f"{values.mean():.4f}" if len(values) else ""
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():.4f} ± {half:.4f}"


def rank_correlation(predicted: np.ndarray, measured: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Spearman's correlation, and its 95% bootstrap interval over the pairs."""
    part_Rxn = np.random.default_rng(seed).integers(len(predicted), size=(RESAMPLES, len(predicted)))
    ranks = [scipy.stats.rankdata(values[part_Rxn], axis=1) for values in (predicted, measured)]
    first_Rxn, second_Rxn = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
    size_R = np.sqrt((first_Rxn**2).sum(axis=1) * (second_Rxn**2).sum(axis=1))
    low, high = np.percentile((first_Rxn * second_Rxn).sum(axis=1) / size_R, [2.5, 97.5])
    value = scipy.stats.spearmanr(predicted, measured).statistic
    return float(value), float(low), float(high)


def reliability(measured_nxk: np.ndarray) -> float:
    """Reliability of the mean of k measurements: Spearman and Brown's k r / (1 + (k - 1) r), r the mean correlation of two."""
    k = measured_nxk.shape[1]
    r = float(np.corrcoef(measured_nxk.T)[np.triu_indices(k, 1)].mean())
    return k * r / (1 + (k - 1) * r)


def claims_table(claims: Sequence[tuple[str, Mapping[int, float], Mapping[int, float]]]) -> list[str]:
    """Lines of a table of claims "the first is lower": paired over seeds, one-sided p by Student's t, Holm-corrected."""
    rows, p = [], []
    for text, lower, other in claims:
        seeds = sorted(lower.keys() & other.keys())
        difference = np.array([lower[seed] - other[seed] for seed in seeds])
        tested = len(seeds) > 1 and np.ptp(difference) > 0
        p.append(scipy.stats.ttest_1samp(difference, 0.0, alternative="less").pvalue if tested else 1.0)
        rows.append([text, interval(difference), f"{(difference < 0).sum()} of {len(seeds)}"])
    corrected = holm(p)
    words = ["< 0.001" if value < 0.001 else f"{value:.3f}" for value in corrected]
    verdict = ["holds" if value < 0.01 else "weakly" if value < 0.05 else "undecided" for value in corrected]
    return runs.markdown(
        ["claim", "difference", "seeds that agree", "p (Holm)", "verdict"],
        [[*row, *rest] for row, *rest in zip(rows, words, verdict)],
    )


def write(name: str, title: str, lines: Sequence[str], page: str = "") -> None:
    """Writes experiments/results/PAGE.md with its command, versions and commit at the top, and prints it.

    Args:
      name: of the command, and of the page unless `page` is given.
    """
    arguments = [f'"{part}"' if " " in part else part for part in sys.argv[1:]]
    command = " ".join([f"python -m experiments.{name}", *arguments])
    head = [f"# {title}", "", f"`{command}`", "", f"Commit {tables.commit()}; {tables.provenance()}", ""]
    text = "\n".join([*head, *lines]).rstrip() + "\n"
    files.write_atomically(pathlib.Path("experiments/results", f"{page or name}.md"), text)
    print(text)

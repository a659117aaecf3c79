"""Statistics of claims: intervals of paired differences, Holm's correction, and McNemar's exact test of paired answers."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

LEVEL = 0.95  # of intervals


class Difference(NamedTuple):
    """The mean of paired differences, its interval by Student's t, and the two-sided p of the paired t-test."""

    mean: float
    low: float
    high: float
    p: float


def paired(differences: Sequence[float]) -> Difference:
    """Tests differences against 0. Where they do not vary, the interval is their one value and p is NaN, as for one difference."""
    mean = float(np.mean(differences))
    if len(set(differences)) == 1:
        return Difference(mean, mean, mean, float("nan"))
    test = scipy.stats.ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(LEVEL)
    return Difference(mean, float(low), float(high), float(test.pvalue))


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's corrected p-values. NaN stays NaN and does not count as a test."""
    p = np.asarray(p, float)
    corrected = np.full(len(p), np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested])]
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * (len(order) - np.arange(len(order)))))
    return corrected


class McNemar(NamedTuple):
    """Items that only one of two models answers right, and the two-sided p of the exact test that both kinds are as likely."""

    only_first: int
    only_second: int
    p: float


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """McNemar's exact test for the right answers of two models to the same items: binomial in the items where they differ.

    Raises:
      ValueError: different numbers of items.
    """
    if len(first) != len(second):
        raise ValueError(f"McNemar's test compares answers to the same items, not {len(first)} with {len(second)}")
    a, b = np.asarray(first, bool), np.asarray(second, bool)
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    differ = only_first + only_second
    p = float(scipy.stats.binomtest(only_first, differ).pvalue) if differ else 1.0
    return McNemar(only_first, only_second, p)


class Share(NamedTuple):
    """A difference of two shares of the same items, with its interval."""

    mean: float
    low: float
    high: float


def paired_share(first: Sequence[bool], second: Sequence[bool]) -> Share:
    """The difference of the shares of right answers to the same items, with Wald's interval for paired shares."""
    only_first, only_second, _ = mcnemar(first, second)
    n, differ, gain = len(first), only_first + only_second, only_first - only_second
    half = scipy.stats.norm.ppf((1 + LEVEL) / 2) * (differ - gain**2 / n) ** 0.5 / n
    return Share(gain / n, gain / n - half, gain / n + half)

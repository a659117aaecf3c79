"""How well numbers of rows rank them, by labels. For measurement only: nothing that trains reads labels."""

import numpy as np


def auroc(score: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive has a higher score than a negative; ties count half (Mann-Whitney U).

    NaN if there are no positives or no negatives.
    """
    positive = np.asarray(positive, bool)
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if not num_positive or not num_negative:
        return float("nan")
    _, value_index, count = np.unique(score, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    rank = (last - (count - 1) / 2)[value_index]  # mean rank of tied scores, from 1
    return float((rank[positive].sum() - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


def heaviest_first(logits: np.ndarray) -> np.ndarray:
    """Row indices from the largest to the smallest weight; equal weights keep their order."""
    return np.argsort(-np.asarray(logits), kind="stable")


def _kept(logits: np.ndarray, keep: float) -> np.ndarray:
    """Indices of the fraction `keep` of the rows that has the largest weights."""
    return heaviest_first(logits)[: round(keep * len(logits))]


def bad_kept(logits: np.ndarray, bad: np.ndarray, keep: float) -> float:
    """(bad rows that are kept) / (all bad rows); NaN if no row is bad. Kept are the `keep` heaviest of all rows."""
    bad = np.asarray(bad, bool)
    return float(bad[_kept(logits, keep)].sum() / bad.sum()) if bad.any() else float("nan")


def bad_among_kept(logits: np.ndarray, bad: np.ndarray, keep: float) -> float:
    """(bad rows that are kept) / (all kept rows); NaN if no row is kept. Kept are the `keep` heaviest of all rows."""
    kept = np.asarray(bad, bool)[_kept(logits, keep)]
    return float(kept.mean()) if len(kept) else float("nan")

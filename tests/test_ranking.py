"""Ranking by numbers of rows, against counts of pairs and by hand."""

import numpy as np
import pytest

from bilevel_jax import ranking


def auroc_by_pairs(score, positive) -> float:
    """Wins of positives over negatives, pair by pair; a tie is half a win."""
    pairs = [(p, n) for p in score[positive] for n in score[~positive]]
    return sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs)


@pytest.mark.parametrize("levels", [2, 3, 10, 10**6])  # from almost all scores tied to none
@pytest.mark.parametrize("number", [2, 7, 60])
def test_auroc(levels, number):
    rng = np.random.default_rng(levels + number)
    for _ in range(20):
        score, positive = rng.integers(0, levels, number).astype(float), rng.random(number) < 0.4
        positive[:2] = True, False
        assert ranking.auroc(score, positive) == pytest.approx(auroc_by_pairs(score, positive), abs=1e-12)


@pytest.mark.parametrize(
    "score, positive, expected",
    [
        ([0, 1, 2, 3], [0, 0, 1, 1], 1.0),
        ([3, 2, 1, 0], [0, 0, 1, 1], 0.0),
        ([5, 5, 5, 5], [0, 0, 1, 1], 0.5),
        ([-np.inf, 0.0, np.inf], [0, 0, 1], 1.0),
        ([1.0, 2.0], [0, 0], np.nan),
        ([1.0, 2.0], [1, 1], np.nan),
    ],
)
def test_auroc_of_special_cases(score, positive, expected):
    np.testing.assert_equal(ranking.auroc(np.array(score), np.array(positive)), expected)


@pytest.mark.parametrize(
    "logits, expected", [([0.0, 2.0, 1.0], [1, 2, 0]), ([1.0, 1.0, 1.0], [0, 1, 2]), ([0.0, 1.0, 0.0], [1, 0, 2])]
)
def test_keep_order(logits, expected):
    assert ranking.heaviest_first(np.array(logits)).tolist() == expected


@pytest.mark.parametrize(
    "bad, keep, expected",
    [
        ([1, 0, 0, 0, 0], 0.8, 1.0),  # the heaviest row is the bad one
        ([0, 0, 0, 0, 1], 0.8, 0.0),
        ([1, 0, 0, 0, 1], 0.8, 0.5),
        ([1, 0, 0, 0, 1], 1.0, 1.0),
        ([1, 1, 1, 0, 0], 0.4, 2 / 3),
        ([0, 0, 0, 0, 0], 0.8, np.nan),
    ],
)
def test_bad_kept(bad, keep, expected):
    np.testing.assert_equal(ranking.bad_kept(np.array([5.0, 4.0, 3.0, 2.0, 1.0]), np.array(bad), keep), expected)


@pytest.mark.parametrize(
    "bad, keep, expected",
    [
        ([1, 0, 0, 0, 0], 0.8, 1 / 4),
        ([0, 0, 0, 0, 1], 0.8, 0.0),
        ([1, 0, 0, 0, 1], 0.8, 1 / 4),
        ([1, 0, 0, 0, 1], 1.0, 2 / 5),
        ([1, 1, 1, 0, 0], 0.4, 1.0),
        ([0, 0, 0, 0, 0], 0.8, 0.0),
        ([1, 0, 0, 0, 0], 0.05, np.nan),  # keeps no row
    ],
)
def test_bad_among_kept(bad, keep, expected):
    np.testing.assert_equal(ranking.bad_among_kept(np.array([5.0, 4.0, 3.0, 2.0, 1.0]), np.array(bad), keep), expected)

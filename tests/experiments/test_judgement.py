"""Statistics of the judge of selection rules, by hand and by SciPy."""

import numpy as np
import pytest
import scipy.stats

from experiments.selection import counterfactual, judgement


def test_holm_by_hand():
    """0.01 · 3 = 0.03; 0.03 · 2 = 0.06; 0.04 · 1 = 0.04, which may not lie below the one before."""
    np.testing.assert_allclose(judgement.holm([0.04, 0.01, 0.03]), [0.06, 0.03, 0.06])
    np.testing.assert_allclose(judgement.holm([0.9, 0.8]), [1.0, 1.0])


@pytest.mark.parametrize("number", [2, 8])
def test_reliability_of_the_mean_of_measurements(number):
    """With true variance 1 and noise variance 1, the mean of k has noise variance 1/k, so its reliability is k / (k + 1)."""
    rng = np.random.default_rng(0)
    measured = rng.normal(size=(50_000, 1)) + rng.normal(size=(50_000, number))
    assert judgement.reliability(measured) == pytest.approx(number / (number + 1), abs=0.01)


def test_claims_are_paired_and_one_sided():
    lower, other = {0: 1.0, 1: 2.0, 2: 3.0, 5: 9.0}, {0: 1.5, 1: 2.6, 2: 3.4, 4: 0.0}
    line = judgement.claims_table([("first below second", lower, other)])[-1]
    p = scipy.stats.ttest_rel([1, 2, 3], [1.5, 2.6, 3.4], alternative="less").pvalue
    assert "3 of 3" in line and f"{p:.3f}" in line and "-0.5000" in line
    assert "undecided" in judgement.claims_table([("second below first", other, lower)])[-1]


def test_rank_correlation_and_its_interval():
    values = np.arange(30.0)
    assert judgement.rank_correlation(values, values**3) == pytest.approx((1.0, 1.0, 1.0))
    value, low, high = judgement.rank_correlation(values, np.random.default_rng(0).permutation(values))
    assert low < value < high and low < 0 < high


def test_measurements_are_taken_once(tmp_path):
    file = tmp_path / "deep" / "seed.json"
    assert counterfactual.Record(file).get("a", lambda: [1.0]) == [1.0]

    def fail():
        raise AssertionError("measured again")

    assert counterfactual.Record(file).get("a", fail) == [1.0]


def test_kept_rows_and_weights_follow_the_scores():
    scores = np.array([0.1, 3.0, -2.0, 0.5, 0.2])
    assert counterfactual.kept_rows(scores, 0.4).tolist() == [0, 1, 0, 1, 0]
    weights = counterfactual.weights_of(scores)
    assert (
        weights.mean() == pytest.approx(1) and weights[1] == weights[3] == weights[4] and weights[2] == weights.min() < weights[0]
    )


def test_halves_are_halves():
    masks = counterfactual.halves(0, 5, 11)
    assert masks.shape == (5, 11) and set(masks.sum(axis=1)) == {5} and len({tuple(mask) for mask in masks}) == 5


def test_mixtures_hold_another_share_of_each_kind():
    kind = np.array(["clean"] * 4000 + ["garbage"] * 2000)
    masks = counterfactual.mixtures(0, 400, kind)
    shares = np.array([masks[:, kind == name].mean(axis=1) for name in ("clean", "garbage")])
    assert masks.shape == (400, 6000) and abs(np.corrcoef(shares)[0, 1]) < 0.15
    # Means of 400 uniform shares: 1/2, with a standard error of 0.29/20; their standard deviation is 1/sqrt(12).
    np.testing.assert_allclose(shares.mean(axis=1), 0.5, atol=0.06)
    np.testing.assert_allclose(shares.std(axis=1), 12**-0.5, atol=0.03)

"""Each conclusion of the didactic study, on fewer learning rates and cases than it has, and its exact parts by other means."""

import itertools
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.didactic import __main__ as command
from experiments.didactic import bandits, kl, negative, on_policy, reuse, speed, together

RATES = (1.0, 10.0)
DISTANCES = (bandits.NEAR, bandits.FAR)


@pytest.fixture(scope="module")
def samplers():
    return on_policy.measure(("best-of-G", "DPO", "REINFORCE"), DISTANCES, RATES)


@pytest.fixture(scope="module")
def reused():
    return reuse.measure(("DPO", "REINFORCE", "REINFORCE, ratios"), (1, 8), RATES)


def test_best_of_g_by_enumeration():
    probabilities, reward = np.array([0.5, 0.2, 0.3]), np.array([0.1, 2.0, -1.0])
    expected = np.zeros(3)
    for group in itertools.product(range(3), repeat=bandits.G):
        expected[max(group, key=lambda b: reward[b])] += probabilities[list(group)].prod()
    np.testing.assert_allclose(bandits.best_of(probabilities, reward), expected, atol=1e-12)


def test_draw_takes_bins_in_proportion():
    probabilities = np.array([0.25, 0.0, 0.5, 0.25])
    found = bandits.draw(jnp.asarray(probabilities), (jnp.arange(1000) + 0.5) / 1000)
    np.testing.assert_allclose(np.bincount(found, minlength=4) / 1000, probabilities)


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_velocities_are_gradients_of_the_divergences(kind):
    logits, target = np.random.default_rng(0).normal(size=(2, 9))
    target = speed.softmax(target)

    def divergence(z):
        p, q = (target, speed.softmax(z)) if kind == "forward" else (speed.softmax(z), target)
        return p @ np.log(p / q)

    moves = 1e-5 * np.eye(9)
    numeric = [(divergence(logits + move) - divergence(logits - move)) / 2e-5 for move in moves]
    np.testing.assert_allclose(speed.velocity(kind, speed.softmax(logits), target), np.negative(numeric), atol=1e-8)


def test_forward_kl_matches_moments_and_reverse_kl_takes_a_mode(monkeypatch):
    monkeypatch.setattr(kl, "SEEDS", 4)
    found = kl.measure()
    forward, reverse = found["measures"]["forward"], found["measures"]["reverse"]
    np.testing.assert_allclose(forward["mean"], 0, atol=0.02)  # as the stationary point of an exponential family has
    np.testing.assert_allclose(forward["deviation"], 1, atol=0.01)
    assert forward["valley"].min() > 0.2 and found["target"]["valley"].max() < 0.05
    for kind in ("reverse", "on-policy"):
        measured = found["measures"][kind]
        assert measured["valley"].max() < 0.1 and measured["deviation"].max() < 0.4
        assert (measured["left"][:4] > 0.9).all() and (measured["left"][4:] < 0.1).all()  # the one that it started in
    assert found["measures"]["weighted"]["valley"].min() > 0.2
    assert reverse["distance"].max() > 0.2 and max(d.max() for d in found["table"].values()) < 0.02  # a table can have both


def test_reverse_kl_is_ahead_between_most_bins_for_sharp_targets_only():
    ahead = {s: np.mean([speed.faster(s, seed)["all"] for seed in range(8)]) for s in speed.SHARPNESS}
    assert ahead[0.5] < 0.45 and ahead[8.0] > 0.75
    assert np.mean([speed.faster(8.0, seed)["best"] for seed in range(8)]) < 0.5


def test_exact_reverse_kl_cannot_raise_what_has_no_mass():
    near, far = speed.flows(bandits.NEAR), speed.flows(bandits.FAR)
    assert np.median(near["reverse"]["at_1"]) < np.median(near["forward"]["at_1"]) + 3
    assert far["forward"]["at_1"].max() < 50 and far["reverse"]["at_1"].min() > speed.STEPS


def test_at_equal_rates_dpo_is_ahead_of_the_likelihood_of_its_chosen_responses():
    case = bandits.Case(bandits.NEAR, horizon=100)
    ends = [bandits.learned(name, [case], rates=(0.1,), betas=(0.2,))[case].end for name in ("DPO", "best-of-G")]
    gap = bandits.paired(*ends)
    assert gap.above == gap.seeds and gap.mean > 0.03


def test_on_policy_samples_win_and_most_where_the_peak_is_outside(samplers):
    for near, far in samplers["gap"].values():
        assert far.above == far.seeds and far.mean > 0.3
        assert far.mean > near.mean + 0.2
    assert abs(samplers["gap"]["DPO"][0].mean) < 0.1  # inside, pairs of the reference are enough


def test_a_negative_gradient_wins_off_policy_and_not_on_policy(samplers):
    ends = samplers["ends"]
    for place in range(2):
        gap = bandits.paired(ends["DPO"]["off"][place], ends["best-of-G"]["off"][place])
        assert gap.above >= gap.seeds - 1 and gap.mean > 0.1
        assert abs(ends["DPO"]["on"][place].mean() - ends["best-of-G"]["on"][place].mean()) < 0.05


def test_off_policy_maximum_likelihood_ends_at_the_best_of_g():
    case = bandits.Case(bandits.NEAR, False)
    end = bandits.learned("best-of-G", [case], bandits.TABLE, (3.0,))[case].end
    expected = [negative.limit(bandits.problem(seed, bandits.NEAR)) for seed in bandits.SEEDS]
    np.testing.assert_allclose(end, expected, atol=0.05)


def test_dpo_lowers_chosen_responses_too_and_ipo_keeps_them_up():
    case = bandits.Case(bandits.FAR, False)
    dpo, ipo = (bandits.learned(name, [case], **negative.STEADY)[case] for name in ("DPO", "IPO"))
    assert dpo.chosen[:, 0].min() > 0 > dpo.chosen[:, -1].max()
    assert ipo.chosen[:, -1].min() > 0.3
    assert dpo.rejected[:, -1].max() < -10 < ipo.rejected[:, -1].min()


def test_both_together_are_ahead_of_each_alone_on_a_table():
    found = together.measure(DISTANCES, RATES)
    for gap in found["less"]["table, outside"].values():
        assert gap.mean > 0.05 and gap.above >= 5
    assert abs(found["less"]["shared, outside"]["on-policy"].mean) < 0.05


def test_reuse_helps_unless_stale_samples_are_pushed_down_without_ratios(reused):
    assert reused["change"]["DPO, outside"].mean > 0.05 and reused["change"]["DPO, outside"].above >= 7
    assert reused["change"]["REINFORCE, outside"].mean < 0.1
    assert reused["change_kept"]["REINFORCE, outside"].mean < -0.05
    ratios = reused["change"]["REINFORCE, ratios, outside"]
    assert ratios.mean > 0.15 and ratios.above == ratios.seeds


def test_seeds_that_tune_are_not_reported_and_the_policy_is_a_distribution():
    assert not set(bandits.TUNED_ON) & set(bandits.SEEDS) and len(bandits.SEEDS) >= 4
    case = bandits.Case(bandits.NEAR, horizon=100)
    found = bandits.learned("DPO", [case], rates=(0.1,), betas=(0.2,))[case]
    np.testing.assert_allclose(found.policy.sum(-1), 1, rtol=1e-5)
    p = [bandits.problem(seed, bandits.NEAR) for seed in bandits.SEEDS]
    expected = [(q @ one.reward - one.reference @ one.reward) / (one.reward.max() - one.reference @ one.reward)
                for q, one in zip(found.policy, p)]
    np.testing.assert_allclose(found.end, expected, atol=1e-4)


def test_the_committed_page_has_its_figures_and_numbers():
    results = pathlib.Path("experiments/results")
    page, numbers = (results / "didactic.md").read_text(), json.loads((results / "didactic.json").read_text())
    figures = sorted(file.stem for file in (results / "didactic").iterdir())
    assert figures == sorted(numbers) and all(f"](didactic/{name}.svg)" in page for name in figures)


def test_numbers_are_plain():
    value = {"a": np.array([1.23456, 2]), 1.0: bandits.Paired(0.1, np.float64(0.2), 3, 4), "curves": np.zeros(9), "n": (1, "x")}
    assert json.loads(json.dumps(command.plain(value))) == {
        "a": [1.235, 2.0],
        "1.0": {"mean": 0.1, "sd": 0.2, "above": 3, "seeds": 4},
        "n": [1, "x"],
    }

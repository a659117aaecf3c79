"""The conclusions of the didactic study on fewer learning rates and cases, and its exact parts by independent computations."""

import itertools
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import statements
from experiments.didactic import bandits, kl, negative, on_policy, reuse, speed, together

RATES, BETAS = (0.1, 1.0, 10.0), dict.fromkeys(bandits.BETAS, (0.2,))
DISTANCES = (bandits.NEAR, bandits.FAR)


@pytest.fixture(scope="module", autouse=True)
def one_beta():
    """With one β, all learners of a kind have the same number of runs and share a compilation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bandits, "BETAS", BETAS)
        yield


@pytest.fixture(scope="module")
def samplers():
    return on_policy.measure(("best-of-G", "DPO", "REINFORCE"), DISTANCES, RATES)


@pytest.fixture(scope="module")
def reused():
    return reuse.measure(("DPO", "REINFORCE", "REINFORCE, ratios"), (1, 10), RATES)  # 20 · 10 steps, as the others


def test_best_of_g_by_enumeration():
    probabilities, reward = np.array([0.5, 0.2, 0.3]), np.array([0.1, 2.0, -1.0])
    expected = np.zeros(3)
    for group in itertools.product(range(3), repeat=bandits.G):
        expected[max(group, key=lambda b: reward[b])] += probabilities[list(group)].prod()
    np.testing.assert_allclose(bandits.best_of(probabilities, reward), expected, atol=1e-12)


def test_draw_takes_bins_in_proportion():
    probabilities = np.array([0.25, 0.0, 0.5, 0.25])
    values = bandits.draw(jnp.asarray(probabilities), (jnp.arange(1000) + 0.5) / 1000)
    np.testing.assert_allclose(np.bincount(values, minlength=4) / 1000, probabilities)


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
    values = kl.measure()
    forward, reverse = values["measures"]["forward"], values["measures"]["reverse"]
    np.testing.assert_allclose(forward["mean"], 0, atol=0.02)  # as at the stationary point of an exponential family
    np.testing.assert_allclose(forward["deviation"], 1, atol=0.01)
    assert forward["valley"].min() > 0.2 and values["target"]["valley"].max() < 0.05
    for kind in ("reverse", "on-policy"):
        measured = values["measures"][kind]
        assert measured["valley"].max() < 0.1 and measured["deviation"].max() < 0.4
        assert (measured["left"][:4] > 0.9).all() and (measured["left"][4:] < 0.1).all()  # the mode nearest to the start
    assert values["measures"]["weighted"]["valley"].min() > 0.2
    assert (
        reverse["distance"].max() > 0.2 and max(d.max() for d in values["table"].values()) < 0.02
    )  # a table can represent both modes


def test_reverse_kl_is_ahead_between_most_bins_for_sharp_targets_only():
    ahead = {s: np.mean([speed.faster(s, seed)["all"] for seed in range(8)]) for s in speed.SHARPNESS}
    assert ahead[0.5] < 0.45 and ahead[8.0] > 0.75
    assert np.mean([speed.faster(8.0, seed)["best"] for seed in range(8)]) < 0.5


def test_exact_reverse_kl_cannot_raise_what_has_no_mass():
    near, far = speed.flows(bandits.NEAR), speed.flows(bandits.FAR)
    assert np.median(near["reverse"]["at_1"]) < np.median(near["forward"]["at_1"]) + 3
    assert far["forward"]["at_1"].max() < 50 and far["reverse"]["at_1"].min() > speed.STEPS


def test_at_equal_rates_dpo_is_ahead_of_the_likelihood_of_its_chosen_responses(samplers):
    case = bandits.Case(bandits.NEAR, False)
    gap = bandits.paired(*(bandits.grid(name, DISTANCES, RATES)[case].ends[0] for name in ("DPO", "best-of-G")))  # rate 0.1
    assert gap.above == gap.seeds and gap.mean > 0.05


def test_on_policy_samples_win_and_most_where_the_peak_is_outside(samplers):
    for near, far in samplers["gap"].values():
        assert far.above == far.seeds and far.mean > 0.3
        assert far.mean > near.mean + 0.2
    assert abs(samplers["gap"]["DPO"][0].mean) < 0.1  # inside, pairs of the reference are enough


def test_a_negative_gradient_wins_off_policy_and_not_on_policy(samplers):
    ends = samplers["ends"]
    for peak in range(2):
        gap = bandits.paired(ends["DPO"]["off"][peak], ends["best-of-G"]["off"][peak])
        assert gap.above >= gap.seeds - 1 and gap.mean > 0.1
        assert abs(ends["DPO"]["on"][peak].mean() - ends["best-of-G"]["on"][peak].mean()) < 0.05


@pytest.mark.parametrize("distance", DISTANCES)
def test_off_policy_maximum_likelihood_ends_at_the_best_of_g(samplers, distance):
    end = bandits.grid("best-of-G", DISTANCES, RATES)[bandits.Case(distance, False)].end
    expected = [negative.limit(bandits.problem(seed, distance)) for seed in bandits.SEEDS]
    assert end.mean() == pytest.approx(np.mean(expected), abs=0.05)


def test_dpo_lowers_chosen_responses_too_and_ipo_keeps_them_up(samplers):
    dpo, ipo = (bandits.grid(name, DISTANCES, RATES)[bandits.Case(bandits.FAR, False)] for name in ("DPO", "IPO"))
    assert dpo.chosen[:, -1].max() < -0.5 and ipo.chosen[:, -1].min() > 0.3
    assert dpo.rejected[:, -1].max() < -10 < ipo.rejected[:, -1].max() < 0


def test_both_together_are_ahead_of_each_alone_on_a_table(monkeypatch):
    monkeypatch.setattr(bandits, "BETAS", dict.fromkeys(bandits.BETAS, (1.0,)))
    values = together.measure(DISTANCES, RATES)
    for gap in values["less"]["table, outside"].values():
        assert gap.mean > 0.05 and gap.above >= 5
    assert abs(values["less"]["shared, outside"]["on-policy"].mean) < 0.05


def test_reuse_helps_unless_stale_samples_are_pushed_down_without_ratios(reused):
    assert reused["change"]["DPO, outside"].mean > 0.05 and reused["change"]["DPO, outside"].above >= 7
    assert reused["change"]["REINFORCE, outside"].mean < 0.1
    assert reused["change_kept"]["REINFORCE, outside"].mean < -0.05
    ratios = reused["change"]["REINFORCE, ratios, outside"]
    assert ratios.mean > 0.15 and ratios.above == ratios.seeds


def test_gains_are_those_of_the_policies_on_seeds_that_tuned_nothing(samplers):
    assert not set(bandits.TUNED_ON) & set(bandits.SEEDS) and len(bandits.SEEDS) >= 4
    values = bandits.grid("DPO", DISTANCES, RATES)[bandits.Case(bandits.FAR, False)]
    np.testing.assert_allclose(values.policy.sum(-1), 1, rtol=1e-5)
    for gain, policy, seed in zip(values.end, values.policy, bandits.SEEDS):
        p = bandits.problem(seed, bandits.FAR)
        start = p.reference @ p.reward
        assert gain == pytest.approx((policy @ p.reward - start) / (p.reward.max() - start), abs=1e-4)


def test_the_committed_page_has_its_figures_and_numbers():
    results = pathlib.Path("experiments/results")
    page, numbers = (results / "didactic.md").read_text(), json.loads((results / "didactic.json").read_text())
    figures = sorted(file.stem for file in (results / "didactic").iterdir())
    assert figures == sorted(numbers) and all(f"](didactic/{name}.svg)" in page for name in figures)


def test_numbers_are_plain():
    value = {"a": np.array([1.23456, 2]), 1.0: bandits.Paired(0.1, np.float64(0.2), 3, 4), "curves": np.zeros(9), "n": (1, "x")}
    assert json.loads(json.dumps(statements.plain(value))) == {
        "a": [1.235, 2.0],
        "1.0": {"mean": 0.1, "sd": 0.2, "above": 3, "seeds": 4},
        "n": [1, "x"],
    }

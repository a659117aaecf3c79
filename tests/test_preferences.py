"""Losses of pairs and weights of responses against values by hand, float64 NumPy and finite differences."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax import preferences
from bilevel_jax.data import packing
from bilevel_jax.data.packing import Segment
from bilevel_jax.objective import Objective, entry_losses
from experiments.didactic import objectives

NONE = 9  # the group of entries without one, of nine entries
REWARD = np.array([0.2, 1.0, 0.7, np.nan, 3.0, 3.0, -1.0, 0.5, np.nan])
GROUP = np.array([1, 4, 1, NONE, 4, 4, 1, 2, 2])  # {0, 2, 6}, {1, 4, 5} with two equal best ones, {7} alone


def differences(f, x, step):
    """Central differences in float64."""
    return np.array([(f(x + move) - f(x - move)) / (2 * step) for move in step * np.eye(len(x))])


def dpo(margin, share, beta):
    return share @ preferences.pair_losses("dpo", margin, beta)


def ipo(margin, share, beta):
    return share @ preferences.pair_losses("ipo", margin, beta)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_dpo(beta):
    margin = np.array([-3.0, -0.2, 0.0, 0.7, 5.0, 1e4])
    share = np.array([0.1, 0.2, 0.3, 0.25, 0.15, 0.0])
    expected = np.sum(share * np.log1p(np.exp(-beta * margin)))  # -log σ(z) = log(1 + e^-z)
    slope = -beta * share / (1 + np.exp(beta * np.minimum(margin, 300)))  # d/dm -log σ(βm) = -β σ(-βm)
    value, gradient = jax.value_and_grad(dpo)(jnp.asarray(margin), jnp.asarray(share), beta)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-9)


def test_dpo_is_finite_for_extreme_margins():
    value, gradient = jax.value_and_grad(dpo)(jnp.array([-1e4, 1e4]), jnp.array([0.5, 0.5]), 1.0)
    np.testing.assert_allclose(value, 5e3)  # 1e4 · 0.5, and 0 for the other
    np.testing.assert_allclose(gradient, [-0.5, 0.0])


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_ipo(beta):
    margin, share = np.array([-3.0, 0.0, 0.25, 5.0, 40.0]), np.array([0.1, 0.2, 0.3, 0.4, 0.0])

    def by_hand(m):
        return sum(s * (x * x - x / beta + 1 / (4 * beta * beta)) for s, x in zip(share, m))

    value, gradient = jax.value_and_grad(ipo)(jnp.asarray(margin), jnp.asarray(share), beta)
    np.testing.assert_allclose(value, by_hand(margin), rtol=1e-5)
    np.testing.assert_allclose(gradient, differences(by_hand, margin, 1e-4), rtol=1e-4, atol=1e-6)


def test_ipo_has_its_minimum_at_a_finite_margin_and_dpo_has_none():
    for margin, sign in ((4.9, -1), (5.1, 1)):  # 1/2β = 5
        assert np.sign(jax.grad(ipo)(jnp.array([margin]), jnp.ones(1), 0.1)[0]) == sign
        assert jax.grad(dpo)(jnp.array([margin]), jnp.ones(1), 0.1)[0] < 0


def test_pairs_of_scattered_entries():
    log_ratio = jnp.array([1.0, -2.0, 7.0, 0.5, 3.0])
    sign = jnp.array([1.0, -1.0, 0.0, -1.0, 1.0])  # the pairs are 0 with 3 and 4 with 1; 2 is padding
    group = jnp.array([2, 0, 5, 2, 0])
    np.testing.assert_allclose(preferences.margins(log_ratio, sign, group), [5.0, 0, 0.5, 0, 0])
    margin, share = objectives.pairs(log_ratio, sign, jnp.array([0.25, 0.75, 0.0, 0.25, 0.75]), group)
    np.testing.assert_allclose(margin, [5.0, 0, 0.5, 0, 0])
    np.testing.assert_allclose(share, [0.75, 0, 0.25, 0, 0])


@pytest.mark.parametrize("beta", [0.2, 1.0, 1e-3])
def test_reward_weighted(beta):
    expected = np.ones(9)
    for members in ([0, 2, 6], [1, 4, 5]):
        likelihood = np.exp((REWARD[members] - REWARD[members].max()) / beta)
        expected[members] = 3 * likelihood / likelihood.sum()
    weight = preferences.reward_weighted(jnp.asarray(REWARD), jnp.asarray(GROUP), beta)
    np.testing.assert_allclose(weight, expected, rtol=1e-5, atol=1e-12)


def test_leave_one_out():
    expected = np.ones(9)
    for members in ([0, 2, 6], [1, 4, 5]):
        expected[members] = [REWARD[i] - np.mean([REWARD[j] for j in members if j != i]) for i in members]
    expected[7] = 0  # a group of one
    weight = preferences.leave_one_out(jnp.asarray(REWARD), jnp.asarray(GROUP))
    np.testing.assert_allclose(weight, expected, rtol=1e-6)


def test_reinforce_descends_the_expected_reward():
    """The mean gradient over all groups of two responses, weighted by their probability, is -∇ E[r] by finite differences."""
    logits, reward = np.array([0.3, -0.5, 1.1]), np.array([1.0, 4.0, -2.0])

    def probabilities(z):
        return np.exp(z) / np.exp(z).sum()

    def loss(z, y):
        weight = preferences.leave_one_out(jnp.asarray(reward)[y], jnp.zeros(2, jnp.int32))
        return objectives.likelihood(jax.nn.log_softmax(z)[y], weight, jnp.full(2, 0.5))

    groups = np.array(list(itertools.product(range(3), repeat=2)))
    slopes = jax.vmap(jax.grad(loss), (None, 0))(jnp.asarray(logits), jnp.asarray(groups))
    expected = probabilities(logits)[groups].prod(1) @ np.asarray(slopes, np.float64)
    np.testing.assert_allclose(expected, -differences(lambda z: probabilities(z) @ reward, logits, 1e-5), atol=1e-6)


def test_reward_weighted_is_maximum_likelihood_of_the_tilted_policy():
    """If every response occurs once with equal probability, the weighted likelihood has its minimum at π ∝ exp(r/β)."""
    reward, beta = np.array([0.1, 0.9, 0.4, -0.3]), 0.3
    weight = preferences.reward_weighted(jnp.asarray(reward), jnp.zeros(4, jnp.int32), beta)
    slope = jax.grad(lambda z: objectives.likelihood(jax.nn.log_softmax(z), weight, jnp.full(4, 0.25)))
    np.testing.assert_allclose(slope(jnp.asarray(reward / beta)), 0, atol=1e-6)
    assert np.abs(slope(jnp.asarray(reward))).max() > 0.05


@pytest.mark.parametrize("empty", [0, 1], ids=["chosen", "rejected"])
def test_a_pair_of_which_one_response_has_nothing_to_learn(empty):
    """A response of one token without a question. The loss of the pair counts in its micro-batch, as it does over all of them."""
    tokens = [np.array([1]), np.array([2, 3, 4])]
    responses = tokens if empty == 0 else tokens[::-1]
    pair = [Segment(np.array([], int), y, 0, 1.0, 0, sign, -2.0 * sign) for y, sign in zip(responses, (1, -1))]
    other = Segment(np.array([5]), np.array([6, 7]), -1, 1.0)
    batch = jax.tree.map(jnp.asarray, packing.pack_step([*pair, other], 3, 1, packing.Layout(1, 6, 4)))
    nll = jnp.where(jnp.arange(4) == 1 - empty, 3.0, 0.0)
    micro = [entry_losses("dpo", Objective(lower="dpo", beta=0.5), batch, nll, m) for m in range(batch.packed.num_micro)]
    margin = (-nll[0] + 2.0) - (-nll[1] - 2.0)
    np.testing.assert_allclose(sum(micro), [np.log1p(np.exp(-0.5 * margin))] * 2 + [0, 0], rtol=1e-6)

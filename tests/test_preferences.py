"""Preference objectives against values by hand, float64 NumPy and finite differences."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax import preferences

NONE = 9  # of nine entries: the group of those that have none
REWARD = np.array([0.2, 1.0, 0.7, np.nan, 3.0, 3.0, -1.0, 0.5, np.nan])
GROUP = np.array([1, 4, 1, NONE, 4, 4, 1, 2, 2])  # {0, 2, 6}, {1, 4, 5} with two equal bests, {7} alone


def differences(f, x, step):
    """Central differences in float64."""
    return np.array([(f(x + move) - f(x - move)) / (2 * step) for move in step * np.eye(len(x))])


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_dpo(beta):
    margin = np.array([-3.0, -0.2, 0.0, 0.7, 5.0, 1e4])
    share = np.array([0.1, 0.2, 0.3, 0.25, 0.15, 0.0])
    expected = np.sum(share * np.log1p(np.exp(-beta * margin)))  # -log σ(z) = log(1 + e^-z)
    slope = -beta * share / (1 + np.exp(beta * np.minimum(margin, 300)))  # d/dm -log σ(βm) = -β σ(-βm)
    value, gradient = jax.value_and_grad(preferences.dpo)(jnp.asarray(margin), jnp.asarray(share), beta)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-9)


def test_dpo_is_finite_for_hopeless_pairs():
    value, gradient = jax.value_and_grad(preferences.dpo)(jnp.array([-1e4, 1e4]), jnp.array([0.5, 0.5]), 1.0)
    np.testing.assert_allclose(value, 5e3)  # 1e4 · 0.5, and 0 for the other
    np.testing.assert_allclose(gradient, [-0.5, 0.0])


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_ipo(beta):
    margin, share = np.array([-3.0, 0.0, 0.25, 5.0, 40.0]), np.array([0.1, 0.2, 0.3, 0.4, 0.0])

    def by_hand(m):
        return sum(s * (x * x - x / beta + 1 / (4 * beta * beta)) for s, x in zip(share, m))

    value, gradient = jax.value_and_grad(preferences.ipo)(jnp.asarray(margin), jnp.asarray(share), beta)
    np.testing.assert_allclose(value, by_hand(margin), rtol=1e-5)
    np.testing.assert_allclose(gradient, differences(by_hand, margin, 1e-4), rtol=1e-4, atol=1e-6)


def test_ipo_rests_at_its_margin_and_dpo_nowhere():
    for margin, sign in ((4.9, -1), (5.1, 1)):  # 1/2β = 5
        assert np.sign(jax.grad(preferences.ipo)(jnp.array([margin]), jnp.ones(1), 0.1)[0]) == sign
        assert jax.grad(preferences.dpo)(jnp.array([margin]), jnp.ones(1), 0.1)[0] < 0


def test_pairs_of_scattered_entries():
    log_ratio = jnp.array([1.0, -2.0, 7.0, 0.5, 3.0])
    sign = jnp.array([1.0, -1.0, 0.0, -1.0, 1.0])  # the pairs are 0 with 3 and 4 with 1; 2 is padding
    margin, share = preferences.pairs(log_ratio, sign, jnp.array([0.25, 0.75, 0.0, 0.25, 0.75]), jnp.array([2, 0, 5, 2, 0]))
    np.testing.assert_allclose(margin, [5.0, 0, 0.5, 0, 0])
    np.testing.assert_allclose(share, [0.75, 0, 0.25, 0, 0])


@pytest.mark.parametrize("objective", [preferences.dpo, preferences.ipo])
def test_the_better_response_is_pulled_up_and_the_worse_one_pushed_down(objective):
    reward, group = jnp.array([0.1, 0.9, 0.4, -0.3]), jnp.zeros(4, jnp.int32)

    def loss(log_prob):
        sign = preferences.best_against_worst(reward, group)
        return objective(*preferences.pairs(log_prob, sign, jnp.ones(4), group), 0.5)

    assert np.sign(jax.grad(loss)(jnp.zeros(4))).tolist() == [0, -1, 0, 1]  # of a loss that is descended


def test_best_against_worst():
    found = preferences.best_against_worst(jnp.asarray(REWARD), jnp.asarray(GROUP))
    assert found.tolist() == [0, -1, 1, 0, 1, 0, -1, 0, 0]


def test_no_pair_among_equals():
    reward, group = jnp.full(4, 0.3), jnp.array([0, 0, 0, 3])
    sign = preferences.best_against_worst(reward, group)
    margin, share = preferences.pairs(jnp.arange(4.0), sign, jnp.full(4, 0.5), group)
    assert not np.any(sign) and not np.any(margin) and not np.any(share)


def test_best_of():
    assert preferences.best_of(jnp.asarray(REWARD), jnp.asarray(GROUP)).tolist() == [0, 0, 3, 1, 3, 0, 0, 1, 1]


@pytest.mark.parametrize("beta", [0.2, 1.0, 1e-3])
def test_reward_weighted(beta):
    expected = np.ones(9)
    for places in ([0, 2, 6], [1, 4, 5]):
        likelihood = np.exp((REWARD[places] - REWARD[places].max()) / beta)
        expected[places] = 3 * likelihood / likelihood.sum()
    found = preferences.reward_weighted(jnp.asarray(REWARD), jnp.asarray(GROUP), beta)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-12)


def test_leave_one_out():
    expected = np.ones(9)
    for places in ([0, 2, 6], [1, 4, 5]):
        expected[places] = [REWARD[i] - np.mean([REWARD[j] for j in places if j != i]) for i in places]
    expected[7] = 0  # nothing to compare with
    found = preferences.leave_one_out(jnp.asarray(REWARD), jnp.asarray(GROUP))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_likelihood_takes_weights_as_they_are():
    weight, share = np.array([2.0, -1.0, 0.5]), np.array([0.5, 0.25, 0.0])
    log_prob = np.array([-3.0, -1.0, -9.0])

    def loss(x):
        return preferences.likelihood(x, weight * x / x, share)  # the weight hangs on x, its gradient is not wanted

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(log_prob))
    np.testing.assert_allclose(value, 0.5 * 2 * 3 - 0.25 * 1)
    np.testing.assert_allclose(gradient, [-1.0, 0.25, 0.0])


def test_reinforce_descends_the_expected_reward():
    """Over all groups of two responses to one question, weighted by how likely they are: -∇ E[r], by finite differences."""
    logits, reward = np.array([0.3, -0.5, 1.1]), np.array([1.0, 4.0, -2.0])

    def probabilities(z):
        return np.exp(z) / np.exp(z).sum()

    def loss(z, y):
        weight = preferences.leave_one_out(jnp.asarray(reward)[y], jnp.zeros(2, jnp.int32))
        return preferences.likelihood(jax.nn.log_softmax(z)[y], weight, jnp.full(2, 0.5))

    groups = np.array(list(itertools.product(range(3), repeat=2)))
    slopes = jax.vmap(jax.grad(loss), (None, 0))(jnp.asarray(logits), jnp.asarray(groups))
    expected = probabilities(logits)[groups].prod(1) @ np.asarray(slopes, np.float64)
    np.testing.assert_allclose(expected, -differences(lambda z: probabilities(z) @ reward, logits, 1e-5), atol=1e-6)


def test_reward_weighted_is_maximum_likelihood_of_the_tilted_policy():
    """With every response there once and equally likely, the weighted likelihood is least at π ∝ exp(r/β)."""
    reward, beta = np.array([0.1, 0.9, 0.4, -0.3]), 0.3
    weight = preferences.reward_weighted(jnp.asarray(reward), jnp.zeros(4, jnp.int32), beta)
    slope = jax.grad(lambda z: preferences.likelihood(jax.nn.log_softmax(z), weight, jnp.full(4, 0.25)))
    np.testing.assert_allclose(slope(jnp.asarray(reward / beta)), 0, atol=1e-6)
    assert np.abs(slope(jnp.asarray(reward))).max() > 0.05


def test_jitted_objectives_ignore_padding():
    """Entries without a group, share or reward change nothing, in the value or in the gradient."""

    @jax.jit
    def loss(log_prob, reward, share, group):
        sign = preferences.best_against_worst(reward, group)
        return (
            preferences.dpo(*preferences.pairs(log_prob, sign, share, group), 0.1)
            + preferences.ipo(*preferences.pairs(log_prob, sign, share, group), 0.1)
            + preferences.likelihood(log_prob, preferences.best_of(reward, group), share)
            + preferences.likelihood(log_prob, preferences.reward_weighted(reward, group, 0.5), share)
            + preferences.likelihood(log_prob, preferences.leave_one_out(reward, group), share)
        )

    log_prob, reward = jnp.array([-1.0, -2.0, -0.5, -4.0]), jnp.array([0.1, 0.9, 0.4, -0.3])
    group, share = jnp.array([0, 0, 1, 1]), jnp.full(4, 0.25)
    value, gradient = jax.value_and_grad(loss)(log_prob, reward, share, group)
    padded = [
        jnp.concatenate([jnp.full(3, fill, x.dtype), x])
        for x, fill in ((log_prob, -7.0), (reward, jnp.nan), (share, 0.0), (group, 7))
    ]
    value_padded, gradient_padded = jax.value_and_grad(loss)(*padded)
    np.testing.assert_allclose(value_padded, value, rtol=1e-6)
    np.testing.assert_allclose(gradient_padded, np.concatenate([np.zeros(3), gradient]), rtol=1e-6)

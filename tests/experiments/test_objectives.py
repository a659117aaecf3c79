"""Scalar objectives of the didactic study against values by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax import preferences
from experiments.didactic import objectives

NONE = 9  # the group of entries without one, of nine entries
REWARD = np.array([0.2, 1.0, 0.7, np.nan, 3.0, 3.0, -1.0, 0.5, np.nan])
GROUP = np.array([1, 4, 1, NONE, 4, 4, 1, 2, 2])  # {0, 2, 6}, {1, 4, 5} with two equal best ones, {7} alone


@pytest.mark.parametrize("kind", ["dpo", "ipo"])
def test_dpo_and_ipo_are_means_of_pair_losses(kind):
    margin, share = jnp.array([-3.0, 0.2, 5.0]), jnp.array([0.5, 0.3, 0.2])
    expected = sum(s * loss for s, loss in zip(share, preferences.pair_losses(kind, margin, 0.3)))
    np.testing.assert_allclose(getattr(objectives, kind)(margin, share, 0.3), expected, rtol=1e-6)


@pytest.mark.parametrize("objective", [objectives.dpo, objectives.ipo])
def test_the_best_response_is_pulled_up_and_the_worst_one_pushed_down(objective):
    reward, group = jnp.array([0.1, 0.9, 0.4, -0.3]), jnp.zeros(4, jnp.int32)

    def loss(log_prob):
        sign = objectives.best_against_worst(reward, group)
        return objective(*objectives.pairs(log_prob, sign, jnp.ones(4), group), 0.5)

    assert np.sign(jax.grad(loss)(jnp.zeros(4))).tolist() == [0, -1, 0, 1]  # gradients of a loss that is minimised


def test_best_against_worst():
    sign = objectives.best_against_worst(jnp.asarray(REWARD), jnp.asarray(GROUP))
    assert sign.tolist() == [0, -1, 1, 0, 1, 0, -1, 0, 0]


def test_equal_rewards_give_no_pair():
    reward, group = jnp.full(4, 0.3), jnp.array([0, 0, 0, 3])
    sign = objectives.best_against_worst(reward, group)
    margin, share = objectives.pairs(jnp.arange(4.0), sign, jnp.full(4, 0.5), group)
    assert not np.any(sign) and not np.any(margin) and not np.any(share)


def test_best_of():
    assert objectives.best_of(jnp.asarray(REWARD), jnp.asarray(GROUP)).tolist() == [0, 0, 3, 1, 3, 0, 0, 1, 1]


def test_likelihood_has_no_gradient_through_weights():
    weight, share = np.array([2.0, -1.0, 0.5]), np.array([0.5, 0.25, 0.0])
    log_prob = np.array([-3.0, -1.0, -9.0])

    def loss(x):
        return objectives.likelihood(x, weight * x / x, share)  # the weight depends on x, but has no gradient

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(log_prob))
    np.testing.assert_allclose(value, 0.5 * 2 * 3 - 0.25 * 1)
    np.testing.assert_allclose(gradient, [-1.0, 0.25, 0.0])


def test_jitted_objectives_ignore_padding():
    """Entries without a group, share or reward change neither the value nor the gradient."""

    @jax.jit
    def loss(log_prob, reward, share, group):
        sign = objectives.best_against_worst(reward, group)
        return (
            objectives.dpo(*objectives.pairs(log_prob, sign, share, group), 0.1)
            + objectives.ipo(*objectives.pairs(log_prob, sign, share, group), 0.1)
            + objectives.likelihood(log_prob, objectives.best_of(reward, group), share)
            + objectives.likelihood(log_prob, preferences.reward_weighted(reward, group, 0.5), share)
            + objectives.likelihood(log_prob, preferences.leave_one_out(reward, group), share)
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

"""Token weights against their definition, response by response in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax import token_weights

PSI = np.array([-0.7, -0.3])
LENGTHS = {2: 5, 0: 1, 3: 4}  # entry -> number of tokens, in packed order
ENTRY = np.array([entry for entry, length in LENGTHS.items() for _ in range(length)] + [4, 4])  # two padding targets
NLL = np.abs(np.random.default_rng(0).normal(2, 2, len(ENTRY))) * (ENTRY < 4)
WEIGHED = np.array([True, True, True, False])


def response_weights(psi, nll):
    """v of the tokens of one response, by hand."""
    before = [max(nll[:t], default=0.0) for t in range(len(nll))]
    share = np.exp(psi[0] * nll + psi[1] * np.array(before))
    return len(nll) * share / share.sum()


def batch_weights(psi, nll=NLL):
    return token_weights.weights(jnp.float32(psi), jnp.float32(nll), jnp.array(ENTRY), jnp.array(WEIGHED))


def test_largest_before():
    entry = np.array([1, 1, 1, 1, 0, 0, 0, 2])
    nll = np.array([2.0, 1, 5, 3, 4, 6, 0, 7], np.float32)
    np.testing.assert_array_equal(token_weights.largest_before(nll, entry), [0, 2, 2, 5, 0, 4, 6, 0])


def test_weights():
    expected = np.ones(len(ENTRY))
    for entry in (2, 0):  # the weights do not apply to entry 3
        expected[ENTRY == entry] = response_weights(PSI, NLL[ENTRY == entry])
    actual = np.asarray(batch_weights(PSI))
    np.testing.assert_allclose(actual[ENTRY < 4], expected[ENTRY < 4], rtol=1e-5)
    assert actual[ENTRY == 2].mean() == pytest.approx(1, rel=1e-6) and actual[ENTRY == 0] == 1  # a single token
    assert np.ptp(actual[ENTRY == 2]) > 0.5


def test_phi_of_zero_gives_equal_weights():
    np.testing.assert_allclose(batch_weights([0.0, 0.0])[ENTRY < 4], 1, rtol=1e-6)


def test_losses_far_apart_stay_finite():
    actual = np.asarray(batch_weights([-5.0, -5.0], NLL * 100))
    assert np.isfinite(actual).all() and actual[ENTRY == 2].sum() == pytest.approx(5)


def test_no_gradient_flows_into_losses():
    gradient = jax.grad(
        lambda nll: jnp.sum(token_weights.weights(jnp.float32(PSI), nll, jnp.array(ENTRY), jnp.array(WEIGHED)) * ENTRY)
    )
    np.testing.assert_array_equal(gradient(jnp.float32(NLL)), 0)


def test_gradient_of_a_response():
    """Equation (5) of the module against finite differences in float64, and against automatic differentiation."""
    nll = NLL[ENTRY == 2]
    z = np.stack([nll, [max(nll[:t], default=0.0) for t in range(len(nll))]], axis=1)
    v = response_weights(PSI, nll)[:, None]
    formula = (v * (z - (v * z).mean(axis=0)) * nll[:, None]).mean(axis=0)

    def loss(psi):
        return (response_weights(psi, nll) * nll).mean()

    step = 1e-6 * np.eye(2)
    np.testing.assert_allclose(formula, [(loss(PSI + d) - loss(PSI - d)) / 2e-6 for d in step], rtol=1e-6)
    gradient = jax.jacfwd(lambda psi: jnp.mean((batch_weights(psi) * NLL)[ENTRY == 2]))(jnp.float32(PSI))
    np.testing.assert_allclose(gradient, formula, rtol=1e-4)

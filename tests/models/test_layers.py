"""Products and their derivatives. `test_decoder.py` tests layers in a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax.models import layers


@pytest.mark.parametrize("x_dtype, w_dtype", [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")])
def test_products_and_their_gradients_equal_float64(x_dtype, w_dtype):
    """y = x w, dx = d wᵀ, dw = xᵀ d of factors that are exact in bfloat16: only the result is rounded."""
    rng = np.random.default_rng(0)
    x, w, d = (rng.integers(-8, 9, shape).astype(np.float64) for shape in ((6, 5), (5, 7), (6, 7)))
    inputs = jnp.asarray(x, x_dtype), jnp.asarray(w, w_dtype)
    y, pull = jax.vjp(layers.matmul, *inputs)
    dx, dw = pull(jnp.asarray(d, x_dtype))
    for result, expected, dtype in ((y, x @ w, x_dtype), (dx, d @ w.T, x_dtype), (dw, x.T @ d, w_dtype)):
        assert result.dtype == dtype
        np.testing.assert_array_equal(np.asarray(result, np.float64), np.asarray(jnp.asarray(expected, dtype), np.float64))


def test_products_save_inputs_only_for_trained_weights():
    x, w = jnp.ones((6, 5)), jnp.ones((5, 7))
    frozen = jax.tree.leaves(jax.vjp(lambda x: layers.matmul(x, w), x)[1])
    assert x.shape not in [leaf.shape for leaf in frozen]
    assert x.shape in [leaf.shape for leaf in jax.tree.leaves(jax.vjp(layers.matmul, x, w)[1])]

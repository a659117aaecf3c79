"""Derivatives of rows along a direction, by probes, against the product of the direction with the gradient of each row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel_jax import forward
from bilevel_jax.data import packing
from bilevel_jax.models import lora, probes
from tests.test_step import LLAMA, NEOX, jitter, make_adapter, model, rows

LAYOUT = packing.Layout(sequences=2, length=16, entries=8)
LAST = jax.tree.map(lambda leaf: leaf[1:], make_adapter(LLAMA, 2))  # of the last of two layers
CASES = {
    "llama": (LLAMA, make_adapter(LLAMA, 2)),
    "gpt_neox": (NEOX, make_adapter(NEOX, 2)),
    "recomputed": (dataclasses.replace(LLAMA, remat=True), make_adapter(LLAMA, 2)),
    "last layer": (LLAMA, LAST),
    "all weights": (LLAMA, lora.init_full(model(LLAMA)[0])),
}


def kernels_only(tree):
    """The tree with zeros in place of what is not a kernel of a layer."""

    def keep(path, leaf):
        return leaf if path[0].key == "layers" and path[-1].key == "kernel" else jnp.zeros_like(leaf)

    return jax.tree_util.tree_map_with_path(keep, tree)


@pytest.mark.parametrize("config, learned", CASES.values(), ids=CASES)
def test_derivatives_are_those_of_the_gradient_of_each_row(config, learned):
    upper, lower = rows()
    packed = packing.pack_step([*upper, *lower], 6, len(lower), LAYOUT).packed
    base, E = model(LLAMA if config.architecture == "llama" else NEOX)[0], packed.length.shape[0]
    direction = jitter(jax.tree.map(jnp.zeros_like, learned), 5, 1.0)
    directions, weight_E = probes.along(direction), jnp.linspace(0.5, 2.0, E)

    def nll(learned, probe=None):
        micro = range(int(packed.num_micro))
        return sum(forward.micro_nll_and_power(config, base, learned, packed, m, probe=probe)[0] for m in micro)

    def weighted(learned, value_E=None):
        return weight_E @ nll(learned, None if value_E is None else forward.Probe(directions, value_E))

    gradient, slope_E = jax.jit(jax.grad(weighted, argnums=(0, 1)))(learned, jnp.zeros(E))
    by_row = jax.jit(jax.jacrev(nll))(learned)
    measured = kernels_only(direction) if lora.is_full(learned) else direction
    expected_E = sum(
        np.tensordot(rows_ExP, leaf, leaf.ndim) for rows_ExP, leaf in zip(jax.tree.leaves(by_row), jax.tree.leaves(measured))
    ) / optax.tree.norm(measured)
    np.testing.assert_allclose(slope_E / weight_E, expected_E, rtol=1e-4, atol=1e-4 * np.abs(expected_E).max())
    assert np.ptp(expected_E[: len(upper) + len(lower)]) > 0.01
    plain = jax.jit(jax.grad(weighted))(learned)  # probes change nothing else
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5), gradient, plain)

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

LAYOUT = packing.Layout(sequences=5, length=16, entries=8)  # one micro-batch: the step adds up several
LAST = jax.tree.map(lambda leaf: leaf[1:], make_adapter(LLAMA, 2))  # of the last of two layers
CASES = {
    "llama": (LLAMA, make_adapter(LLAMA, 2)),
    "gpt_neox": (NEOX, make_adapter(NEOX, 2)),
    "recomputed": (dataclasses.replace(LLAMA, remat=True), make_adapter(LLAMA, 2)),
    "last layer": (LLAMA, LAST),
    "all weights": (LLAMA, lora.init_full(model(LLAMA)[0])),
}

LONG = ("recomputed", "last layer")


def norm_of_measured(learned, direction) -> float:
    """The length of the part of a direction that probes measure: of all weights only the kernels of layers."""

    def keep(path, leaf):
        measured = not lora.is_full(learned) or (path[0].key == "layers" and path[-1].key == "kernel")
        return leaf if measured else jnp.zeros_like(leaf)

    return float(optax.tree.norm(jax.tree_util.tree_map_with_path(keep, direction)))


@pytest.mark.parametrize(
    "config, learned",
    [pytest.param(*case, marks=pytest.mark.long if name in LONG else ()) for name, case in CASES.items()],
    ids=CASES,
)
def test_derivatives_are_those_of_the_gradient_of_each_row(config, learned):
    upper, lower = rows()
    packed = packing.pack_step([*upper, *lower], 6, len(lower), LAYOUT).packed
    base, E = model(LLAMA if config.architecture == "llama" else NEOX)[0], packed.length.shape[0]
    direction = jitter(jax.tree.map(jnp.zeros_like, learned), 5, 1.0)
    directions, weight_E = probes.along(direction), jnp.linspace(0.5, 2.0, E)

    assert packed.num_micro == 1

    def weighted(learned, weight_E, values=None):
        probe = None if values is None else forward.Probe(directions, values)
        return weight_E @ forward.micro_nll_and_power(config, base, learned, packed, 0, probe=probe)[0]

    gradient, slopes = jax.jit(jax.grad(weighted, argnums=(0, 2)))(learned, weight_E, probes.zeros(directions, E))
    plain = jax.jit(jax.grad(weighted))
    by_row = jax.tree.map(lambda *of_rows: np.stack(of_rows), *(plain(learned, row_E) for row_E in jnp.eye(E)))
    length = norm_of_measured(learned, direction)
    for module, projections in directions.items():
        for name, leaves in projections.items():
            expected_NxE = sum(
                np.einsum("enio,nio->ne", by_row["layers"][module][name][key], direction["layers"][module][name][key])
                for key in leaves
            )
            measured_NxE = slopes[module][name] / weight_E * length
            np.testing.assert_allclose(measured_NxE, expected_NxE, rtol=1e-4, atol=1e-4 * np.abs(expected_NxE).max())
            assert np.ptp(expected_NxE[:, : len(upper) + len(lower)]) > 0.01
    without = plain(learned, weight_E)  # probes change nothing else
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5), gradient, without)

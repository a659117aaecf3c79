"""Derivatives of the losses of single rows along a direction, from the backward pass that the gradient takes anyway.

A probe is an input of a projection, one number for each token. It changes nothing in the forward pass, and the number is 0: only
its derivative is of interest. With g_t the derivative of the loss in the output of a projection y = x W + x A B at token t, that of
the token's probe is the inner product of what the token adds to the gradient of A and B with a direction (A', B'):

    g_t · (x_t A' B + x_t A B') = (g_t Bᵀ) · (x_t A') + (g_t B'ᵀ) · (x_t A)                  (P1)

All products have the rank of the adapter, so they cost about as much as its forward pass. Where all weights are learned, it is
g_t · (x_t W'), and costs as much as the forward pass of the projection.

Tokens of different rows do not attend to each other. So the sum over the tokens of a row is the inner product of the gradient of
the row's loss in A and B with the direction, although no gradient of a single row is computed. (The ghost dot-product of Wang et
al. 2024, "Data Shapley in One Training Run", with a direction in place of a second batch.)

Axes: r is the rank of the adapter; see `bilevel_jax` for the others.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def _dot(x, y, y_axis: int) -> jax.Array:
    """x y, or x yᵀ with `y_axis=1`; x is rounded to the dtype of y."""
    dimensions = (((1,), (y_axis,)), ((), ()))
    return jax.lax.dot_general(x.astype(y.dtype), y, dimensions, preferred_element_type=x.dtype)


def _by_token(x_TxC, y_TxC) -> jax.Array:
    """The inner product of each row, [T] float32."""
    return jnp.sum(x_TxC.astype(jnp.float32) * y_TxC.astype(jnp.float32), axis=-1)


@jax.custom_vjp
def of_adapter(update_TxO, probe_T, x_TxI, reduced_Txr, b_rxO, direction_a_Ixr, direction_b_rxO) -> jax.Array:
    """`update_TxO`, which is x A B. The derivative in `probe_T` is (P1).

    Args:
      x_TxI, reduced_Txr, b_rxO: x, x A and B.
      direction_a_Ixr, direction_b_rxO: A' and B'.
    """
    return update_TxO


def _of_adapter_backward(factors, d_TxO):
    x, reduced, b, direction_a, direction_b = factors
    slope_T = _by_token(_dot(d_TxO, b, 1), _dot(x, direction_a, 0)) + _by_token(_dot(d_TxO, direction_b, 1), reduced)
    return d_TxO, slope_T, None, None, None, None, None


of_adapter.defvjp(lambda update, probe, *factors: (update, factors), _of_adapter_backward)


@jax.custom_vjp
def of_weights(y_TxO, probe_T, x_TxI, direction_IxO) -> jax.Array:
    """`y_TxO`, which is x W + b. The derivative in `probe_T` is g · (x W')."""
    return y_TxO


def _of_weights_backward(factors, d_TxO):
    x, direction = factors
    return d_TxO, _by_token(d_TxO, _dot(x, direction, 0)), None, None


of_weights.defvjp(lambda y, probe, *factors: (y, factors), _of_weights_backward)


# --------------------------------------------------------------------------------------------------------------------
# All projections
# --------------------------------------------------------------------------------------------------------------------


def along(direction) -> dict:
    """The part of a direction that probes measure, scaled to length 1: A and B of an adapter or, with `lora.rank=0`, the kernels.

    `direction` is a tree like the learned parameters, see `lora`.
    """
    layers: dict[str, Any] = {}
    for module, weights in direction["layers"].items():
        for name, leaves in weights.items():
            if isinstance(leaves, dict) and ("a" in leaves or "kernel" in leaves):
                kept = {"a": leaves["a"], "b": leaves["b"]} if "a" in leaves else {"kernel": leaves["kernel"]}
                layers.setdefault(module, {})[name] = kept
    length = optax.tree.norm(layers)
    return jax.tree.map(lambda leaf: leaf / jnp.maximum(length, jnp.finfo(jnp.float32).tiny), layers)


def zeros(directions: dict, num_entries: int) -> dict:
    """Probes for E entries: module -> name -> zeros [Y, E] float32."""

    def of_projection(leaves):
        return jnp.zeros((jax.tree.leaves(leaves)[0].shape[0], num_entries))

    return {module: {name: of_projection(leaves) for name, leaves in weights.items()} for module, weights in directions.items()}


def attach(adapter, directions: dict, probes: dict) -> dict:
    """The collection `adapter` of a forward pass with probes.

    Args:
      adapter: that of a forward pass without; None where all weights are learned.
      directions: from `along`.
      probes: of the tokens, module -> name -> [Y, T].
    """
    layers: dict[str, dict[str, dict]] = {}
    for module, weights in directions.items():
        layers[module] = {}
        for name, leaves in weights.items():
            low_rank = {} if adapter is None else adapter["layers"][module][name]
            measuring = {f"direction_{key}": leaf for key, leaf in leaves.items()} | {"probe": probes[module][name]}
            layers[module][name] = low_rank | measuring
    return {"layers": layers}

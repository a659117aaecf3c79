"""Some consecutive layers of a stack, run by index: the others are not computed, and no part of the stack is copied.

An adapter of K layers belongs to the last K (`lora.layers=last:K`). The layers below have no adapter and need no gradient, so
that the two parts are two loops. Each takes the weights of a layer out of the whole stack at an index; loops over slices of the
stack would hold these slices beside it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def num_adapted(adapter) -> int:
    """The number of layers that an adapter has, which are the last ones; 0 without an adapter."""
    if adapter is None or "layers" not in adapter:
        return 0
    layers = adapter["layers"]
    return len(layers) if isinstance(layers, list) else jax.tree.leaves(layers)[0].shape[0]


def scan(layer: Callable, stack, x: jax.Array, layers: range, adapter=None, key=None, settings=None, remat: Callable = lambda f: f):
    """Runs consecutive layers.

    Args:
      layer: `(weights, adapter, x, settings, key) -> (x, output)` of one layer; adapter and key may be None.
      stack: weights of all layers.
      x: what enters the first of `layers`.
      layers: their indices.
      adapter: stacked, of these layers only.
      key: from which each layer gets its own.
      settings: arrays over all layers.
      remat: applied to the function of a layer, `jax.checkpoint` with its options where a gradient is taken.

    Returns:
      x after the last of them, and their outputs, stacked.
    """
    keys = None if key is None else jax.random.split(key, len(layers))
    of_layers = {name: values[layers.start : layers.stop] for name, values in (settings or {}).items()}

    @remat
    def run(x, stack, i, adapter, settings, key):
        # Inside of what is recomputed: the weights of a layer are not kept for the backward pass.
        weights = jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, i, keepdims=False), stack)
        return layer(weights, adapter, x, settings, key)

    def body(x, inputs):
        return run(x, stack, *inputs)

    return jax.lax.scan(body, x, (jnp.arange(layers.start, layers.stop), adapter, of_layers, keys))

"""Decoding with a cache of keys and values, one token of each row at a time.

Axes: S sequences, L positions, D hidden, K key/value heads, C head width; B blocks of W positions in a cache.
"""

from typing import Any

import jax
import jax.numpy as jnp

from bilevel_jax.models import attention, layer_range, layer_settings
from bilevel_jax.models.decoder import Decoder
from bilevel_jax.models.layers import Layer, embed, norm, scaled
from bilevel_jax.models.model_config import ModelConfig


def split_layers(tree):
    """Base or adapter with a list of layers instead of the stack."""
    number = jax.tree.leaves(tree["layers"])[0].shape[0]
    return tree | {"layers": [jax.tree.map(lambda stack, i=i: stack[i], tree["layers"]) for i in range(number)]}


def init_cache(config: ModelConfig, sequences: int, length: int) -> list:
    """Zero keys [S, K, B, C, W] and values [S, K, B, W, C] of each layer, with room for `length` positions."""
    zeros = jnp.zeros((sequences, config.num_kv_heads, attention.cache_window(length), config.head_dim), config.dtype)
    layers = (attention.in_blocks(zeros, zeros) for _ in range(config.num_layers))
    return [{config.record.attention: {"key": key, "value": value}} for key, value in layers]


def prefill(config: ModelConfig, params, adapter, tokens_SxL: jax.Array) -> list:
    """The first ⌈L / W⌉ blocks of the arrays of `init_cache`, for L tokens of each row.

    Padding beyond the prompt of a row fills positions that `decode` overwrites before it reads them.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens_SxL.shape[1]), tokens_SxL.shape)
    variables = {"params": params} | ({"adapter": adapter} if adapter is not None else {})
    _, state = Decoder(config).apply(variables, tokens_SxL, positions, jnp.ones_like(tokens_SxL), mutable=["prefilled"])
    stacked = state["prefilled"]["layers"][config.record.attention]
    keys, values = (stacked[name].swapaxes(2, 3).astype(config.dtype) for name in ("key", "value"))  # [layers, S, K, L, C]
    layers = (attention.in_blocks(keys[i], values[i]) for i in range(config.num_layers))
    return [{config.record.attention: {"key": key, "value": value}} for key, value in layers]


def _layer(layers, i: int, zero: jax.Array):
    """Layer i of a list, or of a stack.

    Decoding is a loop, and a slice at a fixed index is the same in each turn: XLA would take the slices of all layers before the
    loop, which are a copy of all weights. So the index contains a `zero` that XLA cannot know before the layer below is computed.
    """
    if isinstance(layers, list):
        return layers[i]
    return jax.tree.map(lambda stack: jax.lax.dynamic_index_in_dim(stack, i + zero, keepdims=False), layers)


def decode(config: ModelConfig, params, adapter, cache: list, token_S: jax.Array, position_S: jax.Array):
    """Decodes one token per row.

    Args:
      params, adapter: stacked, or by layer from `split_layers`; `adapter` may be None.
      cache: from `init_cache`, filled at all positions before `position_S`.
      position_S: the position of each token in its row.

    Returns:
      The final hidden states [S, D], and the cache with the keys and values of these tokens.
    """
    x_SxD = embed(config, params["embed_tokens"], token_S)
    table, new_cache = layer_settings.rotary_table(position_S[:, None], config), []
    *_, num_blocks, size, _ = cache[0][config.record.attention]["value"].shape
    settings = layer_settings.settings(config, num_blocks * size)
    first = config.num_layers - layer_range.num_adapted(adapter)
    for i in range(config.num_layers):
        zero, _ = jax.lax.optimization_barrier((jnp.int32(0), x_SxD))
        variables = {"params": _layer(params["layers"], i, zero), "cache": cache[i]}
        variables |= {"adapter": _layer(adapter["layers"], i - first, zero)} if adapter is not None and i >= first else {}
        of_layer = {name: values[i] for name, values in settings.items()}
        (x_SxD, _), state = Layer(config).apply(variables, x_SxD, table, None, of_layer, position_S, mutable=["cache"])
        new_cache.append(state["cache"])
    hidden_SxD: Any = norm(config, None).apply({"params": params["norm"]}, x_SxD)
    return scaled(hidden_SxD, 1 / config.logit_divisor), new_cache

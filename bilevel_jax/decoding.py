"""Decoding of S slots on the device: the state of responses in progress, and the functions that fill and advance it."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax import sharding, token_choice
from bilevel_jax.models import decoder, kv_cache, lora, model_config

SHORTEST_WINDOW = 256  # decoding windows of the cache are this times a power of 2
LEEWAY = 32  # minimum number of tokens that fit into a window after the longest response


class Slots(NamedTuple):
    """The device state of S responses in progress, each of at most X tokens."""

    cache: list  # see `models.kv_cache.init_cache`
    token: jax.Array  # [S] int32, the latest token, not in the cache yet
    position: jax.Array  # [S] int32, its position; 0 while the slot is free
    key: jax.Array  # [S, 2] uint32
    count: jax.Array  # type: ignore[assignment]  # [S] int32, number of generated tokens, in place of `tuple.count`
    limit: jax.Array  # [S] int32, maximum of `count`
    active: jax.Array  # [S] bool
    tokens: jax.Array  # [S, X] int32, generated tokens, the EOS included
    log_probs: jax.Array  # [S, X] float32
    sampled_log_probs: jax.Array  # [S, X] float32


class Starts(NamedTuple):
    """Up to S responses to start; only the first `number` entries of each array are valid."""

    number: np.int32
    prefill_row: np.ndarray  # [S] int32, row of the prefill batch
    slot: np.ndarray  # [S] int32, S for none
    token: np.ndarray  # [S] int32, the last token of the prompt
    position: np.ndarray  # [S] int32, its position
    key: np.ndarray  # [S, 2] uint32
    limit: np.ndarray  # [S] int32


def init_slots(model: model_config.ModelConfig, num_slots: int, length: int, max_new_tokens: int) -> Slots:
    """Slots that are all free."""
    int_S = functools.partial(jnp.zeros, num_slots, jnp.int32)
    float_SxX = functools.partial(jnp.zeros, (num_slots, max_new_tokens), jnp.float32)
    return Slots(
        cache=kv_cache.init_cache(model, num_slots, length),
        token=int_S(),
        position=int_S(),
        key=jnp.zeros((num_slots, 2), jnp.uint32),
        count=int_S(),
        limit=int_S(),
        active=jnp.zeros(num_slots, bool),
        tokens=jnp.zeros((num_slots, max_new_tokens), jnp.int32),
        log_probs=float_SxX(),
        sampled_log_probs=float_SxX(),
    )


def slot_shardings(mesh, slots: Slots) -> Slots:
    """The sharding of each array: slots over `data` and `fsdp`, the heads of the cache over `tensor`."""
    return sharding.shardings(mesh, slots, "rows")._replace(cache=sharding.shardings(mesh, slots.cache, "rows", "heads"))


def prefill(model: model_config.ModelConfig, base, adapter, tokens_SxL: jax.Array) -> list:
    """`models.kv_cache.prefill` with the weights in use."""
    return kv_cache.prefill(model, *lora.in_use(model, base, adapter), tokens_SxL)


def fill(slots: Slots, prefilled: list, starts: Starts) -> Slots:
    """Starts responses in free slots, from rows of a prefill batch."""

    def copy_row(i, caches):
        def copy(cache, prefix):
            row = jax.lax.dynamic_index_in_dim(prefix, starts.prefill_row[i])
            return jax.lax.dynamic_update_slice(cache, row, (starts.slot[i], 0, 0, 0, 0))

        return jax.tree.map(copy, caches, prefilled)

    def put(old, new):
        return old.at[starts.slot].set(new, mode="drop")

    return slots._replace(
        cache=jax.lax.fori_loop(0, starts.number, copy_row, slots.cache),
        token=put(slots.token, starts.token),
        position=put(slots.position, starts.position),
        key=put(slots.key, starts.key),
        count=put(slots.count, 0),
        limit=put(slots.limit, starts.limit),
        active=put(slots.active, True),
    )


def _uniform(key: jax.Array, count: jax.Array) -> jax.Array:
    return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), count))


def advance(
    model: model_config.ModelConfig, settings: token_choice.Settings, eos: tuple[int, ...], params, adapter, slots: Slots
) -> Slots:
    """Generates one token for every active slot."""
    hidden, cache = kv_cache.decode(model, params, adapter, slots.cache, slots.token, slots.position)
    logits = sharding.constrain(decoder.project(hidden, decoder.head(params), model.logit_cap), "rows")
    chosen, log_prob, sampled_log_prob = token_choice.choose(settings, logits, jax.vmap(_uniform)(slots.key, slots.count))
    token = chosen.astype(jnp.int32)
    index = jnp.arange(token.shape[0]), jnp.where(slots.active, slots.count, slots.tokens.shape[1])
    count = slots.count + slots.active
    ended = jnp.isin(token, jnp.array(eos, jnp.int32)) | (count == slots.limit)
    active = slots.active & ~ended
    return slots._replace(
        cache=cache,
        token=token,
        position=jnp.where(active, slots.position + 1, 0),  # 0: free slots do not lengthen the attention of the others
        count=count,
        active=active,
        tokens=slots.tokens.at[index].set(token, mode="drop"),
        log_probs=slots.log_probs.at[index].set(log_prob, mode="drop"),
        sampled_log_probs=slots.sampled_log_probs.at[index].set(sampled_log_prob, mode="drop"),
    )


def decode_steps(
    model: model_config.ModelConfig,
    settings: token_choice.Settings,
    eos: tuple[int, ...],
    num_blocks: int,
    params,
    adapter,
    slots: Slots,
    min_free: jax.Array,
    steps: jax.Array,
) -> Slots:
    """Decodes until `min_free` slots are free, or for `steps` tokens, within the first `num_blocks` blocks of the cache."""

    def unfinished(carry):
        done, slots = carry
        return (done < steps) & (jnp.sum(~slots.active) < min_free)

    def body(carry):
        return carry[0] + 1, advance(model, settings, eos, params, adapter, carry[1])

    def put_back(cache, window):
        # XLA does not see that a scatter replaces the whole cache, and would hold both.
        return window if window.shape == cache.shape else jax.lax.dynamic_update_slice(cache, window, (0,) * cache.ndim)

    window = jax.tree.map(lambda cache: cache[:, :, :num_blocks], slots.cache)
    after = jax.lax.while_loop(unfinished, body, (0, slots._replace(cache=window)))[1]
    return after._replace(cache=jax.tree.map(put_back, slots.cache, after.cache))


def window_sizes(cache_length: int) -> list[int]:
    """All numbers of cache positions to decode in, ascending; the last is the whole cache. They are few: each one is compiled."""
    sizes = [SHORTEST_WINDOW]
    while sizes[-1] < cache_length:
        sizes.append(2 * sizes[-1])
    return [*sizes[:-1], cache_length]


def window_size(longest: int, cache_length: int) -> int:
    """Number of cache positions to decode in, if the longest response in progress has reached position `longest`.

    It is not much larger than needed, since every token reads all of them.
    """
    return next((size for size in window_sizes(cache_length) if size >= longest + LEEWAY), cache_length)


def merges_adapter(model: model_config.ModelConfig) -> bool:
    """Whether decoding reads a copy of the weights, by layer and with the adapter merged into it.

    This is faster, and exact enough in float32. In half precision, rounding W + ΔW would lose small updates, so the adapter stays
    separate and there is no copy: decoding reads the arrays of the training step. So it does where they are quantised.
    """
    return model.dtype == "float32" and model.quantization == "none"


def make_weights(model: model_config.ModelConfig, mesh: jax.sharding.Mesh) -> Callable:
    """Builds `(base, adapter) -> (params, adapter)`, the weights for `models.kv_cache.decode`.

    They are a copy only where adapters are merged into it, or where all weights are learned, in float32, and must be rounded.
    """

    @jax.jit
    def merged(base, adapter):
        base = kv_cache.split_layers(lora.merge_adapter(model, base, adapter))
        return jax.lax.with_sharding_constraint(base, sharding.weight_shardings(mesh, base))

    @jax.jit
    def rounded(adapter):
        return lora.in_use(model, None, adapter)[0]

    def weights(base, adapter):
        if merges_adapter(model):
            return merged(base, adapter), None
        return (rounded(adapter), None) if lora.is_full(adapter) else (base, adapter)

    return weights

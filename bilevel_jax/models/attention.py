"""Attention within packed sequences, and of one new token per row to a cache.

Axes: S sequences, L positions, H query heads, K key/value heads, R = H / K query heads per key head, C head width. Packed
sequences: a block of Q queries attends to the U positions up to its end. Cache: B blocks of W positions.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

SAVED = "saved"
save = functools.partial(checkpoint_name, name=SAVED)  # marks arrays that the backward pass reads instead of recomputing

# --------------------------------------------------------------------------------------------------------------------
# Packed sequences
# --------------------------------------------------------------------------------------------------------------------

QUERY_BLOCKS = 4  # n blocks compute (n + 1) / 2n of the L² scores, and hold 1/n of them at a time


def _blocks(length: int) -> list[tuple[int, int]]:
    """The first position and the end of each block of queries."""
    size = -(-length // QUERY_BLOCKS)
    return [(first, min(first + size, length)) for first in range(0, length, size)]


def _by_key(x_SxQxHxC: jax.Array, key_heads: int) -> jax.Array:
    """[S, K, R·Q, C]: the queries of one key head side by side, in the order in which the products read them."""
    S, Q, H, C = x_SxQxHxC.shape
    return x_SxQxHxC.reshape(S, Q, key_heads, H // key_heads, C).transpose(0, 2, 3, 1, 4).reshape(S, key_heads, -1, C)


def _by_position(x_SxKxRQxC: jax.Array, positions: int) -> jax.Array:
    """The inverse of `_by_key`: [S, Q, H, C]."""
    S, K, _, C = x_SxKxRQxC.shape
    return x_SxKxRQxC.reshape(S, K, -1, positions, C).transpose(0, 3, 1, 2, 4).reshape(S, positions, -1, C)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """cap · tanh(x / cap), within ±cap; x itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def _scores(q_SxKxRQxC, k_SxKxUxC, segments_SxU, first: int, window=None, cap: float | None = None) -> jax.Array:
    """q · k, capped, float32 [S, K, R·Q, U]; -∞ if the key is in another segment, later, or `window` or more positions back."""
    scores = jnp.einsum("skqc,skuc->skqu", q_SxKxRQxC, k_SxKxUxC, preferred_element_type=jnp.float32)
    scores = soft_cap(scores, cap)
    S, K, _, U = scores.shape
    visible = (segments_SxU[:, first:, None] == segments_SxU[:, None]) & (jnp.arange(U) <= jnp.arange(first, U)[:, None])
    if window is not None:
        visible &= jnp.arange(U) > jnp.arange(first, U)[:, None] - window
    return jnp.where(visible[:, None, None], scores.reshape(S, K, -1, U - first, U), -jnp.inf).reshape(scores.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 6))
def attend(
    q_SxLxHxC: jax.Array,
    k_SxLxKxC: jax.Array,
    v_SxLxKxC: jax.Array,
    segments_SxL: jax.Array,
    dtype=None,
    window: jax.Array | None = None,
    cap: float | None = None,
) -> jax.Array:
    """softmax(cap(q · k / √C)) v over the positions of the query's segment up to the query itself.

    The backward pass saves nothing of size L². It recomputes the scores s, one block of queries at a time (Dao et al. 2022). For
    each query, with e = exp(s - max s), z = Σ e and D = Σ_c do · o:

        dv = eᵀ (do / z),  ds = e ((do / z) vᵀ - D / z),  dq = ds k / √C,  dk = dsᵀ q / √C

    With a cap, ds also has the factor 1 - (s / cap)².

    Args:
      q_SxLxHxC, k_SxLxKxC, v_SxLxKxC: queries, keys and values; query head h uses key head h // R.
      segments_SxL: segment of each position. Positions of different segments do not attend to each other.
      dtype: to which the factors of all products are rounded; by default that of q.
      window: int32 scalar; a query sees the last `window` of these positions, itself included. None: all.
      cap: soft cap of the scores, see `soft_cap`.

    Returns:
      [S, L, H, C], in the dtype of q.
    """
    return _attend(q_SxLxHxC, k_SxLxKxC, v_SxLxKxC, segments_SxL, dtype, window, cap)[0]


def _factors(q, k, v, dtype):
    """The factors of the products, rounded: q / √C by position, k and v by key."""
    q = q.astype(jnp.float32) * q.shape[-1] ** -0.5
    return q.astype(dtype), *(_by_key(x.astype(dtype), x.shape[2]) for x in (k, v))


def _attend(q, k, v, segments, dtype, window, cap):
    key_heads = k.shape[2]
    scaled, k_SxKxLxC, v_SxKxLxC = _factors(q, k, v, dtype or q.dtype)
    outputs, maxima, totals = [], [], []
    for first, end in _blocks(q.shape[1]):
        queries, keys = _by_key(scaled[:, first:end], key_heads), k_SxKxLxC[:, :, :end]
        scores = _scores(queries, keys, segments[:, :end], first, window, cap)
        max_score = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - max_score)
        total = weights.sum(axis=-1, keepdims=True)
        values = v_SxKxLxC[:, :, :end]
        weighted_sum = jnp.einsum("skqu,skuc->skqc", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        outputs.append(_by_position(weighted_sum / total, end - first))
        maxima.append(max_score)
        totals.append(total)
    output, maxima, totals = save((jnp.concatenate(outputs, axis=1).astype(q.dtype), maxima, totals))
    return output, (q, k, v, segments, window, output, maxima, totals)


def _attend_backward(dtype, cap, residuals, d_output):
    q, k, v, segments, window, output, maxima, totals = residuals
    key_heads, dtype = k.shape[2], dtype or q.dtype
    scaled, k_SxKxLxC, v_SxKxLxC = _factors(q, k, v, dtype)
    d_output = d_output.astype(jnp.float32)
    inner = jnp.sum(d_output * output, axis=-1, keepdims=True)  # D
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    dq = []
    dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (k_SxKxLxC, v_SxKxLxC))
    for (first, end), max_score, total in zip(_blocks(q.shape[1]), maxima, totals):
        queries, d, inner_block = (_by_key(x[:, first:end], key_heads) for x in (scaled, d_output, inner))
        keys, values = (x[:, :, :end] for x in (k_SxKxLxC, v_SxKxLxC))
        scores = _scores(queries, keys, segments[:, :end], first, window, cap)
        weights = jnp.exp(scores - max_score)
        d = (d / total).astype(dtype)
        d_scores = weights * (product("skqc,skuc->skqu", d, values) - inner_block / total)
        if cap is not None:
            d_scores *= 1 - jnp.square(jnp.maximum(scores / cap, -1))  # a hidden score is -∞, its weight 0
        d_scores = d_scores.astype(dtype)
        dq.append(_by_position(product("skqu,skuc->skqc", d_scores, keys), end - first))
        dk = dk.at[:, :, :end].add(product("skqu,skqc->skuc", d_scores, queries))
        dv = dv.at[:, :, :end].add(product("skqu,skqc->skuc", weights.astype(dtype), d))
    dq = jnp.concatenate(dq, axis=1) * q.shape[-1] ** -0.5
    dk, dv = (_by_position(x, q.shape[1]) for x in (dk, dv))
    return *(d.astype(x.dtype) for d, x in zip((dq, dk, dv), (q, k, v))), None, None


attend.defvjp(_attend, _attend_backward)


def attend_plain(q_SxLxHxC, k_SxLxKxC, v_SxLxKxC, segments_SxL, dtype=None, window=None, cap=None) -> jax.Array:
    """`attend`, with derivatives of every order and in both modes, at the price of memory of size L² in the backward pass."""
    key_heads, L = k_SxLxKxC.shape[2], q_SxLxHxC.shape[1]
    scaled, k_SxKxLxC, v_SxKxLxC = _factors(q_SxLxHxC, k_SxLxKxC, v_SxLxKxC, dtype or q_SxLxHxC.dtype)
    outputs = []
    for first, end in _blocks(L):
        queries = _by_key(scaled[:, first:end], key_heads)
        weights = jax.nn.softmax(_scores(queries, k_SxKxLxC[:, :, :end], segments_SxL[:, :end], first, window, cap))
        values = v_SxKxLxC[:, :, :end]
        output = jnp.einsum("skqu,skuc->skqc", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        outputs.append(_by_position(output, end - first))
    return jnp.concatenate(outputs, axis=1).astype(q_SxLxHxC.dtype)


# --------------------------------------------------------------------------------------------------------------------
# Cache
# --------------------------------------------------------------------------------------------------------------------


CACHE_BLOCK = 64  # W


def cache_window(length: int) -> int:
    """The capacity B·W of a cache for `length` positions."""
    return -(-length // CACHE_BLOCK) * CACHE_BLOCK


def in_blocks(key_SxKxLxC: jax.Array, value_SxKxLxC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys [S, K, B, C, W] and values [S, K, B, W, C], padded with zeros. The products of one query read them in this order."""
    S, K, L, C = key_SxKxLxC.shape
    padding = (0, 0), (0, 0), (0, -L % CACHE_BLOCK), (0, 0)
    key, value = (jnp.pad(x, padding).reshape(S, K, -1, CACHE_BLOCK, C) for x in (key_SxKxLxC, value_SxKxLxC))
    return key.swapaxes(3, 4), value


def append(cache: dict[str, jax.Array], key_SxKxC: jax.Array, value_SxKxC: jax.Array, position_S: jax.Array) -> dict:
    """Writes the new key and value of each row into the cache of one layer, at the position of the row."""
    S, K, _ = key_SxKxC.shape
    row, head = jnp.arange(S)[:, None], jnp.arange(K)
    block, offset = position_S[:, None] // CACHE_BLOCK, position_S[:, None] % CACHE_BLOCK
    return {
        "key": cache["key"].at[row, head, block, :, offset].set(key_SxKxC.astype(cache["key"].dtype)),
        "value": cache["value"].at[row, head, block, offset].set(value_SxKxC.astype(cache["value"].dtype)),
    }


def attend_cached(
    q_SxHxC: jax.Array,
    key_SxKxBxCxW: jax.Array,
    value_SxKxBxWxC: jax.Array,
    position_S: jax.Array,
    window: jax.Array | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Attention of one query per row to the cache positions 0 ... position_S, [S, H, C]. `window` and `cap` are as in `attend`.

    Blocks are summed in order, and a block after the position of a row adds exact zeros. So the result does not depend on B.
    """
    S, K, B, C, W = key_SxKxBxCxW.shape
    q_SxKxBxRxC = jnp.broadcast_to(q_SxHxC.reshape(S, K, 1, -1, C), (S, K, B, q_SxHxC.shape[1] // K, C))  # R queries per key head
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = product("skbrc,skbcp->skbrp", q_SxKxBxRxC.astype(key_SxKxBxCxW.dtype), key_SxKxBxCxW) / C**0.5
    cached, position = jnp.arange(B * W).reshape(B, 1, W), position_S[:, None, None, None, None]
    visible = cached <= position if window is None else (cached <= position) & (cached > position - window)
    scores = jnp.where(visible, soft_cap(scores, cap), -jnp.inf)
    weights = jnp.exp(scores - scores.max(axis=(2, 4), keepdims=True))
    parts = product("skbrp,skbpc->skbrc", weights.astype(value_SxKxBxWxC.dtype), value_SxKxBxWxC), weights.sum(axis=-1)
    weighted_sum, total = (functools.reduce(jnp.add, (part[:, :, b] for b in range(B))) for part in parts)
    return (weighted_sum / total[..., None]).reshape(q_SxHxC.shape).astype(q_SxHxC.dtype)

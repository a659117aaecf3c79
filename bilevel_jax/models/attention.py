"""Attention: of all positions of packed sequences to each other, and of one new token to a cache.

Axes: S sequences, L positions, H query heads, K key/value heads, R = H / K queries that share a key, C head width. In a packed
batch, Q positions of a block look at the U positions up to its end. In a cache, B blocks of P positions.
"""

import functools

import jax
import jax.numpy as jnp

# --------------------------------------------------------------------------------------------------------------------
# Packed sequences
# --------------------------------------------------------------------------------------------------------------------

QUERY_BLOCKS = 4  # n blocks compute (n + 1) / 2n of all L² scores, and hold 1/n of them at a time


def _blocks(length: int) -> list[tuple[int, int]]:
    """First position of each block of queries, and its end."""
    size = -(-length // QUERY_BLOCKS)
    return [(first, min(first + size, length)) for first in range(0, length, size)]


def _scores(q_SxQxKxRxC, k_SxUxKxC, segments_SxU, first: int) -> jax.Array:
    """q · k / √C, float32 [S, K, R, Q, U]; -∞ where key and query are of different segments, or the key is later."""
    queries = q_SxQxKxRxC.shape[1]
    scores = jnp.einsum("sqkrc,sukc->skrqu", q_SxQxKxRxC, k_SxUxKxC, preferred_element_type=jnp.float32)
    earlier = jnp.arange(segments_SxU.shape[1]) <= first + jnp.arange(queries)[:, None]
    same = segments_SxU[:, first:, None] == segments_SxU[:, None, :]
    return jnp.where((same & earlier)[:, None, None], scores / q_SxQxKxRxC.shape[-1] ** 0.5, -jnp.inf)


def _by_key(x_SxLxHxC, key_heads: int) -> jax.Array:
    S, L, H, C = x_SxLxHxC.shape
    return x_SxLxHxC.reshape(S, L, key_heads, H // key_heads, C)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(q_SxLxHxC: jax.Array, k_SxLxKxC: jax.Array, v_SxLxKxC: jax.Array, segments_SxL: jax.Array, dtype=None) -> jax.Array:
    """softmax(q · k / √C) v over the positions of a query's own segment up to itself, [S, L, H, C] in q's dtype. The factors of
    all products are rounded to `dtype`, q's by default.

    Rows packed side by side never see each other. Nothing of size L² is kept for the backward pass: it takes the scores s anew (Dao
    et al. 2022), a block of queries at a time. With e = exp(s - max s), z = Σ e, both of a query, and D = Σ_c do · o:

        dv = eᵀ (do / z),  ds = e ((do / z) vᵀ - D / z),  dq = ds k / √C,  dk = dsᵀ q / √C
    """
    return _attend(q_SxLxHxC, k_SxLxKxC, v_SxLxKxC, segments_SxL, dtype)[0]


def _attend(*given):
    *_, segments, dtype = given
    q, k, v = (x.astype(dtype or x.dtype) for x in given[:3])
    q_by_key, outputs, maxima, totals = _by_key(q, k.shape[2]), [], [], []
    for first, end in _blocks(q.shape[1]):
        scores = _scores(q_by_key[:, first:end], k[:, :end], segments[:, :end], first)
        most = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - most)
        total = weights.sum(axis=-1, keepdims=True)
        mixed = jnp.einsum("skrqu,sukc->sqkrc", weights.astype(v.dtype), v[:, :end], preferred_element_type=jnp.float32)
        outputs.append(mixed / jnp.moveaxis(total, 3, 1))
        maxima.append(most)
        totals.append(total)
    output = jnp.concatenate(outputs, axis=1).reshape(q.shape).astype(given[0].dtype)
    return output, (*given[:4], output, *(jnp.concatenate(parts, axis=3) for parts in (maxima, totals)))


def _attend_backward(dtype, kept, d_output):
    *given, segments, output, most_SxKxRxLx1, total_SxKxRxLx1 = kept
    q, k, v = (x.astype(dtype or x.dtype) for x in given)
    key_heads, scale = k.shape[2], q.shape[-1] ** -0.5
    d_output = _by_key(d_output.astype(jnp.float32), key_heads) / jnp.moveaxis(total_SxKxRxLx1, 3, 1)
    drop = jnp.sum(d_output * _by_key(output, key_heads), axis=-1, keepdims=True)
    drop = jnp.moveaxis(drop, 1, 3)  # [S, K, R, L, 1]
    q_by_key, d_by_key = _by_key(q, key_heads), d_output.astype(q.dtype)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for first, end in _blocks(q.shape[1]):
        here, seen = slice(first, end), slice(end)
        scores = _scores(q_by_key[:, here], k[:, seen], segments[:, seen], first)
        weights = jnp.exp(scores - most_SxKxRxLx1[:, :, :, here])
        d_weights = product("sqkrc,sukc->skrqu", d_by_key[:, here], v[:, seen])
        d_scores = (weights * (d_weights - drop[:, :, :, here])).astype(q.dtype)
        dq.append(product("skrqu,sukc->sqkrc", d_scores, k[:, seen]))
        dk = dk.at[:, seen].add(product("skrqu,sqkrc->sukc", d_scores, q_by_key[:, here]))
        dv = dv.at[:, seen].add(product("skrqu,sqkrc->sukc", weights.astype(v.dtype), d_by_key[:, here]))
    dq = jnp.concatenate(dq, axis=1).reshape(q.shape)
    return *(d.astype(x.dtype) for d, x in zip((scale * dq, scale * dk, dv), given)), None


attend.defvjp(_attend, _attend_backward)


# --------------------------------------------------------------------------------------------------------------------
# A cache
# --------------------------------------------------------------------------------------------------------------------


CACHE_BLOCK = 64  # P


def cache_window(length: int) -> int:
    """The room, B·P, of a cache for `length` positions."""
    return -(-length // CACHE_BLOCK) * CACHE_BLOCK


def in_blocks(key_SxKxLxC: jax.Array, value_SxKxLxC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys [S, K, B, C, P] and values [S, K, B, P, C], zero beyond L: the order in which the matmuls of one query read them."""
    S, K, L, C = key_SxKxLxC.shape
    beyond = (0, 0), (0, 0), (0, -L % CACHE_BLOCK), (0, 0)
    key, value = (jnp.pad(x, beyond).reshape(S, K, -1, CACHE_BLOCK, C) for x in (key_SxKxLxC, value_SxKxLxC))
    return key.swapaxes(3, 4), value


def append(cache: dict[str, jax.Array], key_SxKxC: jax.Array, value_SxKxC: jax.Array, position_S: jax.Array) -> dict:
    """One layer's cache with each row's new key and value at its position."""
    row, block, place = jnp.arange(position_S.shape[0]), position_S // CACHE_BLOCK, position_S % CACHE_BLOCK
    return {
        "key": cache["key"].at[row, :, block, :, place].set(key_SxKxC.astype(cache["key"].dtype)),
        "value": cache["value"].at[row, :, block, place].set(value_SxKxC.astype(cache["value"].dtype)),
    }


def attend_cached(q_SxHxC: jax.Array, key_SxKxBxCxP: jax.Array, value_SxKxBxPxC: jax.Array, position_S: jax.Array) -> jax.Array:
    """Attention of one query per row to cache positions 0 ... position_S, [S, H, C].

    Sums go block by block, in order, and a block beyond a row's position adds exact zeros to it, so that its result is the same
    whatever B is.
    """
    S, K, B, C, P = key_SxKxBxCxP.shape
    q_SxKxBxRxC = jnp.broadcast_to(q_SxHxC.reshape(S, K, 1, -1, C), (S, K, B, q_SxHxC.shape[1] // K, C))  # R queries share a key
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = product("skbrc,skbcp->skbrp", q_SxKxBxRxC.astype(key_SxKxBxCxP.dtype), key_SxKxBxCxP) / C**0.5
    seen = jnp.arange(B * P).reshape(B, 1, P) <= position_S[:, None, None, None, None]
    scores = jnp.where(seen, scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(axis=(2, 4), keepdims=True))
    parts = product("skbrp,skbpc->skbrc", weights.astype(value_SxKxBxPxC.dtype), value_SxKxBxPxC), weights.sum(axis=-1)
    mixed, total = (functools.reduce(jnp.add, (part[:, :, b] for b in range(B))) for part in parts)
    return (mixed / total[..., None]).reshape(q_SxHxC.shape).astype(q_SxHxC.dtype)

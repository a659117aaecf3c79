"""Attention against its formula in float64, its gradient against finite differences, and the cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax.models import attention

WINDOW = 192  # three blocks of a cache
HEADS = [(1, 1, 3), (2, 2, 8), (2, 6, 5)]  # key heads, query heads, width
ROWS = {1: [[1], [1]], 3: [[1, 2], [3]], 37: [[20, 17], [1, 30, 6]], 64: [[64], [16, 16, 32]]}  # length -> rows of each sequence


def formula(q, k, v, segments):
    """softmax(q · k / √C) v in float64, query by query; head h looks at key head h // (H / K)."""
    output = np.zeros(q.shape)
    for s, i, h in np.ndindex(q.shape[:3]):
        seen = [j for j in range(i + 1) if segments[s, j] == segments[s, i]]
        group = h * k.shape[2] // q.shape[2]
        scores = k[s, seen, group].astype(np.float64) @ q[s, i, h] / np.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        output[s, i, h] = weights @ v[s, seen, group] / weights.sum()
    return output


def packed(length, key_heads, heads, width, seed=0):
    """q, k, v of two sequences in float64, and the segments of their rows."""
    rng = np.random.default_rng(seed)
    q = 2 * rng.normal(size=(2, length, heads, width))
    k, v = rng.normal(size=(2, 2, length, key_heads, width))
    return q, k, v, np.array([np.repeat(np.arange(len(rows)), rows) for rows in ROWS[length]])


@pytest.mark.parametrize("key_heads, heads, width", HEADS)
@pytest.mark.parametrize("length", ROWS)
def test_attention_within_rows_equals_its_formula(length, key_heads, heads, width):
    *qkv, segments = packed(length, key_heads, heads, width)
    found = jax.jit(attention.attend)(*(x.astype(np.float32) for x in qkv), segments)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, formula(*qkv, segments), rtol=0, atol=2e-6)


@pytest.mark.parametrize("key_heads, heads, width", HEADS)
@pytest.mark.parametrize("length", ROWS)
def test_gradient_of_attention_equals_finite_differences(length, key_heads, heads, width):
    """Of Σ c · output along a random direction of q, of k and of v each; central differences of the formula in float64."""
    *qkv, segments = packed(length, key_heads, heads, width)
    rng = np.random.default_rng(1)
    c = rng.normal(size=qkv[0].shape)
    whole = jax.jit(jax.grad(lambda *qkv: jnp.sum(c.astype(np.float32) * attention.attend(*qkv, segments)), argnums=(0, 1, 2)))
    for place, gradient in enumerate(whole(*(x.astype(np.float32) for x in qkv))):
        direction, sums = rng.normal(size=qkv[place].shape), []
        for by in (1e-5, -1e-5):
            moved = [x + by * direction if i == place else x for i, x in enumerate(qkv)]
            sums.append(np.sum(c * formula(*moved, segments)))
        expected = (sums[0] - sums[1]) / 2e-5
        scale = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert np.sum(gradient * direction) == pytest.approx(expected, abs=1e-5 * scale + 1e-6)


def test_bfloat16_attention_stays_near_and_its_sums_are_float32():
    *qkv, segments = packed(64, 2, 6, 5)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in qkv]
    found = attention.attend(*rounded, segments)
    expected = formula(*(np.asarray(x, np.float64) for x in rounded), segments)
    assert found.dtype == jnp.bfloat16
    assert 0 < np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected) < 2**-7


def test_factors_may_be_rounded_more_than_what_comes_of_them():
    """Attention, and its gradient, of the same inputs with bfloat16 factors and without: all stays float32, and near."""
    *qkv, segments = packed(64, 2, 6, 5)
    inputs = [jnp.asarray(x, jnp.bfloat16).astype(jnp.float32) for x in qkv]

    def run(dtype):
        output, pull = jax.vjp(lambda *qkv: attention.attend(*qkv, segments, dtype), *inputs)
        return output, *pull(jnp.cos(jnp.arange(output.size, dtype=jnp.float32)).reshape(output.shape))

    for rounded, exact in zip(run("bfloat16"), run(None)):
        assert rounded.dtype == jnp.float32
        assert 0 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 2**-6


def test_nothing_of_squared_length_is_kept_for_the_backward_pass():
    L = 256
    q, k = jnp.zeros((1, L, 4, 8)), jnp.zeros((1, L, 2, 8))
    kept = jax.tree.leaves(jax.vjp(lambda q, k, v: attention.attend(q, k, v, jnp.zeros((1, L), int)), q, k, k)[1])
    assert kept and max(array.size for array in kept) == q.size


def random_cache(key_heads: int, width: int, number: int):
    """Keys and values [number, K, WINDOW, C], and those of the cache that holds them, grown one position at a time."""
    rng = np.random.default_rng(0)
    pair = rng.normal(size=(2, number, key_heads, WINDOW, width)).astype(np.float32)
    nothing = jnp.zeros((number, key_heads, WINDOW, width))
    cache, append = dict(zip(("key", "value"), attention.in_blocks(nothing, nothing))), jax.jit(attention.append)
    for position in range(WINDOW):
        cache = append(cache, *pair[:, :, :, position], np.full(number, position))
    return pair.astype(np.float64), [cache["key"], cache["value"]]


def test_a_cache_grown_by_position_is_one_filled_at_once():
    pair, caches = random_cache(2, 8, 3)
    for grown, filled in zip(caches, attention.in_blocks(*pair.astype(np.float32)), strict=True):
        np.testing.assert_array_equal(grown, filled)
    key, value = caches
    np.testing.assert_array_equal(key[1, 0, 2, :, 5], pair[0, 1, 0, 2 * attention.CACHE_BLOCK + 5])
    np.testing.assert_array_equal(value[1, 0, 2, 5], pair[1, 1, 0, 2 * attention.CACHE_BLOCK + 5])


@pytest.mark.parametrize("key_heads, heads, width", HEADS)
def test_attention_to_a_cache_equals_its_formula(key_heads, heads, width):
    """softmax(q · k / √C) v in float64; head h looks at key head h // (H / K)."""
    position_S = np.array([0, 1, 62, 63, 64, 100, 127, 128, WINDOW - 1])
    (keys, values), caches = random_cache(key_heads, width, len(position_S))
    q = 3 * np.random.default_rng(1).normal(size=(len(position_S), heads, width)).astype(np.float32)
    found = jax.jit(lambda *args: attention.attend_cached(*args))(q, *caches, position_S)
    assert found.shape == q.shape
    for row, position in enumerate(position_S):
        for head in range(heads):
            key = keys[row, head * key_heads // heads, : position + 1]
            scores = key @ q[row, head].astype(np.float64) / np.sqrt(width)
            weights = np.exp(scores - scores.max())
            expected = weights @ values[row, head * key_heads // heads, : position + 1] / weights.sum()
            np.testing.assert_allclose(found[row, head], expected, rtol=0, atol=1e-5)


def test_a_row_attends_alike_beside_any_other():
    """To the last bit: however far another row has come and however many blocks are looked at, those that a row does not need
    add nothing to it."""
    position_S = np.array([3, 70, 127, WINDOW - 1])
    _, caches = random_cache(2, 8, len(position_S))
    q = np.random.default_rng(1).normal(size=(len(position_S), 4, 8)).astype(np.float32)
    attend = jax.jit(lambda *args: attention.attend_cached(*args))
    far = attend(q, *caches, position_S)
    near = attend(q, *caches, np.minimum(position_S, 70))
    fewer = attend(q, *(cache[:, :, :2] for cache in caches), np.minimum(position_S, 127))
    np.testing.assert_array_equal(far[:2], near[:2])
    np.testing.assert_array_equal(far[:3], fewer[:3])
    assert (far[2:] != near[2:]).any(axis=(1, 2)).all() and (far[3] != fewer[3]).any()


@pytest.mark.parametrize("length, window", [(1, 64), (64, 64), (65, 128), (512, 512), (513, 576)])
def test_a_cache_is_a_whole_number_of_blocks(length, window):
    assert attention.cache_window(length) == window
    keys, values = jnp.zeros((3, 2, length, 5)), jnp.zeros((3, 2, length, 5))
    assert {array.size for array in attention.in_blocks(keys, values)} == {3 * 2 * window * 5}

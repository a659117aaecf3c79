"""Attention against its formula in float64, its gradient against finite differences, and the cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax.models import attention

WINDOW = 192  # three blocks of a cache
HEADS = [(1, 1, 3), (2, 2, 8), (2, 6, 5)]  # key heads, query heads, width
ROWS = {1: [[1], [1]], 3: [[1, 2], [3]], 37: [[20, 17], [1, 30, 6]], 64: [[64], [16, 16, 32]]}  # length -> rows of each sequence


MASKS = [(None, None), (12, None), (5, 0.8), (None, 1.5)]  # window, cap; the scores reach 10


attend = jax.jit(attention.attend, static_argnums=(4, 6))
attend_cached = jax.jit(attention.attend_cached, static_argnums=5)
append = jax.jit(attention.append)


@functools.partial(jax.jit, static_argnums=(6, 7))
def attend_gradients(q, k, v, segments, c, window=None, cap=None, function=attention.attend):
    """The gradients of Σ c · attention in q, k and v."""
    return jax.grad(lambda *qkv: jnp.sum(c * function(*qkv, segments, None, window, cap)), argnums=(0, 1, 2))(q, k, v)


def capped(scores, cap):
    return scores if cap is None else cap * np.tanh(scores / cap)


def formula(q, k, v, segments, window=None, cap=None):
    """softmax(cap(q · k / √C)) v in float64, query by query; head h uses key head h // (H / K)."""
    output = np.zeros(q.shape)
    for s, i, h in np.ndindex(q.shape[:3]):
        visible = [j for j in range(i + 1) if segments[s, j] == segments[s, i] and (window is None or i - j < window)]
        group = h * k.shape[2] // q.shape[2]
        scores = capped(k[s, visible, group].astype(np.float64) @ q[s, i, h] / np.sqrt(q.shape[3]), cap)
        weights = np.exp(scores - scores.max())
        output[s, i, h] = weights @ v[s, visible, group] / weights.sum()
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
    output = attend(*(x.astype(np.float32) for x in qkv), segments)
    assert output.dtype == jnp.float32
    np.testing.assert_allclose(output, formula(*qkv, segments), rtol=0, atol=2e-6)


@pytest.mark.parametrize("window, cap", MASKS[1:])
def test_windows_and_caps_equal_the_formula(window, cap):
    """Also where a window ends in another block of queries, and with derivatives of every order; gradients against autodiff."""
    *qkv, segments = packed(37, 2, 6, 5)
    inputs = [x.astype(np.float32) for x in qkv]
    expected = formula(*qkv, segments, window, cap)
    np.testing.assert_allclose(attend(*inputs, segments, None, window, cap), expected, rtol=0, atol=2e-6)
    np.testing.assert_allclose(attention.attend_plain(*inputs, segments, None, window, cap), expected, rtol=0, atol=2e-6)
    assert np.abs(expected - formula(*qkv, segments)).max() > 0.1
    c = np.random.default_rng(1).normal(size=qkv[0].shape).astype(np.float32)
    ours, autodiff = (attend_gradients(*inputs, segments, c, window, cap, f) for f in (attention.attend, attention.attend_plain))
    for gradient, other in zip(ours, autodiff):
        np.testing.assert_allclose(gradient, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "length, key_heads, heads, width, window, cap",
    [(length, *heads, None, None) for length in ROWS for heads in HEADS] + [(37, 2, 6, 5, *mask) for mask in MASKS[1:]],
)
def test_gradient_of_attention_equals_finite_differences(length, key_heads, heads, width, window, cap):
    """The derivative of Σ c · output along random directions of q, k and v; central differences of the formula in float64."""
    *qkv, segments = packed(length, key_heads, heads, width)
    rng = np.random.default_rng(1)
    c = rng.normal(size=qkv[0].shape)
    gradients = attend_gradients(*(x.astype(np.float32) for x in qkv), segments, c.astype(np.float32), window, cap)
    for argument, gradient in enumerate(gradients):
        gradient = np.asarray(gradient)
        direction, sums = rng.normal(size=qkv[argument].shape), []
        for step in (1e-5, -1e-5):
            shifted = [x + step * direction if i == argument else x for i, x in enumerate(qkv)]
            sums.append(np.sum(c * formula(*shifted, segments, window, cap)))
        expected = (sums[0] - sums[1]) / 2e-5
        scale = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert np.sum(gradient * direction) == pytest.approx(expected, abs=1e-5 * scale + 1e-6)


def test_bfloat16_attention_stays_near_and_its_sums_are_float32():
    *qkv, segments = packed(64, 2, 6, 5)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in qkv]
    output = attend(*rounded, segments)
    expected = formula(*(np.asarray(x, np.float64) for x in rounded), segments)
    assert output.dtype == jnp.bfloat16
    assert 0 < np.linalg.norm(np.asarray(output, np.float64) - expected) / np.linalg.norm(expected) < 2**-7


def test_factors_may_be_rounded_more_than_results():
    """Attention and its gradients, with bfloat16 and with float32 factors: results are float32 and close."""
    *qkv, segments = packed(64, 2, 6, 5)
    inputs = [jnp.asarray(x, jnp.bfloat16).astype(jnp.float32) for x in qkv]

    @functools.partial(jax.jit, static_argnums=0)
    def run(dtype):
        output, pull = jax.vjp(lambda *qkv: attention.attend(*qkv, segments, dtype), *inputs)
        return output, *pull(jnp.cos(jnp.arange(output.size, dtype=jnp.float32)).reshape(output.shape))

    for rounded, exact in zip(run("bfloat16"), run(None)):
        assert rounded.dtype == jnp.float32
        assert 0 < np.linalg.norm(np.asarray(rounded) - exact) / np.linalg.norm(exact) < 2**-6


def test_no_residual_has_squared_length():
    L = 256
    q, k = jnp.zeros((1, L, 4, 8)), jnp.zeros((1, L, 2, 8))
    vjp = jax.jit(lambda q, k, v: jax.vjp(lambda q, k, v: attention.attend(q, k, v, jnp.zeros((1, L), int)), q, k, v)[1])
    residuals = jax.tree.leaves(vjp(q, k, k))
    assert residuals and max(array.size for array in residuals) == q.size


def random_cache(key_heads: int, width: int, number: int):
    """Keys and values [number, K, WINDOW, C], and a cache that they were appended to, one position at a time."""
    rng = np.random.default_rng(0)
    pair = rng.normal(size=(2, number, key_heads, WINDOW, width)).astype(np.float32)
    zeros = jnp.zeros((number, key_heads, WINDOW, width))
    cache = dict(zip(("key", "value"), attention.in_blocks(zeros, zeros)))
    for position in range(WINDOW):
        cache = append(cache, *pair[:, :, :, position], np.full(number, position))
    return pair.astype(np.float64), [cache["key"], cache["value"]]


def test_appending_equals_filling_at_once():
    pair, caches = random_cache(2, 8, 3)
    for appended, filled in zip(caches, attention.in_blocks(*pair.astype(np.float32)), strict=True):
        np.testing.assert_array_equal(appended, filled)
    key, value = caches
    np.testing.assert_array_equal(key[1, 0, 2, :, 5], pair[0, 1, 0, 2 * attention.CACHE_BLOCK + 5])
    np.testing.assert_array_equal(value[1, 0, 2, 5], pair[1, 1, 0, 2 * attention.CACHE_BLOCK + 5])


@pytest.mark.parametrize(
    "key_heads, heads, width, window, cap", [(*heads, None, None) for heads in HEADS] + [(2, 6, 5, 70, 1.5), (2, 6, 5, 1, None)]
)
def test_attention_to_a_cache_equals_its_formula(key_heads, heads, width, window, cap):
    """softmax(cap(q · k / √C)) v in float64; head h uses key head h // (H / K)."""
    position_S = np.array([0, 1, 62, 63, 64, 100, 127, 128, WINDOW - 1])
    (keys, values), caches = random_cache(key_heads, width, len(position_S))
    q = 3 * np.random.default_rng(1).normal(size=(len(position_S), heads, width)).astype(np.float32)
    output = np.asarray(attend_cached(q, *caches, position_S, window, cap))
    assert output.shape == q.shape
    for row, position in enumerate(position_S):
        for head in range(heads):
            visible = slice(0 if window is None else max(0, position + 1 - window), position + 1)
            key = keys[row, head * key_heads // heads, visible]
            scores = capped(key @ q[row, head].astype(np.float64) / np.sqrt(width), cap)
            weights = np.exp(scores - scores.max())
            expected = weights @ values[row, head * key_heads // heads, visible] / weights.sum()
            np.testing.assert_allclose(output[row, head], expected, rtol=0, atol=1e-5)


def test_attention_of_a_row_does_not_depend_on_other_rows():
    """Bit-identical: blocks after the position of a row add nothing to it, however many there are."""
    position_S = np.array([3, 70, 127, WINDOW - 1])
    _, caches = random_cache(2, 8, len(position_S))
    q = np.random.default_rng(1).normal(size=(len(position_S), 4, 8)).astype(np.float32)
    far = attend_cached(q, *caches, position_S)
    near = attend_cached(q, *caches, np.minimum(position_S, 70))
    fewer = attend_cached(q, *(cache[:, :, :2] for cache in caches), np.minimum(position_S, 127))
    np.testing.assert_array_equal(far[:2], near[:2])
    np.testing.assert_array_equal(far[:3], fewer[:3])
    assert (far[2:] != near[2:]).any(axis=(1, 2)).all() and (far[3] != fewer[3]).any()


@pytest.mark.parametrize("length, window", [(1, 64), (64, 64), (65, 128), (512, 512), (513, 576)])
def test_a_cache_consists_of_full_blocks(length, window):
    assert attention.cache_window(length) == window
    keys, values = jnp.zeros((3, 2, length, 5)), jnp.zeros((3, 2, length, 5))
    assert {array.size for array in attention.in_blocks(keys, values)} == {3 * 2 * window * 5}

"""Losses against float64 NumPy and against `jax.grad` of the same loss with all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax import losses
from bilevel_jax.data import packing

V, D, T = 89, 6, 23
CASES = [(20, 4, 0), (20, 4, 9), (20, 4, 20), (20, 20, 13), (12, 256, 11), (32, 8, 8), (32, 8, 1)]  # P, CHUNK, targets


def problem(P, num_targets, seed=0, tokens=T):
    """Random hidden states, output matrix, logit indices (some repeated) and targets; padding after `num_targets`."""
    rng = np.random.default_rng(seed)
    index = np.full(P, tokens, np.int32)
    index[:num_targets] = rng.integers(0, tokens, num_targets)
    index[1:num_targets:5] = index[0]
    target = np.zeros(P, np.int32)
    target[:num_targets] = rng.integers(0, V, num_targets)
    hidden, head = rng.normal(size=(tokens, D)), rng.normal(size=(V, D))
    return tuple(map(jnp.asarray, (np.float32(hidden), np.float32(head), index, target, np.int32(num_targets))))


def numpy_nll(hidden, head, index, target, num_targets):
    """In float64, one target at a time."""
    hidden, head = np.float64(hidden), np.float64(head)
    nll = np.zeros(len(index))
    for p in range(num_targets):
        logits = head @ hidden[index[p]]
        nll[p] = np.log(np.sum(np.exp(logits - logits.max()))) + logits.max() - logits[target[p]]
    return nll


def full_logits_nll(hidden, head, index, target, num_targets):
    """The same with all logits at once, in float32, for `jax.grad`."""
    log_probs = jax.nn.log_softmax(hidden.astype(jnp.float32) @ head.astype(jnp.float32).T)
    used = slice(0, int(num_targets))
    return -log_probs[index[used], target[used]]


@pytest.mark.parametrize("P, chunk, num_targets", CASES)
def test_token_nll(monkeypatch, P, chunk, num_targets):
    monkeypatch.setattr(packing, "CHUNK", chunk)
    args = problem(P, num_targets)
    expected = numpy_nll(*args)
    np.testing.assert_allclose(losses.token_nll(*args), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.vjp(losses.token_nll, *args)[0], expected, rtol=1e-5, atol=1e-5)
    assert (np.asarray(losses.token_nll(*args))[num_targets:] == 0).all()


def test_token_nll_of_extreme_logits():
    hidden, head = jnp.array([[1e4], [-1e4]]), jnp.array([[1.0], [-1.0], [0.0]])
    nll = losses.token_nll(hidden, head, jnp.array([0, 1]), jnp.array([0, 2]), jnp.int32(2))
    np.testing.assert_allclose(nll, [0.0, 1e4], rtol=1e-6)  # the most likely token, and one with 10^4 nats more


@pytest.mark.parametrize("P, chunk, num_targets", CASES)
def test_token_scores(monkeypatch, intermediate_shapes, P, chunk, num_targets):
    """Some targets are the most likely token, others are not; padding is neither missed nor scored."""
    monkeypatch.setattr(packing, "CHUNK", chunk)
    hidden, head, index, target, count = problem(P, num_targets)
    best = np.argmax(np.float64(hidden)[np.minimum(index, T - 1)] @ np.float64(head).T, axis=-1)
    target = jnp.asarray(np.where(np.arange(P) % 2, target, best), jnp.int32)
    nll, missed = losses.token_scores(hidden, head, index, target, count)
    np.testing.assert_allclose(nll, numpy_nll(hidden, head, index, target, count), rtol=1e-5, atol=1e-5)
    assert np.asarray(missed).tolist() == [p < num_targets and best[p] != target[p] for p in range(P)]
    shapes = intermediate_shapes(lambda *args: losses.token_scores(*args), hidden, head, index, target, count)
    assert (min(chunk, P), V) in shapes and (chunk >= P or (P, V) not in shapes)


@pytest.mark.parametrize("P, chunk, num_targets", CASES)
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 0.04)])
def test_gradient(monkeypatch, P, chunk, num_targets, dtype, tolerance):
    monkeypatch.setattr(packing, "CHUNK", chunk)
    hidden, head, *rest = problem(P, num_targets)
    hidden, head = jnp.asarray(hidden, dtype), jnp.asarray(head, dtype)
    cotangent = np.random.default_rng(1).normal(size=P).astype(np.float32)

    def naive(hidden):
        return cotangent[:num_targets] @ full_logits_nll(hidden, head, *rest)

    gradient = jax.grad(lambda hidden: cotangent @ losses.token_nll(hidden, head, *rest))(hidden)
    expected = jax.grad(naive)(hidden.astype(jnp.float32))
    assert gradient.dtype == dtype
    np.testing.assert_allclose(gradient.astype(np.float32), expected, rtol=tolerance, atol=tolerance)


def test_gradients_in_bfloat16_keep_small_differences_of_weights():
    """The weights of rows differ by less than bfloat16 can tell; their gradients must differ by as much."""
    hidden, head, _, *rest = problem(512, 512, tokens=512)
    rest = jnp.arange(512), *rest  # a position has one target
    hidden, head = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16)

    def gradient(weight):
        result = jax.grad(lambda hidden: weight * 0.04371 * jnp.sum(losses.token_nll(hidden, head, *rest)))(hidden)
        return np.asarray(result, np.float64).ravel()

    one = gradient(1.0)
    weights = np.linspace(1.0, 1.004, 9)
    measured = [gradient(weight) @ one / (one @ one) for weight in weights]
    np.testing.assert_allclose(measured, weights, atol=5e-4)  # rounding of 3000 numbers; with a rounded factor 2.5e-3


def test_soft_caps():
    """z = cap · tanh(u / cap) of the logits u: losses and missed targets in float64, gradients by autodiff of all logits."""
    cap = 0.7  # the logits reach 10
    hidden, head, index, target, count = problem(20, 9)
    capped = cap * np.tanh(np.float64(hidden) @ np.float64(head).T / cap)
    expected = numpy_nll(capped, np.eye(V), index, target, count)
    for function in (losses.token_nll, losses.token_nll_plain):
        np.testing.assert_allclose(function(hidden, head, index, target, count, cap), expected, rtol=1e-5, atol=1e-5)
    nll, missed = losses.token_scores(hidden, head, index, target, count, cap)
    np.testing.assert_allclose(nll, expected, rtol=1e-5, atol=1e-5)
    best = np.argmax(capped[np.minimum(index, T - 1)], axis=-1)
    assert np.asarray(missed)[:9].tolist() == (best != target)[:9].tolist()

    cotangent = np.random.default_rng(1).normal(size=20).astype(np.float32)
    naive = jax.grad(lambda x: cotangent[:9] @ full_logits_nll(cap * jnp.tanh(x @ head.T / cap), jnp.eye(V), index, target, count))
    for function in (losses.token_nll, losses.token_nll_plain):
        gradient = jax.grad(lambda x, function=function: cotangent @ function(x, head, index, target, count, cap))(hidden)
        np.testing.assert_allclose(gradient, naive(hidden), rtol=1e-5, atol=1e-5)


def test_cotangents_of_padding_are_ignored():
    hidden, head, index, target, count = problem(12, 5)
    index = index.at[5:].set(3)  # a real token: only the count defines padding
    nll, pull = jax.vjp(lambda hidden: losses.token_nll(hidden, head, index, target, count), hidden)
    assert (np.asarray(nll)[5:] == 0).all()
    only_padding = np.where(np.arange(12) < 5, 0.0, np.inf).astype(np.float32)
    assert (np.asarray(pull(only_padding)[0]) == 0).all()


def test_logits_exist_for_one_chunk_at_a_time(monkeypatch, intermediate_shapes):
    P, chunk = 64, 8
    monkeypatch.setattr(packing, "CHUNK", chunk)
    hidden, head, *rest = problem(P, 50, tokens=T)

    def loss(hidden):
        return losses.token_nll(hidden, head, *rest).sum()

    shapes = intermediate_shapes(jax.value_and_grad(loss), hidden)
    with_vocabulary = {shape for shape in shapes if V in shape}
    assert (chunk, V) in with_vocabulary  # the inspection sees the inside of the loop
    assert all(np.prod(shape) <= chunk * V for shape in with_vocabulary)

    full = intermediate_shapes(jax.grad(lambda hidden: full_logits_nll(hidden, head, *rest).sum()), hidden)
    assert (T, V) in full  # and it finds all logits where they exist


def test_compiled_memory_is_that_of_one_chunk():
    T, P, V, D = 2048, 2048, 8192, 16
    hidden, head = jax.ShapeDtypeStruct((T, D), jnp.float32), jax.ShapeDtypeStruct((V, D), jnp.float32)
    index, count = jax.ShapeDtypeStruct((P,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)

    def loss(*args):
        return losses.token_nll(*args).sum()

    memory = jax.jit(jax.value_and_grad(loss)).lower(hidden, head, index, index, count).compile().memory_analysis()
    assert memory.temp_size_in_bytes < P * V * 4 / 2  # all logits would take twice that, a chunk an eighth of them


@pytest.mark.parametrize("reduction, expected", [("mean", [2.0, 0.5, 0.0]), ("sum", [6.0, 0.5, 0.0])])
def test_reduce_tokens(reduction, expected):
    nll, length = jnp.array([6.0, 0.5, 0.0]), jnp.array([3, 1, 0])
    np.testing.assert_allclose(losses.reduce_tokens(nll, length, reduction), expected)

"""Decoding with a cache against the forward pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax.models import attention, decoder, kv_cache, lora
from tests.models import models
from tests.models.test_decoder import KINDS, load

prefill = jax.jit(kv_cache.prefill, static_argnums=0)
split_layers = jax.jit(kv_cache.split_layers)


@functools.partial(jax.jit, static_argnums=0)
def decode_step(config, params, layers, adapter_layers, cache, token_S, position_S):
    hidden, cache = kv_cache.decode(config, layers, adapter_layers, cache, token_S, position_S)
    return decoder.project(hidden, decoder.head(params), config.logit_cap), cache


@functools.partial(jax.jit, static_argnums=(0, 1))
def initial_cache(config, length, prefix, valid, stale):
    """A cache with the valid positions of the prefix, and `stale` everywhere else."""

    def fill(path, room, prefilled):
        values = jnp.where(valid[path[-1].key], prefilled, stale)
        return jnp.full_like(room, stale).at[:, :, : values.shape[2]].set(values)

    num_sequences = valid["key"].shape[0]
    return jax.tree_util.tree_map_with_path(fill, kv_cache.init_cache(config, num_sequences, length), prefix)


def decoded_logits(config, params, adapter, tokens_SxL, prompt_S, stale: float = 0.0):
    """Logits [S, L, V] by prefill of the first prompt_S[s] tokens of each row and one step per later token; NaN for the prompts.

    The cache beyond the prompt of a row starts as `stale`.
    """
    S, L = tokens_SxL.shape
    prompts = np.arange(max(prompt_S)) < prompt_S[:, None]
    prefix = prefill(config, params, adapter, np.where(prompts, tokens_SxL[:, : max(prompt_S)], 0))
    valid = np.pad(prompts, ((0, 0), (0, -prompts.shape[1] % attention.CACHE_BLOCK))).reshape(S, -1, attention.CACHE_BLOCK)
    valid = {"key": valid[:, None, :, None, :], "value": valid[:, None, :, :, None]}
    cache = initial_cache(config, L, prefix, valid, stale)
    layers = [tree if tree is None else split_layers(tree) for tree in (params, adapter)]

    result = np.full((S, L, config.vocab_size), np.nan, np.float32)
    rows = np.arange(S)
    for i in range(L - min(prompt_S)):
        position_S = np.minimum(prompt_S + i, L - 1)  # a finished row repeats its last token
        logits, cache = decode_step(config, params, *layers, cache, tokens_SxL[rows, position_S], position_S)
        result[rows, position_S] = logits
    return result


def assert_decoding_equals_forward(config, params, adapter, decoded_params, decoded_adapter):
    """Prompts of different lengths. One ends at a block; one is empty, so all its positions are decoded."""
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (4, 150))
    prompt_S = np.array([0, 37, 64, 130])
    decoded = decoded_logits(config, decoded_params, decoded_adapter, tokens, prompt_S)
    expected = np.asarray(models.logits(config, params, adapter, tokens))
    for row, prompt in enumerate(prompt_S):
        np.testing.assert_allclose(decoded[row, prompt:], expected[row, prompt:], rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    "variant", [*KINDS, "llama_bias", "llama_head_dim", "llama_rope_llama3", "gemma2", "olmo2", "smollm3", "granite"]
)
def test_decoding_equals_the_forward_pass(variant):
    config, params, _ = load(variant)
    assert_decoding_equals_forward(config, params, None, params, None)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("variant", ["neox_parallel", "llama_gqa_tied"])
@pytest.mark.slow
def test_decoding_with_an_adapter_equals_the_forward_pass(variant, merged):
    config, params, _ = load(variant)
    config = dataclasses.replace(config, adapter_scale=1.5)
    adapter = models.random_adapter(config, rank=3, scale=0.2)
    decoded = (lora.merge_adapter(config, params, adapter), None) if merged else (params, adapter)
    assert_decoding_equals_forward(config, params, adapter, *decoded)


@pytest.mark.parametrize("variant", ["neox_parallel", "llama_gqa_tied"])
def test_stale_cache_entries_have_no_influence(variant):
    config, params, _ = load(variant)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (3, 140))
    prompt_S = np.array([2, 64, 90])
    clean = decoded_logits(config, params, None, tokens, prompt_S)
    np.testing.assert_array_equal(decoded_logits(config, params, None, tokens, prompt_S, stale=1e30), clean)
    assert np.isfinite(clean[2, 90:]).all()


def test_bfloat16_decodes_in_bfloat16_and_stays_near():
    config, params, _ = load("llama_gqa_tied", "bfloat16")
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, (2, 70))
    cache = kv_cache.init_cache(config, 2, 70)
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype(jnp.bfloat16)}
    decoded = decoded_logits(config, params, None, tokens, np.array([1, 66]))
    exact = dataclasses.replace(config, dtype="float32")
    expected = models.logits(exact, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), None, tokens)
    error = np.linalg.norm(decoded[0, 1:] - expected[0, 1:]) / np.linalg.norm(expected[0, 1:])
    assert 0 < error < 0.05  # as in the test of the forward pass

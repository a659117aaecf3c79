"""The decoder against `transformers`' logits (see fixtures/make.py), and what no reference shows: who may see whom, and that
decoding with a cache comes to the same as the whole forward pass."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn

from bilevel_jax.models import attention, decoder, huggingface, lora

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
logits_of = jax.jit(decoder.logits, static_argnums=0)
VARIANTS = [
    "neox_parallel",
    "neox_sequential",
    "neox_rotary_full",
    "neox_no_attention_bias",
    "llama_mha",
    "llama_gqa_tied",
    "llama_bias",
    "llama_head_dim",
    "llama_rope_llama3",
    "llama_rope_linear",
    "llama_sharded",
    "llama_bfloat16",
]
KINDS = ["neox_parallel", "neox_sequential", "llama_gqa_tied"]  # of data flow: where masks and recomputation may differ
LENGTHS = (5, 1, 4)  # of the rows packed into one sequence below


def load(variant, dtype="float32"):
    config, params = huggingface.load_model(str(FIXTURES / variant), dtype)
    return config, params, safetensors.numpy.load_file(FIXTURES / variant / "reference.safetensors")


def packed():
    """Token ids, positions and segments [1, 10] of three rows side by side; no token occurs twice."""
    tokens = np.random.default_rng(0).permutation(64)[: sum(LENGTHS)]
    positions = np.concatenate([np.arange(length) for length in LENGTHS])
    segments = np.repeat(np.arange(1, 1 + len(LENGTHS)), LENGTHS)
    return tokens[None], positions[None], segments[None]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant):
    config, params, reference = load(variant)
    logits = logits_of(config, params, None, reference["tokens"])
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, reference["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_parameter_of_a_reference_is_idle(variant):
    """Without this, equal logits would not prove that each bias and norm weight is in its place."""
    config, params, reference = load(variant)
    leaves, tree = jax.tree.flatten(params)
    for i, leaf in enumerate(leaves):
        without = tree.unflatten([*leaves[:i], jnp.zeros_like(leaf), *leaves[i + 1 :]])
        change = jnp.abs(logits_of(config, without, None, reference["tokens"]) - reference["logits"]).max()
        assert change > 1e-2, jax.tree_util.tree_flatten_with_path(params)[0][i][0]


@pytest.mark.parametrize("variant", KINDS)
def test_gradients_reach_earlier_tokens_of_the_same_row_only(variant):
    config, params, _ = load(variant)
    tokens, positions, segments = packed()

    def hidden(embedding):
        changed = {"params": params | {"embed_tokens": embedding}}
        return decoder.Decoder(config).apply(changed, tokens, positions, segments)

    jacobian = jax.jit(jax.jacrev(hidden))(params["embed_tokens"])[0]  # [L, D, V, D]
    reach_LxL = jnp.abs(jacobian[:, :, tokens[0]]).max(axis=(1, 3))  # a token is a position here: each occurs once
    same_row = segments[0][:, None] == segments[0]
    may_see = same_row & np.tri(sum(LENGTHS), dtype=bool)
    assert (reach_LxL[~may_see] == 0).all()
    assert (reach_LxL[may_see] > 1e-6).all()


@pytest.mark.parametrize("variant", ["neox_parallel", "neox_sequential", "llama_gqa_tied", "llama_rope_llama3"])
def test_packed_rows_equal_rows_alone(variant):
    config, params, _ = load(variant)
    tokens, positions, segments = packed()
    together = logits_of(config, params, None, tokens, positions, segments)[0]
    alone = np.zeros((len(LENGTHS), max(LENGTHS)), int)
    for row, length in enumerate(LENGTHS):
        alone[row, :length] = tokens[segments == row + 1]
    alone = logits_of(config, params, None, alone)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(together[segments[0] == row + 1], alone[row, :length], rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", ["neox_parallel", "llama_gqa_tied"])
def test_remat_changes_neither_values_nor_gradients(variant):
    config, params, reference = load(variant)

    def loss(config, params):
        return jnp.mean(logits_of(config, params, None, reference["tokens"]) ** 2)

    plain = jax.jit(jax.value_and_grad(functools.partial(loss, config)))(params)
    remat = dataclasses.replace(config, remat=True)
    remat = jax.jit(jax.value_and_grad(functools.partial(loss, remat)))(params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), plain, remat)


@pytest.mark.parametrize("activations", ["bfloat16", "float32"])
@pytest.mark.parametrize("variant", ["neox_parallel", "llama_gqa_tied"])
def test_bfloat16_computes_in_bfloat16_and_stays_near(variant, activations):
    config, params, reference = load(variant, "bfloat16")
    assert config.activations == "float32"  # on a CPU
    config = dataclasses.replace(config, activations=activations)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    tokens = jnp.asarray(reference["tokens"])
    hidden = jax.eval_shape(decoder.Decoder(config).apply, {"params": params}, tokens, tokens, tokens)
    assert hidden.dtype == activations
    logits = logits_of(config, params, None, tokens)
    assert logits.dtype == jnp.float32
    error = np.linalg.norm(logits - reference["logits"]) / np.linalg.norm(reference["logits"])
    assert 0 < error < 0.05  # bfloat16 keeps 8 bits, 0.4%, and errors add up over two layers


@pytest.mark.parametrize("x_dtype, w_dtype", [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")])
def test_products_and_their_gradients_equal_float64(x_dtype, w_dtype):
    """y = x w, dx = d wᵀ, dw = xᵀ d of factors that bfloat16 holds exactly: all that may be lost is the rounding of the result."""
    rng = np.random.default_rng(0)
    x, w, d = (rng.integers(-8, 9, shape).astype(np.float64) for shape in ((6, 5), (5, 7), (6, 7)))
    given = jnp.asarray(x, x_dtype), jnp.asarray(w, w_dtype)
    y, pull = jax.vjp(decoder.matmul, *given)
    dx, dw = pull(jnp.asarray(d, x_dtype))
    for found, expected, dtype in ((y, x @ w, x_dtype), (dx, d @ w.T, x_dtype), (dw, x.T @ d, w_dtype)):
        assert found.dtype == dtype
        np.testing.assert_array_equal(np.asarray(found, np.float64), np.asarray(jnp.asarray(expected, dtype), np.float64))


def test_products_keep_inputs_only_for_weights_that_learn():
    x, w = jnp.ones((6, 5)), jnp.ones((5, 7))
    frozen = jax.tree.leaves(jax.vjp(lambda x: decoder.matmul(x, w), x)[1])
    assert x.shape not in [leaf.shape for leaf in frozen]
    assert x.shape in [leaf.shape for leaf in jax.tree.leaves(jax.vjp(decoder.matmul, x, w)[1])]


def test_initial_parameters():
    """Matrices ~ N(0, 0.02), biases 0, norm weights 1, and a logit matrix only where the embedding is not shared."""
    config, _, _ = load("neox_parallel")
    config = dataclasses.replace(config, hidden_size=256, intermediate_size=256, head_dim=64)
    init = jax.jit(decoder.init_params, static_argnums=0)
    params = init(config, jax.random.key(0))
    for path, leaf in jax.tree_util.tree_flatten_with_path(nn.unbox(params))[0]:
        name = path[-1].key
        if name in ("bias", "scale"):
            assert (leaf == (name == "scale")).all()
        else:
            assert abs(float(leaf.std()) / 0.02 - 1) < 0.05, path
    tied = init(dataclasses.replace(config, tie_embeddings=True), jax.random.key(0))
    assert "lm_head" in params and "lm_head" not in tied


# --------------------------------------------------------------------------------------------------------------------
# Decoding
# --------------------------------------------------------------------------------------------------------------------


def random_adapter(config):
    """An adapter of every projection, large enough to change each logit."""
    adapter = lora.init_adapter(config, jax.random.key(0), 3, lora.resolve_targets(config, "all-linear"))
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([0.2 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)])


def decoded_logits(config, params, adapter, tokens_SxL, prompt_S, stale: float = 0.0):
    """Logits [S, L, V] by prefill of the first prompt_S[s] tokens of each row and one step for each later one; NaN for the prompts.
    What the cache holds beyond a row's prompt starts as `stale`."""
    S, L = tokens_SxL.shape
    within = np.arange(max(prompt_S)) < prompt_S[:, None]
    prefix = jax.jit(lambda tokens: decoder.prefill(config, params, adapter, tokens))(
        np.where(within, tokens_SxL[:, : max(prompt_S)], 0)
    )

    held = np.pad(within, ((0, 0), (0, -within.shape[1] % attention.CACHE_BLOCK))).reshape(S, -1, attention.CACHE_BLOCK)
    held = {"key": held[:, None, :, None, :], "value": held[:, None, :, :, None]}

    def fill(path, room, filled):
        kept = jnp.where(held[path[-1].key], filled, stale)
        return jnp.full_like(room, stale).at[:, :, : kept.shape[2]].set(kept)

    cache = jax.tree_util.tree_map_with_path(fill, decoder.init_cache(config, S, L), prefix)
    weights = [tree if tree is None else decoder.split_layers(tree, config) for tree in (params, adapter)]

    @jax.jit
    def step(cache, token_S, position_S):
        hidden, cache = decoder.decode(config, *weights, cache, token_S, position_S)
        return hidden @ decoder.head(params).T, cache

    found = np.full((S, L, config.vocab_size), np.nan, np.float32)
    rows = np.arange(S)
    for i in range(L - min(prompt_S)):
        position_S = np.minimum(prompt_S + i, L - 1)  # a row that is done repeats its last token
        logits, cache = step(cache, tokens_SxL[rows, position_S], position_S)
        found[rows, position_S] = logits
    return found


def assert_decoding_is_the_forward(config, params, adapter, decoded_with):
    """Rows of unequal prompts, one of which ends a block, and one that starts from nothing, so that every position is decoded."""
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (4, 150))
    prompt_S = np.array([0, 37, 64, 130])
    found = decoded_logits(config, decoded_with[0], decoded_with[1], tokens, prompt_S)
    expected = np.asarray(logits_of(config, params, adapter, tokens))
    for row, prompt in enumerate(prompt_S):
        np.testing.assert_allclose(found[row, prompt:], expected[row, prompt:], rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("variant", [*KINDS, "llama_bias", "llama_head_dim", "llama_rope_llama3"])
def test_decoding_equals_the_whole_forward(variant):
    config, params, _ = load(variant)
    assert_decoding_is_the_forward(config, params, None, (params, None))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("variant", ["neox_parallel", "llama_gqa_tied"])
def test_decoding_with_an_adapter_equals_the_whole_forward(variant, merged):
    config, params, _ = load(variant)
    config = dataclasses.replace(config, adapter_scale=1.5)
    adapter = random_adapter(config)
    used = (lora.merge_adapter(config, params, adapter), None) if merged else (params, adapter)
    assert_decoding_is_the_forward(config, params, adapter, used)


@pytest.mark.parametrize("variant", ["neox_parallel", "llama_gqa_tied"])
def test_what_a_cache_held_before_has_no_influence(variant):
    config, params, _ = load(variant)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (3, 140))
    prompt_S = np.array([2, 64, 90])
    clean = decoded_logits(config, params, None, tokens, prompt_S)
    np.testing.assert_array_equal(decoded_logits(config, params, None, tokens, prompt_S, stale=1e30), clean)
    assert np.isfinite(clean[2, 90:]).all()


def test_bfloat16_decodes_in_bfloat16_and_stays_near():
    config, params, _ = load("llama_gqa_tied", "bfloat16")
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, (2, 70))
    cache = decoder.init_cache(config, 2, 70)
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype(jnp.bfloat16)}
    found = decoded_logits(config, params, None, tokens, np.array([1, 66]))
    exact = dataclasses.replace(config, dtype="float32")
    expected = logits_of(exact, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), None, tokens)
    error = np.linalg.norm(found[0, 1:] - expected[0, 1:]) / np.linalg.norm(expected[0, 1:])
    assert 0 < error < 0.05  # as above

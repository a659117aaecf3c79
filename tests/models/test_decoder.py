"""The decoder against the logits of `transformers` (see fixtures/make.py), causality and packing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bilevel_jax import losses
from bilevel_jax.models import decoder, layer_settings
from tests.models import models

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
    "qwen2",
    "qwen2_yarn_tied",
    "qwen3",
    "mistral",
    "phi3_short",
    "phi3_long_sharded",
    "gemma2",
    "gemma3",
    "olmo2",
    "smollm3",
    "stablelm",
    "stablelm_tied",
    "granite",
    "granite_tied",
]
KINDS = ["neox_parallel", "neox_sequential", "llama_gqa_tied"]  # one of each data flow
SWITCHES = [  # (a field of the config that only some architectures set, a reference that sets it)
    ("windows", "mistral"),
    ("rotated", "smollm3"),
    ("local_rope_theta", "gemma3"),
    ("rope_scaling", "qwen2_yarn_tied"),
    ("query_scale", "gemma2"),
    ("query_scale", "granite"),
    ("attention_cap", "gemma2"),
    ("logit_cap", "gemma2"),
    ("embedding_scale", "gemma2"),
    ("embedding_scale", "granite"),
    ("residual_scale", "granite"),
    ("logit_divisor", "granite"),
]
LENGTHS = (5, 1, 4)  # of the rows packed into one sequence below


def load(variant, dtype="float32"):
    (config, params), reference = models.load(variant, dtype), models.reference(variant)
    return layer_settings.for_length(config, reference["tokens"].shape[1]), params, reference


def packed():
    """Token ids, positions and segments [1, 10] of three rows side by side; no token occurs twice."""
    tokens = np.random.default_rng(0).permutation(64)[: sum(LENGTHS)]
    positions = np.concatenate([np.arange(length) for length in LENGTHS])
    segments = np.repeat(np.arange(1, 1 + len(LENGTHS)), LENGTHS)
    return tokens[None], positions[None], segments[None]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant):
    config, params, reference = load(variant)
    logits = models.logits(config, params, None, reference["tokens"])
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, reference["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_parameter_of_a_reference_matters(variant):
    """Each parameter of a reference changes its logits. So equal logits prove that each bias and norm weight is read."""
    config, params, reference = load(variant)
    leaves, tree = jax.tree.flatten(params)
    for i, leaf in enumerate(leaves):
        without = tree.unflatten([*leaves[:i], jnp.zeros_like(leaf), *leaves[i + 1 :]])
        change = np.abs(np.asarray(models.logits(config, without, None, reference["tokens"])) - reference["logits"]).max()
        assert change > 1e-2, jax.tree_util.tree_flatten_with_path(params)[0][i][0]


@pytest.mark.parametrize("name, variant", SWITCHES)
def test_each_switch_of_a_reference_matters(name, variant):
    """Without the switch, logits differ: windows are shorter than the sequence, and caps bite."""
    config, params, reference = load(variant)
    default = next(field.default for field in dataclasses.fields(config) if field.name == name)
    without = dataclasses.replace(config, **{name: default})
    change = np.abs(np.asarray(models.logits(without, params, None, reference["tokens"])) - reference["logits"]).max()
    assert change > 1e-2


@pytest.mark.parametrize("windows", [(2, 2), (3, 0)])
def test_gradients_reach_as_far_as_windows(windows):
    """Two layers with windows of 2 reach two positions back, within the row; exactly zero beyond."""
    config, params, _ = load("mistral")
    config = dataclasses.replace(config, windows=windows)
    reach_LxL = reach(config, params)
    tokens, _, segments = packed()
    distance = np.subtract.outer(np.arange(tokens.size), np.arange(tokens.size))
    furthest = tokens.size if 0 in windows else sum(window - 1 for window in windows)
    visible = (segments[0][:, None] == segments[0]) & (distance >= 0) & (distance <= furthest)
    assert (reach_LxL[~visible] == 0).all()
    assert (reach_LxL[visible] > 1e-6).all()


def reach(config, params):
    """The largest derivative of each hidden state of `packed` in each token, [L, L]."""
    tokens, positions, segments = packed()

    def hidden(embedding):
        changed = {"params": params | {"embed_tokens": embedding}}
        return decoder.Decoder(config).apply(changed, tokens, positions, segments)

    jacobian = jax.jit(jax.jacrev(hidden))(params["embed_tokens"])[0]  # [L, D, V, D]
    return np.abs(np.asarray(jacobian)[:, :, tokens[0]]).max(axis=(1, 3))  # each token occurs at one position


@pytest.mark.parametrize("variant", KINDS)
def test_gradients_reach_earlier_tokens_of_the_same_row_only(variant):
    config, params, _ = load(variant)
    reach_LxL = reach(config, params)
    _, _, segments = packed()
    same_row = segments[0][:, None] == segments[0]
    visible = same_row & np.tri(sum(LENGTHS), dtype=bool)
    assert (reach_LxL[~visible] == 0).all()
    assert (reach_LxL[visible] > 1e-6).all()


@pytest.mark.parametrize("variant", ["neox_parallel", "neox_sequential", "llama_gqa_tied", "llama_rope_llama3", "gemma3"])
def test_packed_rows_equal_rows_alone(variant):
    config, params, _ = load(variant)
    tokens, positions, segments = packed()
    together = models.logits(config, params, None, tokens, positions, segments)[0]
    alone = np.zeros((len(LENGTHS), max(LENGTHS)), int)
    for row, length in enumerate(LENGTHS):
        alone[row, :length] = tokens[segments == row + 1]
    alone = models.logits(config, params, None, alone)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(together[segments[0] == row + 1], alone[row, :length], rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", ["neox_parallel", "llama_gqa_tied", "gemma3"])
@pytest.mark.slow
def test_remat_changes_neither_values_nor_gradients(variant):
    config, params, reference = load(variant)

    def loss(config, params):
        return jnp.mean(decoder.logits(config, params, None, reference["tokens"]) ** 2)

    plain = jax.jit(jax.value_and_grad(functools.partial(loss, config)))(params)
    remat = dataclasses.replace(config, remat=True)
    remat = jax.jit(jax.value_and_grad(functools.partial(loss, remat)))(params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), plain, remat)


@pytest.mark.parametrize("variant", ["gemma2"])
def test_gradients_equal_autodiff(variant):
    """Of the NLL in an adapter, with caps and windows: derivatives by hand against those of `second_order`, by autodiff."""
    config, params, reference = load(variant)
    adapter, tokens = models.random_adapter(config, scale=0.1), reference["tokens"]

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def gradient(config, token_nll, adapter):
        def loss(adapter):
            variables = {"params": params, "adapter": adapter}
            positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
            hidden = decoder.Decoder(config).apply(variables, tokens, positions, positions // 15)  # three rows in a sequence
            targets = np.arange(64), tokens.reshape(-1)[1:65], np.int32(60)
            return token_nll(hidden.reshape(-1, config.hidden_size), decoder.head(params), *targets, config.logit_cap).sum()

        return jax.grad(loss)(adapter)

    ours = gradient(config, losses.token_nll, adapter)
    autodiff = gradient(dataclasses.replace(config, second_order=True), losses.token_nll_plain, adapter)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(autodiff)):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5 * np.abs(other).max())


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
    logits = models.logits(config, params, None, tokens)
    assert logits.dtype == jnp.float32
    error = np.linalg.norm(logits - reference["logits"]) / np.linalg.norm(reference["logits"])
    assert 0 < error < 0.05  # bfloat16 keeps 8 bits, 0.4%, and errors add up over two layers


def test_initial_parameters():
    """Matrices ~ N(0, 0.02), biases 0, norm weights 1, and a head only if it is not tied to the embedding."""
    config, _, _ = load("neox_parallel")
    config = dataclasses.replace(config, hidden_size=256, intermediate_size=256, head_dim=64)
    params = models.init_params(config, jax.random.key(0))
    for path, leaf in jax.tree_util.tree_flatten_with_path(nn.unbox(params))[0]:
        name = path[-1].key
        if name in ("bias", "scale"):
            assert (leaf == (name == "scale")).all()
        else:
            assert abs(float(leaf.std()) / 0.02 - 1) < 0.05, path
    tied = models.init_params(dataclasses.replace(config, tie_embeddings=True), jax.random.key(0))
    assert "lm_head" in params and "lm_head" not in tied

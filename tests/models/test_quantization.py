"""Quantised kernels against the published algorithms by hand, and quantised models against models of the dequantised weights."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from bilevel_jax import decoding, sampling, sharding
from bilevel_jax.models import decoder, huggingface, lora, quantization
from bilevel_jax.planning import memory
from bilevel_jax.runtime import checkpoint
from tests.models import models

ROOT = pathlib.Path(__file__).parents[2]
TINY = huggingface.PACKAGE / "tiny"
dequantize = jax.jit(quantization.dequantize, static_argnums=1)


def kernel(inputs=128, outputs=24, seed=0):
    return np.random.default_rng(seed).standard_t(4, size=(inputs, outputs)).astype(np.float32)


# --------------------------------------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------------------------------------


def test_values_of_nf4():
    """Quantiles of the normal distribution as in the paper: 8 positive, 7 negative, and zero, over the largest."""
    from scipy.stats import norm

    outermost = 0.5 * ((1 - 1 / 30) + (1 - 1 / 32))
    above, below = norm.ppf(np.linspace(outermost, 0.5, 9)[:-1]), -norm.ppf(np.linspace(outermost, 0.5, 8)[:-1])
    values = np.sort(np.concatenate([above, [0.0], below]))
    np.testing.assert_allclose(quantization.NF4, values / values.max(), atol=2e-6)


def test_values_of_magnitudes():
    """Zero, one, and 2^i means in the decade 10^(i-7) to 10^(i-6), both signs."""
    values = quantization.dynamic_map()
    assert len(values) == 256 and np.all(np.diff(values) > 0) and {0.0, 1.0} <= set(values.tolist())
    np.testing.assert_allclose(values[values < 0], -values[(values > 0) & (values < 1)][::-1])
    for i in range(7):
        inside = values[(values > 10.0 ** (i - 7)) & (values < 10.0 ** (i - 6))]
        np.testing.assert_allclose(inside, 10.0 ** (i - 6) * (0.1 + 0.9 * (np.arange(2**i) + 0.5) / 2**i), rtol=1e-5)


def test_magnitudes_are_looked_up_alike():
    codes = np.arange(256).reshape(2, 128)
    for look_up in (quantization.gather_magnitudes, quantization.select_magnitudes):
        np.testing.assert_array_equal(jax.jit(look_up)(codes), quantization.dynamic_map()[codes])


def test_weights_are_looked_up_alike():
    codes = np.arange(16).reshape(2, 8)
    for look_up in (quantization.gather_weights, quantization.select_weights):
        np.testing.assert_array_equal(jax.jit(look_up)(codes), quantization.NF4[codes])


def test_codes_of_nf4():
    """Every weight has the nearest value of its block of 64 inputs."""
    weights = kernel()
    arrays = quantization.quantize("nf4", weights)
    blocks = weights.reshape(2, 64, 24)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    distance = np.abs((blocks / largest)[..., None] - quantization.NF4)
    np.testing.assert_array_equal(arrays["codes"].astype(int).reshape(blocks.shape), distance.argmin(-1))
    centred = (largest[:, 0] - largest.mean()).T.ravel()  # as rows of Hugging Face's matrices
    assert arrays["magnitude_scale"] == pytest.approx(np.abs(centred).max(), rel=1e-6)
    codes = np.abs(centred[:, None] / np.abs(centred).max() - quantization.dynamic_map()).argmin(-1)
    np.testing.assert_array_equal(arrays["magnitude_codes"].T.ravel(), codes)


def test_groups_of_magnitudes_run_over_rows():
    """24 · 15 blocks: a group of 256 and one of 104, each with its largest deviation from the mean."""
    arrays = quantization.quantize("nf4", kernel(960))
    largest = np.abs(kernel(960).T.reshape(-1, 64)).max(axis=1)
    centred = np.abs(largest - largest.mean())
    np.testing.assert_allclose(arrays["magnitude_scale"], [centred[:256].max(), centred[256:].max()], rtol=1e-6)


@pytest.mark.parametrize("kind, most", [("nf4", 0.16), ("int8", 0.5 / 127)])
def test_errors_of_weights(kind, most):
    """Half the widest step between two values, over the largest weight of the block or the output, and a bit for magnitudes."""
    weights = kernel()
    back = np.asarray(dequantize(quantization.quantize(kind, weights), "float32"))
    blocks = (2, 64, 24) if kind == "nf4" else (1, 128, 24)
    largest = np.abs(weights.reshape(blocks)).max(axis=1, keepdims=True)
    assert (np.abs(back - weights).reshape(blocks) / largest).max() < most * 1.02
    assert np.abs(back - weights).max() > 0


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_zeros_stay_zeros(kind):
    weights = kernel()
    weights[:, 3] = 0
    arrays = quantization.quantize(kind, weights)
    assert not np.asarray(dequantize(arrays, "bfloat16")).astype(np.float32)[:, 3].any()


def test_int8_by_hand():
    weights = np.array([[1.0, 0.0], [-2.0, 0.5], [0.511811, -0.25]], np.float32)
    arrays = quantization.quantize("int8", weights)
    np.testing.assert_array_equal(arrays["codes"], [[64, 0], [-127, 127], [32, -64]])  # 63.5 and 63.5: to even
    np.testing.assert_array_equal(arrays["magnitude"], [2.0, 0.5])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_shapes_are_those_of_quantised_kernels(kind):
    arrays = quantization.quantize(kind, kernel(960))
    expected = quantization.shapes(kind, 960, 24)
    assert {name: (array.shape, jnp.dtype(array.dtype)) for name, array in arrays.items()} == {
        name: (shape, jnp.dtype(dtype)) for name, (shape, dtype) in expected.items()
    }
    drawn = quantization.random(kind, jax.random.key(0), 960, 24)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), drawn) == jax.tree.map(lambda x: (x.shape, jnp.dtype(x.dtype)), arrays)
    assert 0.01 < np.std(dequantize(drawn, "float32")) < 0.04


# --------------------------------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------------------------------


def load(kind, dtype="float32"):
    return huggingface.load_model(str(TINY), dtype, kind)


@jax.jit
def in_full(kernel):
    return jax.vmap(lambda one: quantization.dequantize(one, "float32"))(kernel)


def dequantised(config, base):
    """The model in which dequantised weights stand in for the base."""
    layers = {name: dict(content) for name, content in base["layers"].items()}
    for name, (module, _, _) in lora.projections(config).items():
        layers[module][name] = layers[module][name] | {"kernel": in_full(layers[module][name]["kernel"])}
    return dataclasses.replace(config, quantization="none"), base | {"layers": layers}


@jax.jit
def tokens():
    return jax.random.randint(jax.random.key(3), (2, 24), 0, 1000)


@pytest.fixture(scope="module", params=["nf4", "int8"])
def quantised(request):
    return load(request.param)


def test_loading_quantises_the_layers_alone(quantised):
    config, base = quantised
    _, plain = load("none")
    np.testing.assert_array_equal(base["embed_tokens"], plain["embed_tokens"])
    np.testing.assert_array_equal(base["lm_head"], plain["lm_head"])
    mine, reference = base["layers"]["mlp"]["dense_h_to_4h"], plain["layers"]["mlp"]["dense_h_to_4h"]
    np.testing.assert_array_equal(mine["bias"], reference["bias"])
    for i in (0, config.num_layers - 1):
        expected = quantization.quantize(config.quantization, np.asarray(reference["kernel"][i]))
        for name, array in expected.items():
            np.testing.assert_array_equal(mine["kernel"][name][i], array)
    shapes = memory.base_shapes(config)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), base) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)


def loss_and_gradient(config, base, adapter):
    def loss(adapter, base):
        logits = decoder.logits(config, base, adapter, tokens())
        return -jax.nn.log_softmax(logits[:, :-1])[..., 7].mean()

    return jax.jit(jax.value_and_grad(loss))(adapter, base)


@pytest.mark.parametrize("remat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_losses_and_gradients_equal_those_of_the_dequantised_weights(quantised, remat):
    adapter = models.random_adapter(quantised[0])
    pair = [(dataclasses.replace(config, remat=remat), base) for config, base in (quantised, dequantised(*quantised))]
    (mine, gradient), (expected, expected_gradient) = (loss_and_gradient(config, base, adapter) for config, base in pair)
    np.testing.assert_allclose(mine, expected, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(b).max())


def test_decoding_equals_that_of_the_dequantised_weights(quantised):
    """Greedy responses of a sampler, whose adapter is merged for the one and applied beside the weights for the other."""
    adapter = models.random_adapter(quantised[0])
    prompts, keys = [np.array([5, 9, 300]), np.arange(20, 60)], np.zeros((2, 1, 2), np.uint32)
    responses = []
    for config, base in (quantised, dequantised(*quantised)):
        settings = sampling.Settings(temperature=0, max_new_tokens=12)
        sample = sampling.make_sampler(config, settings, (), slots=2, length=128, mesh=sharding.make_mesh(1))
        responses.append(sample(base, adapter, prompts, keys))
    assert not decoding.merges_adapter(quantised[0])
    for (mine,), (expected,) in zip(*responses):
        np.testing.assert_array_equal(mine.ids, expected.ids)
        np.testing.assert_allclose(mine.log_probs, expected.log_probs, atol=1e-4)


def test_one_layer_is_dequantised_at_a_time(quantised):
    """No array of the traced loss has the weights of all layers."""
    config, base = quantised
    jaxpr = str(jax.make_jaxpr(lambda base: decoder.logits(config, base, None, tokens()))(base))
    assert "f32[128,512]" in jaxpr and "f32[4,128,512]" not in jaxpr


def test_fingerprints_differ(quantised):
    config, base = quantised
    changed = jax.tree.map(lambda x: x, base)
    codes = changed["layers"]["mlp"]["dense_h_to_4h"]["kernel"]["codes"]
    changed["layers"]["mlp"]["dense_h_to_4h"]["kernel"]["codes"] = codes.at[1, 2, 3].set(codes[1, 2, 3] ^ 1)
    prints = {checkpoint.fingerprint_model(tree, []) for tree in (base, changed, load("none")[1])}
    assert len(prints) == 3


def test_shardings_are_those_of_the_kernel():
    mesh = memory.make_mesh(1, 2, 2)
    layers = sharding.weight_shardings(mesh, memory.base_shapes(load("nf4")[0]))["layers"]
    parts = {name: x.spec for name, x in layers["mlp"]["dense_h_to_4h"]["kernel"].items()}
    assert parts["codes"] == parts["magnitude_codes"] == P(None, ("fsdp",), ("tensor",))
    assert parts["magnitude_scale"] == P(None, None) or parts["magnitude_scale"] == P(None)
    assert layers["attention"]["dense"]["kernel"]["codes"].spec == P(None, ("tensor",), ("fsdp",))


def logits_on_four_devices(path: str):
    """Writes logits of the quantised model, split over `fsdp` and `tensor`. Runs in a process of its own."""
    mesh = sharding.make_mesh(1, 2, 2)
    config = huggingface.read_config(TINY, quantization="nf4")
    base = huggingface.load_params(TINY, config, mesh)
    shard = base["layers"]["mlp"]["dense_h_to_4h"]["kernel"]["codes"].addressable_shards[0].data
    assert shard.shape == (4, 128 // 2, 512 // 2)
    with jax.set_mesh(mesh):
        np.save(path, jax.jit(lambda base: decoder.logits(config, base, None, tokens()))(base))


@pytest.mark.slow
def test_a_mesh_gives_the_same_logits(tmp_path):
    path = tmp_path / "logits.npy"
    command = f"from tests.models import test_quantization; test_quantization.logits_on_four_devices({str(path)!r})"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    config, base = load("nf4")
    np.testing.assert_allclose(np.load(path), decoder.logits(config, base, None, tokens()), atol=1e-4)


def test_blocks_must_divide_the_inputs():
    fixture = models.FIXTURES / "llama_mha"
    with pytest.raises(
        huggingface.ModelError, match=r"nf4 has blocks of 64 inputs, which do not divide the \d+ of q_proj; take int8"
    ):
        huggingface.read_config(fixture, quantization="nf4")
    assert huggingface.read_config(fixture, quantization="int8").quantization == "int8"


def test_full_adapters_are_not_merged_into_codes(quantised):
    config, base = quantised
    weights, adapter = decoding.make_weights(config, sharding.make_mesh(1))(base, models.random_adapter(config))
    assert weights is base and adapter is models.random_adapter(config)

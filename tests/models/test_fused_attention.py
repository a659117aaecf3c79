"""The kernels of fused attention, interpreted, against the XLA path; and when they are chosen."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax import config as configuration
from bilevel_jax import startup_checks
from bilevel_jax.models import attention, decoder, fused_attention, layer_settings, model_config

LENGTH = 256
SEGMENTS = np.array([np.repeat([1, 2, 0], [100, 120, 36]), np.repeat([1, 2, 3], [10, 200, 46])], np.int32)  # 0: padding
TINY = model_config.ModelConfig(
    architecture="llama",
    vocab_size=11,
    hidden_size=16,
    intermediate_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    rotary_dim=8,
    max_positions=256,
    activation="silu",
    norm_eps=1e-5,
    rope_theta=1e4,
    windows=(20, 0),
)


def arrays(key_heads, heads, width, dtype=np.float32):
    """q, k, v and the cotangent of the result."""
    rng = np.random.default_rng(0)
    q, c = rng.normal(size=(2, 2, LENGTH, heads, width))
    k, v = rng.normal(size=(2, 2, LENGTH, key_heads, width))
    return [jnp.asarray(x, dtype) for x in (2 * q, k, v, c)]


@functools.partial(jax.jit, static_argnums=(0, 6, 7))
def with_gradients(kernel, q, k, v, c, window, cap, windows):
    """Results and gradients of the kernel, and those of the XLA path."""

    def run(function):
        result, pull = jax.vjp(function, q, k, v)
        return result, *pull(c)

    fused = functools.partial(fused_attention.attend, kernel, windows=windows, interpret=True)
    return [run(lambda *qkv, f=f: f(*qkv, SEGMENTS, None, window, cap)) for f in (fused, attention.attend)]


@pytest.mark.parametrize(
    "kernel, shape, window, cap, windows",
    [
        ("splash", (2, 6, 24), None, None, ()),
        ("splash", (1, 2, 64), 70, 0.8, (70,)),
        ("splash", (2, 2, 8), 40, None, (40, layer_settings.EVERYTHING)),
        ("triton", (2, 6, 24), None, None, ()),
        ("triton", (2, 2, 256), None, None, ()),
    ],
    ids=["splash-grouped", "splash-window-cap", "splash-windows", "triton-grouped", "triton-wide"],
)
def test_the_kernel_equals_the_xla_path(kernel, shape, window, cap, windows):
    """Also with the other window of the same compiled function, and exact zeros where a gradient crosses segments."""
    *qkv, c = arrays(*shape)
    fused, xla = with_gradients(kernel, *qkv, c, window and jnp.int32(window), cap, windows)
    for ours, expected in zip(fused, xla):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5)
    of_one = c * (SEGMENTS == 2)[:, :, None, None]
    gradients = with_gradients(kernel, *qkv, of_one, window and jnp.int32(window), cap, windows)[0][1:]
    for gradient in map(np.asarray, gradients):
        assert not gradient[SEGMENTS != 2].any() and gradient[SEGMENTS == 2].any()
    if len(windows) == 2:
        fused, xla = with_gradients(kernel, *qkv, c, jnp.int32(windows[1]), cap, windows)
        for ours, expected in zip(fused, xla):
            np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kernel", fused_attention.KERNELS.values())
def test_the_kernel_equals_the_xla_path_in_bfloat16(kernel):
    """A rounding of bfloat16 is 2^-9 of a value; both paths round factors and results."""
    fused, xla = with_gradients(kernel, *arrays(1, 2, 64, jnp.bfloat16), None, None, ())
    for ours, expected in zip(fused, xla):
        assert ours.dtype == expected.dtype == jnp.bfloat16
        ours, expected = (np.asarray(x, np.float32) for x in (ours, expected))
        assert np.linalg.norm(ours - expected) < 2**-7 * np.linalg.norm(expected)


def decoder_gradients(config, length):
    """A function of the weights of a decoder: the gradients of a sum over its hidden states. And such weights."""
    shapes = jax.eval_shape(lambda: decoder.init_params(config, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.3).astype(np.float32), shapes)
    tokens = np.arange(2 * length).reshape(2, length) % 11
    segments = np.where(np.arange(length) < length // 3, 1, 2) * np.ones_like(tokens)

    def total(params):
        return jnp.sum(jnp.sin(3 * decoder.Decoder(config).apply({"params": params}, tokens, tokens, segments)))

    return jax.grad(total), params


@pytest.mark.parametrize(
    "kernel, change, rtol, atol",
    [("splash", {}, 1e-3, 1e-4), ("triton", {"windows": (), "dtype": "bfloat16"}, 0, 2**-6)],
    ids=["tpu", "gpu"],
)
def test_a_decoder_with_the_kernel(monkeypatch, kernel, change, rtol, atol):
    """Layers, scanned and rematerialised; on a TPU with and without a window."""
    monkeypatch.setattr(fused_attention, "attend", functools.partial(fused_attention.attend, interpret=True))
    fused, xla = (dataclasses.replace(TINY, attention=kind, **change) for kind in (kernel, "xla"))
    (fused, params), (xla, _) = decoder_gradients(fused, 128), decoder_gradients(xla, 128)
    for ours, expected in zip(*map(jax.tree.leaves, (jax.jit(fused)(params), jax.jit(xla)(params)))):
        np.testing.assert_allclose(ours, expected, rtol=rtol, atol=atol * np.abs(expected).max())


@pytest.mark.parametrize("length, second_order, takes_kernel", [(128, False, True), (50, False, False), (128, True, False)])
def test_other_lengths_and_second_derivatives_take_the_xla_path(length, second_order, takes_kernel):
    config = dataclasses.replace(TINY, attention="splash", second_order=second_order)
    gradients, params = decoder_gradients(config, length)
    assert ("pallas_call" in str(jax.make_jaxpr(gradients)(params))) == takes_kernel


@pytest.mark.parametrize(
    "setting, platform, length, change, tensor, expected",
    [
        ("auto", "tpu", 2048, {}, 1, "splash"),
        ("fused", "tpu", 384, {}, 1, "splash"),
        ("fused", "gpu", 384, {"windows": (), "dtype": "bfloat16"}, 1, "triton"),
        ("fused", "gpu", 384, {"windows": (400, 0), "dtype": "bfloat16"}, 1, "triton"),
        ("xla", "tpu", 2048, {}, 1, "xla"),
        ("auto", "cpu", 2048, {}, 1, "xla"),
        ("auto", "gpu", 2048, {}, 1, "xla"),
        ("auto", "tpu", 1000, {}, 1, "xla"),
        ("auto", "tpu", 2048, {}, 2, "xla"),
        ("auto", "tpu", 2048, {"head_dim": 512}, 1, "xla"),
        ("fused", "cpu", 2048, {}, 1, "the kernels are for TPUs and GPUs, and this run is for a CPU; set model.attention=xla"),
        ("fused", "gpu", 2048, {}, 1, "neither sliding windows nor soft caps, and this model does; set model.attention=xla"),
        ("fused", "gpu", 2048, {"windows": (), "attention_cap": 50.0}, 1, "neither sliding windows nor soft caps"),
        ("fused", "gpu", 2048, {"windows": ()}, 1, "model.dtype is float32; set model.dtype=bfloat16 or model.attention=xla"),
        ("fused", "tpu", 1000, {}, 1, "128 positions, and rows have 1000; set data.max_length=896 or model.attention=xla"),
        ("fused", "tpu", 2048, {}, 2, "mesh.tensor=2 does not divide the 1 key heads of this model; set mesh.tensor=1 or"),
        ("fused", "tpu", 2048, {"head_dim": 512}, 1, "heads up to 256 wide, and those of this model are 512 wide"),
    ],
)
def test_choice(setting, platform, length, change, tensor, expected):
    config = configuration.Config(
        model=configuration.Model(attention=setting), data=dataclasses.replace(configuration.Data(), max_length=length)
    )
    arguments = config, dataclasses.replace(TINY, **change), platform, tensor
    if expected in ("xla", *fused_attention.KERNELS.values()):
        kind, reason = startup_checks.resolve_attention(*arguments)
        assert kind == expected and bool(reason) == (kind == "xla" and (setting, platform) == ("auto", "tpu"))
        return
    with pytest.raises(configuration.ConfigError) as error:
        startup_checks.resolve_attention(*arguments)
    assert str(error.value).startswith("model.attention=fused: ") and expected in str(error.value)

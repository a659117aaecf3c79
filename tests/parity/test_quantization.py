"""Quantised kernels against `bitsandbytes` on random tensors, to the last bit: `make parity`."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
functional = pytest.importorskip("bitsandbytes.functional")

from bilevel_jax.models import quantization

pytestmark = pytest.mark.parity
SHAPES = [(96, 128), (512, 576), (300, 1536), (1024, 2048)]  # outputs, inputs; the third does not fill its last group
dequantize = jax.jit(quantization.dequantize, static_argnums=1)


def draw(shape, dtype):
    """A matrix as in Hugging Face's files, with rare large weights, and rows of zeros."""
    weight = np.random.default_rng(shape[1]).standard_t(4, size=shape).astype(np.float32) * 0.02
    weight[3:5] = 0
    return torch.tensor(weight).to(dtype)


def quantised(weight):
    """Our arrays, and the codes [O, I] and the state of `bitsandbytes`."""
    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    nibbles = packed.numpy().ravel()
    codes = np.stack([nibbles >> 4, nibbles & 15], axis=1).reshape(weight.shape)
    return quantization.quantize("nf4", weight.float().numpy().T), codes, packed, state


def test_constants():
    np.testing.assert_array_equal(quantization.NF4, functional.get_4bit_type("nf4", "cpu").numpy())
    np.testing.assert_array_equal(quantization.dynamic_map(), functional.create_dynamic_map().numpy())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_nf4(shape, dtype):
    """Codes, magnitudes in eight bits and their scales.

    The mean of the magnitudes is a sum whose order `bitsandbytes` leaves to PyTorch, so it may differ in its last bits; given the
    same mean all else is equal. For eight bits its CPU kernel searches a coarse table and may miss the nearest value by
    little; the one for float64 does not.
    """
    weight = draw(shape, getattr(torch, dtype))
    ours, codes, _, state = quantised(weight)
    np.testing.assert_array_equal(ours["codes"].T.astype(np.uint8), codes)
    np.testing.assert_allclose(ours["magnitude_mean"], state.offset.numpy(), rtol=1e-6)

    plain = functional.quantize_4bit(weight, blocksize=64, compress_statistics=False, quant_type="nf4")[1].absmax
    given = quantization.quantize_magnitudes(plain.numpy().reshape(shape[0], -1), state.offset.numpy())
    np.testing.assert_array_equal(given["magnitude_scale"], state.state2.absmax.numpy())
    centred = (plain - state.offset).double()
    exact, _ = torch.ops.bitsandbytes.quantize_blockwise.default(centred, functional.create_dynamic_map(), 256)
    np.testing.assert_array_equal(given["magnitude_codes"].T.ravel(), exact.numpy())
    values = quantization.dynamic_map()
    difference = np.abs(values[exact.numpy()] - values[state.absmax.numpy()])
    assert difference.max() < 0.02 and np.mean(difference > 0) < 0.02


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantised_nf4(shape, dtype):
    weight = draw(shape, getattr(torch, dtype))
    ours, _, packed, state = quantised(weight)
    state.absmax = torch.tensor(np.ascontiguousarray(ours["magnitude_codes"].T.ravel()))
    state.offset, state.state2.absmax = torch.tensor(ours["magnitude_mean"]), torch.tensor(ours["magnitude_scale"])
    expected = functional.dequantize_4bit(packed, state).float().numpy()
    np.testing.assert_array_equal(np.asarray(dequantize(ours, dtype)).astype(np.float32).T, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_int8(shape):
    """The weights of LLM.int8, from float16 as there, and as float32 numbers."""
    weight = draw(shape, torch.float16)
    codes, magnitude, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(weight.clone(), 0.0)
    ours = quantization.quantize("int8", weight.float().numpy().T)
    np.testing.assert_array_equal(ours["magnitude"], magnitude.numpy())
    zeros = weight.numpy().any(axis=1)  # rows of zeros are 0 / 0 there
    np.testing.assert_array_equal(ours["codes"].T[zeros], codes.numpy()[zeros])
    expected = functional.int8_vectorwise_dequant(codes, magnitude).numpy()
    np.testing.assert_array_equal(np.asarray(dequantize(ours, "float32")).T[zeros], expected[zeros])

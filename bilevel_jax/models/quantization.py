"""Weights of linear layers in few bits.

- `nf4`: QLoRA (Dettmers et al. 2023). Blocks of 64 inputs of one output share a largest magnitude m, and a weight is m times one of
  16 fixed values. The magnitudes themselves have 8 bits, in groups of 256 with a float32 scale each, after their mean is taken off.
- `int8`: the weights of one output share a largest magnitude m, and a weight is m / 127 times an integer: the weights of LLM.int8
  (Dettmers et al. 2022). Inputs are not quantised, so they need no outliers.

Values, blocks, groups and rounding are those of `bitsandbytes`; the arrays have the layout of our kernels, so that they are sharded
alike. A layer dequantises its weights when it uses them.

Axes: I inputs and O outputs of a product, B = I / 64 blocks of an output, G groups.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

KINDS = ("none", "nf4", "int8")
BLOCK = 64  # weights that share a magnitude
GROUP = 256  # magnitudes that share a scale
TINY = np.float32(1e-36)

# The 16 values of NF4, from the QLoRA paper: quantiles of a normal distribution, with a zero, scaled to [-1, 1].
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
        *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


def _steps(number: int) -> np.ndarray:
    """From 0.1 to 1 in equal steps, with the rounding of `torch.linspace`, which counts from both ends."""
    step, i = float((np.float32(1) - np.float32(0.1)) / np.float32(number)), np.arange(number + 1)
    upwards, downwards = float(np.float32(0.1)) + step * i, 1 - step * (number - i)
    return np.where(i < (number + 1) // 2, upwards, downwards).astype(np.float32)


@functools.cache
def dynamic_map() -> np.ndarray:
    """The 256 values of a magnitude, sorted: seven decades, each with twice as many steps as the one below (Dettmers 2016)."""
    values = [0.0, 1.0]
    for i in range(7):
        means = (_steps(2**i)[:-1] + _steps(2**i)[1:]) / np.float32(2)
        for sign in (1, -1):
            values += (np.float32(sign * 10.0 ** (i - 6)) * means).tolist()
    return np.sort(np.array(values, np.float32))


def _nearest(values: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The index of the nearest of some sorted values, uint8; of two, the lower one."""
    middle = (values[:-1] + values[1:]) / np.float32(2)
    if len(values) > 16:
        return np.searchsorted(middle, x, side="left").astype(np.uint8)
    index = np.zeros(x.shape, np.uint8)
    for bound in middle:  # faster than a search, for so few
        index += x > bound
    return index


def _scaled(x_BxW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows over their largest magnitude, and these magnitudes [B]."""
    largest_B = np.abs(x_BxW).max(axis=1)
    return np.clip(x_BxW * (np.float32(1) / np.maximum(largest_B, TINY))[:, None], -1, 1), largest_B


# --------------------------------------------------------------------------------------------------------------------
# On the host, while loading
# --------------------------------------------------------------------------------------------------------------------


def quantize(kind: str, kernel_IxO: np.ndarray) -> dict[str, np.ndarray | np.float32]:
    """The arrays of a kernel, see `shapes`."""
    weight_OxI = np.ascontiguousarray(kernel_IxO.T, np.float32)
    if kind == "int8":
        largest_O = np.abs(weight_OxI).max(axis=1)
        codes = np.round(weight_OxI * (np.float32(1) / np.maximum(largest_O, TINY) * np.float32(127))[:, None])
        return {"codes": codes.T.astype(np.int8), "magnitude": largest_O}
    outputs, inputs = weight_OxI.shape
    codes, magnitudes = np.empty((outputs, inputs), np.uint8), np.empty((outputs, inputs // BLOCK), np.float32)
    for rows in (slice(i, i + 64) for i in range(0, outputs, 64)):  # stays in the cache of a processor
        scaled, largest = _scaled(weight_OxI[rows].reshape(-1, BLOCK))
        codes[rows], magnitudes[rows] = _nearest(NF4, scaled).reshape(-1, inputs), largest.reshape(-1, inputs // BLOCK)
    mean = magnitudes.mean(dtype=np.float64).astype(np.float32)
    return {"codes": codes.T.astype(ml_dtypes.uint4), **quantize_magnitudes(magnitudes, mean)}


def quantize_magnitudes(magnitude_OxB: np.ndarray, mean: np.float32) -> dict[str, np.ndarray | np.float32]:
    """Double quantisation: the magnitudes of all blocks in 8 bits. Groups run over the ends of rows."""
    centred = (magnitude_OxB - mean).ravel()
    padded = np.pad(centred, (0, -centred.size % GROUP)).reshape(-1, GROUP)
    scaled_GxW, scale_G = _scaled(padded)
    codes = _nearest(dynamic_map(), scaled_GxW).ravel()[: centred.size].reshape(magnitude_OxB.shape)
    return {"magnitude_codes": codes.T, "magnitude_scale": scale_G, "magnitude_mean": mean}


# --------------------------------------------------------------------------------------------------------------------
# On the devices
# --------------------------------------------------------------------------------------------------------------------


def shapes(kind: str, inputs: int, outputs: int) -> dict[str, tuple[tuple[int, ...], type]]:
    """Shape and dtype of the arrays that stand for a kernel."""
    if kind == "int8":
        return {"codes": ((inputs, outputs), jnp.int8), "magnitude": ((outputs,), jnp.float32)}
    blocks = inputs // BLOCK
    return {
        "codes": ((inputs, outputs), jnp.uint4),
        "magnitude_codes": ((blocks, outputs), jnp.uint8),
        "magnitude_scale": ((-(-blocks * outputs // GROUP),), jnp.float32),
        "magnitude_mean": ((), jnp.float32),
    }


def random(kind: str, key: jax.Array, inputs: int, outputs: int) -> dict[str, jax.Array]:
    """A random kernel. Its weights are even over the codes, up to 0.04."""
    arrays = {name: jnp.zeros(shape, dtype) for name, (shape, dtype) in shapes(kind, inputs, outputs).items()}
    codes = jax.random.bits(key, (inputs, outputs), jnp.uint8)
    arrays["codes"] = codes.astype(jnp.int8) if kind == "int8" else (codes % 16).astype(jnp.uint4)
    magnitude = "magnitude" if kind == "int8" else "magnitude_mean"
    return arrays | {magnitude: jnp.full_like(arrays[magnitude], 0.04)}


def gather_weights(code: jax.Array) -> jax.Array:
    """`NF4[code]`, from memory. For a GPU, XLA would hold an array of the size of `code` for each of the values to select from."""
    return jnp.asarray(NF4)[code]


def select_weights(code: jax.Array) -> jax.Array:
    """`NF4[code]`, by halves. A TPU gathers far more slowly than it selects 15 times."""
    candidates = [jnp.float32(value) for value in NF4]
    while len(candidates) > 1:
        is_odd = (code & 1).astype(bool)
        candidates = [jnp.where(is_odd, odd, even) for even, odd in zip(candidates[::2], candidates[1::2])]
        code = code >> 1
    return candidates[0]


def gather_magnitudes(codes: jax.Array) -> jax.Array:
    """Values of `dynamic_map`, from memory."""
    return jnp.asarray(dynamic_map())[codes]


def select_magnitudes(codes: jax.Array) -> jax.Array:
    """Values of `dynamic_map`, as a sum over all of them in which one is not 0. A TPU gathers far more slowly."""
    return jnp.where(codes[..., None] == jnp.arange(256), jnp.asarray(dynamic_map()), 0.0).sum(axis=-1)


def dequantize(kernel: dict[str, jax.Array], dtype) -> jax.Array:
    """The weights [I, O], computed in float32 and rounded once."""
    codes_IxO = kernel["codes"]
    if "magnitude" in kernel:
        return (codes_IxO.astype(jnp.float32) * kernel["magnitude"] * np.float32(1 / 127)).astype(dtype)
    blocks, outputs = kernel["magnitude_codes"].shape
    scale_BxO = jnp.repeat(kernel["magnitude_scale"], GROUP)[: blocks * outputs].reshape(outputs, blocks).T
    codes_BxO = kernel["magnitude_codes"].astype(jnp.int32)
    centred_BxO = jax.lax.platform_dependent(codes_BxO, tpu=select_magnitudes, default=gather_magnitudes) * scale_BxO
    # The maximum changes no value. It keeps a compiler from rounding product and sum once, as one operation.
    magnitude_BxO = jnp.maximum(centred_BxO, jnp.finfo(jnp.float32).min) + kernel["magnitude_mean"]
    on_gpu = {"cuda": gather_weights, "rocm": gather_weights}
    weight_IxO = jax.lax.platform_dependent(codes_IxO.astype(jnp.int32), **on_gpu, default=select_weights)
    return (weight_IxO.reshape(blocks, BLOCK, outputs) * magnitude_BxO[:, None]).reshape(codes_IxO.shape).astype(dtype)

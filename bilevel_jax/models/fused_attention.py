"""Attention of packed sequences in one kernel: `model.attention`.

The kernels are JAX's, `splash` for TPUs and `triton` for GPUs. They keep scores in the memory of the core, and skip blocks of keys
that are later than the queries; `splash` also those farther back than the window. XLA cannot split a kernel over devices, so on a
mesh each device runs it on its own sequences and heads.

Axes: S sequences, L positions, H query heads, K key/value heads, C head width.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from bilevel_jax import sharding
from bilevel_jax.models import attention, layer_settings, model_config

KINDS = ("auto", "xla", "fused")  # of a config
KERNELS = {"tpu": "splash", "gpu": "triton"}  # by platform
BLOCKS = (512, 256, 128)  # positions of a block of queries or keys of `splash`, the best first
TRITON_BLOCKS = {64: (128, 128), 128: (128, 128), 256: (64, 32)}  # by width; JAX's own, smaller where a core has no room for them
TRITON_BACKWARD = 32  # positions of all blocks of its backward pass, as in JAX
WIDTHS = (64, 128, 256)  # of heads; narrower ones are padded with zeros


def problem(kernel: str, model: model_config.ModelConfig, length: int, tensor: int) -> tuple[str, str]:
    """Why a kernel cannot take a model, and the key to set; both empty if it can.

    Args:
      kernel: of `KERNELS`.
      model: with heads of width C, and K key/value heads.
      length: L.
      tensor: length of the axis of the mesh that splits heads.
    """
    width, key_heads = model.head_dim, model.num_kv_heads
    if width > WIDTHS[-1]:
        return f"the kernel takes heads up to {WIDTHS[-1]} wide, and those of this model are {width} wide", ""
    if key_heads % tensor:
        fitting = math.gcd(key_heads, tensor)
        return f"mesh.tensor={tensor} does not divide the {key_heads} key heads of this model", f"mesh.tensor={fitting}"
    if not _block(length):
        near = max(BLOCKS[-1], length // BLOCKS[-1] * BLOCKS[-1])
        return f"the kernel takes multiples of {BLOCKS[-1]} positions, and rows have {length}", f"data.max_length={near}"
    if kernel == "triton" and (model.attention_cap or layer_settings.distinct_windows(model, length)):
        return "the kernel for GPUs has neither sliding windows nor soft caps, and this model does", ""
    if kernel == "triton" and model.dtype == "float32":
        return "the kernel for GPUs rounds float32 products, and model.dtype is float32", "model.dtype=bfloat16"
    return "", ""


def _block(length: int) -> int:
    """The length of a block; 0 if none divides `length`."""
    return next((block for block in BLOCKS if length % block == 0), 0)


def takes(model: model_config.ModelConfig, length: int) -> bool:
    """Whether sequences of this length take the kernel of a model, `model.attention`, on the mesh of `jax.set_mesh`."""
    if model.attention not in KERNELS.values():
        return False
    mesh = jax.sharding.get_abstract_mesh()
    return problem(model.attention, model, length, 1 if mesh.empty else sharding.num_parts(mesh, "heads")) == ("", "")


def attend(
    kernel: str,
    q_SxLxHxC: jax.Array,
    k_SxLxKxC: jax.Array,
    v_SxLxKxC: jax.Array,
    segments_SxL: jax.Array,
    dtype=None,
    window: jax.Array | None = None,
    cap: float | None = None,
    windows: tuple[int, ...] = (),
    interpret: bool = False,
) -> jax.Array:
    """`attention.attend` for models and lengths that `takes` accepts.

    Args:
      kernel: of `KERNELS`.
      q_SxLxHxC, k_SxLxKxC, v_SxLxKxC, segments_SxL, dtype, window, cap: as there. The result is rounded to `dtype` too.
      windows: all values that `window` can have. The kernel is compiled for each.
      interpret: run the kernel as XLA operations, on any device.
    """
    L, C = q_SxLxHxC.shape[1], q_SxLxHxC.shape[3]
    dtype = dtype or q_SxLxHxC.dtype
    scaled = q_SxLxHxC.astype(jnp.float32) * C**-0.5
    padding = ((0, 0),) * 3 + ((0, next(width for width in WIDTHS if width >= C) - C),)
    q, k, v = (jnp.pad(x.astype(dtype), padding) for x in (scaled, k_SxLxKxC, v_SxLxKxC))
    if kernel == "splash":
        kernels = [functools.partial(_splash, window=size, cap=cap, interpret=interpret) for size in windows or (L,)]
    else:
        kernels = [functools.partial(_triton, interpret=interpret)]
    index = jnp.int32(0) if window is None else jnp.argmax(jnp.array(windows) == window)

    def choose(index, *arrays):
        return kernels[0](*arrays) if len(kernels) == 1 else jax.lax.switch(index, kernels, *arrays)

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        queries, keys = (sharding.spec(mesh, x.shape, ("rows", None, "heads")) for x in (q, k))
        specs = PartitionSpec(), queries, keys, keys, sharding.spec(mesh, segments_SxL.shape, ("rows",))
        choose = jax.shard_map(choose, in_specs=specs, out_specs=queries, check_vma=False)
    return choose(index, q, k, v, segments_SxL)[..., :C].astype(q_SxLxHxC.dtype)


def _splash(q_SxLxHxC, k_SxLxKxC, v_SxLxKxC, segments_SxL, window: int, cap: float | None, interpret: bool) -> jax.Array:
    """The kernel for TPUs, for queries that are already scaled; [S, L, H, C]."""
    # Only a run on a TPU needs this import.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _, L, H, _ = q_SxLxHxC.shape
    mask = splash.CausalMask((L, L)) if window >= L else splash.LocalMask((L, L), (window - 1, 0), 0)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes: dict[str, Any] = dict.fromkeys((*names, "block_q_dq", "block_kv_dq"), _block(L))
    kernel = splash.make_splash_mha_single_device(
        mask=splash.MultiHeadMask([mask] * H),
        block_sizes=splash.BlockSizes(**sizes),
        attn_logits_soft_cap=cap,
        residual_checkpoint_name=attention.SAVED,
        interpret=interpret,
    )
    of_sequence = jax.vmap(lambda q, k, v, segments: kernel(q, k, v, splash.SegmentIds(segments, segments)))
    q, k, v = (x.swapaxes(1, 2) for x in (q_SxLxHxC, k_SxLxKxC, v_SxLxKxC))
    return of_sequence(q, k, v, segments_SxL).swapaxes(1, 2)


def _triton(q_SxLxHxC, k_SxLxKxC, v_SxLxKxC, segments_SxL, interpret: bool) -> jax.Array:
    """The kernel for GPUs, for queries that are already scaled; [S, L, H, C]. Each query head has a copy of its keys and values."""
    # Only a run on a GPU needs this import.
    from jax.experimental.pallas.ops.gpu import attention as triton

    H, C = q_SxLxHxC.shape[2:]
    k_SxLxHxC, v_SxLxHxC = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (k_SxLxKxC, v_SxLxKxC))
    block_q, block_k = TRITON_BLOCKS[C]
    sizes = triton.BlockSizes(block_q, block_k, *[TRITON_BACKWARD] * 4)
    output = triton.mha(q_SxLxHxC, k_SxLxHxC, v_SxLxHxC, segments_SxL, causal=True, block_sizes=sizes, interpret=interpret)
    return attention.save(output)

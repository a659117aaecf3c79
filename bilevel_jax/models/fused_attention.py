"""Attention of packed sequences in one kernel on a TPU: `model.attention`.

The kernel is JAX's splash attention. It keeps scores in the memory of the core, and skips blocks of keys that are later than the
queries, or farther back than the window. XLA cannot split a kernel over devices, so on a mesh each device runs it on its own
sequences and heads.

Axes: S sequences, L positions, H query heads, K key/value heads, C head width.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from bilevel_jax import sharding
from bilevel_jax.models import attention

KINDS = ("auto", "xla", "fused")
BLOCKS = (512, 256, 128)  # positions of a block of queries or keys, the best first
WIDTHS = (64, 128, 256)  # of heads; narrower ones are padded with zeros


def problem(length: int, width: int, key_heads: int, tensor: int) -> tuple[str, str]:
    """Why the kernel cannot take these shapes, and the key to set; both empty if it can.

    Args:
      length: L.
      width: C.
      key_heads: K.
      tensor: length of the axis of the mesh that splits heads.
    """
    if width > WIDTHS[-1]:
        return f"the kernel takes heads up to {WIDTHS[-1]} wide, and those of this model are {width} wide", ""
    if key_heads % tensor:
        fitting = math.gcd(key_heads, tensor)
        return f"mesh.tensor={tensor} does not divide the {key_heads} key heads of this model", f"mesh.tensor={fitting}"
    if not _block(length):
        near = max(BLOCKS[-1], length // BLOCKS[-1] * BLOCKS[-1])
        return f"the kernel takes multiples of {BLOCKS[-1]} positions, and rows have {length}", f"data.max_length={near}"
    return "", ""


def _block(length: int) -> int:
    """The length of a block; 0 if none divides `length`."""
    return next((block for block in BLOCKS if length % block == 0), 0)


def fits(q_SxLxHxC: jax.Array, k_SxLxKxC: jax.Array) -> bool:
    """Whether the kernel takes these arrays on the mesh of `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    _, L, _, C = q_SxLxHxC.shape
    return problem(L, C, k_SxLxKxC.shape[2], 1 if mesh.empty else sharding.num_parts(mesh, "heads")) == ("", "")


def attend(
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
    """`attention.attend` for shapes that `fits` accepts.

    Args:
      q_SxLxHxC, k_SxLxKxC, v_SxLxKxC, segments_SxL, dtype, window, cap: as there. The result is rounded to `dtype` too.
      windows: all values that `window` can have. The kernel is compiled for each.
      interpret: run the kernel as XLA operations, on any device.
    """
    L, C = q_SxLxHxC.shape[1], q_SxLxHxC.shape[3]
    dtype = dtype or q_SxLxHxC.dtype
    scaled = q_SxLxHxC.astype(jnp.float32) * C**-0.5
    padding = ((0, 0),) * 3 + ((0, next(width for width in WIDTHS if width >= C) - C),)
    q, k, v = (jnp.pad(x.astype(dtype), padding).swapaxes(1, 2) for x in (scaled, k_SxLxKxC, v_SxLxKxC))
    kernels = [functools.partial(_on_device, window=size, cap=cap, interpret=interpret) for size in windows or (L,)]
    index = jnp.int32(0) if window is None else jnp.argmax(jnp.array(windows) == window)

    def choose(index, *arrays):
        return kernels[0](*arrays) if len(kernels) == 1 else jax.lax.switch(index, kernels, *arrays)

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        queries, keys = (sharding.spec(mesh, x.shape, ("rows", "heads")) for x in (q, k))
        specs = PartitionSpec(), queries, keys, keys, sharding.spec(mesh, segments_SxL.shape, ("rows",))
        choose = jax.shard_map(choose, in_specs=specs, out_specs=queries, check_vma=False)
    return choose(index, q, k, v, segments_SxL).swapaxes(1, 2)[..., :C].astype(q_SxLxHxC.dtype)


def _on_device(q_SxHxLxC, k_SxKxLxC, v_SxKxLxC, segments_SxL, window: int, cap: float | None, interpret: bool) -> jax.Array:
    """The kernel for queries that are already scaled, [S, H, L, C]."""
    # Only a run on a TPU needs this import.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _, H, L, _ = q_SxHxLxC.shape
    mask = splash.CausalMask((L, L)) if window >= L else splash.LocalMask((L, L), (window - 1, 0), 0)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    kernel = splash.make_splash_mha_single_device(
        mask=splash.MultiHeadMask([mask] * H),
        block_sizes=splash.BlockSizes(**dict.fromkeys((*names, "block_q_dq", "block_kv_dq"), _block(L))),
        attn_logits_soft_cap=cap,
        residual_checkpoint_name=attention.SAVED,
        interpret=interpret,
    )
    return jax.vmap(lambda q, k, v, segments: kernel(q, k, v, splash.SegmentIds(segments, segments)))(
        q_SxHxLxC, k_SxKxLxC, v_SxKxLxC, segments_SxL
    )

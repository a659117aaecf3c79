"""Sharding: a mesh with three axes, and one table from names of dimensions to these axes.

`data` and `fsdp` together split rows: the sequences of a batch, the slots of the sampler. `fsdp` also splits the weights of the
base along their hidden dimension, and `tensor` along the other one: heads, feed-forward, vocabulary. The adapter and its optimizer
are replicated. ω is replicated, or sharded over all devices (`mesh.shard_selector`). A dimension that its axes do not divide is
not split.

XLA partitions the programs (GSPMD): inputs have a `NamedSharding`, and `constrain` repeats the shardings that XLA must not lose
inside a program. The same program runs on one device, where all axes have length 1.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from bilevel_jax import compilations
from bilevel_jax.models import architectures

AXES = ("data", "fsdp", "tensor")
RULES = {
    "rows": ("data", "fsdp"),  # sequences, slots, positions that need logits
    "stripes": ("data",),  # rows, if `fsdp` splits another dimension
    "hidden": ("fsdp",),  # of weights; activations do not split it
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "examples": AXES,  # rows of the lower level, in ω
}
# Dimensions of the matrices of the base, without the stack of layers; a bias has the last one, a norm is replicated.
WEIGHTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("embed_tokens", "lm_head"), ("vocab", "hidden")),
    **architectures.sharding_axes(),
}
SEQUENCES = ("tokens", "segment_ids", "positions", "entering")  # fields of `Packed` with shape [M, S, L, ...]


class AnyProcess:
    """Whether a value is true in any process of this run. Every process must call it as often as the others.

    With several processes a call starts an exchange, and returns the result of the one before. The devices compute an exchange
    after the step that was dispatched before it: to wait for its result at once would leave them without work.
    """

    def __init__(self) -> None:
        self._pending: jax.Array | None = None

    def __call__(self, value: bool) -> bool:
        if jax.process_count() == 1:
            return value
        pending = self._pending
        mesh, reduce = _process_mesh()
        self._pending = reduce(multihost_utils.host_local_array_to_global_array(np.array([value]), mesh, PartitionSpec("process")))
        return pending is not None and bool(pending)


@functools.cache
def _process_mesh() -> tuple[Mesh, Callable]:
    """All devices by their process, and the compiled `any` of an array with an element for each process."""
    mesh = Mesh(np.array(jax.devices()).reshape(jax.process_count(), -1), ("process", "device"))
    return mesh, jax.jit(jnp.any, out_shardings=replicated(mesh))


def make_mesh(data: int, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh over the first data·fsdp·tensor devices; with `data=0`, over all devices.

    Args:
      data, fsdp, tensor: lengths of the axes.
      devices: those of this run by default.

    Raises:
      ValueError: there are fewer devices, or `data=0` and fsdp·tensor does not divide the number of devices.
    """
    compilations.check_entries()  # here, because everything that compiles for devices makes a mesh before
    devices, inner = jax.devices() if devices is None else devices, fsdp * tensor
    axes = f"mesh.data={data}, mesh.fsdp={fsdp}, mesh.tensor={tensor}"
    if not data and len(devices) >= inner and len(devices) % inner:
        raise ValueError(f"{axes}: {inner} does not divide the {len(devices)} devices; set mesh.data")
    data = data or len(devices) // inner
    if not 0 < data * inner <= len(devices):
        raise ValueError(f"{axes}, but there are {len(devices)} devices")
    return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[: data * inner])


def num_parts(mesh, name: str) -> int:
    """Number of parts into which a dimension of this name is split."""
    return math.prod(mesh.shape[axis] for axis in RULES[name])


def spec(mesh, shape: tuple[int, ...], names: tuple[str | None, ...]) -> PartitionSpec:
    """The partition of an array whose first dimensions have these names. Also works for an `AbstractMesh`."""
    sized = zip(shape, names)
    return PartitionSpec(*(RULES[name] if name and size % num_parts(mesh, name) == 0 else None for size, name in sized))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains the sharding of `x` by the names of its first dimensions; replicates it without names.

    The mesh is that of `jax.set_mesh`; without a mesh, `x` is unchanged.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, spec(mesh, x.shape, names))


# --------------------------------------------------------------------------------------------------------------------
# Shardings of arrays
# --------------------------------------------------------------------------------------------------------------------


def replicated(mesh) -> NamedSharding:
    """The sharding of an array that every device holds completely."""
    return NamedSharding(mesh, PartitionSpec())


def shardings(mesh, tree, *names: str | None):
    """The sharding of every leaf of a tree whose leaves' first dimensions have these names."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, spec(mesh, leaf.shape, names)), tree)


def weight_sharding(mesh, path: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of a weight of the base, by its path and shape, with or without a leading stack of layers."""
    outer, module, parameter = ("", "", *path)[-3:]
    names = WEIGHTS.get(parameter) or WEIGHTS.get(module, ())
    if module == "kernel":  # a part of a quantised one
        names = _part_names(outer, parameter)
    names = names[-1:] if parameter == "bias" else names
    return NamedSharding(mesh, spec(mesh, shape, (None,) * (len(shape) - len(names)) + names))


def _part_names(layer: str, part: str) -> tuple[str, ...]:
    """The last dimensions of a part of a quantised kernel, see `quantization.shapes`. The scales of groups are replicated."""
    inputs, outputs = WEIGHTS[layer]
    return {"codes": (inputs, outputs), "magnitude_codes": (inputs, outputs), "magnitude": (outputs,)}.get(part, ())


def gather_kernel(layer: str, kernel: dict) -> dict:
    """A quantised kernel of one layer, gathered over `fsdp`: its codes are a quarter of what its weights would be."""
    names = {part: [None if name == "hidden" else name for name in _part_names(layer, part)] for part in kernel}
    return {part: constrain(array, *names[part]) for part, array in kernel.items()}


def weight_shardings(mesh, base):
    """The sharding of every weight of the base, stacked over layers or layer by layer."""

    def leaf_sharding(path, leaf):
        return weight_sharding(mesh, tuple(str(getattr(entry, "key", "")) for entry in path), leaf.shape)

    return jax.tree_util.tree_map_with_path(leaf_sharding, base)


def state_shardings(mesh, state, shard_selector: bool):
    """The sharding of every leaf of a `State`.

    All is replicated, but for ω if `shard_selector` is set, and for what is learned where that is all weights of the model."""
    is_full = "embed_tokens" in state.policy.adapter
    result = weight_shardings(mesh, state) if is_full else jax.tree.map(lambda leaf: replicated(mesh), state)
    return result._replace(selector=shardings(mesh, state.selector, "examples")) if shard_selector else result


def device_put(x, target: Sharding) -> jax.Array:
    """Puts an array on the devices. Every process has the full array and fills its own devices, or x has the target's sharding."""
    if isinstance(x, jax.Array) and x.sharding == target:
        return x
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, target, lambda index: x[index])


def to_host(array: jax.Array) -> np.ndarray:
    """The full array on the host. If the array is sharded, every process must call this function."""
    if not array.is_fully_replicated:
        assert isinstance(array.sharding, NamedSharding)  # as of all arrays over a mesh
        array = _gather(replicated(array.sharding.mesh))(array)
    return np.asarray(array)


@functools.cache
def _gather(target: NamedSharding) -> Callable:
    """The compiled identity with this sharding: a new function would be compiled at each call."""
    return jax.jit(lambda x: x, out_shardings=target)


def replicate(tree, mesh: Mesh):
    """Replicates every leaf on all devices."""
    return jax.tree.map(lambda leaf: device_put(leaf, replicated(mesh)), tree)


def batch_shardings(tree, mesh: Mesh):
    """The sharding of every leaf of a `Packed`, or of a tree that contains one: sequences are sharded, all else is replicated."""

    def split(path, leaf):
        is_sequences = getattr(path[-1], "name", None) in SEQUENCES
        return shardings(mesh, leaf, None, "rows") if is_sequences else replicated(mesh)

    return jax.tree_util.tree_map_with_path(split, tree)


def put_batch(tree, mesh: Mesh):
    """Puts a `Packed`, or a tree that contains one, on the devices, see `batch_shardings`."""
    return jax.tree.map(device_put, tree, batch_shardings(tree, mesh))

"""Where arrays live: a mesh of three axes, and one table from the names of dimensions to these axes.

`data` and `fsdp` together split what there are many of: the sequences of a batch, the slots of the sampler. `fsdp` splits the
base's weights along their hidden dimension, too, and `tensor` along the other: heads, feed-forward, vocabulary. The adapter and its
optimizer are whole on every device; so is ω, unless it is to be split over all of them. One rule holds for all: a dimension stays
whole where its axes do not divide it.

XLA does the rest (GSPMD): inputs come with a `NamedSharding`, `constrain` repeats in the middle what must not be lost, and the
same program runs on one device, where all axes have length 1.
"""

import math

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
RULES = {
    "rows": ("data", "fsdp"),  # sequences, slots, positions that go through the head
    "stripes": ("data",),  # rows where `fsdp` has another dimension to split
    "hidden": ("fsdp",),  # of weights alone: activations keep it whole
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "examples": AXES,  # of the lower level, in ω
}
WEIGHTS = {  # the dimensions of the base's matrices, less the stack of layers; a bias has the last one, a norm stays whole
    **dict.fromkeys(("embed_tokens", "lm_head"), ("vocab", "hidden")),
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "query_key_value"), ("hidden", "heads")),
    **dict.fromkeys(("o_proj", "dense"), ("heads", "hidden")),
    **dict.fromkeys(("gate_proj", "up_proj", "dense_h_to_4h"), ("hidden", "mlp")),
    **dict.fromkeys(("down_proj", "dense_4h_to_h"), ("mlp", "hidden")),
}
SEQUENCES = ("tokens", "segment_ids", "positions")  # of a `Packed`: [M, S, L]


def any_process(value: bool) -> bool:
    """Whether `value` is true in any process of this run. Every process must ask."""
    return value if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(value)).any())


def make_mesh(data: int, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over the first data·fsdp·tensor devices; `data=0` takes all that `fsdp` and `tensor` leave.

    Raises:
      ValueError: there are fewer devices, or `data=0` and fsdp·tensor does not divide them.
    """
    devices, inner = jax.devices(), fsdp * tensor
    asked = f"mesh.data={data}, mesh.fsdp={fsdp}, mesh.tensor={tensor}"
    if not data and len(devices) >= inner and len(devices) % inner:
        raise ValueError(f"{asked}: {inner} does not divide the {len(devices)} devices; give mesh.data")
    data = data or len(devices) // inner
    if not 0 < data * inner <= len(devices):
        raise ValueError(f"{asked}, but there are {len(devices)} devices")
    return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[: data * inner])


def num_parts(mesh, name: str) -> int:
    """Into how many parts a dimension of this name is split."""
    return math.prod(mesh.shape[axis] for axis in RULES[name])


def spec(mesh, shape: tuple[int, ...], names: tuple[str | None, ...]) -> PartitionSpec:
    """The axes of an array whose first dimensions have these names. Works on an `AbstractMesh` too."""
    split = [name and size % num_parts(mesh, name) == 0 for size, name in zip(shape, names)]
    return PartitionSpec(*(RULES[name] if is_split else None for name, is_split in zip(names, split)))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x`, laid out by the names of its first dimensions over the mesh of `jax.set_mesh`, and whole without names. As it is where
    no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, spec(mesh, x.shape, names))


# --------------------------------------------------------------------------------------------------------------------
# What goes where
# --------------------------------------------------------------------------------------------------------------------


def replicated(mesh) -> NamedSharding:
    """All of an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def shardings(mesh, tree, *names: str | None):
    """The sharding of every leaf of a tree whose leaves' first dimensions have these names."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, spec(mesh, leaf.shape, names)), tree)


def weight_sharding(mesh, path: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of a weight of the base, by its path and its shape, with or without a leading stack of layers."""
    owner, kind = ("", *path)[-2:]
    names = WEIGHTS.get(kind) or WEIGHTS.get(owner, ())
    names = names[-1:] if kind == "bias" else names
    return NamedSharding(mesh, spec(mesh, shape, (None,) * (len(shape) - len(names)) + names))


def weight_shardings(mesh, base):
    """The sharding of every weight of the base, stacked over layers or layer by layer."""

    def of(path, leaf):
        return weight_sharding(mesh, tuple(str(getattr(entry, "key", "")) for entry in path), leaf.shape)

    return jax.tree_util.tree_map_with_path(of, base)


def state_shardings(mesh, state, shard_selector: bool):
    """The sharding of every leaf of a `State`: whole, but for ω and what belongs to it if these are to be split."""
    places = jax.tree.map(lambda leaf: replicated(mesh), state)
    return places._replace(selector=shardings(mesh, state.selector, "examples")) if shard_selector else places


def device_put(x, where: NamedSharding) -> jax.Array:
    """An array that every process has, on the devices: each process gives its own devices their parts."""
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, where, lambda index: x[index])


def to_host(array: jax.Array) -> np.ndarray:
    """All of an array, on the host. Of one that is split, every process must ask."""
    if not array.is_fully_replicated:
        array = jax.jit(lambda x: x, out_shardings=replicated(array.sharding.mesh))(array)
    return np.asarray(array)


def replicate(tree, mesh: Mesh):
    """Every leaf whole on every device."""
    return jax.tree.map(lambda leaf: device_put(leaf, replicated(mesh)), tree)


def split_batch(tree, mesh: Mesh):
    """A `Packed`, or what holds one, with its sequences split over the devices and everything else whole on each."""

    def split(path, leaf):
        is_sequences = getattr(path[-1], "name", None) in SEQUENCES
        return device_put(leaf, shardings(mesh, leaf, None, "rows") if is_sequences else replicated(mesh))

    return jax.tree_util.tree_map_with_path(split, tree)

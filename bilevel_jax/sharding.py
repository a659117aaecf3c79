"""Where arrays live: the batch is split over the `data` axis, base, adapter and ω are replicated."""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bilevel_jax.data import packing


def make_mesh(num_devices: int) -> jax.sharding.Mesh:
    """A mesh of one axis, `data`, over the first `num_devices` devices; 0 takes all.

    Raises:
      ValueError: there are fewer devices.
    """
    devices = jax.devices()
    if num_devices > len(devices):
        raise ValueError(f"mesh.data={num_devices}, but there are {len(devices)} devices")
    chosen = devices[: num_devices or len(devices)]
    return jax.make_mesh((len(chosen),), ("data",), axis_types=(AxisType.Auto,), devices=chosen)


def replicate(tree, mesh: jax.sharding.Mesh):
    """Every leaf whole on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split_rows(tree, mesh: jax.sharding.Mesh):
    """The first axis of every leaf split over `data`."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("data")))


def split_batch(tree, mesh: jax.sharding.Mesh):
    """Packed sequences split over `data`, everything else replicated. Takes a `Packed` or anything that holds one."""

    def place(packed):
        if not isinstance(packed, packing.Packed):
            return replicate(packed, mesh)
        rows = NamedSharding(mesh, PartitionSpec(None, "data"))
        tokens = {name: jax.device_put(getattr(packed, name), rows) for name in ("tokens", "segments", "positions")}
        rest = {name: replicate(value, mesh) for name, value in packed._asdict().items() if name not in tokens}
        return packing.Packed(**tokens, **rest)

    return jax.tree.map(place, tree, is_leaf=lambda node: isinstance(node, (packing.Packed, np.ndarray)))

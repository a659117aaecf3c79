"""Accelerators to compile for that need not be there: their numbers, and their names such as `tpu-v5e:2x2` and `gpu-h100:8`.

A TPU is described by its topology, which `libtpu` knows. A GPU is described by the properties of its chip, which XLA takes as text.
"""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from bilevel_jax import near_names
from bilevel_jax.errors import RunError


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one JAX device has, by its vendor's data sheet: dense bfloat16 FLOP/s, bytes/s and bytes of its memory."""

    flops: float
    bandwidth: float
    memory: float


@dataclasses.dataclass(frozen=True)
class Tpu(Chip):
    """A TPU."""

    example: str  # a small topology, with as many axes as all of this generation


@dataclasses.dataclass(frozen=True)
class Gpu(Chip):
    """A GPU, with what XLA's compiler asks of it."""

    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    fpus: int  # float32 units of a core
    threads: int  # of a core, at most
    shared: int  # bytes of shared memory of a core; a block gets 1 KiB less
    l2: int  # bytes
    clock_ghz: float

    def description(self, name: str) -> str:
        """The text of a `GpuTargetConfigProto`."""
        major, minor = self.capability
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared}
  shared_memory_per_block_optin: {self.shared - 1024}
  threads_per_core_limit: {self.threads}
  core_count: {self.cores}
  fpus_per_core: {self.fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {self.bandwidth:.0f}
  l2_cache_size: {self.l2}
  clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory:.0f}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
device_description_str: "{name}"
"""


HOPPER: dict[str, Any] = {
    "capability": (9, 0),
    "cores": 132,
    "fpus": 128,
    "threads": 2048,
    "shared": 233472,
    "l2": 50 << 20,
    "clock_ghz": 1.98,
}
TPUS = {  # the name of a generation in a topology -> a chip
    "v5e": Tpu(197e12, 819e9, 16e9, "2x2"),
    "v5p": Tpu(459e12, 2765e9, 95e9, "2x2x1"),
    "v6e": Tpu(918e12, 1640e9, 32e9, "2x2"),
}
GPUS = {
    "a100": Gpu(312e12, 2039e9, 80e9, (8, 0), cores=108, fpus=64, threads=2048, shared=167936, l2=40 << 20, clock_ghz=1.41),
    "h100": Gpu(989e12, 3350e9, 80e9, **HOPPER),
    "h200": Gpu(989e12, 4800e9, 141e9, **HOPPER),
    "rtx4090": Gpu(165e12, 1008e9, 24e9, (8, 9), cores=128, fpus=128, threads=1536, shared=102400, l2=72 << 20, clock_ghz=2.52),
}
KNOWN = (*(f"tpu-{name}" for name in TPUS), *(f"gpu-{name}" for name in GPUS))
USAGE = f"a target is tpu-NAME:TOPOLOGY such as tpu-v5e:2x2, or gpu-NAME or gpu-NAME:NUMBER; names are {', '.join(KNOWN)}"


@dataclasses.dataclass(frozen=True)
class Target:
    """One name of `KNOWN`, and how many of them in which arrangement."""

    platform: str  # tpu or gpu
    name: str
    shape: tuple[int, ...]  # chips along each axis of the topology; (number,) for GPUs

    def __str__(self) -> str:
        return f"{self.platform}-{self.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chip(self) -> Chip:
        return (TPUS if self.platform == "tpu" else GPUS)[self.name]


def parse(text: str) -> Target:
    """The target of a name.

    Raises:
      ValueError: the name is unknown; the message has the known ones.
    """
    match = re.fullmatch(r"(tpu|gpu)-(\w+)(?::(\d+(?:x\d+)*))?", text)
    if not match or f"{match[1]}-{match[2]}" not in KNOWN:
        raise ValueError(f"--compile={text!r:.80} is no known target{near_names.hint(text.split(':')[0], KNOWN)}; {USAGE}")
    platform, name, arrangement = match.groups()
    example = TPUS[name].example if platform == "tpu" else "8"
    if arrangement is None and platform == "tpu" or (arrangement or example).count("x") != example.count("x"):
        raise ValueError(
            f"--compile={text} is not arranged as {platform}-{name}, for example --compile={platform}-{name}:{example}"
        )
    shape = tuple(int(part) for part in (arrangement or "1").split("x"))
    if not all(shape):
        raise ValueError(f"--compile={text} has no devices; {USAGE}")
    return Target(platform, name, shape)


def devices(target: Target) -> Sequence[jax.Device]:
    """The devices of a target, for which programs can be compiled but not run.

    Raises:
      RunError: the compiler of this platform is not installed, or does not start.
      ValueError: there is no such topology.
    """
    try:
        return (_tpus if target.platform == "tpu" else _gpus)(target).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        if not reason.startswith("INVALID_ARGUMENT"):
            raise RunError(f"--compile={target}: the compiler does not start ({reason:.200})") from error
        raise ValueError(f"--compile={target}: no such topology ({reason:.200}); {USAGE}") from error


def _tpus(target: Target) -> topologies.TopologyDescription:
    # Without a TPU libtpu would ask a server what this machine has. It also admits one process at a time, since a TPU serves one;
    # compiling needs no TPU.
    absent = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5p-8"}
    os.environ |= absent | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"} | os.environ
    # By default a host has 2x2 chips; fewer are one host.
    hosts = {"chips_per_host_bounds": (*target.shape, 1)[:3]} if math.prod(target.shape) < 4 else {}
    name = f"{target.name}:{'x'.join(map(str, target.shape))}"
    try:
        return topologies.get_topology_desc(topology_name=name, platform="tpu", **hosts)
    except RuntimeError as error:
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise
        raise RunError(
            f"--compile={target} needs the TPU compiler; install the extra tpu: pip install 'bilevel_jax[tpu]'"
        ) from error


def _gpus(target: Target) -> topologies.TopologyDescription:
    description = GPUS[target.name].description(target.name)
    arrangement = f"1x1x{target.shape[0]}"
    try:
        return topologies.get_topology_desc(target.name, platform="cuda", target_config=description, topology=arrangement)
    except (NotImplementedError, RuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise
        message = f"--compile={target} needs the GPU compiler; install the extra cuda13: pip install 'bilevel_jax[cuda13]'"
        raise RunError(message) from error

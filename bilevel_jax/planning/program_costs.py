"""What a program costs one device: FLOPs, bytes and collectives, and the least time that a chip needs for them.

XLA counts the body of every loop once, also that of the loop over layers. `products` counts the matrix products of the traced
program with each loop of known length multiplied out, and without that; the ratio scales XLA's counts. The body of a loop of
unknown length is counted once: a micro-batch, a chunk of logits, a token of every slot.

XLA counts no FLOPs of a Pallas kernel, and each of its operands and results once. `kernel_flops` has its products.
"""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute", "reduce-scatter")
_COLLECTIVE = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(COLLECTIVES)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")


class Cost(NamedTuple):
    """FLOPs, and bytes to and from memory."""

    flops: float
    bytes: float

    def __add__(self, other):
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, factor: float) -> "Cost":
        """This cost, `factor` times."""
        return Cost(self.flops * factor, self.bytes * factor)


# --------------------------------------------------------------------------------------------------------------------
# Products
# --------------------------------------------------------------------------------------------------------------------


def products(jaxpr, unroll: bool = True) -> Cost:
    """The matrix products of a jaxpr on all devices together, with operands and results as bytes; without those of kernels.

    Args:
      jaxpr: an open one.
      unroll: multiply the body of a scan by its length. A `while` loop has no known length: its body counts once.
    """
    total = Cost(0, 0)
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            total += _product(equation)
        elif equation.primitive.name == "cond":
            branches = [products(branch.jaxpr, unroll) for branch in equation.params["branches"]]
            total += Cost(max(one.flops for one in branches), max(one.bytes for one in branches))
        elif equation.primitive.name != "pallas_call":
            for inner in _inner(equation.params):
                total += products(inner, unroll).times(_turns(equation, unroll))
    return total


def kernel_flops(jaxpr) -> float:
    """FLOPs of the products of Pallas kernels on all devices together: of all blocks, also those that a kernel skips."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            total += products(equation.params["jaxpr"]).flops * math.prod(equation.params["grid_mapping"].grid)
        elif equation.primitive.name == "cond":
            total += max(kernel_flops(branch.jaxpr) for branch in equation.params["branches"])
        else:
            total += _turns(equation) * sum(kernel_flops(inner) for inner in _inner(equation.params))
    return total


def _turns(equation, unroll: bool = True) -> int:
    """How often the jaxprs of an equation run: the turns of a scan, or once on each device of a `shard_map`."""
    if equation.primitive.name == "shard_map":
        return equation.params["mesh"].size
    return equation.params["length"] if unroll and equation.primitive.name == "scan" else 1


def _product(equation) -> Cost:
    """2 FLOPs for each element of the result and each element of the contracted dimensions."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    arrays = [variable.aval for variable in (*equation.invars, *equation.outvars)]
    flops = 2 * math.prod(arrays[-1].shape) * math.prod(arrays[0].shape[axis] for axis in contracted)
    return Cost(flops, sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays))


def _inner(params: dict) -> Iterator:
    """The jaxprs among the parameters of an equation."""
    for value in jax.tree.leaves(list(params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
        inner = getattr(value, "jaxpr", value)  # a ClosedJaxpr holds its jaxpr
        if hasattr(inner, "eqns"):
            yield inner


def of_device(counted: dict | None, jaxpr, num_devices: int) -> tuple[Cost, bool]:
    """The cost on one device, and whether XLA counted it.

    Args:
      counted: the `cost_analysis` of the compiled program. XLA has none for GPUs that are not there; then the products of
        `jaxpr` outside of kernels are divided by the number of devices, and the bytes are unknown, NaN. How often the loops in
        a kernel for GPUs run is not known.
      jaxpr: of the traced program.
      num_devices: that the program runs on.
    """
    full, once = products(jaxpr), products(jaxpr, unroll=False)
    if not counted or not counted.get("flops", 0) > 0:
        return Cost(full.flops / num_devices, math.nan), False
    scale = [whole / part if part else 1 for whole, part in zip(full, once)]
    kernels = kernel_flops(jaxpr) / num_devices
    return Cost(counted["flops"] * scale[0] + kernels, counted["bytes accessed"] * scale[1]), True


def least_seconds(cost: Cost, flops_per_second: float, bytes_per_second: float) -> tuple[float, float]:
    """The least time for the FLOPs, and for the bytes, of a chip with these peaks."""
    return cost.flops / flops_per_second, cost.bytes / bytes_per_second


# --------------------------------------------------------------------------------------------------------------------
# Collectives
# --------------------------------------------------------------------------------------------------------------------


class Collective(NamedTuple):
    """Collectives of one kind at one depth."""

    kind: str
    loops: int  # how many loops they are in
    number: int
    bytes: int  # of their results on one device, together


def array_bytes(text: str) -> list[int]:
    """Bytes of each array of a type in HLO, such as `(f32[2,3]{1,0}, bf16[])`."""
    return [
        math.prod(int(size) for size in shape.split(",") if size)
        * (8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0]))
        // 8
        for dtype, shape in _ARRAY.findall(text)
    ]


def parse_collectives(hlo: str) -> list[Collective]:
    """The collectives of a compiled program, by kind and by the number of loops around them.

    XLA may split one collective into pieces that overlap with computation. They share a channel and count once.
    """
    seen: set[str] = set()
    totals: collections.Counter[tuple[str, int]] = collections.Counter()
    numbers: collections.Counter[tuple[str, int]] = collections.Counter()
    for line in hlo.splitlines():
        match = _COLLECTIVE.search(line)
        if not match:
            continue
        channel = re.search(r"channel_id=(\d+)", line)
        if channel and channel[1] in seen:
            continue
        seen |= {channel[1]} if channel else set()
        name = re.search(r'op_name="([^"]*)"', line)
        sizes = array_bytes(match[1])
        # The start of an asynchronous collective also returns its operands.
        size = max(sizes, default=0) if match[3] and match[2] != "all-reduce" else sum(sizes)
        key = match[2], name[1].count("while/body") if name else 0
        numbers[key] += 1
        totals[key] += size
    return [Collective(*key, numbers[key], totals[key]) for key in sorted(numbers)]

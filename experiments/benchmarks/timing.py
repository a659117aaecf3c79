"""Side-by-side timing: variants run in turn, A B C A B C, so that a change of machine speed affects all of them."""

import os
import platform
import statistics
import time
from collections.abc import Callable

import jax


def hardware() -> str:
    """Commit, device, number of processors and versions, for the head of a result."""
    from experiments import tables

    device = jax.devices()[0]
    return (
        f"Commit {tables.commit()}; {jax.device_count()} x {device.device_kind}, {os.cpu_count()} processors, "
        f"{platform.machine()}, Python {platform.python_version()}, jax {jax.__version__}"
    )


def in_turn(variants: dict[str, Callable[[int], object]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of `variant(round)` for every variant and round, until the result is ready. Warm-up rounds are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(-warmup, rounds):
        for name, variant in variants.items():
            start = time.perf_counter()
            jax.block_until_ready(variant(max(i, 0)))
            if i >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: dict[str, list[float]], reference: str) -> dict[str, tuple[float, float, float]]:
    """Minimum, median and maximum over rounds of (time of a variant) / (time of the reference)."""
    over_reference = {}
    for name, times in seconds.items():
        quotients = [time / base for time, base in zip(times, seconds[reference], strict=True)]
        over_reference[name] = min(quotients), statistics.median(quotients), max(quotients)
    return over_reference

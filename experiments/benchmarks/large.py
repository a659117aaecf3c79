"""What grows with the number of rows N: the step, a refresh, a checkpoint, the table of weights, an export, a report.

Rows are made when they are read (`large_levels`). Export and report read a file of N rows, each in a process of its own.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np
import pyarrow as pa

from bilevel_jax import batches, checks, files, online, selector, sharding
from bilevel_jax import setup as setups
from bilevel_jax.data import levels, rows
from bilevel_jax.runtime import checkpoint, weight_table
from experiments.benchmarks import large_levels, timing

SMALL, LARGE = 10**3, 10**6
KEEP, RATIO, SEED = 0.8, 0.1, 0
MEASURED = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
seconds, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([status, seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1e3]))
"""
ROUNDS = 10  # steps of each variant for every round of the command


class Variant:
    """A run with N rows that takes step after step."""

    def __init__(self, config_dict, number: int):
        config = checks.build(config_dict)
        with mock.patch.object(levels, "load_levels", lambda config, tokenizer: large_levels.make_levels(number)):
            self._setup = setups.load(config)
        self.state, shardings = setups.init_state(config, self._setup, 0)
        self._program = setups.compile_program(config, self._setup, self.state, shardings, None)
        self._config, self._store = config, online.empty(number)
        self._prefetcher = batches.Prefetcher(self._program.batch_of, sys.maxsize, lambda k: False)
        self._step = 0

    def turn(self, _: int) -> jax.Array:
        """One step, as `train` takes it; its batch was packed during the one before."""
        k, mesh = self._step, self._setup.mesh
        batch = self._prefetcher.get(k, self._store)
        scales = sharding.replicate(batches.level_scales(self._config, 0), mesh)
        packed = sharding.put_batch(batch.batch, mesh)
        self.state, values = self._program.train_step(self._setup.base, self.state, packed, scales, None)
        self._step += 1
        return values["loss"]


def visited(state):
    """The state of a run in which all rows were visited: nothing of it can be compressed away."""
    rng, selector = np.random.default_rng(SEED), state.selector
    shape = selector.logits.shape
    moved = {name: rng.normal(size=shape).astype(np.float32) for name in ("logits", "surprise", "harm")}
    moved |= {name: rng.integers(1, 4, shape).astype(np.float32) for name in ("visits", "data_visits")}
    return state._replace(selector=selector._replace(**{name: jax.numpy.asarray(array) for name, array in moved.items()}))


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _save(directory: pathlib.Path, state, steps: int) -> tuple[float, float, int]:
    """Seconds for which `save` holds up the loop (median), seconds until the checkpoint is on disk, and its bytes."""
    held, written = [], []
    checkpoints = checkpoint.Checkpoints(directory, keep=1)
    for step in range(1, steps + 1):
        start = time.perf_counter()
        checkpoints.save(step, state, online.empty(len(state.selector.logits)), {})
        held.append(time.perf_counter() - start)
        while not (directory / str(step) / checkpoint.MANIFEST).exists():
            time.sleep(0.01)
        written.append(time.perf_counter() - start)
    checkpoints.close()
    return statistics.median(held), statistics.median(written), sum(file.stat().st_size for file in directory.rglob("*"))


class Used(NamedTuple):
    """What a command used."""

    seconds: float
    processor_seconds: float
    megabytes: float  # peak of its resident set

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s, {self.processor_seconds:.1f} s of a processor, {self.megabytes:.0f} MB"


def _parts(s: selector.SelectorState, size: int) -> list[str]:
    """Lines on what a checkpoint of `size` bytes has, as bytes in memory. Orbax compresses it."""
    parts = {
        "ω and its optimizer": (s.logits, s.optimizer),
        "visits, all and those with the response of the data": (s.visits, s.data_visits),
    }
    parts["surprise and harm, from which tables of weights have `plausible` and `useful`"] = (s.surprise, s.harm)
    lines, total = [], 0
    for name, arrays in parts.items():
        number = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        total += number
        lines.append(
            f"| in memory: {name} | {number / 1e6:.1f} MB; the checkpoint over it and the lines above: {size / total:.2f} |"
        )
    return lines


def _process(module: str, *arguments: str) -> Used:
    """Runs a command. A small process starts it, since the peak of a process counts that of the one that it is forked from.

    Raises:
      RuntimeError: it failed.
    """
    command = [sys.executable, "-c", MEASURED, sys.executable, "-m", module, *arguments]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    status, *used = json.loads(ended.stdout)
    if status:
        raise RuntimeError(f"{module} {' '.join(arguments)} ended with status {status}")
    return Used(*used)


def make_workdir(directory: pathlib.Path, config_dict, number: int) -> pathlib.Path:
    """A finished run with `number` rows in a file, and weights that differ."""
    workdir = directory / "run"
    workdir.mkdir()
    file = large_levels.write_rows(directory / "lower.jsonl", 0, number)
    config_dict = config_dict.copy_and_resolve_references()
    config_dict.data.lower = str(file)
    (workdir / "config.json").write_text(config_dict.to_json())
    (workdir / "summary.json").write_text(files.to_json({"rows": number, "steps": number // config_dict.batch.size}))
    ids = [row.id for row in rows.iter_rows(str(file)) if isinstance(row, rows.Row)]
    rng, ones = np.random.default_rng(SEED), np.ones(number)
    sources = pa.array([large_levels.SOURCES[i % len(large_levels.SOURCES)] for i in range(number)])
    logits, masked = rng.normal(size=number), rng.random(number) < RATIO
    blocks = weight_table.blocks(ids, sources, logits, ones, masked, rng.random(number), rng.normal(size=number))
    weight_table.write_blocks(workdir / "weights" / "epoch_1.parquet", blocks)
    return workdir


def _steps(config_dict, rounds: int) -> tuple[list[str], Variant, float]:
    """Lines on the step, the run with many rows, and the seconds of one of its steps."""
    variants = {number: Variant(config_dict, number) for number in (SMALL, LARGE)}
    turns = {str(number): variant.turn for number, variant in variants.items()}
    seconds = timing.in_turn(turns, ROUNDS * rounds, warmup=3)
    low, middle, high = timing.ratios(seconds, str(SMALL))[str(LARGE)]
    totals = {name: sum(sorted(times)[: len(times) // 2]) for name, times in seconds.items()}  # the undisturbed half
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    lines = [f"| step, N = {name}, median | {1000 * value:.1f} ms |" for name, value in medians.items()]
    lines.append(f"| step, ratio of the faster halves | {totals[str(LARGE)] / totals[str(SMALL)]:.3f} |")
    lines.append(f"| step, median of the ratios of neighbouring steps (least, most) | {middle:.3f} ({low:.2f}, {high:.2f}) |")
    return lines, variants[LARGE], medians[str(LARGE)]


def measure(config, rounds: int) -> list[str]:
    """Markdown lines; `config` names the model."""
    config_dict = large_levels.make_config(config.model.path)
    lines = ["| | |", "| --- | --- |"]
    with tempfile.TemporaryDirectory() as scratch:
        directory = pathlib.Path(scratch)
        of_steps, variant, step_seconds = _steps(config_dict, rounds)
        state = visited(variant.state)
        held, written, size = _save(directory / "checkpoints", state, 5)
        lines += of_steps
        lines.append(f"| checkpoint, the loop waits | {1000 * held:.1f} ms, {held / step_seconds:.2f} steps |")
        lines.append(f"| checkpoint, until it is on disk | {written:.2f} s |")
        lines.append(f"| checkpoint, size | {size / 1e6:.1f} MB |")
        lines += _parts(state.selector, size)
        logits = np.asarray(state.selector.logits)
        masked = _seconds(lambda: online.masked_rows(logits, LARGE, RATIO, SEED))
        lines.append(f"| mask of a refresh, R = {RATIO:.0%} | {masked:.2f} s |")
        del variant, state
        table = _seconds(lambda: make_workdir(directory, config_dict, LARGE))
        lines.append(f"| file of rows, their ids and the table of weights | {table:.1f} s |")
        workdir = directory / "run"
        for name in ("kept.jsonl", "kept.parquet"):
            used = _process("bilevel_jax.export", f"--workdir={workdir}", f"--selected={directory / name}", f"--keep={KEEP}")
            lines.append(f"| export of {KEEP:.0%} to {name} | {used} |")
        used = _process("bilevel_jax.report", f"--workdir={workdir}")
        size = (workdir / "report.html").stat().st_size
        lines.append(f"| report | {used}, {size / 1e6:.2f} MB of HTML |")
    return [f"N = {LARGE:.0e} unless it says otherwise.", "", *lines]

"""Part 2 of the soak: commands that are killed at random moments, and started again until they end.

What they write must then be the same bits as that of a command that was left alone.
"""

import json
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tqdm

from experiments.reliability import processes
from experiments.reliability.kills import PER_RUN, differing

NUM_ROWS = 20_000  # of the source that is prepared: some seconds
SHARDS = ("*.arrow", "*.json")  # of prepared rows; locks have no content


class Command(NamedTuple):
    """A command that is killed."""

    arguments: Callable[[pathlib.Path, pathlib.Path], list[str]]  # of the directory of the soak, and of that of the results
    contents: Callable[[pathlib.Path], dict[str, object]]  # what it leaves, by file


def _export(directory: pathlib.Path, out: pathlib.Path) -> list[str]:
    merged = [] if (out / "merged").exists() else [f"--merged={out / 'merged'}"]
    return ["export", f"--workdir={directory / 'reference'}", f"--selected={out / 'kept.jsonl'}", *merged]


def exported(out: pathlib.Path) -> dict[str, object]:
    """Rows and weights of an export. The cards are left out, because they contain paths."""
    return {name: (out / name).read_bytes() for name in ("kept.jsonl", "merged/model.safetensors", "merged/config.json")}


def _prepare(directory: pathlib.Path, out: pathlib.Path) -> list[str]:
    source = directory / "rows.jsonl"
    if not source.exists():
        rows = ({"question": f"What is {i} times 3?", "response": f"{i} times 3 is {3 * i}."} for i in range(NUM_ROWS))
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [f"--config.data.{name}={source}" for name in ("upper", "lower")]
    config = processes.ROOT / "configs" / "safety.py"
    return ["prepare", f"--config={config}", *sources, "--config.data.overlap=warn", f"--config.data.cache={out}"]


def prepared(out: pathlib.Path) -> dict[str, object]:
    """All files of the prepared rows, whose names tell their content."""
    files = [file for pattern in SHARDS for file in out.rglob(pattern)]
    return {file.relative_to(out).as_posix(): file.read_bytes() for file in files}


def _report(directory: pathlib.Path, out: pathlib.Path) -> list[str]:
    workdir = out / "run"
    if not workdir.exists():
        shutil.copytree(directory / "reference", workdir, ignore=shutil.ignore_patterns("checkpoints", "report.html"))
    return ["report", f"--workdir={workdir}"]


def reported(out: pathlib.Path) -> dict[str, object]:
    """The page of a report without the path of its run."""
    return {"report.html": (out / "run" / "report.html").read_text(encoding="utf-8").replace(str(out), "")}


COMMANDS = {
    "exports": Command(_export, exported),
    "preparations": Command(_prepare, prepared),
    "reports": Command(_report, reported),
}


def attempt(command: Command, directory: pathlib.Path, out: pathlib.Path, seconds: float | None = None) -> processes.Ended:
    """One attempt of a command, killed after some seconds if these are given."""
    full = [sys.executable, "-m", *_module(command.arguments(directory, out))]
    environ = processes.environment(directory)
    process = subprocess.Popen(full, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
    return processes.Ended(process.returncode, [], output)


def _module(arguments: list[str]) -> list[str]:
    return [f"bilevel_jax.{arguments[0]}", *arguments[1:]]


def interrupt(name: str, directory: pathlib.Path, num_kills: int, rng: np.random.Generator) -> dict:
    """Kills one of `COMMANDS`. Returns counts, and the differences from a command that was left alone."""
    command, reference, out = COMMANDS[name], directory / f"{name}_reference", directory / f"{name}_killed"
    shutil.rmtree(reference, ignore_errors=True)
    reference.mkdir()
    start = time.perf_counter()
    processes.check(attempt(command, directory, reference), f"{name}: the one that is left alone")
    duration, expected = time.perf_counter() - start, command.contents(reference)
    if not expected:
        raise RuntimeError(f"{name}: nothing was written to {reference}")
    kills, ended_well, mismatches, kills_here = 0, 0, [], 0
    with tqdm.tqdm(total=num_kills, desc=f"kills of {name}", unit="kill") as bar:
        while not ended_well or kills < num_kills:
            if not kills_here:
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir()
            kill = kills_here < PER_RUN and kills < num_kills
            ended = attempt(command, directory, out, rng.uniform(0, duration) if kill else None)
            processes.check(ended, name)
            if ended.code:
                kills, kills_here = kills + 1, kills_here + 1
                bar.update()
                continue
            mismatches += [f"{name}: {file}" for file in differing(command.contents(out), expected)]
            ended_well, kills_here = ended_well + 1, 0
    return {"ended": ended_well, "kills": kills, "mismatches": mismatches}

"""What the soak does: runs, exports and pairs that are killed, checkpoints damaged, a long run, and what is told of them."""

import collections
import concurrent.futures
import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
import tqdm

ROOT = pathlib.Path(__file__).parents[2]
PROCESS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
PHASES = {  # what a run is doing -> how often it may have begun before a kill, and the longest delay after that, in seconds
    "load": (1, 1.0),
    "compile": (1, 1.0),
    "train": (8, 0.5),  # checkpoints are written meanwhile
    "generate": (3, 0.5),
    "eval": (2, 0.2),
    "checkpoint": (5, 0.05),
}
EXPORT_SHARE = 0.1  # of the kills
PER_RUN = 8  # kills after which a run is left alone
KINDS = ("truncate", "flip a bit", "delete a file", "empty the directory")
SMALL = {  # 30 steps, 5 refreshes, 10 checkpoints
    "method": "dynamic",
    "num_epochs": 3,
    "data.num_upper": 60,
    "data.num_lower": 100,
    "data.max_length": 160,
    "eval.num_upper": 20,
    "eval.num_lower": 20,
    "batch.size": 8,
    "online.ratio": 0.3,
    "online.num_samples": 2,
    "online.refresh_every": 7,  # some refreshes are between two checkpoints
    "online.max_new_tokens": 24,
    "online.slots": 8,
    "checkpoint.every": 3,
    "log.every": 1,  # an event that covers several steps would begin anew where a run continues
}
LONG = {
    "method": "dynamic",
    "num_epochs": 10,
    "penalty.rho_step": 0.05,
    "data.num_upper": 200,
    "data.max_length": 128,
    "eval.num_upper": 50,
    "eval.num_lower": 50,
    "batch.size": 2,
    "batch.micro_size": 2,
    "online.ratio": 0.05,
    "online.refresh_every": 500,
    "online.max_new_tokens": 24,
    "online.slots": 8,
    "checkpoint.every": 250,
    "log.every": 50,
}
# Stands before the training command: says on a pipe what the run is doing, and after each event what it holds.
WATCHED = """
import contextlib, os, pathlib, runpy, sys
import jax
from bilevel_jax.runtime import clock, metrics

pipe, workdir = int(sys.argv[1]), pathlib.Path(sys.argv[2])
sys.argv[1:] = [f"--workdir={workdir}", *sys.argv[3:]]
begin, write, active = clock.Clock.__call__, metrics.MetricsWriter.write, ["start"]

def say(*words):
    os.write(pipe, (" ".join(map(str, words)) + "\\n").encode())

@contextlib.contextmanager
def announced(timer, activity):
    with begin(timer, activity):
        active.append(activity)
        say(activity)
        try:
            yield
        finally:
            active.pop()
            say(active[-1])

def measured(writer, step, *rest):
    write(writer, step, *rest)
    resident = int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    arrays = jax.live_arrays()
    files = sum(len(names) for *_, names in os.walk(workdir))  # unlike rglob it bears that a checkpoint is removed meanwhile
    say("holds", step, resident, len(arrays), sum(x.nbytes for x in arrays), files)

clock.Clock.__call__ = announced
if "--measured" in sys.argv:
    sys.argv.remove("--measured")
    metrics.MetricsWriter.write = measured
runpy.run_module("bilevel_jax.main", run_name="__main__")
"""


class Ended(NamedTuple):
    """A process that is over."""

    code: int  # -9: it was killed
    said: list[str]  # on the pipe
    output: str


# --------------------------------------------------------------------------------------------------------------------
# Processes
# --------------------------------------------------------------------------------------------------------------------


def environment(directory: pathlib.Path) -> dict[str, str]:
    """Compilations are kept, so that another try costs little."""
    kept = {"JAX_COMPILATION_CACHE_DIR": str(directory / "compilations"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | kept | {"JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", "PYTHONPATH": path}


def train(
    workdir: pathlib.Path, settings: dict, kill: tuple[str, int, float] | None = None, measured: bool = False, place: tuple = ()
) -> Ended:
    """One try of a run.

    Args:
      kill: an activity, how often it has begun before, and seconds: the moment of the SIGKILL.
      measured: whether it tells what it holds.
      place: where the coordinator is, how many processes the run has, and which of them this is; nothing if it is alone.
    """
    ours, theirs = os.pipe()
    changes = [f"--config.{key}={value}" for key, value in settings.items()]
    config = ["--config", str(ROOT / "configs" / "safety.py"), *changes, *(["--measured"] if measured else [])]
    command = [sys.executable, "-u", "-c", WATCHED, str(theirs), str(workdir), *config]
    log = workdir.with_name("_".join([workdir.name, *place[2:]]) + ".log")
    environ = environment(workdir.parent) | dict(zip(PROCESS, place))
    with log.open("ab") as output, open(ours, encoding="utf-8") as pipe:
        start = output.tell()
        process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environ, pass_fds=[theirs])
        os.close(theirs)
        said = []
        try:
            for line in pipe:
                said.append(line.strip())
                if kill and said.count(kill[0]) > kill[1] and said[-1] == kill[0]:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(kill[2])
                    process.kill()
                    kill = None
        finally:
            if sys.exc_info()[0]:
                process.kill()
            process.wait()
    return Ended(process.returncode, said, log.read_bytes()[start:].decode(errors="replace"))


def train_pair(workdir: pathlib.Path, settings: dict, kill: tuple[str, int, float] | None = None, victim: int = 0) -> list[Ended]:
    """One try of a run of two processes, of which one is killed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        moments = [kill if i == victim else None for i in range(2)]
        tries = [pool.submit(train, workdir, settings, kill, False, (address, "2", str(i))) for i, kill in enumerate(moments)]
        return [one.result() for one in tries]


def export(workdir: pathlib.Path, out: pathlib.Path, seconds: float | None = None) -> Ended:
    """One try of both exports; those that are there already stay."""
    arguments = [f"--workdir={workdir}", f"--selected={out / 'kept.jsonl'}"]
    arguments += [] if (out / "merged").exists() else [f"--merged={out / 'merged'}"]
    command = [sys.executable, "-m", "bilevel_jax.export", *arguments]
    environ = environment(workdir.parent)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
    return Ended(process.returncode, [], output)


def last_line(ended: Ended) -> str:
    return next((line for line in reversed(ended.output.splitlines()) if line.strip()), "no message")


def check(ended: Ended, what: str) -> None:
    if ended.code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{what} ended with status {ended.code}: {last_line(ended)}")


# --------------------------------------------------------------------------------------------------------------------
# What is left
# --------------------------------------------------------------------------------------------------------------------


def results(workdir: pathlib.Path) -> dict[str, object]:
    """Everything that must not depend on how often a run was interrupted, by file."""
    measured = ("time/", "speed/", "online/time_share")
    files = ["config.json", "responses.jsonl", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
    files += sorted(file.relative_to(workdir).as_posix() for file in workdir.glob("weights/*"))
    found: dict[str, object] = {name: (workdir / name).read_bytes() for name in files}
    events = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for name, content in (("metrics.jsonl", events), ("summary.json", [json.loads((workdir / "summary.json").read_text())])):
        found[name] = [{key: value for key, value in one.items() if not key.startswith(measured)} for one in content]
    return found


def exported(out: pathlib.Path) -> dict[str, object]:
    """The rows and the weights; the cards name their own paths."""
    return {name: (out / name).read_bytes() for name in ("kept.jsonl", "merged/model.safetensors", "merged/config.json")}


def differing(found: dict[str, object], expected: dict[str, object]) -> list[str]:
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


# --------------------------------------------------------------------------------------------------------------------
# Faults
# --------------------------------------------------------------------------------------------------------------------


def spoil(checkpoints: pathlib.Path, kind: str, rng: np.random.Generator) -> str | None:
    """Damages the newest checkpoint, if the one before it is whole. `told` if the checksums tell, `harmless` if nothing that is
    read has changed, None if nothing was done."""
    from bilevel_jax.runtime import checkpoint

    steps = sorted((int(entry.name) for entry in checkpoints.glob("*") if entry.name.isdecimal()), reverse=True)
    if len(steps) < 2 or any(checkpoint.damage(checkpoints / str(step)) for step in steps[:2]):
        return None
    newest = checkpoints / str(steps[0])
    files = sorted(newest / name for name in (*json.loads((newest / checkpoint.MANIFEST).read_text()), checkpoint.MANIFEST))
    file = files[rng.integers(len(files))]
    content = bytearray(file.read_bytes())
    place = int(rng.integers(max(1, len(content))))
    if kind == "truncate":
        file.write_bytes(content[:place])
    elif kind == "flip a bit":
        content[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(content)
    elif kind == "delete a file":
        file.unlink()
    else:
        shutil.rmtree(newest)
        newest.mkdir()
    return "told" if checkpoint.damage(newest) else "harmless"


# --------------------------------------------------------------------------------------------------------------------
# The four parts
# --------------------------------------------------------------------------------------------------------------------


def interrupt(directory: pathlib.Path, num_kills: int, num_faults: int, rng: np.random.Generator) -> dict:
    """Part 1: counts, and what differs."""
    reference = directory / "reference"
    check(train(reference, SMALL), "the uninterrupted run")
    expected = results(reference)
    kills, faults, runs, tries, mismatches, aside = collections.Counter(), collections.Counter(), 0, 0, [], 0
    with tqdm.tqdm(total=num_kills, desc="kills", unit="kill") as bar:
        while not runs or kills.total() < num_kills:
            workdir, here, told = directory / f"run_{runs}", 0, 0
            while not (workdir / "summary.json").exists():
                alone = here >= PER_RUN or kills.total() >= num_kills
                phase = list(PHASES)[rng.integers(len(PHASES))]
                often, longest = PHASES[phase]
                moment = None if alone else (phase, int(rng.integers(often)), rng.uniform(0, longest))
                ended = train(workdir, SMALL, moment)
                check(ended, workdir.name)
                tries += 1
                if ended.code == -signal.SIGKILL:
                    kills[ended.said[-1]] += 1
                    here += 1
                    bar.update()
                if ended.code and sum(faults.values()) < num_faults and rng.random() < max(0.5, num_faults / max(1, num_kills)):
                    kind = KINDS[rng.integers(len(KINDS))]
                    outcome = spoil(workdir / "checkpoints", kind, rng)
                    if outcome:
                        faults[f"{kind}, {outcome}"] += 1
                        told += outcome == "told"
            runs += 1
            left = len(list((workdir / "checkpoints").glob("damaged-*")))
            aside += left
            mismatches += [f"{workdir.name}: {name}" for name in differing(results(workdir), expected)]
            if left != told:
                mismatches.append(f"{workdir.name}: {told} checkpoints were damaged, {left} were found out")
            if not mismatches and runs > 1:
                shutil.rmtree(workdir)
    return {
        "runs": runs,
        "tries": tries,
        "kills": dict(kills),
        "faults": dict(faults),
        "set_aside": aside,
        "mismatches": mismatches,
    }


def interrupt_exports(directory: pathlib.Path, num_kills: int, rng: np.random.Generator) -> dict:
    """Part 2."""
    workdir, reference = directory / "reference", directory / "exported"
    reference.mkdir()
    began = time.perf_counter()
    check(export(workdir, reference), "the uninterrupted export")
    whole, expected = time.perf_counter() - began, exported(reference)
    kills, exports, mismatches, here = 0, 0, [], 0
    out = directory / "exported_0"
    out.mkdir()
    with tqdm.tqdm(total=num_kills, desc="kills of exports", unit="kill") as bar:
        while not exports or kills < num_kills:
            ended = export(workdir, out, rng.uniform(0, whole) if here < PER_RUN and kills < num_kills else None)
            check(ended, out.name)
            if ended.code:
                kills += 1
                here += 1
                bar.update()
                continue
            mismatches += [f"{out.name}: {name}" for name in differing(exported(out), expected)]
            exports += 1
            out, here = directory / f"exported_{exports}", 0
            out.mkdir()
    return {"exports": exports, "kills": kills, "mismatches": mismatches}


def interrupt_pairs(directory: pathlib.Path, num_kills: int, rng: np.random.Generator) -> dict:
    """Part 3."""
    reference, settings = directory / "pair", SMALL | {"mesh.fsdp": 2}
    for ended in train_pair(reference, settings):
        check(ended, "the uninterrupted pair")
    expected, kills, runs, mismatches = results(reference), collections.Counter(), 0, []
    with tqdm.tqdm(total=num_kills, desc="kills of one of two", unit="kill") as bar:
        while not runs or kills.total() < num_kills:
            workdir, here = directory / f"pair_{runs}", 0
            while not (workdir / "summary.json").exists():
                phase = list(PHASES)[rng.integers(len(PHASES))]
                often, longest = PHASES[phase]
                alone = here >= PER_RUN or kills.total() >= num_kills
                moment = None if alone else (phase, int(rng.integers(often)), rng.uniform(0, longest))
                victim = int(rng.integers(2))
                pair = train_pair(workdir, settings, moment, victim)
                if pair[victim].code != -signal.SIGKILL:
                    for ended in pair:
                        check(ended, workdir.name)
                    continue
                kills[f"{'the first' if victim == 0 else 'the other'}, {pair[victim].said[-1]}"] += 1
                here += 1
                bar.update()
                other = pair[1 - victim]
                if other.code != 1 or not last_line(other).startswith(f"error: process {victim} died, "):
                    mismatches.append(f"{workdir.name}: the other ended with status {other.code}: {last_line(other)}")
            runs += 1
            mismatches += [f"{workdir.name}: {name}" for name in differing(results(workdir), expected)]
    return {"runs": runs, "kills": dict(kills), "mismatches": mismatches}


def long_run(directory: pathlib.Path, steps: int) -> dict:
    """Part 4: memory and files of one run of about `steps` steps."""
    rows = steps * LONG["batch.size"] // LONG["num_epochs"]
    workdir = directory / "long"
    began = time.perf_counter()
    ended = train(workdir, LONG | {"data.num_lower": rows + LONG["eval.num_lower"]}, measured=True)
    seconds = time.perf_counter() - began
    check(ended, "the long run")
    held = np.array([line.split()[1:] for line in ended.said if line.startswith("holds ")], float)
    last = held[-1, 0]
    settled = held[held[:, 0] >= 0.2 * last]  # the first fifth warms up: all shapes compiled, all pools filled

    def slope(column: int, scale: float) -> float:
        return float(np.polyfit(settled[:, 0] / 1000, settled[:, column] / scale, 1)[0])

    def three(column: int) -> dict[str, int]:
        return {"at_20%": int(settled[0, column]), "at_end": int(settled[-1, column]), "most": int(held[:, column].max())}

    files = {file.relative_to(workdir).as_posix(): file.stat().st_size for file in workdir.rglob("*") if file.is_file()}
    grouped = collections.Counter()
    for name, size in files.items():
        grouped[name.partition("/")[0]] += size
    return {
        "steps": int(last),
        "seconds": round(seconds, 1),
        "refreshes": -(-int(last) // LONG["online.refresh_every"]),
        "checkpoints_written": int(last) // LONG["checkpoint.every"],
        "checkpoints_left": len(list((workdir / "checkpoints").glob("*"))),
        "rss_mb": {name: round(value / 1e6) for name, value in three(1).items()},
        "rss_slope_mb_per_1000_steps": round(slope(1, 1e6), 3),
        "live_arrays": three(2),
        "device_slope_mb_per_1000_steps": round(slope(3, 1e6), 4),
        "files": three(4),
        "bytes": dict(grouped.most_common()),
    }


# --------------------------------------------------------------------------------------------------------------------
# What is told
# --------------------------------------------------------------------------------------------------------------------


def page(command: str, found: dict) -> list[str]:
    """Lines of Markdown."""

    def table(head: str, pairs) -> list[str]:
        return [f"| {head} | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in pairs), ""]

    one, lines = found["runs"], ["# Interruptions, faults and a long run", "", f"`{command}`", ""]
    two = found.get("exports", {"exports": 0, "kills": 0, "mismatches": []})
    pairs = found.get("pairs", {"runs": 0, "kills": {}, "mismatches": []})
    wrong = one["mismatches"] + two["mismatches"] + pairs["mismatches"]
    counts = [("runs ended", one["runs"]), ("tries", one["tries"]), ("runs killed", sum(one["kills"].values()))]
    counts += [("exports ended", two["exports"]), ("exports killed", two["kills"])]
    counts += [("pairs of processes ended", pairs["runs"]), ("pairs of which one was killed", sum(pairs["kills"].values()))]
    counts += [("checkpoints damaged", sum(one["faults"].values())), ("damaged checkpoints set aside", one["set_aside"])]
    lines += table("counts", [*counts, ("mismatches with the uninterrupted run", len(wrong))])
    lines += table("killed during", sorted(one["kills"].items())) + table("faults", sorted(one["faults"].items()))
    lines += table("of two processes, killed during", sorted(pairs["kills"].items())) if pairs["kills"] else []
    lines += [f"- {line}" for line in wrong]
    if "long" in found:
        long = found["long"]
        shown = {key: value for key, value in long.items() if not isinstance(value, dict)}
        for key in ("rss_mb", "live_arrays", "files"):
            shown |= {f"{key}, {at.replace('_', ' ')}": value for at, value in long[key].items()}
        shown |= {f"bytes of {name}": value for name, value in long["bytes"].items()}
        lines += table("the long run", ((key.replace("_", " "), value) for key, value in shown.items()))
    return lines

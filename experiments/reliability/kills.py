"""Parts 1 and 3 of the soak: killed runs with damaged checkpoints, and killed process pairs."""

import collections
import json
import pathlib
import shutil
import signal

import numpy as np
import tqdm

from experiments.reliability import processes

PHASES = {  # activity -> maximum number of starts before a kill, maximum delay after the start in seconds
    "load": (1, 1.0),
    "compile": (1, 1.0),
    "train": (8, 0.5),  # checkpoints are written meanwhile
    "generate": (3, 0.5),
    "eval": (2, 0.2),
    "checkpoint": (5, 0.05),
}
PER_RUN = 8  # maximum number of kills of one run
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
    "log.every": 1,  # an event that covers several steps would restart when a run continues
}


# --------------------------------------------------------------------------------------------------------------------
# Comparison
# --------------------------------------------------------------------------------------------------------------------


def results(workdir: pathlib.Path) -> dict[str, object]:
    """The contents that must not depend on interruptions, by file. Times and speeds are left out."""
    measured = ("time/", "speed/", "online/time_share")
    names = ["config.json", "responses.jsonl", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
    names += sorted(file.relative_to(workdir).as_posix() for file in workdir.glob("weights/*"))
    contents: dict[str, object] = {name: (workdir / name).read_bytes() for name in names}
    events = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for name, records in (("metrics.jsonl", events), ("summary.json", [json.loads((workdir / "summary.json").read_text())])):
        contents[name] = [{key: value for key, value in record.items() if not key.startswith(measured)} for record in records]
    return contents


def differing(contents: dict[str, object], expected: dict[str, object]) -> list[str]:
    """The names whose contents differ."""
    return sorted(name for name in contents.keys() | expected.keys() if contents.get(name) != expected.get(name))


# --------------------------------------------------------------------------------------------------------------------
# Faults
# --------------------------------------------------------------------------------------------------------------------


def spoil(checkpoints: pathlib.Path, kind: str, rng: np.random.Generator) -> str | None:
    """Damages the newest checkpoint if the previous one is intact.

    Returns:
      `detected` if the checksums detect the damage, `harmless` if no file that is read has changed, None if nothing was done.
    """
    from bilevel_jax.runtime import checkpoint

    steps = sorted((int(entry.name) for entry in checkpoints.glob("*") if entry.name.isdecimal()), reverse=True)
    if len(steps) < 2 or any(checkpoint.damage(checkpoints / str(step)) for step in steps[:2]):
        return None
    newest = checkpoints / str(steps[0])
    files = sorted(newest / name for name in (*json.loads((newest / checkpoint.MANIFEST).read_text()), checkpoint.MANIFEST))
    file = files[rng.integers(len(files))]
    content = bytearray(file.read_bytes())
    offset = int(rng.integers(max(1, len(content))))
    if kind == "truncate":
        file.write_bytes(content[:offset])
    elif kind == "flip a bit":
        content[offset] ^= 1 << int(rng.integers(8))
        file.write_bytes(content)
    elif kind == "delete a file":
        file.unlink()
    else:
        shutil.rmtree(newest)
        newest.mkdir()
    return "detected" if checkpoint.damage(newest) else "harmless"


# --------------------------------------------------------------------------------------------------------------------
# The parts
# --------------------------------------------------------------------------------------------------------------------


def random_moment(rng: np.random.Generator, kill: bool = True) -> tuple[str, int, float] | None:
    """A random moment to kill a run: activity, number of earlier starts, delay in seconds; None without `kill`."""
    phase = list(PHASES)[rng.integers(len(PHASES))]
    max_starts, max_delay = PHASES[phase]
    return (phase, int(rng.integers(max_starts)), rng.uniform(0, max_delay)) if kill else None


class Counts:
    """Counts of part 1."""

    def __init__(self):
        self.kills, self.faults = collections.Counter(), collections.Counter()
        self.runs = self.tries = self.set_aside = 0
        self.mismatches: list[str] = []


def _run_with_kills(workdir: pathlib.Path, counts: Counts, num_kills: int, num_faults: int, rng, bar: tqdm.tqdm) -> int:
    """Repeats one run until it finishes, with kills and faults between; returns the number of detected faults."""
    kills_here = num_detected = 0
    while not (workdir / "summary.json").exists():
        kill = kills_here < PER_RUN and counts.kills.total() < num_kills
        ended = processes.train(workdir, SMALL, random_moment(rng, kill))
        processes.check(ended, workdir.name)
        counts.tries += 1
        if ended.code == -signal.SIGKILL:
            counts.kills[ended.reports[-1]] += 1
            kills_here += 1
            bar.update()
        if ended.code and counts.faults.total() < num_faults and rng.random() < max(0.5, num_faults / max(1, num_kills)):
            kind = KINDS[rng.integers(len(KINDS))]
            outcome = spoil(workdir / "checkpoints", kind, rng)
            if outcome:
                counts.faults[f"{kind}, {outcome}"] += 1
                num_detected += outcome == "detected"
    return num_detected


def interrupt(directory: pathlib.Path, num_kills: int, num_faults: int, rng: np.random.Generator) -> dict:
    """Part 1: kills runs and damages their checkpoints. Returns counts, and the differences from an uninterrupted run."""
    reference = directory / "reference"
    if not (reference / "summary.json").exists():
        processes.check(processes.train(reference, SMALL), "the uninterrupted run")
    expected, counts = results(reference), Counts()
    with tqdm.tqdm(total=num_kills, desc="kills", unit="kill") as bar:
        while not counts.runs or counts.kills.total() < num_kills:
            workdir = directory / f"run_{counts.runs}"
            shutil.rmtree(workdir, ignore_errors=True)  # of an earlier part
            num_detected = _run_with_kills(workdir, counts, num_kills, num_faults, rng, bar)
            counts.runs += 1
            num_aside = len(list((workdir / "checkpoints").glob("damaged-*")))
            counts.set_aside += num_aside
            counts.mismatches += [f"{workdir.name}: {name}" for name in differing(results(workdir), expected)]
            if num_aside != num_detected:
                counts.mismatches.append(f"{workdir.name}: {num_detected} checkpoints were damaged, {num_aside} were detected")
            if not counts.mismatches and counts.runs > 1:
                shutil.rmtree(workdir)
    return {
        "runs": counts.runs,
        "tries": counts.tries,
        "kills": dict(counts.kills),
        "faults": dict(counts.faults),
        "set_aside": counts.set_aside,
        "mismatches": counts.mismatches,
    }


def interrupt_pairs(directory: pathlib.Path, num_kills: int, rng: np.random.Generator) -> dict:
    """Part 3: kills one process of a pair. The other must end by itself, and the pair must continue to the same bits."""
    reference, settings = directory / "pair", SMALL | {"mesh.fsdp": 2}
    while not (reference / "summary.json").exists():
        for ended in processes.train_pair(reference, settings):
            processes.check(ended, "the uninterrupted pair")
    expected, kills, runs, mismatches = results(reference), collections.Counter(), 0, []
    with tqdm.tqdm(total=num_kills, desc="kills of one of two", unit="kill") as bar:
        while not runs or kills.total() < num_kills:
            workdir, kills_here = directory / f"pair_{runs}", 0
            shutil.rmtree(workdir, ignore_errors=True)  # of an earlier part
            while not (workdir / "summary.json").exists():
                moment = random_moment(rng, kills_here < PER_RUN and kills.total() < num_kills)
                victim = int(rng.integers(2))
                pair = processes.train_pair(workdir, settings, moment, victim)
                if pair[victim].code != -signal.SIGKILL:
                    for ended in pair:
                        processes.check(ended, workdir.name)
                    continue
                kills[f"{'the first' if victim == 0 else 'the other'}, {pair[victim].reports[-1]}"] += 1
                kills_here += 1
                bar.update()
                other = pair[1 - victim]
                message = processes.last_line(other)
                if other.code != 1 or not message.startswith(f"error: process {victim} died, "):
                    mismatches.append(f"{workdir.name}: the other ended with status {other.code}: {message}")
            runs += 1
            mismatches += [f"{workdir.name}: {name}" for name in differing(results(workdir), expected)]
    return {"runs": runs, "kills": dict(kills), "mismatches": mismatches}

"""Tests recovery: `python -m experiments.soak --kills=1000 --faults=300 --pair_kills=50 --hosts --long_steps=20000 --resume`.

1. A self-refining run finishes once without interruption. Then the same run is started again and again, killed by SIGKILL at random
   moments of every activity, with checkpoints damaged between attempts, until it finishes. Every output file must be bit-identical
   to that of the first run, except for times and speeds.
2. The same for commands: exports of rows and of merged models, preparations of rows, and reports.
3. One of the two processes of a run is killed. The other must end by itself, with one line, and the pair must continue to the same
   bits.
4. The same on two hosts (--hosts), whose link is cut as well. They are network namespaces, which takes root.
5. A long run with refreshes and checkpoints records its memory and its files.

Moments and faults depend only on --seed, on the counts so far and on the speed of the machine. The counts are written to OUT.md and
OUT.json, after every part and, in the first three parts, after every few kills. With --resume, a command goes on from the counts in
OUT.json, until the numbers are reached: it may be stopped at any moment. It fails if anything differs.
"""

import json
import pathlib
import shlex
import shutil
import sys

from absl import flags

from bilevel_jax import cli

FLAGS = flags.FlagValues()
WORKDIR = flags.DEFINE_string("workdir", "runs/soak", "Directory of the runs; earlier runs in it are removed.", flag_values=FLAGS)
OUT = flags.DEFINE_string("out", "experiments/results/soak", "Without suffix: OUT.md and OUT.json.", flag_values=FLAGS)
KILLS = flags.DEFINE_integer("kills", 100, "Total number of kills of runs and commands.", lower_bound=0, flag_values=FLAGS)
FAULTS = flags.DEFINE_integer(
    "faults", 30, "Number of checkpoints to damage; each needs an earlier intact one.", lower_bound=0, flag_values=FLAGS
)
PAIR_KILLS = flags.DEFINE_integer("pair_kills", 10, "Number of kills of one process of a pair.", lower_bound=0, flag_values=FLAGS)
HOSTS = flags.DEFINE_bool("hosts", False, "Kill a process and cut the link of a run on two hosts.", flag_values=FLAGS)
LONG_STEPS = flags.DEFINE_integer("long_steps", 20_000, "Steps of the long run; 0 leaves it out.", lower_bound=0, flag_values=FLAGS)
RESUME = flags.DEFINE_bool("resume", False, "Go on from the counts in OUT.json and the runs in --workdir.", flag_values=FLAGS)
SEED = flags.DEFINE_integer("seed", 0, "Seed of moments and faults.", flag_values=FLAGS)
SHARES = {"exports": 0.1, "preparations": 0.1, "reports": 0.1}  # of the kills; the others are of runs
PART = 40  # kills between two writings of the counts


def main() -> None:
    directory, out = pathlib.Path(WORKDIR.value).absolute(), pathlib.Path(OUT.value)
    results = begin(directory, out)
    lines = []
    for name, part in parts(directory, results):
        results[name] = added(results.get(name), part)
        lines = save(out, results)
    print("\n".join(lines or save(out, results)))
    mismatches = [line for part in results.values() if isinstance(part, dict) for line in part.get("mismatches", ())]
    if mismatches:
        raise ValueError(f"{len(mismatches)} mismatches: {'; '.join(mismatches[:3])}")


def begin(directory: pathlib.Path, out: pathlib.Path) -> dict:
    """The results so far, of this version of the package; and the directory of the runs, empty or with what can go on.

    Raises:
      ValueError: the directory holds something else, or the results are of another version.
    """
    from bilevel_jax.data.prepared import cache

    if directory.exists() and not (directory / "soak").exists() and any(directory.iterdir()):
        raise ValueError(f"--workdir={directory} holds something else; give another")
    results, saved = {"version": cache.version()}, out.with_suffix(".json")
    if RESUME.value and saved.exists():
        before = json.loads(saved.read_text())
        if before.get("version") != results["version"]:
            raise ValueError(
                f"--resume: {saved} is of another version of the package; start without --resume, or with another --out"
            )
        results = before
    else:
        shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "soak").touch()  # marks a directory that may be removed
    out.parent.mkdir(parents=True, exist_ok=True)
    return results


def killed(part: dict | None) -> int:
    """The kills that a part counts."""
    kills = (part or {}).get("kills", 0)
    return sum(kills.values()) if isinstance(kills, dict) else kills


def parts(directory: pathlib.Path, results: dict):
    """Yields the name and the counts of each piece of work that is left to do."""
    import numpy as np

    from experiments.reliability import commands, hosts, kills, long_run

    def pieces(name: str, target: int):
        while name not in results or killed(results[name]) < target:
            number = min(PART, target - killed(results.get(name)))
            yield number, np.random.default_rng((SEED.value, killed(results.get(name))))

    of_commands = {name: round(share * KILLS.value) for name, share in SHARES.items()}
    of_runs = KILLS.value - sum(of_commands.values())
    for number, rng in pieces("runs", of_runs):
        yield "runs", kills.interrupt(directory, number, round(FAULTS.value * number / max(1, of_runs)), rng)
    for name, target in of_commands.items():
        for number, rng in pieces(name, target) if target else ():
            yield name, commands.interrupt(name, directory, number, rng)
    for number, rng in pieces("pairs", PAIR_KILLS.value) if PAIR_KILLS.value else ():
        yield "pairs", kills.interrupt_pairs(directory, number, rng)
    if HOSTS.value and "hosts" not in results:
        yield "hosts", hosts.interrupt(directory, kills.SMALL | {"mesh.fsdp": 2})
    if LONG_STEPS.value and "long" not in results:
        yield "long", long_run.measure(directory, LONG_STEPS.value)


def added(before, now):
    """The counts of two pieces of a part together: numbers are added, lists joined."""
    if before is None:
        return now
    if isinstance(now, dict):
        return {key: added(before.get(key), now.get(key, type(before.get(key))())) for key in before | now}
    return before + now


def save(out: pathlib.Path, results: dict) -> list[str]:
    """Writes the results, and returns the lines of their page."""
    from bilevel_jax import files
    from experiments.reliability import page

    lines = page.lines(f"python -m experiments.soak {shlex.join(sys.argv[1:])}".strip(), results)
    files.write_atomically(out.with_suffix(".md"), "\n".join(lines).rstrip() + "\n")
    files.write_atomically(out.with_suffix(".json"), json.dumps(results, indent=1) + "\n")
    return lines


if __name__ == "__main__":
    cli.run(main, FLAGS)

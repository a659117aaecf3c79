"""Tests recovery: `python -m experiments.soak --kills=100 --faults=30 --long_steps=20000`.

1. A self-refining run finishes once without interruption. Then the same run is started again and again, killed by SIGKILL at random
   moments of every activity, with checkpoints damaged between attempts, until it finishes. Every output file must be bit-identical
   to that of the first run, except for times and speeds.
2. The same for exports.
3. One of the two processes of a run is killed. The other must end by itself, with one line, and the pair must continue to the same
   bits.
4. A long run with refreshes and checkpoints records its memory and its files.

Moments and faults depend only on --seed and on the speed of the machine. The counts are written to OUT.md and OUT.json. The command
fails if anything differs.
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
KILLS = flags.DEFINE_integer("kills", 100, "Total number of kills of runs and exports.", lower_bound=0, flag_values=FLAGS)
FAULTS = flags.DEFINE_integer(
    "faults", 30, "Number of checkpoints to damage; each needs an earlier intact one.", lower_bound=0, flag_values=FLAGS
)
PAIR_KILLS = flags.DEFINE_integer("pair_kills", 10, "Number of kills of one process of a pair.", lower_bound=0, flag_values=FLAGS)
LONG_STEPS = flags.DEFINE_integer("long_steps", 20_000, "Steps of the long run; 0 leaves it out.", lower_bound=0, flag_values=FLAGS)
SEED = flags.DEFINE_integer("seed", 0, "Seed of moments and faults.", flag_values=FLAGS)


def main() -> None:
    import numpy as np

    from bilevel_jax import files
    from experiments.reliability import kills, long_run, page

    directory, out = pathlib.Path(WORKDIR.value).absolute(), pathlib.Path(OUT.value)
    if directory.exists() and not (directory / "soak").exists() and any(directory.iterdir()):
        raise ValueError(f"--workdir={directory} holds something else; give another")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / "soak").touch()  # marks a directory that may be removed
    out.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED.value)
    num_export_kills = round(kills.EXPORT_SHARE * KILLS.value)
    parts = {"runs": lambda: kills.interrupt(directory, KILLS.value - num_export_kills, FAULTS.value, rng)}
    if num_export_kills:
        parts["exports"] = lambda: kills.interrupt_exports(directory, num_export_kills, rng)
    if PAIR_KILLS.value:
        parts["pairs"] = lambda: kills.interrupt_pairs(directory, PAIR_KILLS.value, rng)
    if LONG_STEPS.value:
        parts["long"] = lambda: long_run.measure(directory, LONG_STEPS.value)
    results, lines = {}, []
    for name, part in parts.items():
        results[name] = part()
        lines = page.lines(f"python -m experiments.soak {shlex.join(sys.argv[1:])}".strip(), results)
        files.write_atomically(out.with_suffix(".md"), "\n".join(lines).rstrip() + "\n")
        files.write_atomically(out.with_suffix(".json"), json.dumps(results, indent=1) + "\n")
    print("\n".join(lines))
    mismatches = [line for part in results.values() for line in part.get("mismatches", ())]
    if mismatches:
        raise ValueError(f"{len(mismatches)} mismatches: {'; '.join(mismatches[:3])}")


if __name__ == "__main__":
    cli.run(main, FLAGS)

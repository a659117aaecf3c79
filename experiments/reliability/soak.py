"""Does the damage that is promised to do none: `python -m experiments.soak --kills=100 --faults=30 --long_steps=20000`.

1. A run that refines itself ends uninterrupted once. The same run is then begun again and again, killed by SIGKILL at random
   moments of every activity, its checkpoints damaged between tries, and continued until it ends. Every file that it leaves is
   compared with that of the first one, to the bit; times and speeds aside.
2. So is an export that is killed and given again.
3. Of the two processes of a run one is killed: the other must end by itself, in one line, and the pair goes on to the same bits.
4. A long run, with refreshes and checkpoints, notes its memory and its files.

All moments and faults follow from --seed, the machine's speed aside. The counts are written to OUT.md and OUT.json, and the command
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
WORKDIR = flags.DEFINE_string("workdir", "runs/soak", "Where the runs go; what is there is removed first.", flag_values=FLAGS)
OUT = flags.DEFINE_string("out", "experiments/results/soak", "Without suffix: OUT.md and OUT.json.", flag_values=FLAGS)
KILLS = flags.DEFINE_integer("kills", 100, "Runs and exports are killed that often in all.", lower_bound=0, flag_values=FLAGS)
FAULTS = flags.DEFINE_integer(
    "faults", 30, "Checkpoints are damaged that often, as far as there is an earlier one.", lower_bound=0, flag_values=FLAGS
)
PAIR_KILLS = flags.DEFINE_integer("pair_kills", 10, "One of two processes is killed that often.", lower_bound=0, flag_values=FLAGS)
LONG_STEPS = flags.DEFINE_integer("long_steps", 20_000, "Steps of the long run; 0 leaves it out.", lower_bound=0, flag_values=FLAGS)
SEED = flags.DEFINE_integer("seed", 0, "Of moments and faults.", flag_values=FLAGS)


def main() -> None:
    import numpy as np

    from bilevel_jax import files
    from experiments.reliability import kills

    directory, out = pathlib.Path(WORKDIR.value).absolute(), pathlib.Path(OUT.value)
    if directory.exists() and not (directory / "soak").exists() and any(directory.iterdir()):
        raise ValueError(f"--workdir={directory} holds something else; give another")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / "soak").touch()  # marks what may be removed
    out.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED.value)
    of_exports = round(kills.EXPORT_SHARE * KILLS.value)
    parts = {"runs": lambda: kills.interrupt(directory, KILLS.value - of_exports, FAULTS.value, rng)}
    if of_exports:
        parts["exports"] = lambda: kills.interrupt_exports(directory, of_exports, rng)
    if PAIR_KILLS.value:
        parts["pairs"] = lambda: kills.interrupt_pairs(directory, PAIR_KILLS.value, rng)
    if LONG_STEPS.value:
        parts["long"] = lambda: kills.long_run(directory, LONG_STEPS.value)
    found, lines = {}, []
    for name, part in parts.items():
        found[name] = part()
        lines = kills.page(f"python -m experiments.soak {shlex.join(sys.argv[1:])}".strip(), found)
        files.write_atomically(out.with_suffix(".md"), "\n".join(lines).rstrip() + "\n")
        files.write_atomically(out.with_suffix(".json"), json.dumps(found, indent=1) + "\n")
    print("\n".join(lines))
    wrong = [line for part in found.values() for line in part.get("mismatches", ())]
    if wrong:
        raise ValueError(f"{len(wrong)} mismatches: {'; '.join(wrong[:3])}")


if __name__ == "__main__":
    cli.run(main, FLAGS)

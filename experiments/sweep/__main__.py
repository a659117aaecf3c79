"""Runs a grid of settings: `python -m experiments.sweep --config=FILE:TIER --workdir=DIR [--set key=value,value,...]`.

    python -m experiments.sweep --config=configs/quality.py --workdir=runs/sweep \\
        --set online.ratio=0.05,0.1,0.2 --set online.num_samples=1,5

Several --set make their product; without any, the cells are those that `sweep(add)` of the config file adds. Each is a run of
`bilevel_jax.main` in DIR/<cell>/seed_K, its output in DIR/<cell>/seed_K.log. The same command again continues what was killed
and tries again what failed. DIR/sweep.md has the table, sweep.json all summaries, sweep.png a heat map over two keys or a line
over one.
"""

import json
import pathlib
import shlex
import sys

from absl import flags

from bilevel_jax import cli

FLAGS = flags.FlagValues()
CONFIG = flags.DEFINE_string(
    "config", None, "Config file, with a tier after a colon if it has any.", required=True, flag_values=FLAGS
)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the runs, the table and the picture go.", required=True, flag_values=FLAGS)
SET = flags.DEFINE_multi_string("set", [], "key=value,value,...: a key of the config and what it takes in turn.", flag_values=FLAGS)
SEEDS = flags.DEFINE_integer("seeds", 1, "Seeds 0, 1, ... of every cell.", lower_bound=1, flag_values=FLAGS)
METRIC = flags.DEFINE_string(
    "metric", None, "Key of summary.json to draw; by default the held-out loss on right answers.", flag_values=FLAGS
)
LAUNCHER = flags.DEFINE_enum("launcher", "local", ["local", "ray", "slurm"], "Where the runs are started.", flag_values=FLAGS)
JOBS = flags.DEFINE_integer("jobs", 1, "Runs at a time with --launcher=local; a GPU holds one.", lower_bound=1, flag_values=FLAGS)
RAY = flags.DEFINE_string("ray_options", "{}", 'JSON for ray.remote, such as {"num_gpus": 1}.', flag_values=FLAGS)
SLURM = flags.DEFINE_string(
    "slurm_options", "{}", 'JSON for submitit, such as {"timeout_min": 600, "gpus_per_node": 1}.', flag_values=FLAGS
)


def options() -> dict:
    """Those of the launcher that was chosen.

    Raises:
      ValueError: they are not a JSON object.
    """
    flag = RAY if LAUNCHER.value == "ray" else SLURM
    try:
        found = json.loads(flag.value)
    except json.JSONDecodeError as error:
        raise ValueError(f"--{flag.name}={flag.value}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"--{flag.name}={flag.value}: must be a JSON object")
    return found


def main() -> None:
    from experiments import runs
    from experiments.sweep import (
        grid,  # after the flags, so that --help is quick
        launchers,
    )

    directory = pathlib.Path(WORKDIR.value)
    grid.resolve(CONFIG.value, {})  # a config that cannot be read is told as by the training command
    every = grid.grid(SET.value) if SET.value else grid.declared(CONFIG.value)
    points = grid.points(CONFIG.value, every)
    todo = grid.plan(CONFIG.value, points, SEEDS.value, directory)
    directory.mkdir(parents=True, exist_ok=True)
    start = launchers.get(LAUNCHER.value, JOBS.value, options(), directory / "slurm")
    outcomes = grid.gather(points, todo, runs.run_all(todo, start))
    command = "python -m experiments.sweep " + shlex.join(sys.argv[1:])
    print(grid.write(directory, command, outcomes, METRIC.value), "", f"table: {directory / 'sweep.md'}", sep="\n")
    print(grid.draw(directory / "sweep.png", outcomes, METRIC.value))
    failed = sum(len(outcome.failed) for outcome in outcomes)
    if failed:
        raise ValueError(f"{failed} of {len(todo)} runs failed; the same command tries them again")


if __name__ == "__main__":
    cli.run(main, FLAGS)

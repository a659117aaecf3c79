"""Runs a grid of settings: `python -m experiments.sweep --config=FILE:TIER --workdir=DIR [--set key=value,value,...]`.

    python -m experiments.sweep --config=configs/quality.py --workdir=runs/sweep \\
        --set online.ratio=0.05,0.1,0.2 --set online.num_samples=1,5 --config.num_epochs=2

Several --set form a grid, their product. Without --set, `sweep(add)` of the config file defines the cells. `--config.KEY=VALUE` is
for all runs. Each cell is a run of `bilevel_jax.main` in DIR/<cell>/seed_K, named by the keys that vary, with its output in
DIR/<cell>/seed_K.log. The same command again continues killed runs and repeats failed runs. DIR/sweep.md contains the table,
sweep.json all summaries, sweep.png a heat map over two keys or a line over one.
"""

import json
import pathlib
import shlex
import sys

from absl import flags
from ml_collections import config_flags

from bilevel_jax import cli, config_files

FLAGS = flags.FlagValues()
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, optionally with a tier: FILE:TIER; --config.KEY=VALUE is for all runs.", flag_values=FLAGS
)
FLAGS["config"].parser = config_files.Parser("config")  # finds the package's configs from any directory
flags.mark_flag_as_required("config", flag_values=FLAGS)
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of runs, table and picture.", required=True, flag_values=FLAGS)
SET = flags.DEFINE_multi_string("set", [], "key=value,value,...: a config key and its values.", flag_values=FLAGS)
SEEDS = flags.DEFINE_integer("seeds", 1, "Seeds 0, 1, ... of every cell.", lower_bound=1, flag_values=FLAGS)
METRIC = flags.DEFINE_string(
    "metric", None, "Key of summary.json to draw; by default the held-out loss of right answers.", flag_values=FLAGS
)
LAUNCHER = flags.DEFINE_enum("launcher", "local", ["local", "ray", "slurm"], "Where the runs are executed.", flag_values=FLAGS)
JOBS = flags.DEFINE_integer("jobs", 1, "Runs at a time with --launcher=local; one per GPU.", lower_bound=1, flag_values=FLAGS)
RAY = flags.DEFINE_string("ray_options", "{}", 'JSON for ray.remote, such as {"num_gpus": 1}.', flag_values=FLAGS)
SLURM = flags.DEFINE_string(
    "slurm_options", "{}", 'JSON for submitit, such as {"timeout_min": 600, "gpus_per_node": 1}.', flag_values=FLAGS
)


def options() -> dict:
    """The options of the chosen launcher.

    Raises:
      ValueError: the options are not a JSON object, or those of another launcher are given.
    """
    of_launcher = {"jobs": "local", "ray_options": "ray", "slurm_options": "slurm"}
    for name, launcher in of_launcher.items():
        if FLAGS[name].present and LAUNCHER.value != launcher:
            raise ValueError(f"--{name} goes with --launcher={launcher}")
    flag = RAY if LAUNCHER.value == "ray" else SLURM
    try:
        values = json.loads(flag.value)
    except json.JSONDecodeError as error:
        raise ValueError(f"--{flag.name}={flag.value}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--{flag.name}={flag.value}: must be a JSON object")
    return values


def main() -> None:
    from experiments import runs  # imported after the flags are parsed, so --help is quick
    from experiments.sweep import grid, launchers

    directory = pathlib.Path(WORKDIR.value)
    config = config_files.resolve(config_flags.get_config_filename(FLAGS["config"]))
    settings = grid.grid(SET.value) if SET.value else grid.declared(config)
    points = grid.points(config, settings, config_flags.get_override_values(FLAGS["config"]))
    cells = grid.plan(config, points, SEEDS.value, directory)
    directory.mkdir(parents=True, exist_ok=True)
    start = launchers.get(LAUNCHER.value, JOBS.value, options(), directory / "slurm")
    outcomes = grid.gather(points, cells, runs.run_all(cells, start))
    command = "python -m experiments.sweep " + shlex.join(sys.argv[1:])
    print(grid.write(directory, command, outcomes, METRIC.value), "", f"table: {directory / 'sweep.md'}", sep="\n")
    print(grid.draw(directory / "sweep.png", outcomes, METRIC.value))
    num_failed = sum(len(outcome.failed) for outcome in outcomes)
    if num_failed:
        raise ValueError(f"{num_failed} of {len(cells)} runs failed; the same command tries them again")


if __name__ == "__main__":
    cli.run(main, FLAGS)

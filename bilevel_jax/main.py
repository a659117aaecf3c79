"""Trains: `python -m bilevel_jax.main --config=configs/safety.py[:TIER] [--workdir=DIR] [--config.KEY=VALUE ...]`.

`--check` is a dry run, `--plan` prints the memory plan, `--plan --compile=TARGET` compiles for devices that need not be there.
"""

import pathlib

from absl import flags
from ml_collections import config_flags

from bilevel_jax import cli, config_files, config_keys
from bilevel_jax.text import say

FLAGS = flags.FlagValues()
CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "A config of the package, such as finetune, or a file; optionally with a tier: FILE:TIER. Its keys can be changed; "
    f"their defaults are\n{config_keys.listing()}",
    flag_values=FLAGS,
)
FLAGS["config"].parser = config_files.Parser("config")  # finds the package's configs from any directory
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; runs/<config name>[-TIER] by default.", flag_values=FLAGS)
PLAN = flags.DEFINE_bool(
    "plan", False, "Only print the memory plan of each device of the mesh; reads config.json, no weights.", flag_values=FLAGS
)
CHECK = flags.DEFINE_bool(
    "check",
    False,
    "Dry run: read both levels, compile, time two steps, and print rows, steps, time, memory and disk space. Writes nothing. "
    "With --plan also the memory plan.",
    flag_values=FLAGS,
)
COMPILE = flags.DEFINE_string(
    "compile",
    None,
    "With --plan: compile the programs of the run for a target that need not be there, such as tpu-v5e:2x2 or gpu-h100:8, and "
    "print memory, FLOPs, bytes and collectives of each. Needs the extra tpu or cuda13.",
    flag_values=FLAGS,
)
flags.mark_flag_as_required("config", flag_values=FLAGS)


def default_workdir(config: str) -> pathlib.Path:
    """The workdir of a config file: `configs/safety.py:smollm2` -> `runs/safety-smollm2`."""
    file, _, tier = config.partition(":")
    return pathlib.Path("runs") / "-".join(filter(None, (pathlib.Path(file).stem, tier.replace("/", "_"))))


def print_compiled(text: str) -> None:
    """Prints the programs of the run, compiled for the target `text`.

    Raises:
      ValueError: no such target, or the flag is used without --plan.
    """
    import jax

    if not PLAN.value or CHECK.value:
        raise ValueError(f"--compile={text} belongs to --plan; add --plan, without --check")
    jax.config.update("jax_platforms", "cpu")  # of this machine, which only traces
    from bilevel_jax.planning import compile_plan, targets

    for part in compile_plan.compile_run(CONFIG.value, targets.parse(text)):
        say(f"{part}\n", flush=True)


def main() -> None:
    """Runs the command."""
    import jax  # imports follow the flags, so that --help is quick

    if COMPILE.value is not None:
        print_compiled(COMPILE.value)
        return
    from bilevel_jax import train
    from bilevel_jax.planning import dry_run, memory
    from bilevel_jax.runtime import distributed, summary_table

    if PLAN.value and not CHECK.value:
        say(memory.table(CONFIG.value, memory.make_plan(CONFIG.value)))
        return
    distributed.join()
    workdir = pathlib.Path(WORKDIR.value or default_workdir(config_flags.get_config_filename(FLAGS["config"])))
    with distributed.exit_together():
        if CHECK.value:
            for part in dry_run.check(CONFIG.value, workdir, plan=PLAN.value):
                if not jax.process_index():
                    say(f"\n{part}", flush=True)
            return
        summary = train.run(CONFIG.value, workdir, cli.BEGAN)
    if not jax.process_index():
        say(summary_table.summary_table(summary, workdir))


if __name__ == "__main__":
    cli.run(main, FLAGS)

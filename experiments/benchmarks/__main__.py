"""Measures speed: `python -m experiments.benchmarks --suite=SUITE [--config=FILE:TIER] [--out=FILE.md]`.

train     training step against PyTorch (in .venv-parity, see the Makefile; --config=configs/quality.py:smollm2 --rounds=3)
memory    peak memory of the training step, ours and PyTorch (in .venv-parity)
decode    sampling against `generate` of transformers (in .venv-parity; --config=configs/safety.py:smollm2)
selector  cost of the selector for up to 10^7 rows
all       the four above
breakdown time of the training step by part, from a trace (--config=configs/quality.py:smollm2 --rounds=3)
dtype     training step in bfloat16 against float32 (--config=configs/quality.py:smollm2 --rounds=3)
cost      a step of bilevel selection against a step of direct mixing
frozen    adapters in the last layers against all (--config=configs/quality.py:smollm2 --config.lora.layers=last:8 --rounds=4)
large     what grows with the number of rows, at 10^6 of them: step, checkpoint, export, report (--rounds=10)
padding   packed sequences against padded rows (for real rows, --config=configs/quality.py:smollm2)
starts    what a later start does with prepared rows (--rows=1000,1000000 --rounds=3)
rows      first and later start with many rows, against TRL's way (--config=configs/quality.py:smollm2 --rows=10000,100000)
"""

import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from bilevel_jax import cli

ALL = ("train", "memory", "decode", "selector")
SUITES = (*ALL, "all", "breakdown", "dtype", "cost", "frozen", "large", "padding", "rows", "starts")

FLAGS = flags.FlagValues()
CONFIG = config_flags.DEFINE_config_file("config", "configs/safety.py", "Model and rows to measure on.", flag_values=FLAGS)
SUITE = flags.DEFINE_enum("suite", "cost", SUITES, "What to measure.", flag_values=FLAGS)
ROUNDS = flags.DEFINE_integer("rounds", 10, "Timed rounds of each variant.", lower_bound=1, flag_values=FLAGS)
ROWS = flags.DEFINE_list("rows", ["10000", "100000"], "Numbers of rows of the suites rows and starts.", flag_values=FLAGS)
OUT = flags.DEFINE_string("out", None, "Markdown file to write besides standard output.", flag_values=FLAGS)


def measure(suite: str, config, rounds: int) -> list[str]:
    """Markdown lines of a suite."""
    import dataclasses

    from bilevel_jax import checks
    from bilevel_jax.data import levels, templates
    from bilevel_jax.models import huggingface
    from experiments.benchmarks import (
        breakdown,
        cost,
        decode,
        dtypes,
        frozen_layers,
        large,
        memory,
        padding,
        rows,
        selector_cost,
        starts,
        train_step,
    )

    if suite == "selector":
        return selector_cost.measure(rounds)
    if suite == "large":
        return large.measure(config, rounds)
    if suite == "starts":
        return starts.measure([int(number) for number in ROWS.value], rounds)
    if suite == "rows":
        return rows.measure(config, [int(number) for number in ROWS.value], rounds)
    if suite == "memory":
        return memory.measure(config)
    directory = str(huggingface.locate(config.model.path))
    tokenizer = templates.load_tokenizer(directory)
    upper, lower = levels.load_level(config, "upper", tokenizer), levels.load_level(config, "lower", tokenizer)
    if suite == "dtype":
        return dtypes.measure(config, directory, upper, lower, rounds)
    model, base = huggingface.load_model(directory, config.model.dtype)
    model = dataclasses.replace(model, adapter_scale=config.lora.alpha / config.lora.rank, remat=config.model.remat)
    prompts, eos = [example.prompt for example in lower.examples], huggingface.eos_ids(directory, tokenizer)
    if suite == "decode":
        return decode.measure(config, model, base, directory, prompts, eos, rounds)
    if suite == "cost":
        return cost.measure(config, model, base, upper, lower, rounds)
    if suite == "frozen":
        return frozen_layers.measure(checks.build(config), model, base, upper, lower, rounds)
    steps = {"train": train_step, "breakdown": breakdown, "padding": padding}
    return steps[suite].measure(config, model, base, directory, upper, lower, rounds)


def main() -> None:
    from experiments.benchmarks import timing

    lines = []
    for suite in ALL if SUITE.value == "all" else (SUITE.value,):
        lines += [f"# Benchmark: {suite}", "", *measure(suite, CONFIG.value, ROUNDS.value), ""]
    command = "python -m experiments.benchmarks " + " ".join(a for a in sys.argv[1:] if not a.startswith("--out"))
    text = "\n".join([lines[0], "", f"`{command}`", "", timing.hardware(), *lines[1:]])
    if OUT.value:
        pathlib.Path(OUT.value).write_text(text)
    print(text)


if __name__ == "__main__":
    cli.run(main, FLAGS)

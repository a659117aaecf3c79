"""Measures speed: `python -m experiments.benchmarks --suite=SUITE [--config=FILE:TIER] [--out=FILE.md]`.

train     the joint step over PyTorch's (in .venv-parity, see the Makefile; --config=configs/quality.py:smollm2 --rounds=3)
cost      a step of bilevel selection over one of direct mixing
padding   packed sequences over padded rows (give real rows, by --config=configs/quality.py:smollm2)
selector  the selector's own cost for up to 10^7 rows
decode    sampling over `generate` of transformers (in .venv-parity, see the Makefile; --config=configs/safety.py:smollm2)
refill    sampling with slot refill over without (--config=configs/safety.py:smollm2 --rounds=1)
"""

import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from bilevel_jax import cli

CONFIG = config_flags.DEFINE_config_file("config", "configs/safety.py", "Model and rows to measure on.")
SUITE = flags.DEFINE_enum("suite", "cost", ["train", "cost", "padding", "selector", "decode", "refill"], "What to measure.")
ROUNDS = flags.DEFINE_integer("rounds", 10, "Timed rounds of each variant.", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "Markdown file to write; standard output otherwise.")


def main() -> None:
    import dataclasses

    from bilevel_jax.data import levels, templates
    from bilevel_jax.models import huggingface
    from experiments.benchmarks import cost, decode, padding, refill, selector_cost, timing, train_step

    config = CONFIG.value
    if SUITE.value == "selector":
        lines = selector_cost.measure(ROUNDS.value)
    else:
        directory = str(huggingface.locate(config.model.path))
        tokenizer = templates.load_tokenizer(directory)
        upper, lower = levels.load_level(config, "upper", tokenizer), levels.load_level(config, "lower", tokenizer)
        model, base = huggingface.load_model(directory, config.model.dtype)
        model = dataclasses.replace(model, adapter_scale=config.lora.alpha / config.lora.rank, remat=config.model.remat)
        prompts, eos = [example.prompt for example in lower.examples], huggingface.eos_ids(directory, tokenizer)
        if SUITE.value == "decode":
            lines = decode.measure(config, model, base, directory, prompts, eos, ROUNDS.value)
        elif SUITE.value == "train":
            lines = train_step.measure(config, model, base, directory, upper, lower, ROUNDS.value)
        elif SUITE.value == "refill":
            lines = refill.measure(model, base, prompts, eos, ROUNDS.value)
        else:
            suite = {"cost": cost, "padding": padding}[SUITE.value]
            lines = suite.measure(config, model, base, upper, lower, ROUNDS.value)
    command = "python -m experiments.benchmarks " + " ".join(a for a in sys.argv[1:] if not a.startswith("--out"))
    text = "\n".join([f"# Benchmark: {SUITE.value}", "", f"`{command}`", "", timing.hardware(), "", *lines, ""])
    if OUT.value:
        pathlib.Path(OUT.value).write_text(text)
    print(text)


if __name__ == "__main__":
    cli.run(main)

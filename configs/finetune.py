"""Fine-tunes a model on your own rows, and gives each of them a weight.

The upper level has the rows that you trust, 20 or more; the lower level is the mixture to select from. Selection alone (`offline`):
no response is generated. For models of 0.1 to 8B parameters; base weights are in bfloat16 on accelerators and in float32 on a CPU.
Of each level 10% of the rows, at most 200, are held out for measurement.

    bilevel-jax train --config=finetune --config.model.path=MODEL --config.data.upper=FILE --config.data.lower=FILE
    bilevel-jax train --config=finetune:tiny --config.data.upper=FILE --config.data.lower=FILE      the embedded model, to try it

A step takes 32 rows of each level. `--plan` prints the memory that a model needs: in bfloat16, 8B parameters fit a device of 32 GB.
`--config.batch.micro_size=1` and `--config.model.remat` need less.
"""

from bilevel_jax import config as configuration

TIERS = ("", "tiny")


def get_config(tier: str = ""):
    if tier not in TIERS:
        raise ValueError(f"no tier '{tier}'; leave it out or choose {', '.join(TIERS[1:])}")
    config = configuration.default()
    config.method = "offline"
    config.data.upper = config.data.lower = ""  # yours
    config.eval.num_upper = config.eval.num_lower = 0.1
    config.selection.learning_rate = 3.0  # a few hundred steps at most: weights must move in each
    config.batch.micro_size = 2  # a step of 32 short rows fills 4 to 8 sequences per level
    if tier == "tiny":
        config.data.max_length = 512  # all that the embedded model has
        config.optimizer.learning_rate = 2e-3
        return config
    config.model.path = ""  # yours
    config.model.dtype = "auto"
    config.data.max_length = 1024
    config.optimizer.learning_rate = 2e-4  # common for LoRA adapters of models of this size
    return config


def sweep(add):
    """Learning rates, for `python -m experiments.sweep`."""
    for learning_rate in (1e-4, 2e-4, 5e-4):
        add({"optimizer.learning_rate": learning_rate})

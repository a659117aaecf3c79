"""A training step with base model and products in bfloat16 against float32: seconds, and differences of the losses."""

import dataclasses
import statistics

import ml_collections

from bilevel_jax.data import levels
from bilevel_jax.models import huggingface
from experiments.benchmarks import timing, train_step

DTYPES = ("float32", "bfloat16")


def measure(config, directory: str, upper: levels.Level, lower: levels.Level, rounds: int) -> list[str]:
    """Markdown lines of both, on the same batches."""
    variants, losses = {}, {name: [] for name in DTYPES}
    for name in DTYPES:
        variant = ml_collections.ConfigDict(config.to_dict())
        variant.model.dtype = name
        model, base = huggingface.load_model(directory, name)
        model = dataclasses.replace(model, adapter_scale=config.lora.alpha / config.lora.rank, remat=config.model.remat)
        run = train_step.ours(
            train_step.Work(variant, directory, upper, lower, rounds), model, base, config.selection.coefficient_at
        )
        variants[name] = lambda k, name=name, run=run: losses[name].append(run(k))
    seconds = timing.in_turn(variants, rounds)
    lines = [
        f"{rounds} steps of {config.batch.size} + {config.batch.size} rows of up to {config.data.max_length} tokens.",
        "",
        "| dtype | seconds, median | over float32: min | median | max | loss: maximum difference |",
        "| --- " * 6 + "|",
    ]
    for name, (low, middle, high) in timing.ratios(seconds, DTYPES[0]).items():
        difference = max(abs(loss - other) for loss, other in zip(losses[name], losses[DTYPES[0]], strict=True))
        lines.append(
            f"| {name} | {statistics.median(seconds[name]):.2f} | {low:.2f} | {middle:.2f} | {high:.2f} | {difference:.1e} |"
        )
    return lines

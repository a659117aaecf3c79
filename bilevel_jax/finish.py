"""What a run writes when its last step is done: what it learned, weights of tokens, summary, report."""

import math
import pathlib
import shutil
import sys

import jax
import numpy as np

from bilevel_jax import config as configuration
from bilevel_jax import errors, features, files, scoring, sharding, train_state
from bilevel_jax.export import merged_model
from bilevel_jax.models import huggingface
from bilevel_jax.report import page
from bilevel_jax.runtime import clock as clocks
from bilevel_jax.runtime import phases, weight_table
from bilevel_jax.runtime.workdir import absolute
from bilevel_jax.setup import Setup
from bilevel_jax.text import say


def write_adapter(config: configuration.Config, directory: pathlib.Path, setup: Setup, state: train_state.State) -> None:
    """θ in PEFT format."""
    base, lora = absolute(config.model.path), config.lora
    huggingface.save_adapter(
        directory, setup.model, state.policy.adapter, alpha=lora.alpha, base=base, rslora=lora.rslora, dropout=lora.dropout
    )


def write_step_adapter(config: configuration.Config, workdir: pathlib.Path, setup: Setup, state: train_state.State, k: int) -> None:
    """θ after k steps, in adapters/step_K; the oldest are removed, as many stay as there are checkpoints.

    Nothing is written with `lora.rank=0`, where the checkpoints have the weights."""
    if not config.lora.rank:
        return
    directory = workdir / "adapters"
    write_adapter(config, directory / f"step_{k}", setup, state)
    numbers = ((path.name.removeprefix("step_"), path) for path in directory.glob("step_*"))
    paths = {int(number): path for number, path in numbers if number.isdecimal()}
    kept = sorted(number for number in paths if number <= k)[-config.checkpoint.keep :]
    for number in paths.keys() - set(kept):
        shutil.rmtree(paths[number])


def write_parameters(config: configuration.Config, workdir: pathlib.Path, setup: Setup, state: train_state.State) -> None:
    """θ, in PEFT format or as a model directory, and, where ω is a function of features, φ."""
    if config.lora.rank:
        write_adapter(config, workdir / "adapter", setup, state)
    else:
        params = jax.tree.map(sharding.to_host, state.policy.adapter)
        merged_model.write_learned_model(huggingface.locate(config.model.path), params, setup.model, workdir / "model")
    if configuration.has_row_features(config):
        assert state.selector.feature_params is not None  # as with features
        features.write_params(workdir / features.PARAMS_FILE, sharding.to_host(state.selector.feature_params))


def write_token_weights(
    config: configuration.Config, workdir: pathlib.Path, setup: Setup, state: train_state.State, offsets: list[np.ndarray]
) -> dict[str, float]:
    """Writes weights/tokens.parquet, and returns `selector/token_auroc` where the rows mark bad parts.

    Args:
      offsets: of each row's tokens in its response, from `templates.response_offsets`.
    """
    shape = config.batch.micro_size, config.data.max_length, setup.mesh
    adapter, lower = state.policy.adapter, setup.lower
    weights = scoring.example_token_weights(setup.model, setup.base, adapter, state.token_params, lower.examples, *shape)
    table = weight_table.token_table(lower.rows, offsets, weights)
    weight_table.write(workdir / weight_table.TOKENS, table)
    auroc = weight_table.token_auroc(table, lower.rows, config.data.spans)
    return {"selector/token_auroc": auroc} if math.isfinite(auroc) else {}


def write_summary(workdir: pathlib.Path, setup: Setup, values: dict, clock: clocks.Clock) -> dict:
    """Writes summary.json and report.html, and returns the summary."""
    summary = values | {f"time/{key}": round(value, 2) for key, value in clock.elapsed().items()}

    def write() -> None:
        files.write_atomically(workdir / "summary.json", files.to_json(summary, indent=2) + "\n")

    write()  # the report reads it
    try:
        with clock("report"), phases.phase("writing the report"):
            page.write(workdir, setup.lower.rows)
    except Exception as error:  # whatever it is, the run is finished and only its report is missing
        cause = errors.one_line(error)
        say(f"no report.html ({cause}); to try again: python -m bilevel_jax.report --workdir={workdir}", file=sys.stderr)
    summary["time/report"] = round(clock.elapsed()["report"], 2)
    write()
    return summary

"""A dry run: `python -m bilevel_jax.main --config=... --check` reads, compiles and times what a run would.

It writes nothing but the caches of compiled programs and of prepared rows. Rows, model and step are the real ones. Only the times
are extrapolated, from two steps and from a few held-out rows.
"""

import dataclasses
import itertools
import pathlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

from bilevel_jax import (
    batches,
    checks,
    features,
    initial_weights,
    online,
    preferences,
    rewards,
    run_sizes,
    scoring,
    sharding,
    train_state,
)
from bilevel_jax import config as configuration
from bilevel_jax import setup as setups
from bilevel_jax.data import levels, rendering, templates
from bilevel_jax.data.prepared import sequences
from bilevel_jax.data.rejections import location
from bilevel_jax.planning import memory
from bilevel_jax.runtime import disk, state_store, workdir

TIMED_STEPS = 2
TIMED_ROWS = 16  # held-out rows whose evaluation is timed
MUCH_PADDING = 0.4  # share of a step at which the dry run says what to change
QUANTILES = (0.5, 0.95, 1.0)


def check(config: ml_collections.ConfigDict, directory: pathlib.Path, plan: bool = False) -> Iterator[str]:
    """Yields what a run would do, in parts for the user. Reading the rows prints a report of each level.

    Args:
      config: of the run.
      directory: its workdir.
      plan: add the memory plan.

    Raises:
      ConfigError, DataError, ModelError, RunError: as the run itself.
    """
    typed = checks.build(config)
    workdir.refuse_finished(directory)
    workdir.refuse_another(config, directory, resumes=True)
    began = time.perf_counter()
    setup = setups.load(typed)
    load_seconds = time.perf_counter() - began
    num_rows = len(setup.lower.rows)
    num_steps = setups.checked_steps(typed, setup)
    if typed.selection.init:
        yield initial_weights.read(typed.selection.init, setup.lower.rows).summary(typed.selection.init)
    if typed.method in configuration.ONLINE and typed.online.reward:
        rewards.make_reward_fn(typed.online.reward, setup.lower.rows, levels.truths(setup.lower, typed.data.truth))
    yield data_text(setup)
    yield rows_text(typed, setup)
    yield steps_text(typed, setup, num_steps)
    yield f"compiling and timing {TIMED_STEPS} steps ..."
    began = time.perf_counter()
    program, state = compile_step(typed, setup)
    compile_seconds = time.perf_counter() - began
    seconds, tokens, positions, state = time_steps(typed, setup, program, state, num_steps)
    evaluated = time_evaluation(typed, setup, program, state)
    timing = Timing(load_seconds, compile_seconds, seconds, tokens, positions, *evaluated)
    yield time_text(typed, setup, num_steps, timing)
    yield memory_text(program.train_step.compiled)
    yield disk_text(typed, state, num_rows, directory)
    if typed.model.cache_frozen != "off":
        yield frozen_text(typed, setup, directory)
    if plan:
        yield memory.table(config, memory.make_plan(config, num_rows))
    disk.check(directory, run_sizes.new_bytes(typed, setup, state, directory, disk.num_saved(directory)))
    continues = f"continues the run in {directory}" if (directory / "config.json").exists() else "starts the run"
    yield f"nothing was written; the same command without --check {continues}"


# --------------------------------------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------------------------------------


def _levels(setup: setups.Setup) -> dict[str, levels.Level]:
    return {"upper": setup.upper, "lower": setup.lower}


def data_text(setup: setups.Setup) -> str:
    """Rows of both levels: how many, how long, which repeat, which are on both."""
    lines = []
    for name, level in _levels(setup).items():
        numbers = f"{len(level.rows)} rows to train on, {len(level.eval_rows)} held out; {level.counts.get('duplicates', 0)} copies"
        median, most, longest = np.quantile(sequences.sizes(level.all_examples), QUANTILES)
        lines.append(f"{name}: {numbers}; tokens a row: median {median:.0f}, 95% below {most:.0f}, longest {longest:.0f}")
    return "\n".join([*lines, f"rows on both levels: {setup.lower.counts.get('overlap', 0)}"])


def rows_text(config: configuration.Config, setup: setups.Setup) -> str:
    """The template, and the first row of each schema as the model sees it."""
    template = templates.resolve(config.data.template, setup.tokenizer)
    if template == "chat":
        why = "that of the tokenizer"
    else:
        why = "that of the tokenizer is not used" if setup.tokenizer.chat_template else "the tokenizer has no chat template"
    marks = f"{rendering.OPENING} and {rendering.CLOSING}"
    lines = [f"template: {template} ({why}); one row of each schema, learned tokens between {marks}"]
    for name, level in _levels(setup).items():
        source = getattr(config.data, name)
        shown = rendering.one_of_each_schema(itertools.chain(level.rows, level.eval_rows), level.all_examples)
        for row, example in shown:
            learned = example.num_learned + (0 if example.rejected is None else len(example.rejected))
            what = f"{learned} of {sequences.sizes([example])[0]} tokens learned"
            lines.append(f"  {name}, {row.schema}, {location(source, row.line)}: {what}")
            lines.append(rendering.show(example, setup.tokenizer))
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------------
# Steps, tokens, time
# --------------------------------------------------------------------------------------------------------------------


def num_tokens(config: configuration.Config, setup: setups.Setup, num_steps: int) -> dict[str, float]:
    """Tokens that training reads of each level that it uses. Generated responses count as those of the data."""
    used = configuration.used_levels(config)
    tokens = {
        "upper": sequences.sizes(setup.upper.examples).mean() * config.batch.size * num_steps,
        "lower": float(sequences.sizes(setup.lower.examples).sum() * config.num_epochs),
    }
    return {name: number for name, number in tokens.items() if name in used}


def steps_text(config: configuration.Config, setup: setups.Setup, num_steps: int) -> str:
    """The number of steps and tokens."""
    tokens = num_tokens(config, setup, num_steps)
    by_level = ", ".join(f"{name} {number:,.0f}" for name, number in tokens.items())
    lines = [
        f"steps: {num_steps:,} in {config.num_epochs} epochs, batch.size={config.batch.size} rows of each level at most",
        f"tokens: about {sum(tokens.values()):,.0f} in training ({by_level})",
    ]
    if config.method in configuration.ONLINE:
        masked = online.num_masked(len(setup.lower.rows), config.online.ratio)
        refreshes = -(-num_steps // config.online.refresh_every)
        number = f"at most {masked * config.online.num_samples:,} responses of {config.online.max_new_tokens} tokens"
        lines.append(f"generation: {refreshes} refreshes, each {number}")
    return "\n".join(lines)


class Timing(NamedTuple):
    """Seconds of what was tried, and on how much."""

    load: float
    compile: float
    steps: list[float]
    step_tokens: list[int]
    step_positions: list[int]  # those that the packed sequences of a step have, padding included
    evaluation: float
    eval_tokens: int
    num_eval_rows: int


def compile_step(config: configuration.Config, setup: setups.Setup) -> tuple[setups.Program, train_state.State]:
    """The program of the run, and the state before its first step."""
    row_values, num_features = _row_values(config, setup)
    state, shardings = setups.init_state(config, setup, num_features)
    setups.token_offsets(config, setup)  # raises if the tokenizer has none
    return setups.compile_program(config, _with_zero_references(setup), state, shardings, row_values), state


def time_steps(
    config: configuration.Config, setup: setups.Setup, program: setups.Program, state: train_state.State, num_steps: int
):
    """Takes the first steps of the run; returns seconds, tokens and positions of each, and the last state."""
    store, seconds, tokens, positions = online.empty(len(setup.lower.rows)), [], [], []
    scales = sharding.replicate(batches.level_scales(config, 0), setup.mesh)
    for k in range(min(TIMED_STEPS, num_steps)):
        batch = program.batch_of(k, store)
        packed = program.put_batch(batch, setup.mesh)
        began = time.perf_counter()
        if program.frozen_layers:  # timed at the second call: the first one compiled
            packed = program.put_batch(batch, setup.mesh)
        state, _ = jax.block_until_ready(program.train_step(setup.base, state, packed, scales, program.features))
        seconds.append(time.perf_counter() - began)
        tokens.append(batch.num_tokens)
        positions.append(int(batch.batch.packed.num_micro) * program.layout.sequences * program.layout.length)
    return seconds, tokens, positions, state


def _evaluated(config: configuration.Config, setup: setups.Setup) -> list[templates.Example]:
    """The rows that an evaluation scores: those held out, and the lower level's again with right responses, if known."""
    right = levels.with_truth(setup.lower, config, setup.tokenizer)
    return [*setup.upper.eval_examples, *setup.lower.eval_examples, *right]


def time_evaluation(
    config: configuration.Config, setup: setups.Setup, program: setups.Program, state: train_state.State
) -> tuple[float, int, int]:
    """Scores a few held-out rows; returns seconds, tokens and rows, all 0 if no rows are held out."""
    examples = _evaluated(config, setup)[:TIMED_ROWS]
    if not examples:
        return 0.0, 0, 0
    for _ in range(2):  # the first time compiles
        began = time.perf_counter()
        program.score_greedy(setup.base, state.policy.adapter, scoring.example_segments(examples), "timing the evaluation")
        seconds = time.perf_counter() - began
    return seconds, sum(one.size for one in examples), len(examples)


def _with_zero_references(setup: setups.Setup) -> setups.Setup:
    """The setup with zeros for the reference log-probabilities of pairs, which do not change the time of a step."""

    def with_zeros(level: levels.Level) -> levels.Level:
        has_pairs = level.examples[0].rejected is not None
        return dataclasses.replace(level, references=np.zeros((len(level.examples), 2)) if has_pairs else None)

    return dataclasses.replace(setup, upper=with_zeros(setup.upper), lower=with_zeros(setup.lower))


def _row_values(config: configuration.Config, setup: setups.Setup) -> tuple[np.ndarray | None, int]:
    """What ω is a function of, and its size; zeros for features, whose values do not change the time of a step."""
    if configuration.has_row_features(config):
        return np.zeros((len(setup.lower.rows), features.SIZE), np.float32), features.SIZE
    row_features = setups.row_features(config, setup, pathlib.Path(), resumed=False)
    return row_features.values, row_features.size


def time_text(config: configuration.Config, setup: setups.Setup, num_steps: int, timing: Timing) -> str:
    """The estimated time of the run, how it was estimated, and what it leaves out."""
    training = sum(timing.steps) / sum(timing.step_tokens) * sum(num_tokens(config, setup, num_steps).values())
    held_out = _evaluated(config, setup)
    times = 1 + num_evaluations(config, num_steps)
    evaluation = timing.evaluation / max(timing.eval_tokens, 1) * sum(one.size for one in held_out) * times
    steps = " and ".join(f"{seconds:.2f} s" for seconds in timing.steps)
    lines = [
        f"time: about {duration(training + evaluation)}: {duration(training)} for training, {duration(evaluation)} for evaluation",
        f"  extrapolated by tokens from {len(timing.steps)} steps of the model on this machine, {steps}, and from "
        f"{timing.num_eval_rows} of {len(held_out)} held-out rows, which are evaluated {times} times",
        f"  loading took {timing.load:.1f} s and compiling {timing.compile:.1f} s",
    ]
    padding = 1 - sum(timing.step_tokens) / sum(timing.step_positions)
    if padding > MUCH_PADDING:
        layout = setups.batch_layout(config, setup.mesh)
        shape = f"{layout.sequences} sequences of {layout.length} tokens (batch.micro_size, data.max_length)"
        lines.append(f"  {padding:.0%} of a step is padding: its rows do not fill micro-batches of {shape}; lower one of them")
    left_out = []
    if config.method in configuration.ONLINE:
        left_out.append("generation")
    if configuration.searches(config):
        left_out.append(f"the search for weights before the run, about {4 * config.selection.outer_steps + 1} times the training")
    if configuration.has_row_features(config):
        left_out.append("the features of the rows")
    if config.method != "mixing" and config.eval.similar:
        left_out.append("the comparison of the rows with the trusted ones (eval.similar)")
    if {config.loss.upper, config.loss.lower} & set(preferences.PAIRS):
        left_out.append("the reference model's log-probabilities")
    return "\n".join([*lines, *([f"  not included: {', '.join(left_out)}"] if left_out else [])])


def num_evaluations(config: configuration.Config, num_steps: int) -> int:
    """Evaluations after the first step: at the end of each epoch, and every `eval.every` steps."""
    every, epoch_steps = config.eval.every, num_steps // config.num_epochs
    return len({*range(epoch_steps, num_steps + 1, epoch_steps), *(range(every, num_steps + 1, every) if every else ())})


def duration(seconds: float) -> str:
    """Seconds as text, in a unit that fits."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"


# --------------------------------------------------------------------------------------------------------------------
# Memory, disk
# --------------------------------------------------------------------------------------------------------------------


def memory_text(compiled) -> str:
    """The memory of the compiled step on each device, as XLA plans it."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return "memory: this backend does not say what a step needs; --plan estimates it"
    arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    total = arguments + temporaries + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    parts = f"{disk.amount(arguments)} of arguments (base, adapter, weights, batch), {disk.amount(temporaries)} of temporaries"
    return f"memory: a step needs {disk.amount(total)} on each device: {parts}"


def frozen_text(config: configuration.Config, setup: setups.Setup, directory: pathlib.Path) -> str:
    """What keeping the states that leave the frozen layers takes."""
    where = "of memory" if config.model.cache_frozen == "memory" else f"in {directory / state_store.FOLDER}, until the run ends,"
    what = "the hidden states of all rows that leave the frozen layers"
    return f"cache: {disk.amount(run_sizes.cache_bytes(config, setup))} {where} keep {what}"


def disk_text(config: configuration.Config, state: train_state.State, num_rows: int, directory: pathlib.Path) -> str:
    """The disk space of a checkpoint and of the run, and the free space."""
    one = disk.amount(run_sizes.checkpoint_bytes(config, state, num_rows))
    total = disk.amount(run_sizes.disk_bytes(config, state, num_rows, disk.num_saved(directory)))
    what = f"checkpoint.keep={config.checkpoint.keep} of them, one that is being written, and the results need {total}"
    return f"disk: a checkpoint needs {one}; {what}; {disk.amount(disk.free_bytes(directory))} are free at {directory}"

"""What a run does before its first step: load, compile, restore."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pyarrow as pa

from bilevel_jax import config as configuration
from bilevel_jax import (
    early_stopping,
    evaluation,
    features,
    files,
    initial_weights,
    online,
    references,
    rewards,
    run_sizes,
    search,
    sharding,
    train_state,
)
from bilevel_jax import setup as setups
from bilevel_jax.data import levels, token_ids
from bilevel_jax.errors import RunError
from bilevel_jax.runtime import checkpoint, disk, metrics, phases
from bilevel_jax.runtime import clock as clocks
from bilevel_jax.runtime.workdir import config_json, fixed_settings, refuse_other_settings, settings
from bilevel_jax.text import say


@dataclasses.dataclass(frozen=True)
class RunContext:
    """What the loop works with. Nothing here changes from step to step, except for the clock and what is written."""

    config: configuration.Config
    process_dir: pathlib.Path  # the workdir in the first process; a temporary directory in the others
    clock: clocks.Clock
    setup: setups.Setup
    program: setups.Program
    token_offsets: list[np.ndarray] | None  # where each row's tokens are in its response, if tokens have weights
    held_out: evaluation.HeldOut
    start: int  # steps taken before this process
    epoch_steps: int
    sources: pa.DictionaryArray  # of the training rows
    bad: np.ndarray | None  # labels of the training rows, for measurement only
    truths: Sequence[str | None]  # their right responses, for measurement only
    checkpoints: checkpoint.Checkpoints
    identity: dict  # fingerprints of data and model, and the settings
    writer: metrics.MetricsWriter
    refresh: Callable | None  # from `online.make_refresh`; None for methods without generation

    @property
    def num_steps(self) -> int:
        return self.config.num_epochs * self.epoch_steps

    @property
    def selects(self) -> bool:
        return self.config.method != "mixing"

    def refresh_due(self, k: int) -> bool:
        """Whether responses are generated before step `k`, counted from 0."""
        return self.refresh is not None and k % self.config.online.refresh_every == 0

    def eval_due(self, done: int) -> bool:
        """Whether the run evaluates after `done` steps."""
        return self._due(done, self.config.eval.every)

    def save_due(self, done: int) -> bool:
        """Whether the run saves a checkpoint after `done` steps."""
        return self._due(done, self.config.checkpoint.every)

    def _due(self, done: int, every: int) -> bool:
        return done % self.epoch_steps == 0 or bool(every and done % every == 0)


class LoopState(NamedTuple):
    """What the loop carries from step to step."""

    state: train_state.State
    store: online.ResponseStore
    best: early_stopping.Best | None
    measured: dict[str, float]  # by the last evaluation of this process
    at_start: dict[str, float]  # losses before the first step
    refresh_counts: dict[str, float]  # of all refreshes so far


def prepare(
    config: configuration.Config,
    config_dict: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    process_dir: pathlib.Path,
    clock: clocks.Clock,
) -> tuple[RunContext, LoopState]:
    """Loads, compiles and restores. `process_dir` is that of `RunContext`."""
    with clock("load"):
        setup = setups.load(config)
    lower = setup.lower
    num_steps = setups.checked_steps(config, setup)
    truths = levels.truths(lower, config.data.truth)
    reward_fn = _reward_fn(config, lower, truths)  # fails before anything is compiled
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
    start = checkpoints.latest() or 0
    identity, counters = _identify(config, settings(config_dict), setup, workdir, checkpoints, start)
    with clock("load"):
        given = None if start else _given_logits(config, lower)
        row_features = setups.row_features(config, setup, workdir, resumed=bool(start))
    state, shardings = setups.init_state(config, setup, row_features.size)
    setup = setups.without_adapter(setup)
    disk.check(workdir, run_sizes.new_bytes(config, setup, state, process_dir, disk.num_saved(workdir)))
    token_offsets = setups.token_offsets(config, setup)
    with clock("compile"), phases.phase("compiling the training step"):
        setup = setups.with_references(config, setup, workdir if start else None)
        program = setups.compile_program(config, setup, state, shardings, row_features.values, process_dir, resumed=bool(start))

    loop = LoopState(state, online.empty(len(lower.rows)), best=None, measured={}, at_start={}, refresh_counts={})
    if start:
        loop = _restore(config, workdir, checkpoints, state, counters, num_steps, clock)

    # The workdir belongs to this config now that the config has proved to run.
    files.write_atomically(process_dir / "config.json", config_json(config_dict))
    if not start:
        _write_for_resumption(process_dir, row_features, setup)
        loop = loop._replace(state=_with_first_weights(config, setup, program, state, given, workdir, identity, clock))
    run = RunContext(
        config=config,
        process_dir=process_dir,
        clock=clock,
        setup=setup,
        program=program,
        token_offsets=token_offsets,
        held_out=_held_out(config, setup, program, clock),
        start=start,
        epoch_steps=num_steps // config.num_epochs,
        sources=levels.source_names(lower),
        bad=levels.labels(lower, config.data.label),
        truths=truths,
        checkpoints=checkpoints,
        identity=identity,
        writer=_open_writer(config, config_dict, process_dir, start),
        refresh=setups.build_refresh(config, setup, program.score, reward_fn) if config.method in configuration.ONLINE else None,
    )
    return run, loop if start else _measure_start(run, loop)


def _write_for_resumption(process_dir: pathlib.Path, row_features: setups.RowFeatures, setup: setups.Setup) -> None:
    """Writes what a resumed run reads again: features, if the encoder was fitted, and references, if there are pairs."""
    if row_features.encoder:
        features.write(process_dir / features.FILE, row_features.encoder, np.asarray(row_features.values))
    for name, level in (("upper", setup.upper), ("lower", setup.lower)):
        references.write(references.file_of(process_dir, name), level)


def _held_out(
    config: configuration.Config, setup: setups.Setup, program: setups.Program, clock: clocks.Clock
) -> evaluation.HeldOut:
    with clock("eval"), phases.phase("preparing the held-out rows"):
        rows = evaluation.held_out(config, setup.upper, setup.lower, setup.tokenizer, program.score, setup.base)
        token_ids.check(rows.examples["lower_clean"], setup.tokenizer, setup.model.vocab_size)  # the others are checked
    return rows


def _restore(
    config: configuration.Config,
    workdir: pathlib.Path,
    checkpoints: checkpoint.Checkpoints,
    state: train_state.State,
    counters: dict,
    num_steps: int,
    clock: clocks.Clock,
) -> LoopState:
    """What the newest checkpoint has; `state` has its shapes and shardings. The clock goes on from its seconds."""
    start = checkpoints.latest() or 0
    state, store, adapter = checkpoints.restore(start, state, keeps_best=config.eval.keep_best)
    _check_growth(config, workdir, store, counters.get("num_steps", num_steps), num_steps, start)
    clock.seconds = {key: value + counters.get("seconds", {}).get(key, 0.0) for key, value in clock.seconds.items()}
    say(f"resuming {workdir} at step {start} of {num_steps}")
    best = early_stopping.restore(counters.get("best"), adapter)
    at_start, refreshed = counters.get("at_start", {}), counters.get("refreshed", {})
    return LoopState(state, store, best, measured={}, at_start=at_start, refresh_counts=refreshed)


def _check_growth(
    config: configuration.Config, workdir: pathlib.Path, store: online.ResponseStore, before: int, num_steps: int, start: int
) -> None:
    """Refuses more steps than the run had `before`, where the responses in use do not reach so far."""
    if not online.covers_remaining_steps(store, config.online, before, num_steps, start):
        what = f"num_epochs cannot grow now: the responses of step {store.step} are for the steps before {before} only"
        raise RunError(f"{workdir}: {what}; put num_epochs back, or give another --workdir")


def _with_logits(state: train_state.State, logits: np.ndarray) -> train_state.State:
    """A copy of the state with these logits. A copy, because a step donates the buffers of its state."""
    copy = jax.tree.map(jnp.copy, state)
    on_devices = sharding.device_put(logits, state.selector.logits.sharding)
    return copy._replace(selector=copy.selector._replace(logits=on_devices))


def _with_first_weights(
    config: configuration.Config,
    setup: setups.Setup,
    program: setups.Program,
    state: train_state.State,
    given: np.ndarray | None,
    workdir: pathlib.Path,
    identity: dict,
    clock: clocks.Clock,
) -> train_state.State:
    """The state before the first step, with the given logits or those that `search` finds, if there are such."""
    if given is not None:
        return _with_logits(state, given)
    if not configuration.searches(config):
        return state
    phases.announce("searching for weights by exact metagradients")
    with clock("search"):
        make_state = functools.partial(_with_logits, state)
        of_run = json.dumps(identity | {"config": fixed_settings(identity["config"])}, sort_keys=True)
        return _with_logits(state, search.search(config, setup, program, make_state, workdir, of_run))


def _given_logits(config: configuration.Config, lower: levels.Level) -> np.ndarray | None:
    """The logits of `selection.init`; None without it. Prints how many rows have one."""
    if not config.selection.init:
        return None
    given = initial_weights.read(config.selection.init, lower.rows)
    say(given.summary(config.selection.init))
    return given.logits


def _measure_start(run: RunContext, loop: LoopState) -> LoopState:
    """Evaluates before the first step; the result has the losses, and the best adapter so far."""
    adapter = loop.state.policy.adapter
    with run.clock("eval"), phases.phase("evaluating before the first step"):
        at_start = evaluation.measure(run.held_out, run.program.score_greedy, run.setup.base, adapter)
    run.writer.write(0, 0, at_start)
    return loop._replace(best=early_stopping.start(run.config, at_start, adapter), at_start=at_start)


def _reward_fn(config: configuration.Config, lower: levels.Level, truths: Sequence[str | None]) -> Callable | None:
    if config.method not in configuration.ONLINE or not config.online.reward:
        return None
    return rewards.make_reward_fn(config.online.reward, lower.rows, truths)


def _identify(
    config: configuration.Config,
    now: dict,
    setup: setups.Setup,
    workdir: pathlib.Path,
    checkpoints: checkpoint.Checkpoints,
    start: int,
) -> tuple[dict, dict]:
    """The fingerprints of data and model with the settings of `now`, and the counters of the checkpoint at `start`, empty for 0.

    Raises:
      RunError: the checkpoint is of another config, other data or another model.
    """
    both = setup.upper, setup.lower
    data = checkpoint.fingerprint(row_id for level in both for row_id in level.all_ids)
    model = checkpoint.fingerprint_model(setup.base, *(level.all_examples for level in both))
    counters = checkpoints.counters(start) if start else {}
    if start:  # earlier versions stored no settings
        refuse_other_settings(now, counters.get("config", now), f"{workdir}/checkpoints/{start}", resumes=True)
    if start and counters.get("data") != data:
        raise RunError(f"{workdir}: the data changed since this run began; give another --workdir")
    if start and counters.get("model") != model:
        what = f"weights or tokenizer at {config.model.path} changed since this run began"
        raise RunError(f"{workdir}: {what}; put them back, or give another --workdir")
    return {"data": data, "model": model, "config": now}, counters


def _open_writer(
    config: configuration.Config, config_dict: ml_collections.ConfigDict, process_dir: pathlib.Path, start: int
) -> metrics.MetricsWriter:
    wandb = "" if jax.process_index() else config.log.wandb
    return metrics.MetricsWriter(
        process_dir, start=start or -1, tensorboard=config.log.tensorboard, wandb=wandb, config=config_dict.to_dict()
    )

"""A run from start to finish: prepare, restore, then refresh, batch, step, log, evaluate, save (Algorithm 1)."""

import contextlib
import dataclasses
import functools
import logging
import pathlib
import signal
import tempfile
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm

from bilevel_jax import (
    batches,
    checks,
    evaluation,
    features,
    files,
    finish,
    initial_weights,
    online,
    rewards,
    search,
    selector,
    sharding,
    step,
)
from bilevel_jax import config as configuration
from bilevel_jax import setup as setups
from bilevel_jax.data import levels, shuffle, token_ids
from bilevel_jax.errors import Interrupted, RunError
from bilevel_jax.runtime import (
    checkpoint,
    disk,
    interruption,
    metrics,
    phases,
    response_log,
    response_metrics,
    step_log,
    weight_table,
)
from bilevel_jax.runtime import clock as clocks
from bilevel_jax.runtime.workdir import config_json, open_workdir, refuse_other_settings, settings
from bilevel_jax.text import say


def run(config: ml_collections.ConfigDict, workdir: str | pathlib.Path, began: float | None = None) -> dict[str, float]:
    """Trains θ and ω, writes adapter, weights, metrics and summary into `workdir`, and returns the summary.

    The same call continues an unfinished run and ends bit-identical to one that was never interrupted. Where a run has several
    processes, all of them call this with the same arguments; `workdir` is on a file system that they share.

    Args:
      config: of the run, from `configs/` or `config.default`.
      workdir: where the run goes.
      began: `time.perf_counter()` when the process started, where its start is to count in the seconds of the summary.

    Raises:
      ConfigError, DataError, ModelError, RunError: one line each.
      Interrupted: after SIGTERM or SIGINT, with everything saved.
    """
    typed = checks.build(config)
    workdir = pathlib.Path(workdir)
    with open_workdir(config, workdir, lock=not jax.process_index()):
        if not jax.process_index():
            return _run(typed, config, workdir, workdir, began)
        with tempfile.TemporaryDirectory() as scratch:  # all processes compute the same, and the first one's files are enough
            return _run(typed, config, pathlib.Path(scratch), workdir, began)


@dataclasses.dataclass(frozen=True)
class Run:
    """What the loop works with. Nothing here changes from step to step, except for what is logged and counted."""

    config: configuration.Config
    workdir: pathlib.Path  # for the files of this process
    clock: clocks.Clock
    setup: setups.Setup
    program: setups.Program
    encoder: features.Encoder | None  # of the rows' features
    token_offsets: list[np.ndarray] | None  # where each row's tokens are in its response, if tokens have weights
    held_out: evaluation.HeldOut
    start: int  # steps taken before this process
    epoch_steps: int
    bad: np.ndarray | None  # labels of the training rows, for measurement only
    truths: Sequence[str | None]  # their right responses, for measurement only
    checkpoints: checkpoint.Checkpoints
    identity: dict  # fingerprints of data and model, and the settings
    writer: metrics.MetricsWriter
    refresh: Callable | None  # from `online.make_refresh`; None for methods without generation
    at_start: dict[str, float]  # losses before the first step
    refresh_counts: dict[str, float]  # of all refreshes so far

    @property
    def num_steps(self) -> int:
        return self.config.num_epochs * self.epoch_steps

    @property
    def selects(self) -> bool:
        return self.config.method != "mixing"

    def refresh_due(self, k: int) -> bool:
        return self.refresh is not None and k % self.config.online.refresh_every == 0

    def save_due(self, done: int) -> bool:
        every = self.config.checkpoint.every
        return done % self.epoch_steps == 0 or bool(every and done % every == 0)


def _run(
    config: configuration.Config,
    config_dict: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    shared: pathlib.Path,
    began: float | None,
) -> dict[str, float]:
    """Prepares, trains and finishes. Checkpoints, which all processes write together, go to `shared`."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax reports every file it touches, and prints what it raises
    clock = clocks.Clock(began)
    run, state, store = _prepare(config, config_dict, workdir, shared, clock)
    state, final = _train(run, state, store)
    return _finish(run, state, final)


# --------------------------------------------------------------------------------------------------------------------
# Algorithm 1
# --------------------------------------------------------------------------------------------------------------------


def _train(run: Run, state: step.State, store: online.ResponseStore) -> tuple[step.State, dict[str, float]]:
    """The steps from `run.start` to the end.

    Returns:
      The last state, and what the last epoch measured; empty if there was no step.

    Raises:
      Interrupted: a signal arrived; the state is saved.
    """
    final: dict[str, float] = {}
    with _open_outputs(run) as out:
        for k in range(run.start, run.num_steps):
            if run.refresh_due(k):
                refreshed = _refresh(run, state, k, out)
                if refreshed is None:
                    _save(run, state, store, k)
                    break
                out.write_responses(store)
                store = refreshed
            batch = out.prefetcher.get(k, store)
            state = _step(run, state, k, batch, store, out)
            done = k + 1
            stops = done < run.num_steps and out.stopped()  # asked once: a signal may arrive at any moment
            if run.save_due(done) or stops:
                out.log.flush()  # nothing is evaluated or saved before its step is known to be finite
                if done % run.epoch_steps == 0:
                    final = _finish_epoch(run, state, store, done // run.epoch_steps)
                    out.log.restart_clock()
                _save(run, state, store, done)
            if stops:
                break
        if int(state.step) == run.num_steps:
            out.write_responses(store)
    if int(state.step) < run.num_steps:
        number = out.signals[0] if out.signals else signal.SIGTERM
        name = signal.Signals(number).name if out.signals else "a signal to another process"
        raise Interrupted(f"{name}: saved at step {int(state.step)} of {run.num_steps}; the same command continues", number)
    return state, final


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What is open while the steps run."""

    log: step_log.StepLog
    prefetcher: batches.Prefetcher
    profile: clocks.Profile
    signals: list[int]  # SIGTERM and SIGINT received so far
    write_responses: Callable[[online.ResponseStore], None]  # appends to responses.jsonl; does nothing without generation

    def stopped(self) -> bool:
        """Whether any process of the run received a signal."""
        return sharding.any_process(bool(self.signals))


@contextlib.contextmanager
def _open_outputs(run: Run):
    """Opens files, signal handlers and the progress bar, and closes them in the reverse order."""
    config = run.config
    with contextlib.ExitStack() as stack:
        stack.enter_context(run.clock("checkpoint"))
        stack.enter_context(contextlib.closing(run.checkpoints))  # at the end, waits until everything is on disk
        stack.enter_context(contextlib.closing(run.writer))
        write_responses = _open_responses(run, stack)
        stack.enter_context(run.clock("train"))
        profile = stack.enter_context(clocks.Profile(run.workdir / "profile", configuration.profiled_steps(config)))
        signals = stack.enter_context(interruption.catch_signals())
        prefetcher = stack.enter_context(batches.Prefetcher(run.program.batch_of, run.num_steps, run.refresh_due))
        bar = tqdm.tqdm(total=run.num_steps, initial=run.start, desc=config.method, unit="step", smoothing=0.05)
        log = step_log.StepLog(config, run.writer, stack.enter_context(bar), run.epoch_steps)
        yield Outputs(log, prefetcher, profile, signals, write_responses)


def _open_responses(run: Run, stack: contextlib.ExitStack) -> Callable[[online.ResponseStore], None]:
    if run.refresh is None:
        return lambda store: None
    log = response_log.ResponseLog(run.workdir / "responses.jsonl", run.start, run.config.online.refresh_every)
    stack.enter_context(contextlib.closing(log))
    ids = [row.id for row in run.setup.lower.rows]
    return lambda store: log.write(store, ids, run.setup.detokenize, run.setup.eos)


def _step(run: Run, state: step.State, k: int, batch: batches.StepBatch, store: online.ResponseStore, out: Outputs) -> step.State:
    """One joint update of θ and ω (lines 9-12), dispatched; its metrics are logged one step later."""
    mesh, done = run.setup.mesh, k + 1
    scales = sharding.replicate(batches.level_scales(run.config, k // run.epoch_steps), mesh)
    with out.log.paused():
        out.profile.before(k, state)
    with jax.profiler.StepTraceAnnotation("step", step_num=k):
        packed = sharding.split_batch(batch.batch, mesh)
        state, values = run.program.train_step(run.setup.base, state, packed, scales, run.program.features)
    log_weights = run.selects and done % run.config.log.every == 0
    out.log.push(done, values, selector.summary(state.selector.logits) if log_weights else {}, batch, store)
    return state


def _refresh(run: Run, state: step.State, k: int, out: Outputs) -> online.ResponseStore | None:
    """New responses to the masked questions that steps k ... will visit (lines 5-8); None if a signal arrived meanwhile."""
    out.log.flush()  # notes the last ratios of the responses that are replaced
    with run.clock("generate"), out.log.paused():
        return _generate(run, state, k, out.stopped)


def _generate(run: Run, state: step.State, k: int, stopped: Callable[[], bool]) -> online.ResponseStore | None:
    config, began, num_rows = run.config, time.perf_counter(), len(run.setup.lower.rows)
    logits = sharding.to_host(state.selector.logits) if config.method == "dynamic" else None
    masked = online.masked_rows(logits, num_rows, config.online.ratio, config.seed)
    until = min(k + config.online.refresh_every, run.num_steps)
    visited = online.visited_rows(config.seed, num_rows, config.batch.size, k, until)
    asked = masked if config.online.generate == "all" else np.intersect1d(masked, visited)
    times = f" {config.online.num_samples} times each" if config.online.num_samples > 1 else ""
    cause = ", because all weights are equal" if config.online.ratio and not len(masked) else ""
    with phases.phase(f"step {k}: answering {len(asked)} questions{times if len(asked) else cause}"):
        refreshed = run.refresh(run.setup.base, state.policy.adapter, k, masked, visited, stopped)
    if refreshed is None:
        return None
    store, generations = refreshed
    values = response_metrics.refresh_metrics(store, generations, run.bad, run.truths)
    num_tokens = sum(len(one.response.ids) for one in generations)
    values["speed/generated_tokens_per_s"] = num_tokens / (time.perf_counter() - began)
    values["online/time_share"] = run.clock.share("generate", of=("train", "generate"))
    run.refresh_counts.update(response_metrics.add_counts(run.refresh_counts, values))
    run.writer.write(k + 1, k / run.epoch_steps, values)  # at the first step that uses them: a run resumed at k writes it again
    return store


def _measure(run: Run, state: step.State) -> dict[str, float]:
    with run.clock("eval"), phases.phase(f"evaluating at step {int(state.step)}"):
        values = evaluation.losses(run.held_out, run.program.score_greedy, run.setup.base, state.policy.adapter)
        if run.selects:
            rule = configuration.to_selector(run.config).rule
            values |= evaluation.selector_metrics(state, rule, run.bad, run.config.eval.keep)
    evaluation.check_finite(state, values)
    return values


def _finish_epoch(run: Run, state: step.State, store: online.ResponseStore, epoch: int) -> dict[str, float]:
    """Measures, and writes the table of weights."""
    values = _measure(run, state)
    run.writer.write(epoch * run.epoch_steps, epoch, values)
    if run.selects:
        s = state.selector
        rows = run.setup.lower.rows
        logits, visits, data_visits, loss, harm = map(sharding.to_host, (s.logits, s.visits, s.data_visits, s.loss, s.harm))
        useful = np.where(data_visits > 0, -harm / np.maximum(data_visits, 1), np.nan) if state.influence is not None else None
        table = weight_table.table(rows, logits, visits, store.masked, loss, useful)
        weight_table.write(run.workdir / "weights" / f"epoch_{epoch}.parquet", table)
    return values


def _save(run: Run, state: step.State, store: online.ResponseStore, k: int) -> None:
    """Writes the adapter of step k, and starts to write the checkpoint."""
    with run.clock("checkpoint"):
        finish.write_step_adapter(run.config, run.workdir, run.setup, state, k)
        counters = run.identity | {"seconds": run.clock.elapsed()}
        counters |= {"at_start": run.at_start, "refreshed": run.refresh_counts, "num_steps": run.num_steps, "step": k}
        # A copy: the next step donates its buffers while the checkpoint is still being written.
        run.checkpoints.save(k, jax.tree.map(jnp.copy, state), store, counters)


# --------------------------------------------------------------------------------------------------------------------
# Before and after
# --------------------------------------------------------------------------------------------------------------------


def _prepare(
    config: configuration.Config,
    config_dict: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    shared: pathlib.Path,
    clock: clocks.Clock,
) -> tuple[Run, step.State, online.ResponseStore]:
    """Loads, compiles and restores."""
    with clock("load"):
        setup = setups.load(config)
    lower = setup.lower
    epoch_steps = shuffle.steps_per_epoch(len(lower.rows), config.batch.size)
    num_steps = config.num_epochs * epoch_steps
    checks.check_profile(config, num_steps)
    checks.check_masks(config, num_steps)
    truths = levels.truths(lower, config.data.truth)
    reward_fn = _reward_fn(config, lower, truths)
    checkpoints = checkpoint.Checkpoints(shared / "checkpoints", config.checkpoint.keep)
    start = checkpoints.latest() or 0
    identity, counters = _identify(config, settings(config_dict), setup, shared, checkpoints, start)
    given = None if start else _given_logits(config, lower)
    with clock("load"):
        row_features = setups.row_features(config, setup, shared, resumed=bool(start))
    state, shardings = setups.init_state(config, setup, row_features.size)
    disk.check(shared, setups.disk_bytes(config, state, len(lower.rows), disk.num_saved(shared)))
    token_offsets = finish.token_offsets(setup, state)
    with clock("compile"), phases.phase("compiling the training step"):
        program = setups.compile_program(config, setup, state, shardings, row_features.values)

    store = online.empty(len(lower.rows))
    if start:
        state, store = checkpoints.restore(start, state)
        _check_growth(config, shared, store, counters.get("num_steps", num_steps), num_steps, start)
        clock.seconds = {key: value + counters.get("seconds", {}).get(key, 0.0) for key, value in clock.seconds.items()}
        say(f"resuming {workdir} at step {start} of {num_steps}")

    # The workdir belongs to this config now that the config has proved to run.
    files.write_atomically(workdir / "config.json", config_json(config_dict))
    if row_features.encoder and not start:
        features.write(workdir / features.FILE, row_features.encoder, np.asarray(row_features.values))
    if not start:
        state = _with_first_weights(config, setup, program, state, given, shared, clock)
    with clock("eval"), phases.phase("preparing the held-out rows"):
        held_out = evaluation.held_out(config, setup.upper, lower, setup.tokenizer, program.score, setup.base)
        token_ids.check(held_out.examples["lower_clean"], setup.tokenizer, setup.model.vocab_size)  # the others are checked
    run = Run(
        config=config,
        workdir=workdir,
        clock=clock,
        setup=setup,
        program=program,
        encoder=row_features.encoder,
        token_offsets=token_offsets,
        held_out=held_out,
        start=start,
        epoch_steps=epoch_steps,
        bad=levels.labels(lower, config.data.label),
        truths=truths,
        checkpoints=checkpoints,
        identity=identity,
        writer=_open_writer(config, config_dict, workdir, start),
        refresh=setups.build_refresh(config, setup, program.score, reward_fn) if config.method in configuration.ONLINE else None,
        at_start=dict(counters.get("at_start", {})),
        refresh_counts=dict(counters.get("refreshed", {})),
    )
    if not start:
        _measure_start(run, state)
    return run, state, store


def _check_growth(
    config: configuration.Config, shared: pathlib.Path, store: online.ResponseStore, before: int, num_steps: int, start: int
) -> None:
    """Refuses more steps than the run had `before`, where the responses in use do not reach so far."""
    if not online.reaches(store, config.online, before, num_steps, start):
        what = f"num_epochs cannot grow now: the responses of step {store.step} are for the steps before {before} only"
        raise RunError(f"{shared}: {what}; put num_epochs back, or give another --workdir")


def _with_logits(state: step.State, logits: np.ndarray) -> step.State:
    """A copy of the state, whose buffers a step may be given, with these logits."""
    copy = jax.tree.map(jnp.copy, state)
    placed = sharding.device_put(logits, state.selector.logits.sharding)
    return copy._replace(selector=copy.selector._replace(logits=placed))


def _with_first_weights(
    config: configuration.Config,
    setup: setups.Setup,
    program: setups.Program,
    state: step.State,
    given: np.ndarray | None,
    shared: pathlib.Path,
    clock: clocks.Clock,
) -> step.State:
    """The state before the first step, with the given logits or those that `search` finds, if there are such."""
    if given is not None:
        return _with_logits(state, given)
    if config.method == "mixing" or config.selection.rule != "metagradient":
        return state
    phases.say("searching for weights by exact metagradients")
    with clock("search"):
        return _with_logits(state, search.search(config, setup, program, functools.partial(_with_logits, state), shared))


def _given_logits(config: configuration.Config, lower: levels.Level) -> np.ndarray | None:
    """The logits of `selection.init`; None without it. Prints how many rows have one."""
    if not config.selection.init:
        return None
    given = initial_weights.read(config.selection.init, lower.rows)
    say(given.summary(config.selection.init))
    return given.logits


def _measure_start(run: Run, state: step.State) -> None:
    with run.clock("eval"), phases.phase("evaluating before the first step"):
        run.at_start.update(evaluation.losses(run.held_out, run.program.score_greedy, run.setup.base, state.policy.adapter))
    run.writer.write(0, 0, run.at_start)


def _reward_fn(config: configuration.Config, lower: levels.Level, truths: Sequence[str | None]) -> Callable | None:
    if config.method not in configuration.ONLINE or not config.online.reward:
        return None
    return rewards.make_reward_fn(config.online.reward, lower.rows, truths)


def _identify(
    config: configuration.Config,
    now: dict,
    setup: setups.Setup,
    shared: pathlib.Path,
    checkpoints: checkpoint.Checkpoints,
    start: int,
) -> tuple[dict, dict]:
    """The fingerprints of data and model with the settings of `now`, and the counters of the checkpoint at `start`, empty for 0.

    Raises:
      RunError: the checkpoint is of another config, other data or another model.
    """
    both = setup.upper, setup.lower
    data = checkpoint.fingerprint(row.id for level in both for row in level.rows + level.eval_rows)
    model = checkpoint.fingerprint_model(setup.base, (one for level in both for one in level.examples + level.eval_examples))
    counters = checkpoints.counters(start) if start else {}
    if start:  # earlier versions stored no settings
        refuse_other_settings(now, counters.get("config", now), f"{shared}/checkpoints/{start}", resumes=True)
    if start and counters.get("data") != data:
        raise RunError(f"{shared}: the data changed since this run began; give another --workdir")
    if start and counters.get("model") != model:
        what = f"weights or tokenizer at {config.model.path} changed since this run began"
        raise RunError(f"{shared}: {what}; put them back, or give another --workdir")
    return {"data": data, "model": model, "config": now}, counters


def _open_writer(
    config: configuration.Config, config_dict: ml_collections.ConfigDict, workdir: pathlib.Path, start: int
) -> metrics.MetricsWriter:
    wandb = "" if jax.process_index() else config.log.wandb
    return metrics.MetricsWriter(
        workdir, start=start or -1, tensorboard=config.log.tensorboard, wandb=wandb, config=config_dict.to_dict()
    )


def _finish(run: Run, state: step.State, final: dict[str, float]) -> dict[str, float]:
    """Writes what a finished run leaves, and returns its summary."""
    finish.write_parameters(run.config, run.workdir, run.setup, state, run.encoder)
    final = final or _measure(run, state)  # the latter if resumed after the last step
    if run.token_offsets is not None:
        with run.clock("eval"):
            final |= finish.write_token_weights(run.config, run.workdir, run.setup, state, run.token_offsets)
    values: dict = {"steps": run.num_steps, "rows": len(run.setup.lower.rows)}
    for level in ("upper", "lower"):
        values |= {f"data/{level}_{key}": count for key, count in getattr(run.setup, level).counts.items()}
    values |= {f"start/{key.removeprefix('eval/')}": value for key, value in run.at_start.items()}
    return finish.write_summary(run.workdir, run.setup, values | final | run.refresh_counts, run.clock)

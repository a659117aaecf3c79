"""A run from start to finish: prepare, restore, then refresh, batch, step, log, evaluate, save (Algorithm 1)."""

import contextlib
import dataclasses
import logging
import pathlib
import signal
import tempfile
import time
from collections.abc import Callable

import jax
import ml_collections
import numpy as np
import tqdm

from bilevel_jax import (
    batches,
    checks,
    early_stopping,
    evaluation,
    finish,
    online,
    optimizer,
    random_streams,
    selector,
    sharding,
    similarity,
    startup,
    text,
    train_state,
)
from bilevel_jax import config as configuration
from bilevel_jax.errors import Interrupted
from bilevel_jax.runtime import clock as clocks
from bilevel_jax.runtime import interruption, phases, response_log, response_metrics, state_store, step_log, weight_table
from bilevel_jax.runtime.workdir import open_workdir
from bilevel_jax.startup import LoopState, RunContext


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
            return _run(typed, config, workdir, pathlib.Path(scratch), began)


def _run(
    config: configuration.Config,
    config_dict: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    process_dir: pathlib.Path,
    began: float | None,
) -> dict[str, float]:
    """Prepares, trains and finishes. Checkpoints, which all processes write together, go to `workdir`."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax reports every file it touches, and prints what it raises
    clock = clocks.Clock(began)
    run, loop = startup.prepare(config, config_dict, workdir, process_dir, clock)
    return _finish(run, _train(run, loop))


# --------------------------------------------------------------------------------------------------------------------
# Algorithm 1
# --------------------------------------------------------------------------------------------------------------------


def _train(run: RunContext, loop: LoopState) -> LoopState:
    """The steps from `run.start` to the end.

    Raises:
      Interrupted: a signal arrived; the state is saved.
    """
    patience = run.config.eval.patience
    with _open_resources(run) as resources:
        for k in range(run.start, run.num_steps):
            if early_stopping.is_over(loop.best, patience):
                break
            if run.refresh_due(k):
                refreshed = _refresh(run, loop, k, resources)
                if refreshed is None:
                    _save(run, loop, k)
                    break
                resources.write_responses(loop.store)
                loop = refreshed
            batch = resources.prefetcher.get(k, loop.store)
            loop = loop._replace(state=_step(run, loop.state, k, batch, loop.store, resources))
            done = k + 1
            stops = done < run.num_steps and resources.stopped()  # asked once: a signal may arrive at any moment
            if run.eval_due(done) or run.save_due(done) or stops:
                resources.log.flush()  # nothing is evaluated or saved before its step is known to be finite
            if run.eval_due(done):
                loop = _evaluate(run, loop, done)
                resources.log.restart_clock()
            if run.save_due(done) or stops or early_stopping.is_over(loop.best, patience):
                _save(run, loop, done)
            if stops:
                break
        done = int(loop.state.step)
        is_finished = done == run.num_steps or early_stopping.is_over(loop.best, patience)
        if is_finished:
            resources.write_responses(loop.store)
    if not is_finished:
        number = resources.signals[0] if resources.signals else signal.SIGTERM
        name = signal.Signals(number).name if resources.signals else "a signal to another process"
        raise Interrupted(f"{name}: saved at step {done} of {run.num_steps}; the same command continues", number)
    return loop


@dataclasses.dataclass(frozen=True)
class LoopResources:
    """What is open while the steps run."""

    log: step_log.StepLog
    prefetcher: batches.Prefetcher
    profile: clocks.Profile
    signals: list[int]  # SIGTERM and SIGINT received so far
    write_responses: Callable[[online.ResponseStore], None]  # appends to responses.jsonl; does nothing without generation
    any_process: sharding.AnyProcess

    def stopped(self) -> bool:
        """Whether any process of the run received a signal; with several processes, as of the call before."""
        return self.any_process(bool(self.signals))


@contextlib.contextmanager
def _open_resources(run: RunContext):
    """Opens files, signal handlers and the progress bar, and closes them in the reverse order."""
    config = run.config
    with contextlib.ExitStack() as stack:
        stack.enter_context(run.clock("checkpoint"))
        stack.enter_context(contextlib.closing(run.checkpoints))  # at the end, waits until everything is on disk
        stack.enter_context(contextlib.closing(run.writer))
        write_responses = _open_responses(run, stack)
        stack.enter_context(run.clock("train"))
        profile = stack.enter_context(clocks.Profile(run.process_dir / "profile", configuration.profiled_steps(config)))
        signals = stack.enter_context(interruption.catch_signals())
        prefetcher = stack.enter_context(batches.Prefetcher(run.program.batch_of, run.num_steps, run.refresh_due))
        options = {"unit": "step", "smoothing": 0.05, "disable": not text.is_first_process()}
        bar = tqdm.tqdm(total=run.num_steps, initial=run.start, desc=config.method, **options)
        rates = optimizer.learning_rates(configuration.optimizer_settings(config), run.num_steps)
        log = step_log.StepLog(config, run.writer, stack.enter_context(bar), run.epoch_steps, rates)
        yield LoopResources(log, prefetcher, profile, signals, write_responses, sharding.AnyProcess())


def _open_responses(run: RunContext, stack: contextlib.ExitStack) -> Callable[[online.ResponseStore], None]:
    if run.refresh is None:
        return lambda store: None
    log = response_log.ResponseLog(run.process_dir / "responses.jsonl", run.start, run.config.online.refresh_every)
    stack.enter_context(contextlib.closing(log))
    return lambda store: log.write(store, run.setup.lower.ids, run.setup.detokenize, run.setup.eos)


def _step(
    run: RunContext,
    state: train_state.State,
    k: int,
    batch: batches.StepBatch,
    store: online.ResponseStore,
    resources: LoopResources,
) -> train_state.State:
    """One joint update of θ and ω (lines 9-17), dispatched; its metrics are logged one step later."""
    mesh, done = run.setup.mesh, k + 1
    scales = sharding.replicate(batches.level_scales(run.config, k // run.epoch_steps), mesh)
    with resources.log.paused():
        resources.profile.before(k, state)
    with jax.profiler.StepTraceAnnotation("step", step_num=k):
        packed = run.program.put_batch(batch, mesh)
        state, values = run.program.train_step(run.setup.base, state, packed, scales, run.program.features)
    log_weights = run.selects and done % run.config.log.every == 0
    resources.log.push(done, values, selector.summary(state.selector.logits) if log_weights else {}, batch, store)
    return state


def _refresh(run: RunContext, loop: LoopState, k: int, resources: LoopResources) -> LoopState | None:
    """New responses to the masked questions that steps k ... will visit (lines 5-8); None if a signal arrived meanwhile."""
    resources.log.flush()  # notes the last ratios of the responses that are replaced
    with run.clock("generate"), resources.log.paused():
        return _generate(run, loop, k, resources.stopped)


def _generate(run: RunContext, loop: LoopState, k: int, stopped: Callable[[], bool]) -> LoopState | None:
    config, state, began, num_rows = run.config, loop.state, time.perf_counter(), len(run.setup.lower.rows)
    logits = sharding.to_host(state.selector.logits) if config.method == "dynamic" else None
    masked = online.masked_rows(logits, num_rows, config.online.ratio, config.seed)
    until = min(k + config.online.refresh_every, run.num_steps)
    visited = online.visited_rows(config.seed, num_rows, config.batch.size, k, until)
    asked = masked if config.online.generate == "all" else np.intersect1d(masked, visited)
    times = f" {config.online.num_samples} times each" if config.online.num_samples > 1 else ""
    cause = ", because all weights are equal" if config.online.ratio and not len(masked) else ""
    assert run.refresh is not None  # for a method that generates
    with phases.phase(f"step {k}: answering {len(asked)} questions{times if len(asked) else cause}"):
        refreshed = run.refresh(run.setup.base, state.policy.adapter, k, masked, visited, stopped)
    if refreshed is None:
        return None
    store, generations = refreshed
    values = response_metrics.refresh_metrics(store, generations, run.bad, run.truths)
    num_tokens = sum(len(one.response.ids) for one in generations)
    values["speed/generated_tokens_per_s"] = num_tokens / (time.perf_counter() - began)
    values["online/time_share"] = run.clock.share("generate", of=("train", "generate"))
    counts = loop.refresh_counts | response_metrics.add_counts(loop.refresh_counts, values)
    run.writer.write(k + 1, k / run.epoch_steps, values)  # at the first step that uses them: a run resumed at k writes it again
    return loop._replace(store=store, refresh_counts=counts)


def _measure(run: RunContext, state: train_state.State) -> dict[str, float]:
    with run.clock("eval"), phases.phase(f"evaluating at step {int(state.step)}"):
        values = evaluation.measure(run.held_out, run.program.score_greedy, run.setup.base, state.policy.adapter)
        if run.selects:
            rule = configuration.to_selector(run.config).rule
            values |= evaluation.selector_metrics(state, rule, run.bad, run.config.eval.keep)
    evaluation.check_finite(state, values)
    return values


def _measure_rows_in_use(run: RunContext, state: train_state.State, store: online.ResponseStore) -> dict[str, float]:
    """The last loss of the rows that θ learned from, on as many of them as are held out.

    They are drawn from the rows visited since the last refresh, as other masked questions have no stored response. Methods without
    generation take the rows of the same steps, so that all methods with one seed measure the same rows.
    """
    config, steps, every = run.config, int(state.step), run.config.online.refresh_every
    num_rows = len(run.setup.lower.rows)
    visited = online.visited_rows(config.seed, num_rows, config.batch.size, (steps - 1) // every * every, steps)
    order = np.random.default_rng((config.seed, random_streams.ROWS_IN_USE)).permutation(visited)
    chosen = np.sort(order[: len(run.held_out.examples["lower"])])
    with run.clock("eval"):
        return evaluation.rows_in_use(
            run.setup.lower.examples, store, chosen, run.program.score_greedy, run.setup.base, state.policy.adapter
        )


def _evaluate(run: RunContext, loop: LoopState, done: int) -> LoopState:
    """Measures; at the end of an epoch, and of the run, also writes the table of weights."""
    values = _measure(run, loop.state)
    epochs, rest = divmod(done, run.epoch_steps)
    run.writer.write(done, done / run.epoch_steps if rest else epochs, values)
    best = early_stopping.update(loop.best, values, done, loop.state.policy.adapter)
    is_last = done == run.num_steps or early_stopping.is_over(best, run.config.eval.patience)
    if run.selects and (is_last or done % run.epoch_steps == 0):
        _write_weights(run, loop, -(-done // run.epoch_steps), _likeness(run) if is_last else None)
    return loop._replace(best=best, measured=values)


def _likeness(run: RunContext) -> similarity.Likeness | None:
    """How much each row is like the trusted ones, and like which; None where it is not measured."""
    if not run.config.eval.similar:
        return None
    with run.clock("eval"), phases.phase("comparing the rows with the trusted ones"):
        return similarity.measure(run.config, run.setup)


def _write_weights(run: RunContext, loop: LoopState, epoch: int, likeness: similarity.Likeness | None) -> None:
    s, has_influence = loop.state.selector, loop.state.influence is not None
    parts = s.logits, s.visits, s.data_visits, s.surprise, s.harm
    logits, visits, data_visits, surprise, harm = map(sharding.to_host, parts)
    useful = np.where(data_visits > 0, -harm / np.maximum(data_visits, 1), np.nan) if has_influence else None
    ids, masked = run.setup.lower.ids, loop.store.masked
    measured = likeness._asdict() if likeness else {}
    blocks = weight_table.blocks(ids, run.sources, logits, visits, masked, surprise, useful, **measured)
    weight_table.write_blocks(run.process_dir / "weights" / f"epoch_{epoch}.parquet", blocks)


def _save(run: RunContext, loop: LoopState, k: int) -> None:
    """Writes the adapter of step k, and starts to write the checkpoint."""
    state, best = loop.state, loop.best
    with run.clock("checkpoint"):
        finish.write_step_adapter(run.config, run.process_dir, run.setup, state, k)
        counters = run.identity | {"seconds": run.clock.elapsed()}
        counters |= {"at_start": loop.at_start, "refreshed": loop.refresh_counts, "num_steps": run.num_steps, "step": k}
        counters |= {"best": best.counters()} if best else {}
        run.checkpoints.save(k, state, loop.store, counters, best and best.adapter)


def _finish(run: RunContext, loop: LoopState) -> dict[str, float]:
    """Writes what a finished run leaves, and returns its summary."""
    state, best, measured = loop.state, loop.best, loop.measured
    steps = int(state.step)
    if best and best.adapter is not None and best.step != steps:
        state, measured = state._replace(policy=state.policy._replace(adapter=best.adapter)), {}
    finish.write_parameters(run.config, run.process_dir, run.setup, state)
    measured = measured or _measure(run, state)  # empty if resumed after the last step
    if run.token_offsets is not None:
        with run.clock("eval"):
            measured |= finish.write_token_weights(run.config, run.process_dir, run.setup, state, run.token_offsets)
    if run.held_out.examples["lower"] and run.config.loss.lower == "sft":
        measured |= _measure_rows_in_use(run, state, loop.store)
    values: dict = {"steps": steps, "rows": len(run.setup.lower.rows)}
    values |= {"best_step": best.step} if best else {}
    for level in ("upper", "lower"):
        values |= {f"data/{level}_{key}": count for key, count in getattr(run.setup, level).counts.items()}
    values |= {f"start/{key.removeprefix('eval/')}": value for key, value in loop.at_start.items()}
    state_store.remove(run.process_dir)
    return finish.write_summary(run.process_dir, run.setup, values | measured | loop.refresh_counts, run.clock)

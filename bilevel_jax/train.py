"""A run from start to finish: check, load, restore, then refresh, draw, step, log, evaluate, save (Algorithm 1)."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import logging
import math
import pathlib
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm

from bilevel_jax import (
    checkpoint,
    features,
    metrics,
    online,
    page,
    preferences,
    progress,
    rewards,
    sampling,
    scoring,
    selector,
    sharding,
    step,
    tokens,
    weights,
    workspace,
)
from bilevel_jax import config as configuration
from bilevel_jax.data import levels, order, packing, templates
from bilevel_jax.models import decoder, huggingface, lora
from bilevel_jax.workspace import RunError


def segments_of(level: levels.Level, i: int, share: float, group: int, sample: int = -1) -> list[packing.Segment]:
    """A row as the data have it: one segment, or the two of a pair."""
    example = level.examples[i]
    if level.references is None:
        return [packing.Segment(example.prompt, example.response, sample, share)]
    both = zip((1, -1), (example.response, example.rejected), level.references[i])
    return [packing.Segment(example.prompt, text, sample, share, group, sign, float(log_prob)) for sign, text, log_prob in both]


def make_batch(config, upper: levels.Level, lower: levels.Level, layout: packing.Layout, k: int, own: online.Own) -> progress.Drawn:
    """What step k sees: a pure function of its arguments."""
    size, segments, ids, places = config.batch.size, [], [], []
    seen = configuration.levels(config)
    drawn = order.lower_rows(config.seed, len(lower.rows), size, k) if "lower" in seen else ()
    for group, i in enumerate(drawn, size):
        i, share, prompt = int(i), 1 / len(drawn), lower.examples[i].prompt
        answers = online.segments(own, i, prompt, share, group, config.online.objective, config.data.max_length)
        found = answers or [(-1, segment) for segment in segments_of(lower, i, share, group, sample=i)]
        segments += [segment for _, segment in found]
        places += [place for place, _ in found]
        ids += [lower.rows[i].id] * len(found)
    trusted = order.upper_rows(config.seed, len(upper.rows), size, k) if "upper" in seen else ()
    for group, j in enumerate(trusted):
        found = segments_of(upper, j, 1 / len(trusted), group)
        segments += found
        ids += [upper.rows[j].id] * len(found)
    places += [-1] * (len(segments) - len(places))
    batch = packing.pack_step(segments, len(lower.rows), len(drawn), layout)
    return progress.Drawn(batch, ids, np.array(places), sum(segment.size for segment in segments))


def scales(config, epoch: int) -> step.Scales:
    """What the levels' means are multiplied by in `epoch`: (1-ρ, ρ) for mixing, (1, ρ/(1-ρ)) for selection."""
    rho = configuration.rho(config, epoch)
    pair = (1 - rho, rho) if config.method == "mixing" else (1.0, rho / (1 - rho))
    return step.Scales(*(jnp.float32(value) for value in pair))


def pair_log_probs(score, base, adapter, examples: Sequence[templates.Example], description: str) -> np.ndarray:
    """Log-probabilities [n, 2] of chosen and rejected responses. With the adapter off (None) it is DPO's reference model."""
    segments = [packing.Segment(one.prompt, response) for one in examples for response in (one.response, one.rejected)]
    nll, _ = score(base, adapter, segments, description)
    return -nll.reshape(-1, 2)


def with_references(level: levels.Level, score, base) -> levels.Level:
    """The level with the reference model's log-probabilities of its pairs."""
    return dataclasses.replace(level, references=pair_log_probs(score, base, None, level.examples, "reference"))


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a run works on."""

    mesh: jax.sharding.Mesh
    tokenizer: object
    eos: tuple[int, ...]  # ids that end a response
    model: decoder.ModelConfig
    base: dict
    adapter: dict  # at its start
    upper: levels.Level
    lower: levels.Level

    def detokenize(self, tokens) -> str:
        """The text, to the space: cleaning up would drop spaces that the model did write."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def load(config) -> Setup:
    """Reads model and data, and checks that they go together."""
    mesh = sharding.make_mesh(*(config.mesh[axis] for axis in sharding.AXES))
    directory = huggingface.locate(config.model.path)
    model = huggingface.read_config(directory, config.model.dtype)
    configuration.check_fit(config, model.max_positions, sharding.parts(mesh, "rows"))
    tokenizer = templates.load_tokenizer(str(directory))
    upper, lower = (levels.load_level(config, level, tokenizer) for level in ("upper", "lower"))
    configuration.check_rows(config, len(lower.rows), mesh.size)
    base = huggingface.load_params(directory, model, mesh)
    targets = lora.resolve_targets(model, config.lora.targets)
    model = dataclasses.replace(model, adapter_scale=config.lora.alpha / config.lora.rank, remat=config.model.remat)
    adapter = lora.init_adapter(model, jax.random.key(config.seed), config.lora.rank, targets)
    eos = huggingface.eos_ids(directory, tokenizer)
    return Setup(mesh, tokenizer, eos, model, base, adapter, upper, lower)


def fit_features(config, setup: Setup) -> tuple[features.Encoder, np.ndarray]:
    """What makes features of rows, and those of the lower level's, [N, D]."""
    lower, upper = (
        features.pooled(setup.model, setup.base, level.examples, config.batch.micro_size, config.data.max_length, setup.mesh)
        for level in (setup.lower, setup.upper)
    )
    encoder = features.fit(lower, upper)
    return encoder, features.encode(encoder, lower)


def make_refresh(config, setup: Setup, score, judge: Callable | None = None) -> Callable:
    """`online.make_refresh` for the lower level of a run."""
    settings = sampling.Settings(temperature=config.online.temperature, max_new_tokens=config.online.max_new_tokens)
    sample = sampling.make_sampler(
        setup.model, settings, setup.eos, slots=config.online.slots, length=config.data.max_length, mesh=setup.mesh
    )
    return online.make_refresh(
        sample,
        score,
        setup.detokenize,
        [row.id for row in setup.lower.rows],
        [example.prompt for example in setup.lower.examples],
        config.seed,
        config.online.num_samples,
        config.online.generate,
        judge,
        config.online.objective in preferences.PAIRS,
    )


def run(config: ml_collections.ConfigDict, workdir: str | pathlib.Path, began: float | None = None) -> dict[str, float]:
    """Trains θ and ω, leaves adapter, weights, metrics and summary in `workdir`, and returns the summary.

    The same call continues an unfinished run and ends bit-identical to one that was never interrupted. Where a run has several
    processes, all of them call this with the same arguments; `workdir` is on a file system that they share.

    Args:
      began: `time.perf_counter()` when the process started, where its start is to count among the seconds of the summary.

    Raises:
      ConfigError, DataError, ModelError, RunError: one line each.
      Interrupted: after SIGTERM or SIGINT, with everything saved.
    """
    configuration.check(config)
    workdir = pathlib.Path(workdir)
    with workspace.opened(config, workdir, lock=not jax.process_index()):
        if not jax.process_index():
            return _run(config, workdir, workdir, began)
        with tempfile.TemporaryDirectory() as scratch:  # all compute the same, and what the first one writes is enough
            return _run(config, pathlib.Path(scratch), workdir, began)


def _run(config: ml_collections.ConfigDict, workdir: pathlib.Path, shared: pathlib.Path, began: float | None) -> dict[str, float]:
    """`run`, with its checkpoints, which all processes write together, in `shared`."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax reports every file it touches, and prints what it raises
    clock = progress.Clock(began)
    with clock("load"):
        setup = load(config)
    mesh, model, base, upper, lower = setup.mesh, setup.model, setup.base, setup.upper, setup.lower
    selects, generates = config.method != "mixing", config.method in configuration.ONLINE
    bad, truths = levels.labels(lower, config.data.label), levels.truths(lower, config.data.truth)
    judge = rewards.make_judge(config.online.reward, lower.rows, truths) if generates and config.online.reward else None

    # Where we stand.
    epoch_steps = order.steps_per_epoch(len(lower.rows), config.batch.size)
    num_steps = config.num_epochs * epoch_steps
    traced = configuration.profiled(config)
    if traced and traced[1] > num_steps:
        raise configuration.ConfigError(f"log.profile={config.log.profile!r} goes beyond the {num_steps} steps of this run")
    checkpoints = checkpoint.Checkpoints(shared / "checkpoints", config.checkpoint.keep)
    data = checkpoint.fingerprint(row.id for level in (upper, lower) for row in level.rows + level.eval_rows)
    start = checkpoints.latest() or 0
    examples = (example for level in (upper, lower) for example in level.examples + level.eval_examples)
    model_id = checkpoint.fingerprint_model(base, examples)
    counters = checkpoints.counters(start) if start else {"data": data, "model": model_id}
    if counters["data"] != data:
        raise RunError(f"{shared}: the data changed since this run began; give another --workdir")
    if counters["model"] != model_id:
        what = f"weights or tokenizer at {config.model.path} changed since this run began"
        raise RunError(f"{shared}: {what}; put them back, or give another --workdir")

    # The update.
    objective, select = configuration.build_objective(config), configuration.build_selector(config)
    optimizer = configuration.build_optimizer(config)
    tracked = objective.value_function == "tracked"
    names, domain_of = levels.domains(lower, config.data.lower) if selects and config.selection.unit == "domain" else ((), None)
    state = step.init(setup.adapter, optimizer, select, len(lower.rows), tracked, len(names) or features.SIZE)
    places = sharding.learned(mesh, state, config.mesh.shard_selector)
    state = jax.tree.map(sharding.place, state, places)
    encoder = frozen = None  # what makes features, and those of all rows
    if names:
        frozen = sharding.place(domain_of, places.selector.logits)
    elif select.parameterization == "features":
        with clock("load"):
            encoder, frozen = features.read(shared / features.FILE) if start else fit_features(config, setup)
            frozen = sharding.place(frozen, places.selector.logits)
    places_of_tokens = None if state.phi is None else templates.places(lower.rows, lower.examples, setup.tokenizer)
    own = online.nothing_yet(len(lower.rows))
    per_row = configuration.entries_per_row(config)
    size, length = config.batch.micro_size, config.data.max_length
    layout = packing.Layout(size, length, per_row * config.batch.size, apart=objective.cost == "unrolled")
    score = scoring.make_scorer(model, size, length, mesh)
    upper, lower = (
        with_references(level, score, base) if kind in preferences.PAIRS else level
        for level, kind in ((upper, objective.upper), (lower, objective.lower))
    )
    batch_of = functools.partial(make_batch, config, upper, lower, layout)
    with clock("compile"), jax.set_mesh(mesh):
        update = step.make_step(model, objective, select, optimizer)
        jitted = jax.jit(update, donate_argnums=1, out_shardings=(places, sharding.whole(mesh)))
        first = sharding.split_batch(batch_of(0, own).batch, mesh)
        train_step = jitted.lower(base, state, first, sharding.replicate(scales(config, 0), mesh), frozen).compile()

    # The workdir belongs to this config now that it has proved to run.
    workspace.write_atomically(workdir / "config.json", config.to_json(indent=2, sort_keys=True) + "\n")
    if encoder and not start:
        features.write(workdir / features.FILE, encoder, sharding.fetch(frozen))
    at_start, refreshed = {}, {}  # measures before the first step, and counts of all refreshes
    if start:
        state, own = checkpoints.restore(start, state)
        clock.seconds = {key: value + counters["seconds"].get(key, 0.0) for key, value in clock.seconds.items()}
        at_start, refreshed = counters["at_start"], counters["refreshed"]
        print(f"resuming {workdir} at step {start} of {num_steps}")
    wandb = "" if jax.process_index() else config.log.wandb
    writer = metrics.Writer(workdir, start=start or -1, tensorboard=config.log.tensorboard, wandb=wandb, config=config.to_dict())

    # What is measured.
    held_out = {"upper": upper.eval_examples, "lower": lower.eval_examples}
    held_out["lower_clean"] = levels.with_truth(lower, config, setup.tokenizer)
    held_references = {
        name: pair_log_probs(score, base, None, held_out[name], "reference")
        for name in ("upper", "lower")
        if config.loss[name] in preferences.PAIRS
    }

    def evaluation(state: step.State) -> dict[str, float]:
        values = {}
        for name, examples in held_out.items():
            if examples:
                found = score(base, state.policy.adapter, scoring.segments_of(examples), f"evaluating {name}")
                values[f"eval/{name}_loss"] = scoring.mean_loss(*found)
            if examples and name in held_references:
                found = pair_log_probs(score, base, state.policy.adapter, examples, f"evaluating pairs of {name}")
                margin = (found - held_references[name]) @ [1, -1]
                values[f"eval/{name}_pair_accuracy"] = float(np.mean((margin > 0) + 0.5 * (margin == 0)))
        return values

    def verdict(state: step.State) -> dict[str, float]:
        logits = sharding.fetch(state.selector.logits)
        values = {f"selector/{key}": float(value) for key, value in selector.summary(state.selector.logits).items()}
        if state.phi is not None:
            values |= {f"selector/token_{name}": float(value) for name, value in zip(tokens.SCORES, state.phi)}
        if bad is not None and bad.any() and not bad.all() and select.rule != "uniform":
            values["selector/auroc"] = metrics.auroc(-logits, bad)
            values["selector/bad_kept"] = metrics.bad_kept(logits, bad, config.eval.keep)
        return values

    def measure(state: step.State) -> dict[str, float]:
        with clock("eval"):
            values = evaluation(state) | (verdict(state) if selects else {})
        broken = [key for key, value in values.items() if not math.isfinite(value)]
        if not jax.tree.all(jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), state.policy.adapter)):
            broken.append("θ")  # no loss tells, where no row is held out
        if broken:
            raise RunError(f"step {int(state.step)}: {', '.join(broken)} not finite; {workspace.REMEDY}")
        return values

    def finish_epoch(state: step.State, epoch: int) -> dict[str, float]:
        values = measure(state)
        writer.write(epoch * epoch_steps, epoch, values)
        if selects:
            s = state.selector
            found = weights.table(lower.rows, sharding.fetch(s.logits), sharding.fetch(s.visits), own.masked)
            weights.write(workdir / "weights" / f"epoch_{epoch}.parquet", found)
        return values

    def save(state: step.State, k: int) -> None:
        with clock("checkpoint"):
            counters = {"data": data, "model": model_id, "seconds": clock.so_far()}
            counters |= {"at_start": at_start, "refreshed": refreshed}
            # A copy: the next step donates its buffers while the checkpoint is still being written.
            checkpoints.save(k, jax.tree.map(jnp.copy, state), own, counters)

    # Self-refining generation.
    if generates:
        answer_anew = make_refresh(config, setup, score, judge)
        record = online.Record(workdir / "responses.jsonl", start, config.online.refresh_every)
        retire = functools.partial(record.retire, ids=[row.id for row in lower.rows], detokenize=setup.detokenize, eos=setup.eos)

    def refresh_due(k: int) -> bool:
        return generates and k % config.online.refresh_every == 0

    def refresh(state: step.State, k: int, stopped) -> online.Own | None:
        began = time.perf_counter()
        logits = sharding.fetch(state.selector.logits) if config.method == "dynamic" else None
        masked = online.masked_rows(logits, len(lower.rows), config.online.ratio, config.seed)
        until = min(k + config.online.refresh_every, num_steps)
        visited = online.visited_rows(config.seed, len(lower.rows), config.batch.size, k, until)
        answers = answer_anew(base, state.policy.adapter, k, masked, visited, stopped)
        if answers is None:
            return None
        fresh, said = answers
        values = online.refresh_measures(fresh, said, bad, truths)
        tokens = sum(len(one.response.ids) for one in said)
        values["speed/generated_tokens_per_s"] = tokens / (time.perf_counter() - began)
        values["online/time_share"] = clock.share("generate", of=("train", "generate"))
        refreshed.update(online.add_refresh(refreshed, values))
        writer.write(k + 1, k / epoch_steps, values)  # at the first step that uses them: a run resumed at k writes it again
        return fresh

    if not start:
        with clock("eval"):
            at_start = evaluation(state)
        writer.write(0, 0, at_start)
    with (
        clock("checkpoint"),
        contextlib.closing(checkpoints),  # at the end, waits until everything is on disk
        contextlib.closing(writer),
        contextlib.closing(record) if generates else contextlib.nullcontext(),
        clock("train"),
        progress.Profile(workdir / "profile", traced) as profile,
        workspace.noticing_signals() as signals,
        concurrent.futures.ThreadPoolExecutor(1) as worker,
        tqdm.tqdm(total=num_steps, initial=start, desc=config.method, unit="step", smoothing=0.05) as bar,
    ):
        log = progress.StepLog(config, writer, bar, epoch_steps)

        def signalled() -> bool:
            return sharding.anywhere(bool(signals))

        ahead, final = None, {}
        for k in range(start, num_steps):
            if refresh_due(k):
                log.settle()  # the last ratios of the responses that go
                with clock("generate"), log.elsewhere():
                    fresh = refresh(state, k, signalled)
                if fresh is None:
                    save(state, k)
                    break
                retire(own)
                own = fresh
            drawn = (ahead or worker.submit(batch_of, k, own)).result()
            ahead = None  # the batch after a refresh waits for its answers
            if k + 1 < num_steps and not refresh_due(k + 1):
                ahead = worker.submit(batch_of, k + 1, own)  # packs while the device computes
            scale = sharding.replicate(scales(config, k // epoch_steps), mesh)
            with log.elsewhere():
                profile.before(k, state)
            with jax.profiler.StepTraceAnnotation("step", step_num=k):
                state, found = train_step(base, state, sharding.split_batch(drawn.batch, mesh), scale, frozen)
            done = k + 1
            ends_epoch = done % epoch_steps == 0
            spread = selector.summary(state.selector.logits) if selects and done % config.log.every == 0 else {}
            log.dispatched(done, found, spread, drawn, own)
            stops = done < num_steps and signalled()  # looked at once: a signal may come at any moment
            due = config.checkpoint.every and done % config.checkpoint.every == 0
            if ends_epoch or due or stops:
                log.settle()  # nothing is evaluated or saved before its step is known to be finite
            if ends_epoch:
                final = finish_epoch(state, done // epoch_steps)
                log.restart_clock()
            if ends_epoch or due or stops:
                save(state, done)
            if stops:
                break
        if generates and int(state.step) == num_steps:
            retire(own)
    if int(state.step) < num_steps:
        name = signal.Signals(signals[0]).name if signals else "a signal to another process"
        raise workspace.Interrupted(f"{name}: saved at step {int(state.step)} of {num_steps}; the same command continues")

    huggingface.save_adapter(workdir / "adapter", model, state.policy.adapter, alpha=config.lora.alpha, base=config.model.path)
    if encoder:
        features.write_phi(workdir / features.PHI, sharding.fetch(state.selector.phi))
    final = final or measure(state)  # the latter if resumed after the last step
    if state.phi is not None:
        with clock("eval"):
            shape = config.batch.micro_size, config.data.max_length, mesh
            of_tokens = scoring.token_weights(model, base, state.policy.adapter, state.phi, lower.examples, *shape)
        table = weights.table_of_tokens(lower.rows, places_of_tokens, of_tokens)
        weights.write(workdir / weights.TOKENS, table)
        found = weights.token_auroc(table, lower.rows, config.data.spans)
        final |= {"selector/token_auroc": found} if math.isfinite(found) else {}
    started = {f"start/{key.removeprefix('eval/')}": value for key, value in at_start.items()}
    times = {f"time/{key}": round(value, 2) for key, value in clock.so_far().items()}
    summary = {"steps": num_steps, "rows": len(lower.rows)} | started | final | refreshed | times

    def finish() -> None:
        workspace.write_atomically(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")

    finish()  # the report reads it
    try:
        with clock("report"):
            page.write(workdir, lower.rows)
    except Exception as error:  # whatever it is: the run is finished, and only its picture is missing
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"no report.html ({cause}); to try again: python -m bilevel_jax.report --workdir={workdir}", file=sys.stderr)
    summary["time/report"] = round(clock.so_far()["report"], 2)
    finish()
    return summary

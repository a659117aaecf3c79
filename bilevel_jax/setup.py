"""What a run is made of before its first step: model and rows, state, compiled step, scorer, refresh."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from bilevel_jax import (
    batches,
    features,
    frozen,
    online,
    preferences,
    references,
    sampling,
    scoring,
    sharding,
    startup_checks,
    step,
    train_state,
)
from bilevel_jax import config as configuration
from bilevel_jax.data import levels, packing, rendering, rows, templates, token_ids
from bilevel_jax.models import huggingface, layer_range, layer_settings, lora, model_config
from bilevel_jax.runtime import phases
from bilevel_jax.text import say


@dataclasses.dataclass(frozen=True)
class Setup:
    """The model and the rows of a run."""

    mesh: jax.sharding.Mesh
    tokenizer: Any  # of Hugging Face
    eos: tuple[int, ...]  # ids that end a response
    model: model_config.ModelConfig
    base: dict
    adapter: dict  # at its start; in a run only its shapes, see `without_adapter`
    upper: levels.Level
    lower: levels.Level

    def detokenize(self, tokens) -> str:
        """The exact text: cleaning up would drop spaces that the model generated."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def load(config: configuration.Config) -> Setup:
    """Reads model and data, and checks that they fit together."""
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    directory = huggingface.locate(config.model.path)
    model = huggingface.read_config(directory, config.model.dtype, quantization=config.model.quantization)
    model = layer_settings.for_length(model, config.data.max_length)
    startup_checks.check_fit(config, model.max_positions, sharding.num_parts(mesh, "rows"))
    attention, reason = startup_checks.resolve_attention(config, model, jax.default_backend(), sharding.num_parts(mesh, "heads"))
    if reason:
        say(f"model.attention=auto takes xla and not fused: {reason}")
    model = dataclasses.replace(model, attention=attention)
    tokenizer = templates.load_tokenizer(str(directory))
    with phases.phase("loading rows"):
        upper, lower = levels.load_levels(config, tokenizer)
    for level in (upper, lower):
        token_ids.check(level.all_examples, tokenizer, model.vocab_size)
    startup_checks.check_trusted_rows(config, len(upper.rows), len(upper.eval_rows))
    startup_checks.check_rows(config, len(lower.rows), mesh.size)
    for notice in startup_checks.notices(config, upper, lower):
        say(notice)
    if notice := rendering.template_notice(config.data.template, tokenizer, lower.examples):
        say(notice)
    model = trained_model(config, model)
    # An adapter that does not fit is refused before the base is loaded, which may take minutes.
    adapter = start_of_adapter(config, model) if config.lora.rank else None
    with phases.phase("loading the model"):
        base = huggingface.load_params(directory, model, mesh)
    eos = templates.ends(huggingface.eos_ids(directory, tokenizer), tokenizer, config.data.template)
    return Setup(mesh, tokenizer, eos, model, base, adapter or lora.init_full(base), upper, lower)


def trained_model(config: configuration.Config, model: model_config.ModelConfig) -> model_config.ModelConfig:
    """The model with the options of training."""
    scale = lora.scale(config.lora.alpha, config.lora.rank, config.lora.rslora)
    return dataclasses.replace(model, adapter_scale=scale, adapter_dropout=config.lora.dropout, remat=config.model.remat)


def start_of_adapter(config: configuration.Config, model: model_config.ModelConfig) -> dict:
    """The adapter before the first step, see `lora`.

    Raises:
      ConfigError, ModelError: `lora.targets` or `lora.layers` name what the model lacks; `lora.init` is no adapter of this model,
        or has another rank, scale, targets or layers.
    """
    section = config.lora
    targets, num_layers = lora.resolve_targets(model, section.targets), lora.resolve_layers(model, section.layers)
    if not section.init:
        return lora.init_adapter(model, jax.random.key(config.seed), section.rank, targets, num_layers)
    read, adapter = huggingface.load_adapter(section.init, model)
    adapted = layer_range.num_adapted(adapter)
    if adapted != num_layers:
        right = "all" if adapted == model.num_layers else f"last:{adapted}"
        what = f"lora.init={section.init}: that adapter has {adapted} of {model.num_layers} layers"
        raise configuration.ConfigError(f"{what}; set lora.layers={right}, or leave lora.init empty")
    names = {name: low_rank for module in adapter["layers"].values() for name, low_rank in module.items()}
    rank = next(iter(names.values()))["a"].shape[-1]
    if (rank, set(names)) != (section.rank, set(targets)) or not np.isclose(read.adapter_scale, model.adapter_scale):
        what = f"lora.init={section.init}: that adapter has rank {rank}, scale {read.adapter_scale:g} and targets {','.join(names)}"
        alpha = read.adapter_scale * (rank**0.5 if section.rslora else rank)
        raise configuration.ConfigError(
            f"{what}; set lora.rank={rank}, lora.alpha={alpha:g} and lora.targets={','.join(names)}, or leave lora.init empty"
        )
    return adapter


# --------------------------------------------------------------------------------------------------------------------
# The selector's features
# --------------------------------------------------------------------------------------------------------------------


def fit_features(config: configuration.Config, setup: Setup) -> tuple[features.Encoder, np.ndarray]:
    """The feature encoder fitted to both levels, and the features of the lower level's rows, [N, A]."""
    lower, upper = (
        features.pooled(setup.model, setup.base, level.examples, config.batch.micro_size, config.data.max_length, setup.mesh)
        for level in (setup.lower, setup.upper)
    )
    encoder = features.fit(lower, upper)
    return encoder, features.encode(encoder, lower)


@dataclasses.dataclass(frozen=True)
class RowFeatures:
    """The frozen features that ω is a function of; all None where logits are free."""

    encoder: features.Encoder | None  # None for groups
    values: np.ndarray | None  # [N, A] float32, or [N] int32, the group of each row
    size: int  # A


def row_features(config: configuration.Config, setup: Setup, directory: pathlib.Path, resumed: bool) -> RowFeatures:
    """The sources of the rows (`unit=domain`), or their features (`parameterization=features`), fitted or read again."""
    if config.method == "mixing":
        return RowFeatures(None, None, 0)
    if config.selection.unit == "domain":
        names, domain_of_row = levels.domains(setup.lower, config.data.lower)
        return RowFeatures(None, domain_of_row, len(names))
    if configuration.has_row_features(config):
        with phases.phase("computing features of the rows") if not resumed else contextlib.nullcontext():
            encoder, values = features.read(directory / features.FILE) if resumed else fit_features(config, setup)
        return RowFeatures(encoder, values, features.SIZE)
    return RowFeatures(None, None, 0)


def token_offsets(config: configuration.Config, setup: Setup) -> list[np.ndarray] | None:
    """Where each row's tokens are in its response; None where tokens have no weights.

    Raises:
      DataError: the parts of a response that a row marks as bad, for measurement, are not spans.
    """
    if not configuration.has_token_weights(config):
        return None
    for row in setup.lower.rows:
        rows.spans(row, config.data.spans)
    return templates.response_offsets(setup.lower.rows, setup.lower.examples, setup.tokenizer)


# --------------------------------------------------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """The compiled `(base, state, batch, scales, features) -> (state, metrics)`."""

    compiled: jax.stages.Compiled
    jitted: Callable  # what it was compiled from
    mesh: jax.sharding.Mesh
    has_4_bits: bool  # whether the base has arrays of 4 bits

    def __call__(self, *arguments):
        if not self.has_4_bits:
            return self.compiled(*arguments)
        # `compiled` compares the layouts of arrays of 4 bits wrongly, and refuses them (jax 0.10). `jitted` calls the same program.
        with jax.set_mesh(self.mesh):
            return self.jitted(*arguments)


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled functions of a run, with the arguments that are the same in every step."""

    train_step: CompiledStep
    score: Callable  # see `scoring.make_scorer`
    score_greedy: Callable  # the same with `greedy=True`, see `scoring.make_scorer`
    batch_of: Callable  # (k, store) -> StepBatch
    features: jax.Array | None  # of the rows, on the devices
    layout: packing.Layout  # of every batch
    frozen_layers: frozen.FrozenLayers | None = None  # the layers below the first adapter; None where all layers are learned

    def put_batch(self, batch: batches.StepBatch, mesh: jax.sharding.Mesh) -> packing.Batch:
        """The batch on the devices, complete with the hidden states that leave the frozen layers."""
        if self.frozen_layers is None:
            return sharding.put_batch(batch.batch, mesh)
        assert batch.state_keys is not None  # as where layers are frozen
        return self.frozen_layers.put_batch(batch.batch, batch.state_keys)


def with_references(config: configuration.Config, setup: Setup, directory: pathlib.Path | None = None) -> Setup:
    """The setup with the reference model's log-probabilities of all pairs, read from `directory` where they are there."""
    score = scoring.make_scorer(setup.model, config.batch.micro_size, config.data.max_length, setup.mesh)

    def complete(name: str, level: levels.Level, loss: str) -> levels.Level:
        stored = references.read(references.file_of(directory, name)) if directory else None
        return references.complete(level, loss, score, setup.base, stored)

    upper, lower = complete("upper", setup.upper, config.loss.upper), complete("lower", setup.lower, config.loss.lower)
    return dataclasses.replace(setup, upper=upper, lower=lower)


def checked_steps(config: configuration.Config, setup: Setup) -> int:
    """The number of steps of the run.

    Raises:
      ConfigError: a setting does not go with it.
    """
    num_rows = len(setup.lower.rows)
    number = configuration.num_steps(config, num_rows)
    startup_checks.check_profile(config, number)
    startup_checks.check_masks(config, number, num_rows)
    return number


def make_optimizer(config: configuration.Config, num_rows: int) -> optax.GradientTransformation:
    """The optimizer of θ of a run on `num_rows` lower-level rows."""
    return configuration.to_optimizer(config, configuration.num_steps(config, num_rows))


def new_state(
    config: configuration.Config, adapter, num_rows: int, optimizer: optax.GradientTransformation, num_features: int
) -> train_state.State:
    """The state before the first step."""
    objective, selector = configuration.to_objective(config), configuration.to_selector(config)
    return train_state.init(adapter, optimizer, objective, selector, num_rows, num_features)


def init_state(config: configuration.Config, setup: Setup, num_features: int) -> tuple[train_state.State, train_state.State]:
    """The state before the first step, on the devices, and its shardings."""

    def build(adapter):
        return new_state(config, adapter, len(setup.lower.rows), make_optimizer(config, len(setup.lower.rows)), num_features)

    shardings = sharding.state_shardings(setup.mesh, jax.eval_shape(build, setup.adapter), config.mesh.shard_selector)
    adapter = jax.tree.map(sharding.device_put, setup.adapter, shardings.policy.adapter)
    # Compiled: where all weights are learned, no process has the whole of them, and each device makes its own part of the rest.
    return jax.jit(build, out_shardings=shardings)(adapter), shardings


def without_adapter(setup: Setup) -> Setup:
    """The setup with shapes in place of the adapter's arrays.

    The state holds a copy, and with `lora.rank=0` a second one would be as large as the model.
    """
    return dataclasses.replace(setup, adapter=jax.eval_shape(lambda: setup.adapter))


def batch_layout(config: configuration.Config, mesh) -> packing.Layout:
    """The layout of every batch of a run. Where influences are measured, no sequence holds rows of both levels."""
    entries = configuration.entries_per_row(config) * config.batch.size
    separate = train_state.measures_influence(configuration.to_objective(config), configuration.to_selector(config))
    parts = sharding.num_parts(mesh, "rows")
    return packing.update_layout(config.batch.micro_size, config.data.max_length, entries, separate, parts)


def jit_step(
    config: configuration.Config,
    model: model_config.ModelConfig,
    optimizer: optax.GradientTransformation,
    shardings: train_state.State,
    mesh: jax.sharding.Mesh,
) -> jax.stages.Wrapped:
    """The jitted `(base, state, batch, scales, features) -> (state, metrics)`; `shardings` are those of the state."""
    objective, selector = configuration.to_objective(config), configuration.to_selector(config)
    update = step.make_step(model, objective, selector, optimizer, config.seed)
    return jax.jit(update, donate_argnums=1, out_shardings=(shardings, sharding.replicated(mesh)))


def compile_program(
    config: configuration.Config,
    setup: Setup,
    state: train_state.State,
    shardings: Any,  # a `State` of them
    row_values: np.ndarray | None,
    directory: pathlib.Path | None = None,
    resumed: bool = False,
) -> Program:
    """Compiles the step for the shapes of the first batch, which all batches share.

    The levels of `setup` have references where their losses are those of pairs, see `with_references`.
    `directory` and `resumed` are for what frozen layers compute, see `frozen.make`.
    """
    mesh, base, micro_size, length = setup.mesh, setup.base, config.batch.micro_size, config.data.max_length
    values = None if row_values is None else sharding.device_put(row_values, shardings.selector.logits)
    layout = batch_layout(config, mesh)
    score = scoring.make_scorer(setup.model, micro_size, length, mesh)
    upper, lower = setup.upper, setup.lower
    keys = frozen.SegmentKeys(upper, lower)
    layers = frozen.make(config.model.cache_frozen, setup.model, base, setup.adapter, mesh, keys, directory, resumed)
    batch_of = functools.partial(batches.make_batch, config, upper, lower, layout, row_keys=keys if layers else None)
    with jax.set_mesh(mesh):
        jitted = jit_step(config, setup.model, make_optimizer(config, len(lower.rows)), shardings, mesh)
        first = batch_of(0, online.empty(len(lower.rows))).batch
        if layers:
            first = frozen.with_states(first, frozen.empty_states(setup.model, first.packed.tokens.shape))
        first = sharding.put_batch(first, mesh)
        scales = sharding.replicate(batches.level_scales(config, 0), mesh)
        compiled = jitted.lower(base, state, first, scales, values).compile()
    train_step = CompiledStep(compiled, jitted, mesh, has_4_bits=setup.model.quantization == "nf4")
    score_greedy = scoring.make_scorer(setup.model, micro_size, length, mesh, greedy=True)
    return Program(train_step, score, score_greedy, batch_of, values, layout, layers)


def build_refresh(config: configuration.Config, setup: Setup, score: Callable, reward_fn: Callable | None = None) -> Callable:
    """`online.make_refresh` for the lower level of a run."""
    settings = sampling.Settings(temperature=config.online.temperature, max_new_tokens=config.online.max_new_tokens)
    sample = sampling.make_sampler(
        setup.model,
        settings,
        setup.eos,
        slots=config.online.slots,
        length=config.data.max_length,
        mesh=setup.mesh,
        full_batches=True,  # every refresh asks another number of questions
    )
    generator = online.Generator(
        sample,
        score,
        setup.detokenize,
        setup.lower.ids,
        setup.lower.examples,
        config.seed,
        config.online.num_samples,
        paired=config.online.objective in preferences.PAIRS,
    )
    return online.make_refresh(generator, config.online.generate, reward_fn)

"""Random configurations and random steps of a run, for `test_step_properties`.

A configuration is drawn from the config's own keys. Every key is in `VALUES`, from which it is drawn, or in `NOT_DRAWN` with the
reason.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax import batches, checks, objective, online, optimizer, selector, setup, sharding, step, train_state
from bilevel_jax import config as configuration
from bilevel_jax.data import levels, shuffle, templates
from bilevel_jax.models import decoder, lora, model_config
from tests import step_reference as reference

SHAPE = model_config.ModelConfig(
    "llama", vocab_size=24, hidden_size=8, intermediate_size=12, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4,
    rotary_dim=4, max_positions=64, activation="silu", norm_eps=1e-5, rope_theta=1e4, tie_embeddings=True,
)  # fmt: skip
NUM_FEATURES = 3
YES_OR_NO = (False, True)

VALUES = {  # of each key: all its names, or some numbers
    "seed": range(100),
    "method": configuration.METHODS,
    "num_epochs": (1, 2, 3),
    "mixing.rho": (0.0, 0.3, 1.0),
    "penalty.rho_init": (0.0, 0.1, 0.4),
    "penalty.rho_step": (0.0, 0.1),
    "selection.unit": configuration.UNITS,
    "selection.parameterization": selector.PARAMETERIZATIONS,
    "selection.ridge": (0.0, 0.3),
    "selection.rule": selector.RULES,
    "selection.init": ("", "weights.jsonl"),
    "selection.freeze": YES_OR_NO,
    "selection.optimizer": selector.OPTIMIZERS,
    "selection.learning_rate": (0.01, 0.3, 1.0),
    "selection.b1": (0.0, 0.9),
    "selection.b2": (0.95, 0.999),
    "selection.tau": (0.5, 1.0),
    "selection.token_learning_rate": (0.1, 0.5),
    "selection.baseline": selector.BASELINES,
    "selection.cost": objective.COSTS,
    "selection.value_function": objective.VALUE_FUNCTIONS,
    "selection.weight_scale": selector.WEIGHT_SCALES,
    "selection.coefficient_at": objective.COEFFICIENTS,
    "selection.order": selector.ORDERS,
    "online.num_samples": (1, 2, 3),
    "online.response_weight": objective.importance.RESPONSE_WEIGHTS,
    "online.clip": (1.0, 2.0),
    "online.normalization": online.NORMALIZATIONS,
    "online.objective": objective.RESPONSE_LOSSES,
    "online.reward": ("", "truth"),
    "online.reward_temperature": (0.5, 1.0),
    "loss.upper": objective.LOSSES,
    "loss.lower": objective.LOSSES,
    "loss.beta": (0.1, 0.5),
    "loss.reduction": objective.REDUCTIONS,
    "lora.rank": (0, 2),
    "lora.alpha": (1.0, 4.0),
    "lora.targets": ("all-linear", "q_proj,v_proj"),
    "lora.rslora": YES_OR_NO,
    "optimizer.name": optimizer.OPTIMIZERS,
    "optimizer.learning_rate": (1e-3, 1e-2),
    "optimizer.schedule": optimizer.SCHEDULES,
    "optimizer.warmup": (0.0, 0.3, 1.0),
    "optimizer.b1": (0.0, 0.9),
    "optimizer.b2": (0.95, 0.999),
    "optimizer.weight_decay": (0.0, 0.1),
    "optimizer.clip_norm": (0.0, 0.5),
    "batch.size": (1, 2, 3, 4),
    "batch.micro_size": (1, 2, 3),
    "model.remat": YES_OR_NO,
    "data.learn": templates.LEARN,
    "data.max_length": (12, 16, 20),
}
NOT_DRAWN = {
    "decides which rows, responses or files there are, not what a step computes": (
        "selection.outer_steps online.ratio online.refresh_every online.max_new_tokens online.temperature online.generate "
        "online.slots lora.init model.path data.upper data.lower data.columns data.deduplicate data.overlap data.template "
        "data.cache data.num_upper data.num_lower data.bad_fraction data.label data.spans data.truth"
    ),
    "is for after or between the steps": (
        "eval.num_upper eval.num_lower eval.keep eval.every eval.keep_best eval.patience checkpoint.every checkpoint.keep "
        "eval.similar log.every log.tensorboard log.wandb log.profile"
    ),
    "needs several devices (tests/test_mesh.py)": "mesh.data mesh.fsdp mesh.tensor mesh.shard_selector",
    "is random by design (tests/test_step.py)": "lora.dropout",
    "is not float32 (tests/models, experiments/benchmarks/dtypes.py)": "model.dtype model.quantization",
    "is one of two paths to the same numbers (tests/models/test_fused_attention.py)": "model.attention",
    "leaves layers without an adapter, whose results are fed to the step (tests/test_frozen.py)": "lora.layers model.cache_frozen",
}
METHODS = ("mixing", "offline", "offline", "offline", "online", "online", "online", "dynamic", "dynamic", "dynamic")
DECISIVE = ("selection.rule", "selection.unit", "selection.cost", "loss.lower", "online.objective")  # what forbids most
USUAL = {"batch.size": 4, "data.max_length": 20, "lora.rank": 2, "online.num_samples": 3, "optimizer.learning_rate": 1e-2}
TRIES = 10  # of the other keys, for one choice of the decisive ones


def draw_config(rng: np.random.Generator, focus: tuple[str, object] | None = None) -> configuration.Config:
    """A valid configuration.

    Keys are drawn until they may stand together. The method is drawn once, and the decisive keys seldom: else the configurations
    that are left would be those that forbid least, direct mixing for one.

    Args:
      rng: of all draws.
      focus: a key and the value that it has.
    """
    for attempt in range(1000 * TRIES):
        if attempt % (50 * TRIES) == 0:
            method = _choice(rng, METHODS)
        if attempt % TRIES == 0:
            decisive = {key: _choice(rng, VALUES[key]) for key in DECISIVE}
        drawn = USUAL | {key: _choice(rng, values) for key, values in VALUES.items() if rng.random() < 0.5}
        drawn |= {"method": method} | decisive | dict([focus] if focus else [])
        config = configuration.default()
        for key, value in drawn.items():
            section, _, name = key.rpartition(".")
            (config[section] if section else config)[name] = value
        try:
            built = checks.build(config)
            configuration.to_optimizer(built, 100)
        except configuration.ConfigError:
            continue
        return built
    raise AssertionError(f"no valid configuration has {focus}")


def _choice(rng, values):
    return values[int(rng.integers(len(values)))]


def values_of(config: configuration.Config) -> dict[str, object]:
    """The value of each key that is drawn."""
    result = {}
    for key in VALUES:
        section, _, name = key.rpartition(".")
        result[key] = getattr(getattr(config, section) if section else config, name)
    return result


def changes(config: configuration.Config) -> str:
    """The keys of a configuration that are not the defaults, as a command takes them."""
    usual = values_of(configuration.Config())
    return " ".join(f"--config.{key}={value}" for key, value in values_of(config).items() if value != usual[key])


# --------------------------------------------------------------------------------------------------------------------
# Rows and responses
# --------------------------------------------------------------------------------------------------------------------


def _tokens(rng, size: int) -> np.ndarray:
    return rng.integers(0, SHAPE.vocab_size, size).astype(np.int32)


def draw_level(rng, num_rows: int, kind: str, config: configuration.Config, prefix: str) -> levels.Level:
    """Rows of random lengths, some at the limit, some of one token; pairs where the loss is one of pairs."""
    examples, references, room = [], [], config.data.max_length
    for _ in range(num_rows):
        paired = kind != "sft"
        size = int(rng.choice([room, rng.integers(2, room + 1), rng.integers(2, 6)]))
        response = int(rng.integers(1, size // 2 + 1))
        prompt = int(rng.integers(0, size - response + 1))
        earlier, rejected = (), None
        if paired:
            response = int(rng.integers(1, room // 2 + 1))
            rejected_size = int(rng.integers(1, room - response + 1))
            # Without a question, responses of one token have none to learn; of a pair, only one may be so.
            shortest = int(response == rejected_size == 1)
            prompt = int(rng.integers(shortest, (room - response - rejected_size) // 2 + 1))
            rejected = _tokens(rng, rejected_size)
            references.append(-3.0 * np.array([response, rejected_size]) + rng.normal(0, 2, 2))
        elif config.data.learn == "all" and prompt > 3 and rng.random() < 0.5:
            start = int(rng.integers(0, prompt - 2))
            earlier = ((start, int(rng.integers(start + 1, prompt))),)
        examples.append(templates.Example(_tokens(rng, prompt), _tokens(rng, response), rejected, earlier=earlier))
    rows = [types.SimpleNamespace(id=f"{prefix}{i}") for i in range(num_rows)]
    return levels.Level(rows, examples, [], [], np.array(references) if references else None)


def draw_store(rng, config, lower: levels.Level, model: reference.Model, adapter) -> online.ResponseStore:
    """Responses to some of the masked rows. π_old is near the policy, or far from it."""
    N, G = len(lower.rows), config.online.num_samples
    if config.method not in configuration.ONLINE:
        return online.empty(N)
    masked = rng.random(N) < rng.choice([0.3, 0.7, 1.0])
    answered = [i for i in np.flatnonzero(masked) if rng.random() < 0.9]
    row_index = np.repeat(np.array(answered, int), G)
    tokens = []
    for i in row_index:
        repeated = len(tokens) % G and rng.random() < 0.1
        room = max(1, config.data.max_length - len(lower.examples[i].prompt))
        tokens.append(tokens[-1] if repeated else _tokens(rng, int(rng.integers(1, room + 1))))
    log_prob = np.zeros(len(tokens))
    for n, (i, response) in enumerate(zip(row_index, tokens)):
        _, nll, _ = model.evaluate(adapter, [reference.entry(lower.examples[i].prompt, response, row=int(i), part=1.0)])
        log_prob[n] = -nll[0] - (rng.normal(0, 0.7) if rng.random() < 0.9 else rng.choice([-200.0, 200.0]))
    return online.ResponseStore(
        step=0,
        masked=masked,
        row_index=row_index,
        sample_index=np.tile(np.arange(G), len(answered)),
        tokens=tokens,
        log_prob=log_prob,
        log_ratio=np.full(len(tokens), np.nan),
        reward=np.where(rng.random(len(tokens)) < 0.3, 1.0, rng.normal(0, 1, len(tokens))),
        reference=np.array([-3.0 * len(response) for response in tokens]) + rng.normal(0, 2, len(tokens)),
    )


# --------------------------------------------------------------------------------------------------------------------
# Steps
# --------------------------------------------------------------------------------------------------------------------


def jitter(tree, rng, std: float):
    return jax.tree.map(lambda x: jnp.array(np.asarray(x) + rng.normal(0, std, x.shape).astype(np.float32)), tree)


@functools.cache
def base():
    return jitter(jax.jit(decoder.init_params, static_argnums=0)(SHAPE, jax.random.key(0)), np.random.default_rng(0), 0.25)


@functools.cache
def first_adapter(rank: int, targets: str):
    if not rank:
        return lora.init_full(base())
    return lora.init_adapter(SHAPE, jax.random.key(0), rank, lora.resolve_targets(SHAPE, targets))


class Chain:
    """Rows and a state, both random, from which a run of a configuration takes steps.

    Args:
      config: of the run; what it fixes is compiled once by `compile_step`.
      num_rows: rows of the lower level, fixed as well.
      rng: of all other values.
    """

    def __init__(self, config: configuration.Config, num_rows: int, rng: np.random.Generator):
        self.config, self.objective, self.selector = config, configuration.to_objective(config), configuration.to_selector(config)
        self.num_steps = config.num_epochs * shuffle.steps_per_epoch(num_rows, config.batch.size)
        self.optimizer = configuration.to_optimizer(config, self.num_steps)
        self.shape = setup.trained_model(config, SHAPE)
        room = max(VALUES["batch.size"]) * (2 + max(VALUES["online.num_samples"])), max(VALUES["data.max_length"])
        self.model = reference.Model(SHAPE, base(), self.shape.adapter_scale, room)
        self.upper = draw_level(rng, int(rng.integers(1, 6)), self.objective.upper, config, "u")
        self.lower = draw_level(rng, num_rows, self.objective.lower, config, "l")
        self.features = self._features(num_rows, rng)
        adapter = jitter(first_adapter(config.lora.rank, config.lora.targets), rng, 0.1)
        self.state = self._state(adapter, num_rows, rng)
        self.store = draw_store(rng, config, self.lower, self.model, adapter)
        self.layout = setup.batch_layout(config, sharding.make_mesh(1))

    def _features(self, num_rows, rng):
        if self.selector.parameterization != "features":
            return None
        if self.config.selection.unit == "domain":
            return rng.integers(0, NUM_FEATURES, num_rows).astype(np.int32)
        return rng.normal(0, 1, (num_rows, NUM_FEATURES)).astype(np.float32)

    def _state(self, adapter, num_rows, rng) -> train_state.State:
        state = setup.new_state(self.config, adapter, num_rows, self.optimizer, NUM_FEATURES)
        omega = state.selector
        if omega.feature_params is not None:
            phi = rng.normal(0, 0.7, NUM_FEATURES).astype(np.float32)
            named = self.features.ndim == 1
            logits = phi[self.features] if named else self.features @ phi
            omega = omega._replace(feature_params=jnp.array(phi), logits=jnp.array(logits))
        elif self.selector.rule != "uniform":
            omega = omega._replace(logits=jnp.array(rng.normal(0, 0.7, num_rows).astype(np.float32)))
        tracker = state.tracker
        if tracker is not None:
            tracker = tracker._replace(adapter=jitter(tracker.adapter, rng, 0.05))
        token_params = state.token_params
        if token_params is not None:
            token_params = jnp.array(rng.normal(0, 0.5, 2).astype(np.float32))
        return state._replace(selector=omega, tracker=tracker, token_params=token_params)

    def inputs(self, k: int):
        """Of step k: batch and scales of the compiled step, and the inputs of the reference."""
        config, N = self.config, len(self.lower.rows)
        built = batches.make_batch(config, self.upper, self.lower, self.layout, k, self.store)
        epoch = k // shuffle.steps_per_epoch(N, config.batch.size)
        used = configuration.used_levels(config)
        lower_rows = shuffle.lower_rows(config.seed, N, config.batch.size, k) if "lower" in used else []
        upper_rows = shuffle.upper_rows(config.seed, len(self.upper.rows), config.batch.size, k) if "upper" in used else []
        entries = reference.entries_of(config, self.upper, self.lower, self.store, lower_rows, upper_rows)
        rho = config.mixing.rho if config.method == "mixing" else config.penalty.rho_init + epoch * config.penalty.rho_step
        scales = (1 - rho, rho) if config.method == "mixing" else (1.0, rho / (1 - rho))
        masked = self.store.masked
        factor = np.ones(N)
        if config.method in configuration.ONLINE and config.online.normalization == "eq7" and 0 < masked.sum() < N:
            factor = N / np.where(masked, masked.sum(), N - masked.sum())
        known = reference.Inputs(config, self.model, entries, scales, factor, self.features, self.num_steps)
        return built.batch, batches.level_scales(config, epoch), known


def compile_step(chain: Chain):
    """The step of a chain, for all chains of its configuration and number of rows."""
    update = step.make_step(chain.shape, chain.objective, chain.selector, chain.optimizer, chain.config.seed)
    return jax.jit(update)


def all_keys() -> set[str]:
    """Every key of the config."""
    result = set()
    for field in dataclasses.fields(configuration.Config):
        section = getattr(configuration.Config(), field.name)
        is_section = dataclasses.is_dataclass(section)
        result |= {f"{field.name}.{inner.name}" for inner in dataclasses.fields(section)} if is_section else {field.name}
    return result

"""From a user's `ConfigDict` to a typed `Config`: what cannot run is refused before anything compiles."""

import dataclasses
import importlib.util
import math
import os
from collections.abc import Iterable, Mapping

import ml_collections

from bilevel_jax import config as configuration
from bilevel_jax import frozen, near_names, objective, online, optimizer, sampling
from bilevel_jax.config import Config, ConfigError
from bilevel_jax.data import columns, duplicates, levels, rejections, templates
from bilevel_jax.models import fused_attention, lora, model_config, quantization

CHOICES = {
    "method": configuration.METHODS,
    "optimizer.name": optimizer.OPTIMIZERS,
    "optimizer.schedule": optimizer.SCHEDULES,
    "model.dtype": configuration.DTYPES,
    "model.quantization": quantization.KINDS,
    "model.attention": fused_attention.KINDS,
    "model.cache_frozen": frozen.CACHES,
    "selection.unit": configuration.UNITS,
    "data.learn": templates.LEARN,
    "data.template": templates.TEMPLATES,
    "data.deduplicate": duplicates.MODES,
    "data.overlap": levels.OVERLAP,
    "online.generate": online.GENERATE,
    "online.normalization": online.NORMALIZATIONS,
    "online.objective": objective.RESPONSE_LOSSES,
}
AT_LEAST = {
    "num_epochs": 1,
    "lora.rank": 0,
    "log.every": 1,
    "batch.size": 1,
    "batch.micro_size": 1,
    "checkpoint.keep": 1,
    "data.max_length": 2,
    "seed": 0,
    "checkpoint.every": 0,
    "mesh.data": 0,
    "mesh.fsdp": 1,
    "mesh.tensor": 1,
    "data.num_upper": 0,
    "data.num_lower": 0,
    "eval.num_upper": 0,
    "eval.num_lower": 0,
    "eval.every": 0,
    "eval.patience": 0,
    "online.num_samples": 1,
    "online.refresh_every": 1,
    "online.max_new_tokens": 1,
    "online.slots": 1,
    "selection.outer_steps": 1,
}
RANGES = {  # key -> (allowed?, in words); those of `Selector`, `Objective` and `sampling.Settings` are checked there
    "seed": (lambda value: value < 2**32, "below 2^32"),
    "online.ratio": (lambda value: 0 <= value <= 1, "in [0, 1]"),
    "lora.alpha": (lambda value: value > 0, "positive"),
    "lora.dropout": (lambda value: 0 <= value < 1, "in [0, 1)"),
    "data.bad_fraction": (lambda value: 0 <= value < 1, "in [0, 1)"),
    "eval.keep": (lambda value: 0 < value <= 1, "in (0, 1]"),
    "eval.num_upper": (lambda value: 0 <= value < 1 or value.is_integer(), "a number of rows, or a share of them below 1"),
    "eval.num_lower": (lambda value: 0 <= value < 1 or value.is_integer(), "a number of rows, or a share of them below 1"),
}


def build(config: ml_collections.ConfigDict) -> Config:
    """The typed config of a run.

    Raises:
      ConfigError: one line that names the key: an unknown one, a wrong type, a value out of range, or a combination that is not
        supported.
    """
    _check_keys(config, configuration.default(), "")
    typed = _typed(Config, config)
    _check_values(typed)
    _check_parts(typed)
    _check_given_weights(typed)
    _check_learned(typed)
    _check_layers(typed)
    if typed.method == "mixing":
        _check_mixing(typed)
        return typed
    if typed.method in configuration.ONLINE:
        _check_responses(typed)
    _check_schedule(typed)
    _check_selection(typed)
    return typed


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


# --------------------------------------------------------------------------------------------------------------------
# Keys, types, values
# --------------------------------------------------------------------------------------------------------------------


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean NAME?)` for the known names nearest to `name`, or an empty text; see `near_names`."""
    close = near_names.nearest(name, known)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def keys(config: Mapping, prefix: str = "") -> list[str]:
    """The full names of all keys, sections left out."""
    names: list[str] = []
    for key, value in config.items():
        names += keys(value, f"{prefix}{key}.") if isinstance(value, ml_collections.ConfigDict) else [prefix + key]
    return names


def _check_keys(config, reference, prefix: str) -> None:
    for key in config:
        if key not in reference:
            hint = nearest(prefix + key, keys(configuration.default()))
            known = ", ".join(reference)
            raise ConfigError(f"unknown key {prefix}{key}{hint}; {prefix.rstrip('.') or 'the config'} has {known}")
    for key, expected in reference.items():
        name = prefix + key
        if key not in config:
            raise ConfigError(f"{name} is missing")
        value = config[key]
        if isinstance(expected, ml_collections.ConfigDict):
            if not isinstance(value, ml_collections.ConfigDict):
                raise ConfigError(f"{name}={value!r} must be a section")
            _check_keys(value, expected, name + ".")
        elif problem := _type_problem(name, value, expected):
            raise ConfigError(problem)


def _type_problem(name: str, value, expected) -> str:
    """Why a value cannot take the place of the default `expected`; "" if it can."""
    if isinstance(expected, float):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        return "" if is_number else f"{name}={value!r:.200} must be a finite number"
    return "" if type(value) is type(expected) else f"{name}={value!r:.200} must be of type {type(expected).__name__}"


def problem(key: str, value, expected) -> str:
    """What is wrong with the value of one key, whose default is `expected`; "" for nothing."""
    if wrong := _type_problem(key, value, expected):
        return wrong
    if key in CHOICES and value not in CHOICES[key]:
        return f"{key}={value!r:.200} is not among {', '.join(CHOICES[key])}{nearest(value, CHOICES[key])}"
    if key in AT_LEAST and value < AT_LEAST[key]:
        return f"{key}={value} must be at least {AT_LEAST[key]}"
    if key in RANGES and not RANGES[key][0](float(value) if isinstance(expected, float) else value):
        return f"{key}={value} must be {RANGES[key][1]}"
    return ""


def _typed(cls, section):
    """A section with all its keys as the dataclass `cls`."""
    values = {}
    for field in dataclasses.fields(cls):
        value = section[field.name]
        if dataclasses.is_dataclass(field.type):
            value = _typed(field.type, value)
        values[field.name] = float(value) if field.type is float else value
    return cls(**values)


def _value(config: Config, key: str):
    section, _, name = key.rpartition(".")
    return getattr(getattr(config, section) if section else config, name)


def _check_values(config: Config) -> None:
    for key in (*CHOICES, *AT_LEAST, *RANGES):
        value = _value(config, key)
        wrong = problem(key, value, value)
        _require(not wrong, wrong)
    for key in ("data.upper", "data.lower"):
        _require(bool(_value(config, key).strip()), f"{key} is empty; name files, folders, a hub data set or a recipe")
    _require(bool(config.data.cache.strip()), "data.cache is empty; name a directory, or take auto or off")
    is_file = config.data.cache not in ("auto", "off") and os.path.isfile(config.data.cache)
    _require(not is_file, f"data.cache={config.data.cache} is a file; name a directory, or take auto or off")
    _require(bool(config.model.path.strip()), "model.path is empty; name a model directory or a hub id")
    installed = not config.log.wandb or importlib.util.find_spec("wandb")
    _require(bool(installed), f"log.wandb={config.log.wandb!r} needs the package wandb: pip install 'bilevel_jax[wandb]'")
    installed = config.data.deduplicate != "near" or importlib.util.find_spec("datasketch")
    _require(bool(installed), "data.deduplicate=near needs the package datasketch: pip install 'bilevel_jax[near]'")
    try:
        columns.parse(config.data.columns, "data.columns")
    except rejections.DataError as error:
        raise ConfigError(str(error)) from error
    configuration.profiled_steps(config)


def _check_parts(config: Config) -> None:
    """Builds what checks its own values."""
    try:
        sampling.Settings(config.online.temperature)
    except ValueError as error:
        raise ConfigError(f"online.{error}") from error
    try:
        configuration.optimizer_settings(config)
    except ValueError as error:
        raise ConfigError(f"optimizer.{error}") from error
    try:
        objective.check_combination(configuration.to_objective(config), configuration.to_selector(config))
    except ValueError as error:
        raise ConfigError(str(error)) from error


# --------------------------------------------------------------------------------------------------------------------
# Combinations
# --------------------------------------------------------------------------------------------------------------------


def _check_learned(config: Config) -> None:
    """Refuses options of adapters and evaluations that would have no effect, or a wrong one."""
    section, e = config.lora, config.eval
    if not section.rank:
        of_adapters = {
            "lora.init": bool(section.init),
            "lora.layers": section.layers != "all",
            "lora.dropout": section.dropout > 0,
            "lora.rslora": section.rslora,
        }
        for key, is_set in of_adapters.items():
            _require(not is_set, f"{key} is an option of adapters: with lora.rank=0 there is none; take lora.rank=16")
        kind = config.model.quantization
        _require(
            kind == "none", f"model.quantization={kind} freezes the weights that lora.rank=0 learns; take lora.rank=16 or none"
        )
    metagradient = config.method != "mixing" and config.selection.rule == "metagradient"
    for setting, disturbs in (
        (f"method={config.method}, which compares the policy with itself when it answered", config.method in configuration.ONLINE),
        ("selection.rule=metagradient, which repeats every step", metagradient),
        ("selection.unit=token, whose weights follow each token's loss", config.selection.unit == "token"),
    ):
        _require(not (section.dropout and disturbs), f"lora.dropout={section.dropout:g} disturbs {setting}; take lora.dropout=0")
    for key, needs_rows in (("eval.keep_best", e.keep_best), ("eval.patience", e.patience)):
        _require(not needs_rows or e.num_upper > 0, f"{key} needs held-out trusted rows: eval.num_upper=0 holds none out")


def _check_layers(config: Config) -> None:
    """Refuses adapted layers that no model has, and a cache without frozen layers."""
    layers, cache = config.lora.layers, config.model.cache_frozen
    _require(lora.is_layers(layers), f"lora.layers={layers!r:.200} is not all or last:K, the last K layers, such as last:8")
    _require(
        layers != "all" or cache == "off",
        f"model.cache_frozen={cache} keeps what layers without an adapter compute: lora.layers=all has none; take last:K or off",
    )
    _require(
        layers == "all" or config.method == "mixing" or config.selection.rule != "metagradient",
        f"selection.rule=metagradient differentiates whole runs of all layers: lora.layers={layers} must be all",
    )


def _check_mixing(config: Config) -> None:
    _require(0 <= config.mixing.rho <= 1, f"mixing.rho={config.mixing.rho} must be in [0, 1]")
    for level, loss, unused_at in (("upper", config.loss.upper, 1), ("lower", config.loss.lower, 0)):
        _require(
            loss == "sft" or config.mixing.rho != unused_at,
            f"loss.{level}={loss} has no part in mixing.rho={unused_at}, which never uses the {level} level",
        )


def _check_responses(config: Config) -> None:
    """Refuses objectives of generated responses from which nothing could be learned."""
    o, lower = config.online, config.loss.lower
    objective_is = f"online.objective={o.objective}"
    _require(
        lower == "sft" or o.objective == lower,
        f"{objective_is} beside loss.lower={lower}: a loss of pairs compares with no other; take online.objective={lower}",
    )
    if o.objective == "sft":
        return
    _require(bool(o.reward), f"{objective_is} compares responses by online.reward, which is empty; name one")
    _require(o.num_samples > 1, f"{objective_is} compares responses: online.num_samples={o.num_samples} must be at least 2")
    _require(
        o.response_weight != "softmax",
        f"online.response_weight=softmax compares responses, as {objective_is} does already; take sequence, geometric or none",
    )


def _check_schedule(config: Config) -> None:
    last = configuration.rho(config, config.num_epochs - 1)
    _require(
        config.penalty.rho_init >= 0 and 0 <= last < 1,
        f"penalty: ρ goes from {config.penalty.rho_init:g} to {last:g} in {config.num_epochs} epochs, but γ = ρ/(1-ρ) needs "
        f"ρ in [0, 1); lower penalty.rho_step or num_epochs",
    )


def _check_given_weights(config: Config) -> None:
    """Refuses `selection.init` and `selection.freeze` where they would be ignored, or where another key says the opposite."""
    s = config.selection
    if s.freeze:
        _require(bool(s.init), "selection.freeze=True keeps equal weights without selection.init; name one, or take rule=uniform")
    if not s.init:
        return
    reasons = {
        "method=mixing": (config.method == "mixing", "which has no weights; take method=offline and selection.freeze=True"),
        "selection.rule=uniform": (s.rule == "uniform", "which keeps equal weights; take selection.freeze=True"),
        "selection.rule=metagradient": (s.rule == "metagradient", "which finds its own weights; take bds or bmo"),
        "selection.unit=domain": (s.unit == "domain", "whose rows have no weights of their own; take selection.unit=sample"),
        "selection.parameterization=features": (
            s.parameterization == "features",
            "which predicts the weights of the rows; take selection.parameterization=table",
        ),
    }
    for setting, (is_set, words) in reasons.items():
        _require(not is_set, f"selection.init={s.init!r} has no effect with {setting}, {words}")
    _require(
        not s.freeze or s.unit in ("sample", "turn"), "selection.freeze=True keeps the weights of rows; take selection.unit=sample"
    )


def _check_selection(config: Config) -> None:
    s, built = config.selection, configuration.to_selector(config)
    if s.unit == "token":
        _require(
            config.method == "offline",
            f"selection.unit=token weighs the tokens of given responses: method={config.method} must be offline",
        )
        rate = s.token_learning_rate
        _require(rate > 0, f"selection.token_learning_rate={rate} must be positive")
    if s.unit == "turn":
        _require(config.data.learn == "all", "selection.unit=turn weighs every answer of a conversation; take data.learn=all")
        is_sft = config.loss.lower == "sft"
        _require(is_sft, f"selection.unit=turn weighs answers, not pairs: loss.lower={config.loss.lower} must be sft")
    _require(
        built.baseline != "batch" or config.batch.size > 1,
        "selection.baseline=batch with batch.size=1 subtracts a row's loss from itself; take running or none",
    )
    _require(
        built.rule != "metagradient" or (config.method == "offline" and config.loss.upper == config.loss.lower == "sft"),
        "selection.rule=metagradient differentiates whole runs on given responses; take method=offline, loss.upper=loss.lower=sft",
    )
    if built.frozen:
        without_effect = {
            "selection.value_function=tracked": s.value_function != "zero",
            "selection.order=paper": s.order != "joint",
            "selection.unit=domain": s.unit == "domain",
            "selection.parameterization=features": built.parameterization != "table",
        }
        cause = "selection.freeze=True" if s.freeze else f"selection.rule={built.rule}"
        for setting, is_set in without_effect.items():
            _require(not is_set, f"{setting} has no effect with {cause}, which never moves ω")
    _require(
        config.method != "dynamic" or s.rule != "uniform",
        "method=dynamic masks the rows of the smallest weights: with selection.rule=uniform there are none; take method=online",
    )
    _require(
        s.unit != "domain" or s.parameterization == "table",
        "selection.unit=domain takes the source of a row for its only feature; leave selection.parameterization=table",
    )


# --------------------------------------------------------------------------------------------------------------------
# Against model, rows and devices
# --------------------------------------------------------------------------------------------------------------------


def check_fit(config: Config, max_positions: int, num_parts: int) -> None:
    """Refuses lengths beyond the model's `max_positions`, and sizes that the `num_parts` of mesh.data · mesh.fsdp do not divide.

    Raises:
      ConfigError: one line that names the key.
    """
    if config.data.max_length > max_positions:
        what = f"data.max_length={config.data.max_length} is over the model's {max_positions} positions"
        raise ConfigError(f"{what}; set data.max_length={max_positions} or less")
    for key, number in (("batch.micro_size", config.batch.micro_size), ("online.slots", config.online.slots)):
        if number % num_parts:
            raise ConfigError(f"{key}={number} must be a multiple of mesh.data · mesh.fsdp, {num_parts} devices")


def attention(config: Config, model: model_config.ModelConfig, platform: str, tensor: int) -> tuple[str, str]:
    """What `model.attention` is on these devices, `xla` or `fused`, and why `auto` is `xla` on a TPU, or an empty text.

    Args:
      config: of the run.
      model: its model.
      platform: the name that JAX has for the kind of device, such as `tpu`.
      tensor: length of the axis of the mesh that splits heads.

    Raises:
      ConfigError: `fused`, which this platform or these shapes do not allow; one line that names the key.
    """
    setting, is_tpu = config.model.attention, platform == "tpu"
    if setting == "xla" or setting == "auto" and not is_tpu:
        return "xla", ""
    problem, change = f"the kernel is for a TPU, and this run is for a {platform.upper()}", ""
    if is_tpu:
        problem, change = fused_attention.problem(config.data.max_length, model.head_dim, model.num_kv_heads, tensor)
    if setting == "fused" and problem:
        raise ConfigError(f"model.attention=fused: {problem}; set {change + ' or ' if change else ''}model.attention=xla")
    return ("xla", problem) if problem else ("fused", "")


def check_masks(config: Config, num_steps: int) -> None:
    """Refuses `dynamic` where its only refresh is before the first step, when all weights are equal and nothing is masked.

    Raises:
      ConfigError: one line that names the key.
    """
    o = config.online
    if config.method != "dynamic" or config.selection.init or o.ratio in (0, 1) or o.refresh_every < num_steps:
        return
    raise ConfigError(
        f"method=dynamic masks nothing before the weights have moved, and online.refresh_every={o.refresh_every} reaches to the "
        f"end of this run of {num_steps} steps; lower it, or take method=online or offline"
    )


def check_profile(config: Config, num_steps: int) -> None:
    """Refuses to trace steps that a run of `num_steps` does not have.

    Raises:
      ConfigError: one line that names the key.
    """
    traced = configuration.profiled_steps(config)
    if traced and traced[1] > num_steps:
        raise ConfigError(f"log.profile={config.log.profile!r} goes beyond the {num_steps} steps of this run")


def check_rows(config: Config, num_rows: int, devices: int) -> None:
    """Refuses to split ω where the number of `devices` does not divide the lower-level rows.

    Raises:
      ConfigError: one line that names the key and the number to take.
    """
    left = num_rows % devices
    if config.mesh.shard_selector and left:
        what = f"mesh.shard_selector=True: {devices} devices do not divide {num_rows} lower-level rows"
        held_out = config.eval.num_lower
        more = (
            f"some more (eval.num_lower={held_out + left:g})" if held_out.is_integer() else f"{left} more of them (eval.num_lower)"
        )
        raise ConfigError(f"{what}; hold out {more}, or leave ω whole")

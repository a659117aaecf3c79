"""From a user's `ConfigDict` to a typed `Config`: what cannot run is refused before anything compiles.

Here are the checks of keys, types and values. Those of combinations are in `config_combinations`, those against model, rows and
devices in `startup_checks`.
"""

import dataclasses
import importlib.util
import math
import os
from collections.abc import Mapping

import ml_collections

from bilevel_jax import config as configuration
from bilevel_jax import config_combinations, frozen, importance, near_names, objective, online, optimizer, sampling
from bilevel_jax.config import Config, ConfigError, require
from bilevel_jax.data import columns, duplicates, levels, rejections, templates
from bilevel_jax.models import fused_attention, quantization

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
    "online.response_weight": importance.RESPONSE_WEIGHTS,
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
# Key -> (allowed?, in words). Those of `Selector`, `Objective`, `sampling.Settings` and `optimizer.Settings` are checked there.
RANGES = {
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
    config_combinations.check(typed)
    return typed


def keys(config: Mapping, prefix: str = "") -> list[str]:
    """The full names of all keys, sections left out."""
    names: list[str] = []
    for key, value in config.items():
        names += keys(value, f"{prefix}{key}.") if isinstance(value, ml_collections.ConfigDict) else [prefix + key]
    return names


def _check_keys(config, reference, prefix: str) -> None:
    for key in config:
        if key not in reference:
            hint = near_names.hint(prefix + key, keys(configuration.default()))
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
        return f"{key}={value!r:.200} is not among {', '.join(CHOICES[key])}{near_names.hint(value, CHOICES[key])}"
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
        require(not wrong, wrong)
    for key in ("data.upper", "data.lower"):
        require(bool(_value(config, key).strip()), f"{key} is empty; name files, folders, a hub data set or a recipe")
    require(bool(config.data.cache.strip()), "data.cache is empty; name a directory, or take auto or off")
    is_file = config.data.cache not in ("auto", "off") and os.path.isfile(config.data.cache)
    require(not is_file, f"data.cache={config.data.cache} is a file; name a directory, or take auto or off")
    require(bool(config.model.path.strip()), "model.path is empty; name a model directory or a hub id")
    installed = not config.log.wandb or importlib.util.find_spec("wandb")
    require(bool(installed), f"log.wandb={config.log.wandb!r} needs the package wandb: pip install 'bilevel_jax[wandb]'")
    installed = config.data.deduplicate != "near" or importlib.util.find_spec("datasketch")
    require(bool(installed), "data.deduplicate=near needs the package datasketch: pip install 'bilevel_jax[near]'")
    try:
        columns.parse(config.data.columns, "data.columns")
    except rejections.DataError as error:
        raise ConfigError(str(error)) from error
    configuration.profiled_steps(config)


def _check_parts(config: Config) -> None:
    """Checks the values of sampler, optimizer, objective and selector by building them."""
    try:
        sampling.Settings(config.online.temperature)
    except ValueError as error:
        raise ConfigError(f"online.{error}") from error
    try:
        configuration.optimizer_settings(config)
    except ValueError as error:
        raise ConfigError(f"optimizer.{error}") from error
    try:
        if config.method == "mixing":  # it reads nothing of `selection`; unknown values are refused nevertheless
            selecting = dataclasses.replace(config, method="offline")
            configuration.to_objective(selecting), configuration.to_selector(selecting)
        objective.check_combination(configuration.to_objective(config), configuration.to_selector(config))
    except ValueError as error:
        raise ConfigError(str(error)) from error

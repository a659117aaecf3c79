"""Which configs are accepted and which are refused, values derived from a config, and the settings of the paper."""

import importlib.util
import pathlib
import re

import ml_collections
import pytest

from bilevel_jax import checks, presets
from bilevel_jax import config as configuration
from bilevel_jax.config import ConfigError
from configs import finetune, preferences, quality, safety


def with_changes(changes) -> ml_collections.ConfigDict:
    """The default config with changes, which may be invalid."""
    config = configuration.default()
    with config.ignore_type(), config.unlocked():
        for key, value in changes.items():
            *path, last = key.split(".")
            section = config
            for part in path:
                section = section[part]
            section[last] = value
    return config


OFFLINE = {"method": "offline"}
FEATURES = {"selection.parameterization": "features", "selection.optimizer": "adam"}
DOMAIN = {"selection.unit": "domain", "selection.optimizer": "adam"}
TOKEN = {"selection.unit": "token", "selection.cost": "loss"}
TRACKED = {"selection.cost": "loss", "selection.value_function": "tracked"}
INIT = {"selection.init": "runs/earlier"}
DPO = {"method": "online", "online.objective": "dpo", "online.reward": "likelihood", "online.num_samples": 2}
MIXING = {"method": "mixing"}


@pytest.mark.parametrize(
    "changes, named",
    [
        # keys that do not exist, or are missing
        ({"sede": 1}, "sede"),
        ({"selection.temperature": 1.0}, "selection.temperature"),
        ({"lora": 3}, "lora"),
        # wrong types
        ({"seed": 1.5}, "seed"),
        ({"seed": "1"}, "seed"),
        ({"seed": True}, "seed"),
        ({"seed": None}, "seed"),
        ({"num_epochs": 2.0}, "num_epochs"),
        ({"optimizer.learning_rate": "fast"}, "optimizer.learning_rate"),
        ({"optimizer.learning_rate": float("nan")}, "optimizer.learning_rate"),
        ({"optimizer.learning_rate": float("inf")}, "optimizer.learning_rate"),
        ({"data.upper": 3}, "data.upper"),
        ({"log.tensorboard": 1}, "log.tensorboard"),
        ({"model.remat": "yes"}, "model.remat"),
        ({"lora.targets": ["q_proj"]}, "lora.targets"),
        # values out of range
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"num_epochs": 0}, "num_epochs"),
        ({"batch.size": 0}, "batch.size"),
        ({"batch.micro_size": -4}, "batch.micro_size"),
        ({"lora.rank": 0, "lora.dropout": 0.1}, "lora.dropout is an option of adapters"),
        ({"lora.rank": 0, "lora.rslora": True}, "lora.rslora is an option of adapters"),
        ({"lora.rank": 0, "lora.targets": "q_proj"}, "lora.targets is an option of adapters"),
        ({"lora.rank": 0, "model.quantization": "nf4"}, "model.quantization=nf4 freezes the weights that lora.rank=0 learns"),
        ({"model.attention": "flash"}, "'flash' is not among auto, xla, fused"),
        ({"model.quantization": "nf5"}, "'nf5' is not among none, nf4, int8"),
        ({"lora.dropout": 1.0}, "lora.dropout=1.0 must be in"),
        ({"method": "online", "lora.dropout": 0.1}, "lora.dropout=0.1 disturbs method=online"),
        ({"optimizer.schedule": "step"}, "optimizer.schedule='step' is not among constant, cosine, linear"),
        ({"optimizer.weight_decay": 0.1}, "optimizer.weight_decay=0.1 has no effect with name=adam"),
        ({"optimizer.warmup": 1.5}, "optimizer.warmup=1.5 must be a number of steps"),
        ({"eval.num_upper": 0, "eval.keep_best": True}, "eval.keep_best needs held-out trusted rows"),
        ({"eval.num_upper": 0, "eval.patience": 2}, "eval.patience needs held-out trusted rows"),
        ({"selection.b2": 1.0}, "selection.b2=1.0 must be in"),
        ({"lora.rank": -1}, "lora.rank"),
        ({"lora.alpha": 0.0}, "lora.alpha"),
        ({"optimizer.learning_rate": 0.0}, "optimizer.learning_rate"),
        ({"selection.learning_rate": -1.0}, "selection.learning_rate"),
        ({"selection.tau": 0.0}, "selection.tau"),
        ({"loss.beta": 0.0}, "loss.beta"),
        ({"data.max_length": 1}, "data.max_length"),
        ({"data.num_lower": -1}, "data.num_lower"),
        ({"data.upper": ""}, "data.upper"),
        ({"data.bad_fraction": 1.0}, "data.bad_fraction"),
        ({"eval.num_upper": -1}, "eval.num_upper"),
        ({"eval.num_lower": 1.5}, "eval.num_lower=1.5 must be a number of rows, or a share"),
        ({"model.path": ""}, "model.path is empty"),
        ({"data.cache": __file__}, "is a file; name a directory, or take auto or off"),
        ({"eval.keep": 0.0}, "eval.keep"),
        ({"eval.keep": 1.01}, "eval.keep"),
        ({"checkpoint.keep": 0}, "checkpoint.keep"),
        ({"checkpoint.every": -1}, "checkpoint.every"),
        ({"log.profile": "3"}, "log.profile='3' must be START:STOP"),
        ({"log.profile": "5:5"}, "log.profile"),
        ({"log.profile": "-1:5"}, "log.profile"),
        ({"mesh.data": -1}, "mesh.data"),
        ({"mesh.fsdp": 0}, "mesh.fsdp"),
        ({"mesh.tensor": 0}, "mesh.tensor"),
        ({"log.every": 0}, "log.every"),
        ({"online.ratio": -0.01}, "online.ratio"),
        ({"online.ratio": 1.01}, "online.ratio"),
        ({"online.num_samples": 0}, "online.num_samples"),
        ({"online.num_samples": 1.5}, "online.num_samples"),
        ({"online.refresh_every": 0}, "online.refresh_every"),
        ({"online.max_new_tokens": 0}, "online.max_new_tokens"),
        ({"online.temperature": -0.1}, "online.temperature"),
        ({"online.temperature": float("inf")}, "online.temperature"),
        ({"online.clip": 0.99}, "online.clip"),
        ({"online.clip": float("nan")}, "online.clip"),
        ({"online.slots": 0}, "online.slots"),
        ({"online.reward_temperature": 0.0}, "online.reward_temperature"),
        (MIXING | {"online.ratio": 2.0}, "online.ratio"),  # unused with this method, but never valid
        ({"selection.coefficient_at": "current"}, "selection.coefficient_at=current has no effect with selection.cost=influence"),
        # unknown choices
        ({"method": "mixing", "selection.rule": "bdz"}, "selection.rule"),  # unused with this method, but never valid
        ({"method": "mixing", "selection.cost": "gradient"}, "selection.cost"),
        ({"method": "ofline"}, "method"),
        ({"selection.rule": "bdz"}, "selection.rule"),
        ({"selection.optimizer": "lion"}, "selection.optimizer"),
        ({"selection.baseline": "median"}, "selection.baseline"),
        ({"selection.value_function": "exact"}, "selection.value_function"),
        ({"selection.cost": "gradient"}, "selection.cost"),
        ({"selection.unit": "word"}, "selection.unit"),
        ({"selection.unit": "domain"}, "selection.optimizer=mirror"),
        ({"selection.weight_scale": "n"}, "selection.weight_scale"),
        ({"selection.parameterization": "mlp"}, "selection.parameterization"),
        ({"selection.parameterization": "features"}, "selection.optimizer=mirror"),
        ({"selection.coefficient_at": "previous"}, "selection.coefficient_at"),
        ({"online.response_weight": "token"}, "online.response_weight"),
        ({"online.generate": "some"}, "online.generate"),
        ({"online.normalization": "eq8"}, "online.normalization"),
        ({"loss.upper": "ppo"}, "loss.upper"),
        ({"loss.lower": "best_of"}, "loss.lower"),
        ({"online.objective": "ppo"}, "online.objective"),
        (DPO | {"online.objective": "ppo"}, "online.objective"),
        ({"loss.reduction": "max"}, "loss.reduction"),
        ({"optimizer.name": "lion"}, "optimizer.name"),
        ({"model.dtype": "float64"}, "model.dtype"),
        ({"data.template": "vicuna"}, "data.template"),
        # combinations that are not supported
        (MIXING | {"mixing.rho": 1.5}, "mixing.rho"),
        (MIXING | {"mixing.rho": -0.1}, "mixing.rho"),
        (MIXING | {"mixing.rho": 1.0, "loss.upper": "dpo"}, "mixing.rho"),
        (MIXING | {"mixing.rho": 0.0, "loss.lower": "ipo"}, "loss.lower"),
        (DPO | {"online.reward": ""}, "online.reward"),
        (DPO | {"online.num_samples": 1}, "online.num_samples"),
        (DPO | {"online.response_weight": "softmax"}, "online.response_weight"),
        (DPO | {"online.temperature": 0.0}, "online.temperature=0"),
        (DPO | {"loss.lower": "ipo"}, "online.objective=ipo"),  # the message names the required value
        ({"method": "dynamic", "loss.lower": "dpo"}, "online.objective=sft"),  # the message names the current value
        (OFFLINE | {"num_epochs": 10}, "penalty.rho_step"),  # ρ = 1 in epoch 10
        (OFFLINE | {"penalty.rho_init": 1.0, "num_epochs": 1}, "penalty"),
        (OFFLINE | {"penalty.rho_init": -0.1}, "penalty"),
        (OFFLINE | {"penalty.rho_init": 0.5, "penalty.rho_step": -0.3}, "penalty"),  # ρ = -0.1 in epoch 3
        ({"method": "online", "num_epochs": 10}, "penalty.rho_step"),  # online and dynamic have the schedule of offline
        ({"method": "dynamic", "penalty.rho_init": 1.0, "num_epochs": 1}, "penalty"),
        (OFFLINE | {"selection.rule": "uniform", "selection.value_function": "tracked"}, "selection.value_function"),
        (OFFLINE | FEATURES | {"selection.rule": "uniform"}, "selection.parameterization"),
        (OFFLINE | DOMAIN | {"selection.rule": "uniform"}, "selection.unit"),
        (OFFLINE | DOMAIN | {"selection.parameterization": "features"}, "selection.unit"),
        (OFFLINE | TOKEN | {"selection.token_learning_rate": 0.0}, "selection.token_learning_rate"),
        (OFFLINE | TOKEN | {"selection.token_learning_rate": -1.0}, "selection.token_learning_rate"),
        (OFFLINE | TOKEN | {"selection.rule": "uniform"}, "selection.rule"),
        (OFFLINE | TOKEN | {"selection.coefficient_at": "current"}, "selection.coefficient_at"),
        (OFFLINE | TOKEN | {"loss.lower": "dpo"}, "loss.lower"),
        (TOKEN | {"method": "dynamic"}, "method=dynamic"),
        (OFFLINE | {"selection.value_function": "tracked"}, "selection.value_function"),
        ({"selection.order": "reverse"}, "selection.order"),
        (
            OFFLINE | {"selection.order": "paper", "selection.cost": "loss", "selection.coefficient_at": "current"},
            "selection.rule=bds",
        ),
        (OFFLINE | {"selection.order": "paper", "selection.rule": "bmo", "selection.cost": "loss"}, "selection.coefficient_at"),
        (OFFLINE | {"selection.order": "paper", "selection.rule": "uniform"}, "selection.order=paper"),
        ({"method": "dynamic", "selection.rule": "metagradient"}, "selection.rule"),
        (OFFLINE | {"selection.rule": "metagradient", "loss.upper": "dpo"}, "selection.rule"),
        (OFFLINE | {"selection.rule": "metagradient", "loss.reduction": "sum"}, "loss.reduction"),
        (OFFLINE | {"selection.outer_steps": 0}, "selection.outer_steps"),
        (OFFLINE | {"selection.freeze": True}, "selection.freeze"),
        (OFFLINE | INIT | {"selection.rule": "uniform"}, "selection.rule=uniform"),
        (OFFLINE | INIT | {"selection.rule": "metagradient"}, "selection.rule=metagradient"),
        (MIXING | INIT, "method=mixing"),
        (MIXING | {"selection.freeze": True}, "selection.freeze"),
        (OFFLINE | INIT | FEATURES, "selection.parameterization=features"),
        (OFFLINE | INIT | DOMAIN, "selection.unit=domain"),
        (OFFLINE | INIT | TOKEN | {"selection.freeze": True}, "selection.unit"),
        (OFFLINE | INIT | TRACKED | {"selection.freeze": True}, "selection.freeze=True"),
        ({"method": "dynamic", "selection.rule": "uniform"}, "selection.rule=uniform"),
    ],
)
def test_refuses(changes, named):
    with pytest.raises(ConfigError, match=rf"^[^\n]*{re.escape(named)}\b[^\n]*$"):
        checks.build(with_changes(changes))


def test_names_a_missing_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="log.wandb='mine' needs the package wandb"):
        checks.build(with_changes({"log.wandb": "mine"}))


@pytest.mark.parametrize("section", ["", "selection"])
def test_names_a_missing_key(section):
    config = configuration.default()
    with config.unlocked():
        del (config[section] if section else config)["tau" if section else "seed"]
    with pytest.raises(ConfigError, match="selection.tau is missing" if section else "seed is missing"):
        checks.build(config)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer.learning_rate": 1},  # an int where a float is expected
        MIXING | {"mixing.rho": 0.0},
        MIXING | {"mixing.rho": 1.0},
        MIXING | {"num_epochs": 50},  # mixing has no schedule of ρ
        MIXING | {"mixing.rho": 0.9, "loss.upper": "dpo"},
        OFFLINE | {"num_epochs": 9},  # the last epoch has ρ = 0.9
        OFFLINE | {"loss.upper": "dpo", "loss.lower": "ipo", "online.response_weight": "softmax"},
        OFFLINE | {"online.objective": "dpo"},  # unused with this method
        DPO,
        DPO | {"loss.lower": "dpo"},
        DPO | {"online.objective": "reinforce", "loss.upper": "ipo"},
        {"method": "dynamic", "online.reward": "likelihood"},  # the reward is only measured
        OFFLINE | {"penalty.rho_init": 0.0},
        OFFLINE | {"mixing.rho": 7.0},  # unused with this method
        {"method": "mixing", "selection.unit": "token", "lora.dropout": 0.1},  # the same
        {"method": "dynamic", "online.ratio": 0.0, "online.temperature": 0.0, "online.clip": 1.0},
        {"method": "online", "online.ratio": 1, "online.response_weight": "softmax", "online.generate": "all", "online.slots": 1},
        OFFLINE | FEATURES,
        OFFLINE | INIT | TOKEN,
        INIT | {"method": "dynamic", "selection.freeze": True},
        {"data.num_upper": 0, "eval.num_upper": 0, "eval.num_lower": 0, "eval.keep": 1.0, "checkpoint.every": 0},
    ],
)
def test_accepts(changes):
    checks.build(with_changes(changes))


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, [0.1, 0.2, 0.3]),  # as in the paper
        ({"penalty.rho_init": 0.5, "penalty.rho_step": -0.1}, [0.5, 0.4, 0.3]),
        ({"method": "dynamic"}, [0.1, 0.2, 0.3]),
        (MIXING | {"mixing.rho": 0.7}, [0.7, 0.7, 0.7]),
    ],
)
def test_rho(changes, expected):
    config = with_changes(changes)
    assert [configuration.rho(config, epoch) for epoch in range(3)] == pytest.approx(expected)


@pytest.mark.parametrize(
    "changes, expected",
    [
        (OFFLINE | {"penalty.rho_init": 0.0}, {"upper", "lower"}),
        (MIXING | {"mixing.rho": 0.0}, {"upper"}),
        (MIXING | {"mixing.rho": 0.5}, {"upper", "lower"}),
        (MIXING | {"mixing.rho": 1.0}, {"lower"}),
    ],
)
def test_levels(changes, expected):
    assert set(configuration.used_levels(with_changes(changes))) == expected


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, 2),
        (OFFLINE | {"online.num_samples": 5}, 2),
        ({"method": "online", "online.num_samples": 5}, 6),
        ({"method": "online", "loss.upper": "dpo", "online.num_samples": 5}, 7),
        (DPO | {"online.num_samples": 5}, 3),
        (DPO | {"online.num_samples": 5, "online.objective": "best_of"}, 2),
        (DPO | {"online.num_samples": 5, "online.objective": "rwr", "loss.upper": "ipo"}, 7),
        (OFFLINE | {"loss.upper": "ipo", "loss.lower": "dpo"}, 4),
    ],
)
def test_entries_per_row(changes, expected):
    assert configuration.entries_per_row(with_changes(changes)) == expected


@pytest.mark.parametrize("tier", presets.TIERS)
@pytest.mark.parametrize("task, method", [(safety, "dynamic"), (quality, "online"), (preferences, "offline")])
def test_config_files(task, method, tier):
    config = task.get_config(tier)
    checks.build(config)
    assert config.method == method
    config.online.reward = "likelihood"
    for other in configuration.METHODS:  # as with --config.method
        config.method = other
        checks.build(config)


@pytest.mark.parametrize("tier", finetune.TIERS)
def test_finetune(tier):
    """It names no rows and no model; apart from these it runs."""
    config = finetune.get_config(tier)
    with pytest.raises(ConfigError, match="data.upper is empty"):
        checks.build(config)
    config.data.upper, config.data.lower = "trusted.jsonl", "mixture.jsonl"
    if not tier:
        with pytest.raises(ConfigError, match="model.path is empty; name a model directory or a hub id"):
            checks.build(config)
        config.model.path = "org/model"
        assert config.data.max_length == 1024 and config.model.dtype == "auto"
    typed = checks.build(config)
    assert typed.method == "offline" and typed.eval.num_upper == typed.eval.num_lower == 0.1
    assert typed.data.num_upper == typed.data.num_lower == 0


def test_every_config_file_is_tested():
    files = {file.stem for file in pathlib.Path(safety.__file__).parent.glob("*.py")}
    assert files - {"__init__"} == {"safety", "quality", "preferences", "finetune"}


@pytest.mark.parametrize("task", [safety, quality, finetune])
def test_unknown_tier(task):
    with pytest.raises(ValueError, match="no tier 'pythia'; leave it out or choose (smollm2, pythia-1b|tiny)"):
        task.get_config("pythia")


# Appendix F of the paper.
PAPER = {
    "num_epochs": 3,
    "penalty.rho_init": 0.1,
    "penalty.rho_step": 0.1,
    "lora.rank": 16,
    "lora.alpha": 16.0,
    "optimizer.name": "adam",
    "optimizer.learning_rate": 5e-6,
    "selection.optimizer": "adam",
    "selection.learning_rate": 1e-4,
    "selection.rule": "bds",
    "selection.value_function": "zero",
    "selection.baseline": "none",
    "batch.size": 32,
    "data.max_length": 2048,
    "online.num_samples": 1,
    "online.refresh_every": 500,
    "online.max_new_tokens": 512,
    "online.temperature": 0.8,
    "online.response_weight": "sequence",
}
SLOTS = {"safety": 16, "quality": 64}  # batch of generation
DATA = {"safety": ("recipe:blueorca", "recipe:redorca"), "quality": ("Open-Orca/OpenOrca", "yahma/alpaca-cleaned")}


@pytest.mark.parametrize("tier, model, num_lower", [("pythia-1b", "pythia-1b", 9600), ("llama3-8b", "Llama-3-8B", 56000)])
@pytest.mark.parametrize("task", [safety, quality])
def test_paper_settings(task, tier, model, num_lower):
    config = task.get_config(tier)
    upper, lower = DATA[task.__name__.split(".")[-1]]
    expected = PAPER | {"data.num_lower": num_lower, "data.upper": upper, "data.lower": lower}
    expected["online.slots"] = SLOTS[task.__name__.split(".")[-1]]
    assert config.online.ratio in (0.05, 0.1, 0.2)
    flat = {f"{section}.{key}": value for section in config for key, value in _items(config[section])}
    flat["num_epochs"] = config.num_epochs
    assert {key: flat[key] for key in expected} == expected
    assert model in config.model.path


def _items(section):
    return section.items() if isinstance(section, ml_collections.ConfigDict) else ()

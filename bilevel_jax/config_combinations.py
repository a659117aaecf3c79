"""Combinations of values of a config that cannot run, or in which one would have no effect."""

from bilevel_jax import config as configuration
from bilevel_jax.config import Config, require
from bilevel_jax.models import lora


def check(config: Config) -> None:
    """Refuses combinations of values, each of which is allowed alone.

    Raises:
      ConfigError: one line that names the key.
    """
    _check_given_weights(config)
    _check_learned(config)
    _check_layers(config)
    if config.method == "mixing":
        _check_mixing(config)
        return
    if config.method in configuration.ONLINE:
        _check_responses(config)
    _check_schedule(config)
    _check_selection(config)


def _check_learned(config: Config) -> None:
    """Refuses options of adapters and evaluations that would have no effect, or a wrong one."""
    section, e = config.lora, config.eval
    if not section.rank:
        of_adapters = {
            "lora.init": bool(section.init),
            "lora.layers": section.layers != "all",
            "lora.targets": section.targets != configuration.Lora().targets,
            "lora.dropout": section.dropout > 0,
            "lora.rslora": section.rslora,
        }
        for key, is_set in of_adapters.items():
            require(not is_set, f"{key} is an option of adapters: with lora.rank=0 there is none; take lora.rank=16")
        kind = config.model.quantization
        require(kind == "none", f"model.quantization={kind} freezes the weights that lora.rank=0 learns; take lora.rank=16 or none")
    for setting, disturbs in (
        (f"method={config.method}, which compares the policy with itself when it answered", config.method in configuration.ONLINE),
        ("selection.rule=metagradient, which repeats every step", configuration.searches(config)),
        ("selection.unit=token, whose weights follow each token's loss", configuration.has_token_weights(config)),
    ):
        require(not (section.dropout and disturbs), f"lora.dropout={section.dropout:g} disturbs {setting}; take lora.dropout=0")
    for key, needs_rows in (("eval.keep_best", e.keep_best), ("eval.patience", e.patience)):
        require(not needs_rows or e.num_upper > 0, f"{key} needs held-out trusted rows: eval.num_upper=0 holds none out")


def _check_layers(config: Config) -> None:
    """Refuses adapted layers that no model has, and a cache without frozen layers."""
    layers, cache = config.lora.layers, config.model.cache_frozen
    require(lora.is_layers(layers), f"lora.layers={layers!r:.200} is not all or last:K, the last K layers, such as last:8")
    require(
        layers != "all" or cache == "off",
        f"model.cache_frozen={cache} keeps what layers without an adapter compute: lora.layers=all has none; take last:K or off",
    )
    require(
        layers == "all" or not configuration.searches(config),
        f"selection.rule=metagradient differentiates whole runs of all layers: lora.layers={layers} must be all",
    )


def _check_mixing(config: Config) -> None:
    require(0 <= config.mixing.rho <= 1, f"mixing.rho={config.mixing.rho} must be in [0, 1]")
    for level, loss, unused_at in (("upper", config.loss.upper, 1), ("lower", config.loss.lower, 0)):
        require(
            loss == "sft" or config.mixing.rho != unused_at,
            f"loss.{level}={loss} has no part in mixing.rho={unused_at}, which never uses the {level} level",
        )


def _check_responses(config: Config) -> None:
    """Refuses objectives of generated responses from which nothing could be learned."""
    o, lower = config.online, config.loss.lower
    objective_is = f"online.objective={o.objective}"
    require(
        lower == "sft" or o.objective == lower,
        f"{objective_is} beside loss.lower={lower}: a loss of pairs compares with no other; take online.objective={lower}",
    )
    if o.objective == "sft":
        return
    require(bool(o.reward), f"{objective_is} compares responses by online.reward, which is empty; name one")
    require(o.num_samples > 1, f"{objective_is} compares responses: online.num_samples={o.num_samples} must be at least 2")
    require(
        o.temperature > 0,
        f"{objective_is} compares responses, and online.temperature=0 gives {o.num_samples} equal ones; take a temperature above 0",
    )
    require(
        o.response_weight != "softmax",
        f"online.response_weight=softmax compares responses, as {objective_is} does already; take sequence, geometric or none",
    )


def _check_schedule(config: Config) -> None:
    last = configuration.rho(config, config.num_epochs - 1)
    require(
        config.penalty.rho_init >= 0 and 0 <= last < 1,
        f"penalty: ρ goes from {config.penalty.rho_init:g} to {last:g} in {config.num_epochs} epochs, but γ = ρ/(1-ρ) needs "
        f"ρ in [0, 1); lower penalty.rho_step or num_epochs",
    )


def _check_given_weights(config: Config) -> None:
    """Refuses `selection.init` and `selection.freeze` where they would be ignored, or where another key says the opposite."""
    s = config.selection
    if s.freeze:
        require(bool(s.init), "selection.freeze=True keeps equal weights without selection.init; name one, or take rule=uniform")
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
        require(not is_set, f"selection.init={s.init!r} has no effect with {setting}, {words}")
    require(
        not s.freeze or s.unit in ("sample", "turn"), "selection.freeze=True keeps the weights of rows; take selection.unit=sample"
    )


def _check_selection(config: Config) -> None:
    s, built = config.selection, configuration.to_selector(config)
    if s.unit == "token":
        require(
            config.method == "offline",
            f"selection.unit=token weighs the tokens of given responses: method={config.method} must be offline",
        )
        rate = s.token_learning_rate
        require(rate > 0, f"selection.token_learning_rate={rate} must be positive")
    if s.unit == "turn":
        require(config.data.learn == "all", "selection.unit=turn weighs every answer of a conversation; take data.learn=all")
        is_sft = config.loss.lower == "sft"
        require(is_sft, f"selection.unit=turn weighs answers, not pairs: loss.lower={config.loss.lower} must be sft")
    require(
        built.baseline != "batch" or config.batch.size > 1,
        "selection.baseline=batch with batch.size=1 subtracts a row's cost from itself; take running or none",
    )
    require(
        built.rule != "metagradient" or config.loss.reduction == "mean",
        "selection.rule=metagradient takes the mean loss of a token as L0: loss.reduction=sum must be mean",
    )
    require(
        built.rule != "metagradient" or (config.method == "offline" and config.loss.upper == config.loss.lower == "sft"),
        "selection.rule=metagradient differentiates whole runs on given responses; take method=offline, loss.upper=loss.lower=sft",
    )
    require(
        built.frozen or s.cost == "loss" or s.coefficient_at == "next",
        f"selection.coefficient_at={s.coefficient_at} has no effect with selection.cost={s.cost}; take selection.cost=loss or next",
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
            require(not is_set, f"{setting} has no effect with {cause}, which never moves ω")
    require(
        config.method != "dynamic" or s.rule != "uniform",
        "method=dynamic masks the rows of the smallest weights: with selection.rule=uniform there are none; take method=online",
    )
    require(
        s.unit != "domain" or s.parameterization == "table",
        "selection.unit=domain takes the source of a row for its only feature; leave selection.parameterization=table",
    )

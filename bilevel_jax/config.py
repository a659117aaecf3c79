"""The configuration: its keys, their defaults, and what is refused before anything is compiled."""

import importlib.util
import math
import re

import ml_collections
import optax

from bilevel_jax import online, preferences, sampling, selector, step
from bilevel_jax.data import templates

ONLINE = ("online", "dynamic")
METHODS = ("mixing", "offline", *ONLINE)
OPTIMIZERS = ("adam", "adamw", "sgd")
DTYPES = ("float32", "bfloat16")
UNITS = ("sample", "domain", "token")


class ConfigError(ValueError):
    """A configuration that cannot run; the message is one line that names the key."""


def default() -> ml_collections.ConfigDict:
    """Every key there is. `configs/*.py` start from here."""

    def section(**values):
        return ml_collections.ConfigDict(values)

    return section(
        seed=0,  # of the data split, its order, the adapter's start; of generated data too
        method="offline",  # mixing: (1-ρ) L0 + ρ mean ℓ; offline: bilevel selection;
        # online, dynamic: the model answers masked questions itself, a fixed random set or those of the smallest weights
        num_epochs=3,  # passes over the lower level
        mixing=section(rho=0.5),  # constant ρ; 1 is fine-tuning on the lower level alone
        penalty=section(
            rho_init=0.1,  # ρ of the first epoch; γ = ρ/(1-ρ)
            rho_step=0.1,  # added after each epoch
        ),
        selection=section(
            unit="sample",  # what has a weight: sample (a row), domain (all rows of one source together: adam or sgd),
            # token (a row, and within it each token of the response: offline, bds)
            parameterization="table",  # table (a logit for every row), features (ω = f_φ of frozen features: adam or sgd)
            ridge=0.3,  # (parameterization=features) pull of φ to 0
            rule="bds",  # bds (10b), bmo (48), uniform (ω frozen: the control)
            optimizer="mirror",  # adam (the paper), sgd (10b as written), mirror (exponentiated gradient)
            learning_rate=1.0,  # of ω: mirror takes about 1, the paper's Adam 1e-4
            tau=1.0,  # of bmo
            token_learning_rate=0.1,  # of the two parameters that the weights of all tokens share (unit=token)
            baseline="running",  # subtracted from a row's loss: none, batch mean (noisy: B rows), running mean
            cost="loss",  # what counts against a row: loss (10b), unrolled (how its gradient turns θ from where L0 falls; at θ^k)
            value_function="zero",  # zero (v(ω) = 0), tracked (a second adapter follows the lower level)
            weight_scale="dataset",  # dataset: N·σ(ω), mean 1; literal: σ(ω)
            coefficient_at="next",  # a row's loss at θ^{k+1} (10c) or, cheaper, at θ^k (current)
        ),
        online=section(
            ratio=0.1,  # R, the masked share of the lower level
            num_samples=1,  # G, responses to a question
            refresh_every=500,  # K_gen, steps between refreshes
            max_new_tokens=512,  # of a response, EOS included; data.max_length holds it with its question
            temperature=0.8,
            response_weight="sequence",  # sequence (r as in eq. 8), geometric (per token), softmax (λ of Lemma 6), none
            clip=2.0,  # the most that a ratio counts
            generate="needed",  # needed: what is visited before the next refresh; all: every masked question, to look at
            slots=64,  # responses decoded side by side
            # what a masked question's G responses are learned by: sft (all of them alike, eq. 8); by their rewards: best_of, rwr
            # (reward-weighted regression), reinforce (leave-one-out baseline), dpo, ipo (the best against the worst)
            objective="sft",
            reward="",  # truth, likelihood, MODULE:CALLABLE, or the directory of a classification model; see `rewards`
            reward_temperature=1.0,  # β of rwr, in units of the reward
        ),
        loss=section(
            upper="sft",  # sft; dpo, ipo (need preference rows)
            lower="sft",  # the same, of the rows to select from
            beta=0.1,  # of dpo and ipo, in the objective of the model's own responses too
            reduction="mean",  # of a response's tokens: mean, sum (eq. 1); in ipo too, while dpo takes sums
        ),
        lora=section(
            rank=16,
            alpha=16.0,
            targets="all-linear",  # or names separated by commas: q_proj,v_proj
        ),
        optimizer=section(
            name="adam",
            learning_rate=5e-6,  # the paper's; small models take far more
        ),
        batch=section(
            size=32,  # rows of each level in a step
            micro_size=4,  # packed sequences that go through the model at once; memory grows with it, results do not change
        ),
        model=section(
            path="bilevel_jax/tiny",  # directory, hub id, or the model that comes with the package
            dtype="float32",  # of base weights, and of activations but on a CPU: float32, bfloat16
            remat=False,  # recompute whole layers, not just what is cheap, in the backward pass: a third more time, far less memory
        ),
        data=section(
            upper="synthetic:upper",  # trusted rows: file, hub id, recipe:NAME or synthetic:upper
            lower="synthetic:lower",  # the mixture to select from; synthetic:domains: some sources better than others;
            # synthetic:tokens: right rows with some bad words
            template="auto",  # the tokenizer's chat template, else human; chat, human, alpaca, none
            max_length=2048,  # tokens of question and response together; also the length of a packed sequence
            num_upper=0,  # a seeded random subset of this size; 0: all
            num_lower=0,
            bad_fraction=0.15,  # of synthetic:lower and synthetic:tokens
            label="bad",  # field that marks bad rows, for measurement only
            spans="bad_spans",  # field with the bad parts of a response, [[START, STOP], ...] in characters, for measurement only
            truth="truth",  # field with the right response, for measurement only
        ),
        eval=section(
            num_upper=200,  # rows held out, never trained on
            num_lower=200,
            keep=0.8,  # share of rows that counts as kept where the planted bad ones are counted
        ),
        checkpoint=section(
            every=100,  # steps; 0: only at the end of an epoch
            keep=2,
        ),
        mesh=section(  # devices, data · fsdp · tensor in all; a batch is split over data · fsdp
            data=0,  # 0: all that fsdp and tensor leave
            fsdp=1,  # split the base's weights, too, and gather them layer by layer
            tensor=1,  # split heads, feed-forward and vocabulary
            shard_selector=False,  # split ω, its optimizer and visits over all devices; they must divide the lower-level rows
        ),
        log=section(
            every=10,  # steps
            tensorboard=True,
            wandb="",  # project name; empty: off
            profile="",  # START:STOP, steps from 0, STOP left out: a jax.profiler trace of them in profile/; empty: off
        ),
    )


def build_selector(config) -> selector.Selector:
    """The selector of a run; frozen for direct mixing."""
    s = config.selection
    parameterization = "features" if s.unit == "domain" else s.parameterization
    ridge, rate = s.ridge if s.unit != "domain" else 0.0, s.token_learning_rate if s.unit == "token" else 0.0
    rule = s.rule, s.optimizer, s.learning_rate, s.tau, s.baseline, s.weight_scale
    chosen = selector.Selector(*rule, parameterization, ridge, rate)
    return chosen if config.method != "mixing" else selector.Selector(rule="uniform")


def build_optimizer(config) -> optax.GradientTransformation:
    """The optimizer of θ."""
    return getattr(optax, config.optimizer.name)(config.optimizer.learning_rate)


def build_objective(config) -> step.Objective:
    s, loss, o = config.selection, config.loss, config.online
    return step.Objective(
        upper=loss.upper,
        lower=loss.lower,
        own=o.objective if config.method in ONLINE else "sft",
        beta=loss.beta,
        reward_temperature=o.reward_temperature,
        reduction=loss.reduction,
        cost=s.cost if config.method != "mixing" else "loss",
        coefficient_at=s.coefficient_at,
        value_function=s.value_function if config.method != "mixing" else "zero",
        response_weight=o.response_weight,
        clip=o.clip,
    )


def entries_per_row(config) -> int:
    """The most responses that a row of the upper and one of the lower level bring into a step, together."""
    upper, lower = (2 if config.loss[level] in preferences.PAIRS else 1 for level in ("upper", "lower"))
    if config.method not in ONLINE:
        return upper + lower
    compared = {"best_of": 1} | dict.fromkeys(preferences.PAIRS, 2)
    return upper + max(lower, compared.get(config.online.objective, config.online.num_samples))


def rho(config, epoch: int) -> float:
    """ρ in `epoch`, counted from 0."""
    return config.mixing.rho if config.method == "mixing" else config.penalty.rho_init + epoch * config.penalty.rho_step


def profiled(config) -> tuple[int, int] | None:
    """The first step that is traced, and the one after the last; None if none is.

    Raises:
      ConfigError: log.profile is no such range.
    """
    if not config.log.profile:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", config.log.profile)
    if not found or int(found[1]) >= int(found[2]):
        raise ConfigError(f"log.profile={config.log.profile!r} must be START:STOP, steps counted from 0, START before STOP")
    return int(found[1]), int(found[2])


def levels(config) -> tuple[str, ...]:
    """The levels that a step looks at: both, but for direct mixing with all its weight on one."""
    if config.method == "mixing" and config.mixing.rho in (0, 1):
        return ("lower",) if config.mixing.rho else ("upper",)
    return "upper", "lower"


def check(config: ml_collections.ConfigDict) -> None:
    """Refuses unknown keys, wrong types, values out of range and combinations that mean nothing.

    Raises:
      ConfigError: one line that names the key.
    """
    _check_keys(config, default(), "")

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ConfigError(message)

    def one_of(key: str, value, allowed) -> None:
        require(value in allowed, f"{key}={value!r} is not among {', '.join(allowed)}")

    def at_least(minimum, **values) -> None:
        for key, value in values.items():
            key = key.replace("__", ".")
            require(value >= minimum, f"{key}={value} must be at least {minimum}")

    one_of("method", config.method, METHODS)
    one_of("optimizer.name", config.optimizer.name, OPTIMIZERS)
    one_of("model.dtype", config.model.dtype, DTYPES)
    one_of("selection.unit", config.selection.unit, UNITS)
    one_of("data.template", config.data.template, templates.TEMPLATES)
    at_least(1, num_epochs=config.num_epochs, lora__rank=config.lora.rank, log__every=config.log.every)
    at_least(1, batch__size=config.batch.size, batch__micro_size=config.batch.micro_size)
    at_least(1, checkpoint__keep=config.checkpoint.keep)
    at_least(2, data__max_length=config.data.max_length)
    at_least(0, seed=config.seed, checkpoint__every=config.checkpoint.every, mesh__data=config.mesh.data)
    at_least(1, mesh__fsdp=config.mesh.fsdp, mesh__tensor=config.mesh.tensor)
    at_least(0, data__num_upper=config.data.num_upper, data__num_lower=config.data.num_lower)
    at_least(0, eval__num_upper=config.eval.num_upper, eval__num_lower=config.eval.num_lower)
    at_least(1, online__num_samples=config.online.num_samples, online__refresh_every=config.online.refresh_every)
    at_least(1, online__max_new_tokens=config.online.max_new_tokens, online__slots=config.online.slots)
    one_of("online.generate", config.online.generate, online.GENERATE)
    require(0 <= config.online.ratio <= 1, f"online.ratio={config.online.ratio} must be in [0, 1]")
    require(config.seed < 2**32, f"seed={config.seed} must be below 2^32")
    for level in ("upper", "lower"):
        require(config.data[level].strip(), f"data.{level} is empty; name a file, a hub data set or a recipe")
    wandb = not config.log.wandb or importlib.util.find_spec("wandb")
    require(wandb, f"log.wandb={config.log.wandb!r} needs the package wandb: pip install 'bilevel_jax[wandb]'")
    profiled(config)
    require(config.optimizer.learning_rate > 0, f"optimizer.learning_rate={config.optimizer.learning_rate} must be positive")
    require(config.lora.alpha > 0, f"lora.alpha={config.lora.alpha} must be positive")
    require(0 <= config.data.bad_fraction < 1, f"data.bad_fraction={config.data.bad_fraction} must be in [0, 1)")
    require(0 < config.eval.keep <= 1, f"eval.keep={config.eval.keep} must be in (0, 1]")
    try:
        sampling.Settings(config.online.temperature)
    except ValueError as error:
        raise ConfigError(f"online.{error}") from error
    try:
        built = build_selector(config)
        step.check_tokens(build_objective(config), built)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    one_of("online.objective", config.online.objective, step.OWN_LOSSES)
    if config.method == "mixing":
        require(0 <= config.mixing.rho <= 1, f"mixing.rho={config.mixing.rho} must be in [0, 1]")
        for level, unseen in (("upper", 1), ("lower", 0)):
            loss = config.loss[level]
            require(
                loss == "sft" or config.mixing.rho != unseen,
                f"loss.{level}={loss} has no part in mixing.rho={unseen}, which never sees the {level} level",
            )
        return
    if config.method in ONLINE:
        _check_own(config, require)
    if config.selection.unit == "token":
        given = "selection.unit=token weighs the words of given responses"
        require(config.method == "offline", f"{given}: method={config.method} must be offline")
        rate = config.selection.token_learning_rate
        require(rate > 0, f"selection.token_learning_rate={rate} must be positive")
    last = rho(config, config.num_epochs - 1)
    require(
        config.penalty.rho_init >= 0 and 0 <= last < 1,
        f"penalty: ρ goes from {config.penalty.rho_init:g} to {last:g} in {config.num_epochs} epochs, but γ = ρ/(1-ρ) needs "
        f"ρ in [0, 1); lower penalty.rho_step or num_epochs",
    )
    require(
        built.baseline != "batch" or config.batch.size > 1,
        "selection.baseline=batch with batch.size=1 subtracts a row's loss from itself; take running or none",
    )
    require(
        built.rule != "uniform" or config.selection.value_function == "zero",
        "selection.value_function=tracked has no effect with selection.rule=uniform, which never moves ω",
    )
    require(
        built.rule != "uniform" or config.selection.cost == "loss",
        "selection.cost=unrolled has no effect with selection.rule=uniform, which never moves ω",
    )
    tied = "unit=domain" if config.selection.unit == "domain" else "parameterization=features"
    require(
        built.rule != "uniform" or built.parameterization == "table",
        f"selection.{tied} has no effect with selection.rule=uniform, which never moves ω",
    )
    require(
        config.selection.unit != "domain" or config.selection.parameterization == "table",
        "selection.unit=domain takes the source of a row for its only feature; leave selection.parameterization=table",
    )


def _check_own(config, require) -> None:
    """Refuses objectives of the model's own responses that nothing could be learned from."""
    o, lower = config.online, config.loss.lower
    objective = f"online.objective={o.objective}"
    require(
        lower == "sft" or o.objective == lower,
        f"{objective} beside loss.lower={lower}: a loss of pairs compares with no other; take online.objective={lower}",
    )
    if o.objective == "sft":
        return
    require(bool(o.reward), f"{objective} compares responses by online.reward, which is empty; name one")
    require(o.num_samples > 1, f"{objective} compares responses: online.num_samples={o.num_samples} must be at least 2")
    require(
        o.response_weight != "softmax",
        f"online.response_weight=softmax compares responses, as {objective} does already; take sequence, geometric or none",
    )


def check_fit(config, max_positions: int, parts: int) -> None:
    """Refuses lengths beyond the model's `max_positions`, and rows that the `parts` of mesh.data · mesh.fsdp do not divide.

    Raises:
      ConfigError: one line that names the key.
    """
    if config.data.max_length > max_positions:
        raise ConfigError(f"data.max_length={config.data.max_length} is over the model's {max_positions} positions")
    for key, number in (("batch.micro_size", config.batch.micro_size), ("online.slots", config.online.slots)):
        if number % parts:
            raise ConfigError(f"{key}={number} must be a multiple of mesh.data · mesh.fsdp, {parts} devices")


def check_rows(config, num_rows: int, devices: int) -> None:
    """Refuses lower-level rows that cannot be split over the `devices` where they are to be.

    Raises:
      ConfigError: one line that names the key and the number to take.
    """
    left = num_rows % devices
    if config.mesh.shard_selector and left:
        what = f"mesh.shard_selector=True: {devices} devices do not divide {num_rows} lower-level rows"
        raise ConfigError(f"{what}; hold out some more (eval.num_lower={config.eval.num_lower + left}), or leave ω whole")


def _check_keys(config, reference, prefix: str) -> None:
    for key in config:
        if key not in reference:
            known = ", ".join(reference)
            raise ConfigError(f"unknown key {prefix}{key}; {prefix.rstrip('.') or 'the config'} has {known}")
    for key, expected in reference.items():
        name = prefix + key
        if key not in config:
            raise ConfigError(f"{name} is missing")
        value = config[key]
        if isinstance(expected, ml_collections.ConfigDict):
            if not isinstance(value, ml_collections.ConfigDict):
                raise ConfigError(f"{name}={value!r} must be a section")
            _check_keys(value, expected, name + ".")
        elif isinstance(expected, float):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ConfigError(f"{name}={value!r} must be a finite number")
        elif type(value) is not type(expected):
            raise ConfigError(f"{name}={value!r} must be of type {type(expected).__name__}")

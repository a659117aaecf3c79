"""The configuration: every key with its type, default and meaning.

Users see an `ml_collections.ConfigDict` (`default`); `checks.build` turns it into a frozen `Config` once, and everything that runs
takes that. `to_selector`, `to_objective` and `to_optimizer` make what the update is compiled from.
"""

import dataclasses
import os
import re

import ml_collections
import optax

from bilevel_jax import objective, optimizer, preferences, selector
from bilevel_jax.data import shuffle

ONLINE = ("online", "dynamic")
METHODS = ("mixing", "offline", *ONLINE)
DTYPES = ("float32", "bfloat16", "auto")
UNITS = ("sample", "turn", "domain", "token")


class ConfigError(ValueError):
    """A configuration that cannot run; the message is one line that names the key."""


def require(condition: bool, message: str) -> None:
    """Raises `ConfigError(message)` where the condition does not hold."""
    if not condition:
        raise ConfigError(message)


# --------------------------------------------------------------------------------------------------------------------
# Keys
# --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Mixing:
    rho: float = 0.5  # constant ρ; 1 is fine-tuning on the lower level alone


@dataclasses.dataclass(frozen=True)
class Penalty:
    rho_init: float = 0.1  # ρ of the first epoch; γ = ρ/(1-ρ)
    rho_step: float = 0.1  # added after each epoch


@dataclasses.dataclass(frozen=True)
class Selection:
    # What has a weight: sample (a row), turn (each answer of a conversation), domain (all rows of one source together: adam or
    # sgd), token (a row, and within it each token of the response: method=offline, rule=bds, cost=loss, coefficient_at=next)
    unit: str = "sample"
    parameterization: str = "table"  # table (a logit for every row), features (ω = f_φ of frozen features: adam or sgd)
    ridge: float = 0.3  # (parameterization=features) pull of φ to 0
    # bds (bilevel data selection, 10b); bmo (bilevel multi-objective, 47 and 48); metagradient (the exact gradient through a
    # training run; adds about 4 runs per outer step, and 1 more; offline only); uniform (ω frozen, the control)
    rule: str = "bds"
    outer_steps: int = 1  # (rule=metagradient) training runs that are differentiated
    # Weights to start from, matched by row id: workdir of an earlier run, a table (.parquet, .jsonl) with id and weight, or
    # column:NAME, a field of the rows; rows without one get the mean. Empty: equal weights
    init: str = ""
    freeze: bool = False  # use the weights of selection.init, and never move them
    optimizer: str = "mirror"  # adam (the paper), sgd (10b as written), mirror (exponentiated gradient)
    learning_rate: float = 1.0  # of ω with bds and bmo: mirror takes 1 to 3, the paper's Adam 1e-4
    b1: float = 0.9  # (optimizer=adam) decay of the mean of gradients
    b2: float = 0.999  # (optimizer=adam) decay of the mean of their squares
    tau: float = 1.0  # (rule=bmo) τ of (48): how strongly the cost moves ω
    token_learning_rate: float = 0.1  # of the two parameters that the weights of all tokens share (unit=token)
    # Subtracted from a row's cost: none, batch (the mean of the B rows, noisy), running (that of earlier batches)
    baseline: str = "running"
    # What lowers a row's weight: influence (whether its gradient opposes that of the trusted rows, plus how unlikely its tokens
    # are, to the extent that unlikely rows do harm), loss (10b, the paper)
    cost: str = "influence"
    value_function: str = "zero"  # (cost=loss) zero (v(ω) = 0), tracked (a second adapter follows the lower level, 44)
    weight_scale: str = "dataset"  # dataset: N·σ(ω), mean 1; literal: σ(ω)
    coefficient_at: str = "next"  # (cost=loss) a row's loss at θ^{k+1} (10c) or, cheaper, at θ^k (current)
    # joint (θ moves with σ(ω^k), then ω does), paper (rule=bmo as printed: ω from the losses at θ^k first, then θ with σ(ω^{k+1});
    # needs cost=loss and coefficient_at=current, and takes a forward pass over the lower rows)
    order: str = "joint"


@dataclasses.dataclass(frozen=True)
class Online:
    ratio: float = 0.1  # R, the masked share of the lower level
    num_samples: int = 1  # G, responses to a question
    refresh_every: int = 500  # K_gen, steps between refreshes
    max_new_tokens: int = 512  # of a response, EOS included; data.max_length limits it together with its question
    temperature: float = 0.8  # divides the logits
    response_weight: str = "sequence"  # sequence (r as in eq. 8), geometric (per token), softmax (λ of Lemma 6), none
    clip: float = 2.0  # upper bound of an importance ratio
    generate: str = "needed"  # needed: what is visited before the next refresh; all: every masked question, for inspection
    # Of the lower level's loss: algorithm (one mean over all rows, Algorithm 1), eq7 (the mean over masked rows plus the mean over
    # the others: with R = 10% a masked row counts nine times as much as another one, and the lower level twice as much in all)
    normalization: str = "algorithm"
    slots: int = 64  # responses decoded side by side
    # How a masked question's G responses are learned: sft (all alike, eq. 8); by their rewards: best_of, rwr (reward-weighted
    # regression), reinforce (leave-one-out baseline), dpo, ipo (the best against the worst)
    objective: str = "sft"
    reward: str = ""  # truth, likelihood, MODULE:CALLABLE, or the directory of a classification model; see docs/preferences.md
    reward_temperature: float = 1.0  # β of rwr, in units of the reward


@dataclasses.dataclass(frozen=True)
class Loss:
    upper: str = "sft"  # sft; dpo, ipo (need preference rows)
    lower: str = "sft"  # the same, of the rows to select from
    beta: float = 0.1  # of dpo and ipo, also in online.objective
    reduction: str = "mean"  # over a response's tokens: mean, sum (eq. 1); also for ipo, while dpo always takes sums


@dataclasses.dataclass(frozen=True)
class Lora:
    rank: int = 16  # 0: no adapter, all weights of the model are learned
    alpha: float = 16.0  # the adapter's output is scaled by alpha/rank
    layers: str = "all"  # all; last:K, adapters in the last K layers: the backward pass ends there
    targets: str = "all-linear"  # or names separated by commas: q_proj,v_proj
    rslora: bool = False  # scale alpha/√rank in place of alpha/rank
    dropout: float = 0.0  # share of an adapter's inputs that are set to 0 in training
    init: str = ""  # directory of an adapter to start from, of the same rank, scale, targets and layers; empty: a new one


@dataclasses.dataclass(frozen=True)
class Optimizer:
    name: str = "adam"  # adam, adamw, sgd
    learning_rate: float = 5e-6  # the paper's; small models take far more
    schedule: str = "constant"  # after the warmup: constant, cosine or linear, both down to 0 at the end of the run
    warmup: float = 0.0  # steps in which the rate rises linearly to learning_rate; below 1: that share of all steps
    b1: float = 0.9  # (adam, adamw) decay of the mean of gradients
    b2: float = 0.999  # (adam, adamw) decay of the mean of their squares
    weight_decay: float = 0.0  # (adamw) decoupled weight decay
    clip_norm: float = 0.0  # largest norm of the joint gradient of both levels; 0: no clipping


@dataclasses.dataclass(frozen=True)
class Batch:
    size: int = 32  # rows of each level in a step
    micro_size: int = 4  # packed sequences per pass, half of it in passes over one level (cost="influence"); changes rounding only


@dataclasses.dataclass(frozen=True)
class Model:
    path: str = "bilevel_jax/tiny"  # directory, hub id, or the model that comes with the package
    # Of base weights, and of activations except on a CPU: float32, bfloat16, auto (bfloat16 on accelerators, float32 on a CPU)
    dtype: str = "float32"
    # Of the base's linear layers: none, nf4 (QLoRA: 4.1 bits a weight), int8. Embeddings, norms and head keep model.dtype
    quantization: str = "none"
    # Of packed sequences: xla, fused (one kernel, on a TPU or GPU: scores never leave the core), auto (fused on a TPU, where it
    # takes the model and data.max_length, else xla)
    attention: str = "auto"
    remat: bool = False  # recompute whole layers in the backward pass: a third more time, far less memory
    # (lora.layers=last:K) What the layers below compute of a row: off (at each visit), memory, disk (once, and kept in the host's
    # memory or in the workdir). The run has the same bits
    cache_frozen: str = "off"


@dataclasses.dataclass(frozen=True)
class Data:
    # Trusted rows: files, folders, globs and hub ids, several separated by commas; recipe:NAME; synthetic:upper, synthetic:trusted
    upper: str = "synthetic:upper"
    # The mixture to select from, likewise; synthetic:lower, synthetic:mixture; synthetic:domains: some sources better than others;
    # synthetic:tokens: right rows with bad words
    lower: str = "synthetic:lower"
    columns: str = ""  # other names of columns, for example question:query,response:answer
    deduplicate: str = "off"  # off (copies are counted), exact (of copies only the first is used), near (of similar rows)
    overlap: str = "warn"  # rows on both levels: warn, drop (from the lower level), refuse
    learn: str = "all"  # answers of a conversation that are learned: all, last; of preferences and generated responses the last one
    template: str = "auto"  # auto (the tokenizer's chat template, else human), chat, human, alpaca, none
    max_length: int = 2048  # tokens of question and response together; also the length of a packed sequence
    # Where prepared rows and tokens are stored for the next start: a directory; auto (~/.cache/bilevel_jax/rows, for sources over
    # 4 MB); off (they are prepared in memory at every start)
    cache: str = "auto"
    num_upper: int = 0  # size of a seeded random subset; 0: all
    num_lower: int = 0  # the same, of the lower level
    bad_fraction: float = 0.15  # of synthetic:lower and synthetic:tokens
    label: str = "bad"  # field that marks bad rows, for measurement only
    spans: str = "bad_spans"  # field with the bad parts of a response, [[START, STOP], ...] in characters, for measurement only
    truth: str = "truth"  # field with the right response, for measurement only


@dataclasses.dataclass(frozen=True)
class Eval:
    num_upper: float = 200.0  # rows held out, never trained on; below 1: that share of the rows, at most 200
    num_lower: float = 200.0  # the same, of the lower level
    keep: float = 0.8  # the heaviest share of the rows counts as kept, in measures of kept bad rows
    every: int = 0  # steps between evaluations; 0: only at the end of an epoch
    keep_best: bool = False  # adapter/ is that of the lowest trusted loss, and not that of the last step
    similar: bool = True  # (selection) measures at the end how much each row is like the trusted ones, by half a forward pass
    patience: int = 0  # evaluations without a lower trusted loss after which the run ends; 0: it never ends early


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    every: int = 100  # steps between checkpoints; 0: only at the end of an epoch
    keep: int = 2  # number of newest checkpoints that are kept


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices: data · fsdp · tensor in all; a batch is split over data · fsdp."""

    data: int = 0  # 0: all that fsdp and tensor leave
    fsdp: int = 1  # also split the base's weights, and gather them layer by layer
    tensor: int = 1  # split heads, feed-forward and vocabulary
    shard_selector: bool = False  # split the selector's arrays over all devices, whose number must divide that of the lower rows


@dataclasses.dataclass(frozen=True)
class Log:
    every: int = 10  # steps between log lines
    tensorboard: bool = True  # write TensorBoard events to WORKDIR/tensorboard
    wandb: str = ""  # project name; empty: off
    profile: str = ""  # START:STOP, steps from 0, STOP excluded: a jax.profiler trace of them in profile/; empty: off


@dataclasses.dataclass(frozen=True)
class Config:
    """A run. Sections are in the order in which a user meets them."""

    seed: int = 0  # of the data split, the row order, the adapter's initial values and generated data
    # mixing: (1-ρ) L0 + ρ mean ℓ; offline: bilevel selection; online, dynamic: the model answers masked questions itself, a fixed
    # random set or those of the smallest weights
    method: str = "offline"
    num_epochs: int = 3  # passes over the lower level
    mixing: Mixing = Mixing()
    penalty: Penalty = Penalty()
    selection: Selection = Selection()
    online: Online = Online()
    loss: Loss = Loss()
    lora: Lora = Lora()
    optimizer: Optimizer = Optimizer()
    batch: Batch = Batch()
    model: Model = Model()
    data: Data = Data()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    mesh: Mesh = Mesh()
    log: Log = Log()


def default() -> ml_collections.ConfigDict:
    """Every key with its default, for `configs/*.py` to start from."""
    config = ml_collections.ConfigDict(dataclasses.asdict(Config()))
    config.data = DataSection(config.data)
    return config


class DataSection(ml_collections.ConfigDict):
    """The section `data`. It takes lists of sources and stores them as one text, separated by commas, as the command line does."""

    def __setitem__(self, key, value):
        if key in ("upper", "lower") and isinstance(value, (list, tuple)):
            names = [os.fspath(name) for name in value]
            with_comma = next((name for name in names if "," in name), None)
            if with_comma is not None:
                raise ConfigError(f"data.{key}: the name {with_comma!r} in a list has a comma; write ? in its place")
            value = ",".join(names)
        super().__setitem__(key, value)


# --------------------------------------------------------------------------------------------------------------------
# What follows from them
# --------------------------------------------------------------------------------------------------------------------


def to_selector(config: Config) -> selector.Selector:
    """The selector of a run; frozen for direct mixing."""
    if config.method == "mixing":
        return selector.Selector(rule="uniform")
    s = config.selection
    return selector.Selector(
        rule=s.rule,
        optimizer=s.optimizer,
        learning_rate=s.learning_rate,
        b1=s.b1,
        b2=s.b2,
        tau=s.tau,
        baseline=s.baseline,
        weight_scale=s.weight_scale,
        parameterization="features" if s.unit == "domain" else s.parameterization,
        ridge=s.ridge if s.unit != "domain" else 0.0,
        freeze=s.freeze,
        order=s.order,
        token_learning_rate=s.token_learning_rate if s.unit == "token" else 0.0,
    )


def to_optimizer(config: Config, num_steps: int, eps_root: float = 0.0) -> optax.GradientTransformation:
    """The optimizer of θ for a run of `num_steps` steps; `eps_root` is of Adam.

    Raises:
      ConfigError: the warmup is as long as the run.
    """
    try:
        return optimizer.make(dataclasses.replace(optimizer_settings(config), eps_root=eps_root), num_steps)
    except ValueError as error:
        raise ConfigError(f"optimizer.{error}") from error


def optimizer_settings(config: Config) -> optimizer.Settings:
    """The optimizer of θ, before the number of steps is known.

    Raises:
      ValueError: a value out of range; the message starts with its name.
    """
    return optimizer.Settings(**dataclasses.asdict(config.optimizer))


def to_objective(config: Config) -> objective.Objective:
    """The losses of both levels."""
    s, loss, o = config.selection, config.loss, config.online
    selects = config.method != "mixing"
    return objective.Objective(
        upper=loss.upper,
        lower=loss.lower,
        generated=o.objective if config.method in ONLINE else "sft",
        beta=loss.beta,
        reward_temperature=o.reward_temperature,
        reduction=loss.reduction,
        cost=s.cost if selects else "loss",
        coefficient_at=s.coefficient_at,
        value_function=s.value_function if selects else "zero",
        response_weight=o.response_weight if config.method in ONLINE else "none",
        clip=o.clip,
    )


def has_row_features(config: Config) -> bool:
    """Whether ω is a function of the frozen features of single rows, see `features`."""
    return config.method != "mixing" and config.selection.parameterization == "features" and config.selection.unit != "domain"


def has_token_weights(config: Config) -> bool:
    """Whether a weight is learned for each token."""
    return config.method != "mixing" and config.selection.unit == "token"


def searches(config: Config) -> bool:
    """Whether the run begins with a search for weights by metagradients."""
    return config.method != "mixing" and config.selection.rule == "metagradient"


def entries_per_row(config: Config) -> int:
    """The largest number of entries that one upper row and one lower row have in a step, together."""
    upper, lower = (2 if loss in preferences.PAIRS else 1 for loss in (config.loss.upper, config.loss.lower))
    if config.method not in ONLINE:
        return upper + lower
    compared = {"best_of": 1} | dict.fromkeys(preferences.PAIRS, 2)
    return upper + max(lower, compared.get(config.online.objective, config.online.num_samples))


def rho(config: Config, epoch: int) -> float:
    """ρ in `epoch`, counted from 0."""
    return config.mixing.rho if config.method == "mixing" else config.penalty.rho_init + epoch * config.penalty.rho_step


def profiled_steps(config: Config) -> tuple[int, int] | None:
    """The first traced step and the first one after it that is not traced; None without `log.profile`.

    Raises:
      ConfigError: log.profile is no such range.
    """
    if not config.log.profile:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", config.log.profile)
    if not match or int(match[1]) >= int(match[2]):
        raise ConfigError(f"log.profile={config.log.profile!r} must be START:STOP, steps counted from 0, START before STOP")
    return int(match[1]), int(match[2])


def num_steps(config: Config, num_rows: int) -> int:
    """Steps of a run with `num_rows` rows of the lower level."""
    return config.num_epochs * shuffle.steps_per_epoch(num_rows, config.batch.size)


def used_levels(config: Config) -> tuple[str, ...]:
    """The levels that a step uses: both, except in direct mixing with all its weight on one."""
    if config.method == "mixing" and config.mixing.rho in (0, 1):
        return ("lower",) if config.mixing.rho else ("upper",)
    return "upper", "lower"

"""The selector: one logit per lower-level row, its weight, and the rules by which the logits move.

Weights are w_i = N·σ_i(ω), mean 1. No rule builds anything larger than [N]: since ∇σ_i = σ_i (e_i - σ), the gradient of a batch
is one scatter and one rank-one term.

The logits are free parameters (`table`), or a linear function of frozen features of the rows, ω = X φ with X [N, A] (`features`).
By the chain rule the gradient of φ is Xᵀ times that of ω, whatever the rule: Σ_i x_i g_i, plus a ridge λφ. Every step then moves
the logits of all rows, visited or not, and φ scores rows that are in no table. That costs O(N·A) a step, about what one token costs
a model of N·A parameters. Where X only says which of A groups a row is in, it is given as group numbers, [N]; the rows of a group
then share one logit, and a step costs O(N).
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

ORDERS = ("joint", "paper")
RULES = ("bds", "bmo", "metagradient", "uniform")
OPTIMIZERS = ("adam", "sgd", "mirror")
BASELINES = ("none", "batch", "running")
WEIGHT_SCALES = ("dataset", "literal")
PARAMETERIZATIONS = ("table", "features")
RUNNING_DECAY = 0.9
PERCENTILES = {"weight_p01": 1.0, "weight_p10": 10.0, "weight_p50": 50.0, "weight_p90": 90.0, "weight_p99": 99.0}
WEIGHTS = "weights"  # in place of percentiles in a `summary` of many rows
MAX_SORTED = 1 << 16  # rows whose weights the devices sort


class SelectorState(NamedTuple):
    """The arrays of the selector, for N rows and A features."""

    logits: jax.Array  # [N] float32, ω; with features, X φ
    visits: jax.Array  # [N] float32, how often each row was in a batch; G responses of a row add 1/G each
    baseline: jax.Array  # [] float32, running mean of the cost; NaN before the first batch
    data_visits: jax.Array  # [N] float32, the visits at which the row had the response of the data
    surprise: jax.Array  # [N] float32, surprise of that response at the latest such visit, before the step; NaN: none
    harm: jax.Array  # [N] float32, sum of h over these visits, see `influence.costs`
    optimizer: optax.OptState  # of ω; with features, of φ
    feature_params: jax.Array | None = None  # [A] float32, φ


@dataclasses.dataclass(frozen=True)
class Selector:
    """How ω moves, see `update`.

    Attributes:
      rule: `bds`, eq. (10b); `bmo`, eqs. (47)-(48); `metagradient`, ω frozen where `search` put it before the first step;
        `uniform`, ω frozen at 0: the control.
      optimizer: `adam`; `sgd`, the equations as written; `mirror`, exponentiated gradient: only visited logits move, so it takes
        `parameterization="table"`.
      learning_rate: α.
      tau: τ of (48), per unit of the cost.
      baseline: subtracted from the cost: nothing, the `batch` mean, or the `running` mean of earlier batches. As Σ_i ∇σ_i = 0,
        a constant leaves the expected ω-gradient unchanged and lowers its variance. The batch mean adds noise of its own to the
        ranking of rows from different batches; the running mean averages it out.
      weight_scale: `dataset`: weights N·σ_i; `literal`: σ_i as the paper writes, which makes the lower level ~1/N of the loss.
      parameterization: `table`: each logit is free; `features`: ω = X φ, and the optimizer moves φ (or one logit per group).
      ridge: λ, the pull of φ to 0. With `bmo` ω is then a ridge regression of -τC on the features, however long it is trained;
        without a ridge it ends up repeating the costs of single rows.
      token_learning_rate: of the parameters shared by the weights of all tokens, see `token_weights`; 0: equal weights of tokens.
      freeze: ω stays where it is, whatever the rule.
      order: `joint`, θ moves with σ(ω^k), then ω; `paper`, of `bmo`: ω moves first, then θ with σ(ω^{k+1}), eqs. (46)-(48).
      b1, b2: decays of Adam's means. ω has a gradient at every step, so with a b2 near 1 rows drift long after their last visit.
    """

    rule: str = "bds"
    optimizer: str = "mirror"
    learning_rate: float = 1.0
    tau: float = 1.0
    baseline: str = "running"
    weight_scale: str = "dataset"
    parameterization: str = "table"
    ridge: float = 0.0
    token_learning_rate: float = 0.0
    freeze: bool = False
    order: str = "joint"
    b1: float = 0.9
    b2: float = 0.999

    def __post_init__(self):
        for name, allowed in (
            ("rule", RULES),
            ("optimizer", OPTIMIZERS),
            ("baseline", BASELINES),
            ("weight_scale", WEIGHT_SCALES),
            ("parameterization", PARAMETERIZATIONS),
            ("order", ORDERS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"selection.{name}={getattr(self, name)!r} is not among {', '.join(allowed)}")
        if not self.learning_rate > 0:
            raise ValueError(f"selection.learning_rate must be positive, got {self.learning_rate}")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"selection.{name}={getattr(self, name)} must be in [0, 1)")
        if not self.tau > 0:
            raise ValueError(f"selection.tau must be positive, got {self.tau}")
        if not self.ridge >= 0:
            raise ValueError(f"selection.ridge must not be negative, got {self.ridge}")
        if not self.token_learning_rate >= 0:
            raise ValueError(f"selection.token_learning_rate must not be negative, got {self.token_learning_rate}")
        if self.parameterization == "features" and self.optimizer == "mirror":
            raise ValueError(
                "selection.optimizer=mirror moves the logits of single rows, which selection.parameterization=features and "
                "selection.unit=domain tie together; take adam or sgd"
            )

    @property
    def frozen(self) -> bool:
        return self.freeze or self.rule in ("metagradient", "uniform")

    def scale(self, num_rows: int) -> float:
        """The factor of σ in the loss: N, or 1 for the paper's literal form."""
        return float(num_rows) if self.weight_scale == "dataset" else 1.0


def _optimizer(selector: Selector) -> optax.GradientTransformation:
    if selector.optimizer == "adam":
        return optax.adam(selector.learning_rate, selector.b1, selector.b2)
    return optax.sgd(selector.learning_rate)


def init(selector: Selector, num_rows: int, num_features: int = 0) -> SelectorState:
    """Equal weights for `num_rows` rows, none visited. `num_features`, A, matters only where ω is a function of features."""

    def rows(value: float) -> jax.Array:
        """An array of its own: a step that donates the state may not get a buffer twice."""
        return jnp.full(num_rows, value, jnp.float32)

    logits, feature_params = rows(0.0), None
    if selector.parameterization == "features":
        feature_params = jnp.zeros(num_features, jnp.float32)
    optimizer = _optimizer(selector).init(logits if feature_params is None else feature_params)
    return SelectorState(
        logits=logits,
        visits=rows(0.0),
        baseline=jnp.float32(jnp.nan),
        data_visits=rows(0.0),
        surprise=rows(jnp.nan),
        harm=rows(0.0),
        optimizer=optimizer,
        feature_params=feature_params,
    )


def probabilities(logits_N: jax.Array, row_index_E: jax.Array) -> jax.Array:
    """σ_i(ω) at the given rows, [E]; 0 for indices outside [0, N). One reduction over N, nothing else of that size."""
    log_normalizer = jax.nn.logsumexp(logits_N)
    logits_E = logits_N.at[row_index_E].get(mode="fill", fill_value=-jnp.inf, wrap_negative_indices=False)
    return jnp.exp(logits_E - log_normalizer)


# --------------------------------------------------------------------------------------------------------------------
# Moves of ω
# --------------------------------------------------------------------------------------------------------------------


def _center(selector: Selector, state: SelectorState, cost_E, share_E):
    """The cost minus its baseline, and the running mean after this batch."""
    batch_mean = jnp.sum(share_E * cost_E)
    first = jnp.isnan(state.baseline)
    running = jnp.where(first, batch_mean, RUNNING_DECAY * state.baseline + (1 - RUNNING_DECAY) * batch_mean)
    running = jnp.where(jnp.sum(share_E) > 0, running, state.baseline)  # a batch in which no row has a cost says nothing
    if selector.baseline == "none":
        return cost_E, running
    # The running mean is used as it stood before the batch: independent of it, hence without bias.
    before = jnp.where(first, batch_mean, state.baseline)
    return cost_E - (batch_mean if selector.baseline == "batch" else before), running


def penalty_gradient(logits_N, row_index_E, pull_E, sigma_E) -> jax.Array:
    """Σ_e pull_e ∇σ_{i_e}(ω) [N], with ∇σ_i = σ_i (e_i - σ): one scatter and one rank-one term.  (10b)

    Args:
      pull_E: γ · share · N · C of each entry; 0 for padding.
      sigma_E: σ at the entries' rows, from `probabilities`.
    """
    weighted_E = pull_E * sigma_E
    gradient = -jnp.sum(weighted_E) * jax.nn.softmax(logits_N)
    return gradient.at[row_index_E].add(weighted_E, mode="drop")


def entropy_residual(logits_N, row_index_E, cost_E, tau: float) -> jax.Array:
    """ω_{i_e} + τ C_e of each entry [E]: the gradient of (47) in a visited logit, and the direction of (48)."""
    return logits_N.at[row_index_E].get(mode="fill", fill_value=0.0) + tau * cost_E


def _apply_features(features, feature_params_A) -> jax.Array:
    """ω [N] = X φ."""
    return feature_params_A[features] if features.ndim == 1 else features @ feature_params_A


def _feature_gradient(features, gradient_N, num_features: int) -> jax.Array:
    """The gradient of φ [A], Xᵀ times that of ω."""
    if features.ndim == 1:
        return jax.ops.segment_sum(gradient_N, features, num_segments=num_features)
    return gradient_N @ features


def _optimizer_move(selector: Selector, state: SelectorState, gradient_N, features, ridge: jax.Array | float) -> SelectorState:
    """The optimizer's step on ω, or on φ with `ridge` times φ added to its gradient."""
    if features is None or state.feature_params is None:
        updates, optimizer = _optimizer(selector).update(gradient_N, state.optimizer)
        return state._replace(logits=optax.apply_updates(state.logits, updates), optimizer=optimizer)
    gradient_A = _feature_gradient(features, gradient_N, len(state.feature_params)) + ridge * state.feature_params
    updates, optimizer = _optimizer(selector).update(gradient_A, state.optimizer)
    feature_params = optax.apply_updates(state.feature_params, updates)
    logits = _apply_features(features, feature_params)
    return state._replace(logits=logits, feature_params=feature_params, optimizer=optimizer)


def record(state: SelectorState, row_index_E, part_E, surprise_E, harm_E) -> SelectorState:
    """Stores the surprises of the rows of a batch, and adds up their harm to the trusted rows.

    Args:
      row_index_E: [E] int32.
      part_E: [E], each entry's part of its row: 1, or 1/G. 0 for padding and for generated responses, which say nothing about those
        of the data.
      surprise_E: [E], nats.
      harm_E: [E], h in (-1, 1); 0 where influence is not measured.
    """
    of_data_E = jnp.where(part_E > 0, row_index_E, state.visits.shape[0])  # out of range: dropped

    def add(array_N, value_E):
        return array_N.at[of_data_E].add(part_E * value_E, mode="drop")

    emptied_N = state.surprise.at[of_data_E].set(0.0, mode="drop")  # a sum: a row may have several entries
    return state._replace(
        data_visits=add(state.data_visits, jnp.ones_like(part_E)),
        surprise=add(emptied_N, surprise_E),
        harm=add(state.harm, harm_E),
    )


def update(
    selector: Selector, state: SelectorState, row_index_E, share_E, num_costs, cost_E, gamma, features=None
) -> SelectorState:
    """One move of ω, or of φ.

    With C the cost, centred by the baseline, and B rows in the batch:

        bds, adam and sgd   g = γ · mean_b[ N ∇σ_{i_b} C_b ],   then the optimizer                                     (10b)
        bds, mirror         ω_{i_b} -= α γ C_b                          exponentiated gradient on the simplex
        bmo, sgd and mirror ω_{i_b} -= α (ω_{i_b} + τ C_b)              mirror descent with an entropy term            (48)
        bmo, adam           g_{i_b} = ω_{i_b} + τ C_b, then Adam                                                       (47)
        metagradient, uniform   ω stays

    Where ω is a function of features, φ follows Σ_i x_i g_i + λφ (bds), or + Bλφ (bmo, whose g is a sum over the batch).
    With `weight_scale="literal"` the bds moves are 1/N of these.

    Args:
      row_index_E: int32, the row of each entry; outside [0, N) for entries that are not of the lower level.
      share_E: each entry's weight in the batch mean: 1/B, or 1/(B·G) for one of G responses to a row; 0 for padding.
      num_costs: B, the lower-level rows of the batch that have a cost.
      cost_E: [E] float32, C of each entry: nats with `cost="loss"`, without a unit in (-2, 2) with `cost="influence"`. Entries of
        one row are averaged.
      gamma: γ of the penalty.
      features: X, [N, A] float32, or the group of each row, [N] int32.

    Returns:
      The state after the batch, its visits counted.
    """
    N = state.logits.shape[0]
    sigma_E = probabilities(state.logits, row_index_E)
    share_E = jnp.where((row_index_E >= 0) & (row_index_E < N), share_E, 0.0)
    cost_E, baseline = _center(selector, state, jnp.where(share_E > 0, cost_E, 0.0), share_E)
    part_E = share_E * num_costs  # of its row: 1, or 1/G
    state = state._replace(visits=state.visits.at[row_index_E].add(part_E, mode="drop"), baseline=baseline)
    if selector.frozen:
        return state

    if selector.rule == "bmo":
        move_E = part_E * entropy_residual(state.logits, row_index_E, cost_E, selector.tau)
    else:
        move_E = part_E * gamma * selector.scale(N) / N * cost_E
    if selector.optimizer == "mirror":
        logits = state.logits.at[row_index_E].add(-selector.learning_rate * move_E, mode="drop")
        return state._replace(logits=logits)
    if selector.rule == "bmo":  # (47) sums over the batch, so the ridge counts B times
        gradient_N = jnp.zeros(N).at[row_index_E].add(move_E, mode="drop")
        return _optimizer_move(selector, state, gradient_N, features, num_costs * selector.ridge)
    pull_E = gamma * selector.scale(N) * share_E * cost_E
    gradient_N = penalty_gradient(state.logits, row_index_E, pull_E, sigma_E)
    return _optimizer_move(selector, state, gradient_N, features, selector.ridge)


# --------------------------------------------------------------------------------------------------------------------
# Metrics
# --------------------------------------------------------------------------------------------------------------------


def effective_sample_size(probability_N):
    """ESS / N = 1 / (N Σ p²) of probabilities, in (0, 1]; 1 where all are equal. For NumPy and JAX arrays."""
    return 1.0 / (len(probability_N) * (probability_N**2).sum())


def summary(logits_N: jax.Array) -> dict[str, np.ndarray | jax.Array]:
    """ESS/N and percentiles of the weights w = N·σ(ω), for `numbers`. Does not wait for the devices."""
    return _sorted_summary(logits_N) if len(logits_N) <= MAX_SORTED else _unsorted_summary(logits_N)


def numbers(of_weights: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The numbers of a `summary` that was copied to the host."""
    values = {key: float(value) for key, value in of_weights.items() if key != WEIGHTS}
    if WEIGHTS in of_weights:
        percentiles = np.percentile(of_weights[WEIGHTS], list(PERCENTILES.values()))
        values |= dict(zip(PERCENTILES, map(float, percentiles)))
    return values


@jax.jit
def _sorted_summary(logits_N: jax.Array) -> dict[str, jax.Array]:
    values = _unsorted_summary(logits_N)
    levels = jnp.percentile(values.pop(WEIGHTS), jnp.array(list(PERCENTILES.values())))
    return {**values, **dict(zip(PERCENTILES, levels))}


@jax.jit
def _unsorted_summary(logits_N: jax.Array) -> dict[str, jax.Array]:
    """With the weights themselves in place of percentiles: XLA takes 0.3 s to sort a million on a CPU, NumPy 0.01 s."""
    sigma = jax.nn.softmax(logits_N)
    weights = logits_N.shape[0] * sigma
    return {
        "ess": effective_sample_size(sigma),
        "weight_min": weights.min(),
        "weight_max": weights.max(),
        WEIGHTS: weights,
    }

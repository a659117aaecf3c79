"""The joint update of θ and ω, the heart of the method: one pure function of `(base, state, batch, scales)`.

For an upper batch of B0 rows and a lower batch of B rows i_1 ... i_B, with w_i = N·σ_i(ω) and γ = ρ/(1-ρ):

    θ-loss = mean_b0 L0(θ) + γ · mean_b [ w_{i_b} · ℓ_b(θ) ]              (7), (10a); its gradient is what `optimizer` clips
    ω-grad = γ · mean_b [ N ∇σ_{i_b}(ω) · stop(C_b) ]                     (10b)
    ℓ_b    = (1/G) Σ_g stop(r^g) ℓ(θ; x, y^g)                              (8), (9), where the model answered question b itself
    C_b    = ℓ_b at θ^{k+1} ("next", (10c)) or at θ^k ("current"); the plain mean over g, without r^g

`make_step` composes one function per equation: `update_policy`, `update_tracker`, `update_token_params`, `influence_costs` or
`row_costs`, and `update_weights`. θ moves with σ(ω^k), then ω does; with `selector.order="paper"` ω moves first
(`weights_before_policy`). The losses that L0 and ℓ_b can be are in `objective`, and how much each entry counts in `shares`.

This is the gradient of the penalty, the rule of the paper. With `Objective.cost="influence"`, the default of the configuration, ω
follows the gradient of L0 itself: C_b is made of the row's influence on the trusted loss and of its surprise, (I1)-(I3) in
`influence`.

Direct mixing, the baseline, is the same θ-loss with the scales (1-ρ, ρ) and equal weights.

The factor of an entry is known before the forward pass or, as r^g, from its own micro-batch, and both responses of a pair are in
one micro-batch. So the micro-batches of a step add up exact parts of the full-batch gradient, for every split of the rows.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import forward, losses, preferences, token_weights
from bilevel_jax import influence as influences
from bilevel_jax import selector as selection
from bilevel_jax.data import packing
from bilevel_jax.models import model_config, probes
from bilevel_jax.objective import Objective, check_combination, entry_losses, entry_surprises, lower_losses
from bilevel_jax.shares import Shares, entry_shares, response_weights, token_weight_fn


class Learner(NamedTuple):
    """An adapter and the state of its optimizer."""

    adapter: dict
    optimizer: optax.OptState


class State(NamedTuple):
    step: jax.Array  # [] int32, optimizer steps taken
    policy: Learner  # θ
    selector: selection.SelectorState  # ω
    tracker: Learner | None  # θ' of `value_function="tracked"`
    token_params: jax.Array | None = None  # [2] float32, φ of `token_weights`; None where tokens have no weights
    influence: influences.InfluenceState | None = None  # None for other costs

    @property
    def num_rows(self) -> int:
        """N."""
        return self.selector.logits.shape[0]


class Scales(NamedTuple):
    """The factors of the two levels' means: (1, γ) for bilevel selection, (1-ρ, ρ) for direct mixing."""

    upper: jax.Array | float
    lower: jax.Array | float


def measures_influence(objective: Objective, selector: selection.Selector) -> bool:
    """Whether the costs of a step are influences, which have a state of their own."""
    return objective.cost == "influence" and not selector.frozen


def init(
    adapter,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    selector: selection.Selector,
    num_rows: int,
    num_features: int = 0,
) -> State:
    """The state before the first step, for `num_rows` lower-level rows. θ' starts as a copy of θ.

    Args:
      adapter: θ at its start.
      optimizer, objective, selector: those of `make_step`.
      num_rows: N.
      num_features: A, where ω is a function of features.
    """
    policy = Learner(adapter, optimizer.init(adapter))
    tracker = jax.tree.map(jnp.copy, policy) if objective.value_function == "tracked" else None
    token_params = jnp.zeros(len(token_weights.SCORES), jnp.float32) if selector.token_learning_rate else None
    influence_state = influences.init(adapter) if measures_influence(objective, selector) else None
    return State(jnp.int32(0), policy, selection.init(selector, num_rows, num_features), tracker, token_params, influence_state)


# --------------------------------------------------------------------------------------------------------------------
# What a step is made of
# --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Problem:
    """Everything about the update that is fixed when it is compiled."""

    model: model_config.ModelConfig
    objective: Objective
    selector: selection.Selector
    optimizer: optax.GradientTransformation
    seed: int = 0  # of the adapter's dropout

    def dropout_key(self, state: "State"):
        """The key of the dropout of a step; None without dropout."""
        return jax.random.fold_in(jax.random.key(self.seed), state.step) if self.model.adapter_dropout else None

    def check(self, state: "State") -> None:
        """Refuses a state that `init` made for other costs, whose arrays would decide which cost is taken."""
        wanted = self.objective.value_function == "tracked", measures_influence(self.objective, self.selector)
        if (state.tracker is not None, state.influence is not None) != wanted:
            raise ValueError("the state is of another objective or selector: make it by step.init with those of make_step")

    @property
    def costs_at_next(self) -> bool:
        o = self.objective
        return o.cost == "loss" and o.coefficient_at == "next" and not self.selector.frozen


def _gradient(loss_of_micro: Callable, adapter, num_micro, first=0):
    """Sums `loss_of_micro(adapter, m) -> (part of the loss, more parts)` and its gradient over micro-batches.

    The trip count is a number on the device, so every step costs only the micro-batches it holds and all share one compilation.

    Returns:
      (loss, more), gradient.
    """

    def body(m, carry):
        return jax.tree.map(jnp.add, carry, jax.value_and_grad(loss_of_micro, has_aux=True)(adapter, m))

    parts = jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), jax.eval_shape(loss_of_micro, adapter, 0))
    start = parts, jax.tree.map(jnp.zeros_like, adapter)
    return jax.lax.fori_loop(first, num_micro, body, start)


def _descend(optimizer: optax.GradientTransformation, learner: Learner, gradient) -> Learner:
    updates, state = optimizer.update(gradient, learner.optimizer, learner.adapter)
    return Learner(optax.apply_updates(learner.adapter, updates), state)


# --------------------------------------------------------------------------------------------------------------------
# θ
# --------------------------------------------------------------------------------------------------------------------


class Slopes(NamedTuple):
    """What the backward pass of the lower level measured."""

    upper_mean: dict  # m, the running mean of ∇L0, with this batch
    lower_pxE: jax.Array  # derivative of the lower level's loss along D m, the parts of each projection and each entry


class PolicyUpdate(NamedTuple):
    """θ^{k+1} and what its update computed at θ^k."""

    policy: Learner  # θ^{k+1}
    loss: jax.Array  # []
    upper_loss: jax.Array  # [], L0
    nll_E: jax.Array  # summed NLL of each response, nats
    power_E: jax.Array  # the sum of its tokens' NLLs to the power of `losses.POWER`
    response_weight_E: jax.Array  # r^g
    gradient: dict  # of the θ-loss
    slopes: Slopes | None  # where the cost needs them


def _level_by_level(
    problem: Problem,
    loss_of: Callable,
    influence_state: influences.InfluenceState,
    state: State,
    batch: packing.Batch,
    scales: Scales,
):
    """The θ-loss and its gradient by one pass over each level: the second one measures slopes along D m, which the first one gives.

    Args:
      loss_of: `(scales, probe) -> loss_of_micro` for `_gradient`.
      influence_state: that of `state`.

    Returns:
      (loss, (upper loss, NLL, power)), gradient, slopes.
    """
    policy, first, end = state.policy, batch.first_upper_micro, batch.packed.num_micro
    (_, (upper, upper_nll_E, _)), upper_gradient = _gradient(loss_of(Scales(1.0, 0.0)), policy.adapter, end, first)
    # The gradient of the step is not known yet. D is that of a step with ∇L0 alone.
    optimizer_state = _descend(problem.optimizer, policy, upper_gradient).optimizer
    mean, direction = influences.direction(influence_state, upper_gradient, optimizer_state)
    directions = probes.along(direction)

    def lower_of_micro(variables, m):
        adapter, values = variables
        return loss_of(Scales(0.0, 1.0), forward.Probe(directions, values))(adapter, m)

    variables = policy.adapter, probes.zeros(directions, len(upper_nll_E))
    (lower, (_, nll_E, power_E)), (lower_gradient, slopes) = _gradient(lower_of_micro, variables, batch.num_lower_micro)
    loss = scales.upper * upper + scales.lower * lower
    gradient = jax.tree.map(lambda up, low: scales.upper * up + scales.lower * low, upper_gradient, lower_gradient)
    nll_E = jnp.where(batch.row_index < state.num_rows, nll_E, upper_nll_E)
    return (loss, (upper, nll_E, power_E)), gradient, Slopes(mean, jnp.concatenate(jax.tree.leaves(slopes)))


def update_policy(problem: Problem, base, state: State, batch: packing.Batch, shares: Shares, scales: Scales) -> PolicyUpdate:
    """One optimizer step on the θ-loss.  (7)-(9), (10a)

        a L0(θ) + b mean_b [ w_b (1/G) Σ_g stop(r^g) ℓ(θ; x, y^g) ],   (a, b) = `scales`

    Args:
      base: the frozen weights of the model.
      state: before the step.
      batch: packed micro-batches with E entries.
      shares: of the entries, with their weights w.
      scales: factors of the two levels.

    Returns:
      θ^{k+1}, with losses in nats at θ^k.
    """
    model, objective, packed = problem.model, problem.objective, batch.packed
    adapter = state.policy.adapter
    weigh, key = token_weight_fn(state.token_params, batch, state.num_rows), problem.dropout_key(state)
    fixed_E = None
    if objective.response_weight == "softmax" and objective.generated not in preferences.PAIRS:
        # λ compares responses that may lie in different micro-batches, so it takes a pass of its own.
        fixed_E = response_weights(objective, batch, forward.entry_nll(model, base, adapter, packed, batch.num_lower_micro))

    def loss_of(scales: Scales, probe: forward.Probe | None = None):
        def loss_of_micro(adapter, m):
            nll_E, power_E = forward.micro_nll_and_power(model, base, adapter, packed, m, weigh, key, probe)
            upper = jnp.sum(shares.upper * entry_losses(objective.upper, objective, batch, nll_E, m))
            response_E = jax.lax.stop_gradient(response_weights(objective, batch, nll_E)) if fixed_E is None else fixed_E
            lower = jnp.sum(shares.lower * shares.weight * response_E * lower_losses(objective, batch, nll_E, m))
            return scales.upper * upper + scales.lower * lower, (upper, nll_E, power_E)

        return loss_of_micro

    slopes = None
    if state.influence is not None:
        parts, gradient, slopes = _level_by_level(problem, loss_of, state.influence, state, batch, scales)
    else:  # both levels in one pass
        parts, gradient = _gradient(loss_of(scales), adapter, packed.num_micro)
    loss, (upper, nll_E, power_E) = parts
    policy = _descend(problem.optimizer, state.policy, gradient)
    response_E = response_weights(objective, batch, nll_E) if fixed_E is None else fixed_E
    return PolicyUpdate(policy, loss, upper, nll_E, power_E, response_E, gradient, slopes)


def update_tracker(
    problem: Problem, base, tracker: Learner, batch: packing.Batch, shares: Shares, response_weight_E, key
) -> tuple[Learner, jax.Array]:
    """One optimizer step of θ' on the weighted lower level alone.  (44)

    Returns:
      θ'^{k+1}, and the NLL [E] at θ'^k.
    """

    def loss_of_micro(adapter, m):
        nll_E = forward.micro_nll(problem.model, base, adapter, batch.packed, m, key=key)
        loss_E = lower_losses(problem.objective, batch, nll_E, m)
        lower = jnp.sum(shares.lower * shares.weight * response_weight_E * loss_E)
        return lower, nll_E

    (_, nll_E), gradient = _gradient(loss_of_micro, tracker.adapter, batch.num_lower_micro)
    return _descend(problem.optimizer, tracker, gradient), nll_E


def update_token_params(
    problem: Problem, base, policy: Learner, state: State, batch: packing.Batch, shares: Shares, scales: Scales
) -> tuple[jax.Array, jax.Array]:
    """One gradient step of φ on the penalty at θ^{k+1}, see `token_weights`.

    The derivative is forward-mode: φ has two entries, and the model's own forward pass does not depend on it.

    Returns:
      φ^{k+1}, and the weighted NLL [E] at φ^k.
    """

    def weighted_nll(token_params):
        weigh = token_weight_fn(token_params, batch, state.num_rows)
        nll_E = forward.entry_nll(problem.model, base, policy.adapter, batch.packed, batch.num_lower_micro, weigh)
        return nll_E, nll_E

    gradient_Ex2, nll_E = jax.jacfwd(weighted_nll, has_aux=True)(state.token_params)
    gradient_Ex2 = losses.row_losses(gradient_Ex2, batch.packed.length[:, None], problem.objective.reduction)
    rate, token_params = problem.selector.token_learning_rate, jnp.asarray(state.token_params)
    return token_params - rate * scales.lower * (shares.lower * shares.weight) @ gradient_Ex2, nll_E


# --------------------------------------------------------------------------------------------------------------------
# Costs
# --------------------------------------------------------------------------------------------------------------------


def influence_costs(
    objective: Objective,
    state: influences.InfluenceState,
    slopes: Slopes,
    update: PolicyUpdate,
    surprise_E,
    batch: packing.Batch,
    shares: Shares,
) -> tuple[influences.InfluenceState, jax.Array, jax.Array]:
    """What `influence.costs` returns.  (I1)-(I3)

    The measured slope of an entry is that of the lower level's loss. Over the derivative of that loss in the entry's NLL it is the
    slope of the NLL, from which that of ℓ follows by the chain rule. An entry that has no part in the loss, such as one with
    r = 0, has no influence.

    Args:
      state: before the step.
      slopes, update: of θ^k.
      surprise_E: [E], s at θ^k, nats.
    """

    def lower(nll_E):
        factor_E = shares.lower * shares.weight * update.response_weight_E
        return jnp.sum(factor_E * lower_losses(objective, batch, nll_E))

    factor_E = jax.grad(lower)(update.nll_E)
    has_part_E = factor_E != 0
    nll_slope_pxE = jnp.where(has_part_E, slopes.lower_pxE / jnp.where(has_part_E, factor_E, 1.0), 0.0)
    _, slopes_of = jax.linearize(lambda nll_E: entry_losses(objective.lower, objective, batch, nll_E), update.nll_E)
    influence_E = influences.votes(jax.vmap(slopes_of)(nll_slope_pxE))
    return influences.costs(state, slopes.upper_mean, influence_E, surprise_E, shares.cost)


def row_costs(problem: Problem, base, update: PolicyUpdate, tracker, tracker_nll_E, batch: packing.Batch, nll_E) -> jax.Array:
    """C_b of each entry [E].  (10c); with a tracker (44)

    At `next` it takes one more forward pass over the micro-batches of the lower level.

    Args:
      update: of θ, with the NLL at θ^k.
      tracker: θ'^{k+1} or None, with the NLL at θ'^k.
      nll_E: the NLL at θ^{k+1} where it is known, or None.
    """
    model, objective = problem.model, problem.objective

    def lower_nll(adapter):
        return forward.entry_nll(model, base, adapter, batch.packed, batch.num_lower_micro)

    def losses_of(nll_E):
        return entry_losses(objective.lower, objective, batch, nll_E)

    if nll_E is None:
        nll_E = lower_nll(update.policy.adapter) if problem.costs_at_next else update.nll_E
    cost_E = losses_of(nll_E)
    if tracker is not None:
        cost_E = cost_E - losses_of(lower_nll(tracker.adapter) if problem.costs_at_next else tracker_nll_E)
    return cost_E


# --------------------------------------------------------------------------------------------------------------------
# ω
# --------------------------------------------------------------------------------------------------------------------


def update_weights(
    problem: Problem, state: selection.SelectorState, batch: packing.Batch, shares: Shares, cost_E, scales: Scales, features
) -> selection.SelectorState:
    """One move of ω by the costs of a batch.  (10b), (48)"""
    selector = problem.selector
    if batch.row_factor is not None and selector.rule == "bds":  # the gradient of (7); the targets of (47) have no factor
        cost_E = cost_E * batch.row_factor
    return selection.update(selector, state, batch.row_index, shares.cost, shares.num_costs, cost_E, scales.lower, features)


def weights_before_policy(
    problem: Problem, base, state: State, batch: packing.Batch, shares: Shares, scales: Scales, features
) -> selection.SelectorState:
    """ω^{k+1} from the losses at θ^k, before θ moves with σ(ω^{k+1}): the order of (46)-(48)."""
    nll_E = forward.entry_nll(problem.model, base, state.policy.adapter, batch.packed, batch.num_lower_micro)
    cost_E = entry_losses(problem.objective.lower, problem.objective, batch, nll_E)
    return update_weights(problem, state.selector, batch, shares, cost_E, scales, features)


# --------------------------------------------------------------------------------------------------------------------
# The step
# --------------------------------------------------------------------------------------------------------------------


def make_step(
    config: model_config.ModelConfig,
    objective: Objective,
    selector: selection.Selector,
    optimizer: optax.GradientTransformation,
    seed: int = 0,
) -> Callable:
    """Builds `step(base, state, batch, scales, features=None) -> (state, metrics)`, pure and ready for
    `jax.jit(step, donate_argnums=1)`.

    `features` are those of the rows where ω is a function of them, see `selector.update`. For `metrics` see `_metrics`.

    Args:
      config: shape of the model.
      objective: losses of both levels.
      selector: rule and optimizer of ω.
      optimizer: of θ and θ'.
      seed: of the adapter's dropout.

    Returns:
      `step`. `base`: the frozen weights of the model, see `models.decoder`. `state`: donated. `batch`: E entries, whose `row_index`
      is N for upper rows and padding. `features`: [N, A] float32 or [N] int32.

    Raises:
      ValueError: options that do not go together, see `objective.check_combination`; by `step`, a state that is of others.
    """
    check_combination(objective, selector)
    problem = Problem(config, objective, selector, optimizer, seed)

    def step(base, state: State, batch: packing.Batch, scales: Scales, features=None):
        problem.check(state)
        shares = entry_shares(objective, selector, state.selector, batch)
        weights_first = selector.order == "paper"
        if weights_first:
            state = state._replace(selector=weights_before_policy(problem, base, state, batch, shares, scales, features))
            shares = entry_shares(objective, selector, state.selector, batch)
        update = update_policy(problem, base, state, batch, shares, scales)
        tracker, tracker_nll_E = state.tracker, None
        if tracker is not None:
            key = problem.dropout_key(state)
            tracker, tracker_nll_E = update_tracker(problem, base, tracker, batch, shares, update.response_weight_E, key)
        token_params, next_nll_E = state.token_params, None
        if token_params is not None:
            token_params, next_nll_E = update_token_params(problem, base, update.policy, state, batch, shares, scales)
        loss_E = entry_losses(objective.lower, objective, batch, update.nll_E)
        surprise_E = entry_surprises(objective, batch, update.power_E, loss_E)
        influence, harm_E = state.influence, jnp.zeros_like(loss_E)  # harm is measured with influences only
        selector_state = state.selector
        if not weights_first:
            if influence is not None and update.slopes is not None:
                influence, harm_E, cost_E = influence_costs(objective, influence, update.slopes, update, surprise_E, batch, shares)
            else:
                cost_E = row_costs(problem, base, update, tracker, tracker_nll_E, batch, next_nll_E)
            selector_state = update_weights(problem, state.selector, batch, shares, cost_E, scales, features)
        of_data_E = jnp.where(jnp.isnan(batch.old_log_prob), shares.cost * shares.num_costs, 0.0)
        selector_state = selection.record(selector_state, batch.row_index, of_data_E, surprise_E, harm_E)
        new = State(state.step + 1, update.policy, selector_state, tracker, token_params, influence)
        return new, _metrics(objective, batch, shares, update, loss_E)

    return step


def _metrics(objective: Objective, batch: packing.Batch, shares: Shares, update: PolicyUpdate, loss_E) -> dict[str, jax.Array]:
    """The metrics of a step: float32 scalars and, for each entry, [E] float32. Losses are in nats.

    `lower_loss` is the mean ℓ_b at θ^k over lower-level rows that have a cost, without w and r. `row_loss` is the ℓ of an entry, by
    which a NaN is traced to its row, `log_ratio` log r at θ^k before clipping, `response_weight` the factor that came of it.
    """
    return {
        "loss": update.loss,
        "upper_loss": update.upper_loss,
        "lower_loss": jnp.sum(shares.cost * loss_E),
        "gradient_norm": optax.tree.norm(update.gradient),
        "response_tokens": jnp.sum(batch.packed.num_targets).astype(jnp.float32),
        "row_loss": losses.row_losses(update.nll_E, batch.packed.length, objective.reduction),
        "log_ratio": -update.nll_E - batch.old_log_prob,
        "response_weight": update.response_weight_E,
    }

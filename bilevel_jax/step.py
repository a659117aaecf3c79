"""The joint update of θ and ω, the heart of the method: one pure function of `(base, state, batch, scales, features)`.

For an upper batch of B0 rows and a lower batch of B rows i_1 ... i_B, with w_i = N·σ_i(ω) and γ = ρ/(1-ρ):

    θ-loss = mean_b0 L0(θ) + γ · mean_b [ w_{i_b} · ℓ_b(θ) ]              (7), (10a); its gradient is what `optimizer` clips
    ω-grad = γ · mean_b [ N ∇σ_{i_b}(ω) · stop(C_b) ]                     (10b)
    ℓ_b    = (1/G) Σ_g stop(r^g) ℓ(θ; x, y^g)                              (8), (9), where the model answered question b itself
    C_b    = ℓ_b at θ^{k+1} ("next", (10c)) or at θ^k ("current"); the plain mean over g, without r^g

`make_step` composes one function per equation: `update_policy`, `update_tracker` and `update_token_params` of `policy`, then
`influence_costs` or `row_costs`, and `update_weights`. θ moves with σ(ω^k), then ω does; with `selector.order="paper"` ω moves
first (`weights_before_policy`). The losses that L0 and ℓ_b can be are in `objective`, how much each entry counts is in `shares`,
and the state in `train_state`.

This is the gradient of the penalty, the rule of the paper. With `Objective.cost="influence"`, the default of the configuration, ω
follows the gradient of L0 itself: C_b is made of the row's influence on the trusted loss and of its surprise, (I1)-(I3) in
`influence`.

Direct mixing, the baseline, is the same θ-loss with the scales (1-ρ, ρ) and equal weights.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import forward, losses
from bilevel_jax import influence as influences
from bilevel_jax import selector as selection
from bilevel_jax.data import packing
from bilevel_jax.models import model_config
from bilevel_jax.objective import Objective, check_combination, entry_losses, entry_surprises, lower_losses
from bilevel_jax.policy import PolicyUpdate, Problem, Slopes, update_policy, update_token_params, update_tracker
from bilevel_jax.shares import Shares, entry_shares
from bilevel_jax.train_state import Scales, State

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
    """The cost of each entry by influence.  (I1)-(I3)

    `slopes.lower_pxE` are slopes of the lower level's loss. Divided by the derivative of that loss in the entry's NLL they are
    slopes of the NLL, and the chain rule gives those of ℓ. An entry with factor 0 in the loss, such as one with r = 0, has
    influence 0.

    Args:
      state: before the step.
      slopes, update: of θ^k.
      surprise_E: [E], s at θ^k, nats.

    Returns:
      The state after the step, h [E] and C [E], see `influence.costs`.
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
    model: model_config.ModelConfig,
    objective: Objective,
    selector: selection.Selector,
    optimizer: optax.GradientTransformation,
    seed: int = 0,
) -> Callable:
    """Builds `step(base, state, batch, scales, features=None) -> (state, metrics)`, pure and ready for
    `jax.jit(step, donate_argnums=1)`.

    `features` are those of the rows where ω is a function of them, see `selector.update`. For `metrics` see `_metrics`.

    Args:
      model: shape of the model.
      objective: losses of both levels.
      selector: rule and optimizer of ω.
      optimizer: of θ and θ'.
      seed: of the adapter's dropout.

    Returns:
      `step`. `base`: the frozen weights of the model, see `models.decoder`. `state`: donated. `batch`: E entries, whose `row_index`
      is N for upper rows and padding. `features`: [N, A] float32 or [N] int32.

    Raises:
      ValueError: options that do not go together, see `objective.check_combination`; by `step`, a state made for other options.
    """
    check_combination(objective, selector)
    problem = Problem(model, objective, selector, optimizer, seed)

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
        "row_loss": losses.reduce_tokens(update.nll_E, batch.packed.length, objective.reduction),
        "log_ratio": -update.nll_E - batch.old_log_prob,
        "response_weight": update.response_weight_E,
    }

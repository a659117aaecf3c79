"""The updates of everything that is learned but ω: θ, the tracking adapter θ' and the token weights' ψ. `step` puts them together.

The factor of an entry is known before the forward pass or, as r^g, from its own micro-batch, and both responses of a pair are in
one micro-batch. So the micro-batches of a step add up exact parts of the full-batch gradient, for every split of the rows.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import forward, losses, preferences, train_state
from bilevel_jax import influence as influences
from bilevel_jax import selector as selection
from bilevel_jax.data import packing
from bilevel_jax.models import model_config, probes
from bilevel_jax.objective import Objective, entry_losses, lower_losses
from bilevel_jax.shares import Shares, entry_response_weights, token_weight_fn
from bilevel_jax.train_state import Learner, Scales, State


@dataclasses.dataclass(frozen=True)
class Problem:
    """Everything about the update that is fixed when it is compiled."""

    model: model_config.ModelConfig
    objective: Objective
    selector: selection.Selector
    optimizer: optax.GradientTransformation
    seed: int = 0  # of the adapter's dropout

    def dropout_key(self, state: State):
        """The key of the dropout of a step; None without dropout."""
        return jax.random.fold_in(jax.random.key(self.seed), state.step) if self.model.adapter_dropout else None

    def check(self, state: State) -> None:
        """Refuses a state that `init` made for other costs: `step` takes the cost for which the state has arrays.

        Raises:
          ValueError: the state has other arrays than `objective` and `selector` need.
        """
        wanted = self.objective.value_function == "tracked", train_state.measures_influence(self.objective, self.selector)
        if (state.tracker is not None, state.influence is not None) != wanted:
            raise ValueError("the state is of another objective or selector: make it by train_state.init with those of make_step")

    @property
    def costs_at_next(self) -> bool:
        o = self.objective
        return o.cost == "loss" and o.coefficient_at == "next" and not self.selector.frozen


def _gradient(loss_of_micro: Callable, adapter, end, first=0):
    """Sums `loss_of_micro(adapter, m) -> (part of the loss, more parts)` and its gradient over micro-batches `first` ... `end` - 1.

    The trip count is a number on the device, so every step costs only the micro-batches it holds and all share one compilation.

    Returns:
      (loss, more), gradient.
    """

    def body(m, carry):
        return jax.tree.map(jnp.add, carry, jax.value_and_grad(loss_of_micro, has_aux=True)(adapter, m))

    parts = jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), jax.eval_shape(loss_of_micro, adapter, 0))
    start = parts, jax.tree.map(jnp.zeros_like, adapter)
    return jax.lax.fori_loop(first, end, body, start)


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
        fixed_E = entry_response_weights(objective, batch, forward.entry_nll(model, base, adapter, packed, batch.num_lower_micro))

    def loss_of(scales: Scales, probe: forward.Probe | None = None):
        def loss_of_micro(adapter, m):
            nll_E, power_E = forward.micro_nll_and_power(model, base, adapter, packed, m, weigh, key, probe)
            upper = jnp.sum(shares.upper * entry_losses(objective.upper, objective, batch, nll_E, m))
            response_E = jax.lax.stop_gradient(entry_response_weights(objective, batch, nll_E)) if fixed_E is None else fixed_E
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
    response_E = entry_response_weights(objective, batch, nll_E) if fixed_E is None else fixed_E
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
    """One gradient step of ψ on the penalty at θ^{k+1}, see `token_weights`.

    The derivative is forward-mode: ψ has two entries, and the model's own forward pass does not depend on it.

    Returns:
      ψ^{k+1}, and the weighted NLL [E] at ψ^k.
    """

    def weighted_nll(token_params):
        weigh = token_weight_fn(token_params, batch, state.num_rows)
        nll_E = forward.entry_nll(problem.model, base, policy.adapter, batch.packed, batch.num_lower_micro, weigh)
        return nll_E, nll_E

    gradient_Ex2, nll_E = jax.jacfwd(weighted_nll, has_aux=True)(state.token_params)
    gradient_Ex2 = losses.reduce_tokens(gradient_Ex2, batch.packed.length[:, None], problem.objective.reduction)
    rate, token_params = problem.selector.token_learning_rate, jnp.asarray(state.token_params)
    return token_params - rate * scales.lower * (shares.lower * shares.weight) @ gradient_Ex2, nll_E

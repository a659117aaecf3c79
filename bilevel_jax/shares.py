"""How much each entry of a batch, and each of its tokens, counts in a step."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bilevel_jax import importance, preferences, token_weights
from bilevel_jax import selector as selection
from bilevel_jax.data import packing
from bilevel_jax.objective import Objective


class Shares(NamedTuple):
    """How much each entry counts in the means of a step, [E] float32 each; 0 for padding."""

    upper: jax.Array  # in the mean of L0
    lower: jax.Array  # in the mean over lower-level rows
    cost: jax.Array  # in the mean over lower-level rows that have a cost
    num_costs: jax.Array  # [], number of lower-level rows of the batch that have a cost
    weight: jax.Array  # w_i = N·σ_i(ω), the weight of the entry's row, times its factor in (7) where it has one


def level_shares(batch: packing.Batch, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """How much each entry [E] counts in the mean of the upper level, and in that of the lower one."""
    share_E = jnp.where(batch.sign < 0, 0.0, batch.share)  # the chosen response stands for its pair
    lower_E = jnp.where(batch.row_index < num_rows, share_E, 0.0)
    return share_E - lower_E, lower_E


def entry_shares(
    objective: Objective, selector: selection.Selector, state: selection.SelectorState, batch: packing.Batch
) -> Shares:
    """The shares and weights of the entries of a batch."""
    N = state.logits.shape[0]
    upper_E, lower_E = level_shares(batch, N)
    cost_E, num_costs = lower_E, batch.num_lower
    if objective.lower in preferences.PAIRS:  # all rows but those without a pair
        paired_E = jnp.where(batch.sign > 0, lower_E, 0.0)
        part = jnp.sum(paired_E)
        cost_E, num_costs = paired_E / jnp.where(part > 0, part, 1.0), part * batch.num_lower
    weight_E = selector.scale(N) * selection.probabilities(state.logits, batch.row_index)
    if batch.row_factor is not None:
        weight_E *= batch.row_factor
    return Shares(upper_E, lower_E, cost_E, num_costs, weight_E)


def entry_response_weights(objective: Objective, batch: packing.Batch, nll_E) -> jax.Array:
    """r^g of each entry [E] at the policy whose NLL is given; 1 for responses of the data and in pairs.  (8)"""
    kind = "none" if objective.generated in preferences.PAIRS else objective.response_weight
    return importance.response_weights(kind, -nll_E, batch.old_log_prob, batch.packed.length, batch.group, objective.clip)


def token_weight_fn(token_params, batch: packing.Batch, num_rows: int) -> Callable | None:
    """The `token_weights` argument of `forward.micro_nll`; None where tokens have no weights."""
    if token_params is None:
        return None
    return functools.partial(token_weights.weights, token_params, weighed_E=batch.row_index < num_rows)

"""What a step takes and returns: the state of θ, ω and all that is learned beside them, and the factors of the two levels."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import influence as influences
from bilevel_jax import selector as selection
from bilevel_jax import token_weights
from bilevel_jax.objective import Objective


class Learner(NamedTuple):
    """An adapter and the state of its optimizer."""

    adapter: dict
    optimizer: optax.OptState


class State(NamedTuple):
    """All that a step changes: θ, ω, and what is learned or measured beside them."""

    step: jax.Array  # [] int32, optimizer steps taken
    policy: Learner  # θ
    selector: selection.SelectorState  # ω
    tracker: Learner | None  # θ' of `value_function="tracked"`
    token_params: jax.Array | None = None  # [2] float32, ψ of `token_weights`; None where tokens have no weights
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

"""Training with given weights of the rows, again and again in one process: what counterfactuals and metagradients are made of.

Everything is compiled once. The batches of an order are packed once and kept. The optimizer is Adam with a rate that falls
to 0, and with `EPS_ROOT`, without which its derivative is infinite where no gradient has been.
"""

import copy
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax import batches, checks, metagradient, online, scoring, search, step, train_state
from bilevel_jax import config as configuration
from bilevel_jax import selector as selection
from bilevel_jax import setup as setups
from bilevel_jax.data import packing, shuffle

NEVER = -1e9  # the logit of a row of weight 0
EPS_ROOT = 1e-10  # of Adam
SMOOTH_RATE = 0.3  # of the learning rate, in smooth training


class Measured(NamedTuple):
    """A model on the held-out trusted rows."""

    loss: float  # mean ℓ, nats per token
    right: float  # share of the questions that greedy decoding answers right
    row_loss: np.ndarray  # [n]


class Bed:
    """Model, rows and compiled functions of a config with `method=offline`.

    `num_steering` of the held-out trusted rows steer what may use many trusted rows; the others measure.
    """

    def __init__(self, config_dict, num_steering: int = 0):
        self.config = config = checks.build(config_dict)
        self.setup = setups.load(config)
        self.objective = dataclasses.replace(configuration.to_objective(config), cost="loss", value_function="zero")
        self.N = len(self.setup.lower.rows)
        self.epoch_steps = shuffle.steps_per_epoch(self.N, config.batch.size)
        self.num_steps = config.num_epochs * self.epoch_steps
        self.scales = [batches.level_scales(config, k // self.epoch_steps) for k in range(self.num_steps)]
        entries = configuration.entries_per_row(config) * config.batch.size
        self.layout = packing.Layout(config.batch.micro_size, config.data.max_length, entries)
        self.uniform = selection.Selector(rule="uniform")
        self._set_optimizer(config.optimizer.learning_rate, EPS_ROOT)
        self.score = scoring.make_scorer(
            self.setup.model, config.batch.micro_size, config.data.max_length, self.setup.mesh, greedy=True
        )
        self._orders: dict = {}
        self._selects: dict = {}
        self._selected: dict = {}
        held_out = scoring.example_segments(self.setup.upper.eval_examples)
        self.steering, self._eval = held_out[:num_steering], held_out[num_steering:]
        self.upper_gradient = jax.jit(metagradient.make_upper_gradient(self.setup.model))

    def _set_optimizer(self, learning_rate: float, eps_root: float) -> None:
        # The rate falls to 0, so that the order of the last rows does not decide about the loss.
        rate = optax.linear_schedule(learning_rate, 0.0, self.num_steps)
        self.optimizer = optax.adam(rate, eps_root=eps_root)
        self._step = jax.jit(step.make_step(self.setup.model, self.objective, self.uniform, self.optimizer))
        self.replay = jax.jit(metagradient.make_replay(self.setup.model, self.objective, self.optimizer))

    @functools.cached_property
    def smooth(self) -> "Bed":
        """The same bed with smooth training, see `search`: its loss is nearly linear in the weights."""
        bed = copy.copy(self)
        bed._selects, bed._selected = {}, {}
        bed._set_optimizer(SMOOTH_RATE * self.config.optimizer.learning_rate, search.SMOOTH_EPS_ROOT)
        return bed

    def order(self, seed: int, separate: bool = False) -> list[packing.Batch]:
        """The batches of all steps, in the order of a seed; with `separate`, no sequence holds both levels."""
        key = seed, separate
        if key not in self._orders:
            while len(self._orders) > 3:
                self._orders.pop(next(iter(self._orders)))
            config, empty = dataclasses.replace(self.config, seed=seed), online.empty(self.N)
            layout = self.layout._replace(separate_levels=separate)
            one = functools.partial(batches.make_batch, config, self.setup.upper, self.setup.lower, layout)
            self._orders[key] = [one(k, empty).batch for k in range(self.num_steps)]
        return self._orders[key]

    def start(self, weight_N) -> train_state.State:
        state = train_state.init(self.setup.adapter, self.optimizer, self.objective, self.uniform, self.N)
        weight_N = np.asarray(weight_N, np.float64)
        logits = np.where(weight_N > 0, np.log(np.maximum(weight_N, 1e-30)), NEVER)
        return state._replace(selector=state.selector._replace(logits=jnp.asarray(logits, jnp.float32)))

    def train(self, weight_N, seed: int, keep_states: bool = False, levels: tuple[float, float] = (1.0, 1.0)):
        """θ^T after training with fixed weights; with `keep_states` also the learner before each step.

        Args:
          weight_N: only their ratios count.
          seed: of the order.
          levels: factors of the two levels' scales; (1, 0) trains on the trusted rows alone, (0, 1) on the weighted rows alone.
        """
        state, learners = self.start(weight_N), []
        for batch, scales in zip(self.order(seed), self.scales):
            if keep_states:
                learners.append(jax.device_get(state.policy))
            scales = train_state.Scales(levels[0] * scales.upper, levels[1] * scales.lower)
            state, _ = self._step(self.setup.base, state, batch, scales)
        return (state.policy.adapter, learners) if keep_states else state.policy.adapter

    def select(self, cost: str, selector: selection.Selector, seed: int, value_function: str = "zero") -> train_state.State:
        """The state after a joint run of θ and ω. The last few are kept."""
        key = cost, selector, value_function
        if (*key, seed) in self._selected:
            return self._selected[*key, seed]
        objective = dataclasses.replace(self.objective, cost=cost, value_function=value_function)
        influence = train_state.measures_influence(objective, selector)
        if key not in self._selects:
            self._selects[key] = jax.jit(step.make_step(self.setup.model, objective, selector, self.optimizer))
        state = train_state.init(self.setup.adapter, self.optimizer, objective, selector, self.N)
        for batch, scales in zip(self.order(seed, separate=influence), self.scales):
            state, _ = self._selects[key](self.setup.base, state, batch, scales)
        self._selected[*key, seed] = state
        return state

    def measure(self, adapter, segments=None) -> Measured:
        nll, length, right = self.score(self.setup.base, adapter, segments or self._eval, "held-out rows")
        row_loss = nll / np.maximum(length, 1)
        return Measured(float(row_loss.mean()), float(right.mean()), row_loss)

    def mean_gradient(self, adapter, segments):
        """∇ of the mean ℓ of many rows."""
        shape = self.config.batch.micro_size, self.config.data.max_length, self.setup.mesh
        return metagradient.mean_gradient(self.upper_gradient, self.setup.base, adapter, segments, *shape)

    def metagradient(self, weight_N, seed: int, segments) -> np.ndarray:
        """dL0(θ^T)/dw [N], L0 the mean loss of the given rows."""
        adapter, learners = self.train(weight_N, seed, keep_states=True)
        past = list(zip(learners, self.order(seed), self.scales))
        replay = functools.partial(self.replay, self.setup.base)
        final = self.mean_gradient(adapter, segments)
        return metagradient.metagradient(replay, past, jnp.asarray(weight_N, jnp.float32), final, "metagradient")

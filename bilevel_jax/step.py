"""The joint (θ, ω) update: one pure function of `(base, state, batch, scales)`.

For an upper batch of B0 rows and a lower batch of B rows i_1 ... i_B, with w_i = N·σ_i(ω) and γ = ρ/(1-ρ):

    θ-loss = mean_b0 L0(θ) + γ · mean_b [ w_{i_b} · ℓ_b(θ) ]              (7), (10a)
    ω-grad = γ · mean_b [ N ∇σ_{i_b}(ω) · stop(C_b) ]                     (10b)
    ℓ_b    = (1/G) Σ_g stop(r^g) ℓ(θ; x, y^g)                              (8), (9), where the model answered question b itself
    C_b    = ℓ_b at θ^{k+1} ("next", (10c)) or at θ^k ("current"); the plain mean over g, without r^g

Either level may learn pairs: L0 or ℓ_b is then DPO's or IPO's loss of a row's chosen and rejected response. Where rewards tell the
model's own responses to question b apart, `own` says what ℓ_b makes of them:

    rwr, reinforce   (1/G) Σ_g stop(r^g w^g) ℓ(θ; x, y^g), w^g from the G rewards, see `preferences`
    best_of          r ℓ(θ; x, y) of the best alone
    dpo, ipo         the loss of the best against the worst, without r; nothing where no two rewards differ

C_b compares rows, and is therefore the same measure for all of them, whatever the reward. Where the data's rows have ℓ, it is the
plain mean of ℓ over the model's own responses, of `best_of`, `dpo` and `ipo` ℓ of the best; where they have pairs, the loss of its
own pair, and a question without one is not judged.

That is the penalty's gradient. ω can also follow that of L0 itself, through the one step that it takes part in ("unrolled":
learning to reweight, Ren et al. 2018; with Adam, SAMA, Choe et al. 2023). The optimizer goes θ^{k+1} = θ^k - u(g); with D = ∂u/∂g,
which is diagonal,

    dL0(θ^{k+1})/dω = γ · mean_b [ N ∇σ_{i_b}(ω) · C_b ],   C_b = -⟨∇ℓ_b, D ∇L0⟩ at θ^k, ∇L0 too being taken there:

which is (10b) with another cost: how far a row's gradient turns θ from where L0 falls. The product is the difference that a small
way along D ∇L0 makes to ℓ_b, one forward pass, and counts in units of its root mean square over the batch.

Where tokens have weights of their own, ℓ_b is the mean of the weighted losses of its tokens, here and in C_b, see `tokens`.

Direct mixing, the baseline, is the same θ-loss with the scales (1-ρ, ρ) and equal weights. Everything that an entry is multiplied
by is known before the forward pass or, as r^g, from its own part of it, and the two of a pair are in one micro-batch, so the
micro-batches of a step add up exact parts of the full-batch gradient, however rows of unequal length fall into them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import losses, online, preferences, tokens
from bilevel_jax import selector as selection
from bilevel_jax.data import packing
from bilevel_jax.models import decoder

COEFFICIENTS = ("next", "current")
COSTS = ("loss", "unrolled")
VALUE_FUNCTIONS = ("zero", "tracked")
LOSSES = ("sft", *preferences.PAIRS)
OWN_LOSSES = (*LOSSES, "best_of", *preferences.RANKED)
REDUCTIONS = ("mean", "sum")
TINY = 1e-30
WAY = {"float32": 1e-3, "bfloat16": 1e-2}  # along D ∇L0, as a share of θ's norm; in bfloat16 less is lost in rounding


@dataclasses.dataclass(frozen=True)
class Objective:
    """Which losses are taken, and where.

    Attributes:
      upper: L0, `sft` (mean of ℓ), `dpo` or `ipo`.
      lower: ℓ_b of the rows of the data, the same three.
      own: what ℓ_b makes of the model's own responses to a question: one of these, `best_of`, `rwr` or `reinforce`. Beside pairs
        of the data it is their loss.
      beta: β of DPO and IPO.
      reward_temperature: β of reward-weighted regression.
      reduction: ℓ per token (`mean`), or summed over the response, eq. (1) (`sum`); the log-ratios of IPO likewise, those of DPO
        are always sums.
      cost: what counts against a row, C_b: its `loss`, or `unrolled`, how it turns θ from where L0 falls.
      coefficient_at: the θ at which C_b is taken.
      value_function: `zero`: v(ω) ≡ 0, which holds under Assumption 1; `tracked`: a second adapter θ' follows the weighted
        lower level alone and C_b = ℓ_b(θ) - ℓ_b(θ'), eq. (44) without that assumption.
      response_weight: what the model's own responses are multiplied by, see `online.response_weights`.
      clip: the most that a ratio counts.
    """

    upper: str = "sft"
    lower: str = "sft"
    own: str = "sft"
    beta: float = 0.1
    reward_temperature: float = 1.0
    reduction: str = "mean"
    cost: str = "loss"
    coefficient_at: str = "next"
    value_function: str = "zero"
    response_weight: str = "sequence"
    clip: float = 2.0

    def __post_init__(self):
        for field, name, allowed in (
            ("upper", "loss.upper", LOSSES),
            ("lower", "loss.lower", LOSSES),
            ("own", "online.objective", OWN_LOSSES),
            ("reduction", "loss.reduction", REDUCTIONS),
            ("cost", "selection.cost", COSTS),
            ("coefficient_at", "selection.coefficient_at", COEFFICIENTS),
            ("value_function", "selection.value_function", VALUE_FUNCTIONS),
            ("response_weight", "online.response_weight", online.RESPONSE_WEIGHTS),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{name}={getattr(self, field)!r} is not among {', '.join(allowed)}")
        if self.cost == "unrolled" and (self.coefficient_at, self.value_function) != ("current", "zero"):
            raise ValueError(
                "selection.cost=unrolled compares losses at θ^k alone; take selection.coefficient_at=current and "
                "selection.value_function=zero"
            )
        if not self.beta > 0:
            raise ValueError(f"loss.beta must be positive, got {self.beta}")
        if not self.reward_temperature > 0:
            raise ValueError(f"online.reward_temperature must be positive, got {self.reward_temperature}")
        if not self.clip >= 1:
            raise ValueError(f"online.clip must be at least 1, got {self.clip}")


class Learner(NamedTuple):
    """An adapter and the optimizer that moves it."""

    adapter: dict
    optimizer: optax.OptState


class State(NamedTuple):
    step: jax.Array  # [] int32, optimizer steps taken
    policy: Learner  # θ
    selector: selection.SelectorState  # ω
    tracker: Learner | None  # θ' of `value_function="tracked"`
    phi: jax.Array | None = None  # [2] float32, φ, where tokens have weights of their own


class Scales(NamedTuple):
    """What the two levels' means are multiplied by: (1, γ) for bilevel selection, (1-ρ, ρ) for direct mixing."""

    upper: jax.Array
    lower: jax.Array


def init(
    adapter,
    optimizer: optax.GradientTransformation,
    selector: selection.Selector,
    num_rows: int,
    tracked: bool,
    num_features: int = 0,
) -> State:
    """The state before the first step, for `num_rows` lower-level rows. θ' starts where θ does."""
    policy = Learner(adapter, optimizer.init(adapter))
    tracker = jax.tree.map(jnp.copy, policy) if tracked else None
    phi = jnp.zeros(len(tokens.SCORES), jnp.float32) if selector.token_learning_rate else None
    return State(jnp.int32(0), policy, selection.init(selector, num_rows, num_features), tracker, phi)


# --------------------------------------------------------------------------------------------------------------------
# Forward
# --------------------------------------------------------------------------------------------------------------------


def hidden_states(config: decoder.ModelConfig, base, adapter, packed: packing.Packed, m) -> jax.Array:
    """Final hidden states [T, D] of micro-batch m."""
    variables = {"params": base} | ({"adapter": adapter} if adapter is not None else {})
    hidden_SxLxD = decoder.Decoder(config).apply(variables, packed.tokens[m], packed.positions[m], packed.segments[m])
    return hidden_SxLxD.reshape(-1, config.hidden_size)


def target_nll(config: decoder.ModelConfig, base, adapter, packed: packing.Packed, m) -> jax.Array:
    """NLL of every target [P] of micro-batch m, nats; 0 for padding."""
    hidden_TxD = hidden_states(config, base, adapter, packed, m)
    return losses.token_nll(hidden_TxD, decoder.head(base), packed.source[m], packed.target[m], packed.num_targets[m])


def micro_nll(config: decoder.ModelConfig, base, adapter, packed: packing.Packed, m, weigh: Callable | None = None) -> jax.Array:
    """Summed NLL of every entry's response [E] in micro-batch m, nats; 0 for entries that are elsewhere. `weigh(nll_P, entry_P)`
    gives what each token's is multiplied by, 1 by default."""
    nll_P = target_nll(config, base, adapter, packed, m)
    if weigh is not None:
        nll_P *= weigh(nll_P, packed.entry[m])
    return jax.ops.segment_sum(nll_P, packed.entry[m], num_segments=packed.length.shape[0])


def entry_nll(
    config: decoder.ModelConfig, base, adapter, packed: packing.Packed, num_micro=None, weigh: Callable | None = None
) -> jax.Array:
    """Summed NLL of every entry [E] over the first `num_micro` micro-batches (all in use by default). Forward only."""
    num_micro = packed.num_micro if num_micro is None else num_micro
    start = jnp.zeros(packed.length.shape[0], jnp.float32)
    return jax.lax.fori_loop(0, num_micro, lambda m, nll: nll + micro_nll(config, base, adapter, packed, m, weigh), start)


# --------------------------------------------------------------------------------------------------------------------
# Objective and gradient
# --------------------------------------------------------------------------------------------------------------------


def entry_losses(kind: str, objective: Objective, batch: packing.Batch, nll_E, m=None) -> jax.Array:
    """The loss of each entry [E]: `sft`, ℓ; `dpo` and `ipo`, that of its pair, 0 for entries of none.

    With `m` the NLL is of micro-batch m alone, and so are the pairs: the two of one are never in different micro-batches.
    """
    if kind == "sft":
        return losses.row_losses(nll_E, batch.packed.length, objective.reduction)
    E = nll_E.shape[0]
    log_ratio_E = -nll_E - batch.reference
    if kind == "ipo":
        log_ratio_E = losses.row_losses(log_ratio_E, batch.packed.length, objective.reduction)
    margin_P, _ = preferences.pairs(log_ratio_E, batch.sign, batch.share, batch.group)
    there_E = batch.sign != 0
    if m is not None:
        there_E &= jnp.zeros(E, bool).at[batch.packed.entry[m]].set(True, mode="drop")
    loss_P = preferences.pair_losses(kind, margin_P, objective.beta)
    return jnp.where(there_E, loss_P.at[batch.group].get(mode="fill", fill_value=0.0), 0.0)


def lower_losses(objective: Objective, batch: packing.Batch, nll_E, m) -> jax.Array:
    """`entry_losses` of the lower level in micro-batch m, with those of the model's own responses as `objective.own` has them."""
    loss_E = entry_losses(objective.lower, objective, batch, nll_E, m)
    if objective.own == "rwr":
        return preferences.reward_weighted(batch.reward, batch.group, objective.reward_temperature) * loss_E
    if objective.own == "reinforce":
        return preferences.leave_one_out(batch.reward, batch.group) * loss_E
    if objective.own in preferences.PAIRS and objective.lower == "sft":
        own_E = ~jnp.isnan(batch.old_log_prob)
        return jnp.where(own_E, entry_losses(objective.own, objective, batch, nll_E, m), loss_E)
    return loss_E


def _gradient(objective_of_micro: Callable, adapter, num_micro, num_entries: int, first=0):
    """Adds up `objective_of_micro(adapter, m) -> (part of the loss, (part of L0, [E] NLL))` and its gradient over the micro-batches
    from `first` to `num_micro`.

    The trip count is known only on the device, so every step costs what it holds and all share one compilation.

    Returns:
      (loss, (L0, nll_E)), gradient.
    """

    def body(m, carry):
        return jax.tree.map(jnp.add, carry, jax.value_and_grad(objective_of_micro, has_aux=True)(adapter, m))

    zero = jnp.float32(0)
    start = (zero, (zero, jnp.zeros(num_entries, jnp.float32))), jax.tree.map(jnp.zeros_like, adapter)
    return jax.lax.fori_loop(first, num_micro, body, start)


def _descend(optimizer: optax.GradientTransformation, learner: Learner, gradient) -> Learner:
    updates, state = optimizer.update(gradient, learner.optimizer, learner.adapter)
    return Learner(optax.apply_updates(learner.adapter, updates), state)


def _ahead(optimizer: optax.GradientTransformation, learner: Learner, gradient, slope, way: float):
    """θ a small way along -D · slope, D = ∂u/∂g at the step's gradient g; the way has the share `way` of θ's norm."""

    def step_of(gradient):
        return optimizer.update(gradient, learner.optimizer, learner.adapter)[0]

    _, along = jax.jvp(step_of, (gradient,), (slope,))
    along = jax.tree.map(lambda d, s: jnp.where(s == 0, 0.0, d), along, slope)  # Adam's D is infinite where no gradient has been
    size = way * optax.tree.norm(learner.adapter) / jnp.maximum(optax.tree.norm(along), TINY)
    return jax.tree.map(lambda leaf, d: leaf + size * d, learner.adapter, along)


def check_tokens(objective: Objective, selector: selection.Selector) -> None:
    """Refuses what weights of tokens are not made for.

    Raises:
      ValueError: one line that names the key.
    """
    wanted = {
        "selection.rule": (selector.rule, "bds"),
        "selection.cost": (objective.cost, "loss"),
        "selection.coefficient_at": (objective.coefficient_at, "next"),
        "selection.value_function": (objective.value_function, "zero"),
        "loss.lower": (objective.lower, "sft"),
    }
    for key, (value, taken) in wanted.items():
        if selector.token_learning_rate and value != taken:
            raise ValueError(f"selection.unit=token follows (10b) at θ^{{k+1}} on losses of tokens: {key}={value} must be {taken}")


def make_step(
    config: decoder.ModelConfig,
    objective: Objective,
    selector: selection.Selector,
    optimizer: optax.GradientTransformation,
) -> Callable:
    """Builds `step(base, state, batch, scales, features=None) -> (state, metrics)`, pure and ready for
    `jax.jit(step, donate_argnums=1)`. `features` are the rows' where ω is a function of them, see `selector.update`.

    `metrics` holds float32 scalars: `loss`, `upper_loss` (L0), `lower_loss` (mean C at θ^k, no row weighted), `gradient_norm`,
    `response_tokens`; and for each entry [E] `row_loss`, its ℓ, by which a NaN finds its row, `log_ratio`, log r at θ^k before
    clipping, and `response_weight`, what became of it (1 for responses of the data and in pairs, which take no ratio).
    """
    check_tokens(objective, selector)
    weighting = "none" if objective.own in preferences.PAIRS else objective.response_weight
    unrolled = objective.cost == "unrolled" and selector.rule != "uniform"

    def step(base, state: State, batch: packing.Batch, scales: Scales, features=None):
        N, E = state.selector.logits.shape[0], batch.share.shape[0]
        packed = batch.packed
        share_E = jnp.where(batch.sign < 0, 0.0, batch.share)  # of a pair, the chosen one stands for both
        lower_share_E = jnp.where(batch.sample < N, share_E, 0.0)
        upper_share_E = share_E - lower_share_E
        judged_E, num_judged = lower_share_E, batch.num_lower
        if objective.lower in preferences.PAIRS:  # all rows but those without a pair
            paired_E = jnp.where(batch.sign > 0, lower_share_E, 0.0)
            part = jnp.sum(paired_E)
            judged_E, num_judged = paired_E / jnp.where(part > 0, part, 1.0), part * batch.num_lower
        weight_E = selector.scale(N) * selection.probabilities(state.selector.logits, batch.sample)

        def row_losses(nll_E):
            return losses.row_losses(nll_E, packed.length, objective.reduction)

        def response_weights(nll_E):
            return online.response_weights(weighting, -nll_E, batch.old_log_prob, packed.length, batch.group, objective.clip)

        def lower_costs(nll_E):
            return entry_losses(objective.lower, objective, batch, nll_E)

        def weigh(phi):
            return functools.partial(tokens.weights, phi, weighed_E=batch.sample < N)

        weigh_now = weigh(state.phi) if state.phi is not None else None
        given_E = None
        if weighting == "softmax":  # λ compares responses that may lie in different micro-batches
            given_E = response_weights(entry_nll(config, base, state.policy.adapter, packed, batch.num_lower_micro))

        # θ^{k+1}: both levels in one pass, or in one each where ∇L0 is needed by itself.
        def scaled(scales: Scales):
            def objective_of_micro(adapter, m):
                nll_E = micro_nll(config, base, adapter, packed, m, weigh_now)
                upper = jnp.sum(upper_share_E * entry_losses(objective.upper, objective, batch, nll_E, m))
                response_E = jax.lax.stop_gradient(response_weights(nll_E)) if given_E is None else given_E
                lower = jnp.sum(lower_share_E * weight_E * response_E * lower_losses(objective, batch, nll_E, m))
                return scales.upper * upper + scales.lower * lower, (upper, nll_E)

            return objective_of_micro

        adapter = state.policy.adapter
        if unrolled:
            first, end = batch.first_upper_micro, packed.num_micro
            (_, (upper, upper_nll_E)), slope = _gradient(scaled(Scales(1.0, 0.0)), adapter, end, E, first)
            (lower, (_, nll_E)), gradient = _gradient(scaled(Scales(0.0, 1.0)), adapter, batch.num_lower_micro, E)
            loss = scales.upper * upper + scales.lower * lower
            nll_E = jnp.where(batch.sample < N, nll_E, upper_nll_E)
            gradient = jax.tree.map(lambda up, low: scales.upper * up + scales.lower * low, slope, gradient)
        else:
            (loss, (upper, nll_E)), gradient = _gradient(scaled(scales), adapter, packed.num_micro, E)
        policy = _descend(optimizer, state.policy, gradient)
        response_E = response_weights(nll_E) if given_E is None else given_E

        # θ'^{k+1}: the weighted lower level alone.
        def lower_only(adapter, m):
            nll_E = micro_nll(config, base, adapter, packed, m)
            lower = jnp.sum(lower_share_E * weight_E * response_E * lower_losses(objective, batch, nll_E, m))
            return lower, (jnp.float32(0), nll_E)

        tracker, tracker_nll_E = state.tracker, None
        if tracker is not None:
            (_, (_, tracker_nll_E)), gradient_of_lower = _gradient(lower_only, tracker.adapter, batch.num_lower_micro, E)
            tracker = _descend(optimizer, tracker, gradient_of_lower)

        # ω^{k+1}: the cost of each lower row, by a second look at the lower level's micro-batches only: at θ^{k+1}, or on the way.
        cost_nll_E, phi = nll_E, state.phi

        def look(phi):
            found_E = entry_nll(config, base, policy.adapter, packed, batch.num_lower_micro, weigh(phi))
            return found_E, found_E

        if phi is not None:  # φ^{k+1}: forward derivatives, for the model's own pass has none and is made once
            slope_Ex2, cost_nll_E = jax.jacfwd(look, has_aux=True)(phi)
            slope_Ex2 = losses.row_losses(slope_Ex2, packed.length[:, None], objective.reduction)
            phi = phi - selector.token_learning_rate * scales.lower * (lower_share_E * weight_E) @ slope_Ex2
        elif selector.rule != "uniform" and objective.coefficient_at == "next":
            cost_nll_E = entry_nll(config, base, policy.adapter, packed, batch.num_lower_micro)
            if tracker is not None:
                tracker_nll_E = entry_nll(config, base, tracker.adapter, packed, batch.num_lower_micro)
        cost_E = lower_costs(cost_nll_E)
        if tracker is not None:
            cost_E = cost_E - lower_costs(tracker_nll_E)
        if unrolled:
            ahead = _ahead(optimizer, state.policy, gradient, slope, WAY[config.dtype])
            change_E = lower_costs(entry_nll(config, base, ahead, packed, batch.num_lower_micro)) - cost_E
            cost_E = change_E / jnp.maximum(jnp.sqrt(jnp.sum(judged_E * change_E**2)), TINY)
        moved = selection.update(selector, state.selector, batch.sample, judged_E, num_judged, cost_E, scales.lower, features)

        metrics = {
            "loss": loss,
            "upper_loss": upper,
            "lower_loss": jnp.sum(judged_E * lower_costs(nll_E)),
            "gradient_norm": optax.tree.norm(gradient),
            "response_tokens": jnp.sum(packed.num_targets).astype(jnp.float32),
            "row_loss": row_losses(nll_E),
            "log_ratio": -nll_E - batch.old_log_prob,
            "response_weight": response_E,
        }
        return State(state.step + 1, policy, moved, tracker, phi), metrics

    return step

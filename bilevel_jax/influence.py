"""The default cost: what a row does to the trusted loss, and how unlikely its tokens are.

The rule of the paper follows the gradient of the penalty. With `cost="influence"`, ω follows what rows do to L0 itself. With D the
preconditioner of the optimizer, 1/√v for Adam and 1 for SGD, row i's part of a step changes L0, to first order, by
-(η γ / B) w_i ⟨∇ℓ_i(θ^k), D ∇L0(θ^k)⟩. The product is a sum over the projections p of the model that have an adapter. A few of them
dominate it, so each has one vote:

    I_i = mean_p sign ⟨∇_p ℓ_i(θ^k), D m_p⟩,   m = a running mean of ∇L0 over the last batches                      (I1)

One batch of the upper level is a noisy estimate of ∇L0; the running mean has seen hundreds of rows and costs nothing. The products
come from the backward pass of the lower level, see `models.probes`, so they cost next to nothing. The gradient of the step is not
known before that pass, so v is that after a step with ∇L0 alone. (TracIn, Pruthi et al. 2020; with Adam's preconditioner LESS, Xia
et al. 2024; in the joint step, with one batch, learning to reweight, Ren et al. 2018, and SAMA, Choe et al. 2023. Votes: signSGD,
Bernstein et al. 2018, between workers.) The cost is

    C_i = h_i + c x_i,   h_i = -tanh(I_i / rms(I)),   x_i = tanh((s_i - mean(s)) / std(s)),                          (I2)
    s_i = (mean_t (-log p_t)^4)^{1/4}

with running means over the rows. A row loses weight if its gradient opposes that of the trusted rows. It also loses weight if its
tokens are unlikely, to the extent that unlikely rows do harm. The surprise s is a power mean of the NLLs of the row's tokens: one
wrong word stands out in it, and not in their mean ℓ.

The harm h of a single row is noisy, and its surprise is not. Of rows of unit variances let q be the share of that of h which is not
noise, and κ the correlation of h and x. The best linear estimate of a harm without noise is then proportional to h + c x, with

    c = κ (1 - q) / (q - κ²)   for 0 < κ < q,   0 below,   1 above                                                 (I3)

κ is a running mean that starts at 0, and q is `RELIABILITY`. So a surprise counts once the influences have shown that surprising
rows do harm. Where the trusted rows ask for what the model has never done, such as to comply, surprising rows help, and c is 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

TINY = 1e-30
UPPER_DECAY = 0.9  # of the running mean of ∇L0: about 10 batches
SPREAD_DECAY = 0.9  # of the other running means
RELIABILITY = 0.43  # q: the correlation of a row's harms at its first two visits (`python -m experiments.influence_noise`)


class InfluenceState(NamedTuple):
    """The running means of the cost."""

    upper_mean: dict  # m = Σ (1 - β) β^j ∇L0 of the batch j steps ago, β = `UPPER_DECAY`
    influence_square: jax.Array  # [] float32, rms(I)², running mean square; NaN before the first batch, as the next two
    surprise_mean: jax.Array  # [] float32, running mean of the surprises of the lower level
    surprise_square: jax.Array  # [] float32, running mean square of their deviations from it
    correlation: jax.Array  # [] float32, κ


def init(adapter) -> InfluenceState:
    """The state before the first step."""

    def scalar(value: float) -> jax.Array:
        """An array of its own: a step that donates the state may not get a buffer twice."""
        return jnp.full((), value, jnp.float32)

    return InfluenceState(jax.tree.map(jnp.zeros_like, adapter), scalar(jnp.nan), scalar(jnp.nan), scalar(jnp.nan), scalar(0.0))


def direction(state: InfluenceState, upper_gradient, optimizer_state) -> tuple[dict, dict]:
    """Updates the running mean of ∇L0, and preconditions it.  (I1)

        m ← β m + (1 - β) ∇L0;   D m = m / √v with Adam, m with SGD;   β = `UPPER_DECAY`

    Args:
      state: before the step.
      upper_gradient: ∇L0 of the batch at θ^k, a tree like the learned parameters.
      optimizer_state: after a step with ∇L0 alone; its `nu` is v.

    Returns:
      m, and D m (not normalised), trees like the learned parameters.
    """
    mean = jax.tree.map(lambda m, g: UPPER_DECAY * m + (1 - UPPER_DECAY) * g, state.upper_mean, upper_gradient)
    return mean, _preconditioned(optimizer_state, mean)


def votes(slope_pxE) -> jax.Array:
    """I of each entry.  (I1)

    Args:
      slope_pxE: [p, E] float32, the derivative of each entry's loss along D m in each projection p; only its sign counts.

    Returns:
      [E] float32 in [-1, 1]; below 0 the entry works against the trusted rows.
    """
    return jnp.mean(jnp.sign(slope_pxE), axis=0)


def costs(state: InfluenceState, upper_mean, influence_E, surprise_E, share_E) -> tuple[InfluenceState, jax.Array, jax.Array]:
    """The cost of each entry.  (I2), (I3)

    Args:
      state: before the step.
      upper_mean: m, from `direction`.
      influence_E: [E], I.
      surprise_E: [E], s at θ^k, nats.
      share_E: [E], how much each entry counts in the mean over the rows that have a cost; sums to 1, or to 0 if none has one.

    Returns:
      State after the step; [E] h in (-1, 1); [E] C in (-2, 2), without a unit.
    """
    influence_square, harm_E = _scaled(state.influence_square, -influence_E, share_E)
    surprise_mean = _running(state.surprise_mean, surprise_E, share_E)
    surprise_square, excess_E = _scaled(state.surprise_square, surprise_E - surprise_mean, share_E)
    correlation = _running_correlation(state.correlation, harm_E, excess_E, share_E)
    state = InfluenceState(upper_mean, influence_square, surprise_mean, surprise_square, correlation)
    return state, harm_E, harm_E + surprise_part(correlation) * excess_E


def surprise_part(correlation) -> jax.Array:
    """c of κ, from 0 to 1.  (I3)"""
    inside = jnp.clip(correlation, 0.0, RELIABILITY)
    return inside * (1 - RELIABILITY) / (RELIABILITY - inside**2)


def _preconditioned(optimizer_state, gradient):
    """D times a gradient: divided by √v where the optimizer keeps v, a running mean of squares."""
    square = optax.tree.get(optimizer_state, "nu", default=None)
    if square is None:
        return gradient
    # An entry without a gradient so far has v = 0, and m = 0 with it.
    return jax.tree.map(lambda g, v: jnp.where(v > 0, g / (jnp.sqrt(v) + TINY), 0.0), gradient, square)


def _scaled(mean_square, value_E, share_E) -> tuple[jax.Array, jax.Array]:
    """The running mean square with that of a batch, and tanh(value / its root): few rows have by far the largest values."""
    mean_square = _running(mean_square, value_E**2, share_E)
    return mean_square, jnp.tanh(value_E / jnp.maximum(jnp.sqrt(mean_square), TINY))


def _running(mean, value_E, share_E):
    """The running mean with that of a batch."""
    return _moved(mean, jnp.sum(share_E * value_E), share_E)


def _moved(mean, of_batch, share_E):
    """The running mean after a batch; the first one is its own, and one in which no row has a cost changes nothing."""
    moved = jnp.where(jnp.isnan(mean), of_batch, SPREAD_DECAY * mean + (1 - SPREAD_DECAY) * of_batch)
    return jnp.where(jnp.sum(share_E) > 0, moved, mean)


def _running_correlation(mean, harm_E, excess_E, share_E):
    """The running mean of h·x / |h||x| of the batches."""
    product, harm_square, excess_square = (share_E @ value_E for value_E in (harm_E * excess_E, harm_E**2, excess_E**2))
    of_batch = product / jnp.maximum(jnp.sqrt(harm_square * excess_square), TINY)
    return _moved(mean, of_batch, share_E)

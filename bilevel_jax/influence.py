"""The default cost: what a row does to the trusted loss, and how likely its tokens are.

The rule of the paper follows the gradient of the penalty. With `cost="influence"`, ω follows what rows do to L0 itself. With D the
preconditioner of the optimizer, 1/√v for Adam and 1 for SGD, a step with weight w_i moves the trusted loss, to first order, by -w_i
times ⟨∇ℓ_i(θ^k), D m⟩, where m is ∇L0. This is a sum over the projections p of the model with an adapter. A few of them dominate
it, so each has one vote:

    I_i = mean_p sign ⟨∇_p ℓ_i(θ^k), D m_p⟩,   m = a running mean of ∇L0 over the last batches                      (I)

One batch of the upper level is a noisy estimate of ∇L0; the running mean has seen hundreds of rows and costs nothing. The products
come from the backward pass of the lower level, see `models.probes`, so they cost next to nothing. The gradient of the step is not
known before that pass, so v is that after a step with ∇L0 alone. (TracIn, Pruthi et al. 2020; with Adam's preconditioner LESS, Xia
et al. 2024; in the joint step, with one batch, learning to reweight, Ren et al. 2018, and SAMA, Choe et al. 2023. Votes: signSGD,
Bernstein et al. 2018, between workers.) The cost is

    C_b = h_b + c x_b,   h_b = -tanh(I_b / σ_I),   x_b = tanh((s_b - s̄) / σ_s),   s_b = (mean_t (-log p_t)^4)^{1/4}     (C)

with running means and spreads over the rows: rows lose weight whose gradients work against that of the trusted rows, and rows that
surprise the model made with them, as far as such rows do harm. The surprise s is a power mean of the NLLs of the row's tokens: one
wrong word stands out in it, and not in their mean ℓ.

The harm h of a single row is noisy, and its surprise is not. Of rows of unit variances let q be the share of that of h which is not
noise, and r the correlation of h and x. The best linear estimate of a harm without noise is then proportional to h + c x, with

    c = r (1 - q) / (q - r²)   for 0 < r < q,   0 below,   1 above                                                      (c)

r is a running mean that starts at 0, and q is `RELIABILITY`. So a surprise counts once the influences have shown that surprising
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


class Memory(NamedTuple):
    """What the cost remembers from step to step."""

    upper_gradient: dict  # m = Σ (1 - β) β^j ∇L0 of the batch j steps ago, β = `UPPER_DECAY`
    mean_square: jax.Array  # [] float32, σ_I², running mean square of the influences; this and the next two are NaN at first
    surprise_mean: jax.Array  # [] float32, running mean of the surprises of the lower level
    surprise_square: jax.Array  # [] float32, running mean square of their deviations from it
    correlation: jax.Array  # [] float32, r


def init(adapter) -> Memory:
    """The memory before the first step."""

    def scalar(value: float) -> jax.Array:
        """An array of its own: a step that donates the state may not get a buffer twice."""
        return jnp.full((), value, jnp.float32)

    return Memory(jax.tree.map(jnp.zeros_like, adapter), scalar(jnp.nan), scalar(jnp.nan), scalar(jnp.nan), scalar(0.0))


def direction(memory: Memory, upper_gradient, optimizer_state) -> tuple[dict, dict]:
    """The running mean m with the gradient of a batch, and D m, of any length.

    Args:
      upper_gradient: ∇L0 of the batch at θ^k.
      optimizer_state: after a step with ∇L0 alone, with Adam's v.
    """
    mean = jax.tree.map(lambda m, g: UPPER_DECAY * m + (1 - UPPER_DECAY) * g, memory.upper_gradient, upper_gradient)
    return mean, _preconditioned(optimizer_state, mean)


def votes(slope_PxE) -> jax.Array:
    """I of each entry, from the derivatives of its loss along D m in each projection.  (I)"""
    return jnp.mean(jnp.sign(slope_PxE), axis=0)


def costs(memory: Memory, upper_gradient, influence_E, surprise_E, share_E) -> tuple[Memory, jax.Array, jax.Array]:
    """The cost of each entry.  (C)

    Args:
      memory: before the step.
      upper_gradient: m.
      influence_E: I.
      surprise_E: s at θ^k.
      share_E: of the entries in the mean over the lower level.

    Returns:
      memory after the step; [E] h_b; [E] C_b.
    """
    mean_square, harm_E = _scaled(memory.mean_square, -influence_E, share_E)
    surprise_mean = _running(memory.surprise_mean, surprise_E, share_E)
    surprise_square, excess_E = _scaled(memory.surprise_square, surprise_E - surprise_mean, share_E)
    correlation = _running_correlation(memory.correlation, harm_E, excess_E, share_E)
    memory = Memory(upper_gradient, mean_square, surprise_mean, surprise_square, correlation)
    return memory, harm_E, harm_E + surprise_part(correlation) * excess_E


def surprise_part(correlation) -> jax.Array:
    """c of r, from 0 to 1.  (c)"""
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

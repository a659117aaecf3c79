"""Per-token and per-row losses of responses, without vocabulary-sized arrays for whole batches.

Only positions that predict a response token need logits. They are gathered first and go through the head a chunk at a time, so
that at most `chunk` rows of logits exist at once, in the forward and in the backward pass.
"""

import jax
import jax.numpy as jnp

from bilevel_jax import sharding
from bilevel_jax.models import decoder

CHUNK = 256  # positions per trip through the head
CHUNK_ON_CPU = 128  # there, as many as caches hold logits of; elsewhere the head would be read too often


def chunk(positions: int) -> int:
    """Positions per trip, where there are so many in all."""
    return min(CHUNK, CHUNK_ON_CPU if jax.default_backend() == "cpu" else CHUNK, positions)


def _chunk(hidden_TxD, head_VxD, source_C, target_C):
    """One chunk's negative log-likelihoods [C], its logits, e = exp(logits - max) [C, V] and z = Σ e [C, 1]: softmax is e / z."""
    hidden = sharding.constrain(hidden_TxD.at[source_C].get(mode="fill", fill_value=0), "rows")
    logits = decoder.project(hidden, head_VxD)
    most = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - most)
    total = weights.sum(axis=-1, keepdims=True)
    nll = jnp.log(total) - (jnp.take_along_axis(logits, target_C[:, None], axis=-1) - most)
    return nll[:, 0], logits, weights, total


def _gathered(head_VxD):
    """Once, not for every chunk."""
    return sharding.constrain(head_VxD, "vocab")


def _over_chunks(body, source_P, num_targets, carry):
    """Runs `body(first, size, carry)` for every chunk that holds a target; the number of trips is known only on the device."""
    size = chunk(source_P.shape[0])
    trips = (num_targets + size - 1) // size
    return jax.lax.fori_loop(0, trips, lambda i, carry: body(i * size, size, carry), carry)


@jax.custom_vjp
def token_nll(hidden_TxD, head_VxD, source_P, target_P, num_targets) -> jax.Array:
    """Negative log-likelihood of each target token, in nats: -log softmax(head · hidden[source])[target].

    Differentiable in `hidden_TxD` alone: the head belongs to the frozen base. The forward pass of a differentiated call already
    forms each position's gradient (softmax - onehot) · head, of width D, so that logits are computed once and never stored.

    Args:
      hidden_TxD: final hidden states of T packed tokens.
      head_VxD: output matrix.
      source_P: int32 [P], P a multiple of `chunk(P)`; the token whose hidden state predicts target p, T or more for padding.
      target_P: int32 [P], token ids.
      num_targets: int32 scalar; targets stand at the front, the rest is padding.

    Returns:
      float32 [P], 0 at padding.
    """

    head_VxD = _gathered(head_VxD)

    def body(first, size, nll_P):
        source = jax.lax.dynamic_slice_in_dim(source_P, first, size)
        target = jax.lax.dynamic_slice_in_dim(target_P, first, size)
        nll, *_ = _chunk(hidden_TxD, head_VxD, source, target)
        return jax.lax.dynamic_update_slice_in_dim(nll_P, nll, first, 0)

    nll_P = _over_chunks(body, source_P, num_targets, jnp.zeros(source_P.shape, jnp.float32))
    return jnp.where(jnp.arange(source_P.shape[0]) < num_targets, nll_P, 0.0)


def _token_nll_forward(hidden_TxD, head_VxD, source_P, target_P, num_targets):
    head_VxD = _gathered(head_VxD)

    def body(first, size, carry):
        nll_P, slope_PxD = carry
        source = jax.lax.dynamic_slice_in_dim(source_P, first, size)
        target = jax.lax.dynamic_slice_in_dim(target_P, first, size)
        nll, _, weights, total = _chunk(hidden_TxD, head_VxD, source, target)
        slope = jnp.dot(weights.astype(head_VxD.dtype), head_VxD, preferred_element_type=jnp.float32) / total - head_VxD[target]
        nll_P = jax.lax.dynamic_update_slice_in_dim(nll_P, nll, first, 0)
        return nll_P, jax.lax.dynamic_update_slice_in_dim(slope_PxD, slope.astype(slope_PxD.dtype), first, 0)

    P = source_P.shape[0]
    carry = jnp.zeros(P, jnp.float32), jnp.zeros((P, hidden_TxD.shape[1]), hidden_TxD.dtype)
    nll_P, slope_PxD = _over_chunks(body, source_P, num_targets, carry)
    nll_P = jnp.where(jnp.arange(P) < num_targets, nll_P, 0.0)
    # The empty array carries hidden's length and dtype, which residuals cannot hold as they are.
    return nll_P, (slope_PxD, source_P, num_targets, jnp.zeros((hidden_TxD.shape[0], 0), hidden_TxD.dtype))


def _token_nll_backward(residuals, cotangent_P):
    slope_PxD, source_P, num_targets, like = residuals
    inside = jnp.arange(source_P.shape[0]) < num_targets
    scale = jnp.where(inside, cotangent_P, 0.0).astype(slope_PxD.dtype)
    gradient = jnp.zeros((like.shape[0], slope_PxD.shape[1]), slope_PxD.dtype)
    gradient = gradient.at[source_P].add(scale[:, None] * slope_PxD, mode="drop")
    return sharding.constrain(gradient, "rows"), None, None, None, None


token_nll.defvjp(_token_nll_forward, _token_nll_backward)


def token_scores(hidden_TxD, head_VxD, source_P, target_P, num_targets) -> tuple[jax.Array, jax.Array]:
    """`token_nll` [P], and whether some other token is more likely than the target, bool [P], False at padding. Forward only."""
    head_VxD = _gathered(head_VxD)

    def body(first, size, carry):
        source = jax.lax.dynamic_slice_in_dim(source_P, first, size)
        target = jax.lax.dynamic_slice_in_dim(target_P, first, size)
        nll, logits, *_ = _chunk(hidden_TxD, head_VxD, source, target)
        found = nll, jnp.argmax(logits, axis=-1) != target
        return tuple(jax.lax.dynamic_update_slice_in_dim(whole, part, first, 0) for whole, part in zip(carry, found))

    P = source_P.shape[0]
    nll_P, missed_P = _over_chunks(body, source_P, num_targets, (jnp.zeros(P, jnp.float32), jnp.zeros(P, bool)))
    inside = jnp.arange(P) < num_targets
    return jnp.where(inside, nll_P, 0.0), missed_P & inside


def row_losses(nll_E: jax.Array, length_E: jax.Array, reduction: str) -> jax.Array:
    """ℓ of each row from its summed NLL: per response token (`mean`), or the sum itself, eq. (1) (`sum`). Nats."""
    return nll_E / jnp.maximum(length_E, 1) if reduction == "mean" else nll_E

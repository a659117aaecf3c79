"""Losses per token and per row, without arrays of the size of the vocabulary for whole batches.

Only positions that predict a response token need logits. Their hidden states are gathered first and go through the output matrix
in chunks, so that at most `packing.chunk_size` rows of logits exist at a time, in the forward and in the backward pass.

Axes: T packed tokens, P targets, Z targets of a chunk, D hidden width, V vocabulary, E entries (responses of the batch).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from bilevel_jax import sharding
from bilevel_jax.data import packing
from bilevel_jax.models import decoder

POWER = 4.0  # of the power mean of a row's tokens


def _chunk(hidden_TxD, head_VxD, logit_index_Z, target_Z, cap):
    """Negative log-likelihoods [Z] of one chunk, its logits, e = exp(logits - max) [Z, V] and z = Σ e [Z, 1]; softmax is e / z."""
    hidden = sharding.constrain(hidden_TxD.at[logit_index_Z].get(mode="fill", fill_value=0), "rows")
    logits = decoder.project(hidden, head_VxD, cap)
    highest = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - highest)
    total = weights.sum(axis=-1, keepdims=True)
    nll = jnp.log(total) - (jnp.take_along_axis(logits, target_Z[:, None], axis=-1) - highest)
    return nll[:, 0], logits, weights, total


def _gathered(head_VxD):
    """The output matrix, gathered over `fsdp` once and not for every chunk."""
    return sharding.constrain(head_VxD, "vocab")


def _over_chunks(of_chunk: Callable, logit_index_P, target_P, num_targets):
    """Joins `of_chunk(index_Z, target_Z)`, arrays [Z, ...], over all chunks with a target; 0 in the others.

    The number of chunks is known only on the device.
    """
    P = logit_index_P.shape[0]
    size = packing.chunk_size(P)

    def body(i, joined):
        index_Z, target_Z = (jax.lax.dynamic_slice_in_dim(array_P, i * size, size) for array_P in (logit_index_P, target_P))
        parts = of_chunk(index_Z, target_Z)
        return jax.tree.map(lambda array, part: jax.lax.dynamic_update_slice_in_dim(array, part, i * size, 0), joined, parts)

    of_one = jax.eval_shape(of_chunk, logit_index_P[:size], target_P[:size])
    start = jax.tree.map(lambda part: jnp.zeros((P, *part.shape[1:]), part.dtype), of_one)
    return jax.lax.fori_loop(0, (num_targets + size - 1) // size, body, start)


def _is_target(logit_index_P, num_targets) -> jax.Array:
    """[P] bool, False at padding."""
    return jnp.arange(logit_index_P.shape[0]) < num_targets


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def token_nll(hidden_TxD, head_VxD, logit_index_P, target_P, num_targets, cap: float | None = None) -> jax.Array:
    """Negative log-likelihood of each target token, in nats.

        nll_p = -log softmax(head · hidden[index_p])[target_p]                             (L1)
        ∂nll_p / ∂hidden[index_p] = (softmax - onehot(target_p)) · head                    (L2)

    With a cap of the logits z, each row of `head` in (L2) has the factor 1 - (z / cap)².

    Only differentiable in `hidden_TxD`, since the output matrix belongs to the frozen base. The forward pass of a differentiated
    call computes (L2), of width D, so that logits are computed once and never stored.

    Args:
      hidden_TxD: final hidden states of T packed tokens.
      head_VxD: output matrix.
      logit_index_P: int32 [P], P a multiple of `packing.chunk_size(P)`; index of the token that predicts p; T or more: padding.
      target_P: int32 [P], token ids.
      num_targets: int32 scalar; the first `num_targets` entries are targets, the others padding.
      cap: soft cap of the logits, `config.logit_cap`.

    Returns:
      float32 [P], 0 at padding.
    """
    head_VxD = _gathered(head_VxD)

    def of_chunk(index_Z, target_Z):
        return _chunk(hidden_TxD, head_VxD, index_Z, target_Z, cap)[0]

    nll_P = _over_chunks(of_chunk, logit_index_P, target_P, num_targets)
    return jnp.where(_is_target(logit_index_P, num_targets), nll_P, 0.0)


def _token_nll_forward(hidden_TxD, head_VxD, logit_index_P, target_P, num_targets, cap):
    head_VxD = _gathered(head_VxD)

    def of_chunk(index_Z, target_Z):
        nll, logits, weights, total = _chunk(hidden_TxD, head_VxD, index_Z, target_Z, cap)
        of_target = head_VxD[target_Z]
        if cap is not None:
            slope = 1 - jnp.square(logits / cap)
            weights, of_target = weights * slope, jnp.take_along_axis(slope, target_Z[:, None], axis=-1) * of_target
        gradient = jnp.dot(weights.astype(head_VxD.dtype), head_VxD, preferred_element_type=jnp.float32) / total - of_target
        return nll, gradient.astype(hidden_TxD.dtype)

    nll_P, gradient_PxD = _over_chunks(of_chunk, logit_index_P, target_P, num_targets)
    nll_P = jnp.where(_is_target(logit_index_P, num_targets), nll_P, 0.0)
    # The empty array carries the length and dtype of `hidden_TxD`; residuals can only be arrays.
    return nll_P, (gradient_PxD, logit_index_P, num_targets, jnp.zeros((hidden_TxD.shape[0], 0), hidden_TxD.dtype))


def _token_nll_backward(cap, residuals, cotangent_P):
    gradient_PxD, logit_index_P, num_targets, like = residuals
    inside = _is_target(logit_index_P, num_targets)
    # In bfloat16 the factor would keep 8 bits, the same ones for all tokens of a row: its weight would be off by up to 0.4%.
    part_PxD = jnp.where(inside, cotangent_P, 0.0)[:, None] * gradient_PxD.astype(jnp.float32)
    gradient_TxD = jnp.zeros((like.shape[0], gradient_PxD.shape[1]), gradient_PxD.dtype)
    gradient_TxD = gradient_TxD.at[logit_index_P].add(part_PxD.astype(gradient_PxD.dtype), mode="drop")
    return sharding.constrain(gradient_TxD, "rows"), None, None, None, None


token_nll.defvjp(_token_nll_forward, _token_nll_backward)


def token_nll_plain(hidden_TxD, head_VxD, logit_index_P, target_P, num_targets, cap: float | None = None) -> jax.Array:
    """`token_nll`, with derivatives of every order and in both modes. The backward pass computes the logits of a chunk again.

    On a mesh with `fsdp` each chunk gathers the output matrix. `token_nll` gathers it once, but here that would gather its
    gradient, too.
    """
    P = logit_index_P.shape[0]
    size = packing.chunk_size(P)

    @jax.checkpoint
    def chunk(index_Z, target_Z):
        return _chunk(hidden_TxD, head_VxD, index_Z, target_Z, cap)[0]

    def body(first, index_and_target):
        nll_Z = jax.lax.cond(first < num_targets, lambda: chunk(*index_and_target), lambda: jnp.zeros(size, jnp.float32))
        return first + size, nll_Z

    chunks = logit_index_P.reshape(-1, size), target_P.reshape(-1, size)
    _, nll = jax.lax.scan(body, jnp.int32(0), chunks)
    return jnp.where(_is_target(logit_index_P, num_targets), nll.reshape(P), 0.0)


def token_scores(
    hidden_TxD, head_VxD, logit_index_P, target_P, num_targets, cap: float | None = None
) -> tuple[jax.Array, jax.Array]:
    """`token_nll` [P], and whether another token is more likely than the target, bool [P], False at padding. Forward only."""
    head_VxD = _gathered(head_VxD)

    def of_chunk(index_Z, target_Z):
        nll, logits, *_ = _chunk(hidden_TxD, head_VxD, index_Z, target_Z, cap)
        return nll, jnp.argmax(logits, axis=-1) != target_Z

    nll_P, missed_P = _over_chunks(of_chunk, logit_index_P, target_P, num_targets)
    inside = _is_target(logit_index_P, num_targets)
    return jnp.where(inside, nll_P, 0.0), missed_P & inside


def surprises(power_E: jax.Array, length_E: jax.Array) -> jax.Array:
    """The power mean of the NLLs of each row's tokens, nats: between their mean and their maximum.

    Args:
      power_E: Σ_t NLL_t^p over the tokens of the response, p = `POWER`.
      length_E: number of tokens.
    """
    return (power_E / jnp.maximum(length_E, 1)) ** (1 / POWER)


def reduce_tokens(total_E: jax.Array, length_E: jax.Array, reduction: str) -> jax.Array:
    """A sum over the tokens of each response, such as its NLL: per learned token (`mean`), or as it is, eq. (1) (`sum`)."""
    return total_E / jnp.maximum(length_E, 1) if reduction == "mean" else total_E

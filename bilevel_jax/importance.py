"""Importance weights of generated responses: how much each counts in the loss, eqs. (8) and (9)."""

import jax
import jax.numpy as jnp

RESPONSE_WEIGHTS = ("sequence", "geometric", "softmax", "none")
LARGE = 80.0  # bound on log r: e^80 stands for everything larger, since JSON has no infinity


def group_sizes(group_E) -> jax.Array:
    """G of each entry's group, [E]."""
    E = group_E.shape[0]
    return jax.ops.segment_sum(jnp.ones(E), group_E, num_segments=E)[group_E]


def group_softmax(value_E, generated_E, group_E) -> jax.Array:
    """G · softmax of a value over the G entries of its group.

    Args:
      value_E: the logits of the softmax.
      generated_E: bool, the entries that take part.
      group_E: int32, the group of each entry, below E.

    Returns:
      [E] float32, mean 1 over each group; 1 where `generated_E` is False.
    """
    E = generated_E.shape[0]
    group_E = jnp.where(generated_E, group_E, E)  # segment E does not exist: its entries are dropped
    highest_E = jax.ops.segment_max(value_E, group_E, num_segments=E)[group_E]
    likelihood_E = jnp.where(generated_E, jnp.exp(value_E - highest_E), 1.0)
    total_E = jax.ops.segment_sum(likelihood_E, group_E, num_segments=E)[group_E]
    return jnp.where(generated_E, group_sizes(group_E) * likelihood_E / total_E, 1.0)


def response_weights(kind: str, log_prob_E, old_log_prob_E, length_E, group_E, clip: float) -> jax.Array:
    """The factor of each response in the loss.

    It is 1 for responses of the data, and for generated ones

        sequence    min(r, clip), r = exp(log π_θ - log π_old)                                                      (8)
        geometric   min(r^{1/n}, clip), the geometric mean of the n per-token ratios
        softmax     G · λ_g, λ the softmax of log π_θ over the G responses to one question (Lemma 6); mean 1 over them
        none        1

    As λ_g ∝ π_θ(y^g), and r^g ∝ π_θ(y^g) / π_old(y^g), the two agree up to the factor 1/π_old(y^g).

    Args:
      log_prob_E: log π_θ of each whole response, natural logarithm.
      old_log_prob_E: log π_old; NaN marks responses of the data.
      length_E: tokens of each response.
      group_E: the question of each response; entries of one question share a number below E.
      clip: upper bound of a ratio.

    Returns:
      [E] float32.
    """
    generated_E = ~jnp.isnan(old_log_prob_E)
    if kind == "none":
        return jnp.ones_like(log_prob_E)
    if kind == "softmax":
        return group_softmax(log_prob_E, generated_E, group_E)
    log_ratio_E = log_prob_E - jnp.where(generated_E, old_log_prob_E, log_prob_E)
    if kind == "geometric":
        log_ratio_E = log_ratio_E / jnp.maximum(length_E, 1)
    return jnp.minimum(jnp.exp(jnp.minimum(log_ratio_E, LARGE)), clip)

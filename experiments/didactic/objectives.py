"""Objectives of one step as scalars, for small problems: mean losses of pairs, weighted likelihood, best-of-G.

A training step builds the same objectives from `bilevel_jax.preferences`, entry by entry. Axes and equation numbers are those of
that module.
"""

import jax
import jax.numpy as jnp

from bilevel_jax import importance, preferences


def pairs(log_ratio_E, sign_E, share_E, group_E) -> tuple[jax.Array, jax.Array]:
    """Margin [J] and share [J] of every pair; both are 0 where there is no pair.

    Args:
      log_ratio_E, sign_E, group_E: as for `preferences.margins`.
      share_E: weight of the entry's pair in the mean.
    """
    share_J = jax.ops.segment_sum(jnp.where(sign_E > 0, share_E, 0.0), group_E, num_segments=sign_E.shape[0])
    return preferences.margins(log_ratio_E, sign_E, group_E), share_J


def dpo(margin_J: jax.Array, share_J: jax.Array, beta: float) -> jax.Array:
    """Direct preference optimisation: Σ_p share_p · -log σ(β · margin_p), the mean of (2).

    Args:
      margin_J: [log π(chosen) - log π_ref(chosen)] - [log π(rejected) - log π_ref(rejected)] of each pair, summed over tokens.
      share_J: weight of each pair in the mean; 0 for padding.
      beta: inverse temperature of the implied reward.
    """
    return jnp.sum(share_J * preferences.pair_losses("dpo", margin_J, beta))


def ipo(margin_J: jax.Array, share_J: jax.Array, beta: float) -> jax.Array:
    """Identity preference optimisation: Σ_p share_p · (margin_p - 1/2β)², the mean of (3). A margin above 1/2β is reduced.

    Args:
      margin_J, share_J: as for `dpo`.
      beta: strength of the pull towards π_ref, τ in the paper.
    """
    return jnp.sum(share_J * preferences.pair_losses("ipo", margin_J, beta))


def likelihood(log_prob_E, weight_E, share_E) -> jax.Array:
    """Weighted likelihood (4): -Σ_e share_e · stop(weight_e) · log π_e.

    Args:
      log_prob_E: log π of each whole response.
      weight_E: from `best_of`, `preferences.reward_weighted` or `preferences.leave_one_out`; multiplied by
        `importance.response_weights` if an older policy generated the responses.
      share_E: weight in the mean; 1/G of the question's share for each of its G responses, 0 for padding.
    """
    return -jnp.sum(share_E * jax.lax.stop_gradient(weight_E) * log_prob_E)


def _is_best(reward_E, group_E) -> jax.Array:
    """One response of each group, [E] bool: the first of those with its highest reward."""
    E = reward_E.shape[0]
    has_reward_E, group_E = preferences.with_reward(reward_E, group_E)
    highest_E = jax.ops.segment_max(reward_E, group_E, num_segments=E)[group_E]
    index_E = jnp.arange(E)
    first_E = jax.ops.segment_min(jnp.where(reward_E == highest_E, index_E, E), group_E, num_segments=E)[group_E]
    return has_reward_E & (index_E == first_E)


def best_against_worst(reward_E, group_E) -> jax.Array:
    """The pair of online DPO and online IPO as signs [E]: +1 best, -1 worst of G, 0 otherwise; the first of equals.

    A group with equal rewards, or with one response, has no pair: all signs are 0.

    References: Tajwar et al., Preference Fine-Tuning of LLMs Should Leverage Suboptimal, On-Policy Data; for G = 2, Guo et al.,
    Direct Language Model Alignment from Online AI Feedback.
    """
    best_E, worst_E = _is_best(reward_E, group_E), _is_best(-reward_E, group_E)  # the same entry if all rewards are equal
    return best_E.astype(jnp.float32) - worst_E.astype(jnp.float32)


def best_of(reward_E, group_E) -> jax.Array:
    """Weights of best-of-G, [E]: G for the best response, the first of equals, and 0 for the others; 1 without a reward.

    Reference: Dong et al., RAFT: Reward rAnked FineTuning for Generative Foundation Model Alignment, Algorithm 1.
    """
    has_reward_E, group_E = preferences.with_reward(reward_E, group_E)
    return jnp.where(has_reward_E, importance.group_sizes(group_E) * _is_best(reward_E, group_E), 1.0)

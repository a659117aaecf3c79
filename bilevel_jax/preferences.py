"""Objectives that learn which of several responses is better, from summed log-probabilities.

On *pairs*, a loss of the margin m = [log π/π_ref](chosen) - [log π/π_ref](rejected):

    DPO   -log σ(β m)              IPO   (m - 1/2β)²

On the G *responses* y^1 ... y^G that a policy gave to one question, with rewards r^g, a weighted likelihood

    -(1/G) Σ_g stop(w^g) log π(y^g|x),  w^g from     `best_of`           best-of-G
                                                     `reward_weighted`   reward-weighted regression
                                                     `leave_one_out`     REINFORCE with a leave-one-out baseline

or a loss of the pair of `best_against_worst`: online DPO and online IPO. Weights and signs hang on rewards alone, so they are
known before the forward pass, whatever micro-batches the responses to one question lie in; of a pair, both must lie in one.
Negative weights and rejected responses are pushed down, the others are only ever pulled up.

Entries E are those of `packing.Batch`: entries of one question share a number `group_E` below E, and E stands for none. A reward
is NaN where there is none to compare: responses of the data, and padding.
"""

import jax
import jax.numpy as jnp

from bilevel_jax import importance

PAIRS = ("dpo", "ipo")  # losses of pairs
RANKED = ("rwr", "reinforce")  # likelihoods of all G responses, weighted by their rewards

# --------------------------------------------------------------------------------------------------------------------
# Pairs
# --------------------------------------------------------------------------------------------------------------------


def pairs(log_ratio_E, sign_E, share_E, group_E) -> tuple[jax.Array, jax.Array]:
    """Margin and share of every pair, [P] with P = E: those of group p stand at p, and both are 0 where there is no pair.

    Args:
      log_ratio_E: log π - log π_ref of each response, sums over tokens (means, where pairs of unequal length shall count alike).
      sign_E: +1 chosen, -1 rejected, 0 otherwise.
      share_E: weight of the entry's pair in the mean.
      group_E: which pair; E for none.
    """
    E = log_ratio_E.shape[0]
    margin_P = jax.ops.segment_sum(sign_E * log_ratio_E, group_E, num_segments=E)
    return margin_P, jax.ops.segment_sum(jnp.where(sign_E > 0, share_E, 0.0), group_E, num_segments=E)


def dpo(margin_P: jax.Array, share_P: jax.Array, beta: float) -> jax.Array:
    """Direct preference optimisation: Σ_p share_p · -log σ(β · margin_p).

    Args:
      margin_P: [log π(chosen) - log π_ref(chosen)] - [log π(rejected) - log π_ref(rejected)] of each pair, sums over tokens.
      share_P: weight of each pair in the mean; 0 for padding.
      beta: inverse temperature of the implied reward.

    Reference: Rafailov et al., Direct Preference Optimization, eq. (7).
    """
    return jnp.sum(share_P * pair_losses("dpo", margin_P, beta))


def ipo(margin_P: jax.Array, share_P: jax.Array, beta: float) -> jax.Array:
    """Identity preference optimisation: Σ_p share_p · (margin_p - 1/2β)². A margin beyond 1/2β is pulled back.

    Args:
      margin_P, share_P: as for `dpo`. The paper takes sums over tokens; trl takes each log-ratio's mean over its own tokens.
      beta: strength of the pull towards π_ref, the paper's τ.

    Reference: Azar et al., A General Theoretical Paradigm to Understand Learning from Human Preferences, eq. (17).
    """
    return jnp.sum(share_P * pair_losses("ipo", margin_P, beta))


def pair_losses(kind: str, margin_P: jax.Array, beta: float) -> jax.Array:
    """The loss of each pair [P] by itself, `dpo` or `ipo`."""
    return jax.nn.softplus(-beta * margin_P) if kind == "dpo" else (margin_P - 1 / (2 * beta)) ** 2


# --------------------------------------------------------------------------------------------------------------------
# Several responses to one question
# --------------------------------------------------------------------------------------------------------------------


def likelihood(log_prob_E, weight_E, share_E) -> jax.Array:
    """Weighted likelihood: -Σ_e share_e · stop(weight_e) · log π_e.

    Args:
      log_prob_E: log π of each whole response.
      weight_E: of `best_of`, `reward_weighted` or `leave_one_out`; times `online.response_weights` where the responses are those
        of an older policy.
      share_E: weight in the mean, of G responses to one question 1/G of the question's; 0 for padding.
    """
    return -jnp.sum(share_E * jax.lax.stop_gradient(weight_E) * log_prob_E)


def _ranked(reward_E, group_E) -> tuple[jax.Array, jax.Array]:
    """Which responses have a reward, and their groups, with E for the others."""
    E = reward_E.shape[0]
    own_E = ~jnp.isnan(reward_E) & (group_E < E)
    return own_E, jnp.where(own_E, group_E, E)


def _sizes(group_E) -> jax.Array:
    """G of each entry's group."""
    E = group_E.shape[0]
    return jax.ops.segment_sum(jnp.ones(E), group_E, num_segments=E)[group_E]


def _is_best(reward_E, group_E) -> jax.Array:
    """One response of each group, [E] bool: the first of those with its highest reward."""
    E = reward_E.shape[0]
    own_E, group_E = _ranked(reward_E, group_E)
    highest_E = jax.ops.segment_max(reward_E, group_E, num_segments=E)[group_E]
    place_E = jnp.arange(E)
    first_E = jax.ops.segment_min(jnp.where(reward_E == highest_E, place_E, E), group_E, num_segments=E)[group_E]
    return own_E & (place_E == first_E)


def best_against_worst(reward_E, group_E) -> jax.Array:
    """The pair of online DPO and online IPO, as signs [E]: +1 best, -1 worst of G, 0 otherwise; the first of equals.

    A group whose rewards are all equal, or of one response, has no pair: all 0.

    References: Tajwar et al., Preference Fine-Tuning of LLMs Should Leverage Suboptimal, On-Policy Data; for G = 2, Guo et al.,
    Direct Language Model Alignment from Online AI Feedback.
    """
    best_E, worst_E = _is_best(reward_E, group_E), _is_best(-reward_E, group_E)  # one and the same where all are equal
    return best_E.astype(jnp.float32) - worst_E.astype(jnp.float32)


def best_of(reward_E, group_E) -> jax.Array:
    """Best-of-G: w = G for the best response, the first of equals, and 0 for the others; 1 without a reward.

    Reference: Dong et al., RAFT: Reward rAnked FineTuning for Generative Foundation Model Alignment, Algorithm 1.
    """
    own_E, group_E = _ranked(reward_E, group_E)
    return jnp.where(own_E, _sizes(group_E) * _is_best(reward_E, group_E), 1.0)


def reward_weighted(reward_E, group_E, beta: float) -> jax.Array:
    """Reward-weighted regression: w^g = G · exp(r^g/β) / Σ_h exp(r^h/β), mean 1 over a group; 1 without a reward.

    The normaliser makes it an estimate of the maximum likelihood of π_old · exp(r/β) / Z, question by question.

    Reference: Peters and Schaal, Reinforcement Learning by Reward-Weighted Regression for Operational Space Control.
    """
    own_E, group_E = _ranked(reward_E, group_E)
    return importance.group_softmax(reward_E / beta, own_E, group_E)


def leave_one_out(reward_E, group_E) -> jax.Array:
    """REINFORCE: w^g = r^g - (1/(G-1)) Σ_{h≠g} r^h; 0 for a group of one, 1 without a reward.

    -(1/G) Σ_g w^g ∇log π(y^g) has expectation -∇ E_π[r], as the baseline does not hang on y^g.

    References: Kool et al., Buy 4 REINFORCE Samples, Get a Baseline for Free!; Ahmadian et al., Back to Basics (RLOO).
    """
    E = reward_E.shape[0]
    own_E, group_E = _ranked(reward_E, group_E)
    number_E = _sizes(group_E)
    total_E = jax.ops.segment_sum(jnp.where(own_E, reward_E, 0.0), group_E, num_segments=E)[group_E]
    advantage_E = (number_E * reward_E - total_E) / jnp.maximum(number_E - 1, 1)
    return jnp.where(own_E, advantage_E, 1.0)

"""Losses of preference pairs, and weights of several responses to one question, from log-probabilities and rewards.

A pair has a loss of its margin m:

    m = [log π/π_ref](chosen) - [log π/π_ref](rejected)                                     (R1)
    DPO   -log σ(β m)                                                                       (R2)
    IPO   (m - 1/2β)²                                                                       (R3)

The G responses y^1 ... y^G of a policy to one question, with rewards r^g, have a weighted likelihood:

    -(1/G) Σ_g stop(w^g) log π(y^g|x)                                                       (R4)
    w^g = G exp(r^g/β) / Σ_h exp(r^h/β)      `reward_weighted`                              (R5)
    w^g = r^g - (1/(G-1)) Σ_{h≠g} r^h        `leave_one_out`                                 (R6)

The numbers are those of this module; `step` has the equations of the paper. Weights depend on rewards alone, so they are known
before the forward pass, whichever micro-batches hold the responses to a question. Both responses of a pair must be in one
micro-batch.

Axes: E entries, those of `packing.Batch`; J pairs, with J = E. Entries of one question share a number `group_E` below E, and E
means no group. A reward is NaN for entries without one: responses of the data, and padding.
"""

import jax
import jax.numpy as jnp

from bilevel_jax import importance

PAIRS = ("dpo", "ipo")  # losses of pairs
RANKED = ("rwr", "reinforce")  # likelihoods of all G responses, weighted by their rewards

# --------------------------------------------------------------------------------------------------------------------
# Pairs
# --------------------------------------------------------------------------------------------------------------------


def margins(log_ratio_E, sign_E, group_E) -> jax.Array:
    """Margin (R1) of every pair, [J]. The pair of group p has index p; 0 where there is no pair.

    Args:
      log_ratio_E: log π - log π_ref of each response, summed over tokens (or averaged, to weight long and short pairs equally).
      sign_E: +1 chosen, -1 rejected, 0 otherwise.
      group_E: the pair of each entry; E for none.
    """
    return jax.ops.segment_sum(sign_E * log_ratio_E, group_E, num_segments=log_ratio_E.shape[0])


def pair_losses(kind: str, margin_J: jax.Array, beta: float) -> jax.Array:
    """The loss of each pair [J]: (R2) for `dpo`, (R3) for `ipo`.

    Args:
      kind: `dpo` or `ipo`.
      margin_J: (R1) of each pair.
      beta: DPO: inverse temperature of the implied reward. IPO: strength of the pull towards π_ref, τ in the paper.

    References: Rafailov et al., Direct Preference Optimization, eq. (7); Azar et al., A General Theoretical Paradigm to Understand
    Learning from Human Preferences, eq. (17). The IPO paper sums log-ratios over tokens; trl averages them.
    """
    return jax.nn.softplus(-beta * margin_J) if kind == "dpo" else (margin_J - 1 / (2 * beta)) ** 2


# --------------------------------------------------------------------------------------------------------------------
# Several responses to one question
# --------------------------------------------------------------------------------------------------------------------


def with_reward(reward_E, group_E) -> tuple[jax.Array, jax.Array]:
    """The entries that have a reward [E] bool, and their groups [E], with E for all other entries."""
    E = reward_E.shape[0]
    has_reward_E = ~jnp.isnan(reward_E) & (group_E < E)
    return has_reward_E, jnp.where(has_reward_E, group_E, E)


def reward_weighted(reward_E, group_E, beta: float) -> jax.Array:
    """Weights (R5) of reward-weighted regression, [E]: mean 1 over a group; 1 without a reward.

    The normaliser makes (R4) an estimate of the maximum likelihood of π_old · exp(r/β) / Z, for each question.

    Reference: Peters and Schaal, Reinforcement Learning by Reward-Weighted Regression for Operational Space Control.
    """
    has_reward_E, group_E = with_reward(reward_E, group_E)
    return importance.group_softmax(reward_E / beta, has_reward_E, group_E)


def leave_one_out(reward_E, group_E) -> jax.Array:
    """Weights (R6) of REINFORCE with a leave-one-out baseline, [E]: 0 for a group of one, 1 without a reward.

    The gradient of (R4) has expectation -∇ E_π[r], since the baseline of y^g does not depend on y^g.

    References: Kool et al., Buy 4 REINFORCE Samples, Get a Baseline for Free!; Ahmadian et al., Back to Basics (RLOO).
    """
    E = reward_E.shape[0]
    has_reward_E, group_E = with_reward(reward_E, group_E)
    number_E = importance.group_sizes(group_E)
    total_E = jax.ops.segment_sum(jnp.where(has_reward_E, reward_E, 0.0), group_E, num_segments=E)[group_E]
    advantage_E = (number_E * reward_E - total_E) / jnp.maximum(number_E - 1, 1)
    return jnp.where(has_reward_E, advantage_E, 1.0)

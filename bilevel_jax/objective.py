"""The losses of a step: which are taken for each level, and the loss of every entry under them.

Either level can learn from pairs: L0 or ℓ_b is then the DPO or IPO loss of a row's chosen and rejected response. Where rewards
compare the generated responses to question b, `Objective.generated` says how ℓ_b uses them:

    rwr, reinforce   (1/G) Σ_g stop(r^g w^g) ℓ(θ; x, y^g), w^g from the G rewards, see `preferences`
    best_of          r ℓ(θ; x, y) of the best response alone
    dpo, ipo         the loss of the best against the worst response, without r; nothing where all rewards are equal

The cost C_b compares rows, so it is the same measure for all of them, whatever the reward. Where the rows of the data have ℓ, it is
the plain mean of ℓ over the generated responses, and for `best_of`, `dpo` and `ipo` the ℓ of the best; where they have pairs, it is
the loss of the generated pair, and a question without one has no cost.
"""

import dataclasses

import jax
import jax.numpy as jnp

from bilevel_jax import importance, losses, preferences
from bilevel_jax import selector as selection
from bilevel_jax.data import packing

COEFFICIENTS = ("next", "current")
COSTS = ("influence", "loss")
VALUE_FUNCTIONS = ("zero", "tracked")
LOSSES = ("sft", *preferences.PAIRS)
RESPONSE_LOSSES = (*LOSSES, "best_of", *preferences.RANKED)
REDUCTIONS = ("mean", "sum")


@dataclasses.dataclass(frozen=True)
class Objective:
    """Which losses are taken, and at which parameters.

    Attributes:
      upper: L0: `sft` (mean of ℓ), `dpo` or `ipo`.
      lower: ℓ_b of the rows of the data, one of the same three.
      generated: how ℓ_b uses the generated responses to a question: one of these, `best_of`, `rwr` or `reinforce`. If `lower` is
        `dpo` or `ipo`, it must be the same.
      beta: β of DPO and IPO.
      reward_temperature: β of reward-weighted regression.
      reduction: ℓ per token (`mean`), or summed over the response, eq. (1) (`sum`). It applies to the log-ratios of IPO too; those
        of DPO are always sums.
      cost: C_b, what lowers a row's weight: its `loss` (10b, the paper), or `influence`, what it does to the trusted rows and how
        unlikely its tokens are, (I2) in `influence`. `Objective()` takes `loss`, the configuration `influence`.
      coefficient_at: with `cost="loss"`, the θ at which C_b is taken: θ^{k+1} (`next`, eq. (10c)) or θ^k (`current`).
      value_function: `zero`: v(ω) ≡ 0, which holds under Assumption 1; `tracked`: a second adapter θ' follows the weighted
        lower level alone and C_b = ℓ_b(θ) - ℓ_b(θ'), eq. (44) without that assumption.
      response_weight: the factor of each generated response, see `importance.response_weights`.
      clip: upper bound of an importance ratio.
    """

    upper: str = "sft"
    lower: str = "sft"
    generated: str = "sft"
    beta: float = 0.1
    reward_temperature: float = 1.0
    reduction: str = "mean"
    cost: str = "loss"
    coefficient_at: str = "next"
    value_function: str = "zero"
    response_weight: str = "sequence"
    clip: float = 2.0

    def __post_init__(self):
        for field, key, allowed in (
            ("upper", "loss.upper", LOSSES),
            ("lower", "loss.lower", LOSSES),
            ("generated", "online.objective", RESPONSE_LOSSES),
            ("reduction", "loss.reduction", REDUCTIONS),
            ("cost", "selection.cost", COSTS),
            ("coefficient_at", "selection.coefficient_at", COEFFICIENTS),
            ("value_function", "selection.value_function", VALUE_FUNCTIONS),
            ("response_weight", "online.response_weight", importance.RESPONSE_WEIGHTS),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{key}={getattr(self, field)!r} is not among {', '.join(allowed)}")
        if self.cost == "influence" and self.value_function != "zero":
            raise ValueError("selection.value_function=tracked is a cost of losses; take selection.cost=loss")
        if not self.beta > 0:
            raise ValueError(f"loss.beta must be positive, got {self.beta}")
        if not self.reward_temperature > 0:
            raise ValueError(f"online.reward_temperature must be positive, got {self.reward_temperature}")
        if not self.clip >= 1:
            raise ValueError(f"online.clip must be at least 1, got {self.clip}")


def check_combination(objective: Objective, selector: selection.Selector) -> None:
    """Refuses options that weights of tokens, or the order of (46)-(48), do not support.

    Raises:
      ValueError: one line that names the key.
    """
    values = {
        "selection.rule": selector.rule,
        "selection.cost": objective.cost,
        "selection.coefficient_at": objective.coefficient_at,
        "selection.value_function": objective.value_function,
        "loss.lower": objective.lower,
    }
    required = {"selection.cost": "loss", "selection.value_function": "zero"}
    if selector.token_learning_rate:
        cause = "selection.unit=token follows (10b) at θ^{k+1} on losses of tokens"
        required |= {"selection.rule": "bds", "selection.coefficient_at": "next", "loss.lower": "sft"}
    elif selector.order == "paper":  # (10a) and (10b) move θ first, as `joint` does
        cause = "selection.order=paper moves ω before θ, by (48) at θ^k"
        required |= {"selection.rule": "bmo", "selection.coefficient_at": "current"}
    else:
        return
    for key, value in values.items():  # in this order, so that the error names the first key
        if value != required.get(key, value):
            raise ValueError(f"{cause}: {key}={value} must be {required[key]}")


def entry_losses(kind: str, objective: Objective, batch: packing.Batch, nll_E, m=None) -> jax.Array:
    """The loss of each entry [E]: ℓ for `sft`; for `dpo` and `ipo` that of its pair, 0 for entries of no pair.

    Args:
      kind: `sft`, `dpo` or `ipo`.
      nll_E: summed NLL of each response, nats.
      m: with it, `nll_E` is of micro-batch m alone, and so are the pairs: both responses of one are in the same micro-batch.
    """
    if kind == "sft":
        return losses.reduce_tokens(nll_E, batch.packed.length, objective.reduction)
    E = nll_E.shape[0]
    log_ratio_E = -nll_E - batch.reference
    if kind == "ipo":
        log_ratio_E = losses.reduce_tokens(log_ratio_E, batch.packed.length, objective.reduction)
    margin_J = preferences.margins(log_ratio_E, batch.sign, batch.group)
    paired_E = batch.sign != 0
    if m is not None:
        # By pair: a response of one token without a question has no target, and its pair still has a loss.
        group_P = batch.group.at[batch.packed.entry[m]].get(mode="fill", fill_value=E)
        in_micro_J = jnp.zeros(E, bool).at[group_P].set(True, mode="drop")
        paired_E &= in_micro_J.at[batch.group].get(mode="fill", fill_value=False)
    loss_J = preferences.pair_losses(kind, margin_J, objective.beta)
    return jnp.where(paired_E, loss_J.at[batch.group].get(mode="fill", fill_value=0.0), 0.0)


def entry_surprises(objective: Objective, batch: packing.Batch, power_E, loss_E) -> jax.Array:
    """How unlikely the model finds each entry [E] of the lower level: `losses.surprises`; of pairs, their loss.

    Args:
      power_E: of each response, from `forward.micro_nll_and_power`.
      loss_E: from `entry_losses`.
    """
    return losses.surprises(power_E, batch.packed.length) if objective.lower == "sft" else loss_E


def lower_losses(objective: Objective, batch: packing.Batch, nll_E, m=None) -> jax.Array:
    """`entry_losses` of the lower level, with generated responses used as `objective.generated` says."""
    loss_E = entry_losses(objective.lower, objective, batch, nll_E, m)
    if objective.generated == "rwr":
        return preferences.reward_weighted(batch.reward, batch.group, objective.reward_temperature) * loss_E
    if objective.generated == "reinforce":
        return preferences.leave_one_out(batch.reward, batch.group) * loss_E
    if objective.generated in preferences.PAIRS and objective.lower == "sft":
        generated_E = ~jnp.isnan(batch.old_log_prob)
        return jnp.where(generated_E, entry_losses(objective.generated, objective, batch, nll_E, m), loss_E)
    return loss_E

"""The parameters of the lowest trusted loss so far (`eval.keep_best`), and when to stop (`eval.patience`)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bilevel_jax import config as configuration

MEASURE, PAIR_MEASURE = "eval/upper_loss", "eval/upper_pair_loss"  # of the held-out trusted rows; of pairs, the second one


class Best(NamedTuple):
    """The best evaluation of a run so far."""

    loss: float  # from `trusted_loss`
    step: int  # steps taken before it
    stale: int  # evaluations since then
    adapter: dict | None  # θ at that time; None without `eval.keep_best`

    def counters(self) -> dict:
        """What a checkpoint keeps beside θ, as a JSON object."""
        return {"loss": self.loss, "step": self.step, "stale": self.stale}


def trusted_loss(values: dict[str, float]) -> float:
    """The loss of the held-out trusted rows in an evaluation; of pairs, the one that is trained on."""
    return values[PAIR_MEASURE if PAIR_MEASURE in values else MEASURE]


def start(config: configuration.Config, values: dict[str, float], adapter) -> Best | None:
    """The evaluation before the first step; None if the run neither keeps the best parameters nor stops early."""
    if not (config.eval.keep_best or config.eval.patience):
        return None
    return Best(trusted_loss(values), 0, 0, _copy(adapter) if config.eval.keep_best else None)


def restore(counters: dict | None, adapter) -> Best | None:
    """The best evaluation from a checkpoint."""
    return Best(**counters, adapter=adapter) if counters else None


def update(best: Best | None, values: dict[str, float], step: int, adapter) -> Best | None:
    """The best evaluation, after one more at `step`."""
    if best is None:
        return None
    if trusted_loss(values) < best.loss:
        return Best(trusted_loss(values), step, 0, None if best.adapter is None else _copy(adapter))
    return best._replace(stale=best.stale + 1)


def is_over(best: Best | None, patience: int) -> bool:
    """Whether the run ends here: the last `patience` evaluations were no better than one before."""
    return best is not None and 0 < patience <= best.stale


def _copy(adapter):
    """The next step donates the buffers of θ."""
    return jax.tree.map(jnp.copy, adapter)

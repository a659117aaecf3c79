"""Scores of the rows of a test bed by the project's rules and by their rivals: one number a row, higher is better.

All see the same model, the same rows and the same number of steps.
"""

from collections.abc import Callable

import numpy as np

from bilevel_jax import scoring
from bilevel_jax import selector as selection
from experiments.selection import scores
from experiments.selection.retraining import Bed

MIRROR = selection.Selector()
OURS, LOSS, EXACT = "influence (default)", "loss (the paper's rule)", "exact metagradient"
ROUGH, OWN = "exact metagradient, rough training", "exact metagradient, own trusted rows"
TRACKED, RANDOM = "tracked v(ω)", "random"
CHECKPOINTS = 3
AVERAGED = 4  # metagradients


def influence(bed: Bed, seed: int) -> np.ndarray:
    return np.asarray(bed.select("influence", MIRROR, seed).selector.logits)


def loss_rule(bed: Bed, seed: int) -> np.ndarray:
    return np.asarray(bed.select("loss", MIRROR, seed).selector.logits)


def tracked(bed: Bed, seed: int) -> np.ndarray:
    return np.asarray(bed.select("loss", MIRROR, seed, "tracked").selector.logits)


def exact(bed: Bed, seed: int) -> np.ndarray:
    """Minus dL0(θ^T)/dw over the steering rows, at equal weights, of smooth training."""
    return -bed.smooth.metagradient(np.ones(bed.N), seed, bed.steering)


def exact_of_rough_training(bed: Bed, seed: int) -> np.ndarray:
    """Minus dL0(θ^T)/dw over the steering rows, at the learning rate of the bed: the mean of `AVERAGED` orders, in each at the
    weights of a random half.

    With large steps the derivative at a point says little about rows that are left out, a large change."""
    rng = np.random.default_rng([seed, 78])
    halves = [2.0 * (rng.permutation(bed.N) < bed.N // 2) for _ in range(AVERAGED)]
    return -np.mean([bed.metagradient(half, seed + k, bed.steering) for k, half in enumerate(halves)], axis=0)


def exact_on_own_rows(bed: Bed, seed: int) -> np.ndarray:
    """As `exact`, over the trusted rows that are trained on."""
    return -bed.smooth.metagradient(np.ones(bed.N), seed, scoring.example_segments(bed.setup.upper.examples))


def row_losses(bed: Bed, adapter) -> np.ndarray:
    return scores.losses_of(lambda *args: bed.score(*args)[:2], bed.setup.base, adapter, bed.setup.lower.examples)


def base_loss(bed: Bed, seed: int) -> np.ndarray:
    return -row_losses(bed, None)


def trusted_loss(bed: Bed, seed: int) -> np.ndarray:
    return -row_losses(bed, bed.train(np.ones(bed.N), seed, levels=(1.0, 0.0)))


def excess_loss(bed: Bed, seed: int) -> np.ndarray:
    mixed = row_losses(bed, bed.train(np.ones(bed.N), seed, levels=(0.0, 1.0)))
    return mixed + trusted_loss(bed, seed)


def less(bed: Bed, seed: int) -> np.ndarray:
    _, learners = bed.train(np.ones(bed.N), seed, keep_states=True)
    steps = np.linspace(0, len(learners), CHECKPOINTS + 1).astype(int)[1:] - 1
    upper = bed.setup.upper
    rate = bed.config.optimizer.learning_rate
    return scores.less(
        bed.setup.model,
        bed.setup.base,
        [learners[k] for k in steps],
        upper.examples,
        bed.setup.lower.examples,
        targets=np.unique([row.source for row in upper.rows], return_inverse=True)[1],
        learning_rates=[rate] * CHECKPOINTS,
    )


def rds(bed: Bed, seed: int) -> np.ndarray:
    c = bed.config
    examples = bed.setup.upper.examples, bed.setup.lower.examples
    return scores.rds(bed.setup.model, bed.setup.base, *examples, c.batch.micro_size, c.data.max_length, bed.setup.mesh)


def dsir(bed: Bed, seed: int) -> np.ndarray:
    return scores.importance(bed.setup.upper.rows, bed.setup.lower.rows)


def ifd(bed: Bed, seed: int) -> np.ndarray:
    return scores.difficulty(lambda *args: bed.score(*args)[:2], bed.setup.base, bed.setup.lower.examples)


def random(bed: Bed, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, 77]).random(bed.N)


CANDIDATES: dict[str, Callable[[Bed, int], np.ndarray]] = {  # (bed, seed of the order) -> [N]
    EXACT: exact,
    ROUGH: exact_of_rough_training,
    OWN: exact_on_own_rows,
    OURS: influence,
    LOSS: loss_rule,
    TRACKED: tracked,
    "LESS": less,
    "RDS+": rds,
    "DSIR": dsir,
    "IFD": ifd,
    "−ℓ, base model": base_loss,
    "−ℓ, trusted rows": trusted_loss,
    "excess loss": excess_loss,
    RANDOM: random,
}

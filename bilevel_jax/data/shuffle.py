"""The rows of each step: a pure function of (seed, step), so that a resumed run continues exactly where it stopped."""

import functools

import numpy as np

from bilevel_jax import random_streams


# Two caches: a batch may take many passes over a small upper level, which must not displace the order of a large lower one.
@functools.lru_cache(maxsize=2)
def _lower_order(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, random_streams.LOWER_ORDER, epoch)).permutation(size)


@functools.lru_cache(maxsize=4)
def _upper_pass(seed: int, number: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, random_streams.UPPER_ORDER, number)).permutation(size)


def steps_per_epoch(size: int, batch: int) -> int:
    """Steps per pass over all rows; the last one may be smaller."""
    return -(-size // batch)


def lower_rows(seed: int, size: int, batch: int, step: int) -> np.ndarray:
    """Row indices of the lower level in `step`: every row once per epoch."""
    epoch, step_in_epoch = divmod(step, steps_per_epoch(size, batch))
    return _lower_order(seed, epoch, size)[step_in_epoch * batch :][:batch]


def upper_rows(seed: int, size: int, batch: int, step: int) -> np.ndarray:
    """Row indices of the upper level in `step`: shuffled passes, concatenated and cut into batches of equal size."""
    first = step * batch
    passes = range(first // size, (first + batch - 1) // size + 1)
    rows = np.concatenate([_upper_pass(seed, number, size) for number in passes])
    return rows[first % size :][:batch]

"""Which rows a step sees: a pure function of (seed, step), so that a resumed run continues exactly where it stood."""

import functools

import numpy as np

LOWER, UPPER = 0, 1  # tags that keep the two levels' shuffles apart


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, tag: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, tag, epoch)).permutation(size)


def steps_per_epoch(size: int, batch: int) -> int:
    """Steps in which every row is seen once; the last one may be smaller."""
    return -(-size // batch)


def lower_rows(seed: int, size: int, batch: int, step: int) -> np.ndarray:
    """Rows of the lower level in `step`, without replacement within an epoch; every row once an epoch."""
    epoch, place = divmod(step, steps_per_epoch(size, batch))
    return _permutation(seed, LOWER, epoch, size)[place * batch : (place + 1) * batch]


def upper_rows(seed: int, size: int, batch: int, step: int) -> np.ndarray:
    """Rows of the upper level in `step`: an endless sequence of shuffled passes, cut into batches without regard to passes."""
    first = step * batch
    passes = range(first // size, (first + batch - 1) // size + 1)
    ahead = np.concatenate([_permutation(seed, UPPER, number, size) for number in passes])
    return ahead[first % size :][:batch]

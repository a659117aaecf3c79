"""How much rows are like the trusted ones, and like which: the columns `similar` and `nearest` of the weights.

A weight says what a row does to the trusted loss. That need not tell a kind of row which the trusted rows never have: the gradients
of answers that comply with a harmful request agree at first with those of answers that refuse one. The frozen base model tells the
kinds apart. `similar` is the mean of `features`' two scores, (F1) and (F2), each standardised over the rows:

    cca_score           does the answer fit its question as answers of trusted rows fit theirs?
    log_density_ratio   are such a question and such an answer more frequent among the trusted rows?

`nearest` is the trusted row whose question and answer are closest in the principal coordinates of `features`. A small share of the
rows is kept round-robin over the trusted rows, so that it covers what these ask for (`export.selected_rows.choose`).

Both take one forward pass through half of the layers, at the end of a run. They train nothing, and no weight depends on them.
"""

from typing import NamedTuple

import numpy as np

from bilevel_jax import config as configuration
from bilevel_jax import features, random_streams
from bilevel_jax import setup as setups
from bilevel_jax.data import levels

FITTED = 10_000  # rows of each level to which the scores are fitted, drawn at random if there are more
MIN_TRUSTED = 16  # trusted rows; fewer say too little
COMPARED = 1000  # rows that are compared at once with all trusted ones


class Likeness(NamedTuple):
    """What is measured of the N rows to select from."""

    similar: np.ndarray  # [N] float32, mean 0 over the rows to which it was fitted
    nearest: np.ndarray  # [N] int32, index of a trusted row


def _means(config: configuration.Config, setup: setups.Setup, level: levels.Level, rows, description: str) -> np.ndarray:
    """`features.pooled` of some rows of a level."""
    examples = [level.examples[i] for i in rows]
    size, length = config.batch.micro_size, config.data.max_length
    return features.pooled(setup.model, setup.base, examples, size, length, setup.mesh, description)


def nearest(some_nxd: np.ndarray, others_txd: np.ndarray) -> np.ndarray:
    """The index of the closest of the others, [n] int32: argmin_j |x_i - y_j|² = argmin_j |y_j|² - 2 x_i·y_j."""
    square_t, closest_n = (others_txd**2).sum(axis=1), np.empty(len(some_nxd), np.int32)
    for first in range(0, len(some_nxd), COMPARED):
        part = slice(first, first + COMPARED)
        closest_n[part] = (square_t - 2 * some_nxd[part] @ others_txd.T).argmin(axis=1)
    return closest_n


def measure(config: configuration.Config, setup: setups.Setup) -> Likeness | None:
    """Compares each lower-level row with the trusted rows, with at most `FITTED` of them, drawn at random.

    Memory for hidden states is bounded: `FITTED` rows at a time.

    Args:
      config: of the run.
      setup: of the run; its base is used, and no adapter.

    Returns:
      None with fewer than `MIN_TRUSTED` trusted rows.
    """
    num_upper, num_lower = len(setup.upper.examples), len(setup.lower.examples)
    if num_upper < MIN_TRUSTED:
        return None
    drawn = (
        np.random.default_rng([config.seed, random_streams.SIMILARITY, n]).permutation(n)[:FITTED] for n in (num_lower, num_upper)
    )
    lower, upper = (np.sort(rows) for rows in drawn)
    fitted = _means(config, setup, setup.lower, lower, "rows to compare")
    trusted = _means(config, setup, setup.upper, upper, "trusted rows to compare with")
    encoder = features.fit(fitted, trusted)
    trusted_txd = features.coordinates(encoder, trusted)

    def compare(means: np.ndarray) -> Likeness:
        near = upper[nearest(features.coordinates(encoder, means), trusted_txd)]
        return Likeness(features.similarity(encoder, means), near.astype(np.int32))

    if num_lower <= FITTED:
        return compare(fitted)
    result = Likeness(np.empty(num_lower, np.float32), np.empty(num_lower, np.int32))
    for first in range(0, num_lower, FITTED):
        block = range(first, min(first + FITTED, num_lower))
        part = compare(_means(config, setup, setup.lower, block, f"rows to compare, {block.stop:,} of {num_lower:,}"))
        for whole, values in zip(result, part):
            whole[block.start : block.stop] = values
    return result

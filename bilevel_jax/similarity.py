"""How much rows are like the trusted ones: the column `similar` of the weights.

A weight says what a row does to the trusted loss. That need not tell a kind of row which the trusted rows never have: the gradients
of answers that comply with a harmful request agree at first with those of answers that refuse one. The frozen base model tells the
kinds apart. The number is the mean of `features`' two scores, (F1) and (F2), each standardised over the rows:

    cca_score           does the answer fit its question as answers of trusted rows fit theirs?
    log_density_ratio   are such a question and such an answer more frequent among the trusted rows?

It takes one forward pass through half of the layers, at the end of a run. It trains nothing, and no weight depends on it.
"""

import numpy as np

from bilevel_jax import config as configuration
from bilevel_jax import features
from bilevel_jax import setup as setups
from bilevel_jax.data import levels

FITTED = 10_000  # rows of each level to which the scores are fitted, drawn at random if there are more
MIN_TRUSTED = 16  # trusted rows; fewer say too little
DRAW = 4  # tag of the random stream


def _means(config: configuration.Config, setup: setups.Setup, level: levels.Level, rows, description: str) -> np.ndarray:
    """`features.pooled` of some rows of a level."""
    examples = [level.examples[i] for i in rows]
    size, length = config.batch.micro_size, config.data.max_length
    return features.pooled(setup.model, setup.base, examples, size, length, setup.mesh, description)


def measure(config: configuration.Config, setup: setups.Setup) -> np.ndarray | None:
    """The similarity of each lower-level row to the trusted rows.

    Memory for hidden states is bounded: `FITTED` rows at a time.

    Args:
      config: of the run.
      setup: of the run; its base is used, and no adapter.

    Returns:
      [N] float32, mean 0 over the rows to which it was fitted; None with fewer than `MIN_TRUSTED` trusted rows.
    """
    num_upper, num_lower = len(setup.upper.examples), len(setup.lower.examples)
    if num_upper < MIN_TRUSTED:
        return None
    drawn = (np.random.default_rng([config.seed, DRAW, n]).permutation(n)[:FITTED] for n in (num_lower, num_upper))
    lower, upper = (np.sort(rows) for rows in drawn)
    fitted = _means(config, setup, setup.lower, lower, "rows to compare")
    encoder = features.fit(fitted, _means(config, setup, setup.upper, upper, "trusted rows to compare with"))
    if num_lower <= FITTED:
        return features.similarity(encoder, fitted)
    similar = np.empty(num_lower, np.float32)
    for first in range(0, num_lower, FITTED):
        block = range(first, min(first + FITTED, num_lower))
        similar[block.start : block.stop] = features.similarity(
            encoder, _means(config, setup, setup.lower, block, f"rows to compare, {block.stop:,} of {num_lower:,}")
        )
    return similar

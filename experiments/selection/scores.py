"""Rankings of training rows by what others use: one number a row, higher is better. Each is a function of rows or of the model.

The rows to select from are the lower level's, the trusted ones the upper level's.
"""

import collections
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax import forward, scoring
from bilevel_jax.data import levels, packing, rows
from bilevel_jax.models import decoder

BUCKETS = 10_000  # of hashed n-grams, as in DSIR's code
SHORTEST = 32  # tokens; rows are padded to this, doubled until they fit
CHUNK = 32  # rows whose gradients are taken in one call


def losses_of(score, base, adapter, examples) -> np.ndarray:
    """ℓ [n] of each row; `score` is from `scoring.make_scorer`."""
    nll, length = score(base, adapter, scoring.example_segments(examples), "losses")
    return nll / np.maximum(length, 1)


def difficulty(score, base, examples) -> np.ndarray:
    """IFD (Li et al. 2024): ℓ(y | x) / ℓ(y), how little the question helps with the answer. Above 1 it misleads: such a row counts
    as worse than all others, as its authors leave it out. The first token of an answer, which nothing predicts in ℓ(y), is in
    neither."""
    alone = [packing.Segment(one.response[:1], one.response[1:]) for one in examples]
    given = [packing.Segment(np.concatenate([one.prompt, one.response[:1]]), one.response[1:]) for one in examples]
    sums = [score(base, None, segments, "difficulty")[0] for segments in (given, alone)]
    ratio = sums[0] / np.maximum(sums[1], 1e-9)
    return np.where(ratio > 1, -ratio, ratio)


def ngrams(row: rows.Row) -> collections.Counter:
    """Hashed words and pairs of words of question and answer."""
    words = f"{row.question}\n{row.response}".lower().split()
    return collections.Counter(zlib.crc32(" ".join(gram).encode()) % BUCKETS for gram in (*zip(words), *zip(words, words[1:])))


def importance(trusted: Sequence[rows.Row], given: Sequence[rows.Row]) -> np.ndarray:
    """DSIR (Xie et al. 2023): log p̂(row) / q̂(row), p̂ and q̂ bags of hashed n-grams of the trusted rows and of all given ones, each
    count raised by 1."""
    counted = [[ngrams(row) for row in level] for level in (trusted, given)]
    logs = []
    for bags in counted:
        total = np.ones(BUCKETS)
        for bag in bags:
            total[list(bag)] += list(bag.values())
        logs.append(np.log(total / total.sum()))
    ratio = logs[0] - logs[1]
    return np.array([sum(count * ratio[bucket] for bucket, count in bag.items()) for bag in counted[1]])


def alignment(config: decoder.ModelConfig, base, adapter, upper: levels.Level, lower: levels.Level) -> np.ndarray:
    """cos(∇ mean ℓ of the trusted rows, ∇ ℓ of a row) over the adapter: LESS (Xia et al. 2024) with exact gradients in place of
    random projections, and without Adam's preconditioner."""

    def gradients(adapter, packed, m):
        def loss(adapter):
            return jnp.sum(forward.micro_nll(config, base, adapter, packed, m) / jnp.maximum(packed.length, 1))

        return jax.grad(loss)(adapter)

    @jax.jit
    def total(adapter, packed):
        def add(m, sums):
            return jax.tree.map(jnp.add, sums, gradients(adapter, packed, m))

        return jax.lax.fori_loop(0, packed.num_micro, add, jax.tree.map(jnp.zeros_like, adapter))

    @jax.jit
    def cosines(adapter, packed, direction):
        def cosine(m):  # of a row whose gradient vanishes, 0
            gradient = gradients(adapter, packed, m)
            return optax.tree.vdot(gradient, direction) / jnp.maximum(optax.tree.norm(gradient), 1e-30)

        return jax.lax.map(cosine, jnp.arange(packed.tokens.shape[0]))

    def batches(examples):
        """Places of some rows, and these packed, each alone in a sequence."""
        sizes = [1 << max(one.size - 1, SHORTEST - 1).bit_length() for one in examples]
        for size in sorted(set(sizes)):
            same = [i for i, one in enumerate(sizes) if one == size]
            for first in range(0, len(same), CHUNK):
                part = same[first : first + CHUNK]
                segments = scoring.example_segments([examples[i] for i in part])
                bins = [[i] for i in sorted(range(len(part)), key=lambda i: -segments[i].size)]
                yield np.array(part), packing.lay_out(segments, bins, packing.Layout(1, size, CHUNK))

    sums = jax.tree.map(jnp.zeros_like, adapter)
    for _, packed in batches(upper.examples):
        sums = jax.tree.map(jnp.add, sums, total(adapter, packed))
    direction = jax.tree.map(lambda leaf: leaf / optax.tree.norm(sums), sums)
    found = np.zeros(len(lower.examples))
    for part, packed in batches(lower.examples):
        values, entries = np.asarray(cosines(adapter, packed, direction)), packed.entry[: len(part), 0]
        found[part[entries]] = values[: len(part)]
    return found

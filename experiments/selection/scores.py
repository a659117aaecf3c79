"""Baseline rankings of training rows: one score per row, higher is better. Each is a function of the rows or of the model.

The candidates are the rows of the lower level, the trusted rows those of the upper level.
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
SHORTEST = 32  # tokens; a row is padded to this length times a power of 2
CHUNK = 32  # number of rows whose gradients are computed in one call


def losses_of(score, base, adapter, examples) -> np.ndarray:
    """Mean loss ℓ of each row, [n]; `score` is from `scoring.make_scorer`."""
    nll, length = score(base, adapter, scoring.example_segments(examples), "losses")
    return nll / np.maximum(length, 1)


def difficulty(score, base, examples) -> np.ndarray:
    """IFD (Li et al. 2024): ℓ(y | x) / ℓ(y), high if the question does not help to predict the response.

    Ratios above 1 rank below all others, because the authors drop such rows. The first token of a response is left out of both
    losses, because ℓ(y) has no context for it.
    """
    alone = [packing.Segment(example.response[:1], example.response[1:]) for example in examples]
    conditional = [
        packing.Segment(np.concatenate([example.prompt, example.response[:1]]), example.response[1:]) for example in examples
    ]
    conditional_nll, alone_nll = (score(base, None, segments, "difficulty")[0] for segments in (conditional, alone))
    ratio = conditional_nll / np.maximum(alone_nll, 1e-9)
    return np.where(ratio > 1, -ratio, ratio)


def ngrams(row: rows.Row) -> collections.Counter:
    """Counts of hashed words and word pairs of question and response."""
    words = f"{row.question}\n{row.response}".lower().split()
    return collections.Counter(zlib.crc32(" ".join(gram).encode()) % BUCKETS for gram in (*zip(words), *zip(words, words[1:])))


def importance(trusted: Sequence[rows.Row], candidates: Sequence[rows.Row]) -> np.ndarray:
    """DSIR (Xie et al. 2023): log p̂(row) / q̂(row), with p̂ and q̂ the distributions of hashed n-grams of the trusted rows and of the
    candidates, with add-one smoothing."""
    counts = [[ngrams(row) for row in level] for level in (trusted, candidates)]
    logs = []
    for bags in counts:
        total = np.ones(BUCKETS)
        for bag in bags:
            total[list(bag)] += list(bag.values())
        logs.append(np.log(total / total.sum()))
    ratio = logs[0] - logs[1]
    return np.array([sum(count * ratio[bucket] for bucket, count in bag.items()) for bag in counts[1]])


def alignment(config: decoder.ModelConfig, base, adapter, upper: levels.Level, lower: levels.Level) -> np.ndarray:
    """Cosine of ∇ ℓ of a row and ∇ mean ℓ of the trusted rows in the adapter: LESS (Xia et al. 2024) with exact gradients, without
    random projections and Adam's preconditioner."""

    def gradients(adapter, packed, m):
        def loss(adapter):
            return jnp.sum(forward.micro_nll(config, base, adapter, packed, m) / jnp.maximum(packed.length, 1))

        return jax.grad(loss)(adapter)

    @jax.jit
    def visit(adapter, packed, direction):
        """The sum of the gradients of all rows, and the cosine of each gradient with `direction`; 0 if a gradient vanishes."""

        def add(sums, m):
            gradient = gradients(adapter, packed, m)
            cosine = optax.tree.vdot(gradient, direction) / jnp.maximum(optax.tree.norm(gradient), 1e-30)
            return jax.tree.map(jnp.add, sums, gradient), cosine

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, adapter), jnp.arange(packed.tokens.shape[0]))

    def batches(examples):
        """Indices of some rows, and these rows packed, one per sequence."""
        sizes = [1 << max(example.size - 1, SHORTEST - 1).bit_length() for example in examples]
        for size in sorted(set(sizes)):
            same = [i for i, row_size in enumerate(sizes) if row_size == size]
            for first in range(0, len(same), CHUNK):
                part = same[first : first + CHUNK]
                segments = scoring.example_segments([examples[i] for i in part])
                bins = [[i] for i in sorted(range(len(part)), key=lambda i: -segments[i].size)]
                yield np.array(part), packing.lay_out(segments, bins, packing.Layout(1, size, CHUNK))

    zeros = sums = jax.tree.map(jnp.zeros_like, adapter)
    for _, packed in batches(upper.examples):
        sums = jax.tree.map(jnp.add, sums, visit(adapter, packed, zeros)[0])
    direction = jax.tree.map(lambda leaf: leaf / optax.tree.norm(sums), sums)
    alignments = np.zeros(len(lower.examples))
    for part, packed in batches(lower.examples):
        values, entries = np.asarray(visit(adapter, packed, direction)[1]), packed.entry[: len(part), 0]
        alignments[part[entries]] = values[: len(part)]
    return alignments

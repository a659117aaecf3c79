"""Baseline rankings of training rows: one score per row, higher is better. Each is a function of the rows or of the model.

The candidates are the rows of the lower level, the trusted rows those of the upper level. Local axes: n candidates, t targets,
p parameters of the adapter, d dimensions of a projection.
"""

import collections
import functools
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import flatten_util

from bilevel_jax import forward, scoring, sharding
from bilevel_jax.data import levels, packing, rows, templates
from bilevel_jax.models import model_config

BUCKETS = 10_000  # of hashed n-grams, as in DSIR's code
SHORTEST = 32  # tokens; a row is padded to this length times a power of 2
CHUNK = 32  # number of rows whose gradients are computed in one call
TINY = 1e-30


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


# --------------------------------------------------------------------------------------------------------------------
# One ranking from several targets
# --------------------------------------------------------------------------------------------------------------------


def round_robin(score_nxt: np.ndarray) -> np.ndarray:
    """One ranking from the scores of several targets: each target in turn takes its best row that is not yet taken.

    Args:
      score_nxt: [n, t], one column per target; of equal scores in a column, the first row is taken first.

    Returns:
      [n], n for the row taken first, n - 1 for the second, ..., 1 for the last.

    Source: `get_top_influences.py` of Ivison et al. 2025. There a target whose best row is taken loses its turn; here it takes its
    next best row.
    """
    n, t = score_nxt.shape
    queues = [iter(column) for column in np.argsort(-score_nxt, axis=0, kind="stable").T]
    rank_n = np.zeros(n)  # 0: not yet taken
    for turn in range(n):
        row = next(row for row in queues[turn % t] if not rank_n[row])
        rank_n[row] = n - turn
    return rank_n


COMBINE = {"max": lambda score_nxt: score_nxt.max(axis=1), "round_robin": round_robin}


# --------------------------------------------------------------------------------------------------------------------
# Gradients of rows
# --------------------------------------------------------------------------------------------------------------------


class Projection(NamedTuple):
    """A count sketch: every parameter goes to one of d buckets, with a random sign; a bucket sums its parameters.

    With independent signs, the inner product of two sketches has the exact inner product as its mean, and at most the variance of
    a dense Rademacher projection to d dimensions. It takes 8·p bytes, not 4·p·d. With d ≥ p, inner products are exact.
    """

    index: jax.Array  # [d, ceil(p/d)] int32, the parameters of each bucket; p for none
    sign: jax.Array  # [d, ceil(p/d)] float32, ±1


def make_projection(key: jax.Array, num_params: int, dimension: int) -> Projection:
    """Deals the parameters in random order to `dimension` buckets of equal size."""
    key_index, key_sign = jax.random.split(key)
    shape = dimension, -(-num_params // dimension)
    order_p = jax.random.permutation(key_index, num_params)
    index = jnp.full(shape[0] * shape[1], num_params, jnp.int32).at[:num_params].set(order_p).reshape(shape)
    return Projection(index, jax.random.rademacher(key_sign, shape, jnp.float32))


def project(gradient, projection: Projection | None) -> jax.Array:
    """A gradient as a vector: [d] projected, or [p] without a projection."""
    flat_p, _ = flatten_util.ravel_pytree(gradient)
    if projection is None:
        return flat_p
    return jnp.sum(projection.sign * flat_p.at[projection.index].get(mode="fill", fill_value=0), axis=1)


def _row_batches(examples: Sequence[templates.Example]) -> Iterator[tuple[np.ndarray, packing.Packed]]:
    """Yields (indices, packed): at most `CHUNK` rows of similar size, one per micro-batch, in the order of the indices."""
    sizes = np.array([1 << max(example.size - 1, SHORTEST - 1).bit_length() for example in examples])
    for size in np.unique(sizes):
        same = np.flatnonzero(sizes == size)
        for first in range(0, len(same), CHUNK):
            part = same[first : first + CHUNK]
            segments = scoring.example_segments([examples[i] for i in part])
            yield part, packing.lay_out(segments, [[i] for i in range(len(part))], packing.Layout(1, int(size), CHUNK))


@functools.partial(jax.jit, static_argnums=0)
def _visit(config, base, adapter, adam, projection, packed: packing.Packed, target_M, direction_txd):
    """Sums ∇ ℓ of rows by target, and computes cosines of their ∇ ℓ, or of Adam's Γ, with directions.

    One function for both, because compiling takes longer than visiting a few hundred rows.

    Args:
      adam: state of Adam; None for plain gradients.
      projection: of all gradients; None for full ones.
      packed: one row per micro-batch.
      target_M: t for no target.

    Returns:
      sums [t, d] and cosines [M, t]; 0 if a gradient vanishes.
    """

    def loss(adapter, m):
        return jnp.sum(forward.micro_nll(config, base, adapter, packed, m) / jnp.maximum(packed.length, 1))

    def add(sum_txd, m):
        gradient = jax.grad(loss)(adapter, m)
        direction = gradient if adam is None else optax.scale_by_adam().update(gradient, adam)[0]
        projected_d = project(direction, projection)
        cosine_t = direction_txd @ projected_d / jnp.maximum(jnp.linalg.norm(projected_d), TINY)
        return sum_txd.at[target_M[m]].add(project(gradient, projection), mode="drop"), cosine_t

    return jax.lax.scan(add, jnp.zeros_like(direction_txd), jnp.arange(packed.tokens.shape[0]))


def _similarities(config, base, adapter, adam, projection, upper_examples, target_of: np.ndarray, lower_examples) -> np.ndarray:
    """Cosine of each candidate's gradient and the mean gradient of each target, [n, t]. Holds one gradient of a row at a time.

    Args:
      adam, projection: see `_visit`.
      target_of: index of the target of each trusted row.
    """
    t = int(target_of.max()) + 1
    # On the host between calls: a device array has one type before `_visit` and another after it, which compiles twice.
    zeros_txd = np.zeros((t, jax.eval_shape(project, adapter, projection).size), np.float32)
    sum_txd = zeros_txd.copy()
    visit = functools.partial(_visit, config, base, adapter, adam, projection)
    for part, packed in _row_batches(upper_examples):
        target_M = np.pad(target_of[part], (0, CHUNK - len(part)), constant_values=t)
        sum_txd += np.asarray(visit(packed, target_M, zeros_txd)[0])
    direction_txd = sum_txd / np.maximum(np.linalg.norm(sum_txd, axis=1, keepdims=True), TINY)
    cosine_nxt, no_target_M = np.zeros((len(lower_examples), t)), np.full(CHUNK, t)
    for part, packed in _row_batches(lower_examples):
        cosine_nxt[part] = np.asarray(visit(packed, no_target_M, direction_txd)[1])[: len(part)]
    return cosine_nxt


def alignment(config: model_config.ModelConfig, base, adapter, upper: levels.Level, lower: levels.Level) -> np.ndarray:
    """Cosine of ∇ ℓ of a row and ∇ mean ℓ of the trusted rows in the adapter: LESS (Xia et al. 2024) with exact gradients, without
    random projections and Adam's preconditioner."""
    one_target = np.zeros(len(upper.examples), int)
    return _similarities(config, base, adapter, None, None, upper.examples, one_target, lower.examples)[:, 0]


def less(
    config: model_config.ModelConfig,
    base,
    checkpoints: Sequence[tuple[Any, optax.OptState]],
    upper_examples: Sequence[templates.Example],
    lower_examples: Sequence[templates.Example],
    targets: Sequence,
    learning_rates: Sequence[float],
    dimension: int | None = 1024,
    seed: int = 0,
    combine: str = "max",
) -> np.ndarray:
    """LESS: cosine of a row's Adam update and the gradient of the trusted rows, summed over checkpoints of a training run.

        s_ij = Σ_k η_k cos( P mean_{z in target j} ∇ℓ(z; θ_k), P Γ(z_i; θ_k) )
        Γ(z; θ_k) = m / (√v + ε),   m = (β_1 m_k + (1-β_1) ∇ℓ(z)) / (1-β_1^{c+1}),   v = (β_2 v_k + (1-β_2) ∇ℓ(z)²) / (1-β_2^{c+1})

    with m_k, v_k the moments after c steps, (β_1, β_2, ε) = (0.9, 0.999, 1e-8), and P a random projection: in the paper a dense
    Rademacher matrix to 8192 dimensions, here a `Projection`. The score of a row is the maximum of s_ij over j.

    Args:
      checkpoints: (adapter, optimizer state) θ_k, with a state of `optax.adam` or `optax.adamw`. A `train_state.Learner` is one.
      upper_examples, lower_examples: trusted rows and candidates.
      targets: the target of each trusted row, for instance its `source`.
      learning_rates: η_k, the mean learning rate of the epoch that ends at each checkpoint.
      dimension: d of the projection; None for full gradients.
      seed: of the projection, which all checkpoints share.
      combine: `max` over targets, as in the paper, or `round_robin`.

    Returns:
      [n].

    Raises:
      ValueError: an optimizer state without moments, or not one learning rate per checkpoint.

    Source: Xia et al., "LESS: Selecting influential data for targeted instruction tuning", 2024, sections 3 and 4.
    """
    combined = COMBINE[combine]
    target_of = np.unique(np.asarray(targets), return_inverse=True)[1]
    score_nxt = np.zeros((len(lower_examples), target_of.max() + 1))
    num_params = sum(leaf.size for leaf in jax.tree.leaves(checkpoints[0][0]))
    projection = None if dimension is None else make_projection(jax.random.key(seed), num_params, dimension)
    for (adapter, state), rate in zip(checkpoints, learning_rates, strict=True):
        adam = optax.tree.get(state, "ScaleByAdamState")
        if adam is None:
            raise ValueError("LESS needs checkpoints of a run with optimizer.name=adam or adamw")
        rows_of = upper_examples, target_of, lower_examples
        score_nxt += rate * _similarities(config, base, adapter, adam, projection, *rows_of)
    return combined(score_nxt)


# --------------------------------------------------------------------------------------------------------------------
# Hidden states
# --------------------------------------------------------------------------------------------------------------------


def weighted_means(config: model_config.ModelConfig, base, packed: packing.Packed) -> jax.Array:
    """Σ_i i h_i / Σ_i i of every entry, [E, D] float32, with h_i the final hidden state of its i-th token, i = 1, 2, ...

    Args:
      packed: entries with a target, by which their tokens are found.
    """
    E, (S, L) = packed.length.shape[0], packed.tokens.shape[1:]

    def add(m, sums):
        hidden_TxD = forward.hidden_states(config, base, None, packed, m).astype(jnp.float32)
        # Segment ids restart in every sequence; these are unique in the micro-batch. Targets map them to entries.
        segment_T = (jnp.arange(S)[:, None] * (L + 1) + packed.segment_ids[m]).reshape(-1)
        segment_P = segment_T.at[packed.logit_index[m]].get(mode="fill", fill_value=S * (L + 1))
        entry_T = jnp.full(S * (L + 1), E, jnp.int32).at[segment_P].set(packed.entry[m], mode="drop")[segment_T]
        weight_T = packed.positions[m].reshape(-1) + 1.0
        parts = weight_T[:, None] * hidden_TxD, weight_T[:, None]
        return tuple(total + jax.ops.segment_sum(part, entry_T, num_segments=E) for total, part in zip(sums, parts))

    start = jnp.zeros((E, config.hidden_size)), jnp.zeros((E, 1))
    total_ExD, weight_Ex1 = jax.lax.fori_loop(0, packed.num_micro, add, start)
    return total_ExD / jnp.maximum(weight_Ex1, 1)


_weighted_means = jax.jit(lambda *batch: sharding.constrain(weighted_means(*batch)), static_argnums=0)


def embeddings(config: model_config.ModelConfig, base, examples, sequences: int, max_length: int, mesh) -> np.ndarray:
    """`weighted_means` of question and response together, divided by their norms, [n, D] float32, in the order of the rows.

    Args:
      sequences, max_length, mesh: see `scoring.batches`.
    """
    texts = [np.concatenate([example.prompt, example.response]) for example in examples]
    segments = [packing.Segment(text[:1], text[1:]) for text in texts]  # so that rows without a response have targets
    mean_nxD = np.zeros((len(examples), config.hidden_size), np.float32)
    for indices, packed in scoring.batches(segments, sequences, max_length, mesh, "embeddings"):
        with jax.set_mesh(mesh):
            mean_nxD[indices] = np.asarray(_weighted_means(config, base, packed))[: len(indices)]
    return mean_nxD / np.maximum(np.linalg.norm(mean_nxD, axis=1, keepdims=True), TINY)


def rds(
    config: model_config.ModelConfig,
    base,
    upper_examples: Sequence[templates.Example],
    lower_examples: Sequence[templates.Example],
    sequences: int,
    max_length: int,
    mesh: jax.sharding.Mesh,
    combine: str = "round_robin",
) -> np.ndarray:
    """RDS+: cosine of the embeddings of a row and of the trusted rows. Every trusted row is a target of its own.

        s_ij = cos(e_i, e_j),   e = Σ_t t h_t / Σ_t t

    with h_t the final hidden states of the base over question and response. Later tokens count more, because they attend to more
    of the text.

    Args:
      upper_examples, lower_examples: trusted rows and candidates.
      sequences, max_length, mesh: see `scoring.batches`.
      combine: `round_robin` over the trusted rows, as in the paper, or the `max`.

    Returns:
      [n].

    Source: Ivison et al., "Large-scale data selection for instruction tuning", 2025, section 3; `compute_influence_cosinesim.py`.
    """
    combined = COMBINE[combine]
    upper_txD, lower_nxD = (
        embeddings(config, base, examples, sequences, max_length, mesh) for examples in (upper_examples, lower_examples)
    )
    return combined(lower_nxD @ upper_txD.T)

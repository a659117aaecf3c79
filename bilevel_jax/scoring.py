"""Losses of given responses under a model, for evaluation, scoring and reference log-probabilities."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax import forward, losses, progress, sharding, token_weights
from bilevel_jax.data import packing
from bilevel_jax.models import model_config

ENTRIES = 256  # segments per packed batch: enough to fill the sequences well
SHORT = 512  # tokens; segments up to this length share one shape, longer ones use the next power of two


def entry_scores(model: model_config.ModelConfig, base, adapter, packed: packing.Packed) -> tuple[jax.Array, jax.Array]:
    """Summed NLL of every entry [E], nats, and the number of its targets that are not the most likely token, int32 [E]."""
    E = packed.length.shape[0]

    def add(m, sums):
        nll_P, missed_P = losses.token_scores(*forward.loss_inputs(model, base, adapter, packed, m), model.logit_cap)
        scores = nll_P, missed_P.astype(jnp.int32)
        return tuple(sum_E + jax.ops.segment_sum(part_P, packed.entry[m], num_segments=E) for sum_E, part_P in zip(sums, scores))

    return jax.lax.fori_loop(0, packed.num_micro, add, (jnp.zeros(E, jnp.float32), jnp.zeros(E, jnp.int32)))


def _replicated(tree):
    """Replicates every leaf, so that the host can read it."""
    return jax.tree.map(sharding.constrain, tree)


def host_batches(segments: Sequence[packing.Segment], sequences: int, max_length: int, description: str) -> Iterator:
    """Packs segments into batches of a few shapes, by length, so that long segments do not add padding to short ones.

    Args:
      segments: in any order.
      sequences: number of packed sequences in a micro-batch.
      max_length: maximum number of tokens of a segment.
      description: of the progress bar.

    Yields:
      (indices, packed): the indices of some segments, and these segments packed, on the host. Every segment is in one batch.
    """
    shapes: dict[int, list[int]] = {}
    for i, segment in enumerate(segments):
        shapes.setdefault(min(max(SHORT, 1 << (segment.size - 1).bit_length()), max_length), []).append(i)
    with progress.bar(desc=description, unit="row", total=len(segments)) as bar:
        for length, members in sorted(shapes.items()):
            layout = packing.Layout(sequences, length, ENTRIES)
            for first in range(0, len(members), ENTRIES):
                part = members[first : first + ENTRIES]
                yield part, packing.pack([segments[i] for i in part], layout)
                bar.update(len(part))


def batches(
    segments: Sequence[packing.Segment], sequences: int, max_length: int, mesh: jax.sharding.Mesh, description: str
) -> Iterator:
    """The batches of `host_batches`, on the devices.

    Args:
      segments, sequences, max_length, description: see `host_batches`.
      mesh: the sequences are sharded over its `data` and `fsdp` axes.
    """
    for indices, packed in host_batches(segments, sequences, max_length, description):
        yield indices, sharding.put_batch(packed, mesh)


def results(
    program: Callable,
    segments: Sequence[packing.Segment],
    sequences: int,
    max_length: int,
    mesh: jax.sharding.Mesh,
    description: str,
) -> Iterator:
    """Runs a program over segments. The device computes a batch while the host packs the next one and reads the one before.

    Args:
      program: jitted, `packed -> result`.
      segments, sequences, max_length, mesh, description: see `batches`.

    Yields:
      (indices, packed, result): of each batch, with `packed` on the host and `result` on the devices.
    """

    def dispatched():
        for indices, packed in host_batches(segments, sequences, max_length, description):
            on_devices = sharding.put_batch(packed, mesh)
            with jax.set_mesh(mesh):
                result = program(on_devices)
            yield indices, packed, result

    for of_batch, _ in itertools.pairwise(itertools.chain(dispatched(), [None])):
        yield of_batch


# Module-level, so that all scorers of a process share one cache of compiled programs.
_entry_nll = jax.jit(lambda *batch: (_replicated(forward.entry_nll(*batch)),), static_argnums=0)
_entry_scores = jax.jit(lambda *batch: _replicated(entry_scores(*batch)), static_argnums=0)


def make_scorer(
    model: model_config.ModelConfig, sequences: int, max_length: int, mesh: jax.sharding.Mesh, greedy: bool = False
) -> Callable:
    """Builds `score(base, adapter, segments, description) -> (nll, length)`.

    The results are [n] arrays in the order of the segments: the summed negative log-likelihood of the response in nats, and the
    number of its tokens. `adapter=None` scores the base.

    Args:
      model: of base and adapter.
      sequences, max_length, mesh: see `batches`.
      greedy: also return whether every token of the response is the most likely one, [n] bool.
    """

    def score(base, adapter, segments: Sequence[packing.Segment], description: str) -> tuple[np.ndarray, ...]:
        _check_tokens(segments, model.vocab_size)
        nll, missed, count = np.zeros(len(segments)), np.zeros(len(segments), np.int64), np.zeros(len(segments), np.int64)
        program = functools.partial(_entry_scores if greedy else _entry_nll, model, base, adapter)
        for indices, packed, scores in results(program, segments, sequences, max_length, mesh, description):
            for result, values in zip((nll, missed), scores):
                result[indices] = np.asarray(values)[: len(indices)]
            count[indices] = packed.length[: len(indices)]
        return (nll, count, missed == 0) if greedy else (nll, count)

    return score


def _check_tokens(segments: Sequence[packing.Segment], vocab_size: int) -> None:
    """Refuses tokens that the model does not have: JAX would take the last one of the vocabulary instead."""
    largest = max((int(tokens.max()) for segment in segments for tokens in segment[:2] if len(tokens)), default=0)
    if largest >= vocab_size:
        raise ValueError(f"token {largest} is not in the model's vocabulary of {vocab_size}; take the tokenizer of the model")


@functools.partial(jax.jit, static_argnums=0)
def _token_weights(model: model_config.ModelConfig, base, adapter, packed: packing.Packed, psi_2) -> jax.Array:
    """v of every target of every micro-batch, [M, P]."""

    def set_micro(m, weight_MxP):
        nll_P = forward.target_nll(model, base, adapter, packed, m)
        return weight_MxP.at[m].set(token_weights.weights(psi_2, nll_P, packed.entry[m], jnp.ones(packed.length.shape, bool)))

    return _replicated(jax.lax.fori_loop(0, packed.num_micro, set_micro, jnp.zeros(packed.entry.shape)))


def example_token_weights(
    model: model_config.ModelConfig, base, adapter, psi_2, examples, sequences: int, max_length: int, mesh: jax.sharding.Mesh
) -> list[np.ndarray]:
    """`token_weights.weights` of the response of each example, [T] float32, for the tokens that have a prediction.

    Args:
      model: of base and adapter.
      psi_2: ψ of the token weights.
      examples: rows with prompt and response.
      sequences, max_length, mesh: see `batches`.
    """
    weights = [np.zeros(0, np.float32)] * len(examples)
    segments = example_segments(examples)

    def program(packed):
        return _token_weights(model, base, adapter, packed, psi_2)

    for indices, packed, weight_MxP in results(program, segments, sequences, max_length, mesh, "weights of tokens"):
        weight, entry = np.asarray(weight_MxP).ravel(), packed.entry.ravel()
        order = np.argsort(entry, kind="stable")  # stable: the tokens of a response keep their order
        bounds = np.searchsorted(entry[order], np.arange(len(indices) + 1))
        for i, start, stop in zip(indices, bounds, bounds[1:]):
            weights[i] = weight[order[start:stop]]
    return weights


def example_segments(examples) -> list[packing.Segment]:
    """The prompt of each example with its (chosen) response."""
    return [packing.Segment(example.prompt, example.response, earlier=example.earlier) for example in examples]


def pair_segments(examples) -> list[packing.Segment]:
    """The segments of pairs, the chosen response of each before the rejected one."""
    return [packing.Segment(one.prompt, response) for one in examples for response in (one.response, one.rejected)]


def pair_log_probs(score: Callable, base, adapter, examples, description: str) -> np.ndarray:
    """Log-probabilities [n, 2] of chosen and rejected responses. Without an adapter (None) it is DPO's reference model."""
    nll, *_ = score(base, adapter, pair_segments(examples), description)
    return -nll.reshape(-1, 2)


def mean_loss(nll: np.ndarray, length: np.ndarray) -> float:
    """Mean over rows of ℓ, the loss per response token, nats."""
    return float(np.mean(nll / np.maximum(length, 1)))

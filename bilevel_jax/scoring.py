"""Losses of given responses under a model: what evaluation, scoring and reference log-probabilities share."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from bilevel_jax import forward, losses, sharding, token_weights
from bilevel_jax.data import packing
from bilevel_jax.models import decoder

ENTRIES = 256  # segments per packed batch: enough to fill sequences well
SHORT = 512  # tokens; segments up to here share one shape, longer ones take the next power of two


def entry_scores(config: decoder.ModelConfig, base, adapter, packed: packing.Packed) -> tuple[jax.Array, jax.Array]:
    """Summed NLL of every entry [E], and how many of its targets are not the most likely token, int32 [E]."""
    E = packed.length.shape[0]

    def add(m, sums):
        hidden_TxD = forward.hidden_states(config, base, adapter, packed, m)
        target = packed.logit_index[m], packed.target[m], packed.num_targets[m]
        nll_P, missed_P = losses.token_scores(hidden_TxD, decoder.head(base), *target)
        found = nll_P, missed_P.astype(jnp.int32)
        return tuple(sum_E + jax.ops.segment_sum(part_P, packed.entry[m], num_segments=E) for sum_E, part_P in zip(sums, found))

    return jax.lax.fori_loop(0, packed.num_micro, add, (jnp.zeros(E, jnp.float32), jnp.zeros(E, jnp.int32)))


def _whole(found):
    """For the host to read."""
    return jax.tree.map(sharding.constrain, found)


def batches(segments: Sequence[packing.Segment], sequences: int, max_length: int, mesh: jax.sharding.Mesh, description: str):
    """Yields `(members, packed)` until every segment was in one: the places of some segments, and these packed into rows of
    `sequences` at a time, on the devices. A few long segments do not make the short ones pay, and all lengths up to `max_length`
    tokens share a handful of shapes."""
    shapes: dict[int, list[int]] = {}
    for i, segment in enumerate(segments):
        shapes.setdefault(min(max(SHORT, 1 << (segment.size - 1).bit_length()), max_length), []).append(i)
    with tqdm.tqdm(total=len(segments), desc=description, unit="row", delay=2, leave=False, disable=None) as bar:
        for length, members in sorted(shapes.items()):
            layout = packing.Layout(sequences, length, ENTRIES)
            for first in range(0, len(members), ENTRIES):
                part = members[first : first + ENTRIES]
                yield part, sharding.split_batch(packing.pack([segments[i] for i in part], layout), mesh)
                bar.update(len(part))


_entry_nll = jax.jit(lambda *batch: _whole(forward.entry_nll(*batch)), static_argnums=0)  # one cache for all scorers of a process
_entry_scores = jax.jit(lambda *batch: _whole(entry_scores(*batch)), static_argnums=0)


def make_scorer(
    config: decoder.ModelConfig, sequences: int, max_length: int, mesh: jax.sharding.Mesh, greedy: bool = False
) -> Callable:
    """Builds `score(base, adapter, segments, description) -> (nll, length)`.

    Both results are [n], in the order of the segments: the response's summed negative log-likelihood in nats, and the number of
    its tokens. With `greedy` there is a third: whether the most likely token at each place is the response's. `adapter=None`
    scores the base. See `batches` for `sequences` and `max_length`.
    """

    def score(base, adapter, segments: Sequence[packing.Segment], description: str) -> tuple[np.ndarray, ...]:
        nll, missed, count = np.zeros(len(segments)), np.zeros(len(segments), np.int64), np.zeros(len(segments), np.int64)
        for part, packed in batches(segments, sequences, max_length, mesh, description):
            with jax.set_mesh(mesh):
                batch = config, base, adapter, packed
                found = _entry_scores(*batch) if greedy else (_entry_nll(*batch),)
            for whole, values in zip((nll, missed), found):
                whole[part] = np.asarray(values)[: len(part)]
            count[part] = np.asarray(packed.length)[: len(part)]
        return (nll, count, missed == 0) if greedy else (nll, count)

    return score


@functools.partial(jax.jit, static_argnums=0)
def _token_weights(config: decoder.ModelConfig, base, adapter, packed: packing.Packed, phi_2) -> jax.Array:
    """Of every target of every micro-batch, [M, P]."""

    def of_micro(m, found_MxP):
        nll_P = forward.target_nll(config, base, adapter, packed, m)
        return found_MxP.at[m].set(token_weights.weights(phi_2, nll_P, packed.entry[m], jnp.ones(packed.length.shape, bool)))

    return _whole(jax.lax.fori_loop(0, packed.num_micro, of_micro, jnp.zeros(packed.entry.shape)))


def token_weights_of(
    config: decoder.ModelConfig, base, adapter, phi_2, examples, sequences: int, max_length: int, mesh: jax.sharding.Mesh
) -> list[np.ndarray]:
    """`token_weights.weights` of each example's response, [T] float32, for the tokens that something predicts. See `batches` for
    `sequences` and `max_length`."""
    found = [np.zeros(0, np.float32)] * len(examples)
    for part, packed in batches(example_segments(examples), sequences, max_length, mesh, "weights of tokens"):
        with jax.set_mesh(mesh):
            weight = np.asarray(_token_weights(config, base, adapter, packed, phi_2)).ravel()
        entry = np.asarray(packed.entry).ravel()
        order = np.argsort(entry, kind="stable")  # the tokens of a response stay in their order
        bounds = np.searchsorted(entry[order], np.arange(len(part) + 1))
        for place, start, stop in zip(part, bounds, bounds[1:]):
            found[place] = weight[order[start:stop]]
    return found


def example_segments(examples) -> list[packing.Segment]:
    """Each example's prompt with its (chosen) response."""
    return [packing.Segment(example.prompt, example.response) for example in examples]


def mean_loss(nll: np.ndarray, length: np.ndarray) -> float:
    """Mean over rows of the loss per response token, ℓ."""
    return float(np.mean(nll / np.maximum(length, 1)))

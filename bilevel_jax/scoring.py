"""Losses of given responses under a model: what evaluation, scoring and reference log-probabilities share."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
import tqdm

from bilevel_jax import sharding, step
from bilevel_jax.data import packing
from bilevel_jax.models import decoder

ENTRIES = 256  # segments per packed batch: enough to fill sequences well
SHORT = 512  # tokens; segments up to here share one shape, longer ones take the next power of two

_entry_nll = jax.jit(step.entry_nll, static_argnums=0)  # one cache for all scorers of a process


def make_scorer(config: decoder.ModelConfig, sequences: int, max_length: int, mesh: jax.sharding.Mesh) -> Callable:
    """Builds `score(base, adapter, segments, description) -> (nll, length)`.

    Both results are [n], in the order of the segments: the response's summed negative log-likelihood in nats, and the number of
    its tokens. `adapter=None` scores the base. Segments are packed into `sequences` rows at a time; a few long ones do not make
    the short ones pay, and all lengths up to `max_length` tokens share a handful of compilations.
    """

    def score(base, adapter, segments: Sequence[packing.Segment], description: str) -> tuple[np.ndarray, np.ndarray]:
        nll, count = np.zeros(len(segments)), np.zeros(len(segments), np.int64)
        shapes: dict[int, list[int]] = {}
        for i, segment in enumerate(segments):
            shapes.setdefault(min(max(SHORT, 1 << (segment.size - 1).bit_length()), max_length), []).append(i)
        with tqdm.tqdm(total=len(segments), desc=description, unit="row", delay=2, leave=False, disable=None) as bar:
            for length, members in sorted(shapes.items()):
                layout = packing.Layout(sequences, length, ENTRIES)
                for first in range(0, len(members), ENTRIES):
                    part = members[first : first + ENTRIES]
                    packed = packing.pack([segments[i] for i in part], layout)
                    found = _entry_nll(config, base, adapter, sharding.split_batch(packed, mesh))
                    nll[part], count[part] = np.asarray(found)[: len(part)], packed.length[: len(part)]
                    bar.update(len(part))
        return nll, count

    return score


def segments_of(examples) -> list[packing.Segment]:
    """Each example's prompt with its (chosen) response."""
    return [packing.Segment(example.prompt, example.response) for example in examples]


def mean_loss(nll: np.ndarray, length: np.ndarray) -> float:
    """Mean over rows of the loss per response token, ℓ."""
    return float(np.mean(nll / np.maximum(length, 1)))

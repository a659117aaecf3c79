"""Puts rows side by side in sequences of one length, so that no step computes on padding and all steps share one shape.

A *segment* is one prompt with one response. Segments are packed first-fit by decreasing length into sequences of L tokens; S
sequences make a micro-batch, M micro-batches a step. Rows of the lower level come first, so that the pass which re-scores them
runs over a prefix of the micro-batches, and rows of the upper level into the room that they leave. M is the worst case; how many
micro-batches are in use travels with the batch as a number, not as a shape.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bilevel_jax import losses


class Segment(NamedTuple):
    """One prompt and one response, and what the step must know about them."""

    prompt: np.ndarray  # int32 token ids
    response: np.ndarray  # int32 token ids, EOS included where it is to be learned
    row_index: int = -1  # index into the selector's logits; -1: upper level
    share: float = 0.0  # weight in its level's mean
    group: int = -1  # which preference pair of the step, or which question that the model answered itself; -1: neither
    sign: int = 0  # of a pair: +1 chosen, -1 rejected
    reference: float = 0.0  # of a pair: log-probability of the response under the reference model
    old_log_prob: float = math.nan  # of the model's own responses, log π_old when it was made; NaN: from the data
    reward: float = math.nan  # of the model's own responses, where their loss hangs on it; NaN: it does not

    @property
    def size(self) -> int:
        return len(self.prompt) + len(self.response)


class Packed(NamedTuple):
    """Segments laid out on the device. E entries (segments), T = S·L tokens and P target slots per micro-batch."""

    tokens: np.ndarray  # [M, S, L] int32
    segment_ids: np.ndarray  # [M, S, L] int32, 0 for padding, else 1, 2, ... within a sequence
    positions: np.ndarray  # [M, S, L] int32, restarting at 0 in every segment
    logit_index: np.ndarray  # [M, P] int32, flat token index in [0, T) whose hidden state predicts the target; T for padding
    target: np.ndarray  # [M, P] int32
    entry: np.ndarray  # [M, P] int32, the segment that the target belongs to; E for padding
    num_targets: np.ndarray  # [M] int32
    length: np.ndarray  # [E] int32, predicted response tokens of each entry
    num_micro: np.ndarray  # [] int32, micro-batches in use


class Batch(NamedTuple):
    """A step's packed segments with their role in the joint update."""

    packed: Packed
    row_index: np.ndarray  # [E] int32, index into the selector's logits; N for upper rows and padding
    share: np.ndarray  # [E] float32, weight in the level's mean, adding up to 1; of a pair, both rows carry the pair's
    group: np.ndarray  # [E] int32, preference pair or question answered by the model itself; E where there is none
    sign: np.ndarray  # [E] float32, +1 chosen, -1 rejected, 0 otherwise
    reference: np.ndarray  # [E] float32
    old_log_prob: np.ndarray  # [E] float32, log π_old of the model's own responses; NaN for those of the data
    reward: np.ndarray  # [E] float32, of the model's own responses; NaN where there is none
    num_lower_micro: np.ndarray  # [] int32, the micro-batches that hold every lower-level row
    first_upper_micro: np.ndarray  # [] int32, from which on they hold every upper-level row
    num_lower: np.ndarray  # [] float32, rows B of the lower level


class Layout(NamedTuple):
    """The static shape of all batches: S sequences of L tokens to a micro-batch, at most E entries to a step."""

    sequences: int
    length: int
    entries: int
    padded: bool = False  # one segment to a sequence: for comparison only
    apart: bool = False  # no sequence with rows of both levels: for an update that passes over each level by itself

    @property
    def micro_batches(self) -> int:
        return -(-self.entries // self.sequences)

    @property
    def targets(self) -> int:
        tokens = self.sequences * self.length
        chunk = losses.chunk(tokens)
        return -(-tokens // chunk) * chunk


def _first_fit(groups: Sequence[Sequence[int]], sizes: Sequence[int], layout: Layout, begun=()) -> list[list[int]]:
    """Assigns groups of segments to sequences, first fit by decreasing size, after those `begun`; a group stays together."""
    totals = [sum(sizes[i] for i in group) for group in groups]
    order = sorted(range(len(groups)), key=lambda g: -totals[g])
    bins = [list(members) for members in begun]
    room = [layout.length - sum(sizes[i] for i in members) for members in bins]
    for g in order:
        if totals[g] > layout.length:
            raise ValueError(f"a segment of {totals[g]} tokens does not fit a sequence of {layout.length}")
        fitting = (b for b, free in enumerate(room) if free >= totals[g] and not layout.padded)
        b = next(fitting, None)
        if b is None:
            bins.append([])
            room.append(layout.length)
            b = len(bins) - 1
        bins[b].extend(groups[g])
        room[b] -= totals[g]
    return bins


def _groups(segments: Sequence[Segment], indices: Sequence[int]) -> list[list[int]]:
    """Segments that must share a sequence: the two of a preference pair; every other segment by itself."""
    pairs: dict[int, list[int]] = {}
    for i in indices:
        segment = segments[i]
        pairs.setdefault(segment.group if segment.sign else -1 - i, []).append(i)
    return list(pairs.values())


def _lay_out(segments: Sequence[Segment], bins: Sequence[Sequence[int]], layout: Layout) -> Packed:
    S, L, E = layout.sequences, layout.length, layout.entries
    M, P, T = layout.micro_batches, layout.targets, layout.sequences * layout.length
    tokens, segment_ids, positions = (np.zeros((M * S, L), np.int32) for _ in range(3))
    logit_index = np.full((M, P), T, np.int32)
    target = np.zeros((M, P), np.int32)
    entry = np.full((M, P), E, np.int32)
    num_targets = np.zeros(M, np.int32)
    length = np.zeros(E, np.int32)
    for b, members in enumerate(bins):
        m, start = b // S, 0
        for number, i in enumerate(members, start=1):
            segment = segments[i]
            stop = start + segment.size
            tokens[b, start:stop] = np.concatenate([segment.prompt, segment.response])
            segment_ids[b, start:stop] = number
            positions[b, start:stop] = np.arange(segment.size)
            # Without a prompt nothing predicts the first response token; it is not scored, as everywhere else.
            predicted = segment.response if len(segment.prompt) else segment.response[1:]
            first, count = num_targets[m], len(predicted)
            slots = slice(first, first + count)
            logit_index[m, slots] = (b % S) * L + np.arange(stop - count - 1, stop - 1)
            target[m, slots] = predicted
            entry[m, slots] = i
            length[i] = count
            num_targets[m] += count
            start = stop
    tokens, segment_ids, positions = (flat.reshape(M, S, L) for flat in (tokens, segment_ids, positions))
    num_micro = np.int32(-(-len(bins) // S))
    return Packed(tokens, segment_ids, positions, logit_index, target, entry, num_targets, length, num_micro)


def pack(segments: Sequence[Segment], layout: Layout) -> Packed:
    """Packs segments in any order; entry i of the result is segment i.

    Raises:
      ValueError: more segments than `layout.entries`, or one longer than a sequence.
    """
    if len(segments) > layout.entries:
        raise ValueError(f"{len(segments)} segments do not fit {layout.entries} entries")
    sizes = [segment.size for segment in segments]
    return _lay_out(segments, _first_fit(_groups(segments, range(len(segments))), sizes, layout), layout)


def pack_step(segments: Sequence[Segment], num_rows: int, num_lower: int, layout: Layout) -> Batch:
    """Packs one step's upper and lower segments. `num_rows` is N, `num_lower` the rows B of the lower batch."""
    if len(segments) > layout.entries:
        raise ValueError(f"{len(segments)} segments do not fit {layout.entries} entries")
    sizes = [segment.size for segment in segments]
    lower = [i for i, segment in enumerate(segments) if segment.row_index >= 0]
    upper = [i for i, segment in enumerate(segments) if segment.row_index < 0]
    lower_bins = _first_fit(_groups(segments, lower), sizes, layout)
    upper_groups = _groups(segments, upper)
    if layout.apart:
        bins = lower_bins + _first_fit(upper_groups, sizes, layout)
    else:
        bins = _first_fit(upper_groups, sizes, layout, lower_bins)
    alone = [members for members in bins if all(segments[i].row_index >= 0 for i in members)]
    bins = alone + [members for members in bins if members not in alone]

    def column(values, dtype, padding):
        return np.array(values + [padding] * (layout.entries - len(values)), dtype)

    E, N = layout.entries, num_rows
    return Batch(
        packed=_lay_out(segments, bins, layout),
        row_index=column([s.row_index if s.row_index >= 0 else N for s in segments], np.int32, N),
        share=column([s.share for s in segments], np.float32, 0),
        group=column([s.group if s.group >= 0 else E for s in segments], np.int32, E),
        sign=column([s.sign for s in segments], np.float32, 0),
        reference=column([s.reference for s in segments], np.float32, 0),
        old_log_prob=column([s.old_log_prob for s in segments], np.float32, math.nan),
        reward=column([s.reward for s in segments], np.float32, math.nan),
        num_lower_micro=np.int32(-(-len(lower_bins) // layout.sequences)),
        first_upper_micro=np.int32(len(alone) // layout.sequences),
        num_lower=np.float32(num_lower),
    )

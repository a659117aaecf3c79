"""Packs rows into sequences of one length: no step computes on padding, and all steps share one shape.

A *segment* is one prompt with one response; parts of the prompt may be learned as well, the earlier answers of a conversation.
Segments are packed into sequences of L tokens by first-fit decreasing; S sequences form a micro-batch, M micro-batches a step.
Lower-level segments are packed first, so that the pass that re-scores them runs over a prefix of the micro-batches; upper-level
segments fill the remaining space. M is an upper bound: the number of micro-batches in use is an array of the batch, not part of its
shape.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

CHUNK = 256  # target slots per chunk of logits
CHUNK_ON_CPU = 128  # so that the logits fit into the CPU caches; on accelerators, small chunks read the output matrix too often
Array = Any  # np.ndarray on the host, jax.Array in the step


def chunk_size(num_targets: int) -> int:
    """Target slots per chunk; the losses compute the logits of one chunk at a time."""
    device = jax.sharding.get_abstract_mesh().abstract_device  # of `jax.set_mesh`, which may name devices of another machine
    kind = device.device_kind if device else jax.default_backend()
    return min(CHUNK, CHUNK_ON_CPU if kind == "cpu" else CHUNK, num_targets)


class Segment(NamedTuple):
    """One prompt and one response, with their role in the step."""

    prompt: np.ndarray  # int32 token ids
    response: np.ndarray  # int32 token ids, including EOS if the model should learn it
    row_index: int = -1  # index into the selector's logits; -1: upper level
    share: float = 0.0  # weight in its level's mean
    group: int = -1  # index of a preference pair, or of a question with generated responses; -1: neither
    sign: int = 0  # +1 chosen, -1 rejected, 0 not a pair
    reference: float = 0.0  # log-probability of a pair's response under the reference model
    old_log_prob: float = math.nan  # log π_old of a generated response; NaN: a response from the data
    reward: float = math.nan  # of a generated response, if its loss depends on it; NaN: no reward
    earlier: Sequence[tuple[int, int]] = ()  # tokens of the prompt that are learned too, [start, stop) each, in order

    @property
    def size(self) -> int:
        return len(self.prompt) + len(self.response)

    @property
    def targets(self) -> np.ndarray:
        """Positions of the learned tokens, in order. Nothing predicts the first token of a segment, so it is never learned."""
        spans = (*self.earlier, (len(self.prompt), self.size))
        return np.concatenate([np.arange(max(start, 1), stop) for start, stop in spans])


class Packed(NamedTuple):
    """Packed segments: E entries (segments) in all, T = S·L tokens and P target slots per micro-batch."""

    tokens: Array  # [M, S, L] int32
    segment_ids: Array  # [M, S, L] int32, 1, 2, ... within a sequence; 0 for padding
    positions: Array  # [M, S, L] int32, restarting at 0 in every segment
    logit_index: Array  # [M, P] int32, flat token index in [0, T) whose hidden state predicts the target; T for padding
    target: Array  # [M, P] int32
    entry: Array  # [M, P] int32, segment of the target; E for padding
    num_targets: Array  # [M] int32
    length: Array  # [E] int32, learned tokens of each entry
    num_micro: Array  # [] int32, micro-batches in use
    entering: Array | None = None  # [M, S, L, D] states that enter the first layer with an adapter, see `frozen`; None: computed


class Batch(NamedTuple):
    """A step's packed segments with their roles in the joint update."""

    packed: Packed
    row_index: Array  # [E] int32, index into the selector's logits; N for upper rows and padding
    share: Array  # [E] float32, weight in the level's mean, sums to 1; both responses of a pair carry the pair's share
    group: Array  # [E] int32, preference pair or question with generated responses; E for neither
    sign: Array  # [E] float32, +1 chosen, -1 rejected, 0 otherwise
    reference: Array  # [E] float32
    old_log_prob: Array  # [E] float32, log π_old of generated responses; NaN for responses from the data
    reward: Array  # [E] float32, of generated responses; NaN for no reward
    num_lower_micro: Array  # [] int32, micro-batches [0, num_lower_micro) hold every lower-level row
    first_upper_micro: Array  # [] int32, micro-batches from here on hold every upper-level row
    num_lower: Array  # [] float32, number of lower-level rows B
    row_factor: Array | None = None  # [E] float32, of each entry's row, see `online.row_factors`; None for 1


class Layout(NamedTuple):
    """The static shape of all batches: S sequences of L tokens per micro-batch, at most E entries per step."""

    sequences: int
    length: int
    entries: int
    separate_levels: bool = False  # no sequence holds both levels: for an update with a separate pass over each level

    @property
    def micro_batches(self) -> int:
        """M, micro-batches of a step: enough for a sequence per entry."""
        return -(-self.entries // self.sequences)

    @property
    def targets(self) -> int:
        """P, target slots per micro-batch: its S·L tokens, rounded up to whole chunks of logits."""
        tokens = self.sequences * self.length
        size = chunk_size(tokens)
        return -(-tokens // size) * size


def update_layout(micro_size: int, length: int, entries: int, separate_levels: bool, num_parts: int = 1) -> Layout:
    """The layout of the batches of an update.

    Where each level has passes of its own, each level ends in a micro-batch that is partly empty. So a micro-batch then has half
    as many sequences: on average, two such ends waste as much as one end of whole ones.

    Args:
      micro_size: sequences of a micro-batch that may hold both levels.
      length, entries, separate_levels: of the result.
      num_parts: devices over which sequences are split; the number of sequences stays a multiple of it.
    """
    can_halve = separate_levels and micro_size % (2 * num_parts) == 0
    return Layout(micro_size // 2 if can_halve else micro_size, length, entries, separate_levels)


def _first_fit(groups: Sequence[Sequence[int]], sizes: Sequence[int], layout: Layout, initial_bins=()) -> list[list[int]]:
    """Assigns groups of segments to sequences by first-fit decreasing, after `initial_bins`. A group stays in one sequence."""
    totals = [sum(sizes[i] for i in group) for group in groups]
    order = sorted(range(len(groups)), key=lambda g: -totals[g])
    bins = [list(members) for members in initial_bins]
    room = [layout.length - sum(sizes[i] for i in members) for members in bins]
    for g in order:
        if totals[g] > layout.length:
            raise ValueError(f"a segment of {totals[g]} tokens does not fit a sequence of {layout.length}")
        b = next((b for b, free in enumerate(room) if free >= totals[g]), None)
        if b is None:
            bins.append([])
            room.append(layout.length)
            b = len(bins) - 1
        bins[b].extend(groups[g])
        room[b] -= totals[g]
    return bins


def _groups(segments: Sequence[Segment], indices: Sequence[int]) -> list[list[int]]:
    """Segments that must share a sequence: the two of a preference pair. Every other segment is a group of one."""
    pairs: dict[int, list[int]] = {}
    for i in indices:
        segment = segments[i]
        pairs.setdefault(segment.group if segment.sign else -1 - i, []).append(i)
    return list(pairs.values())


def _offsets(segments: Sequence[Segment], bins: Sequence[Sequence[int]]) -> Iterator[tuple[int, int, int, int]]:
    """Yields (sequence, segment id, segment index, first token) of every segment, in the order of the bins."""
    for b, members in enumerate(bins):
        start = 0
        for segment_id, i in enumerate(members, start=1):
            yield b, segment_id, i, start
            start += segments[i].size


def _lay_out_tokens(segments: Sequence[Segment], bins: Sequence[Sequence[int]], layout: Layout) -> list[np.ndarray]:
    """`tokens`, `segment_ids` and `positions` of `Packed`."""
    shape = (layout.micro_batches, layout.sequences, layout.length)
    tokens, segment_ids, positions = (np.zeros((shape[0] * shape[1], shape[2]), np.int32) for _ in range(3))
    for b, segment_id, i, start in _offsets(segments, bins):
        span = slice(start, start + segments[i].size)
        tokens[b, span] = np.concatenate([segments[i].prompt, segments[i].response])
        segment_ids[b, span] = segment_id
        positions[b, span] = np.arange(segments[i].size)
    return [array.reshape(shape) for array in (tokens, segment_ids, positions)]


def lay_out(segments: Sequence[Segment], bins: Sequence[Sequence[int]], layout: Layout) -> Packed:
    """Writes the segments of each bin into one sequence; `bins` holds segment indices. Entry i of the result is segment i."""
    S, L, E = layout.sequences, layout.length, layout.entries
    M, P = layout.micro_batches, layout.targets
    logit_index = np.full((M, P), S * L, np.int32)
    target = np.zeros((M, P), np.int32)
    entry = np.full((M, P), E, np.int32)
    num_targets = np.zeros(M, np.int32)
    length = np.zeros(E, np.int32)
    tokens, segment_ids, positions = _lay_out_tokens(segments, bins, layout)
    for b, _, i, start in _offsets(segments, bins):
        m, learned = b // S, segments[i].targets
        length[i] = len(learned)
        slots = slice(num_targets[m], num_targets[m] + length[i])
        logit_index[m, slots] = (b % S) * L + start + learned - 1
        target[m, slots] = tokens[m, b % S, start + learned]
        entry[m, slots] = i
        num_targets[m] += length[i]
    num_micro = np.int32(-(-len(bins) // S))
    return Packed(tokens, segment_ids, positions, logit_index, target, entry, num_targets, length, num_micro)


def _check_entries(segments: Sequence[Segment], layout: Layout) -> None:
    if len(segments) > layout.entries:
        raise ValueError(f"{len(segments)} segments do not fit {layout.entries} entries")


def pack(segments: Sequence[Segment], layout: Layout) -> Packed:
    """Packs segments in any order; entry i of the result is segment i.

    Raises:
      ValueError: more segments than `layout.entries`, or one longer than a sequence.
    """
    _check_entries(segments, layout)
    sizes = [segment.size for segment in segments]
    return lay_out(segments, _first_fit(_groups(segments, range(len(segments))), sizes, layout), layout)


def _step_bins(segments: Sequence[Segment], layout: Layout) -> list[list[int]]:
    """Segment indices of every sequence of a step: the lower level first, the upper level in the remaining space."""
    sizes = [segment.size for segment in segments]
    lower = _groups(segments, [i for i, segment in enumerate(segments) if segment.row_index >= 0])
    upper = _groups(segments, [i for i, segment in enumerate(segments) if segment.row_index < 0])
    lower_bins = _first_fit(lower, sizes, layout)
    if layout.separate_levels:
        return lower_bins + _first_fit(upper, sizes, layout)
    return _first_fit(upper, sizes, layout, lower_bins)


def pack_step(segments: Sequence[Segment], num_rows: int, num_lower: int, layout: Layout) -> Batch:
    """Packs one step's upper and lower segments; entry i of the result is segment i.

    Args:
      segments: lower-level segments have a `row_index` ≥ 0.
      num_rows: rows N of the lower level's data.
      num_lower: rows B of the lower-level batch.
      layout: the static shape.

    Raises:
      ValueError: more segments than `layout.entries`, or one longer than a sequence.
    """
    _check_entries(segments, layout)
    return pack_bins(segments, _step_bins(segments, layout), num_rows, num_lower, layout)


def pack_bins(segments: Sequence[Segment], bins: Sequence[Sequence[int]], num_rows: int, num_lower: int, layout: Layout) -> Batch:
    """Packs one step's segments as assigned: `bins` holds the segment indices of each sequence, both of a pair in one.

    Sequences of the lower level come first, then those of both levels, then those of the upper level. Other arguments as for
    `pack_step`.
    """
    levels = [{segments[i].row_index >= 0 for i in members} for members in bins]  # True: lower
    rank = [({True}, {True, False}, {False}).index(level) for level in levels]
    order = sorted(range(len(bins)), key=rank.__getitem__)  # lower level only, both levels, upper level only

    def column(values, dtype, padding):
        return np.array(values + [padding] * (layout.entries - len(values)), dtype)

    E, N = layout.entries, num_rows
    return Batch(
        packed=lay_out(segments, [bins[b] for b in order], layout),
        row_index=column([s.row_index if s.row_index >= 0 else N for s in segments], np.int32, N),
        share=column([s.share for s in segments], np.float32, 0),
        group=column([s.group if s.group >= 0 else E for s in segments], np.int32, E),
        sign=column([s.sign for s in segments], np.float32, 0),
        reference=column([s.reference for s in segments], np.float32, 0),
        old_log_prob=column([s.old_log_prob for s in segments], np.float32, math.nan),
        reward=column([s.reward for s in segments], np.float32, math.nan),
        num_lower_micro=np.int32(-(-sum(r < 2 for r in rank) // layout.sequences)),
        first_upper_micro=np.int32(rank.count(0) // layout.sequences),
        num_lower=np.float32(num_lower),
    )

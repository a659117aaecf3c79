"""Packing against a reader that decodes one token at a time.

Token j of segment i has the id i * LIMIT + j + 1, so each token id encodes its segment and offset.
"""

import numpy as np
import pytest

from bilevel_jax.data import packing
from bilevel_jax.data.packing import Layout, Segment

LIMIT = 1000


def segment(i, prompt, response, **role):
    ids = i * LIMIT + 1 + np.arange(prompt + response, dtype=np.int32)
    return Segment(ids[:prompt], ids[prompt:], **role)


def segments_of(sizes, **role):
    return [segment(i, *size, **role) for i, size in enumerate(sizes)]


def random_sizes(seed, count, length):
    """Lengths (prompt, response), including empty prompts, one-token responses and a segment that fills a sequence."""
    rng = np.random.default_rng(seed)
    sizes = [(rng.integers(0, length // 2), rng.integers(1, length // 2 + 1)) for _ in range(count - 3)]
    return [tuple(map(int, size)) for size in sizes] + [(length - 3, 3), (0, 4), (0, 1)]


def one_per_sequence(segments, seed):
    """Bins of one segment each, in random order."""
    return [[int(i)] for i in np.random.default_rng(seed).permutation(len(segments))]


def decode(token):
    """(segment, offset) of a token id."""
    return divmod(int(token) - 1, LIMIT)


def sequences(packed):
    """The segments of every sequence in order, each a list of (segment, offset, position)."""
    for m, s in np.ndindex(packed.tokens.shape[:2]):
        runs = {}
        for token, number, position in zip(packed.tokens[m, s], packed.segment_ids[m, s], packed.positions[m, s]):
            if number:
                runs.setdefault(int(number), []).append((*decode(token), int(position)))
        yield [runs[number] for number in sorted(runs)]


def contents(packed):
    """The segments of every sequence in use."""
    return [[run[0][0] for run in runs] for runs in sequences(packed) if runs]


def check(packed, sizes, layout):
    """Checks every invariant of a packing of segments of these sizes."""
    S, L, E, T = layout.sequences, layout.length, layout.entries, layout.sequences * layout.length
    assert packed.tokens.shape == packed.segment_ids.shape == packed.positions.shape == (layout.micro_batches, S, L)
    assert packed.logit_index.shape == packed.target.shape == packed.entry.shape == (layout.micro_batches, layout.targets)
    assert packed.entering is None and all(array.dtype == np.int32 for array in packed[:-1])

    # Every token once, contiguous with its segment, in order, at its position in the segment.
    packed_segments = [run for runs in sequences(packed) for run in runs]
    assert sorted(packed_segments) == [[(i, j, j) for j in range(sum(size))] for i, size in enumerate(sizes)]
    for m, s in np.ndindex(layout.micro_batches, S):
        numbers = packed.segment_ids[m, s]
        used = numbers[numbers > 0]
        np.testing.assert_array_equal(numbers[: len(used)], used)  # padding at the end
        assert np.isin(np.diff(used, prepend=0), (0, 1)).all()  # 1, 2, ... without a gap

    # Every response token is predicted once, by the token before it, for its segment; the first of a segment by none.
    predicted = []
    for m in range(layout.micro_batches):
        count = packed.num_targets[m]
        assert (packed.logit_index[m, count:] == T).all() and (packed.entry[m, count:] == E).all()
        tokens = packed.tokens[m].reshape(-1)
        for logit_index, target, entry in zip(packed.logit_index[m, :count], packed.target[m, :count], packed.entry[m, :count]):
            i, j = decode(target)
            assert decode(tokens[logit_index]) == (i, j - 1) and entry == i
            predicted.append((i, j))
    expected = [(i, j) for i, (prompt, response) in enumerate(sizes) for j in range(max(prompt, 1), prompt + response)]
    assert sorted(predicted) == expected
    lengths = [response if prompt else response - 1 for prompt, response in sizes]
    np.testing.assert_array_equal(packed.length, lengths + [0] * (E - len(sizes)))

    assert packed.num_micro == -(-len(contents(packed)) // S)
    assert not packed.segment_ids[packed.num_micro :].any() and not packed.num_targets[packed.num_micro :].any()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("layout", [Layout(1, 40, 30), Layout(3, 32, 30), Layout(4, 40, 37)])
def test_random_segments(seed, layout):
    sizes = random_sizes(seed, 24 + seed, layout.length)
    check(packing.pack(segments_of(sizes), layout), sizes, layout)


@pytest.mark.parametrize("seed", range(6))
def test_lay_out_keeps_the_given_bins(seed):
    layout = Layout(3, 32, 30)
    sizes = random_sizes(seed, 24 + seed, layout.length)
    bins = one_per_sequence(sizes, seed)
    packed = packing.lay_out(segments_of(sizes), bins, layout)
    check(packed, sizes, layout)
    assert contents(packed) == bins


@pytest.mark.parametrize(
    "sizes",
    [[], [(0, 1)], [(0, 8)], [(5, 3)], [(7, 1)], [(8, 0)], [(0, 1)] * 6, [(4, 4)] * 6, [(1, 7), (0, 1), (2, 6)]],
    ids=str,
)
def test_corner_cases(sizes):
    layout = Layout(sequences=2, length=8, entries=6)
    check(packing.pack(segments_of(sizes), layout), sizes, layout)


def test_first_fit_by_decreasing_size():
    # 7 opens the first sequence, 5 the second; 4 fits next to 5, 3 next to 7, and 1 into the room left by 5 and 4.
    packed = packing.pack(segments_of([(1, 0), (1, 3), (4, 3), (2, 1), (0, 5)]), Layout(2, 10, 5))
    assert contents(packed) == [[2, 3], [4, 1, 0]]
    np.testing.assert_array_equal(packed.tokens[0, 0] // LIMIT, [2] * 7 + [3] * 3)
    np.testing.assert_array_equal(packed.segment_ids[0, 1], [1] * 5 + [2] * 4 + [3])
    np.testing.assert_array_equal(packed.positions[0, 1], [0, 1, 2, 3, 4, 0, 1, 2, 3, 0])


@pytest.mark.parametrize("seed", range(5))
def test_sequences_are_well_filled(seed):
    rng = np.random.default_rng(seed)
    sizes = [(int(prompt), int(response)) for prompt, response in rng.integers(2, 30, (60, 2))]
    used = len(contents(packing.pack(segments_of(sizes), Layout(4, 128, 60))))
    total = sum(map(sum, sizes))
    assert used < 2 * total / 128 + 1  # no two sequences of a first fit are at most half full
    assert total / (used * 128) > 0.9


def test_one_segment_per_sequence():
    packed = packing.lay_out(segments_of([(2, 1), (1, 1), (0, 3)]), [[0], [1], [2]], Layout(2, 8, 4))
    assert contents(packed) == [[0], [1], [2]]
    assert packed.num_micro == 2


@pytest.mark.parametrize("pack", [packing.pack, lambda s, layout: packing.pack_step(s, 5, 1, layout)])
def test_rejects_segments_that_do_not_fit(pack):
    with pytest.raises(ValueError, match="3 segments do not fit 2"):
        pack(segments_of([(1, 1)] * 3), Layout(2, 8, 2))
    with pytest.raises(ValueError, match="9 tokens .* 8"):
        pack(segments_of([(4, 5)]), Layout(2, 8, 2))
    with pytest.raises(ValueError, match="10 tokens .* 8"):
        pack(segments_of([(4, 1)] * 2, group=0, sign=1), Layout(2, 8, 2))  # a pair is not split


# --------------------------------------------------------------------------------------------------------------------
# Steps
# --------------------------------------------------------------------------------------------------------------------


def random_levels(seed, num_rows=100):
    """Sizes of 25 segments, their row indices (-1: upper level), and the segments."""
    sizes, rng = random_sizes(seed, 25, 40), np.random.default_rng(seed)
    row_index = [int(i) if rng.random() < 0.5 else -1 for i in rng.permutation(num_rows)[: len(sizes)]]
    return sizes, row_index, [segment(i, *size, row_index=row_index[i], share=i / 10) for i, size in enumerate(sizes)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sequences", [1, 3, 8])
@pytest.mark.parametrize("packing_of", ["mixed levels", "separate levels", "one per sequence"])
def test_lower_level_comes_first(seed, sequences, packing_of):
    layout, num_rows = Layout(sequences, 40, 30, separate_levels=packing_of == "separate levels"), 100
    sizes, row_index, segments = random_levels(seed, num_rows)
    if packing_of == "one per sequence":
        batch = packing.pack_bins(segments, one_per_sequence(segments, seed), num_rows, 7, layout)
        assert all(len(members) == 1 for members in contents(batch.packed))
    else:
        batch = packing.pack_step(segments, num_rows, 7, layout)
    check(batch.packed, sizes, layout)

    levels = [{row_index[i] >= 0 for i in members} for members in contents(batch.packed)]
    rank = [({True}, {True, False}, {False}).index(level) for level in levels]
    assert rank == sorted(rank)  # sequences of the lower level, of both levels, of the upper level
    assert 1 not in rank or packing_of == "mixed levels"
    number = len(rank) - rank.count(2)
    assert batch.num_lower_micro == -(-number // sequences)
    assert batch.first_upper_micro == rank.count(0) // sequences

    padding = layout.entries - len(sizes)
    np.testing.assert_array_equal(batch.row_index, [i if i >= 0 else num_rows for i in row_index] + [num_rows] * padding)
    np.testing.assert_array_equal(batch.share, np.float32([i / 10 for i in range(len(sizes))] + [0] * padding))
    assert batch.num_lower == 7


@pytest.mark.parametrize("seed", range(6))
def test_upper_level_fills_the_remaining_space(seed):
    """The lower level uses no extra sequences, and no upper-level row opens a sequence if it fits an open one."""
    sizes, row_index, segments = random_levels(seed)
    mixed, separate = (packing.pack_step(segments, 100, 7, Layout(1, 40, 30, separate_levels=flag)) for flag in (False, True))
    assert mixed.num_lower_micro == separate.num_lower_micro and mixed.packed.num_micro <= separate.packed.num_micro
    assert mixed.first_upper_micro < mixed.num_lower_micro  # some upper-level rows fit
    bins = contents(mixed.packed)
    free = [40 - sum(sum(sizes[i]) for i in members) for members in bins]
    upper_bins = [members for members in bins if all(row_index[i] < 0 for i in members)]
    assert all(min(sum(sizes[i]) for i in members) > max(free[: mixed.num_lower_micro]) for members in upper_bins)


@pytest.mark.parametrize(
    "micro_size, separate, parts, sequences",
    [(8, False, 1, 8), (8, True, 1, 4), (8, True, 4, 4), (4, True, 4, 4), (6, True, 2, 6), (3, True, 1, 3), (1, True, 1, 1)],
)
def test_a_micro_batch_of_one_level_has_half_the_sequences(micro_size, separate, parts, sequences):
    """... if the devices over which they are split divide them."""
    assert packing.update_layout(micro_size, 40, 30, separate, parts) == Layout(sequences, 40, 30, separate)


def test_half_as_many_sequences_waste_as_few_as_whole_micro_batches_of_both_levels():
    """Sequences computed, over all numbers of a level's sequences up to 40."""

    def computed(sequences, micro_size):
        return -(-sequences // micro_size) * micro_size

    mixed, half, whole = 0, 0, 0
    for lower, upper in np.ndindex(40, 40):
        mixed += computed(lower + upper + 2, 8)
        half += sum(computed(number + 1, packing.update_layout(8, 40, 80, True).sequences) for number in (lower, upper))
        whole += computed(lower + 1, 8) + computed(upper + 1, 8)
    assert abs(half / mixed - 1) < 0.02 and whole / mixed > 1.07


def test_pairs_share_a_sequence():
    rng, count, layout = np.random.default_rng(0), 12, Layout(2, 40, 30)
    sizes = [(int(prompt), int(response)) for prompt, response in rng.integers(1, 11, (2 * count, 2))]
    order = rng.permutation(2 * count)  # the responses of a pair need not be adjacent
    roles = [dict(group=int(k) // 2, sign=1 - 2 * (int(k) % 2), reference=-float(k)) for k in order]
    segments = [segment(i, *sizes[i], **roles[i]) for i in range(2 * count)]
    lower = [segment(2 * count, 3, 4, row_index=2), segment(2 * count + 1, 1, 6, row_index=0)]
    batch = packing.pack_step(segments + lower, 5, 2, layout)
    check(batch.packed, sizes + [(3, 4), (1, 6)], layout)
    sequence_of = {i: b for b, members in enumerate(contents(batch.packed)) for i in members}
    for pair in range(count):
        first, second = (i for i, k in enumerate(order) if k // 2 == pair)
        assert sequence_of[first] == sequence_of[second]

    rest = layout.entries - 2 * count
    np.testing.assert_array_equal(batch.group, [*(order // 2)] + [layout.entries] * rest)
    np.testing.assert_array_equal(batch.sign, [*(1 - 2 * (order % 2))] + [0] * rest)
    np.testing.assert_array_equal(batch.reference, [*(-order)] + [0] * rest)


@pytest.mark.parametrize("packing_of", ["first fit", "one per sequence"])
def test_generated_responses_may_be_in_different_sequences(packing_of):
    """Responses to one question share a group, as pairs do, but not a sequence: together they would not fit into one."""
    rng, layout = np.random.default_rng(0), Layout(2, 40, 30)
    sizes = [(8, int(response)) for response in rng.integers(1, 33, 20)]
    question = [int(q) for q in rng.integers(0, 4, 20)]
    segments = [
        segment(i, *size, row_index=q, share=1 / 8, group=20 + q, old_log_prob=-i / 3)
        for i, (size, q) in enumerate(zip(sizes, question))
    ]
    pairs = [segment(20 + i, 4, 5, group=i // 2, sign=1 - 2 * (i % 2)) for i in range(4)]
    others = [segment(24, 5, 5, row_index=9), segment(25, 5, 5, row_index=-1)]
    segments = segments + pairs + others
    if packing_of == "first fit":
        batch = packing.pack_step(segments, 10, 5, layout)
    else:
        bins = [[i] for i in range(20)] + [[20, 21], [22, 23], [24], [25]]
        batch = packing.pack_bins(segments, bins, 10, 5, layout)
    check(batch.packed, sizes + [(4, 5)] * 4 + [(5, 5)] * 2, layout)
    sequence_of = {i: b for b, members in enumerate(contents(batch.packed)) for i in members}
    assert all(len({sequence_of[i] for i in range(20) if question[i] == q}) > 1 for q in range(4))
    np.testing.assert_array_equal(batch.group, [20 + q for q in question] + [0, 0, 1, 1] + [30] * 6)
    np.testing.assert_array_equal(batch.old_log_prob, np.float32([-i / 3 for i in range(20)] + [np.nan] * 10))
    np.testing.assert_array_equal(batch.row_index, question + [10] * 4 + [9] + [10] * 5)
    assert batch.num_lower == 5


@pytest.mark.parametrize(
    "entries, sequences, expected", [(32, 8, 4), (33, 8, 5), (1, 8, 1), (7, 1, 7)]
)  # enough for one segment per sequence
def test_number_of_micro_batches(entries, sequences, expected):
    assert Layout(sequences, 16, entries).micro_batches == expected


@pytest.mark.parametrize("tokens, expected", [(40, 40), (64, 64), (75, 128), (512, 512)])
def test_target_slots_are_a_multiple_of_the_chunk(monkeypatch, tokens, expected):
    monkeypatch.setattr(packing, "CHUNK", 64)
    assert Layout(1, tokens, 1).targets == expected

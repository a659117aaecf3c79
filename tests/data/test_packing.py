"""Packing against a reader that looks at one token at a time.

Token j of segment i has the id i * LIMIT + j + 1, so that every token says by itself where it belongs.
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
    """(prompt, response) lengths: no prompt and one-token responses among them, and one that fills a sequence."""
    rng = np.random.default_rng(seed)
    sizes = [(rng.integers(0, length // 2), rng.integers(1, length // 2 + 1)) for _ in range(count - 3)]
    return [tuple(map(int, size)) for size in sizes] + [(length - 3, 3), (0, 4), (0, 1)]


def owner(token):
    """(segment, offset) of a token id."""
    return divmod(int(token) - 1, LIMIT)


def sequences(packed):
    """Of every sequence, its segments in order, each a list of (owner, offset, position)."""
    for m, s in np.ndindex(packed.tokens.shape[:2]):
        runs = {}
        for token, number, position in zip(packed.tokens[m, s], packed.segment_ids[m, s], packed.positions[m, s]):
            if number:
                runs.setdefault(int(number), []).append((*owner(token), int(position)))
        yield [runs[number] for number in sorted(runs)]


def contents(packed):
    """Of every sequence in use, the segments that it holds."""
    return [[run[0][0] for run in runs] for runs in sequences(packed) if runs]


def check(packed, sizes, layout):
    """All that holds of any packing of segments of these sizes."""
    S, L, E, T = layout.sequences, layout.length, layout.entries, layout.sequences * layout.length
    assert packed.tokens.shape == packed.segment_ids.shape == packed.positions.shape == (layout.micro_batches, S, L)
    assert packed.logit_index.shape == packed.target.shape == packed.entry.shape == (layout.micro_batches, layout.targets)
    assert all(array.dtype == np.int32 for array in packed)

    # Every token once, in one piece with its segment, in order, at its own position.
    found = [run for runs in sequences(packed) for run in runs]
    whole = [[(i, j, j) for j in range(sum(size))] for i, size in enumerate(sizes)]
    assert sorted(found) == whole
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
        for source, target, entry in zip(packed.logit_index[m, :count], packed.target[m, :count], packed.entry[m, :count]):
            i, j = owner(target)
            assert owner(tokens[source]) == (i, j - 1) and entry == i
            predicted.append((i, j))
    expected = [(i, j) for i, (prompt, response) in enumerate(sizes) for j in range(max(prompt, 1), prompt + response)]
    assert sorted(predicted) == expected
    lengths = [response if prompt else response - 1 for prompt, response in sizes]
    np.testing.assert_array_equal(packed.length, lengths + [0] * (E - len(sizes)))

    assert packed.num_micro == -(-len(contents(packed)) // S)
    assert not packed.segment_ids[packed.num_micro :].any() and not packed.num_targets[packed.num_micro :].any()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("layout", [Layout(1, 40, 30), Layout(3, 32, 30), Layout(4, 40, 37), Layout(3, 32, 30, True)])
def test_random_segments(seed, layout):
    sizes = random_sizes(seed, 24 + seed, layout.length)
    check(packing.pack(segments_of(sizes), layout), sizes, layout)


@pytest.mark.parametrize(
    "sizes",
    [[], [(0, 1)], [(0, 8)], [(5, 3)], [(7, 1)], [(8, 0)], [(0, 1)] * 6, [(4, 4)] * 6, [(1, 7), (0, 1), (2, 6)]],
    ids=str,
)
def test_corner_cases(sizes):
    layout = Layout(sequences=2, length=8, entries=6)
    check(packing.pack(segments_of(sizes), layout), sizes, layout)


def test_first_fit_by_decreasing_size():
    # 7 opens the first sequence, 5 the second; 4 fits beside 5, 3 beside 7, and 1 into the room beside 5 and 4.
    packed = packing.pack(segments_of([(1, 0), (1, 3), (4, 3), (2, 1), (0, 5)]), Layout(2, 10, 5))
    assert contents(packed) == [[2, 3], [4, 1, 0]]
    np.testing.assert_array_equal(packed.tokens[0, 0] // LIMIT, [2] * 7 + [3] * 3)
    np.testing.assert_array_equal(packed.segment_ids[0, 1], [1] * 5 + [2] * 4 + [3])
    np.testing.assert_array_equal(packed.positions[0, 1], [0, 1, 2, 3, 4, 0, 1, 2, 3, 0])


@pytest.mark.parametrize("seed", range(5))
def test_little_room_is_lost(seed):
    rng = np.random.default_rng(seed)
    sizes = [(int(prompt), int(response)) for prompt, response in rng.integers(2, 30, (60, 2))]
    used = len(contents(packing.pack(segments_of(sizes), Layout(4, 128, 60))))
    total = sum(map(sum, sizes))
    assert used < 2 * total / 128 + 1  # no two sequences of a first fit are at most half full
    assert total / (used * 128) > 0.9


def test_padded_layout_holds_one_segment_per_sequence():
    packed = packing.pack(segments_of([(2, 1), (1, 1), (0, 3)]), Layout(2, 8, 4, padded=True))
    assert sorted(contents(packed)) == [[0], [1], [2]]
    assert packed.num_micro == 2


@pytest.mark.parametrize("pack", [packing.pack, lambda s, layout: packing.pack_step(s, 5, 1, layout)])
def test_what_does_not_fit_is_refused(pack):
    with pytest.raises(ValueError, match="3 segments do not fit 2"):
        pack(segments_of([(1, 1)] * 3), Layout(2, 8, 2))
    with pytest.raises(ValueError, match="9 tokens .* 8"):
        pack(segments_of([(4, 5)]), Layout(2, 8, 2))
    with pytest.raises(ValueError, match="10 tokens .* 8"):
        pack(segments_of([(4, 1)] * 2, group=0, sign=1), Layout(2, 8, 2))  # a pair is not torn apart


# --------------------------------------------------------------------------------------------------------------------
# Steps
# --------------------------------------------------------------------------------------------------------------------


def random_levels(seed, num_rows=100):
    """Sizes of 25 segments, the rows of those of the lower level (-1: upper), and the segments."""
    sizes, rng = random_sizes(seed, 25, 40), np.random.default_rng(seed)
    samples = [int(i) if rng.random() < 0.5 else -1 for i in rng.permutation(num_rows)[: len(sizes)]]
    return sizes, samples, [segment(i, *size, sample=samples[i], share=i / 10) for i, size in enumerate(sizes)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sequences", [1, 3, 8])
@pytest.mark.parametrize("padded, apart", [(False, False), (False, True), (True, False)])
def test_lower_level_comes_first(seed, sequences, padded, apart):
    layout, num_rows = Layout(sequences, 40, 30, padded, apart), 100
    sizes, samples, segments = random_levels(seed, num_rows)
    batch = packing.pack_step(segments, num_rows, 7, layout)
    check(batch.packed, sizes, layout)

    levels = [{samples[i] >= 0 for i in members} for members in contents(batch.packed)]
    rank = [({True}, {True, False}, {False}).index(level) for level in levels]
    assert rank == sorted(rank)  # the lower level's sequences, those of both, the upper level's
    assert 1 not in rank or not (padded or apart)
    number = len(rank) - rank.count(2)
    assert batch.num_lower_micro == -(-number // sequences)
    assert batch.first_upper_micro == rank.count(0) // sequences

    padding = layout.entries - len(sizes)
    np.testing.assert_array_equal(batch.row_index, [i if i >= 0 else num_rows for i in samples] + [num_rows] * padding)
    np.testing.assert_array_equal(batch.share, np.float32([i / 10 for i in range(len(sizes))] + [0] * padding))
    assert batch.num_lower == 7


@pytest.mark.parametrize("seed", range(6))
def test_upper_level_fills_what_the_lower_leaves(seed):
    """The lower level takes no more sequences for it, and no row of the upper level opens one while it fits another."""
    sizes, samples, segments = random_levels(seed)
    found, apart = (packing.pack_step(segments, 100, 7, Layout(1, 40, 30, apart=apart)) for apart in (False, True))
    assert found.num_lower_micro == apart.num_lower_micro and found.packed.num_micro <= apart.packed.num_micro
    assert found.first_upper_micro < found.num_lower_micro  # there is room for some
    bins = contents(found.packed)
    free = [40 - sum(sum(sizes[i]) for i in members) for members in bins]
    opened = [members for members in bins if all(samples[i] < 0 for i in members)]
    assert all(min(sum(sizes[i]) for i in members) > max(free[: found.num_lower_micro]) for members in opened)


def test_pairs_share_a_sequence():
    rng, count, layout = np.random.default_rng(0), 12, Layout(2, 40, 30)
    sizes = [(int(prompt), int(response)) for prompt, response in rng.integers(1, 11, (2 * count, 2))]
    order = rng.permutation(2 * count)  # the two of a pair need not be neighbours
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


@pytest.mark.parametrize("padded", [False, True])
def test_own_responses_go_where_there_is_room(padded):
    """Those to one question share a number, as preference pairs do, but no sequence: together they would not fit one."""
    rng, layout = np.random.default_rng(0), Layout(2, 40, 30, padded)
    sizes = [(8, int(response)) for response in rng.integers(1, 33, 20)]
    question = [int(q) for q in rng.integers(0, 4, 20)]
    segments = [
        segment(i, *size, row_index=q, share=1 / 8, group=20 + q, old_log_prob=-i / 3)
        for i, (size, q) in enumerate(zip(sizes, question))
    ]
    pairs = [segment(20 + i, 4, 5, group=i // 2, sign=1 - 2 * (i % 2)) for i in range(4)]
    others = [segment(24, 5, 5, row_index=9), segment(25, 5, 5, row_index=-1)]
    batch = packing.pack_step(segments + pairs + others, 10, 5, layout)
    check(batch.packed, sizes + [(4, 5)] * 4 + [(5, 5)] * 2, layout)
    where = {i: b for b, members in enumerate(contents(batch.packed)) for i in members}
    assert all(len({where[i] for i in range(20) if question[i] == q}) > 1 for q in range(4))
    np.testing.assert_array_equal(batch.group, [20 + q for q in question] + [0, 0, 1, 1] + [30] * 6)
    np.testing.assert_array_equal(batch.old_log_prob, np.float32([-i / 3 for i in range(20)] + [np.nan] * 10))
    np.testing.assert_array_equal(batch.row_index, question + [10] * 4 + [9] + [10] * 5)
    assert batch.num_lower == 5


@pytest.mark.parametrize(
    "entries, sequences, expected", [(32, 8, 4), (33, 8, 5), (1, 8, 1), (7, 1, 7)]
)  # enough for every segment to have a sequence of its own
def test_number_of_micro_batches(entries, sequences, expected):
    assert Layout(sequences, 16, entries).micro_batches == expected


@pytest.mark.parametrize("tokens, expected", [(40, 40), (64, 64), (75, 128), (512, 512)])
def test_target_slots_come_in_whole_chunks(monkeypatch, tokens, expected):
    monkeypatch.setattr(packing.losses, "CHUNK", 64)
    assert Layout(1, tokens, 1).targets == expected

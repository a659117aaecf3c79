"""Copies and near-duplicates."""

import itertools

import numpy as np
import pytest

from bilevel_jax.data import duplicates, rows
from bilevel_jax.data.prepared import sequences

WORDS = [f"w{i}" for i in range(60)]


def parse(*texts):
    return list(rows.parse((i, {"question": text, "response": "yes"}) for i, text in enumerate(texts, 1)))


def test_copies():
    clusters = duplicates.clusters(parse("a", "b", "a", "c", "b", "a"), "exact")
    assert clusters.tolist() == [0, 1, 0, 3, 1, 0]
    assert duplicates.sizes(clusters) == {2: 1, 3: 1} and duplicates.num_copies({2: 1, 3: 1}) == 3
    assert duplicates.sizes(duplicates.clusters(parse("a", "b"), "exact")) == {}


def test_contents_are_read_once(monkeypatch):
    """Of a million prepared rows they take 8 MB."""
    calls, content = [], np.array([5, 2**64 - 1, 5], np.uint64)
    monkeypatch.setattr(sequences.StoredRows, "contents", property(lambda self: calls.append(self) or content))
    prepared = sequences.StoredRows(None, np.arange(3))
    assert duplicates.clusters(prepared, "exact").tolist() == [0, 1, 0] and len(calls) == 1


def changed(position: int, word: str) -> str:
    return " ".join([*WORDS[:position], word, *WORDS[position + 1 :]])


def test_similarity_by_hand():
    """61 words have 57 shingles of five; a word in the middle is in five of them: 52 in common, 62 in the union."""
    a, b = parse(" ".join(WORDS), changed(30, "x"))
    assert duplicates.similarity(duplicates.shingles(a), duplicates.shingles(b)) == pytest.approx(52 / 62)
    assert duplicates.shingles(parse("Two, WORDS!")[0]) == {"two words yes"}


def test_near_duplicates():
    """Rows that differ in a word or two at the end are one cluster. The same words in another order are not in it."""
    texts = [" ".join(WORDS), changed(58, "x"), " ".join(reversed(WORDS)), changed(58, "x").replace("w57", "y"), "w1", "w1"]
    parsed = parse(*texts)
    sets = [duplicates.shingles(row) for row in parsed]
    near = {(i, j) for i, j in itertools.combinations(range(6), 2) if duplicates.similarity(sets[i], sets[j]) >= 0.8}
    assert near == {(0, 1), (0, 3), (1, 3), (4, 5)}
    assert duplicates.clusters(parsed, "near").tolist() == [0, 0, 2, 0, 4, 4]
    assert duplicates.clusters(parsed, "exact").tolist() == [0, 1, 2, 3, 4, 4]


def test_near_duplicates_are_those_of_all_pairs():
    """Against the comparison of all pairs, on rows with 0 to 12 of 60 words changed."""
    rng = np.random.default_rng(0)
    texts = []
    for family, number in itertools.product(range(12), range(5)):
        words = [f"f{family}w{i}" for i in range(60)]
        start = int(rng.integers(0, 40))
        words[start : start + 3 * number] = [f"n{rng.integers(1e9)}" for _ in range(3 * number)]
        texts.append(" ".join(words))
    parsed = parse(*texts)
    sets = [duplicates.shingles(row) for row in parsed]
    expected = list(range(len(parsed)))
    for i, j in itertools.combinations(range(len(parsed)), 2):
        if len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= 0.8:
            expected = [expected[i] if root == expected[j] else root for root in expected]
    assert 12 < len(set(expected)) < len(parsed)
    assert duplicates.clusters(parsed, "near").tolist() == expected


def test_rows_without_words():
    """Their texts tell them apart."""
    objects = [
        {"question": question, "response": response}
        for question, response in [("?", "!"), ("🙂", "👍"), (" 🙂", "👍 "), ("a", "b")]
    ]
    parsed = list(rows.parse(enumerate(objects, 1)))
    assert duplicates.shingles(parsed[0]) == {"? !"} and duplicates.shingles(parsed[3]) == {"a b"}
    assert duplicates.clusters(parsed, "near").tolist() == [0, 1, 1, 3]

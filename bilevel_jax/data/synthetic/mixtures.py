"""Mixtures of generated rows: the two levels, preference pairs, domains, and rows with bad words.

A checksum of the question assigns it to the upper or the lower level, so the levels share no question, whatever the seeds. Within
one call no question is repeated; calls with different seeds may share questions. For held-out rows, draw more rows in one call and
split them.
"""

import zlib
from collections.abc import Callable, Iterable

import numpy as np

from bilevel_jax.data.synthetic import bed
from bilevel_jax.data.synthetic.corruptions import BAD_KINDS, WORD_KINDS, make_row, make_token_row
from bilevel_jax.data.synthetic.draws import draw

SUPPLIERS = {"north": 0.0, "south": 0.1, "east": 0.25, "west": 0.45, "harbour": 0.7, "island": 0.95}  # share of bad rows


def upper(num_rows: int, seed: int) -> list[dict]:
    """Trusted rows: every response is right."""
    return _rows(np.random.default_rng([seed, 0]), ["clean"] * num_rows, side=0)


def lower(num_rows: int, seed: int, bad_fraction: float = 0.15) -> list[dict]:
    """A shuffled mixture with exactly round(bad_fraction · num_rows) bad rows."""
    rng = np.random.default_rng([seed, 1])
    return _rows(rng, _mixed_kinds(rng, BAD_KINDS, num_rows, bad_fraction), side=1)


def trusted(num_rows: int, seed: int) -> list[dict]:
    """Trusted rows of the test bed: right answers to questions of `bed.FAMILIES` in the plain style."""
    return _rows(np.random.default_rng([seed, 6]), ["clean"] * num_rows, side=0, make=bed.make_row)


def mixture(num_rows: int, seed: int) -> list[dict]:
    """The mixture of the test bed: rows of `bed.KINDS`, shuffled, each kind with exactly its share."""
    rng = np.random.default_rng([seed, 7])
    bounds = np.round(np.cumsum([0, *bed.KINDS.values()]) * num_rows).astype(int)
    kinds = [kind for kind, size in zip(bed.KINDS, np.diff(bounds)) for _ in range(size)]
    return _rows(rng, draw(rng, kinds, num_rows), side=1, make=bed.make_row)


def domains(num_rows: int, seed: int) -> list[dict]:
    """A shuffled mixture with equally many rows of each of `SUPPLIERS`, the `source`, each with its share of bad rows."""
    rng = np.random.default_rng([seed, 4])
    labels = []  # (kind, supplier)
    for i, (supplier, share) in enumerate(SUPPLIERS.items()):
        size = num_rows // len(SUPPLIERS) + (i < num_rows % len(SUPPLIERS))
        num_bad = round(share * size)
        kinds = [*rng.choice(list(BAD_KINDS), num_bad, p=list(BAD_KINDS.values())), *["clean"] * (size - num_bad)]
        labels += [(kind, supplier) for kind in kinds]
    labels = [labels[i] for i in rng.permutation(len(labels))]
    rows = _rows(rng, [kind for kind, _ in labels], side=1)
    return [row | {"source": supplier} for row, (_, supplier) in zip(rows, labels)]


def tokens(num_rows: int, seed: int, bad_fraction: float = 0.15) -> list[dict]:
    """A shuffled mixture with exactly round(bad_fraction · num_rows) rows that have bad words.

    `bad_spans` holds the [start, stop) of the bad words in characters of the response; `bad` is true for rows that have any.
    """
    rng = np.random.default_rng([seed, 5])
    return _rows(rng, _mixed_kinds(rng, WORD_KINDS, num_rows, bad_fraction), side=1, make=make_token_row)


def upper_pairs(num_rows: int, seed: int) -> list[dict]:
    """Trusted preference pairs: the right response is chosen, a bad one rejected."""
    rng = np.random.default_rng([seed, 2])
    return _pairs(rng, num_rows, np.zeros(num_rows, bool), side=0)


def lower_pairs(num_rows: int, seed: int, bad_fraction: float = 0.15) -> list[dict]:
    """Preference pairs; exactly round(bad_fraction · num_rows) of them are flipped: the right response is rejected."""
    if not 0 <= bad_fraction <= 1:
        raise ValueError(f"bad_fraction must lie in [0, 1], not {bad_fraction}")
    rng = np.random.default_rng([seed, 3])
    flipped = rng.permutation(num_rows) < round(bad_fraction * num_rows)
    return _pairs(rng, num_rows, flipped, side=1)


def _pairs(rng: np.random.Generator, num_rows: int, flipped: np.ndarray, side: int) -> list[dict]:
    """Bad rows of all kinds, each paired with its truth. `bad` marks a flipped pair, `kind` is the kind of the wrong response."""
    kinds = rng.choice(list(BAD_KINDS), num_rows, p=list(BAD_KINDS.values()))
    pairs = []
    for row, flip in zip(_rows(rng, kinds, side), flipped):
        right, wrong = row["truth"], row.pop("response")
        chosen, rejected = (wrong, right) if flip else (right, wrong)
        pairs.append({"prompt": row.pop("question"), "chosen": chosen, "rejected": rejected} | row | {"bad": bool(flip)})
    return pairs


def _mixed_kinds(rng: np.random.Generator, bad_kinds: dict[str, float], num_rows: int, bad_fraction: float) -> list[str]:
    """The kinds of a shuffled mixture: exactly round(bad_fraction · num_rows) bad rows, their kinds drawn by share."""
    if not 0 <= bad_fraction <= 1:
        raise ValueError(f"bad_fraction must lie in [0, 1], not {bad_fraction}")
    num_bad = round(bad_fraction * num_rows)
    bad = list(rng.choice(list(bad_kinds), num_bad, p=list(bad_kinds.values())))
    return draw(rng, bad + ["clean"] * (num_rows - num_bad), num_rows)


def _rows(
    rng: np.random.Generator, kinds: Iterable[str], side: int, make: Callable = make_row, max_tries: int = 1000
) -> list[dict]:
    """One row per kind, from `make`. No question is repeated, and all questions have the checksum of this side (0 or 1)."""
    rows: dict[str, dict] = {}
    for kind in kinds:
        for _ in range(max_tries):
            row = make(rng, str(kind))
            question = row["question"]
            is_right = row["response"] == row["truth"]
            if zlib.crc32(question.encode()) % 2 == side and question not in rows and is_right != row["bad"]:
                rows[question] = row
                break
        else:
            raise ValueError(f"no new question of kind {kind} after {len(rows)} rows; ask for fewer rows")
    return list(rows.values())

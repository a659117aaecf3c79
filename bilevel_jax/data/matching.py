"""Finds the rows of a table among the rows of the data, by their ids, in blocks and without a dictionary of all ids."""

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa

from bilevel_jax.data.rejections import DataError
from bilevel_jax.data.rows import Row

BLOCK = 1 << 12  # rows whose ids are looked up at once


def as_bytes(ids: pa.ChunkedArray) -> np.ndarray:
    """The ids, at least one, as bytes, [n]: a few bytes each, where Python's strings take 65."""
    parts = (ids.slice(first, BLOCK).to_pylist() for first in range(0, len(ids), BLOCK))
    return np.concatenate([np.array([one.encode() for one in part]) for part in parts])


def match(candidates: Iterable[Row], ids: pa.ChunkedArray, strict: bool = True) -> Iterator[tuple[int, Row]]:
    """Yields the candidates whose ids are among `ids`, each with the index of its id, in the order of the candidates.

    Arguments and errors as for `blocks`.
    """
    for indices, rows in blocks(candidates, ids, strict):
        yield from zip(indices.tolist(), rows)


def blocks(candidates: Iterable[Row], ids: pa.ChunkedArray, strict: bool = True) -> Iterator[tuple[np.ndarray, list[Row]]]:
    """`match`, some rows at a time: yields the indices of their ids, [n], and the rows.

    Args:
      candidates: rows; no two have the same id.
      ids: texts, at least one, all different.
      strict: whether every id must match a candidate.

    Raises:
      DataError: at the end, if one does not: the ids are from other data.
    """
    stored = as_bytes(ids)
    order = np.argsort(stored, kind="stable")
    stored, matched, candidates = stored[order], np.zeros(len(ids), bool), iter(candidates)
    while block := list(itertools.islice(candidates, BLOCK)):
        asked = np.array([row.id.encode() for row in block])
        position = np.minimum(np.searchsorted(stored, asked), len(stored) - 1)
        is_equal, indices = stored[position] == asked, order[position]
        matched[indices[is_equal]] = True
        yield indices[is_equal], [*itertools.compress(block, is_equal.tolist())]
    if strict and not matched.all():
        first = ids[int(np.argmin(matched))].as_py()
        what = f"{int((~matched).sum())} of {len(ids)} ids match no row (first: {first})"
        raise DataError(f"{what}; the ids are from other data")

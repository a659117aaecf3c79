"""Rows of equal and of nearly equal content.

Near-duplicates have word 5-grams in common: the Jaccard similarity of the sets is at least 0.8. MinHash finds candidates without
comparing all pairs, and their similarity is then computed exactly. Near-duplicates of near-duplicates are in one cluster.
"""

import collections
import re
from collections.abc import Mapping, Sequence

import numpy as np

from bilevel_jax import progress
from bilevel_jax.data.prepared import sequences
from bilevel_jax.data.rows import Row

MODES = ("off", "exact", "near")
SIMILARITY = 0.8
CANDIDATES = 0.6  # similarity from which MinHash finds half of the pairs; of those at 0.8 it then finds nearly all
WORDS = 5  # of a shingle
NUM_HASHES = 128


def clusters(rows: Sequence[Row], mode: str, pairs: bool = True) -> np.ndarray:
    """The cluster of each row, [n] int64: the index of the first row with the same content (nearly the same for `near`).

    Args:
      rows: of one level.
      mode: `near`, or another one for equal contents.
      pairs: as in `sequences.contents`.
    """
    _, first, inverse = np.unique(sequences.contents(rows, pairs), return_index=True, return_inverse=True)
    exact = first[inverse].astype(np.int64)
    return _join(exact, _near_pairs(rows, np.sort(first).tolist())) if mode == "near" else exact


def sizes(cluster: np.ndarray) -> dict[int, int]:
    """size -> number of clusters of that size, for sizes from 2."""
    _, counts = np.unique(cluster, return_counts=True)
    return dict(sorted(collections.Counter(counts[counts > 1].tolist()).items()))


def num_copies(sizes_of_clusters: Mapping[int, int]) -> int:
    """The number of rows beyond the first of each cluster."""
    return sum((size - 1) * count for size, count in sizes_of_clusters.items())


def shingles(row: Row) -> set[str]:
    """The word 5-grams of all texts of a row, in lower case; all words as one for shorter rows, the text itself without words."""
    text = " ".join((row.system, *(content for _, content in row.messages), row.response, row.rejected or ""))
    words = re.findall(r"\w+", text.lower()) or [text.strip()]
    return {" ".join(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))}


def similarity(a: set[str], b: set[str]) -> float:
    """Jaccard similarity |A ∩ B| / |A ∪ B|."""
    return len(a & b) / len(a | b)


def _near_pairs(rows: Sequence[Row], indices: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs (earlier, later) of near-duplicates among the rows at `indices`."""
    import datasketch

    index = datasketch.MinHashLSH(threshold=CANDIDATES, num_perm=NUM_HASHES)
    empty = datasketch.MinHash(num_perm=NUM_HASHES, seed=1)
    pairs = []
    for i in progress.bar(indices, desc="near-duplicates", unit="row"):
        shingles_i, sketch = shingles(rows[i]), empty.copy()
        sketch.update_batch([shingle.encode() for shingle in shingles_i])
        pairs += [(j, i) for j in sorted(index.query(sketch)) if similarity(shingles(rows[j]), shingles_i) >= SIMILARITY]
        index.insert(i, sketch, check_duplication=False)
    return pairs


def _join(cluster: np.ndarray, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Joins the clusters of each pair; a joined cluster has its smallest index."""
    parent = cluster.copy()

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for pair in pairs:
        low, high = sorted(map(root, pair))
        parent[high] = low
    return np.array([root(i) for i in range(len(parent))], np.int64)

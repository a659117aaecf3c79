"""Counting copies, against a dictionary of all counts."""

import collections

import numpy as np
import pytest

from bilevel_jax.data.copies import CopyCounter


@pytest.mark.parametrize("size", [1, 3, 64, 1 << 16])  # ids in the set: from always sorted to never
def test_counts(size):
    rng = np.random.default_rng(size)
    different = np.array([0, 2**64 - 1, *rng.integers(0, 2**64, 400, np.uint64)], np.uint64)
    copies, counts = CopyCounter(size), collections.Counter()
    for number in rng.choice(different, 1500):
        row_id = f"{number:016x}"
        counts[row_id] += 1
        assert copies.add(row_id) == counts[row_id]
    assert max(counts.values()) > 3

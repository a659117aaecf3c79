"""Scoring of responses: which work overlaps, and what is read from the devices. `test_step` has the values of losses."""

import jax
import numpy as np
import pytest

from bilevel_jax import scoring, sharding
from bilevel_jax.data import packing
from tests.test_step import LLAMA


@pytest.fixture
def segments(monkeypatch):
    """Five segments, for three batches of one shape; their responses have 1 to 5 tokens."""
    monkeypatch.setattr(scoring, "ENTRIES", 2)
    return [packing.Segment(np.array([1, 2], np.int32), np.arange(1, n + 1, dtype=np.int32)) for n in range(1, 6)]


@pytest.mark.parametrize("greedy", [False, True])
def test_a_batch_is_fetched_after_the_next_one_is_dispatched(monkeypatch, segments, greedy):
    """So that the device computes while the host packs. Numbers of tokens are known on the host, and are not fetched."""
    events, pack = [], packing.pack

    class Result:
        def __init__(self, number, values):
            self.number, self.values = number, values

        def __array__(self, dtype=None, copy=None):
            events.append(f"fetch {self.number}")
            return self.values

    def program(config, base, adapter, packed):
        number = sum(event.startswith("dispatch") for event in events)
        events.append(f"dispatch {number}")
        sums = jax.ops.segment_sum(packed.target.ravel(), packed.entry.ravel(), num_segments=2)
        for leaf in packed:
            if leaf is not None:
                leaf.delete()
        return tuple(Result(number, np.asarray(part)) for part in ((sums, sums % 2) if greedy else (sums,)))

    monkeypatch.setattr(packing, "pack", lambda *arguments: events.append("pack") or pack(*arguments))
    monkeypatch.setattr(scoring, "_entry_scores" if greedy else "_entry_nll", program)
    score = scoring.make_scorer(LLAMA, 2, 16, sharding.make_mesh(1), greedy)
    nll, count, *right = score(None, None, segments, "scoring")
    each = 2 if greedy else 1
    fetches = [[f"fetch {number}"] * each for number in range(3)]
    first, second, third = (["pack", f"dispatch {number}"] for number in range(3))
    assert events == [*first, *second, *fetches[0], *third, *fetches[1], *fetches[2]]
    assert nll.tolist() == [1, 3, 6, 10, 15] and count.tolist() == [1, 2, 3, 4, 5]  # 1 + 2 + ... + n
    if greedy:
        assert right[0].tolist() == [False, False, True, True, False]


def test_results_of_no_segments():
    assert list(scoring.results(None, [], 2, 16, sharding.make_mesh(1), "scoring")) == []

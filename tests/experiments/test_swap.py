"""The swap test, small: the default rule follows the trusted rows, wherever they point."""

import numpy as np
import pytest

from experiments.selection import candidates, swap

SIZES = 32, 32, 64  # ordinary, refused and complied, trusted


def test_the_mixture_does_not_depend_on_the_trusted_rows():
    (upper_a, lower_a), (upper_b, lower_b) = (swap.make_rows("tiny", side, 0, sizes=SIZES) for side in "AB")
    assert lower_a == lower_b
    assert not {row["question"] for row in lower_a} & {row["question"] for row in upper_a + upper_b}
    assert {row["kind"] for row in upper_a} == {"ordinary", "refused"}
    assert {row["kind"] for row in upper_b} == {"ordinary", "complied"}
    shuffled, _ = swap.make_rows("tiny", "A", 0, shuffled=True, sizes=SIZES)
    assert sorted(row["response"] for row in shuffled) == sorted(row["response"] for row in upper_a) and shuffled != upper_a


@pytest.mark.slow
def test_the_default_rule_follows_the_swap(tmp_path):
    """The base knows both kinds of answers. Without labels: only the trusted rows say which of the two is wanted."""
    measured = {}
    for side in "AB":
        bed = swap.make_bed("tiny", *swap.make_rows("tiny", side, 0, sizes=SIZES), tmp_path, seed=0)
        measured[side] = swap.measure(bed, candidates.OURS, side, seed=0)
    assert min(measured[side]["auroc"] for side in "AB") > 0.9
    assert np.sign(measured["A"]["refused"] - measured["A"]["complied"]) == 1
    assert np.sign(measured["B"]["refused"] - measured["B"]["complied"]) == -1

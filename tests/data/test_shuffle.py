"""The order of the rows: steps and epochs counted by hand for several shapes."""

import itertools

import numpy as np
import pytest

from bilevel_jax.data import shuffle

SHAPES = [(12, 4), (13, 4), (7, 7), (5, 8), (1, 1), (1, 3), (9, 1)]  # rows, batch size
EPOCHS = 4


@pytest.mark.parametrize("size, batch, expected", [(12, 4, 3), (13, 4, 4), (7, 7, 1), (5, 8, 1), (1, 3, 1), (9, 1, 9)])
def test_steps_per_epoch(size, batch, expected):
    assert shuffle.steps_per_epoch(size, batch) == expected


@pytest.mark.parametrize("size, batch", SHAPES)
def test_lower_rows_occur_once_per_epoch(size, batch):
    steps = -(-size // batch)
    for epoch in range(EPOCHS):
        drawn = [shuffle.lower_rows(3, size, batch, epoch * steps + k) for k in range(steps)]
        assert sorted(np.concatenate(drawn)) == list(range(size))
        assert [len(rows) for rows in drawn] == [batch] * (size // batch) + [size % batch] * (size % batch > 0)


@pytest.mark.parametrize("size, batch", SHAPES)
def test_upper_rows_are_concatenated_passes(size, batch):
    drawn = [shuffle.upper_rows(3, size, batch, k) for k in range(EPOCHS * size)]
    assert {len(rows) for rows in drawn} == {batch}
    for one_pass in np.concatenate(drawn).reshape(-1, size):
        assert sorted(one_pass) == list(range(size))


@pytest.mark.parametrize("draw", [shuffle.lower_rows, shuffle.upper_rows])
def test_steps_are_independent(draw):
    forwards = [draw(5, 23, 4, k) for k in range(30)]
    shuffle._lower_order.cache_clear()
    shuffle._upper_pass.cache_clear()
    backwards = [draw(5, 23, 4, k) for k in reversed(range(30))][::-1]
    for first, second in zip(forwards, backwards, strict=True):
        np.testing.assert_array_equal(first, second)


def test_a_small_upper_level_does_not_displace_the_order_of_the_lower_one():
    """Nine passes over five rows in a batch."""
    shuffle._lower_order.cache_clear()
    for k in range(20):
        shuffle.lower_rows(5, 1000, 45, k)
        shuffle.upper_rows(5, 5, 45, k)
    assert shuffle._lower_order.cache_info().misses == 1


def test_seeds_epochs_and_levels_have_different_orders():
    draws = itertools.product((shuffle.lower_rows, shuffle.upper_rows), (0, 1), (0, 1))
    passes = {tuple(draw(seed, 50, 50, epoch)) for draw, seed, epoch in draws}
    assert len(passes) == 8 and tuple(range(50)) not in passes

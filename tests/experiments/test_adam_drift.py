"""The made-up visits of the page on Adam's drift."""

import numpy as np

from bilevel_jax import selector as selection
from experiments.selection import adam_drift


def test_every_row_is_visited_once_an_epoch():
    num_rows = 70  # three steps an epoch, the last one with 6 rows
    rows, costs, gamma, bad, first = adam_drift.make_visits(num_rows, seed=3)
    assert rows.shape == costs.shape == (9, adam_drift.BATCH) and bad.shape == (num_rows,)
    for epoch in range(3):
        of_epoch = rows[3 * epoch : 3 * epoch + 3]
        assert sorted(of_epoch[of_epoch < num_rows]) == list(range(num_rows))
    for i in range(num_rows):
        assert i in rows[int(first[i])]
    np.testing.assert_allclose(gamma[[0, 3, 6]], [1 / 9, 1 / 4, 3 / 7], rtol=1e-6)


def test_a_row_without_a_visit_moves_with_adam_and_stays_with_mirror_descent():
    """One step on row 0 of 3, cost 1: (10b) pulls the others up by 1/9, and Adam's first move is its whole learning rate."""
    visits = np.array([[0, 3]], np.int32), np.array([[1.0, 0.0]], np.float32), np.ones(1, np.float32)
    adam = selection.Selector(optimizer="adam", learning_rate=0.01, baseline="none")
    np.testing.assert_allclose(adam_drift.train(adam, 3, *visits), [-0.01, 0.01, 0.01], rtol=1e-4)
    mirror = selection.Selector(learning_rate=0.01, baseline="none")
    np.testing.assert_allclose(adam_drift.train(mirror, 3, *visits), [-0.01, 0.0, 0.0], rtol=1e-4)

"""Tests of experiments/selection/influence_noise.py."""

import numpy as np
import pytest

from bilevel_jax.errors import RunError
from experiments.selection import influence_noise


def test_harms_of_visits_follow_from_running_means():
    harm = np.random.default_rng(0).standard_normal((4, 7))
    useful = [-harm[: k + 1].mean(axis=0) for k in range(4)]
    np.testing.assert_allclose(influence_noise.harms(np.array(useful)), harm, atol=1e-12)


def test_one_epoch_is_too_few(tmp_path):
    with pytest.raises(RunError, match="has 0 tables of weights, and two epochs are needed"):
        influence_noise.read_useful(tmp_path)

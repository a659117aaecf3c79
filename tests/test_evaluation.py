"""Measures of a run, by hand."""

import numpy as np
import pytest

from bilevel_jax import evaluation, online
from bilevel_jax.data import templates


def test_rows_in_use():
    """Row 2 has two generated responses, row 5 one, row 7 none; row 9 is not measured."""
    examples = [templates.Example(np.array([i]), np.array([i] * (i + 1)), None) for i in range(10)]
    store = online.from_arrays(
        {
            "step": np.array([3]),
            "masked": np.isin(np.arange(10), (2, 5, 7, 9)),
            "row": np.array([2, 2, 5, 9]),
            "sample": np.array([0, 1, 0, 0]),
            "log_prob": np.zeros(4),
            "log_ratio": np.zeros(4),
            "tokens": np.array([100, 100, 40, 20, 20, 0]),
            "length": np.array([2, 1, 2, 1]),
        }
    )

    def score(base, adapter, segments, description):
        """The NLL of a token is its number."""
        lengths = np.array([len(segment.response) for segment in segments])
        return np.array([segment.response.sum() for segment in segments], float), lengths, lengths > 0

    values = evaluation.rows_in_use(examples, store, np.array([2, 5, 7, 8]), score, None, None)
    # ℓ of the data: 2, 5, 7, 8. Row 2: (200/2 + 40/1) / 2 = 70; row 5: 40/2 = 20.
    assert values["eval/used_data_loss"] == pytest.approx((2 + 5 + 7 + 8) / 4)
    assert values["eval/used_loss"] == pytest.approx((70 + 20 + 7 + 8) / 4)
    assert values["eval/used_generated"] == 2 / 4

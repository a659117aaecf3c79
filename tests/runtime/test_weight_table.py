"""The table of weights against the softmax written out."""

import dataclasses

import numpy as np
import pyarrow.parquet
import pytest

from bilevel_jax.data import rows
from bilevel_jax.runtime import weight_table
from tests.conftest import make_rows

LOGITS = np.array([0.5, -1.0, 2.0, 0.5, -3.0], np.float32)


@pytest.fixture
def stored():
    return list(rows.parse(enumerate(make_rows(5, seed=0), 1)))


def make(stored, logits=LOGITS):
    return weight_table.table(stored, logits, np.array([2, 1, 0, 3, 1.0000001]), np.array([0, 0, 1, 0, 0]))


def test_columns(stored):
    table = make(stored)
    assert table.column_names == ["id", "weight", "logit", "rank", "visits", "masked", "source"]
    columns = table.to_pydict()
    sigma = np.exp(LOGITS) / np.exp(LOGITS).sum()
    np.testing.assert_allclose(columns["weight"], 5 * sigma, rtol=1e-6)
    assert columns["id"] == [row.id for row in stored] and columns["source"] == ["sums-0"] * 5
    assert columns["logit"] == LOGITS.tolist()
    assert columns["rank"] == [2, 4, 1, 3, 5]  # of equal rows the one stored first
    assert columns["visits"] == [2, 1, 0, 3, 1]
    assert columns["masked"] == [False, False, True, False, False]


@pytest.mark.parametrize("shift", [1e3, -1e3])
def test_only_differences_of_logits_matter(stored, shift):
    shifted = make(stored, np.float64(LOGITS) + shift)
    np.testing.assert_allclose(shifted["weight"], make(stored)["weight"], rtol=1e-6)


def test_latest(stored, tmp_path):
    assert weight_table.latest(tmp_path) is None
    for epoch in (2, 10, 9):  # by number, not by name or time
        weight_table.write(tmp_path / "weights" / f"epoch_{epoch}.parquet", make(stored, LOGITS * epoch))
    assert weight_table.latest(tmp_path)["logit"].to_pylist() == (10 * LOGITS).tolist()
    assert pyarrow.parquet.read_table(tmp_path / "weights" / "epoch_10.parquet").equals(weight_table.latest(tmp_path))


WEIGHT = [[0.5, 1.5], [2.0, 0.4, 0.6], [1.0]]
PLACES = [[(0, 2), (2, 2)], [(0, 1), (1, 3), (4, 9), (9, 9)], [(0, 4)]]  # nothing predicts the first token of the second


def make_tokens(stored):
    return weight_table.token_table(stored[:3], [np.array(of_row) for of_row in PLACES], [np.float32(of_row) for of_row in WEIGHT])


def test_tokens(stored, tmp_path):
    assert weight_table.of_tokens(tmp_path) is None
    weight_table.write(tmp_path / weight_table.TOKENS, make_tokens(stored))
    found = weight_table.of_tokens(tmp_path).to_pydict()
    assert found["id"] == [row.id for row in stored[:3]]
    assert found["start"] == [[0, 2], [1, 4, 9], [0]] and found["stop"] == [[2, 2], [3, 9, 9], [4]]
    np.testing.assert_allclose(np.concatenate(found["weight"]), np.concatenate(WEIGHT), rtol=1e-6)
    assert weight_table.epoch_files(tmp_path) == {}  # it is of no epoch
    (tmp_path / weight_table.TOKENS).write_bytes(b"PAR1")
    with pytest.raises(rows.DataError, match="tokens.parquet: not a readable table"):
        weight_table.of_tokens(tmp_path)


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([[], [[2, 5]], []], 4 / 8),  # 0.4 is below all four others, 2 below none
        ([[[0, 1]], [], []], 4 / 5),  # 0.5 is above 0.4 alone
        ([None, [[3, 4]], []], None),  # a space that is in no token
        ([[], [], []], None),
    ],
)
def test_token_auroc(stored, spans, expected):
    given = [dataclasses.replace(row, fields=row.fields | {"odd": of_row}) for row, of_row in zip(stored, spans)]
    value = weight_table.token_auroc(make_tokens(stored), given, "odd")
    assert np.isnan(value) if expected is None else value == pytest.approx(expected)

"""The weight table against an explicit softmax, and the table of token weights."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from bilevel_jax.data import rows as data_rows
from bilevel_jax.runtime import weight_table
from tests.conftest import make_rows

LOGITS = np.array([0.5, -1.0, 2.0, 0.5, -3.0], np.float32)


@pytest.fixture
def rows():
    return list(data_rows.parse(enumerate(make_rows(5, seed=0), 1)))


def make(rows, logits=LOGITS):
    return weight_table.table(rows, logits, np.array([2, 1, 0, 3, 1.0000001]), np.array([0, 0, 1, 0, 0]))


def test_columns(rows):
    table = make(rows)
    measures = "plausible", "useful", "similar", "nearest"
    assert table.column_names == ["id", "weight", "logit", "rank", *measures, "visits", "masked", "source"]
    columns = table.to_pydict()
    sigma = np.exp(LOGITS) / np.exp(LOGITS).sum()
    np.testing.assert_allclose(columns["weight"], 5 * sigma, rtol=1e-6)
    assert columns["id"] == [row.id for row in rows] and columns["source"] == ["sums-0"] * 5
    assert columns["logit"] == LOGITS.tolist()
    assert columns["rank"] == [2, 4, 1, 3, 5]  # equal weights keep their order
    assert columns["visits"] == [2, 1, 0, 3, 1]
    assert columns["masked"] == [False, False, True, False, False]


@pytest.mark.parametrize("shift", [1e3, -1e3])
def test_only_differences_of_logits_matter(rows, shift):
    shifted = make(rows, np.float64(LOGITS) + shift)
    np.testing.assert_allclose(shifted["weight"], make(rows)["weight"], rtol=1e-6)


def test_latest(rows, tmp_path):
    assert weight_table.latest(tmp_path) is None
    for epoch in (2, 10, 9):  # by number, not by name or time
        weight_table.write(tmp_path / "weights" / f"epoch_{epoch}.parquet", make(rows, LOGITS * epoch))
    assert weight_table.latest(tmp_path)["logit"].to_pylist() == (10 * LOGITS).tolist()
    assert pyarrow.parquet.read_table(tmp_path / "weights" / "epoch_10.parquet").equals(weight_table.latest(tmp_path))


def test_measures(rows, tmp_path):
    zeros, loss = np.zeros(5), np.array([0.0, np.log(2), np.nan, 3.0, 200.0])
    table = weight_table.table(rows, LOGITS, zeros, zeros, loss, useful=np.array([1.5, -2, 0, 0, 1]))
    plausible = table["plausible"].to_pylist()
    np.testing.assert_allclose(plausible[:2] + plausible[3:], [1, 0.5, np.exp(-3), 0], rtol=1e-6)
    assert plausible[2] is None  # never visited
    assert table["useful"].to_pylist() == [1.5, -2, 0, 0, 1] and weight_table.known_measures(table) == ["plausible", "useful"]
    table = weight_table.table(rows, LOGITS, zeros, zeros, loss, similar=np.arange(5) - 2)
    assert table["similar"].to_pylist() == [-2, -1, 0, 1, 2] and weight_table.known_measures(table) == ["plausible", "similar"]
    table = weight_table.table(rows, LOGITS, zeros, zeros, loss, nearest=np.array([3, 0, 0, 7, 1], np.int32))
    assert table["nearest"].to_pylist() == [3, 0, 0, 7, 1] and weight_table.known_measures(table) == ["plausible"]
    table = weight_table.table(rows, LOGITS, zeros, zeros, loss)
    assert table["nearest"].null_count == 5
    assert table["useful"].null_count == 5 and weight_table.known_measures(table) == ["plausible"]


def test_blocks_are_parts_of_one_table(rows, tmp_path, monkeypatch):
    """The last block is smaller; ids and sources are given apart, as a run has them."""
    whole = weight_table.table(rows, LOGITS, np.arange(5), np.array([0, 0, 1, 0, 0]), np.array([1, np.nan, 0, 2, 3]))
    monkeypatch.setattr(weight_table, "BLOCK", 2)
    ids, sources = tuple(row.id for row in rows), pa.array([row.source for row in rows]).dictionary_encode()
    surprise = np.array([1, np.nan, 0, 2, 3], np.float32)
    blocks = [*weight_table.blocks(ids, sources, LOGITS, np.arange(5), np.array([0, 0, 1, 0, 0]), surprise)]
    assert [len(block) for block in blocks] == [2, 2, 1] and pa.concat_tables(blocks).equals(whole)
    weight_table.write_blocks(tmp_path / "weights" / "epoch_1.parquet", blocks)
    assert weight_table.latest(tmp_path).equals(whole)


def test_a_table_of_one_block_is_one_row_group(rows, tmp_path):
    """The file is what `pyarrow` writes for a table."""
    weight_table.write(tmp_path / "a.parquet", make(rows))
    pyarrow.parquet.write_table(make(rows), tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_tables_of_earlier_versions(rows, tmp_path):
    old = make(rows).drop_columns([*weight_table.NULLABLE])
    weight_table.write(tmp_path / "weights" / "epoch_1.parquet", old)
    table = weight_table.latest(tmp_path)
    assert table.schema == weight_table.SCHEMA and weight_table.known_measures(table) == []
    assert table.drop_columns([*weight_table.NULLABLE]).equals(old)


WEIGHT = [[0.5, 1.5], [2.0, 0.4, 0.6], [1.0]]
OFFSETS = [[(0, 2), (2, 2)], [(0, 1), (1, 3), (4, 9), (9, 9)], [(0, 4)]]  # the first token of the second row has no prediction


def make_tokens(rows):
    return weight_table.token_table(rows[:3], [np.array(offsets) for offsets in OFFSETS], [np.float32(weight) for weight in WEIGHT])


def test_tokens_of_conversations(rows):
    """The last answer, after 3 tokens of earlier ones; a conversation that is cut has no offsets."""
    offsets = [np.array(OFFSETS[0]), np.zeros((0, 2), np.int32)]
    table = weight_table.token_table(rows[:2], offsets, [np.float32([9, 9, 9, 0.5, 1.5]), np.float32([1, 1])])
    assert table["weight"].to_pylist() == [[0.5, 1.5], []] and table["start"].to_pylist() == [[0, 2], []]


def test_tokens(rows, tmp_path):
    assert weight_table.read_tokens(tmp_path) is None
    weight_table.write(tmp_path / weight_table.TOKENS, make_tokens(rows))
    columns = weight_table.read_tokens(tmp_path).to_pydict()
    assert columns["id"] == [row.id for row in rows[:3]]
    assert columns["start"] == [[0, 2], [1, 4, 9], [0]] and columns["stop"] == [[2, 2], [3, 9, 9], [4]]
    np.testing.assert_allclose(np.concatenate(columns["weight"]), np.concatenate(WEIGHT), rtol=1e-6)
    assert weight_table.epoch_files(tmp_path) == {}  # it belongs to no epoch
    (tmp_path / weight_table.TOKENS).write_bytes(b"PAR1")
    with pytest.raises(data_rows.DataError, match="tokens.parquet: not a readable table"):
        weight_table.read_tokens(tmp_path)


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([[], [[2, 5]], []], 4 / 8),  # 0.4 is less than all four others, 2 is less than none
        ([[[0, 1]], [], []], 4 / 5),  # 0.5 is greater than 0.4 only
        ([None, [[3, 4]], []], None),  # a space that is in no token
        ([[], [], []], None),
    ],
)
def test_token_auroc(rows, spans, expected):
    marked = [dataclasses.replace(row, fields=row.fields | {"odd": row_spans}) for row, row_spans in zip(rows, spans)]
    value = weight_table.token_auroc(make_tokens(rows), marked, "odd")
    assert np.isnan(value) if expected is None else value == pytest.approx(expected)


@pytest.mark.parametrize("value", [[[0, 1, 2]], "0-5", [["a", "b"]], [0, 5], [[0, 5], [6]]])
def test_spans_that_are_none(rows, value):
    row = dataclasses.replace(rows[0], fields={"odd": value})
    with pytest.raises(data_rows.DataError, match=rf"^row {row.id}: odd=.* is not a list of \[start, stop\], in characters"):
        data_rows.spans(row, "odd")

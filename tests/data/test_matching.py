"""Rows of a table among those of the data: in any order, block by block."""

import numpy as np
import pyarrow as pa
import pytest

from bilevel_jax.data import by_turn, matching, rows, streaming
from bilevel_jax.data.rejections import DataError
from tests.conftest import make_rows, write_jsonl

OBJECTS = [*make_rows(6, seed=0), *make_rows(2, seed=0)]  # two copies, whose ids are longer


@pytest.fixture(params=[2, 3, 4096])
def size(request, monkeypatch):
    monkeypatch.setattr(matching, "BLOCK", request.param)


def ids_of(parsed, indices) -> pa.ChunkedArray:
    """Ids in two chunks and an empty one."""
    ids = [parsed[i].id for i in indices]
    return pa.chunked_array([ids[:2], [], ids[2:]], pa.string())


@pytest.mark.parametrize("seed", range(3))
def test_match(size, seed):
    parsed = list(rows.parse(enumerate(OBJECTS, 1)))
    rng = np.random.default_rng(seed)
    chosen, order = rng.permutation(8)[:5], rng.permutation(8)
    result = list(matching.match((parsed[i] for i in order), ids_of(parsed, chosen)))
    assert result == [([*chosen].index(i), parsed[i]) for i in order if i in chosen]


def test_ids_of_other_data(size):
    parsed = list(rows.parse(enumerate(OBJECTS, 1)))
    ids, others = ids_of(parsed, [4, 1, 7, 0]), [parsed[i] for i in (0, 2, 4)]
    assert list(matching.match(others, ids, strict=False)) == [(3, parsed[0]), (0, parsed[4])]
    with pytest.raises(DataError, match=rf"^2 of 4 ids match no row \(first: {parsed[1].id}\)"):
        list(matching.match(others, ids))
    with pytest.raises(DataError, match="^4 of 4"):
        list(matching.match([], ids))


CHAT = [
    {"role": role, "content": content} for role, content in [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"selection.unit": "turn"},
        {"data.columns": "question:asked"},
        {"data.num_lower": 4},
        {"data.lower": "synthetic:lower", "data.num_lower": 5},
    ],
)
def test_a_stream_has_the_rows_of_a_list(make_config, tmp_path, changes):
    """Each with the number of its object, of which one cannot be used; answers of a conversation have that of the conversation."""
    objects = [*make_rows(4, seed=0), {"nothing": 1}, {"messages": CHAT}, {"asked": "q", "response": "r"}]
    config = make_config({"data.lower": str(write_jsonl(tmp_path / "rows.jsonl", objects))} | changes)
    whole = streaming._read_whole(config)
    answers = [by_turn.rows_of(row, ["truth"]) if "selection.unit" in changes else [row] for row in whole]
    assert list(streaming.reopen(config)) == [part for parts in answers for part in parts]
    numbers = [row.line - 1 for row, parts in zip(whole, answers) for _ in parts]
    assert [position for position, _ in streaming.numbered(config)] == numbers


@pytest.mark.parametrize("objects", [[], [{"nothing": 1}]])
def test_a_stream_without_rows(make_config, tmp_path, objects):
    config = make_config({"data.lower": str(write_jsonl(tmp_path / "rows.jsonl", objects))})
    with pytest.raises(DataError) as expected:
        streaming._read_whole(config)
    with pytest.raises(DataError) as result:
        list(streaming.reopen(config))
    assert str(result.value) == str(expected.value)

"""Exports of runs written by hand: what is on disk meanwhile changes nothing."""

import json

import numpy as np
import pyarrow.parquet
import pytest

from bilevel_jax import config as configuration
from bilevel_jax.data import rows
from bilevel_jax.export import kept_rows, records
from bilevel_jax.runtime import weight_table
from tests.conftest import run_command, write_jsonl

PAIRED = {"prompt": "p ", "completion": "c"}
PLAIN = {"question": "q", "response": "r", "rank": 7, "bad": True}


def make_workdir(directory, objects, logits):
    """A finished run whose rows have these logits; the first row was masked."""
    workdir = directory / "run"
    workdir.mkdir()
    config = configuration.default()
    config.data.lower, config.data.template = str(write_jsonl(directory / "lower.jsonl", objects)), "human"
    (workdir / "config.json").write_text(config.to_json())
    (workdir / "summary.json").write_text("{}")
    parsed, _ = rows.read_rows(directory / "lower.jsonl")
    masked = np.arange(len(parsed)) == 0
    table = weight_table.table(parsed, np.array(logits), np.ones(len(parsed)), masked)
    weight_table.write(workdir / "weights" / "epoch_1.parquet", table)
    return workdir, parsed, config, table


def test_lines_by_hand(tmp_path):
    """Rows 0 and 2 of three are kept; a field `rank` is renamed in both, though row 0 has none."""
    objects = [{"question": "a", "response": "b"}, {"question": "c", "response": "d"}, PLAIN]
    workdir, parsed, _, table = make_workdir(tmp_path, objects, [0.0, -1.0, 1.0])
    run_command("export", [f"--workdir={workdir}", f"--selected={tmp_path / 'kept.jsonl'}", "--keep=0.67", "--format=text"])
    weight = table["weight"].to_pylist()
    expected = [
        {"question": "a", "response": "b", "id": parsed[0].id, "weight": weight[0], "rank": 2, "masked": True}
        | {"prompt": "Human: a\n\nAssistant:", "completion": " b"},
        {"question": "q", "response": "r", "original_rank": 7, "bad": True, "id": parsed[2].id, "weight": weight[2], "rank": 1}
        | {"masked": False, "prompt": "Human: q\n\nAssistant:", "completion": " r"},
    ]
    assert (tmp_path / "kept.jsonl").read_text() == "".join(json.dumps(record) + "\n" for record in expected)


def test_equal_weights_rank_no_row(tmp_path):
    """A share would be the first rows of the file."""
    workdir, parsed, config, _ = make_workdir(tmp_path, [{"question": f"{i}", "response": "b"} for i in range(4)], np.zeros(4))
    with pytest.raises(ValueError, match="all weights are equal, so no row is heavier"):
        kept_rows.collect(workdir, config, keep=0.5)
    assert [record["id"] for record in kept_rows.collect(workdir, config, keep=1.0).records] == [row.id for row in parsed]


@pytest.mark.parametrize(
    "objects, form",
    [([PAIRED] * 3, "as is"), ([PAIRED, PAIRED, PLAIN], "text"), ([PLAIN, PAIRED, PAIRED], "text"), ([PLAIN] * 2, "text")],
)
def test_the_form_follows_from_all_rows(tmp_path, objects, form):
    """Also from a last row that is unlike those before it: all of them have its columns."""
    workdir, parsed, config, _ = make_workdir(tmp_path, objects, np.arange(len(objects)))
    selection = kept_rows.collect(workdir, config, keep=1.0)
    result = [*selection.records]
    assert selection.form == form and selection.order.tolist() == [*range(len(objects))]
    assert [record["id"] for record in result] == [row.id for row in parsed]
    assert all(record.get("completion", "").strip() in "cr" for record in result)
    assert ("original_prompt" in result[-1]) == (form == "text" and objects[-1] is PAIRED)
    assert selection.labels.tolist() == [1 if value is PLAIN else rows.UNLABELLED for value in objects]


@pytest.mark.parametrize("name", ["kept.jsonl", "kept.parquet"])
def test_an_export_of_all_schemas_is_read_as_the_same_rows(tmp_path, name):
    """Fields are renamed in all rows if they clash in one."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}] * 2
    shared = [{"from": turn["role"], "value": turn["content"]} for turn in turns[:2]]
    pair = {"prompt": "p", "chosen": "c", "rejected": "d"}
    objects = [{"messages": turns}, PLAIN, PAIRED, {"conversations": shared}, pair, {"instruction": "i", "output": "o"}]
    workdir, parsed, _, _ = make_workdir(tmp_path, objects, np.zeros(6))
    run_command("export", [f"--workdir={workdir}", f"--selected={tmp_path / name}", "--keep=1"])
    again, report = rows.read_rows(tmp_path / name)
    assert [row.id for row in again] == [row.id for row in parsed] and not report.rejections


def test_parquet_in_blocks(tmp_path, monkeypatch):
    """Blocks with other fields, numbers that are whole in one block only, and structs that grow."""
    given = [{"a": 1, "m": [{"x": "1"}]}, {"a": 2}, {"b": None, "a": 2.5}, {"m": [{"x": "1", "y": "2"}], "b": "t"}, {"m": []}]
    records.write(tmp_path / "whole.parquet", given)
    monkeypatch.setattr(records, "BLOCK", 2)
    records.write(tmp_path / "blocks.parquet", given)
    whole, blocks = (pyarrow.parquet.read_table(tmp_path / f"{name}.parquet") for name in ("whole", "blocks"))
    assert blocks.equals(whole) and blocks["a"].to_pylist() == [1.0, 2.0, 2.5, None, None]
    with pytest.raises(ValueError, match="that Parquet cannot hold"):
        records.write(tmp_path / "kept.parquet", [{"a": 1}, {}, {"a": "x"}])
    assert not (tmp_path / "kept.parquet").exists()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_repeated(size, monkeypatch):
    monkeypatch.setattr(records, "PICKLED", size)
    stored = records.Records()
    for name in "abc":
        stored.add(1, {"name": name}, {})
        assert next(iter(stored)) == {"name": "a"}  # an iteration that ends early
    twice = records.Repeated(stored, np.array([2, 0, 1]))
    assert [record["name"] for record in twice] == ["a", "a", "c"] == [record["name"] for record in twice]

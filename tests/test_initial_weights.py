"""Weights that a run starts from: read from tables, files and fields, matched by id, used by a run."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest

from bilevel_jax import checks, initial_weights
from bilevel_jax.data import levels, shuffle
from bilevel_jax.data import rows as data_rows
from bilevel_jax.data.prepared import stored
from bilevel_jax.runtime import weight_table
from tests.conftest import load, make_rows, read_jsonl, run_command, token_log_probs, train_without_report, write_jsonl

WEIGHTS = [3.0, 0.5, None, 1.0, 0.0, 1.5]


@pytest.fixture
def rows(tmp_path):
    """Six rows with weights in a field `quality`, one without."""
    objects = [row | {"quality": weight} for row, weight in zip(make_rows(6, seed=3), WEIGHTS)]
    return data_rows.read_rows(str(write_jsonl(tmp_path / "rows.jsonl", objects)))[0]


def softmax_weights(logits):
    share = np.exp(np.float64(logits))
    return len(share) * share / share.sum()


def test_a_column(rows):
    """Weights over their mean 1.2; the row without one gets the mean, and 0 becomes as good as 0."""
    given = initial_weights.read("column:quality", rows)
    np.testing.assert_allclose(softmax_weights(given.logits), [2.5, 0.5 / 1.2, 1, 1 / 1.2, 0, 1.25], atol=1e-6)
    assert np.isfinite(given.logits).all() and given.num_matched == 5
    assert given.summary("column:quality") == "selection.init=column:quality: weights for 5 of 6 rows; the other 1 get the mean"


def test_weights_whose_sum_is_no_number(tmp_path):
    """Of 1.5e308, 1e308 and 5e307 only the ratios 3 : 2 : 1 count; their sum is infinite in float64."""
    objects = make_rows(3, seed=1)
    write_jsonl(tmp_path / "rows.jsonl", [row | {"w": w} for row, w in zip(objects, (1.5e308, 1e308, 5e307))])
    usable, _ = data_rows.read_rows(str(tmp_path / "rows.jsonl"))
    given = initial_weights.read("column:w", usable)
    np.testing.assert_allclose(softmax_weights(given.logits), [1.5, 1, 0.5], rtol=1e-6)


@pytest.mark.parametrize("form", ["workdir", "parquet", "jsonl"])
def test_tables_of_other_rows_in_another_order(rows, tmp_path, form):
    """Two of six rows are in the table, beside rows of other data: their mean there says what 1 is here."""
    others = data_rows.read_rows(str(write_jsonl(tmp_path / "others.jsonl", make_rows(3, seed=4))))[0]
    stored = [others[0], rows[4], others[1], rows[1], others[2]]
    logits = np.log([1.0, 4.0, 1.0, 2.0, 7.0])
    table = weight_table.table(stored, logits, visits=np.ones(5), masked=np.zeros(5))
    for epoch, written in ((2, table), (1, table.slice(0, 1))):  # the last epoch counts
        weight_table.write(tmp_path / "weights" / f"epoch_{epoch}.parquet", written)
    records = [{key: record[key] for key in ("id", "weight", "rank")} for record in table.to_pylist()]
    file = write_jsonl(tmp_path / "kept.jsonl", [*records, records[1]])
    source = {"workdir": tmp_path, "parquet": tmp_path / "weights" / "epoch_2.parquet", "jsonl": file}[form]
    given = initial_weights.read(str(source), rows)
    np.testing.assert_allclose(softmax_weights(given.logits), [1, 2 / 3, 1, 1, 4 / 3, 1], rtol=1e-6)
    assert given.num_matched == 2


@pytest.mark.parametrize(
    "content, reason",
    [
        ([{"id": "abc", "weight": 1.0}], "none of its 1 ids belongs to a training row; it is about other data"),
        ([{"id": "abc"}], "line 1: a row needs 'id' and 'weight'"),
        ([{"id": 3, "weight": 1.0}], "line 1: a row needs 'id' and 'weight'"),
        ([{"id": "abc", "weight": -1.0}], "line 1: -1.0 is not a weight"),
        ([{"id": "abc", "weight": "high"}], "line 1: 'high' is not a weight"),
        ([{"id": "abc", "weight": True}], "line 1: True is not a weight"),
        ([{"id": "abc", "weight": float("inf")}], "line 1: inf is not a weight"),
        ([{"id": "abc", "weight": float("nan")}], "line 1: nan is not a weight"),
    ],
)
def test_refuses_tables(rows, tmp_path, content, reason):
    file = write_jsonl(tmp_path / "table.jsonl", content)
    with pytest.raises(data_rows.DataError, match=f"^selection.init={file}: .*{reason}") as caught:
        initial_weights.read(str(file), rows)
    assert "\n" not in str(caught.value)


def test_prepared_rows_are_not_parsed(make_config, neox, tmp_path, monkeypatch):
    """Their ids are in the index."""
    config = checks.build(make_config({"data.cache": str(tmp_path / "cache")}))
    prepared = levels.load_level(config, "lower", load(neox)[3]).rows
    file = write_jsonl(tmp_path / "weights.jsonl", [{"id": row.id, "weight": 1.0 + i} for i, row in enumerate(prepared)])
    expected = initial_weights.read(str(file), [*prepared]).logits
    offsets, weights = [np.array([[0, 1]])] * len(prepared), [np.float32([1])] * len(prepared)
    expected_tokens = weight_table.token_table([*prepared], offsets, weights)
    monkeypatch.delattr(stored.Store, "row")
    np.testing.assert_array_equal(initial_weights.read(str(file), prepared).logits, expected)
    assert weight_table.token_table(prepared, offsets, weights).equals(expected_tokens)


def test_weights_of_a_csv_file_are_texts(rows):
    weighed = [dataclasses.replace(row, fields=row.fields | {"w": text}) for row, text in zip(rows, itertools.cycle(["1", "3.0"]))]
    given = initial_weights.read("column:w", weighed)
    assert given.num_matched == len(rows) and np.exp(given.logits[1] - given.logits[0]) == pytest.approx(3)


def test_refuses_sources(rows, tmp_path):
    zeros = write_jsonl(tmp_path / "zeros.jsonl", [{"id": row.id, "weight": 0} for row in rows])
    for source, reason in [
        (tmp_path / "absent.parquet", "absent.parquet: no such file"),
        (tmp_path / "table.csv", "not a workdir, a .parquet or .jsonl file, or column:NAME"),
        (tmp_path, "no weights/epoch_.*parquet in it"),
        (zeros, "all weights are 0"),
        ("column:qualiti", "no row has a field 'qualiti'"),
        ("column:source", "line 1: 'sums-3' is not a weight"),
    ]:
        with pytest.raises(data_rows.DataError, match=reason) as caught:
            initial_weights.read(str(source), rows)
        assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------------------------


def weights_of(workdir) -> dict[str, float]:
    table = weight_table.latest(workdir)
    return dict(zip(table["id"].to_pylist(), table["weight"].to_pylist()))


def test_a_run_with_the_weights_of_another(finished, make_config, data, neox, tmp_path, capsys):
    """Frozen ones are the same at its end, also from the file that `export` writes. The first loss is weighted by them."""
    expected, base = weights_of(finished), load(neox)
    lower_rows, _ = data_rows.read_rows(str(data / "lower.jsonl"))
    loss_of = {row.id: -np.mean(token_log_probs(base, row.question, row.response)) for row in lower_rows if row.id in expected}
    exported = tmp_path / "kept.jsonl"
    run_command("export", [f"--workdir={finished}", f"--selected={exported}", "--keep=1"])
    for name, source in [("workdir", finished), ("file", exported)]:
        changes = {"selection.freeze": True, "selection.init": str(source), "num_epochs": 1, "log.every": 1}
        train_without_report(make_config(changes), tmp_path / name)
        assert f"selection.init={source}: weights for 21 of 21 rows\n" in capsys.readouterr().out
        assert weights_of(tmp_path / name) == pytest.approx(expected, rel=1e-5)

        first = read_jsonl(tmp_path / name / "metrics.jsonl")[1]
        rows = weight_table.latest(tmp_path / name).to_pylist()
        batch = [rows[i] for i in shuffle.lower_rows(0, len(rows), 4, 0)]
        lower = np.mean([row["weight"] * loss_of[row["id"]] for row in batch])
        assert first["train/loss"] == pytest.approx(first["train/upper_loss"] + 0.1 / 0.9 * lower, rel=1e-5)
        assert np.ptp([row["weight"] for row in batch]) > 0.01


def test_a_run_starts_from_weights_and_moves_them(finished, make_config, tmp_path, data):
    """Rows of other data get the mean. On resumption the file is not read again."""
    objects = read_jsonl(data / "lower.jsonl")
    changed = [row if i % 2 else row | {"response": f"another {i}"} for i, row in enumerate(objects)]
    shutil.copytree(finished / "weights", tmp_path / "before" / "weights")
    settings = {"data.lower": str(write_jsonl(tmp_path / "lower.jsonl", changed)), "selection.init": str(tmp_path / "before")}
    workdir = tmp_path / "run"
    train_without_report(make_config(settings | {"num_epochs": 1, "selection.learning_rate": 1e-6}), workdir)
    before, after = weights_of(finished), weights_of(workdir)
    shared = before.keys() & after.keys()
    assert 0 < len(shared) < len(after)
    mean = np.mean([before[row_id] for row_id in shared])
    expected = {row_id: before[row_id] / mean if row_id in shared else 1.0 for row_id in after}
    assert after == pytest.approx(expected, rel=1e-4) and len(set(after.values())) == len(after)  # they moved, if by little

    (workdir / "summary.json").unlink()
    shutil.rmtree(tmp_path / "before")
    train_without_report(make_config(settings | {"num_epochs": 2, "selection.learning_rate": 1e-6}), workdir)
    assert weights_of(workdir) == pytest.approx(expected, rel=1e-4)
    assert json.loads((workdir / "config.json").read_text())["num_epochs"] == 2


def test_other_data_is_refused_before_compiling(finished, make_config, tmp_path, monkeypatch):
    monkeypatch.setattr("bilevel_jax.step.make_step", None)
    lower = write_jsonl(tmp_path / "lower.jsonl", make_rows(12, seed=8))
    config = make_config({"selection.init": str(finished), "data.lower": str(lower)})
    with pytest.raises(data_rows.DataError, match="none of its 21 ids belongs to a training row"):
        train_without_report(config, tmp_path / "run")

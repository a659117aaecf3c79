"""NaN and infinities in weights, adapters, tables, rewards and outputs: refused where they enter, and never written as JSON."""

import json
import shutil
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import safetensors.numpy

from bilevel_jax import errors, features, files, rewards
from bilevel_jax.data import rows as data_rows
from bilevel_jax.export import merged_model
from bilevel_jax.models import huggingface
from bilevel_jax.report import run_data
from bilevel_jax.runtime import metrics, weight_table
from tests.conftest import make_rows

BAD = [np.nan, np.inf, -np.inf]


def spoil(file, value, which=-1) -> str:
    """Puts a value into a tensor of a file; returns the name of the tensor."""
    tensors = safetensors.numpy.load_file(file)
    name = sorted(tensors)[which]
    tensors[name] = tensors[name].copy()
    tensors[name].flat[1] = value
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    return name


@pytest.fixture
def model(neox, tmp_path):
    return shutil.copytree(neox, tmp_path / "model")


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("which", [0, 5])
def test_base(model, value, which):
    name = spoil(model / "model.safetensors", value, which)
    with pytest.raises(huggingface.ModelError, match=f"tensor '{name}' has 1 values of .* not finite in float32") as caught:
        huggingface.load_model(str(model))
    assert "\n" not in str(caught.value)


def test_too_large_for_the_dtype(model):
    """1e6 is beyond float16, whose largest number is 65504, and 3.4e38 rounds to infinity in bfloat16."""
    name = spoil(model / "model.safetensors", 3.4e38)
    huggingface.load_model(str(model))
    for dtype in ("float16", "bfloat16"):
        with pytest.raises(huggingface.ModelError, match=f"tensor '{name}' has 1 values .* not finite in {dtype}"):
            huggingface.load_model(str(model), dtype)


@pytest.mark.parametrize("value", BAD)
def test_adapter(neox, make_adapter, tmp_path, value):
    adapter = make_adapter(neox, tmp_path / "adapter")
    name = spoil(adapter / "adapter_model.safetensors", value)
    with pytest.raises(huggingface.ModelError, match=f"tensor '{name}' has 1 values"):
        huggingface.load_adapter(adapter, huggingface.read_config(neox))


def test_merged_model(neox, make_adapter, tmp_path):
    """Finite factors whose product overflows."""
    adapter = make_adapter(neox, tmp_path / "adapter")
    for which in (0, 1):
        spoil(adapter / "adapter_model.safetensors", 3e38, which)
    with np.errstate(over="ignore"), pytest.raises(huggingface.ModelError, match="not finite in float32"):
        merged_model.write_merged_model(neox, adapter, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    "column, value", [("weight", np.nan), ("weight", None), ("weight", -1.0), ("logit", np.inf), ("rank", None), ("masked", None)]
)
def test_table_of_weights(tmp_path, column, value):
    read, _ = data_rows.collect(data_rows.parse(enumerate(make_rows(3, 0), 1)), "rows")
    table = weight_table.table(read, np.arange(3), np.ones(3), np.zeros(3))
    values = table[column].to_pylist()
    values[1] = value
    i = table.column_names.index(column)
    file = tmp_path / "weights" / "epoch_1.parquet"
    file.parent.mkdir()
    pyarrow.parquet.write_table(table.set_column(i, column, pa.array(values, table.schema.field(i).type)), file)
    with pytest.raises(data_rows.DataError, match=f"epoch_1.parquet: row 2 .id {read[1].id}. has {column}=") as caught:
        weight_table.latest(tmp_path)
    assert "\n" not in str(caught.value)


def test_parameters_of_features(tmp_path):
    features.write_params(tmp_path / "phi.npy", np.array([1.0, np.nan]))
    with pytest.raises(errors.RunError, match="phi.npy has values that are not finite"):
        features.read_params(tmp_path / "phi.npy")


@pytest.mark.parametrize("value", [1e308, -1e308, np.inf, np.nan])
def test_rewards(monkeypatch, value):
    """Squares of 1e308 overflow, so their spread would be infinite."""
    read, _ = data_rows.collect(data_rows.parse(enumerate(make_rows(2, 0), 1)), "rows")
    monkeypatch.setattr(rewards, "load", lambda name: lambda *texts: [1.0, value])
    reward_fn = rewards.make_reward_fn("mine:reward", read, [None, None])
    generations = [types.SimpleNamespace(row_index=i, text="a") for i in (0, 1)]
    with pytest.raises(errors.RunError, match=f"for a response to row {read[1].id}, the first of 1; rewards must be finite, from"):
        reward_fn(generations, np.zeros(2))


def refuse(constant):
    raise AssertionError(constant)


def test_json():
    """Numbers that JSON does not have are null, also in what `default` converts."""
    value = {"a": [1.5, np.inf, {"b": -np.inf}], "c": (np.nan,), "text": "NaN", "d": np.float32(np.nan)}
    text = files.to_json(value, default=float)
    assert json.loads(text, parse_constant=refuse) == {"a": [1.5, None, {"b": None}], "c": [None], "text": "NaN", "d": None}
    assert files.to_json({"ü": "Infinity"}, ensure_ascii=False) == '{"ü": "Infinity"}'


def test_metrics(tmp_path):
    """A metric that is not finite is null in the file; the report leaves it out."""
    writer = metrics.MetricsWriter(tmp_path, start=-1, tensorboard=False, wandb="", config={})
    for step, value in enumerate([1.0, np.inf, 3.0]):
        writer.write(step, step / 2, {"train/loss": value})
    writer.close()
    lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/loss"] for line in lines] == [1.0, None, 3.0]
    assert run_data.series(run_data.events(tmp_path), "train/loss") == ([0.0, 1.0], [1.0, 3.0])

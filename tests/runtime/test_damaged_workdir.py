"""`report`, `export` and the Python interface on damaged workdirs: a line that names the file, or a result without the damage."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from bilevel_jax import api, errors
from bilevel_jax.report import page
from bilevel_jax.runtime import stored, weight_table
from tests.conftest import run_command

EXPECTED = (ValueError, OSError, errors.RunError)


@pytest.fixture
def workdir(finished, tmp_path):
    """A copy of a finished run, without its checkpoints."""
    return shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "tensorboard", "adapters"))


def edit(file, changes):
    """Sets keys of a JSON file, also a.b; `...` removes one."""
    content = json.loads(file.read_text())
    for key, value in changes.items():
        *sections, name = key.split(".") if "/" not in key else [key]
        owner = content
        for section in sections:
            owner = owner[section]
        if value is ...:
            del owner[name]
        else:
            owner[name] = value
    file.write_text(json.dumps(content))


def commands(workdir):
    """The commands that read a workdir."""
    out = workdir.parent
    yield lambda: page.write(workdir)
    yield lambda: run_command("export", [f"--workdir={workdir}", f"--selected={out / 'kept.jsonl'}"])
    yield lambda: run_command("export", [f"--workdir={workdir}", f"--merged={out / 'merged'}"])
    yield lambda: str(api.Run(workdir))
    yield lambda: api.Run(workdir).weights


def refused(workdir, *parts, at_least=1):
    """Every command succeeds or fails with one line; `at_least` so many fail with a line that has these parts."""
    number = 0
    for command in commands(workdir):
        try:
            command()
        except EXPECTED as error:
            assert "\n" not in str(error)
            number += all(part in str(error) for part in parts)
    assert number >= at_least


CONFIGS = [
    ({"data": ...}, "data.upper is missing"),
    ({"data": 3}, "data=3 is not a section"),
    ({"method": ...}, "method is missing"),
    ({"method": "sorting"}, "method='sorting' is not among"),
    ({"model.path": ...}, "model.path is missing"),
    ({"model.path": 3}, "model.path=3 must be of type str"),
    ({"batch.size": 0}, "batch.size=0 must be at least 1"),
    ({"eval.keep": "all"}, "eval.keep='all' must be a finite number"),
    ({"lora.alpha": None}, "lora.alpha=None must be a finite number"),
    ({"selection.unit": 3}, "selection.unit=3 must be of type str"),
    ({"online.refresh_every": 0}, "online.refresh_every=0 must be at least 1"),
    ({"data.label": ["bad"]}, "data.label="),
    ({"data.template": "chatty"}, "data.template='chatty' is not among"),
]


@pytest.mark.parametrize("changes, reason", CONFIGS)
def test_config(workdir, changes, reason):
    edit(workdir / "config.json", changes)
    refused(workdir, "config.json", reason, at_least=5)


@pytest.mark.parametrize("content", ["", "[]", "null", "{", "3", '{"data": {"lower": "x"}}', "[" * 5000, '{"a.b": 1}', "\x00"])
def test_no_config(workdir, content):
    (workdir / "config.json").write_text(content)
    refused(workdir, "config.json", at_least=5)


SUMMARIES = [
    ({"eval/upper_loss": "low"}, "eval/upper_loss='low' is not a finite number"),
    ({"eval/upper_loss": None}, "eval/upper_loss=None"),
    ({"selector/ess": [1]}, "selector/ess=[1]"),
    ({"time/train": {}}, "time/train={}"),
    ({"rows": True}, "rows=True"),
    ({"data/lower_duplicate_clusters": [2]}, "data/lower_duplicate_clusters=[2]"),
    ({"eval/upper_loss": float("nan")}, "eval/upper_loss=nan"),
    ({"time/train": 10**400}, "time/train=1000"),
]


@pytest.mark.parametrize("changes, reason", SUMMARIES)
def test_summary(workdir, changes, reason):
    edit(workdir / "summary.json", changes)
    refused(workdir, "summary.json", reason, at_least=3)


@pytest.mark.parametrize("removed", ["rows", "start/upper_loss", "selector/weight_min", "selector/bad_kept", "eval/lower_loss"])
def test_a_summary_without_some_numbers(workdir, removed):
    edit(workdir / "summary.json", {removed: ...})
    if removed == "rows":
        refused(workdir, "rows is missing")
    else:
        assert "held-out loss" in str(api.Run(workdir))


EVENTS = [
    {"step": 3, "epoch": 1e400, "eval/upper_loss": 1.0},
    {"step": 3, "epoch": 1, "eval/upper_loss": 0.0},
    {"step": 3, "epoch": 1, "eval/upper_loss": "low", "selector/ess": None},
    {"step": 3, "epoch": 1, "eval/upper_loss": float("nan"), "train/upper_loss": 1e400},
    {"step": 3, "epoch": 1, "selector/ess": 0.5},
    {"step": 3, "epoch": 1, "selector/weight_p50": 0.5},
    {"step": 3, "epoch": 1, "online/responses": 3, "online/bad_right": "x"},
]


@pytest.mark.parametrize("events", [EVENTS, EVENTS[1:2]])
def test_events(workdir, events):
    """What is no number is left out of the report, wherever it is in the file."""
    file = workdir / "metrics.jsonl"
    odd = "".join(json.dumps(event) + "\n" for event in events)
    file.write_text(odd + file.read_text() + odd)
    page.write(workdir)


def replace(workdir, epoch, name, values):
    file = workdir / "weights" / f"epoch_{epoch}.parquet"
    table = pyarrow.parquet.read_table(file)
    column = table[name].to_pylist()
    column[: len(values)] = values
    i = table.column_names.index(name)
    pyarrow.parquet.write_table(table.set_column(i, name, pa.array(column, table.schema.field(i).type)), file)


def test_tables_of_other_rows(workdir):
    """One row is another one: what is known of the rows is reported, and an export would be of other rows."""
    replace(workdir, 2, "id", ["0123456789abcdef"])
    refused(workdir, "tables of epochs 1 and 2 have other rows")
    refused(workdir, "1 of 21 ids match no row")


@pytest.mark.parametrize(
    "name, values, reason", [("rank", [1, 1, 1], "ranks are not 1 to"), ("id", ["a", "a"], "an id occurs twice")]
)
def test_tables_that_contradict_themselves(workdir, name, values, reason):
    """Their kept rows would be others."""
    replace(workdir, 2, name, values)
    refused(workdir, "epoch_2.parquet", reason, at_least=3)


@pytest.mark.parametrize("name", ["weights", "adapter"])
def test_a_file_in_the_place_of_a_directory(workdir, name):
    shutil.rmtree(workdir / name)
    (workdir / name).write_text("x")
    refused(workdir)


def test_an_earlier_summary_is_read(workdir):
    assert stored.read_summary(workdir)["steps"] == 12
    assert np.isfinite(list(stored.read_summary(workdir).values())).all()


def test_weights_of_tokens_of_another_number(workdir):
    ids = pyarrow.parquet.read_table(workdir / "weights" / "epoch_1.parquet")["id"].to_pylist()
    columns = {"id": ids, "weight": [[1.0, 2.0]] * len(ids), "start": [[]] * len(ids), "stop": [[1]] * len(ids)}
    pyarrow.parquet.write_table(pa.table(columns, schema=weight_table.TOKENS_SCHEMA), workdir / weight_table.TOKENS)
    refused(workdir, "tokens.parquet: a row has other numbers of weights and of tokens")

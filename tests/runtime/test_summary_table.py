"""The closing table: what it shows of a summary, also of one from an earlier version."""

import numpy as np
import pytest

from bilevel_jax.data import matching, readers
from bilevel_jax.data import rows as data_rows
from bilevel_jax.runtime import summary_table, weight_table
from tests.conftest import make_rows, write_jsonl

SELECTOR = {
    "selector/ess": 0.8125,
    "selector/weight_min": 1e-5,
    "selector/weight_max": 1.25,
    "selector/auroc": 0.97,
    "selector/bad_kept": 0.125,
}


def value(table: str, name: str) -> str:
    """The value of the only line that begins with `name`."""
    (line,) = (line for line in table.splitlines() if line.startswith(f"  {name} "))
    return line.removeprefix(f"  {name}").strip()


def test_losses(tmp_path):
    values = {"start/upper_loss": 1.25, "eval/upper_loss": 0.5, "start/lower_clean_loss": 2.0, "eval/lower_clean_loss": 1.0}
    table = summary_table.summary_table(values, tmp_path)
    assert value(table, "trusted rows").split() == ["1.2500", "0.5000"]
    assert value(table, "mixture, right answers").split() == ["2.0000", "1.0000"]
    assert "mixture, as it is" not in table and "weights of the rows" not in table and "answered by the model" not in table


def test_questions_answered_right(tmp_path):
    values = {"start/upper_right": 0.125, "eval/upper_right": 0.75, "start/lower_clean_right": 0.0, "eval/lower_clean_right": 0.5}
    table = summary_table.summary_table(values, tmp_path)
    lines = table[table.index("held-out questions answered right") :].splitlines()
    assert [line.split() for line in lines[1:3]] == [["trusted", "rows", "12.5%", "75.0%"], ["mixture", "0.0%", "50.0%"]]


def test_losses_of_pairs(tmp_path):
    table = summary_table.summary_table({"start/upper_pair_loss": 0.6931, "eval/upper_pair_loss": 0.25}, tmp_path)
    lines = table[table.index("held-out loss of pairs") :].splitlines()
    assert lines[1].split() == ["trusted", "pairs", "0.6931", "0.2500"]


def test_both_shares_of_bad_rows(tmp_path):
    """What fraction of the bad rows is kept, and what fraction of the kept rows is bad."""
    table = summary_table.summary_table(SELECTOR | {"selector/bad_among_kept": 0.023}, tmp_path)
    assert value(table, "bad rows that are kept, of all bad") == "12.5%"
    assert value(table, "kept rows that are bad, of all kept") == "2.3%"
    assert value(table, "effective sample size / N") == "0.8125"
    assert value(table, "smallest and largest weight") == "1e-05 to 1.25"
    assert value(table, "AUROC for rows labelled bad") == "0.9700"


@pytest.mark.parametrize("key", ["online/correction_rate", "online/another_chance"])
def test_generated_responses(tmp_path, key):
    """The second key is that of earlier versions."""
    table = summary_table.summary_table({"online/responses": 300.0, key: 0.75}, tmp_path)
    assert "questions answered by the model" in table
    assert value(table, "generated responses") == "300"
    assert value(table, "correct where the data are bad") == "75.0%"


def test_summary_of_an_earlier_version(tmp_path):
    """It has only one of the two shares of bad rows."""
    table = summary_table.summary_table(SELECTOR, tmp_path)
    assert value(table, "bad rows that are kept, of all bad") == "12.5%" and "kept rows that are bad" not in table


@pytest.fixture
def workdir(make_config, tmp_path):
    """Of a run with 12 rows, of which the rows 2, 3, 5, 7 and 4 are the least trusted ones, in this order."""
    file = write_jsonl(tmp_path / "rows.jsonl", make_rows(12, seed=0))
    (tmp_path / "config.json").write_text(make_config({"data.lower": str(file)}).to_json())
    logits = np.zeros(12)
    logits[[2, 3, 5, 7, 4]] = [-6, -5, -4, -3, -2]
    stored, _ = data_rows.read_rows(str(file))
    weight_table.write(tmp_path / "weights" / "epoch_1.parquet", weight_table.table(stored, logits, np.ones(12), np.zeros(12)))
    return tmp_path


def questions(workdir) -> list[str]:
    """The questions of the least trusted rows."""
    table = summary_table.summary_table({}, workdir)
    return [line[50:] for line in table[table.index("least trusted rows") :].splitlines()[1:6]]


def test_only_files_that_are_there_are_named(workdir):
    (workdir / "summary.json").touch()
    (workdir / "adapter").mkdir()
    assert summary_table.summary_table({}, workdir).endswith(f"in {workdir}: adapter/ (PEFT), weights/*.parquet, summary.json")


def test_equal_weights_trust_no_row_least(workdir):
    stored, _ = data_rows.read_rows(str(workdir / "rows.jsonl"))
    equal = weight_table.table(stored, np.zeros(12), np.ones(12), np.zeros(12))
    weight_table.write(workdir / "weights" / "epoch_1.parquet", equal)
    assert "least trusted rows" not in summary_table.summary_table({}, workdir)


def test_least_trusted_rows(workdir):
    assert questions(workdir) == [make_rows(12, seed=0)[i]["question"] for i in (2, 3, 5, 7, 4)]


def test_reading_stops_when_all_questions_are_known(workdir, monkeypatch):
    """They are in the first 2 blocks of 4 rows."""
    monkeypatch.setattr(matching, "BLOCK", 4)
    read, read_objects = [], readers.read_objects
    monkeypatch.setattr(readers, "read_objects", lambda source: (read.append(one) or one for one in read_objects(source)))
    assert all(questions(workdir)) and len(read) == 8


def test_ids_are_shown_without_questions_if_the_data_are_gone(workdir):
    (workdir / "rows.jsonl").unlink()
    assert questions(workdir) == [""] * 5

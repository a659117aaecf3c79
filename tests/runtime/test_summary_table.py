"""The closing table: what it shows of a summary, also of one from an earlier version."""

import pytest

from bilevel_jax.runtime import summary_table

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

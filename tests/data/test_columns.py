"""Other names of columns."""

import json

import pytest

from bilevel_jax import checks
from bilevel_jax import config as configuration
from bilevel_jax.data import columns, rows, sources
from bilevel_jax.data.rejections import DataError


@pytest.fixture
def file(tmp_path):
    values = [{"query": f"q{i}", "answer": "r", "question": "a title", "messages": "none"} for i in range(3)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def test_parse():
    assert columns.parse("") == {}
    assert columns.parse(" question:query , response : my answer,") == {"question": "query", "response": "my answer"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question", "--columns: 'question' must be FIELD:COLUMN"),
        (":query", "must be FIELD:COLUMN"),
        ("questoin:query", r"--columns: no schema has a field 'questoin' \(did you mean question\?\)"),
        ("zzz:query", "known are question, response, instruction"),
        ("question:a,question:b", "the field 'question' is named twice"),
    ],
)
def test_refused(text, message):
    with pytest.raises(DataError, match=message):
        columns.parse(text)


def test_renamed_columns_select_the_schema(file):
    """The field `messages`, whose schema has precedence, is not used; the field `question` is kept under another name."""
    usable, report = rows.read_rows(file, columns="question:query,response:answer")
    assert [(row.question, row.response, row.schema) for row in usable] == [(f"q{i}", "r", "question/response") for i in range(3)]
    assert usable[0].fields == {"question": "q0", "response": "r", "original_question": "a title", "messages": "none"}
    assert usable[0].id == next(rows.parse([(1, {"question": "q0", "response": "r"})])).id
    assert not report.rejections


def test_a_missing_column_names_the_nearest(file):
    with pytest.raises(DataError, match=rf"^{file}: no row has the column 'answers' \(did you mean answer\?\)$"):
        rows.read_rows(file, columns="question:query,response:answers")
    with pytest.raises(DataError, match="no row has the column 'zzz'; the columns are query, answer, question, messages"):
        rows.read_rows(file, columns="question:zzz")


def test_only_some_files_have_the_column(file, tmp_path):
    (tmp_path / "b.jsonl").write_text('{"question": "q", "response": "r"}\n')
    usable, _ = rows.read_rows(f"{file},{tmp_path}/b.jsonl", columns="question:query,response:answer")
    assert [row.question for row in usable] == ["q0", "q1", "q2", "q"]


def test_columns_of_a_level(file):
    options = {"seed": 0, "num_rows": 2, "bad_fraction": 0.0}
    kept, report = sources.open_source(file, **options, columns=columns.Columns("question:query,response:answer"))
    assert len(kept) == 2 and report.num_rows == 3
    with pytest.raises(DataError, match=r"no row has the column 'answers' \(did you mean answer\?\)"):  # so no row can be used
        sources.open_source(file, **options, columns=columns.Columns("question:query,response:answers"))


def test_columns_of_a_config():
    config = configuration.default()
    config.data.columns = "question:query"
    assert checks.build(config).data.columns == "question:query"
    config.data.columns = "questoin:query"
    with pytest.raises(configuration.ConfigError, match="^data.columns: no schema has a field 'questoin'"):
        checks.build(config)

import hashlib
import json
import os
import pathlib

import pyarrow
import pyarrow.parquet
import pytest

from bilevel_jax.data import rows
from bilevel_jax.data.rows import DataError, Rejection, Row

REAL = os.environ.get("BILEVEL_JAX_DATA")

QA = {"question": "2 + 2?", "response": "4"}


def write(path, *lines):
    """Writes a JSONL file of objects, or of bytes unchanged."""
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return str(path)


def parse_one(value, **options):
    (item,) = rows.parse([(1, value)], **options)
    return item


# ---- schemas ----


@pytest.mark.parametrize(
    ("value", "schema", "system", "messages", "response"),
    [
        (QA, "question/response", "", [("user", "2 + 2?")], "4"),
        ({**QA, "system": "Be brief."}, "question/response", "Be brief.", [("user", "2 + 2?")], "4"),
        ({**QA, "system_prompt": "Be brief."}, "question/response", "Be brief.", [("user", "2 + 2?")], "4"),
        ({**QA, "system": None}, "question/response", "", [("user", "2 + 2?")], "4"),
        ({"question": " a ", "response": "\nb "}, "question/response", "", [("user", " a ")], "\nb "),
        (
            {"instruction": "Add.", "input": "1 1", "output": "2"},
            "instruction/input/output",
            "",
            [("user", "Add.\n1 1")],
            "2",
        ),
        ({"instruction": "Add.", "input": "", "output": "2"}, "instruction/input/output", "", [("user", "Add.")], "2"),
        ({"instruction": "Add.", "output": "2"}, "instruction/input/output", "", [("user", "Add.")], "2"),
        ({"prompt": "p", "completion": "c"}, "prompt/completion", "", [("user", "p")], "c"),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    {"role": "user", "content": "c"},
                    {"role": "assistant", "content": "d"},
                ]
            },
            "messages",
            "s",
            [("user", "a"), ("assistant", "b"), ("user", "c")],
            "d",
        ),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "prompt/chosen/rejected", "", [("user", "p")], "c"),
        ({**QA, "messages": None}, "question/response", "", [("user", "2 + 2?")], "4"),
    ],
)
def test_schemas(value, schema, system, messages, response):
    row = parse_one(value)
    assert (row.schema, row.system, row.messages, row.response) == (schema, system, tuple(messages), response)
    assert row.rejected is None and row.fields is value and row.line == 1


USER = {"role": "user", "content": "p"}
GOOD, BAD = {"role": "assistant", "content": "c"}, {"role": "assistant", "content": "r"}


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "p", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "p", "chosen": [GOOD], "rejected": [BAD]},
    ],
)
def test_all_preference_forms_give_the_same_row(value):
    row = parse_one(value, preference=True)
    assert (row.messages, row.response, row.rejected) == ((("user", "p"),), "c", "r")
    assert row.id == parse_one({"prompt": "p", "chosen": "c", "rejected": "r"}).id  # the same id if read as an SFT row


def test_question_joins_turns():
    messages = [USER, GOOD, {"role": "user", "content": "again"}, BAD]
    assert parse_one({"messages": messages}).question == "p\n\nc\n\nagain"
    assert parse_one(QA).question == "2 + 2?"


@pytest.mark.parametrize(
    ("value", "response"),
    [
        ({"question": "q"}, ""),
        ({"question": "q", "response": ""}, ""),
        ({"question": "q", "response": "r"}, "r"),
        ({"instruction": "q"}, ""),
        ({"prompt": "q"}, ""),
        ({"messages": [{"role": "user", "content": "q"}]}, ""),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]}, "r"),
    ],
)
def test_questions_only(value, response):
    row = parse_one(value, questions_only=True)
    assert (row.question, row.response) == ("q", response)


# ---- malformed rows ----


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (3, "not an object"),
        ([QA], "not an object"),
        ({}, "no field 'messages', 'question', 'instruction', 'prompt' or 'conversations'"),
        ({"question": "q"}, "no field 'response'"),
        ({"question": "q", "response": None}, "no field 'response'"),
        ({"instruction": "i", "response": "r"}, "no field 'output'"),
        ({"prompt": "p"}, "no field 'completion'"),
        ({"question": 3, "response": "r"}, "field 'question' is not text"),
        ({"question": "q", "response": ["r"]}, "field 'response' is not text"),
        ({"question": "q", "response": float("nan")}, "no field 'response'"),
        ({"instruction": "i", "input": 3, "output": "o"}, "field 'input' is not text"),
        ({**QA, "system": 3}, "field 'system' is not text"),
        ({"question": " \n", "response": "r"}, "empty question"),
        ({"question": "q", "response": "\t"}, "empty response"),
        ({"question": "q\ud800", "response": "r"}, "text with a lone surrogate"),
        ({**QA, "source": "\udfff"}, "text with a lone surrogate"),
        ({"messages": "hi"}, "field 'messages' is not a list of messages"),
        ({"messages": ["hi"]}, "field 'messages' is not a list of messages"),
        ({"messages": []}, "field 'messages' has no message of the assistant"),
        ({"messages": [USER]}, "field 'messages' has no message of the assistant"),
        ({"messages": [GOOD]}, "empty question"),
        ({"messages": [{"role": "system", "content": "s"}, GOOD]}, "empty question"),
        ({"messages": [{"role": "user"}, GOOD]}, "no field 'content'"),
        ({"messages": [{"role": "user", "content": [{"text": 3}]}, GOOD]}, "field 'text' is not text"),
        (
            {"messages": [USER, {"role": "critic", "content": "x"}, GOOD]},
            "field 'messages' has a message of role 'critic' where user, assistant or tool is expected",
        ),
        (
            {"messages": [{"role": "system", "content": "s"}, USER, GOOD], "system": "t"},
            "two different system texts",
        ),
        ({"prompt": "p", "chosen": "c"}, "no field 'rejected'"),
        ({"prompt": "p", "rejected": "r"}, "no field 'chosen'"),
        ({"chosen": "c", "rejected": "r"}, "no field 'prompt'"),
        ({"prompt": "p", "chosen": "c", "rejected": " "}, "empty response"),
        (
            {"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "other"}, BAD]},
            "chosen and rejected answer different prompts",
        ),
    ],
)
def test_reasons(value, reason):
    assert parse_one(value) == Rejection(1, reason)


def test_preferences_are_required_if_requested():
    assert parse_one(QA, preference=True) == Rejection(1, "no field 'chosen'")


@pytest.mark.parametrize("rejected", ["yes", " yes\n"])
def test_equal_responses_are_rejected(rejected):
    pair = {"prompt": "q", "chosen": "yes", "rejected": rejected}
    assert parse_one(pair, preference=True) == Rejection(1, "chosen and rejected are the same")
    assert parse_one(pair).response == "yes"  # usable for SFT


def test_no_json_value_crashes():
    """Any JSON value in any field gives a row or a rejection."""
    values = [None, True, 0, -1.5, "", " ", "x", [], [[]], ["x"], [{}], {}, {"role": "user"}, float("inf"), 10**400]
    for key in ("question", "response", "system", "source", "messages", "chosen", "rejected", "prompt", "instruction"):
        for value in values:
            for base in (QA, {"prompt": "p", "completion": "c"}, {"prompt": "p", "chosen": "c", "rejected": "r"}):
                for mode in ({}, {"preference": True}, {"questions_only": True}):
                    assert isinstance(parse_one({**base, key: value}, **mode), Row | Rejection)
            for messages in ([{"role": value, "content": "x"}, GOOD], [{"role": "user", "content": value}, GOOD]):
                assert isinstance(parse_one({"messages": messages}), Row | Rejection)


def test_malformed_lines_are_counted_with_their_first_line(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        QA,
        b"{not json",
        b"",
        b'{"question": "\xff", "response": "r"}',
        b"[" * 100_000,
        b'{"question": "q", "response": "r", "n": ' + b"1" * 5000 + b"}",
        b'{"question": "q", "response": "r", "score": NaN}',
        b'{"question": "\\ud83d", "response": "r"}',
        {"question": "q"},
        {"question": "q", "response": ""},
    )
    usable, report = rows.read_rows(path)
    assert [row.line for row in usable] == [1, 7]
    assert report.rejected == {
        "bad JSON": (3, 2),
        "not UTF-8": (1, 4),
        "text with a lone surrogate": (1, 8),
        "no field 'response'": (1, 9),
        "empty response": (1, 10),
    }
    assert [rejection.line for rejection in report.rejections] == [2, 4, 5, 6, 8, 9, 10]
    assert (report.num_rows, report.schemas) == (2, {"question/response": 2})
    summary = report.summary()
    assert summary[0] == f"{path}: 2 rows (2 question/response)"
    assert summary[1] == f"  left out 3: bad JSON (first: {path}:2)"
    lines = [item.line for item in rows.iter_rows(path)]  # every row in order, usable or not
    assert lines == [1, 2, 4, 5, 6, 7, 8, 9, 10]


# ---- ids ----


def test_id_is_the_hash_of_the_canonical_content():
    canonical = '{"messages":[["user","2 + 2?"]],"rejected":null,"response":"4","system":""}'
    assert parse_one(QA).id == hashlib.sha256(canonical.encode()).hexdigest()[:16]


def test_id_depends_only_on_the_content():
    one = parse_one(QA).id
    assert parse_one({"prompt": "2 + 2?", "completion": "4", "id": "x", "source": "y", "label": 1}).id == one
    for other in ({"system": "s"}, {"question": "2 + 2"}, {"response": "four"}):
        assert parse_one({**QA, **other}).id != one


def test_duplicates_are_numbered_and_order_does_not_matter():
    values = [QA, {"question": "a", "response": "b"}, QA, QA]
    forwards = [row.id for row in rows.parse(enumerate(values))]
    backwards = [row.id for row in rows.parse(enumerate(reversed(values)))]
    first = forwards[0]
    assert forwards == [first, forwards[1], f"{first}-2", f"{first}-3"]
    assert sorted(forwards) == sorted(backwards)


# ---- files ----

VALUES = [QA, {"question": "ä€😀 \u2028 line", "response": "r", "source": "s", "n": 1}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "\n".join(json.dumps(v, ensure_ascii=False) for v in VALUES)),
        ("a.JSONL", "\r\n".join(json.dumps(v) for v in VALUES) + "\r\n\r\n"),
        ("bom.jsonl", "\ufeff" + "\n".join(json.dumps(v) for v in VALUES)),
        ("a.json", json.dumps(VALUES, indent=2)),
        ("bom.json", "\ufeff" + json.dumps(VALUES)),
        ("object.json", json.dumps({"version": 1, "data": VALUES})),
        ("lines.json", "\n".join(json.dumps(v) for v in VALUES)),
        ("a.parquet", None),
    ],
)
def test_file_formats(tmp_path, name, content):
    path = tmp_path / name
    if content is None:
        columns = dict.fromkeys(VALUES[1])  # null for fields that the first row does not have
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([columns | value for value in VALUES]), path)
    else:
        path.write_text(content, encoding="utf-8", newline="")
    usable, report = rows.read_rows(path)
    assert [row.id for row in usable] == [row.id for row in rows.parse(enumerate(VALUES))]
    assert [row.source for row in usable] == ["", "s"] and [row.line for row in usable] == [1, 2]
    assert report.num_rows == 2 and not report.rejections


def test_json_file_of_a_single_chat_row(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"messages": [USER, GOOD]}))
    assert rows.read_rows(path)[0][0].response == "c"


def test_parquet_of_chats_with_nulls(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.Table.from_pylist([{"messages": [USER, GOOD], "system": None}, {"messages": None, "system": "s"}])
    pyarrow.parquet.write_table(table, path)
    usable, report = rows.read_rows(path)
    assert usable[0].messages == (("user", "p"),) and report.rejections[0].line == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "{path}: no rows in it"),
        ("a.jsonl", b"\n \n", "{path}: no rows in it"),
        ("a.json", b"", "{path}: no rows in it"),
        ("a.json", b"[]", "{path}: no rows in it"),
        ("a.json", b'[\n{"question": "q", "response": "r"},\n{"question": "q", "response": "r"}\n', "row 1: bad JSON"),
        ("a.json", b'{"a": [], "b": []}', "{path}: an object with 2 lists"),
        ("a.jsonl", b"\n{]\n", "{path}:2: bad JSON; none of the 1 rows can be used (known schemas: prompt/"),
        ("a.jsonl", b'{"question": "q"}\n3\n', "{path}:1: no field 'response'; none of the 2 rows"),
        ("a.jsonl", '{"question": "q"}'.encode("utf-16"), "{path}:1: not UTF-8"),
        ("a.parquet", b"PAR?", "{path}: not a readable Parquet file"),
        ("a.csv", b"question,response\n", "{path}: no rows in it"),
        ("a.tsv", b"question\tresponse\n", "{path}: unknown file type '.tsv'; use .jsonl, .json, .csv, .parquet"),
        ("data", b"", "{path}: unknown file type ''"),
    ],
)
def test_unusable_files_are_rejected_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        rows.read_rows(path)
    assert message.format(path=path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["/nowhere/a.jsonl", "nowhere/a.jsonl", "no where/a", "a\0b", "../a/b/c", ""])
def test_missing_files(path):
    with pytest.raises(DataError, match="no such file"):
        rows.read_rows(path)


@pytest.mark.parametrize(
    ("path", "call"),
    [
        ("org/set", ("org/set", None, "train")),
        ("org/set:test", ("org/set", None, "test")),
        ("org/set:main:test", ("org/set", "main", "test")),
        ("gsm8k", ("gsm8k", None, "train")),
    ],
)
def test_hub_names(monkeypatch, path, call):
    calls = []

    def load_dataset(name, config, *, split, data_dir):
        calls.append((name, config, split))
        return VALUES

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert [row.line for row in rows.read_rows(path)[0]] == [1, 2]
    assert calls == [call]


def test_unreachable_hub_is_one_line(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach it\nTraceback …")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"^no file and .* data set 'org/set' \(split 'train'\): Couldn't reach it$"):
        rows.read_rows("org/set")


@pytest.mark.skipif(not REAL, reason="BILEVEL_JAX_DATA does not name a folder of real rows")
@pytest.mark.parametrize(
    ("name", "count"),
    [("quality/upper_orca", 3000), ("quality/lower_alpaca", 6000), ("safety/upper_safe", 2000), ("safety/lower_mixed", 4520)],
)
def test_real_rows(name, count):
    usable, report = rows.read_rows(pathlib.Path(REAL, f"{name}.jsonl"))
    assert len(usable) == report.num_rows == len({row.id for row in usable}) == count
    assert not report.rejections and report.schemas == {"question/response": count}
    assert all(row.question == row.fields["question"] and row.source for row in usable)

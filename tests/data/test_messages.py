"""Chats in the forms of OpenAI, ShareGPT and TRL, and their tool calls."""

import json
import pathlib
import re

import pyarrow
import pyarrow.parquet
import pytest

from bilevel_jax.data import rows, schemas
from bilevel_jax.data.rows import Rejection

USER, SYSTEM = {"role": "user", "content": "2 + 2?"}, {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "4"}
REFERENCE = {"question": "2 + 2?", "response": "4", "system": "Be brief."}


def parse_one(value, **options):
    (item,) = rows.parse([(1, value)], **options)
    return item


def part(text):
    return {"type": "text", "text": text}


@pytest.mark.parametrize(
    "value",
    [
        {"messages": [SYSTEM, USER, ANSWER]},
        {"messages": [SYSTEM | {"role": "developer"}, USER, ANSWER]},
        {"messages": json.dumps([SYSTEM, USER, ANSWER])},  # as in a CSV file
        {"messages": [SYSTEM, {"role": "user", "content": [part("2 + "), part("2?")]}, ANSWER | {"content": [part("4")]}]},
        {"messages": [SYSTEM, USER, ANSWER | {"tool_calls": None, "name": None}]},  # as Parquet writes them
        {"messages": [SYSTEM, USER, ANSWER, USER, USER]},
        {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
        {"prompt": [SYSTEM, USER], "completion": "4"},
        {"prompt": "2 + 2?", "completion": [ANSWER], "system": "Be brief."},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}], "system": "Be brief."},
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "user", "value": "2 + 2?"},
                {"from": "assistant", "value": "4"},
            ]
        },
        {"conversations": [SYSTEM, USER, ANSWER]},
    ],
)
def test_all_forms_give_the_same_row(value):
    row, reference = parse_one(value), parse_one(REFERENCE)
    assert (row.id, row.system, row.messages, row.response) == (reference.id, "Be brief.", (("user", "2 + 2?"),), "4")
    assert row.chat is None and row.fields is value


def test_turns_of_trl_and_sharegpt():
    turns = [USER, ANSWER, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    names = {"user": "human", "assistant": "gpt"}
    shared = {"conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]}
    expected = parse_one({"messages": turns})
    assert expected.messages == (("user", "2 + 2?"), ("assistant", "4"), ("user", "Sure?")) and expected.response == "Yes."
    for value in (shared, {"prompt": turns[:3], "completion": turns[3:]}, {"prompt": turns[:1], "completion": turns[1:]}):
        assert parse_one(value).id == expected.id


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"conversations": "hi"}, "field 'conversations' is not a list of messages"),
        ({"conversations": [{"from": "human", "value": 3}]}, "field 'value' is not text"),
        ({"conversations": [{"from": "human"}]}, "no field 'content'"),
        ({"conversations": [{"value": "x"}]}, "no field 'role'"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "empty question"),
        (
            {"messages": [USER | {"content": [part("x"), {"type": "image_url", "image_url": "u"}]}, ANSWER]},
            "a message with a part of type 'image_url', where only text can be used",
        ),
        ({"messages": [USER | {"content": [3]}, ANSWER]}, "field 'content' is not text"),
        ({"messages": [USER, USER]}, "field 'messages' has no message of the assistant"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "field 'content' is not text"),
        ({"prompt": [USER], "completion": [USER]}, "field 'completion' has no message of the assistant"),
        ({"prompt": [USER], "completion": [SYSTEM, ANSWER]}, "field 'completion' has a system text"),
        ({"prompt": [USER]}, "no field 'completion'"),
        ({"prompt": [ANSWER], "completion": [ANSWER]}, "two messages of the assistant in a row"),
        ({"messages": [USER | {"tool_calls": [{"name": "f"}]}, ANSWER]}, "a tool call in a message of role 'user'"),
        ({"messages": [USER, ANSWER | {"tool_calls": [{"function": {}}]}]}, "a tool call without a name"),
        ({"messages": [USER, ANSWER | {"tool_calls": ["f()"]}]}, "a tool call that is not an object"),
        ({"messages": [USER, ANSWER], "tools": "all"}, "field 'tools' is not a list of functions"),
        ({"messages": [USER, ANSWER], "tools": [{"type": "function"}]}, "field 'tools' has a function without a name"),
        (
            {"prompt": [USER], "chosen": [ANSWER | {"tool_calls": [{"name": "f"}]}], "rejected": "r"},
            "tool calls in a preference row",
        ),
    ],
)
def test_reasons(value, reason):
    assert parse_one(value) == Rejection(1, reason)


def test_questions_only():
    for value in ({"prompt": [USER]}, {"conversations": [{"from": "human", "value": "2 + 2?"}]}, {"messages": [USER]}):
        row = parse_one(value, questions_only=True)
        assert (row.question, row.response) == ("2 + 2?", "")
    two = [USER, ANSWER, {"role": "user", "content": "Sure?"}]
    assert parse_one({"messages": two}, questions_only=True).messages[-1] == ("user", "Sure?")
    assert parse_one({"messages": two}).response == "4"


def test_turns_after_the_last_answer_are_counted(tmp_path):
    values = [{"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER, USER]}, {"messages": [USER, ANSWER, USER]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    usable, report = rows.read_rows(tmp_path / "a.jsonl")
    assert [row.response for row in usable] == ["4", "4", "4"] and len({rows.content_of(row.id) for row in usable}) == 1
    assert report.summary()[1:] == [f"  2: turns after the last answer left out (first: {tmp_path}/a.jsonl:2)"]


def test_fields_that_are_not_used_are_named_once(tmp_path):
    values = [
        {"question": "q", "response": "r", "context": "long", "history": [["a", "b"]], "label": 1},
        {"question": "q2", "response": "r", "context": "long", "history": [], "images": None},
        {"instruction": "q", "input": "used", "output": "r"},
        {"messages": [USER, ANSWER | {"reasoning_content": "2 and 2"}]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    _, report = rows.read_rows(tmp_path / "a.jsonl")
    named = "context (in 2 rows), history (in 1 rows), reasoning_content of messages (in 1 rows)"
    assert report.summary()[1:] == [f"  fields that are neither prompt nor response here: {named}"]


# ---- tools ----

WEATHER = {
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
ASK = {"role": "user", "content": "Weather in Paris?"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}],
}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "sunny"}
SUNNY = {"role": "assistant", "content": "It is sunny."}
OPENAI = {"messages": [ASK, CALL, RESULT, SUNNY], "tools": [{"type": "function", "function": WEATHER}]}
READ_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}],
}


def test_openai_tools():
    row = parse_one(OPENAI)
    assert row.chat == (ASK, READ_CALL, RESULT, SUNNY)  # arguments are an object, which templates expect
    assert row.tools == OPENAI["tools"] and row.response == "It is sunny."
    call = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
    assert row.messages == (("user", "Weather in Paris?"), ("assistant", call), ("tool", "sunny"))


def test_a_call_is_a_response():
    row = parse_one({"messages": [ASK, CALL]})
    assert row.response == '{"name": "get_weather", "arguments": {"city": "Paris"}}'
    assert row.messages == (("user", ASK["content"]),) and row.chat == (ASK, READ_CALL) and row.tools is None


def test_other_forms_of_tools():
    """Older OpenAI, ShareGPT, texts of JSON, and TRL."""
    older = {"role": "assistant", "content": "", "function_call": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    shared = [
        {"from": "human", "value": "Weather in Paris?"},
        {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city": "Paris"}}'},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "It is sunny."},
    ]
    forms = [
        {"messages": [ASK, older, {"role": "function", "content": "sunny"}, SUNNY], "tools": [WEATHER]},
        {"conversations": shared, "tools": json.dumps([WEATHER])},
        {"messages": json.dumps([ASK, older, {"role": "tool", "content": "sunny"}, SUNNY]), "tools": [json.dumps(WEATHER)]},
        {"prompt": [ASK, older, {"role": "tool", "content": "sunny"}], "completion": [SUNNY], "tools": [WEATHER]},
    ]
    parsed = [parse_one(form) for form in forms]
    assert len({row.id for row in parsed}) == 1 and all(row.tools == OPENAI["tools"] for row in parsed)
    assert [message["role"] for message in parsed[0].chat] == ["user", "assistant", "tool", "assistant"]


def test_tools_are_part_of_the_id():
    ids = {parse_one(value).id for value in (OPENAI, {"messages": OPENAI["messages"]}, {"messages": [ASK, SUNNY]})}
    assert len(ids) == 3


def test_tools_of_a_parquet_file(tmp_path):
    """Arrow gives all arguments the fields of all rows; nulls among them are no arguments."""
    other = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]}
    first = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"city": "Paris"}}}]}
    table = pyarrow.Table.from_pylist([{"messages": [ASK, first]}, {"messages": [ASK, other]}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    usable, report = rows.read_rows(tmp_path / "a.parquet")
    assert not report.rejections
    assert [row.chat[-1]["tool_calls"][0]["function"]["arguments"] for row in usable] == [{"city": "Paris"}, {"a": 1}]


# ---- the documentation ----


def test_the_examples_of_the_page():
    """Every line of the table of schemas, and the conversation with tools."""
    page = (pathlib.Path(__file__).parents[2] / "docs" / "data.md").read_text()
    table = re.findall(r"^\| ([^|]*) \| `(\{.*?\})`", page, re.MULTILINE)
    parsed = {name: parse_one(json.loads(example), preference=name == "preference") for name, example in table}
    assert {row.schema for row in parsed.values()} == {schema.name for schema in schemas.SCHEMAS}
    assert {(row.question, row.response) for name, row in parsed.items() if name != "Alpaca"} == {("2 + 2?", "4")}
    (tools,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    assert [message["role"] for message in parse_one(json.loads(tools)).chat] == ["user", "assistant", "tool", "assistant"]

"""Answers of conversations as rows of their own."""

import json

import numpy as np
import pytest

from bilevel_jax import checks
from bilevel_jax import config as configuration
from bilevel_jax.data import by_turn, levels, streaming, templates
from tests.conftest import write_jsonl
from tests.data.test_templates import PAIR, PLAIN, QA, WITH_TOOLS, parse
from tests.data.test_turns import SYSTEM, answer, call, result, user

TALK = [user("a"), answer("hello"), user("b"), answer(" "), user("c"), answer("fine")]
WITH_A_CALL = {"messages": [SYSTEM, user("Paris?"), call("Paris"), result("Paris", "sun"), answer("Sunny.")]}
SHAREGPT = [
    {"from": "human", "value": "a"},
    {"from": "gpt", "value": "b"},
    {"from": "human", "value": "c"},
    {"from": "gpt", "value": "d"},
]
FORMS = [
    {"messages": TALK},
    {"messages": [SYSTEM, *TALK]},
    {"messages": json.dumps(TALK)},  # as CSV files hold them
    {"conversations": SHAREGPT, "system": "Be brief."},
    {"prompt": TALK[:3], "completion": TALK[3:]},
    {"prompt": "a", "completion": TALK[1:]},
    WITH_A_CALL,
    {"prompt": TALK[:5], "chosen": "fine", "rejected": "bad", "system": "Be brief."},
    {"chosen": [SYSTEM, *TALK], "rejected": [SYSTEM, *TALK[:5], answer("bad")]},
]


@pytest.mark.parametrize("value", FORMS)
def test_rows_of_answers(value):
    """Each is what the conversation up to the answer would be as a row, also when its fields are read again."""
    (row,) = parse({**value, "truth": "x", "bad": 1})
    first, last = by_turn.rows_of(row, ["truth"])
    assert (first.id, last.id) == (f"{row.id}.1", f"{row.id}.2")
    assert (last.messages, last.response, last.fields) == (row.messages, row.response, row.fields)
    (again,) = parse(first.fields)
    assert (again.system, again.messages, again.response, again.chat) == (first.system, first.messages, first.response, first.chat)
    assert first.messages == row.messages[:1] and first.response == row.messages[1][1]
    assert "truth" not in first.fields and "rejected" not in first.fields and first.fields["bad"] == 1


def test_rows_with_one_answer_stay():
    for row in (*parse(QA), *parse({"messages": [user("a"), answer(""), user("b"), answer("c")]}), *parse(PAIR, preference=True)):
        assert by_turn.rows_of(row) == [row]


def test_tokens():
    """Those of the rows by themselves: together, each answer is learned once, after the same tokens as in the conversation."""
    parsed = parse(WITH_A_CALL, QA, {"messages": TALK})
    examples = templates.encode(parsed, WITH_TOOLS, template="chat")
    rows, split = by_turn.split(parsed, examples)
    assert [row.id.partition(".")[2] for row in rows] == ["1", "2", "", "1", "2"]
    alone = templates.encode(rows, WITH_TOOLS, template="chat", learn="last")
    for one, expected in zip(split, alone, strict=True):
        np.testing.assert_array_equal(one.prompt, expected.prompt)
        np.testing.assert_array_equal(one.response, expected.response)
        assert one.earlier == ()


def test_an_answer_that_opens_a_conversation_has_no_row():
    """As a row by itself it would be refused: its question is empty."""
    parsed = parse(
        {"messages": [answer("Hi."), user("a"), answer("b")]}, {"messages": [answer("Hi."), user("a"), answer("b"), *TALK]}
    )
    rows, split = by_turn.split(parsed, templates.encode(parsed, WITH_TOOLS, template="chat"))
    assert [(row.id.partition(".")[2], row.response) for row in rows] == [("2", "b"), ("2", "b"), ("3", "hello"), ("4", "fine")]
    assert all(len(one.prompt) > 4 for one in split) and [row.messages[0][1] for row in rows] == ["Hi."] * 4


def test_a_conversation_that_is_cut_has_fewer_rows():
    parsed = parse({"messages": TALK})
    (example,) = templates.encode(parsed, PLAIN, template="human")
    _, fitted, _ = templates.fit([example], parsed, example.earlier[0][1])
    rows, (one,) = by_turn.split(parsed, fitted)
    assert [row.id for row in rows] == [f"{parsed[0].id}.1"] and PLAIN.decode(one.response) == "hello"


def test_training_rows_of_a_level(tmp_path, capsys):
    """Held-out rows stay whole, and `reopen` finds every training row by its id."""
    file = write_jsonl(tmp_path / "rows.jsonl", [{"messages": [user(f"{i}"), *TALK[1:]]} for i in range(6)])
    config = configuration.default()
    config.update_from_flattened_dict(
        {"data.upper": str(file), "data.lower": str(file), "eval.num_upper": 1, "eval.num_lower": 2, "selection.unit": "turn"}
    )
    upper, lower = levels.load_levels(checks.build(config), PLAIN)
    assert (len(upper.eval_rows), len(lower.eval_rows)) == (1, 2) and "." not in lower.eval_rows[0].id + upper.rows[0].id
    number = len({row.id.partition(".")[0] for row in lower.rows})
    assert len(lower.rows) == len(lower.examples) == 2 * number
    assert f"the {number} rows to train on have {2 * number} answers, each with a weight of its own" in capsys.readouterr().out
    again = {row.id: row for row in streaming.reopen(config)}
    assert all(again[row.id].messages == row.messages for row in lower.rows)
    config.method = "mixing"  # has no weights
    assert len(levels.load_levels(checks.build(config), PLAIN)[1].rows) == number


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.learn": "last"}, "weighs every answer of a conversation; take data.learn=all"),
        ({"loss.lower": "dpo"}, "weighs answers, not pairs: loss.lower=dpo must be sft"),
    ],
)
def test_refusals(changes, message):
    config = configuration.default()
    config.update_from_flattened_dict({"selection.unit": "turn", **changes})
    with pytest.raises(configuration.ConfigError, match=f"selection.unit=turn {message}"):
        checks.build(config)

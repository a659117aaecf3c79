"""Rows as text with the learned tokens marked."""

import pytest

from bilevel_jax.data import rendering, templates
from tests.data.test_templates import ALPACA, CHATTING, PAIR, PLAIN, QA, TURNS, parse


def encode(tokenizer, *values, **options):
    return templates.encode(parse(*values, **options), tokenizer, template=None)


def test_learned_tokens_are_marked():
    (example,) = encode(PLAIN, QA)
    assert rendering.show(example, PLAIN) == "    Human: hello world\n\n    Assistant: ⟦the answer<|endoftext|>⟧"
    (chat,) = encode(CHATTING, QA)
    assert rendering.show(chat, CHATTING) == "    <s><|user|>\n    hello world\n    <|assistant|>\n    ⟦the answer<|endoftext|>⟧"


def test_pairs_and_questions():
    (pair,) = encode(PLAIN, PAIR, preference=True)
    text = "    Human: hello\n\n    Assistant:\n    (chosen) ⟦fine<|endoftext|>⟧\n    (rejected) ⟦the world<|endoftext|>⟧"
    assert rendering.show(pair, PLAIN) == text
    (question,) = encode(PLAIN, {"question": "hello"}, questions_only=True)
    assert rendering.show(question, PLAIN) == "    Human: hello\n\n    Assistant:"


def test_long_texts_and_control_characters():
    (example,) = encode(PLAIN, {"question": "a\x1b[2J", "response": "b" * 1000 + "c" * 1000})
    text = rendering.show(example, PLAIN)
    assert "a\\x1b[2J" in text and "\x1b" not in text
    # 2 013 characters with <|endoftext|>, 200 of them shown at each end
    assert f"⟦{'b' * 200} … 1,613 characters … {'c' * 187}<|endoftext|>⟧" in text


def test_one_row_of_each_schema():
    parsed = parse(QA, {**QA, "question": "again"}, ALPACA, TURNS)
    examples = templates.encode(parsed, PLAIN, template=None)
    shown = rendering.one_of_each_schema(parsed, examples)
    assert [(row.schema, row.line) for row, _ in shown] == [
        ("question/response", 1),
        ("instruction/input/output", 3),
        ("messages", 4),
    ]
    assert [example for _, example in shown] == [examples[0], examples[2], examples[3]]
    single = {"messages": TURNS["messages"][:3]}
    parsed = parse(TURNS, single, TURNS, single)  # several answers, and one
    shown = rendering.one_of_each_schema(parsed, templates.encode(parsed, PLAIN, template=None))
    assert [row.line for row, _ in shown] == [1, 2]


@pytest.mark.parametrize("template", [None, "auto"])
def test_the_template_that_stands_in_is_named(template):
    notice = rendering.template_notice(template, PLAIN, encode(PLAIN, QA))
    assert notice.startswith("the tokenizer has no chat template, so rows are rendered with the template 'human'.")
    assert notice.endswith("    Human: hello world\n\n    Assistant: ⟦the answer<|endoftext|>⟧")


def test_no_notice():
    assert rendering.template_notice("auto", CHATTING, encode(CHATTING, QA)) == ""
    assert rendering.template_notice("human", PLAIN, encode(PLAIN, QA)) == ""
    assert rendering.template_notice("auto", PLAIN, []) == ""

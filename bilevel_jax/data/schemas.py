"""Row schemas: which fields hold the prompt and the responses.

`SCHEMAS` is the table. A row has the first schema of the table that has one of its `keys` among the row's fields:

    prompt/chosen/rejected      prompt, chosen, rejected        texts, or lists of chat messages (then `prompt` is optional)
    messages                    messages                        a chat; the last message is the assistant's response
    question/response           question, response
    instruction/input/output    instruction, [input], output    prompt = instruction, a line feed, the input if not empty
    prompt/completion           prompt, completion

A parser raises `Unusable` with the reason if a row has the schema but cannot be used. docs/adding_a_data_schema.md shows how to add
a schema.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Unusable(Exception):
    """A row that cannot be used; the message is the reason."""


class Content(NamedTuple):
    """The content of a row, in the same form for every schema."""

    system: str  # "" for none
    messages: tuple[tuple[str, str], ...]  # (role, content) before the response, without the system text; the last is the user's
    response: str  # the chosen one of a preference row; "" for none
    rejected: str | None = None  # None unless the row is a preference


class Schema(NamedTuple):
    """One entry of `SCHEMAS`."""

    name: str
    keys: tuple[str, ...]  # any of these fields selects the schema
    parse: Callable[[Mapping, bool], Content]  # (fields, questions_only): fields without null; the response may be missing
    preference: bool = False  # has a chosen and a rejected response


def text_field(fields: Mapping, key: str, part: str | None = None) -> str:
    """Returns the text `fields[key]`. If `part` ("question" or "response") is given, the text must not be empty."""
    if key not in fields:
        raise Unusable(f"no field '{key}'")
    if not isinstance(fields[key], str):
        raise Unusable(f"field '{key}' is not text")
    if part and not fields[key].strip():
        raise Unusable(f"empty {part}")
    return fields[key]


def chat_turns(fields: Mapping, key: str) -> tuple[str, list[tuple[str, str]]]:
    """Returns the system text and the (role, content) turns of the list of chat messages `fields[key]`."""
    value = fields[key]
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(m, Mapping) for m in value):
        raise Unusable(f"field '{key}' is not a list of messages")
    turns = [(text_field(message, "role"), text_field(message, "content")) for message in value]
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else ""
    for role, _ in turns:
        if role not in ("user", "assistant"):
            raise Unusable(f"field '{key}' has a message of role '{role}' where user or assistant is expected")
    return system, turns


def split_response(turns: list[tuple[str, str]], key: str) -> tuple[list[tuple[str, str]], str]:
    """Splits turns into those before the assistant's last one, and its text."""
    if not turns or turns[-1][0] != "assistant":
        raise Unusable(f"field '{key}' does not end with the assistant's message")
    response = turns[-1][1]
    if not response.strip():
        raise Unusable("empty response")
    return turns[:-1], response


def _prompt_messages(turns: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    if not turns or turns[-1][0] != "user" or not turns[-1][1].strip():
        raise Unusable("empty question")
    return tuple(turns)


def _parse_texts(fields: Mapping, questions_only: bool, *, prompt_key: str, response_key: str) -> Content:
    question = text_field(fields, prompt_key, "question")
    is_empty = not str(fields.get(response_key, "")).strip()
    response = "" if questions_only and is_empty else text_field(fields, response_key, "response")
    return Content("", (("user", question),), response)


def _parse_instruction(fields: Mapping, questions_only: bool) -> Content:
    question = text_field(fields, "instruction", "question")
    if text_field({"input": "", **fields}, "input").strip():
        fields = {**fields, "instruction": f"{question}\n{fields['input']}"}
    return _parse_texts(fields, questions_only, prompt_key="instruction", response_key="output")


def _parse_chat(fields: Mapping, questions_only: bool, *, key: str = "messages") -> Content:
    system, turns = chat_turns(fields, key)
    if questions_only and turns and turns[-1][0] == "user":
        response = ""
    else:
        turns, response = split_response(turns, key)
    return Content(system, _prompt_messages(turns), response)


def _parse_preference(fields: Mapping, questions_only: bool) -> Content:
    """The prompt is the field `prompt` (text or messages), or the turns before the responses in `chosen` and `rejected`."""
    del questions_only  # both responses are required
    system, prompt = "", []
    if isinstance(fields.get("prompt"), str):
        prompt = [("user", fields["prompt"])]
    elif "prompt" in fields:
        system, prompt = chat_turns(fields, "prompt")
    responses, conversations = [], set()
    for key in ("chosen", "rejected"):
        if isinstance(fields.get(key), str) or key not in fields:
            responses.append(text_field(fields, key, "response"))
        else:
            key_system, turns = chat_turns(fields, key)
            turns, response = split_response(turns, key)
            responses.append(response)
            if turns:
                conversations.add((key_system, tuple(turns)))
    if len(conversations) > 1:
        raise Unusable("chosen and rejected answer different prompts")
    if conversations:  # the full conversation; it includes `prompt`
        system, prompt = conversations.pop()
    elif "prompt" not in fields:
        raise Unusable("no field 'prompt'")
    return Content(system, _prompt_messages(prompt), *responses)


SCHEMAS = (  # in order of precedence
    Schema("prompt/chosen/rejected", ("chosen", "rejected"), _parse_preference, preference=True),
    Schema("messages", ("messages",), _parse_chat),
    Schema("question/response", ("question",), functools.partial(_parse_texts, prompt_key="question", response_key="response")),
    Schema("instruction/input/output", ("instruction",), _parse_instruction),
    Schema("prompt/completion", ("prompt",), functools.partial(_parse_texts, prompt_key="prompt", response_key="completion")),
)
KEYS = frozenset(key for schema in SCHEMAS for key in schema.keys)


def detect(fields: Mapping[str, Any], preference: bool) -> Schema:
    """Returns the schema of a row, which must be a preference schema if `preference`; `fields` has no null values.

    Raises:
      Unusable: no schema has a key among the fields.
    """
    schema = next((schema for schema in SCHEMAS if any(key in fields for key in schema.keys)), None)
    if preference and not (schema and schema.preference):
        raise Unusable("no field 'chosen'")
    if schema:
        return schema
    *keys, last = (f"'{key}'" for schema in SCHEMAS if not schema.preference for key in schema.keys)
    raise Unusable(f"no field {', '.join(keys)} or {last}")

"""Row schemas: which fields hold the prompt and the responses.

`SCHEMAS` is the table. A row has the first schema of the table that has one of its `keys` among the row's fields:

    prompt/chosen/rejected      prompt, chosen, rejected        texts, or lists of chat messages (then `prompt` is optional)
    messages                    messages, [tools]               a chat; the assistant's last message is the response
    question/response           question, response
    instruction/input/output    instruction, [input], output    prompt = instruction, a line feed, the input if not empty
    prompt/completion           prompt, completion, [tools]     texts, or lists of chat messages
    conversations               conversations, [tools]          a chat in the form of ShareGPT

Chat messages are those of `messages`. A parser raises `Unusable` with the reason if a row has the schema but cannot be used.
docs/adding_a_data_schema.md shows how to add a schema.
"""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from bilevel_jax.data import messages
from bilevel_jax.data.messages import Chat, Unusable, text_field


class Content(NamedTuple):
    """The content of a row, in the same form for every schema."""

    system: str  # "" for none
    messages: tuple[tuple[str, str], ...]  # (role, content) before the response, without the system text; the last is the user's
    response: str  # the chosen one of a preference row; "" for none
    rejected: str | None = None  # None unless the row is a preference
    chat: tuple[dict, ...] | None = None  # the messages, with the response if there is one; None unless there are tools
    tools: list[dict] | None = None  # that the row declares
    is_cut: bool = False  # turns after the assistant's last one are left out
    not_read: frozenset[str] = frozenset()  # fields of messages that are not used


class Schema(NamedTuple):
    """One entry of `SCHEMAS`."""

    name: str
    keys: tuple[str, ...]  # any of these fields selects the schema
    parse: Callable[[Mapping, bool], Content]  # (fields, questions_only): fields without null; the response may be missing
    preference: bool = False  # has a chosen and a rejected response
    reads: tuple[str, ...] = ()  # fields of `CONTEXT` that it uses


def split_response(chat: Chat, key: str, trim: bool = True) -> tuple[Chat, str, bool]:
    """Splits a conversation into the turns before the assistant's last one, its text, and whether later turns were cut off."""
    turns = list(chat.turns)
    while trim and turns and turns[-1][0] != "assistant":
        turns.pop()
    if not turns or turns[-1][0] != "assistant":
        what = "has no message of the assistant" if trim else "does not end with the assistant's message"
        raise Unusable(f"field '{key}' {what}")
    end = len(turns)
    response = turns.pop()[1]
    if not response.strip():
        raise Unusable("empty response")
    return chat._replace(turns=turns, messages=chat.messages[:end]), response, end < len(chat.turns)


def _prompt_messages(turns: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    if turns and turns[-1][0] == "assistant":
        raise Unusable("two messages of the assistant in a row")
    if not turns or turns[-1][0] not in ("user", "tool") or not turns[-1][1].strip():
        raise Unusable("empty question")
    return tuple(turns)


def _parse_texts(fields: Mapping, questions_only: bool, *, prompt_key: str, response_key: str) -> Content:
    question = text_field(fields, prompt_key, "question")
    given = fields.get(response_key)
    is_missing = not isinstance(given, str) or not given.strip()
    response = "" if questions_only and is_missing else text_field(fields, response_key, "response")
    return Content("", (("user", question),), response)


def _parse_instruction(fields: Mapping, questions_only: bool) -> Content:
    question = text_field(fields, "instruction", "question")
    if text_field({"input": "", **fields}, "input").strip():
        fields = {**fields, "instruction": f"{question}\n{fields['input']}"}
    return _parse_texts(fields, questions_only, prompt_key="instruction", response_key="output")


def _parse_chat(fields: Mapping, questions_only: bool, *, key: str) -> Content:
    chat = messages.read(fields, key)
    return _chat_content(fields, chat, key, questions_only)


def _chat_content(fields: Mapping, chat: Chat, key: str, questions_only: bool) -> Content:
    response, is_cut = "", False
    if not (questions_only and chat.turns and chat.turns[-1][0] != "assistant"):
        chat, response, is_cut = split_response(chat, key)
    content = Content(chat.system, _prompt_messages(chat.turns), response, is_cut=is_cut, not_read=chat.not_read)
    tools = messages.read_tools(fields)
    return content._replace(chat=tuple(chat.messages), tools=tools) if tools or chat.has_tools else content


def _parse_completion(fields: Mapping, questions_only: bool) -> Content:
    """The fields hold texts, or lists of messages (the conversational form of TRL)."""
    if not any(isinstance(fields.get(key), list) for key in ("prompt", "completion")):
        return _parse_texts(fields, questions_only, prompt_key="prompt", response_key="completion")
    prompt = _as_chat(fields, "prompt", "user", "question")
    if questions_only and not fields.get("completion"):
        return _chat_content(fields, prompt, "prompt", questions_only)
    completion = _as_chat(fields, "completion", "assistant", "response")
    if completion.system:
        raise Unusable("field 'completion' has a system text")
    if not any(role == "assistant" for role, _ in completion.turns):
        raise Unusable("field 'completion' has no message of the assistant")
    joined = Chat(
        prompt.system,
        prompt.turns + completion.turns,
        prompt.messages + completion.messages,
        prompt.has_tools or completion.has_tools,
        prompt.not_read | completion.not_read,
    )
    return _chat_content(fields, joined, "completion", False)


def _as_chat(fields: Mapping, key: str, role: str, part: str) -> Chat:
    if isinstance(fields.get(key), list):
        return messages.read(fields, key)
    message = {"role": role, "content": text_field(fields, key, part)}
    return Chat("", [(role, message["content"])], [message], False, frozenset())


def _pair_chat(fields: Mapping, key: str) -> Chat:
    chat = messages.read(fields, key)
    if chat.has_tools:
        raise Unusable("tool calls in a preference row")
    return chat


def _parse_preference(fields: Mapping, questions_only: bool) -> Content:
    """The prompt is the field `prompt` (text or messages), or the turns before the responses in `chosen` and `rejected`."""
    del questions_only  # both responses are required
    system = ""
    prompt: Sequence[tuple[str, str]] = ()
    if isinstance(fields.get("prompt"), str):
        prompt = [("user", fields["prompt"])]
    elif "prompt" in fields:
        chat = _pair_chat(fields, "prompt")
        system, prompt = chat.system, chat.turns
    responses, conversations = [], set()
    for key in ("chosen", "rejected"):
        if isinstance(fields.get(key), str) or key not in fields:
            responses.append(text_field(fields, key, "response"))
        else:
            before, response, _ = split_response(_pair_chat(fields, key), key, trim=False)
            responses.append(response)
            if before.turns:
                conversations.add((before.system, tuple(before.turns)))
    if len(conversations) > 1:
        raise Unusable("chosen and rejected answer different prompts")
    if conversations:  # the full conversation; it includes `prompt`
        system, prompt = conversations.pop()
    elif "prompt" not in fields:
        raise Unusable("no field 'prompt'")
    chosen, rejected = responses
    return Content(system, _prompt_messages(prompt), chosen, rejected)


SCHEMAS = (  # in order of precedence
    Schema("prompt/chosen/rejected", ("chosen", "rejected"), _parse_preference, preference=True),
    Schema("messages", ("messages",), functools.partial(_parse_chat, key="messages"), reads=("tools",)),
    Schema("question/response", ("question",), functools.partial(_parse_texts, prompt_key="question", response_key="response")),
    Schema("instruction/input/output", ("instruction",), _parse_instruction, reads=("input",)),
    Schema("prompt/completion", ("prompt",), _parse_completion, reads=("tools",)),
    Schema("conversations", ("conversations",), functools.partial(_parse_chat, key="conversations"), reads=("tools",)),
)
PREFERENCES = frozenset(schema.name for schema in SCHEMAS if schema.preference)
KEYS = frozenset(key for schema in SCHEMAS for key in schema.keys)
FIELDS = (  # what a column can be read as
    *("question", "response", "instruction", "input", "output", "prompt", "completion", "messages", "conversations"),
    *("chosen", "rejected", "system", "source", "tools"),
)
CONTEXT = (  # fields that often belong to the prompt or the response, and are reported where the schema does not use them
    *("context", "history", "input", "documents", "passage", "knowledge", "examples", "tools", "functions", "images", "image"),
    *("audio", "reasoning", "reasoning_content", "thinking", "rationale", "explanation"),
)
CONTEXT_NAMES = frozenset(CONTEXT)


def detect(fields: Mapping[str, Any], preference: bool, named: Collection[str] = ()) -> Schema:
    """Returns the schema of a row.

    Args:
      fields: without null values.
      preference: it must be a preference schema.
      named: fields that the user named; a schema that they select takes precedence.

    Raises:
      Unusable: no schema has a key among the fields.
    """
    matching = [schema for schema in SCHEMAS if not fields.keys().isdisjoint(schema.keys)]
    if named:
        matching.sort(key=lambda schema: not any(key in fields and key in named for key in schema.keys))  # stable
    schema = matching[0] if matching else None
    if preference and not (schema and schema.preference):
        raise Unusable("no field 'chosen'")
    if schema:
        return schema
    *keys, last = (f"'{key}'" for schema in SCHEMAS if not schema.preference for key in schema.keys)
    raise Unusable(f"no field {', '.join(keys)} or {last}")

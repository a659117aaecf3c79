"""Chat messages in the forms of OpenAI and ShareGPT: roles, contents in parts, tool calls and tool results.

A conversation without tools is a system text and (role, content) turns. With tools it is also kept as a list of messages in
OpenAI's form, which a chat template renders: `tool_calls` with arguments as objects, and results in messages of role `tool`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "assistant"), "assistant"),
    **dict.fromkeys(("developer", "system"), "system"),
    **dict.fromkeys(("function", "observation", "tool_response", "function_response", "tool"), "tool"),
}
CALLS = ("function_call", "tool_call")  # roles of ShareGPT whose value is a call as JSON
NOT_READ = ("reasoning_content", "reasoning", "thinking", "images", "audio")  # fields of a message with content that is not used


class Unusable(Exception):
    """A row that cannot be used; the message is the reason."""


class Chat(NamedTuple):
    """A conversation."""

    system: str  # "" for none
    turns: list[tuple[str, str]]  # (role, content) of the others; calls are written as JSON
    messages: list[dict]  # the same turns in OpenAI's form
    has_tools: bool  # a turn is a tool call or a tool result
    not_read: frozenset[str]  # names of fields of messages that are not used


def text_field(fields: Mapping, key: str, part: str | None = None) -> str:
    """Returns the text `fields[key]`. If `part` ("question" or "response") is given, the text must not be empty."""
    if key not in fields:
        raise Unusable(f"no field '{key}'")
    if not isinstance(fields[key], str):
        raise Unusable(f"field '{key}' is not text")
    if part and not fields[key].strip():
        raise Unusable(f"empty {part}")
    return fields[key]


def read(fields: Mapping, key: str) -> Chat:
    """Reads the messages `fields[key]`: a list, or its JSON (as CSV files hold it).

    Raises:
      Unusable: they are not a conversation; the message is the reason.
    """
    value = _from_json(fields[key]) if key != "prompt" else fields[key]
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(m, Mapping) for m in value):
        raise Unusable(f"field '{key}' is not a list of messages")
    messages = [_message(message) for message in value]
    system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else ""
    for message in messages:
        if message["role"] not in ("user", "assistant", "tool"):
            expected = "user, assistant or tool is expected"
            raise Unusable(f"field '{key}' has a message of role '{message['role']}' where {expected}")
    turns = [(message["role"], _content_with_calls(message)) for message in messages]
    has_tools = any(message["role"] == "tool" or "tool_calls" in message for message in messages)
    not_read = frozenset(f"{name} of messages" for message in value for name in NOT_READ if message.get(name))
    return Chat(system, turns, messages, has_tools, not_read)


def read_tools(fields: Mapping) -> list[dict] | None:
    """The tools that a row declares in `tools`, in OpenAI's form; None for none.

    Raises:
      Unusable: they are not a list of functions with names.
    """
    tools = _from_json(fields.get("tools"))
    if not tools:
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise Unusable("field 'tools' is not a list of functions")
    functions = [_from_json(tool) for tool in tools]
    functions = [tool.get("function", tool) if isinstance(tool, Mapping) else {} for tool in functions]
    if not all(isinstance(function, Mapping) and isinstance(function.get("name"), str) for function in functions):
        raise Unusable("field 'tools' has a function without a name")
    return [{"type": "function", "function": _without_nulls(function)} for function in functions]


def with_last_answer(messages: Any, response: str) -> list[dict]:
    """Messages of a row up to the assistant's last one, which gets another content in place of its own and of its tool calls."""
    messages = list(_from_json(messages))
    while _role(messages[-1]) != "assistant":
        messages.pop()
    *turns, last = messages
    last = {name: value for name, value in last.items() if name not in ("tool_calls", "function_call")}
    if _is_call(last):
        last |= {"from": "gpt"} if "from" in last else {"role": "assistant"}
    key = "value" if "value" in last and "content" not in last else "content"
    return [*turns, {**last, key: response}]


def first_turns(messages: Any, number: int) -> list[dict]:
    """The first turns of the messages of a row, after the system text."""
    messages = list(_from_json(messages))
    return messages[: number + (_role(messages[0]) == "system")]


def _message(message: Mapping) -> dict:
    """A message in OpenAI's form."""
    role, key = _role(message), "content" if "content" in message or "value" not in message else "value"
    calls = _calls(message)
    content = "" if calls and (message.get(key) is None or _is_call(message)) else _text(message, key)
    if calls and role != "assistant":
        raise Unusable(f"a tool call in a message of role '{role}'")
    links = {name: message[name] for name in ("tool_call_id", "name") if role == "tool" and isinstance(message.get(name), str)}
    return {"role": role, "content": content, **({"tool_calls": calls} if calls else {}), **links}


def _role(message: Mapping) -> str:
    key = "role" if "role" in message or "from" not in message else "from"
    role = text_field(message, key)
    return "assistant" if role in CALLS else ROLES.get(role, role)


def _is_call(message: Mapping) -> bool:
    return message.get("from", message.get("role")) in CALLS


def _text(message: Mapping, key: str) -> str:
    """The text of a content, whose parts follow each other without a separator, as in chat templates."""
    if not isinstance(message.get(key), list):
        return text_field(message, key)
    texts = []
    for part in message[key]:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind not in ("text", "input_text", "output_text"):
            raise Unusable(f"a message with a part of type '{kind}', where only text can be used")
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping):
            texts.append(text_field(part, "text"))
    if len(texts) < len(message[key]):
        raise Unusable(f"field '{key}' is not text")
    return "".join(texts)


def _calls(message: Mapping) -> list[dict]:
    """The tool calls of a message: `tool_calls`, the older `function_call`, or a call of ShareGPT."""
    if _is_call(message):
        calls = _from_json(message.get("value", message.get("content")))
    else:
        calls = _from_json(message.get("tool_calls")) or _from_json(message.get("function_call"))
    if not calls:
        return []
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, Sequence) or isinstance(calls, str) or not all(isinstance(call, Mapping) for call in calls):
        raise Unusable("a tool call that is not an object")
    return [_call(call) for call in calls]


def _call(call: Mapping) -> dict:
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise Unusable("a tool call without a name")
    arguments = _from_json(function.get("arguments", function.get("parameters")))
    link = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**link, "type": "function", "function": {"name": function["name"], "arguments": _without_nulls(arguments or {})}}


def _content_with_calls(message: Mapping) -> str:
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join(filter(None, [message["content"], *calls])) if calls else message["content"]


def _from_json(value: Any) -> Any:
    """The value of a JSON array or object that is given as text; other values unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _without_nulls(value: Any) -> Any:
    """Objects without their null fields, which Parquet writes for fields that other rows have."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(field) for key, field in value.items() if field is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value

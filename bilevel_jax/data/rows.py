"""Rows of instruction and preference data: schemas, content-hash ids, reading, and what could not be used.

Five schemas are told apart row by row, by the first of these keys that holds a value:

    chosen | rejected   prompt, chosen, rejected       texts, or chat message lists (then `prompt` may be left out)
    messages            messages                       a chat whose last message is the assistant's response
    question            question, response
    instruction         instruction, [input], output   question = instruction, then a line feed and a non-empty input
    prompt              prompt, completion

Optional fields everywhere: `system` (or OpenOrca's name for it, `system_prompt`) and `source`. All others are kept in
`Row.fields` and not interpreted. A null counts as an absent field, since Parquet writes one for the other.
"""

import collections
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

SUFFIXES = (".jsonl", ".json", ".parquet")
SCHEMAS = {  # the key that tells a schema -> how reports name it; the order decides
    "chosen": "prompt/chosen/rejected",
    "rejected": "prompt/chosen/rejected",
    "messages": "messages",
    "question": "question/response",
    "instruction": "instruction/input/output",
    "prompt": "prompt/completion",
}
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+){0,2}")


class DataError(ValueError):
    """Data that cannot be used; its message is one line for a person."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One question with its response, or with a preferred and a rejected one."""

    id: str  # hash of the content, never of the position
    system: str  # "" where there is none
    messages: tuple[tuple[str, str], ...]  # (role, content) before the response, without the system text
    response: str  # the chosen one of a preference row; "" where only questions are read and none is given
    rejected: str | None  # None unless preferences are read
    source: str
    fields: Mapping[str, Any]  # the original object, untouched (labels for measurement live here)
    line: int  # 1-based: the line of a JSONL file, the row's number in anything else
    schema: str

    @property
    def question(self) -> str:
        """The prompt without any template: the contents of its turns, a blank line between them."""
        return "\n\n".join(content for _, content in self.messages)


@dataclasses.dataclass(frozen=True)
class Rejection:
    """A row that cannot be used."""

    line: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What a reader found: rows by schema, and the rejections in order."""

    path: str
    schemas: Mapping[str, int]
    num_rows: int  # usable rows in the data
    rejections: tuple[Rejection, ...] = ()
    num_kept: int | None = None  # size of the random subset that was kept, if one was

    @property
    def rejected(self) -> dict[str, tuple[int, int]]:
        """reason -> (count, line of the first example)"""
        return tally(self.rejections)

    def summary(self) -> list[str]:
        """Lines for a person."""
        schemas = ", ".join(f"{count} {schema}" for schema, count in self.schemas.items())
        subset = "" if self.num_kept is None else f"; a random {self.num_kept} kept"
        reasons = [
            f"  left out {count}: {reason} (first: {location(self.path, line)})" for reason, (count, line) in self.rejected.items()
        ]
        return [f"{self.path}: {self.num_rows} rows ({schemas}){subset}", *reasons]


class _Unusable(Exception):
    """Carries the reason from wherever a row turns out unusable to `parse`."""


def location(path: str, line: int) -> str:
    """Where a row is, for a person: `file.jsonl:7`, or `file.parquet row 7` where rows are not lines."""
    return f"{path}:{line}" if path.endswith(".jsonl") else f"{path} row {line}"


def tally(rejections: Iterable[Rejection]) -> dict[str, tuple[int, int]]:
    """reason -> (count, line of the first example), in order of appearance"""
    counts: dict[str, tuple[int, int]] = {}
    for rejection in rejections:
        count, first = counts.get(rejection.reason, (0, rejection.line))
        counts[rejection.reason] = (count + 1, first)
    return counts


# ---- one object -> one row ----


Content = tuple[str, tuple[tuple[str, str], ...], str, str | None]  # system, messages, response, rejected


def _text(fields: Mapping, key: str, what: str | None = None) -> str:
    """`fields[key]`, a non-empty text; `what` (question, response) names it in the complaint about emptiness."""
    if key not in fields:
        raise _Unusable(f"no field '{key}'")
    if not isinstance(fields[key], str):
        raise _Unusable(f"field '{key}' is not text")
    if what and not fields[key].strip():
        raise _Unusable(f"empty {what}")
    return fields[key]


def _chat(value: Any, key: str) -> tuple[str, list[tuple[str, str]]]:
    """A list of chat messages -> (system text, turns)."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(m, Mapping) for m in value):
        raise _Unusable(f"field '{key}' is not a list of messages")
    turns = [(_text(message, "role"), _text(message, "content")) for message in value]
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else ""
    for role, _ in turns:
        if role not in ("user", "assistant"):
            raise _Unusable(f"field '{key}' has a message of role '{role}' where user or assistant is expected")
    return system, turns


def _prompt_turns(turns: list[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    if not turns or turns[-1][0] != "user" or not turns[-1][1].strip():
        raise _Unusable("empty question")
    return tuple(turns)


def _response_of(turns: list[tuple[str, str]], key: str) -> str:
    """Takes the assistant's closing turn off `turns`."""
    if not turns or turns[-1][0] != "assistant":
        raise _Unusable(f"field '{key}' does not end with the assistant's message")
    response = turns.pop()[1]
    if not response.strip():
        raise _Unusable("empty response")
    return response


def _messages(fields: Mapping, questions_only: bool) -> Content:
    system, turns = _chat(fields["messages"], "messages")
    asks = questions_only and turns and turns[-1][0] == "user"
    response = "" if asks else _response_of(turns, "messages")
    return system, _prompt_turns(turns), response, None


def _pair(fields: Mapping, key: str, response_key: str, questions_only: bool) -> Content:
    question = _text(fields, key, "question")
    if key == "instruction" and _text({"input": "", **fields}, "input").strip():
        question = f"{question}\n{fields['input']}"
    blank = not str(fields.get(response_key, "")).strip()
    response = "" if questions_only and blank else _text(fields, response_key, "response")
    return "", (("user", question),), response, None


def _preference(fields: Mapping) -> Content:
    """The prompt is `prompt` (text or messages), or the turns before the last of chosen and rejected, or both."""
    system, prompt = "", []
    if isinstance(fields.get("prompt"), str):
        prompt = [("user", fields["prompt"])]
    elif "prompt" in fields:
        system, prompt = _chat(fields["prompt"], "prompt")
    answers, prompts = [], set()
    for key in ("chosen", "rejected"):
        if isinstance(fields.get(key), str) or key not in fields:
            answers.append(_text(fields, key, "response"))
        else:
            key_system, turns = _chat(fields[key], key)
            answers.append(_response_of(turns, key))
            if turns:
                prompts.add((key_system, tuple(turns)))
    if len(prompts) > 1:
        raise _Unusable("chosen and rejected answer different prompts")
    if prompts:  # the whole conversation: it is the prompt, and says at least as much as `prompt`
        system, prompt = prompts.pop()
    elif "prompt" not in fields:
        raise _Unusable("no field 'prompt'")
    return system, _prompt_turns(list(prompt)), *answers


def content_id(system: str, messages: Sequence, response: str, rejected: str | None) -> str:
    """The first 16 hex digits of SHA-256 over the canonical JSON of what a row says."""
    content = {"messages": messages, "rejected": rejected, "response": response, "system": system}
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _row(line: int, value: Any, preference: bool, questions_only: bool) -> Row:
    if not isinstance(value, Mapping):
        raise _Unusable("not an object")
    fields = {key: field for key, field in value.items() if field is not None}
    key = next((key for key in SCHEMAS if key in fields), None)
    if preference and key not in ("chosen", "rejected"):
        raise _Unusable("no field 'chosen'")
    if key is None:
        raise _Unusable("no field 'question', 'instruction', 'prompt' or 'messages'")
    if key in ("chosen", "rejected"):
        system, messages, response, rejected = _preference(fields)
    elif key == "messages":
        system, messages, response, rejected = _messages(fields, questions_only)
    else:
        response_key = {"question": "response", "instruction": "output", "prompt": "completion"}[key]
        system, messages, response, rejected = _pair(fields, key, response_key, questions_only)
    given = next((_text(fields, name) for name in ("system", "system_prompt") if name in fields), "")
    if system and given and given != system:
        raise _Unusable("two different system texts")
    system, source = system or given, str(fields.get("source", ""))
    try:
        source.encode()
        row_id = content_id(system, messages, response, rejected)
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no tokenizer or file takes
        raise _Unusable("text with a lone surrogate") from None
    if preference and response.strip() == rejected.strip():
        raise _Unusable("chosen and rejected are the same")
    # The id covers both answers whether or not they are wanted here, so that it is the same in every use of the data.
    rejected = rejected if preference else None
    return Row(row_id, system, messages, response, rejected, source, value, line, SCHEMAS[key])


def parse(
    objects: Iterable[tuple[int, Any]], *, preference: bool = False, questions_only: bool = False
) -> Iterator[Row | Rejection]:
    """Numbered objects -> a Row or a Rejection for each, in order, with unique ids.

    The second and third row of the very same content get `-2` and `-3` after their id. That is harmless: the rows say
    the same, so it does not matter which of them carries which suffix, and any order of the rows has the same ids.

    Args:
      objects: (line, object); an object that is a Rejection already is passed on.
      preference: every row must have a chosen and a rejected response. Otherwise a preference row is its chosen one.
      questions_only: the response may be missing or empty.
    """
    seen: collections.Counter[str] = collections.Counter()
    for line, value in objects:
        if isinstance(value, Rejection):
            yield value
            continue
        try:
            row = _row(line, value, preference, questions_only)
        except _Unusable as error:
            yield Rejection(line, str(error))
            continue
        seen[row.id] += 1
        yield row if seen[row.id] == 1 else dataclasses.replace(row, id=f"{row.id}-{seen[row.id]}")


# ---- files and the hub -> numbered objects ----


def _loads(line: int, text: bytes) -> Any:
    try:
        return json.loads(text.decode())
    except UnicodeDecodeError:
        return Rejection(line, "not UTF-8")
    except (ValueError, RecursionError):  # RecursionError: nested too deeply; ValueError: also integers of 5 000 digits
        return Rejection(line, "bad JSON")


def _jsonl(path: str) -> Iterator[tuple[int, Any]]:
    with open(path, "rb") as file:  # bytes: only \n ends a line, and one line that is not UTF-8 spoils no other
        for line, text in enumerate(file, 1):
            text = text.removeprefix(b"\xef\xbb\xbf") if line == 1 else text
            if text.strip():
                yield line, _loads(line, text)


def _json(path: str) -> Iterator[tuple[int, Any]]:
    """An array of rows, an object with one list of rows in it, a single row, or JSON Lines under this name."""
    with open(path, "rb") as file:
        text = file.read().removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text:
        return
    value = _loads(1, text)
    if isinstance(value, Rejection) and not text.startswith(b"["):  # a damaged array is not lines, though some look so
        yield from _jsonl(path)
        return
    if isinstance(value, Mapping) and not SCHEMAS.keys() & value.keys():
        lists = [field for field in value.values() if isinstance(field, list)]
        if len(lists) != 1:
            raise DataError(f"{path}: an object with {len(lists)} lists; give an array of rows, or a single list")
        value = lists[0]
    yield from enumerate(value if isinstance(value, list) else [value], 1)


def _parquet(path: str) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet

    line = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    line += 1
                    yield line, value
    except Exception as error:  # Arrow has errors of every family for damaged bytes, and for values that Python has none for
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: not a readable Parquet file after row {line}: {reason}") from error


def hub(name: str, *, config: str | None = None, split: str = "train", data_dir: str | None = None):
    """A split of a hub data set, or a DataError of one line."""
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split, data_dir=data_dir)
    except Exception as error:  # the hub client raises errors of every family; all mean that there are no rows
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        message = f"no file and no reachable hub data set '{name}' (split '{split}'): {reason}"
        raise DataError(message) from error


def is_hub(path: str) -> bool:
    """Whether `path` names a hub data set: no file of that name, nor the look of one."""
    suffix = os.path.splitext(path)[1].lower()
    return not os.path.exists(path) and suffix not in SUFFIXES and HUB_NAME.fullmatch(path) is not None


def open_hub(path: str):
    """The hub data set that `NAME`, `NAME:SPLIT` or `NAME:CONFIG:SPLIT` names; the split is `train` by default."""
    name, *parts = path.split(":")
    *config, split = parts or ["train"]
    return hub(name, config=config[0] if config else None, split=split)


def _objects(path: str) -> Iterator[tuple[int, Any]]:
    if os.path.isdir(path):
        raise DataError(f"{path}: a directory; name a {', '.join(SUFFIXES)} file in it")
    suffix = os.path.splitext(path)[1].lower()
    if os.path.exists(path):
        readers = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
        if suffix not in readers:
            raise DataError(f"{path}: unknown file type '{suffix}'; use {', '.join(SUFFIXES)}")
        try:
            yield from readers[suffix](path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    elif is_hub(path):
        yield from enumerate(open_hub(path), 1)
    else:
        raise DataError(f"{path}: no such file")


# ---- reading ----


def iter_rows(path: str, *, preference: bool = False, questions_only: bool = False) -> Iterator[Row | Rejection]:
    """A Row or a Rejection for every row of a file or hub data set, in order.

    Args:
      path: a .jsonl, .json or .parquet file, or else a hub data set as in `open_hub`. A file of that name wins. Blank
        lines of JSONL are no rows.
      preference, questions_only: see `parse`.

    Raises:
      DataError: for what cannot be read at all.
    """
    return parse(_objects(os.fspath(path)), preference=preference, questions_only=questions_only)


def collect(items: Iterable[Row | Rejection], path: str) -> tuple[list[Row], Report]:
    """Parts rows from rejections; raises a DataError where there are no rows."""
    rows, rejections = [], []
    for item in items:
        (rejections if isinstance(item, Rejection) else rows).append(item)
    if not rows and not rejections:
        raise DataError(f"{path}: no rows in it")
    if not rows:
        schemas = ", ".join(dict.fromkeys(SCHEMAS.values()))
        raise DataError(
            f"{location(path, rejections[0].line)}: {rejections[0].reason}; none of the {len(rejections)} rows can be "
            f"used (known schemas: {schemas})"
        )
    schemas = collections.Counter(row.schema for row in rows)
    return rows, Report(path, dict(schemas), len(rows), tuple(rejections))


def read_rows(path: str, *, preference: bool = False, questions_only: bool = False) -> tuple[list[Row], Report]:
    """All usable rows of a file or hub data set, and a report on the others; arguments as for `iter_rows`.

    Raises:
      DataError: for what cannot be read at all, is empty, or has no usable row.
    """
    path = os.fspath(path)
    return collect(iter_rows(path, preference=preference, questions_only=questions_only), path)


def select(rows: Sequence[Row], ids: Iterable[str]) -> list[int]:
    """The position in `rows` of every id, so that `rows[select(rows, ids)[k]]` has the id `ids[k]`.

    Raises:
      DataError: if an id matches no row: the ids were made from other data.
    """
    positions = {row.id: position for position, row in enumerate(rows)}
    ids = list(ids)
    unknown = [row_id for row_id in ids if row_id not in positions]
    if unknown:
        raise DataError(f"{len(unknown)} of {len(ids)} ids match no row (the first: {unknown[0]}); is this their data?")
    return [positions[row_id] for row_id in ids]

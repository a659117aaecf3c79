"""Shards of prepared rows: consecutive rows of a source, read, checked, rendered and tokenized, as an Arrow file.

A shard has one record batch. Its schema carries a summary as JSON: what a report says about the objects that it was made from.

    value                       bytes         the object of the row: a line of JSON, or a text of `dump`
    prompt, response, rejected  list<int32>   tokens of `templates.Example`; rejected may be null
    earlier                     list<int32>   starts and stops of the learned answers in the prompt
    reason                      string        why there are no tokens; null if there are
    content                     uint64        the id of the row without the number of a copy
    unpaired                    uint64        the same without a rejected response: `rows.unpaired_content`
    line, file                  int64, int32  where the row is; the file is an index, -1 for the only one
    source                      string
    marked                      int8          whether the field of labels marks the row; -1: it has no such field
    turns                       int32         number of rows of `by_turn.rows_of`
"""

import collections
import datetime
import decimal
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from bilevel_jax.data import by_turn, readers, rows, templates
from bilevel_jax.data.columns import Columns
from bilevel_jax.data.rejections import Rejection
from bilevel_jax.data.rows import Row

TAGGED = b"\x01"  # begins values with types that JSON does not have; JSON never begins with it
TAG = "type of this value"
SUMMARY = b"summary"


class Job(NamedTuple):
    """How the rows of a source are prepared."""

    tokenizer: str  # a directory or hub id
    tokenizer_digest: str  # from `workers.tokenizer_digest`
    template: str  # from `templates.resolve`
    learn: str
    preference: bool
    columns: str
    label: str
    files: tuple[str, ...] = ()  # of the source, if it has several


class Chunk(NamedTuple):
    """What one shard is made from."""

    objects: list[tuple[int, Any]]  # of `readers.read_encoded`
    picked: np.ndarray | None = None  # which of the usable rows are stored; None: all


class Unstorable(ValueError):
    """A row has a value that cannot be stored."""


# --------------------------------------------------------------------------------------------------------------------
# Values
# --------------------------------------------------------------------------------------------------------------------


def dump(value: Any) -> bytes:
    """An object as bytes from which `load` restores it exactly. Bytes are a line of JSON already.

    Raises:
      Unstorable: it has a value of another type than those of JSON, dates, times without a zone, decimals, bytes and tuples.
    """
    if isinstance(value, bytes):
        return value
    text = json.dumps(tagged := _tagged(value))
    return (TAGGED if tagged is not value else b"") + text.encode()


def load(text: bytes) -> Any:
    """The object of `dump`."""
    return json.loads(text[1:], object_hook=_untagged) if text.startswith(TAGGED) else json.loads(text.decode())


def _tagged(value: Any) -> Any:
    """`value`, or a copy of it in which objects with a tag stand for the values that JSON does not have."""
    kind = type(value)
    if value is None or kind in (str, int, float, bool):
        return value
    if kind is dict and all(type(key) is str for key in value):
        copy = {key: _tagged(item) for key, item in value.items()}
        is_plain = TAG not in value and all(copy[key] is value[key] for key in value)
        return value if is_plain else copy if TAG not in value else _tag("items", [[key, item] for key, item in copy.items()])
    if kind is list:
        copies = [_tagged(item) for item in value]
        return value if all(copy is item for copy, item in zip(copies, value)) else copies
    if kind is tuple:
        return _tag("tuple", [_tagged(item) for item in value])
    if kind is bytes:
        return _tag("bytes", value.hex())
    if kind is decimal.Decimal:
        return _tag("decimal", str(value))
    if kind in (datetime.datetime, datetime.date, datetime.time) and getattr(value, "tzinfo", None) is None:
        return _tag(kind.__name__, value.isoformat())
    raise Unstorable(f"values of type {kind.__name__}")


def _tag(kind: str, value: Any) -> dict:
    return {TAG: kind, "value": value}


def _untagged(value: dict) -> Any:
    if TAG not in value:
        return value
    kinds: dict[str, Callable[[Any], Any]] = {
        "items": dict,
        "tuple": tuple,
        "bytes": bytes.fromhex,
        "decimal": decimal.Decimal,
        "datetime": datetime.datetime.fromisoformat,
        "date": datetime.date.fromisoformat,
        "time": datetime.time.fromisoformat,
    }
    return kinds[value[TAG]](value["value"])


def make_row(job: Job, line: int, text: bytes) -> Row:
    """The row of a stored value; its id has no number of a copy."""
    columns = Columns(job.columns)
    (row,) = rows.parse_columns([(line, load(text))], columns, preference=job.preference)
    assert isinstance(row, Row), row
    return row


# --------------------------------------------------------------------------------------------------------------------
# Preparation
# --------------------------------------------------------------------------------------------------------------------


def scan(job: Job, chunk: Chunk) -> np.ndarray:
    """The contents of the usable rows of a chunk, [n] uint64."""
    _, usable, _ = _parse(job, chunk.objects)
    return np.array([_content(row) for _, row in usable], np.uint64)


def make(job: Job, chunk: Chunk, encode_rows: Callable) -> tuple[pa.Buffer, int]:
    """The content of the file of a shard, and the number of its rows.

    Args:
      job: of the source.
      chunk: what to prepare.
      encode_rows: from `templates.make_encoder`.
    """
    summary, usable, columns = _parse(job, chunk.objects)
    kept = usable if chunk.picked is None else [usable[i] for i in chunk.picked]
    kept_rows, examples = [row for _, row in kept], []
    for first in range(0, len(kept), templates.CHUNK):
        examples += encode_rows(kept_rows[first : first + templates.CHUNK])
    batch = _batch(job, [dump(value) for value, _ in kept], kept_rows, examples)
    token_columns = (batch.column(name).values for name in ("prompt", "response", "rejected"))
    summary["largest_token"] = max((int(tokens.to_numpy().max()) for tokens in token_columns if len(tokens)), default=-1)
    summary["columns"] = columns.state()
    table = batch.replace_schema_metadata({SUMMARY: json.dumps(summary).encode()})
    out = pa.BufferOutputStream()
    with pa.ipc.new_file(out, table.schema) as writer:
        writer.write_batch(table)
    return out.getvalue(), len(kept)


def _content(row: Row) -> int:
    return int(rows.content_of(row.id), 16)


def _parse(job: Job, objects: Sequence[tuple[int, Any]]) -> tuple[dict, list[tuple[Any, Row]], Columns]:
    """The summary of some objects, the usable ones with their rows, and the columns that were found."""
    columns = Columns(job.columns)
    decoded = ((line, readers.decode(line, value)) for line, value in objects)
    items = rows.parse_columns(decoded, columns, preference=job.preference)
    usable, rejections = [], []
    for (_, value), item in zip(objects, items, strict=True):
        rejections.append(item) if isinstance(item, Rejection) else usable.append((value, item))
    summary: dict[str, Any] = {
        "usable": len(usable),
        "schemas": dict(collections.Counter(row.schema for _, row in usable)),
        "not_read": dict(collections.Counter(name for _, row in usable for name in row.not_read)),
        "cut": [location_of(job, row.line) for _, row in usable if row.is_cut][:1],
        "num_cut": sum(row.is_cut for _, row in usable),
        "rejected": [],
        "first": None,
    }
    counts = collections.Counter(one.reason for one in rejections)  # in the order of the first one of each reason
    first = {one.reason: one for one in reversed(rejections)}
    summary["rejected"] = [[reason, counts[reason], location_of(job, first[reason].line)] for reason in counts]
    if rejections:
        summary["first"] = [location_of(job, rejections[0].line), rejections[0].reason, list(rejections[0].columns)]
    return summary, usable, columns


def location_of(job: Job, line: int) -> tuple[int, int]:
    """A line as the summary has it: its number, and the index of its file, -1 for the only one."""
    file = getattr(line, "file", "")
    return int(line), job.files.index(file) if file else -1


def _batch(job: Job, values: list[bytes], kept: Sequence[Row], examples: Sequence[templates.Example]) -> pa.RecordBatch:
    locations = [location_of(job, row.line) for row in kept]
    columns = {
        "value": pa.array(values, pa.large_binary()),
        "prompt": _lists([example.prompt for example in examples]),
        "response": _lists([example.response for example in examples]),
        "rejected": _lists([example.rejected for example in examples]),
        "earlier": _lists([np.ravel(np.array(example.earlier, np.int32)) for example in examples]),
        "reason": pa.array([example.reason for example in examples], pa.string()),
        "content": pa.array([_content(row) for row in kept], pa.uint64()),
        "unpaired": pa.array([int(rows.unpaired_content(row), 16) for row in kept], pa.uint64()),
        "line": pa.array([line for line, _ in locations], pa.int64()),
        "file": pa.array([file for _, file in locations], pa.int32()),
        "source": pa.array([row.source for row in kept], pa.string()),
        "marked": pa.array([rows.mark_code(row, job.label) for row in kept], pa.int8()),
        "turns": pa.array([by_turn.num_rows(row) for row in kept], pa.int32()),
    }
    return pa.RecordBatch.from_pydict(columns)


def _lists(parts: Sequence[np.ndarray | None]) -> pa.ListArray:
    lengths = [0 if part is None else len(part) for part in parts]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = np.concatenate([np.zeros(0, np.int32), *(part for part in parts if part is not None)])
    mask = pa.array([part is None for part in parts], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, pa.int32()), mask=mask)

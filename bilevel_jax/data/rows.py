"""Rows of instruction and preference data, with content-hash ids, and a report on the rows that cannot be used.

`schemas` defines the fields of a row, `readers` the files. Every schema may have the fields `system` (or `system_prompt`, as in
OpenOrca) and `source`. All other fields are kept in `Row.fields` and not interpreted. Null counts as an absent field, because
Parquet writes null for absent fields.
"""

import collections
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from bilevel_jax.data import in_memory, readers, schemas
from bilevel_jax.data.columns import Columns, suggestion
from bilevel_jax.data.copies import CopyCounter
from bilevel_jax.data.rejections import DataError, Rejection, location, tally
from bilevel_jax.text import one_line

MAX_REASONS = 20  # lines of a report on rows that are left out
MAX_REASON = 200  # characters of a reason, which may quote the row
CUT = "turns after the last answer left out"
EXPORTED = frozenset(("id", "rank", "prompt", "completion"))  # columns of a row that was exported for SFTTrainer
RENAMED = ("messages", "conversations", "prompt", "completion", "chosen", "rejected", "tools")  # then, as original_NAME
CANONICAL = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=str)  # of what the id covers
UNLABELLED = -1  # `mark_code` of a row without a label
UNMARKED = ("", "0", "0.0", "false", "no", "f", "n")  # texts of labels, as CSV files hold them


@dataclasses.dataclass(frozen=True)
class Row:
    """One question with its response, or with a chosen and a rejected one."""

    id: str  # hash of the content, independent of the position
    system: str  # "" for none
    messages: tuple[tuple[str, str], ...]  # (role, content) before the response, without the system text
    response: str  # the chosen one of a preference row; "" if only questions are read and the row has no response
    rejected: str | None  # None unless preferences are read
    source: str
    fields: Mapping[str, Any]  # the object that was read, with labels for measurement; of an exported row, its own fields
    line: int  # 1-based: the line of a JSONL file, the row number otherwise
    schema: str
    chat: tuple[dict, ...] | None = None  # with tools: the messages in OpenAI's form, the response among them
    tools: list[dict] | None = None  # that the row declares
    is_cut: bool = False  # turns after the assistant's last one are left out
    not_read: tuple[str, ...] = ()  # fields that look like content and are not used

    @property
    def question(self) -> str:
        """The prompt without a template: the contents of its turns, separated by blank lines."""
        return "\n\n".join(content for _, content in self.messages)


@dataclasses.dataclass(frozen=True)
class Report:
    """A summary of a source: rows by schema, and the rejections in order."""

    path: str
    schemas: Mapping[str, int]
    num_rows: int  # usable rows in the data
    rejections: tuple[Rejection, ...] = ()
    num_kept: int | None = None  # size of the random subset; None: all rows
    cut: tuple[Rejection, ...] = ()  # usable rows of which turns after the last answer are left out
    not_read: Mapping[str, int] = dataclasses.field(default_factory=dict)  # field that is not used -> usable rows that have it

    @property
    def rejected(self) -> dict[str, tuple[int, int]]:
        """reason -> (count, line of the first example)"""
        return tally(self.rejections)

    def summary(self) -> list[str]:
        """Lines for the user."""
        by_schema = ", ".join(f"{count} {schema}" for schema, count in self.schemas.items())
        subset = "" if self.num_kept is None else f"; a random {self.num_kept} kept"
        counts = [(f"left out {count}: {reason}", count, line) for reason, (count, line) in self.rejected.items()]
        reasons = [f"  {what} (first: {location(self.path, line)})" for what, _, line in counts[:MAX_REASONS]]
        if more := counts[MAX_REASONS:]:
            reasons.append(f"  left out {sum(count for _, count, _ in more)}: {len(more)} other reasons")
        return [f"{self.path}: {self.num_rows} rows ({by_schema}){subset}", *reasons, *self.notes()]

    def notes(self) -> list[str]:
        """Lines on what is left out of usable rows."""
        lines = [f"  {count}: {note} (first: {location(self.path, line)})" for note, (count, line) in tally(self.cut).items()]
        if self.not_read:
            fields = ", ".join(f"{name} (in {count} rows)" for name, count in self.not_read.items())
            lines.append(f"  fields that are neither prompt nor response here: {fields}")
        return lines


def content_id(content: schemas.Content) -> str:
    """The first 16 hex digits of SHA-256 over the canonical JSON of a row's content."""
    hashed: dict[str, Any] = {"system": content.system, "messages": content.messages}
    hashed |= {"response": content.response, "rejected": content.rejected}
    hashed |= {name: value for name in ("chat", "tools") if (value := getattr(content, name)) is not None}
    text = CANONICAL.encode(hashed)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def content_of(row_id: str) -> str:
    """The id without the number of a copy: equal for rows of equal content."""
    return row_id.partition("-")[0]


def unpaired_content(row: Row) -> str:
    """`content_of` the row without its rejected response: equal for rows that are the same where only the chosen one is used."""
    if row.schema not in schemas.PREFERENCES:
        return content_of(row.id)
    return content_id(schemas.Content(row.system, row.messages, row.response, chat=row.chat, tools=row.tools))


def with_answer(row: Row, response: str) -> Row:
    """The row with another response, a text, in place of its own, which may be a tool call. Its fields stay as they are."""
    chat = row.chat and (*row.chat[:-1], {"role": "assistant", "content": response})
    return dataclasses.replace(row, response=response, rejected=None, chat=chat)


def _is_missing(field: Any) -> bool:
    """Whether a field has no value: null, or NaN, as pandas writes it."""
    return field is None or (isinstance(field, float) and math.isnan(field))


def _make_row(line: int, value: Any, preference: bool, questions_only: bool, named: Collection[str]) -> Row:
    if not isinstance(value, Mapping):
        raise schemas.Unusable("not an object")
    fields = {key: field for key, field in value.items() if not _is_missing(field)}
    schema = schemas.detect(fields, preference, named)
    content = schema.parse(fields, questions_only)
    system = next((schemas.text_field(fields, key) for key in ("system", "system_prompt") if key in fields), "")
    if content.system and system and system != content.system:
        raise schemas.Unusable("two different system texts")
    content = content._replace(system=system) if system and not content.system else content
    source = str(fields.get("source", "")) or getattr(line, "source", "")
    try:
        source.encode()
        row_id = content_id(content)
    except UnicodeEncodeError:  # JSON can contain half a surrogate pair, which no tokenizer or file accepts
        raise schemas.Unusable("text with a lone surrogate") from None
    # The id covers the rejected response even if it is dropped here, so that a row has the same id in every use.
    rejected = content.rejected if preference else None
    if rejected is not None and content.response.strip() == rejected.strip():
        raise schemas.Unusable("chosen and rejected are the same")
    context = [] if schemas.CONTEXT_NAMES.isdisjoint(fields) else schemas.CONTEXT
    not_read = [name for name in context if fields.get(name) and name not in schema.reads]
    return Row(
        id=row_id,
        system=content.system,
        messages=content.messages,
        response=content.response,
        rejected=rejected,
        source=source,
        fields=value,
        line=line,
        schema=schema.name,
        chat=content.chat,
        tools=content.tools,
        is_cut=content.is_cut,
        not_read=(*not_read, *sorted(content.not_read)) if not_read or content.not_read else (),
    )


def parse(
    objects: Iterable[tuple[int, Any]],
    *,
    preference: bool = False,
    questions_only: bool = False,
    named: Collection[str] = (),
) -> Iterator[Row | Rejection]:
    """Yields a Row or a Rejection for each numbered object, in order, with unique ids.

    The second and third row of identical content get `-2` and `-3` after their id. Such rows are interchangeable, so it does not
    matter which of them has which suffix, and the set of ids does not depend on the order.

    Args:
      objects: (line, object); an object that is a Rejection is passed on.
      preference: every row must have a chosen and a rejected response. Otherwise only the chosen one of a preference row is used.
      questions_only: the response may be missing or empty.
      named: fields that the user named, as in `schemas.detect`.
    """
    copies = CopyCounter()
    for line, value in objects:
        if isinstance(value, Rejection):
            yield value
            continue
        try:
            row = _make_row(line, value, preference, questions_only, named)
        except schemas.Unusable as error:
            fields = value.items() if isinstance(value, Mapping) else ()
            yield Rejection(line, one_line(str(error), MAX_REASON), tuple(str(key) for key, field in fields if field is not None))
            continue
        count = copies.add(row.id)
        yield row if count == 1 else dataclasses.replace(row, id=f"{row.id}-{count}")


def iter_rows(path: Any, *, preference: bool = False, questions_only: bool = False, columns: str = "") -> Iterator[Row | Rejection]:
    """Yields a Row or a Rejection for every row of a source, in order.

    Args:
      path: files, folders and data sets, as in `readers.read_objects`; or rows in memory, as in `in_memory.objects`.
      preference, questions_only: as in `parse`.
      columns: other names of columns, as in `columns.parse`.

    Raises:
      DataError: the source cannot be read, or has no such column.
    """
    name = in_memory.name(path)
    objects = readers.read_objects(name) if in_memory.is_source(path) else in_memory.objects(path)
    renamed = Columns(columns)
    yield from parse_columns(objects, renamed, preference=preference, questions_only=questions_only)
    renamed.check(name)


def parse_columns(objects: Iterable[tuple[int, Any]], columns: Columns, **options: bool) -> Iterator[Row | Rejection]:
    """`parse` of objects whose columns have other names, and of exported rows as the rows of the data."""
    asked = columns.names.values()
    return parse(columns.rename((line, _restored(value, asked)) for line, value in objects), named=columns.names, **options)


def _restored(value: Any, asked: Collection[str]) -> Any:
    """An exported row with the fields that the export renamed, in place of those for SFTTrainer; other objects as they are.

    A prompt for SFTTrainer may have the template of the run in it, and would get the template again.

    Args:
      value: of a source.
      asked: columns that the user names, which stay.
    """
    if not isinstance(value, Mapping) or not EXPORTED <= value.keys():
        return value
    renamed = {name: f"original_{name}" for name in RENAMED}
    restored = {name: value[old] for name, old in renamed.items() if value.get(old) is not None and old not in asked}
    if not restored or _has_its_id(value):
        return value
    left_out = {renamed[name] for name in restored}
    if "prompt" not in restored and restored.keys() & {"messages", "conversations", "chosen"}:
        left_out |= {"prompt", "completion"}  # the row of the data has none
    return {name: field for name, field in value.items() if name not in left_out} | restored


def _has_its_id(value: Mapping) -> bool:
    """Whether the `id` of an exported row is that of its fields as they are, so that none of its content was renamed."""
    try:
        return _make_row(0, value, False, False, ()).id == content_of(str(value["id"]))
    except schemas.Unusable:
        return False


def collect(items: Iterable[Row | Rejection], path: str) -> tuple[list[Row], Report]:
    """Separates rows from rejections.

    Raises:
      DataError: there are no rows.
    """
    rows: list[Row] = []
    _, report = survey(_noted(items, rows), path)
    return rows, report


def _noted(items: Iterable[Row | Rejection], rows: list[Row]) -> Iterator[Row | Rejection]:
    for item in items:
        if isinstance(item, Row):
            rows.append(item)
        yield item


def survey(items: Iterable[Row | Rejection], path: str) -> tuple[Row, Report]:
    """The first row, and the report on all, which are not kept.

    Raises:
      DataError: there are no rows.
    """
    first: Row | None = None
    rejections, cut = [], []
    counts: collections.Counter[str] = collections.Counter()
    not_read: collections.Counter[str] = collections.Counter()
    for item in items:
        if isinstance(item, Rejection):
            rejections.append(item)
            continue
        first = first or item
        counts[item.schema] += 1
        not_read.update(item.not_read)
        if item.is_cut:
            cut.append(Rejection(item.line, CUT))
    if first is None:
        raise unusable(path, rejections[0] if rejections else None, len(rejections))
    return first, Report(path, dict(counts), counts.total(), tuple(rejections), cut=tuple(cut), not_read=dict(not_read))


def unusable(path: str, first: Rejection | None, number: int) -> DataError:
    """The error of a source without a usable row; `first` of its rejections, and their `number`."""
    if first is None:
        return DataError(f"{path}: no rows in it")
    names = ", ".join(schema.name for schema in schemas.SCHEMAS)
    return DataError(
        f"{location(path, first.line)}: {first.reason}; none of the {number} rows can be "
        f"used{suggestion(first.reason, first.columns)} (known schemas: {names})"
    )


def read_rows(path: str, **options) -> tuple[list[Row], Report]:
    """Reads all usable rows of a source, with a report on the others; arguments as for `iter_rows`.

    Raises:
      DataError: the source cannot be read, is empty, or has no usable row.
    """
    path = os.fspath(path)
    return collect(iter_rows(path, **options), path)


def spans(row: Row, field: str) -> Sequence[Sequence[float]]:
    """The bad parts of a response that a field lists as [[start, stop], ...] in characters; none without the field.

    Raises:
      DataError: the field has another value; one line that names the row.
    """
    values = row.fields.get(field) or []

    def is_span(value) -> bool:
        return isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(end, (int, float)) for end in value)

    if not isinstance(values, (list, tuple)) or not all(map(is_span, values)):
        what = f"row {row.id}: {field}={row.fields[field]!r:.80} is not a list of [start, stop], in characters of the response"
        raise DataError(f"{what}; mend it, or name another field as data.spans")
    return values


def mark_code(row: Row, field: str) -> int:
    """`mark` as a number for arrays: 1 or 0; UNLABELLED for None."""
    value = mark(row, field)
    return UNLABELLED if value is None else int(value)


def mark(row: Row, field: str) -> bool | None:
    """Whether a field of labels marks the row; None if the row has no value in it. Texts such as `0` and `false` do not."""
    value = row.fields.get(field)
    if isinstance(value, str):
        return value.strip().lower() not in UNMARKED
    return None if _is_missing(value) else bool(value)

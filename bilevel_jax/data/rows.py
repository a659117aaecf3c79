"""Rows of instruction and preference data, with content-hash ids, and a report on the rows that cannot be used.

`schemas` defines the fields of a row, `readers` the files. Every schema may have the fields `system` (or `system_prompt`, as in
OpenOrca) and `source`. All other fields are kept in `Row.fields` and not interpreted. Null counts as an absent field, because
Parquet writes null for absent fields.
"""

import collections
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from bilevel_jax.data import in_memory, readers, schemas
from bilevel_jax.data.rejections import DataError, Rejection, location, tally


@dataclasses.dataclass(frozen=True)
class Row:
    """One question with its response, or with a chosen and a rejected one."""

    id: str  # hash of the content, independent of the position
    system: str  # "" for none
    messages: tuple[tuple[str, str], ...]  # (role, content) before the response, without the system text
    response: str  # the chosen one of a preference row; "" if only questions are read and the row has no response
    rejected: str | None  # None unless preferences are read
    source: str
    fields: Mapping[str, Any]  # the original object, unchanged (labels for measurement are here)
    line: int  # 1-based: the line of a JSONL file, the row number otherwise
    schema: str

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

    @property
    def rejected(self) -> dict[str, tuple[int, int]]:
        """reason -> (count, line of the first example)"""
        return tally(self.rejections)

    def summary(self) -> list[str]:
        """Lines for the user."""
        by_schema = ", ".join(f"{count} {schema}" for schema, count in self.schemas.items())
        subset = "" if self.num_kept is None else f"; a random {self.num_kept} kept"
        reasons = [
            f"  left out {count}: {reason} (first: {location(self.path, line)})" for reason, (count, line) in self.rejected.items()
        ]
        return [f"{self.path}: {self.num_rows} rows ({by_schema}){subset}", *reasons]


def content_id(content: schemas.Content) -> str:
    """The first 16 hex digits of SHA-256 over the canonical JSON of a row's content."""
    text = json.dumps(content._asdict(), ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _make_row(line: int, value: Any, preference: bool, questions_only: bool) -> Row:
    if not isinstance(value, Mapping):
        raise schemas.Unusable("not an object")
    fields = {key: field for key, field in value.items() if field is not None}
    schema = schemas.detect(fields, preference)
    content = schema.parse(fields, questions_only)
    system = next((schemas.text_field(fields, key) for key in ("system", "system_prompt") if key in fields), "")
    if content.system and system and system != content.system:
        raise schemas.Unusable("two different system texts")
    content = content._replace(system=content.system or system)
    source = str(fields.get("source", ""))
    try:
        source.encode()
        row_id = content_id(content)
    except UnicodeEncodeError:  # JSON can contain half a surrogate pair, which no tokenizer or file accepts
        raise schemas.Unusable("text with a lone surrogate") from None
    if preference and content.response.strip() == content.rejected.strip():
        raise schemas.Unusable("chosen and rejected are the same")
    # The id covers the rejected response even if it is dropped here, so that a row has the same id in every use.
    rejected = content.rejected if preference else None
    return Row(row_id, content.system, content.messages, content.response, rejected, source, value, line, schema.name)


def parse(
    objects: Iterable[tuple[int, Any]], *, preference: bool = False, questions_only: bool = False
) -> Iterator[Row | Rejection]:
    """Yields a Row or a Rejection for each numbered object, in order, with unique ids.

    The second and third row of identical content get `-2` and `-3` after their id. Such rows are interchangeable, so it does not
    matter which of them has which suffix, and the set of ids does not depend on the order.

    Args:
      objects: (line, object); an object that is a Rejection is passed on.
      preference: every row must have a chosen and a rejected response. Otherwise only the chosen one of a preference row is used.
      questions_only: the response may be missing or empty.
    """
    counts: collections.Counter[str] = collections.Counter()
    for line, value in objects:
        if isinstance(value, Rejection):
            yield value
            continue
        try:
            row = _make_row(line, value, preference, questions_only)
        except schemas.Unusable as error:
            yield Rejection(line, str(error))
            continue
        counts[row.id] += 1
        yield row if counts[row.id] == 1 else dataclasses.replace(row, id=f"{row.id}-{counts[row.id]}")


def iter_rows(path: Any, *, preference: bool = False, questions_only: bool = False) -> Iterator[Row | Rejection]:
    """Yields a Row or a Rejection for every row of a source, in order.

    Args:
      path: a file or hub data set, as in `readers.read_objects`, or rows in memory, as in `in_memory.objects`.
      preference, questions_only: as in `parse`.

    Raises:
      DataError: the source cannot be read.
    """
    numbered = readers.read_objects(in_memory.source_name(path)) if in_memory.is_source(path) else in_memory.objects(path)
    return parse(numbered, preference=preference, questions_only=questions_only)


def collect(items: Iterable[Row | Rejection], path: str) -> tuple[list[Row], Report]:
    """Separates rows from rejections.

    Raises:
      DataError: there are no rows.
    """
    rows, rejections = [], []
    for item in items:
        (rejections if isinstance(item, Rejection) else rows).append(item)
    if not rows and not rejections:
        raise DataError(f"{path}: no rows in it")
    if not rows:
        names = ", ".join(schema.name for schema in schemas.SCHEMAS)
        raise DataError(
            f"{location(path, rejections[0].line)}: {rejections[0].reason}; none of the {len(rejections)} rows can be "
            f"used (known schemas: {names})"
        )
    counts = collections.Counter(row.schema for row in rows)
    return rows, Report(path, dict(counts), len(rows), tuple(rejections))


def read_rows(path: str, *, preference: bool = False, questions_only: bool = False) -> tuple[list[Row], Report]:
    """Reads all usable rows of a source, with a report on the others; arguments as for `iter_rows`.

    Raises:
      DataError: the source cannot be read, is empty, or has no usable row.
    """
    path = os.fspath(path)
    return collect(iter_rows(path, preference=preference, questions_only=questions_only), path)


def select(rows: Sequence[Row], ids: Iterable[str]) -> list[int]:
    """Returns the index in `rows` of every id.

    Raises:
      DataError: an id matches no row: the ids are from other data.
    """
    index_of = {row.id: index for index, row in enumerate(rows)}
    ids = list(ids)
    unknown = [row_id for row_id in ids if row_id not in index_of]
    if unknown:
        raise DataError(f"{len(unknown)} of {len(ids)} ids match no row (first: {unknown[0]}); the ids are from other data")
    return [index_of[row_id] for row_id in ids]

"""Other names of columns: `question:query,response:answer` reads the column `query` as `question`."""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from bilevel_jax.data import schemas
from bilevel_jax.data.rejections import DataError
from bilevel_jax.text import one_line

MAX_SEEN = 1000  # names of columns that are kept for a message
MAX_SHOWN = 20
LIKELY = {  # columns of other data sets that probably hold a field, for a message
    "question": ("query", "user", "input", "problem", "text"),
    "response": ("answer", "answers", "output", "reply", "completion", "assistant", "target", "solution"),
    "output": ("response", "answer"),
    "completion": ("response", "answer", "output"),
}


def parse(text: str, name: str = "--columns") -> dict[str, str]:
    """From `FIELD:COLUMN,...` to field -> column; an empty text gives {}. Errors begin with the `name` of the setting.

    Raises:
      DataError: not of that form, or a field that no schema has.
    """
    columns: dict[str, str] = {}
    for entry in filter(None, (entry.strip() for entry in text.split(","))):
        field, colon, column = (part.strip() for part in entry.partition(":"))
        if not (field and colon and column):
            raise DataError(f"{name}: '{entry}' must be FIELD:COLUMN, for example question:query,response:answer")
        if field not in schemas.FIELDS:
            close = difflib.get_close_matches(field, schemas.FIELDS, 1)
            hint = f" (did you mean {close[0]}?)" if close else f"; known are {', '.join(schemas.FIELDS)}"
            raise DataError(f"{name}: no schema has a field '{field}'{hint}")
        if field in columns:
            raise DataError(f"{name}: the field '{field}' is named twice")
        columns[field] = column
    return columns


def suggestion(reason: str, names: Sequence[str]) -> str:
    """How to name the columns of a row that lacks a field, for a message; "" if the row is unusable for another reason.

    Args:
      reason: of the rejection.
      names: the columns of the row.
    """
    if not names or not reason.startswith("no field "):
        return ""
    missing = re.fullmatch(r"no field '(\w+)'", reason)  # otherwise it has the fields of no schema
    names = [one_line(name, 80) for name in names]
    pairs = []
    for field in [missing[1]] if missing else ["question", "response"]:
        folded = {name.lower(): name for name in reversed(names)}
        candidates = (folded[name] for name in (field, *LIKELY.get(field, ())) if name in folded)
        pairs.append(f"{field}:{next(candidates, 'COLUMN')}")
    shown = ", ".join(names[:MAX_SHOWN])
    return f"; the columns are {shown}: name them with data.columns={','.join(pairs)} (--columns of commands)"


class Columns:
    """Other names of columns, and which of them were found in the data so far."""

    def __init__(self, text: str = "", name: str = "--columns"):
        """Arguments and errors as for `parse`."""
        self.names = parse(text, name)
        self._missing = dict.fromkeys(self.names.values())
        self._seen: dict[Any, None] = {}

    def rename(self, objects: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        """Renames the columns of (line, object). A field that has the new name already becomes `original_NAME`."""
        if not self.names:
            yield from objects
            return
        for line, value in objects:
            if isinstance(value, Mapping):
                for column in [column for column in self._missing if column in value]:
                    del self._missing[column]
                if self._missing and len(self._seen) < MAX_SEEN:
                    self._seen |= dict.fromkeys(value)
                value = _renamed(value, self.names)
            yield line, value

    def state(self) -> tuple[list[str], list[str]]:
        """The columns that no object had so far, and names of columns that were seen."""
        return list(self._missing), [str(name) for name in self._seen]

    def add(self, missing: Iterable[str], seen: Iterable[str]) -> None:
        """Adds what `state` gave for some objects of the same source."""
        self._missing = {column: None for column in self._missing if column in set(missing)}
        self._seen |= dict.fromkeys(seen)

    def check(self, path: str) -> None:
        """Raises a DataError if no object had one of the columns; it names the source `path` and the nearest column."""
        if not (self._missing and self._seen):
            return
        column, known = next(iter(self._missing)), [str(name) for name in self._seen]
        close = difflib.get_close_matches(column, known, 1)
        hint = f" (did you mean {close[0]}?)" if close else f"; the columns are {', '.join(known[:MAX_SHOWN])}"
        raise DataError(f"{path}: no row has the column '{column}'{hint}")


def _renamed(value: Mapping, columns: Mapping[str, str]) -> dict:
    new_name = {column: field for field, column in columns.items()}
    renamed = {}
    for name, field in value.items():
        if name in new_name:
            renamed[new_name[name]] = field
        elif name in columns and columns[name] in value:
            renamed[f"original_{name}"] = field
        else:
            renamed[name] = field
    return renamed

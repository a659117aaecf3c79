"""Other names of columns: `question:query,response:answer` reads the column `query` as `question`."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from bilevel_jax.data import schemas
from bilevel_jax.data.rejections import DataError


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


def rename(objects: Iterable[tuple[int, Any]], columns: Mapping[str, str], path: str) -> Iterator[tuple[int, Any]]:
    """Renames the columns of each object. A field that has the new name already becomes `original_NAME`.

    Args:
      objects: (line, object), as in `readers.read_objects`.
      columns: field -> column.
      path: for the message.

    Raises:
      DataError: no object has one of the columns.
    """
    missing, seen = dict.fromkeys(columns.values()), {}
    for line, value in objects:
        if isinstance(value, Mapping):
            for column in [column for column in missing if column in value]:
                del missing[column]
            if missing and len(seen) < 1000:
                seen |= dict.fromkeys(value)
            value = _renamed(value, columns)
        yield line, value
    if missing and seen:
        column = next(iter(missing))
        close = difflib.get_close_matches(column, map(str, seen), 1)
        hint = f" (did you mean {close[0]}?)" if close else f"; the columns are {', '.join(map(str, list(seen)[:20]))}"
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

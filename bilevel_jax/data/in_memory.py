"""Rows in memory: lists of objects, `datasets.Dataset`, pandas tables. They have the same schemas as rows of files."""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from bilevel_jax import progress
from bilevel_jax.data.rejections import DataError


def is_source(rows: Any) -> bool:
    """Whether `rows` names files, hub data sets or other sources, instead of being rows: a text, a path, or a list of them."""
    if isinstance(rows, (list, tuple)):
        return bool(rows) and all(isinstance(one, (str, os.PathLike)) for one in rows)
    return isinstance(rows, (str, os.PathLike))


def source_name(source: Any) -> str:
    """The name of a source as configs have it; several names are separated by commas.

    Raises:
      DataError: one of several names has a comma, or a name is a text.
    """
    names = [os.fspath(one) for one in (source if isinstance(source, (list, tuple)) else [source])]
    for one in names if isinstance(source, (list, tuple)) else ():
        if " " in one and os.sep not in one and not os.path.lexists(one):
            raise DataError(f'{one!r:.80} is no file; rows are objects, such as {{"question": "...", "response": "..."}}')
    if len(names) > 1 and any("," in name for name in names):
        raise DataError(f"{next(name for name in names if ',' in name)}: a name in a list of several must not have a comma")
    return ",".join(names)


def name(rows: Any) -> str:
    """The name of a source, or what rows in memory are called in messages."""
    return source_name(rows) if is_source(rows) else "rows"


def objects(rows: Any) -> Iterator[tuple[int, Any]]:
    """Yields (number, object) for every row, numbered from 1, as `readers.read_objects` does for a file, without NumPy values.

    Args:
      rows: objects with the fields of a schema: a list or another iterable of them, a `datasets.Dataset`, a `pandas.DataFrame`.

    Raises:
      DataError: `rows` is something else.
    """
    if hasattr(rows, "to_dict") and hasattr(rows, "notna"):  # a DataFrame; its missing values are NaN
        rows = rows.astype(object).where(rows.notna(), None).to_dict("records")
    if isinstance(rows, Mapping):
        splits = hasattr(rows, "column_names")  # a DatasetDict
        remedy = f"take one of its splits {', '.join(map(str, rows))}" if splits else "give a list of rows"
        raise DataError(f"{type(rows).__name__} is not a list of rows; {remedy}")
    if not isinstance(rows, Iterable):
        raise DataError(f"{type(rows).__name__} is not a list of rows; give a list of objects, a Dataset, a DataFrame or a file")
    for number, value in enumerate(rows, 1):
        with contextlib.suppress(RecursionError):  # a value that is nested too deeply, which those who use the row refuse
            value = _without_arrays(value)
        yield number, value


def _without_arrays(value: Any) -> Any:
    """`value` with lists and numbers in place of NumPy's, at any depth: pandas reads the lists of Parquet files as arrays."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        return {key: _without_arrays(field) for key, field in value.items()}
    return [_without_arrays(item) for item in value] if isinstance(value, list) else value


def write_jsonl(rows: Iterable[Any], file: pathlib.Path) -> None:
    """Writes rows to a JSONL file, one line for each, so that the line of a row is its number.

    Raises:
      DataError: `rows` are no rows, or a value cannot be written as JSON; one line that names row and field.
    """
    with open(file, "w", encoding="utf-8", errors="backslashreplace") as out:  # a lone surrogate as its JSON escape
        for number, value in progress.bar(objects(rows), desc="storing rows", unit="row"):
            try:
                line = json.dumps(_without_nan(value), ensure_ascii=False, default=_plain)
            except (TypeError, ValueError, RecursionError) as error:
                raise DataError(f"row {number}: {_first_unwritable(value)} cannot be written as JSON ({error})") from error
            out.write(line + "\n")


def _plain(value: Any) -> Any:
    """NumPy arrays, numbers and dates in the types of JSON."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise TypeError(f"of type {type(value).__name__}; remove it, or make it a text or number")


def _without_nan(value: Any) -> Any:
    """`value` with null for NaN and infinities, which JSON does not have; at the first level, where tables have them."""
    if not isinstance(value, Mapping):
        return value
    return {key: None if isinstance(field, float) and not math.isfinite(field) else field for key, field in value.items()}


def _first_unwritable(value: Any) -> str:
    """The first field of a row that is no JSON, for an error."""
    for key, field in value.items() if isinstance(value, Mapping) else ():
        try:
            json.dumps(field, default=_plain)
        except (TypeError, ValueError, RecursionError):
            return f"field {key!r}"
    return "it"

"""Exported rows on disk: collected one by one, renamed in all rows where a name clashes in one, and written to a file."""

import itertools
import os
import pathlib
import pickle
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping

import numpy as np

from bilevel_jax import files
from bilevel_jax.data import rows
from bilevel_jax.runtime import weight_table

INFERENCE_BYTES = 10 << 20  # bytes of a JSONL file from which `datasets` infers the fields
PICKLED = 256  # rows that are pickled together
BLOCK = 1 << 14  # rows of a Parquet file that are in memory at once
ORIGINAL = "original_"
NUMBERS = ("weight", "rank", "masked", *weight_table.MEASURES)  # columns of an export that are also fields of an exported row


class Records:
    """Rows with their columns, in a temporary file until they are read.

    A field is renamed `original_NAME`, in all rows, if its name is reserved or if a column has the name and another value. Nulls
    do not count. Where the new name of one of `NUMBERS` is taken, as in the third round of exports, a number follows it. Iterating
    yields the rows in the order in which they were added, as often as needed, one iteration after the other.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()
        self._number = 0
        self._pending: list[tuple[dict, dict]] = []  # rows that are not in the file yet
        self._present: set[str] = set()  # fields with a value
        self._clashing: set[str] = set()  # of these, fields with the name of a column and another value
        self._names: set[str] = set()  # of fields and columns
        self._taken: dict[str, tuple[int, int]] = {}  # field -> (record, line) of the first row where its new name is taken
        self._renamed: dict[str, str] = {}

    def add(self, line: int, fields: Mapping, columns: Mapping) -> None:
        """Adds a row of the data with its new columns."""
        self._names |= fields.keys() | columns.keys()
        for name, value in fields.items():
            if value is not None:
                self._present.add(name)
                if name in columns and columns[name] != value:
                    self._clashing.add(name)
            new = f"{ORIGINAL}{name}"
            if name not in self._taken and (new in fields or new in columns):
                self._taken[name] = self._number, line
        self._pending.append((dict(fields), dict(columns)))
        self._number += 1
        if len(self._pending) == PICKLED:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            self._file.seek(0, os.SEEK_END)  # an iteration may have ended early
            pickle.dump(self._pending, self._file, pickle.HIGHEST_PROTOCOL)
            self._pending = []

    def rename(self, reserved: Collection[str]) -> list[str]:
        """Renames the fields that clash, and returns their names.

        Raises:
          DataError: a new name exists already, of another field than `NUMBERS`.
        """
        clashing = self._clashing | self._present.intersection(reserved)
        self._renamed = {name: self._new_name(name) for name in clashing}
        taken = [(*self._taken[name], name) for name in clashing.difference(NUMBERS) if name in self._taken]
        if taken:
            _, line, name = min(taken)
            what = f"'{name}' would be renamed '{ORIGINAL}{name}', which is taken; rename one in the data"
            raise rows.DataError(f"line {line}: {what}")
        return sorted(self._renamed)

    def _new_name(self, name: str) -> str:
        names = (f"{ORIGINAL}{name}{number}" for number in itertools.chain([""], (f"_{k}" for k in itertools.count(2))))
        return next(new for new in names if new not in self._names)

    def __len__(self) -> int:
        return self._number

    def __iter__(self) -> Iterator[dict]:
        self._flush()
        self._file.seek(0)
        number = 0
        while number < self._number:
            some = pickle.load(self._file)
            number += len(some)
            for fields, columns in some:
                if self._renamed:
                    fields = {self._renamed.get(name, name): value for name, value in fields.items()}
                yield fields | columns


class Repeated:
    """Records, each as often as `times` [records] says."""

    def __init__(self, records: Records, times: np.ndarray):
        self._records, self._times = records, times

    def __iter__(self) -> Iterator[dict]:
        for record, number in zip(self._records, self._times, strict=True):
            yield from itertools.repeat(record, number)


def write(out: pathlib.Path, records: Iterable[dict]) -> list[str]:
    """Writes rows, which may have different fields, to a JSONL or Parquet file.

    Args:
      records: can be iterated more than once.

    Returns:
      Fields with no value in the first INFERENCE_BYTES of a JSONL file. `datasets.load_dataset` fails on them.

    Raises:
      ValueError: a field has values that Parquet cannot hold, such as some of several types.
    """
    late: list[str] = []
    out.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(out) as file:
        if out.suffix == ".parquet":
            _write_parquet(out, file, records)
            return []
        seen: set[str] = set()
        for record in records:
            new = {name for name, value in record.items() if value is not None} - seen
            if new and file.tell() > INFERENCE_BYTES:
                late += sorted(new)
            seen |= new
            line = files.to_json(record, ensure_ascii=False, default=str) + "\n"
            file.write(line.encode(errors="backslashreplace"))  # lone surrogates as JSON escapes
    return late


def _blocks(records: Iterable[dict]) -> Iterator[list[dict]]:
    iterator = iter(records)
    while block := list(itertools.islice(iterator, BLOCK)):
        yield block


def _write_parquet(out: pathlib.Path, file, records: Iterable[dict]) -> None:
    """Writes block by block, with the types that all blocks share: the first pass collects them."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        schema = pa.schema([])
        for block in _blocks(records):
            schema = pa.unify_schemas([schema, _table(pa, block).schema], promote_options="permissive")
        with pyarrow.parquet.ParquetWriter(file, schema) as writer:
            for block in _blocks(records):
                writer.write_table(_table(pa, block, schema))
    except (pa.ArrowException, OverflowError) as error:
        raise ValueError(f"{out}: a field has values that Parquet cannot hold ({error}); write .jsonl") from error


def _table(pa, block: list[dict], schema=None):
    names = schema.names if schema else dict.fromkeys(name for record in block for name in record)
    return pa.table({name: [record.get(name) for record in block] for name in names}, schema=schema)

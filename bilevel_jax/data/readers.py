"""Reads files and data sets into numbered objects, before any field is looked at."""

import codecs
import contextlib
import csv
import gzip
import io
import json
import os
import shutil
import stat
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from typing import IO, Any

from bilevel_jax import errors
from bilevel_jax.data import limits, parts, schemas
from bilevel_jax.data.parts import FORMATS, is_hub
from bilevel_jax.data.rejections import COMPRESSED, DataError, Line, Rejection, suffix_of

BOM = codecs.BOM_UTF8
DELIMITERS = ",;\t"
BATCH = 64  # rows of a Parquet file that are unpacked at a time
KNOWN = f"{', '.join(FORMATS)}, each also {' or '.join(COMPRESSED)}"


def read_objects(name: str) -> Iterator[tuple[int, Any]]:
    """Yields (line, object) for every row of a source, in order; the object is a Rejection if it cannot be read.

    Args:
      name: files, folders and data sets as in `parts.resolve`. Blank lines of JSONL and CSV files are skipped. Lines are 1-based:
        lines of a JSONL or CSV file, row numbers otherwise. With several parts a line is a `Line`, which knows its file.

    Raises:
      DataError: the source cannot be read.
    """
    for line, value in read_encoded(name):
        yield line, decode(line, value)


def read_encoded(name: str) -> Iterator[tuple[int, Any]]:
    """`read_objects` without parsing JSON Lines, whose objects are bytes; `decode` gives the objects. Arguments as there."""
    source_parts = parts.resolve(name)
    for part in source_parts:
        for line, value in _read_part(part.path):
            if len(source_parts) > 1:
                line = Line(line, part.path, part.source)
                value = Rejection(line, value.reason) if isinstance(value, Rejection) else value
            yield line, value


def decode(line: int, value: Any) -> Any:
    """The object of a line of `read_encoded`, or a Rejection."""
    return _loads(line, value) if isinstance(value, bytes) else value


def _read_part(path: str) -> Iterator[tuple[int, Any]]:
    if os.path.exists(path) and not os.path.isdir(path):
        yield from _read_file(path)
    elif is_indexed(path):
        yield from enumerate(open_indexed(path), 1)
    elif os.path.islink(path):
        raise DataError(f"{path}: a link to {os.readlink(path)}, which leads to no file")
    else:
        raise DataError(f"{path or 'an empty name'}: no such file{parts.nearest_file(path)}")


# --------------------------------------------------------------------------------------------------------------------
# Data sets of the library `datasets`
# --------------------------------------------------------------------------------------------------------------------


def is_indexed(path: str) -> bool:
    """Whether `path` names a data set whose rows can be read by number: on the hub, or written by `save_to_disk`."""
    return parts.is_saved(_split_of_folder(path)[0]) or is_hub(path)


def open_indexed(path: str):
    """Opens a data set for which `is_indexed` holds.

    Raises:
      DataError: it cannot be loaded.
    """
    folder, split = _split_of_folder(path)
    return _open_saved(folder, split) if parts.is_saved(folder) else open_hub(path)


def load_hub(name: str, *, config: str | None = None, split: str = "train", data_dir: str | None = None):
    """Loads a split of a hub data set.

    Raises:
      DataError: the data set cannot be loaded.
    """
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split, data_dir=data_dir)
    except Exception as error:  # the hub client raises many types of errors; all mean that there are no rows
        message = f"no file and no reachable hub data set '{name}' (split '{split}'): {_reason(error)}"
        raise DataError(message) from error


def open_hub(path: str):
    """Loads the hub data set `NAME`, `NAME:SPLIT` or `NAME:CONFIG:SPLIT`; the split is `train` by default."""
    name, *parts_of_name = path.split(":")
    if name in ("recipe", "synthetic"):
        raise DataError(f"{path}: recipes and generated rows are for data.upper and data.lower; name files or a hub data set here")
    *config, split = parts_of_name or ["train"]
    return load_hub(name, config=config[0] if config else None, split=split)


def _split_of_folder(path: str) -> tuple[str, str]:
    """Splits `FOLDER:SPLIT`; the split is "" if the path is an existing folder or has none."""
    folder, _, split = path.rpartition(":")
    return (folder, split) if folder and not os.path.exists(path) else (path, "")


def _open_saved(folder: str, split: str):
    import datasets

    try:
        saved = datasets.load_from_disk(folder)
    except Exception as error:  # Arrow and the library raise many types of errors for damaged files
        raise DataError(f"{folder}: not a readable data set of datasets.save_to_disk: {_reason(error)}") from error
    if isinstance(saved, datasets.Dataset):
        if split:
            raise DataError(f"{folder}:{split}: the folder holds a single data set, without splits; name it without :{split}")
        return saved
    split = split or ("train" if "train" in saved else next(iter(saved)) if len(saved) == 1 else "")
    if split not in saved:
        names = ", ".join(f"{folder}:{name}" for name in saved)
        raise DataError(f"{folder}: no split {f'{split!r}' if split else 'is named'}; name one: {names}")
    return saved[split]


def _reason(error: Exception) -> str:
    return errors.first_line(error)


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


def _read_file(path: str) -> Iterator[tuple[int, Any]]:
    suffix = suffix_of(path)
    if suffix not in READERS:
        raise DataError(f"{path}: unknown file type '{suffix}'; use {KNOWN}")
    last = 0
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DataError(f"{path}: not a regular file; write its content to a file first")
        with _open(path) as file:
            for line, value in READERS[suffix](path, file):
                last = line
                yield line, value
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: cannot be unpacked after row {last}: {_reason(error)}") from error
    except OSError as error:
        problem = (
            f"cannot be unpacked after row {last}" if path.lower().endswith(COMPRESSED) and not error.errno else "cannot be read"
        )
        raise DataError(f"{path}: {problem}: {error.strerror or _reason(error)}") from error


@contextlib.contextmanager
def _open(path: str) -> Iterator[IO[bytes]]:
    """The content of a file, unpacked while it is read."""
    budget = limits.Budget(path)
    if path.lower().endswith(".gz"):
        with gzip.open(path, "rb") as file:
            yield io.BufferedReader(limits.Unpacked(file, budget), 1 << 16)
    elif path.lower().endswith(".zst"):
        import pyarrow

        with pyarrow.input_stream(path, compression="zstd") as stream:
            yield io.BufferedReader(limits.Unpacked(stream, budget), 1 << 16)
    else:
        with open(path, "rb") as file:
            yield file


def _loads(line: int, text: bytes) -> Any:
    try:
        return json.loads(text.decode())
    except UnicodeDecodeError:
        return Rejection(line, "not UTF-8")
    except (ValueError, RecursionError):  # RecursionError: nested too deeply; ValueError: also integers of 5 000 digits
        return Rejection(line, "bad JSON")


def _read_jsonl(path: str, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    for line, text in enumerate(
        limits.lines(file, path), 1
    ):  # bytes: only \n ends a line, and a line that is not UTF-8 does not affect the others
        text = text.removeprefix(BOM) if line == 1 else text
        if text.strip():
            yield line, text


def _read_json(path: str, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    """Reads an array of rows, an object that contains one list of rows, a single row, or JSON Lines in a .json file."""
    content = file.read(limits.MAX_JSON + 1)
    if len(content) > limits.MAX_JSON:
        raise DataError(f"{path}: over {limits.MAX_JSON >> 30} GB, too much to be read as a whole; write it as JSON Lines")
    text = content.removeprefix(BOM).lstrip()
    if not text:
        return
    value = _loads(1, text)
    if isinstance(value, Rejection) and not text.startswith(b"["):  # a damaged array is not JSON Lines, even if some lines parse
        yield from _read_jsonl(path, io.BytesIO(content))
        return
    if isinstance(value, Mapping) and not schemas.KEYS & value.keys():
        lists = [field for field in value.values() if isinstance(field, list)]
        if len(lists) > 1:
            raise DataError(f"{path}: an object with {len(lists)} lists; give an array of rows, or a single list")
        value = lists[0] if lists else value
    yield from enumerate(value if isinstance(value, list) else [value], 1)


def _read_csv(path: str, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    """Reads rows under a header. All values are texts, and null where they are empty; `,`, `;` or a tab separates them."""
    csv.field_size_limit(limits.MAX_ROW)  # the limit is one of the whole process; a long response is no error
    with io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="") as text:
        first = text.readline(limits.MAX_ROW)
        num_blank = 0
        while first and not first.strip():
            first, num_blank = text.readline(limits.MAX_ROW), num_blank + 1
        delimiter = max(DELIMITERS, key=lambda mark: len(next(csv.reader([first], delimiter=mark), [])))
        lines = (line for part in ([first], limits.lines(text, path)) for line in part)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise DataError(f"{path}:1: no header of a CSV file: {error}") from error
        if not "".join(header).isprintable():
            raise DataError(f"{path}:1: the header of the CSV file is not UTF-8 text")
        twice = [name for i, name in enumerate(header) if name in header[:i]]
        if twice:
            raise DataError(f"{path}:1: the column '{twice[0]}' is named twice")
        while True:
            line = num_blank + reader.line_num + 1
            try:
                values = next(reader, None)
            except csv.Error as error:
                yield line, Rejection(line, f"bad CSV ({error})")
                continue
            if values is None:
                return
            if values:
                yield line, _csv_row(line, header, values)


def _csv_row(line: int, header: list[str], values: list[str]) -> Any:
    if len(values) != len(header):
        return Rejection(line, f"{len(values)} values under a header of {len(header)}")
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        return Rejection(line, "not UTF-8")
    return {name: value or None for name, value in zip(header, values)}


def _read_parquet(path: str, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet

    line, budget = 0, limits.Budget(path)
    source: str | IO[bytes] = path
    with contextlib.ExitStack() as stack:
        if path.lower().endswith(COMPRESSED):  # Parquet is read from its end
            source = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(file, source)
        try:
            with pyarrow.parquet.ParquetFile(source) as table:
                shared = "dictionary<" in str(table.schema_arrow)  # a text is stored once, and counts for each row that has it
                for batch in table.iter_batches(batch_size=BATCH):
                    budget.spend(batch.nbytes)
                    for value in batch.to_pylist():
                        line += 1
                        budget.spend(limits.text_size(value) if shared else 0)
                        yield line, value
        except DataError:
            raise
        except Exception as error:  # Arrow raises many types of errors for damaged bytes and for values without a Python type
            raise DataError(f"{path}: not a readable Parquet file after row {line}: {_reason(error)}") from error


READERS = dict(zip(FORMATS, (_read_jsonl, _read_json, _read_csv, _read_parquet), strict=True))

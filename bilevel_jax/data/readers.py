"""Reads files and hub data sets into numbered objects, before any field is looked at."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from bilevel_jax.data import schemas
from bilevel_jax.data.rejections import DataError, Rejection

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+){0,2}")
BOM = b"\xef\xbb\xbf"


def read_objects(path: str) -> Iterator[tuple[int, Any]]:
    """Yields (line, object) for every row of a file or hub data set, in order; the object is a Rejection if it is not JSON.

    Args:
      path: a .jsonl, .json or .parquet file, or a hub data set as in `open_hub`. A file of that name takes precedence. Blank lines
        of JSONL are skipped. Lines are 1-based: lines of a JSONL file, row numbers otherwise.

    Raises:
      DataError: the source cannot be read.
    """
    if os.path.isdir(path):
        raise DataError(f"{path}: a directory; name a {', '.join(SUFFIXES)} file in it")
    suffix = os.path.splitext(path)[1].lower()
    if os.path.exists(path):
        if suffix not in READERS:
            raise DataError(f"{path}: unknown file type '{suffix}'; use {', '.join(SUFFIXES)}")
        try:
            yield from READERS[suffix](path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    elif is_hub(path):
        yield from enumerate(open_hub(path), 1)
    else:
        raise DataError(f"{path}: no such file")


def load_hub(name: str, *, config: str | None = None, split: str = "train", data_dir: str | None = None):
    """Loads a split of a hub data set.

    Raises:
      DataError: the data set cannot be loaded.
    """
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split, data_dir=data_dir)
    except Exception as error:  # the hub client raises many types of errors; all mean that there are no rows
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        message = f"no file and no reachable hub data set '{name}' (split '{split}'): {reason}"
        raise DataError(message) from error


def is_hub(path: str) -> bool:
    """Whether `path` names a hub data set: no file has that name, and it has no file suffix."""
    suffix = os.path.splitext(path)[1].lower()
    return not os.path.exists(path) and suffix not in SUFFIXES and HUB_NAME.fullmatch(path) is not None


def open_hub(path: str):
    """Loads the hub data set `NAME`, `NAME:SPLIT` or `NAME:CONFIG:SPLIT`; the split is `train` by default."""
    name, *parts = path.split(":")
    *config, split = parts or ["train"]
    return load_hub(name, config=config[0] if config else None, split=split)


def _loads(line: int, text: bytes) -> Any:
    try:
        return json.loads(text.decode())
    except UnicodeDecodeError:
        return Rejection(line, "not UTF-8")
    except (ValueError, RecursionError):  # RecursionError: nested too deeply; ValueError: also integers of 5 000 digits
        return Rejection(line, "bad JSON")


def _read_jsonl(path: str) -> Iterator[tuple[int, Any]]:
    with open(path, "rb") as file:  # bytes: only \n ends a line, and a line that is not UTF-8 does not affect the others
        for line, text in enumerate(file, 1):
            text = text.removeprefix(BOM) if line == 1 else text
            if text.strip():
                yield line, _loads(line, text)


def _read_json(path: str) -> Iterator[tuple[int, Any]]:
    """Reads an array of rows, an object that contains one list of rows, a single row, or JSON Lines in a .json file."""
    with open(path, "rb") as file:
        text = file.read().removeprefix(BOM).lstrip()
    if not text:
        return
    value = _loads(1, text)
    if isinstance(value, Rejection) and not text.startswith(b"["):  # a damaged array is not JSON Lines, even if some lines parse
        yield from _read_jsonl(path)
        return
    if isinstance(value, Mapping) and not schemas.KEYS & value.keys():
        lists = [field for field in value.values() if isinstance(field, list)]
        if len(lists) != 1:
            raise DataError(f"{path}: an object with {len(lists)} lists; give an array of rows, or a single list")
        value = lists[0]
    yield from enumerate(value if isinstance(value, list) else [value], 1)


def _read_parquet(path: str) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet

    line = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    line += 1
                    yield line, value
    except Exception as error:  # Arrow raises many types of errors for damaged bytes and for values without a Python type
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: not a readable Parquet file after row {line}: {reason}") from error


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
SUFFIXES = tuple(READERS)

"""Rows and sources that cannot be used, and how messages name them."""

import dataclasses
import os
from collections.abc import Iterable

NUMBERED_BY_LINE = (".jsonl", ".csv")
COMPRESSED = (".gz", ".zst")


class DataError(ValueError):
    """A source that cannot be used; the message is one line for the user."""


class Line(int):
    """The line of a row that knows its file, where a source has several."""

    file: str  # "" for the only file of a source
    source: str  # `source` of rows that name none

    def __new__(cls, number: int, file: str = "", source: str = ""):
        line = super().__new__(cls, number)
        line.file, line.source = file, source
        return line


@dataclasses.dataclass(frozen=True)
class Rejection:
    """A row that cannot be used."""

    line: int
    reason: str
    columns: tuple[str, ...] = dataclasses.field(default=(), compare=False)  # of the row, for messages


def suffix_of(path: str) -> str:
    """The suffix that names the format, in lower case and without `.gz` or `.zst`; "" if there is none."""
    stem, suffix = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if suffix in COMPRESSED else suffix


def location(path: str, line: int) -> str:
    """Names a row in a message: `file.jsonl:7`, or `file.parquet row 7` where rows are not lines."""
    path = getattr(line, "file", "") or path
    return f"{path}:{line}" if suffix_of(path) in NUMBERED_BY_LINE else f"{path} row {line}"


def location_fields(line: int) -> dict:
    """The fields of an output row that name an input row: `line`, and `file` where there are several."""
    file = getattr(line, "file", "")
    return {"line": line} | ({"file": file} if file else {})


def tally(rejections: Iterable[Rejection]) -> dict[str, tuple[int, int]]:
    """Counts rejections by reason: reason -> (count, line of the first one), in order of appearance."""
    counts: dict[str, tuple[int, int]] = {}
    for rejection in rejections:
        count, first = counts.get(rejection.reason, (0, rejection.line))
        counts[rejection.reason] = (count + 1, first)
    return counts

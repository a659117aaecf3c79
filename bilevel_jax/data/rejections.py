"""Rows and sources that cannot be used, and how messages name them."""

import dataclasses
from collections.abc import Iterable


class DataError(ValueError):
    """A source that cannot be used; the message is one line for the user."""


@dataclasses.dataclass(frozen=True)
class Rejection:
    """A row that cannot be used."""

    line: int
    reason: str


def location(path: str, line: int) -> str:
    """Names a row in a message: `file.jsonl:7`, or `file.parquet row 7` where rows are not lines."""
    return f"{path}:{line}" if path.endswith(".jsonl") else f"{path} row {line}"


def tally(rejections: Iterable[Rejection]) -> dict[str, tuple[int, int]]:
    """Counts rejections by reason: reason -> (count, line of the first one), in order of appearance."""
    counts: dict[str, tuple[int, int]] = {}
    for rejection in rejections:
        count, first = counts.get(rejection.reason, (0, rejection.line))
        counts[rejection.reason] = (count + 1, first)
    return counts

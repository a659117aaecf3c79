"""Weights that a run starts from (`selection.init`), matched to its rows by their ids.

With u_i the given weight of row i, the logits are ω_i = log u_i - log mean(u), so that N·σ_i(ω) = u_i / mean(u). The mean is over
the rows that have a weight. Rows without one get the mean, ω_i = 0.
"""

import contextlib
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bilevel_jax.data import readers
from bilevel_jax.data.prepared import sequences
from bilevel_jax.data.rows import DataError, Row
from bilevel_jax.runtime import weight_table

COLUMN = "column:"
LEAST = 1e-12  # of the mean: smaller weights, and 0, count as this, because they need a logit


class Given(NamedTuple):
    """Logits for the rows of a run."""

    logits: np.ndarray  # [N] float32; their weights have mean 1
    num_matched: int  # rows that have a weight

    def summary(self, source: str) -> str:
        """A line for the user."""
        number = len(self.logits)
        rest = "" if self.num_matched == number else f"; the other {number - self.num_matched} get the mean"
        return f"selection.init={source}: weights for {self.num_matched} of {number} rows{rest}"


def read(source: str, rows: Sequence[Row]) -> Given:
    """The logits that `selection.init` gives to training rows.

    Args:
      source: workdir of an earlier run, whose last table counts; a .parquet or .jsonl file with `id` and `weight`, as in `weights/`
        or from `bilevel_jax.export`; or `column:NAME`, a field of the rows with their weights.
      rows: training rows, N.

    Raises:
      DataError: there is no such source, a weight is not a finite number of at least 0, all are 0, or no row has one.
    """
    prefix = f"selection.init={source}"
    if source.startswith(COLUMN):
        name = source.removeprefix(COLUMN)
        given = _weights(((f"line {row.line}", row.id, row.fields.get(name)) for row in rows), prefix)
        missing = f"no row has a field '{name}'"
    else:
        given = _weights(_read_table(pathlib.Path(source), prefix), prefix)
        missing = f"none of its {len(given)} ids belongs to a training row; it is about other data"
    weights = np.array([given.get(row_id, math.nan) for row_id in sequences.ids(rows)])
    matched = ~np.isnan(weights)
    if not matched.any():
        raise DataError(f"{prefix}: {missing}")
    if weights[matched].max() > np.finfo(np.float64).max / len(rows):  # the sum may be infinite, and only ratios count
        weights = weights / weights[matched].max()
    mean = weights[matched].mean()
    if not mean:
        raise DataError(f"{prefix}: all weights are 0")
    logits = np.log(np.maximum(np.where(matched, weights / mean, 1.0), LEAST))
    return Given(logits.astype(np.float32), int(matched.sum()))


def _weights(records: Iterable[tuple[str, str, object]], prefix: str) -> dict[str, float]:
    """id -> weight, of (where, id, weight); None is no weight. The values of a CSV file are texts."""
    weights = {}
    for where, row_id, weight in records:
        if weight is None:
            continue
        if isinstance(weight, str):
            with contextlib.suppress(ValueError):
                weight = float(weight)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise DataError(f"{prefix}: {where}: {weight!r} is not a weight, a finite number of at least 0")
        weights[row_id] = float(weight)
    return weights


def _read_table(path: pathlib.Path, prefix: str) -> list[tuple[str, str, object]]:
    """(where, id, weight) of each row of a table."""
    if path.is_dir():
        table = weight_table.latest(path)
        if table is None:
            raise DataError(f"{prefix}: no weights/epoch_*.parquet in it; name the workdir of a run that selects rows")
        return [(row_id, row_id, weight) for row_id, weight in zip(table["id"].to_pylist(), table["weight"].to_pylist())]
    if path.suffix not in (".parquet", ".jsonl"):
        raise DataError(f"{prefix}: not a workdir, a .parquet or .jsonl file, or {COLUMN}NAME")
    records = []
    for line, record in readers.read_objects(str(path)):
        if not isinstance(record, Mapping) or not isinstance(record.get("id"), str) or "weight" not in record:
            raise DataError(f"{prefix}: line {line}: a row needs 'id' and 'weight'")
        records.append((f"line {line}", record["id"], record["weight"]))
    return records

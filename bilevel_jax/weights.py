"""A selector's verdict on a data set, as a table: one Parquet row for every training row, identified by content."""

import pathlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from bilevel_jax import metrics, workspace
from bilevel_jax.data import rows as data_rows

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "weight": pa.float64(),
        "logit": pa.float32(),
        "rank": pa.int64(),
        "visits": pa.int64(),
        "masked": pa.bool_(),
        "source": pa.string(),
    }
)


def table(rows: Sequence[data_rows.Row], logits: np.ndarray, visits: np.ndarray, masked: np.ndarray) -> pa.Table:
    """Columns `id`, `weight` (N·σ(ω), mean 1), `logit`, `rank` (1 is the heaviest), `visits`, `masked`, `source`."""
    logits = np.asarray(logits, np.float64)
    weights = np.exp(logits - logits.max())
    weights *= len(weights) / weights.sum()
    ranks = np.empty(len(logits), np.int64)
    ranks[metrics.keep_order(logits)] = np.arange(1, len(logits) + 1)
    return pa.table(
        {
            "id": [row.id for row in rows],
            "weight": weights,
            "logit": logits.astype(np.float32),
            "rank": ranks,
            "visits": np.rint(visits).astype(np.int64),
            "masked": np.asarray(masked, bool),
            "source": [row.source for row in rows],
        },
        schema=SCHEMA,
    )


def write(path: pathlib.Path, weights: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = pa.BufferOutputStream()
    pyarrow.parquet.write_table(weights, buffer)
    workspace.write_atomically(path, buffer.getvalue().to_pybytes())


def read(path: pathlib.Path) -> pa.Table:
    """A table that `write` wrote.

    Raises:
      DataError: it is damaged, or another file.
    """
    try:
        return pyarrow.parquet.read_table(path).select(SCHEMA.names).cast(SCHEMA)
    except FileNotFoundError:
        raise
    except Exception as error:  # Arrow has errors of every family for bytes and columns that are not what they should be
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise data_rows.DataError(f"{path}: not a readable table of weights: {reason}") from error


def files(workdir: pathlib.Path) -> dict[int, pathlib.Path]:
    """The tables of a run by epoch, in order."""
    found = ((file.stem.removeprefix("epoch_"), file) for file in (workdir / "weights").glob("epoch_*.parquet"))
    return dict(sorted((int(epoch), file) for epoch, file in found if epoch.isdecimal()))


def latest(workdir: pathlib.Path) -> pa.Table | None:
    """The table of a run's last epoch; None where it wrote none."""
    found = files(workdir)
    return read(found[max(found)]) if found else None

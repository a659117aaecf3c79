"""A selector's verdict on a data set, as a table: one Parquet row for every training row, identified by content."""

import pathlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from bilevel_jax import metrics, workspace
from bilevel_jax.data import rows as data_rows


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
        }
    )


def write(path: pathlib.Path, weights: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = pa.BufferOutputStream()
    pyarrow.parquet.write_table(weights, buffer)
    workspace.write_atomically(path, buffer.getvalue().to_pybytes())


def latest(workdir: pathlib.Path) -> pa.Table | None:
    """The table of a run's last epoch; None where it wrote none."""
    files = (workdir / "weights").glob("epoch_*.parquet")
    newest = max(files, key=lambda file: int(file.stem.removeprefix("epoch_")), default=None)
    return None if newest is None else pyarrow.parquet.read_table(newest)

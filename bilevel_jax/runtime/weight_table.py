"""A selector's verdict on a data set, as a table: one Parquet row for every training row, identified by content.

Where tokens have weights of their own (`selection.unit=token`), a second table has them at the end of the run.
"""

import pathlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from bilevel_jax import files
from bilevel_jax.data import rows as data_rows
from bilevel_jax.runtime import metrics

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
TOKENS = pathlib.Path("weights", "tokens.parquet")  # in a workdir
TOKENS_SCHEMA = pa.schema(
    {"id": pa.string(), "weight": pa.list_(pa.float32()), "start": pa.list_(pa.int32()), "stop": pa.list_(pa.int32())}
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
    files.write_atomically(path, buffer.getvalue().to_pybytes())


def read(path: pathlib.Path, schema: pa.Schema = SCHEMA) -> pa.Table:
    """A table that `write` wrote.

    Raises:
      DataError: it is damaged, or another file.
    """
    try:
        return pyarrow.parquet.read_table(path).select(schema.names).cast(schema)
    except FileNotFoundError:
        raise
    except Exception as error:  # Arrow has errors of every family for bytes and columns that are not what they should be
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise data_rows.DataError(f"{path}: not a readable table of weights: {reason}") from error


def epoch_files(workdir: pathlib.Path) -> dict[int, pathlib.Path]:
    """The tables of a run by epoch, in order."""
    found = ((file.stem.removeprefix("epoch_"), file) for file in (workdir / "weights").glob("epoch_*.parquet"))
    return dict(sorted((int(epoch), file) for epoch, file in found if epoch.isdecimal()))


def latest(workdir: pathlib.Path) -> pa.Table | None:
    """The table of a run's last epoch; None where it wrote none."""
    found = epoch_files(workdir)
    return read(found[max(found)]) if found else None


# --------------------------------------------------------------------------------------------------------------------
# Tokens
# --------------------------------------------------------------------------------------------------------------------


def token_table(rows: Sequence[data_rows.Row], places: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> pa.Table:
    """Columns `id`, `weight` [T], mean 1 in each row, and where the tokens stand, `start` and `stop` [T] in characters of the
    response.

    Args:
      places: from `templates.response_offsets`; tokens that nothing predicts, at the front, have no weight and are left out.
      found: the weights.
    """
    places = [of_row[len(of_row) - len(weight) :] for of_row, weight in zip(places, found)]
    columns = {"id": [row.id for row in rows], "weight": list(found)}
    columns |= {name: [of_row[:, part] for of_row in places] for part, name in enumerate(("start", "stop"))}
    return pa.table(columns, schema=TOKENS_SCHEMA)


def token_auroc(found: pa.Table, rows: Sequence[data_rows.Row], field: str) -> float:
    """AUROC of the tokens in bad parts of responses, by their weights, against all others; NaN where no row has such a part, or
    all is bad. `field` of a row has them, [[start, stop], ...] in characters."""
    bad, weight = [], []
    for row, of_row in zip(rows, found.to_pylist()):
        start, stop, spans = (np.array(values) for values in (of_row["start"], of_row["stop"], row.fields.get(field) or []))
        spans = spans.reshape(-1, 2)
        bad.append(((start[:, None] < spans[:, 1]) & (spans[:, 0] < stop[:, None])).any(axis=1))
        weight.append(of_row["weight"])
    return metrics.auroc(-np.concatenate(weight), np.concatenate(bad))


def of_tokens(workdir: pathlib.Path) -> pa.Table | None:
    """The tokens' table of a run; None where it has none.

    Raises:
      DataError: it is damaged.
    """
    file = workdir / TOKENS
    return read(file, TOKENS_SCHEMA) if file.exists() else None

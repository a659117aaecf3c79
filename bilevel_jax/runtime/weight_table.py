"""Parquet tables of the weights: one line for each training row, identified by its content.

If tokens have weights (`selection.unit=token`), a second table is written at the end of the run.
"""

import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from bilevel_jax import errors, files, ranking
from bilevel_jax.data import matching
from bilevel_jax.data import rows as data_rows
from bilevel_jax.data.prepared import sequences

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "weight": pa.float64(),
        "logit": pa.float32(),
        "rank": pa.int64(),
        "plausible": pa.float32(),
        "useful": pa.float32(),
        "similar": pa.float32(),
        "nearest": pa.int32(),
        "visits": pa.int64(),
        "masked": pa.bool_(),
        "source": pa.string(),
    }
)
MASKS = pa.schema([SCHEMA.field(name) for name in ("id", "masked")])
MEASURES = {  # null where they are not known, and in tables of earlier versions
    "plausible": "how likely the model finds the response, above all its least likely tokens; of a pair, exp(-loss); 0 to 1",
    "useful": "how much the row helps the trusted rows; below 0 it harms them",
    "similar": "how much question and answer are like those of the trusted rows; 0 on average",
}
NULLABLE = (*MEASURES, "nearest")
BLOCK = 1 << 17  # rows that are made and written at once
TOKENS = pathlib.Path("weights", "tokens.parquet")  # in a workdir
TOKENS_SCHEMA = pa.schema(
    {"id": pa.string(), "weight": pa.list_(pa.float32()), "start": pa.list_(pa.int32()), "stop": pa.list_(pa.int32())}
)


def is_equal(table: pa.Table) -> bool:
    """Whether all rows have one weight, so that their order means nothing."""
    return len(table) > 1 and np.ptp(table["weight"].to_numpy()) == 0


def table(
    rows: Sequence[data_rows.Row],
    logits: np.ndarray,
    visits: np.ndarray,
    masked: np.ndarray,
    surprise: np.ndarray | None = None,
    useful: np.ndarray | None = None,
    similar: np.ndarray | None = None,
    nearest: np.ndarray | None = None,
) -> pa.Table:
    """One line for each row, see `blocks`; `rows` are the training rows."""
    sources = pa.array([row.source for row in rows], pa.string())
    ids = [row.id for row in rows]
    return pa.concat_tables(blocks(ids, sources, logits, visits, masked, surprise, useful, similar, nearest))


def blocks(
    ids: Sequence[str],
    sources: pa.Array,
    logits: np.ndarray,
    visits: np.ndarray,
    masked: np.ndarray,
    surprise: np.ndarray | None = None,
    useful: np.ndarray | None = None,
    similar: np.ndarray | None = None,
    nearest: np.ndarray | None = None,
) -> Iterator[pa.Table]:
    """Yields the table of weights, at most `BLOCK` rows at a time. It has one line for each row.

        weight      N·σ(ω), mean 1
        rank        1 is the largest weight
        plausible   exp(-s), how likely the model finds the response, in (0, 1]: between the geometric mean and the smallest of the
                    probabilities of its tokens. Of a preference pair s is its loss: exp(-s) is σ(β margin) with DPO; with IPO
                    only its order means something
        useful      how much the row helps the trusted rows: minus the mean of h over its visits, see `influence`;
                    in (-1, 1), below 0 it harms them
        similar     how much the row is like the trusted ones, `features.similarity`, mean 0; measured at the end of the run
        nearest     index of the trusted row that it is most like, among those that the run trained on; measured with `similar`

    All of these are about the response of the data. Plausible and useful are null for rows that were only visited with generated
    ones.

    Args:
      ids, sources: of the training rows, N; sources are texts or a dictionary of them.
      logits: ω, [N].
      visits: number of steps that used each row, [N].
      masked: whether the model answers the row's question, [N].
      surprise: s at the last visit, `losses.surprises`, [N], nats; NaN for rows that were never visited.
      useful: [N]; NaN where it is not known; None if costs are losses.
      similar, nearest: [N]; None if they were not measured.
    """
    unknown = np.broadcast_to(np.nan, len(ids))
    surprise, useful, similar = (unknown if x is None else np.asarray(x) for x in (surprise, useful, similar))
    logits, masked = np.asarray(logits, np.float64), np.asarray(masked, bool)
    weights = np.exp(logits - logits.max())
    weights *= len(weights) / weights.sum()
    ranks = np.empty(len(logits), np.int64)
    ranks[ranking.heaviest_first(logits)] = np.arange(1, len(logits) + 1)
    for first in range(0, len(ids), BLOCK):
        part = slice(first, first + BLOCK)
        s, u, like = (values[part].astype(np.float64) for values in (surprise, useful, similar))
        columns = {
            "id": [*ids[part]],
            "weight": weights[part],
            "logit": logits[part].astype(np.float32),
            "rank": ranks[part],
            "plausible": pa.array(np.exp(-s).astype(np.float32), mask=np.isnan(s)),
            "useful": pa.array(u.astype(np.float32), mask=np.isnan(u)),
            "similar": pa.array(like.astype(np.float32), mask=np.isnan(like)),
            "nearest": pa.nulls(len(s), pa.int32()) if nearest is None else pa.array(nearest[part], pa.int32()),
            "visits": np.rint(visits[part]).astype(np.int64),
            "masked": masked[part],
            "source": sources[part].cast(pa.string()),
        }
        yield pa.table(columns, schema=SCHEMA)


def write(path: pathlib.Path, weights: pa.Table) -> None:
    """Writes a table to a Parquet file."""
    write_blocks(path, [weights], weights.schema)


def write_blocks(path: pathlib.Path, tables: Iterable[pa.Table], schema: pa.Schema = SCHEMA) -> None:
    """Writes the parts of a table to one Parquet file, as they come."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as file, pyarrow.parquet.ParquetWriter(file, schema) as writer:
        for part in tables:
            writer.write_table(part)


def read(path: pathlib.Path, schema: pa.Schema = SCHEMA) -> pa.Table:
    """Reads a table that `write` wrote, or some of its columns: those of the schema.

    Raises:
      DataError: the file is damaged or is no such table.
      FileNotFoundError: there is no file.
    """
    nullable = NULLABLE if schema is SCHEMA else ()  # tables of earlier versions lack them
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:  # part by part, which takes a third of the memory
            names = [name for name in schema.names if name not in nullable or name in file.schema_arrow.names]
            parts = [file.read_row_group(i, names, use_threads=False) for i in range(file.num_row_groups)]
            stored = pa.concat_tables(parts or [file.schema_arrow.empty_table()])
        for name in nullable:
            if name not in names:
                stored = stored.append_column(name, pa.nulls(len(stored), schema.field(name).type))
        weights = stored.select(schema.names).cast(schema)
    except FileNotFoundError:
        raise
    except Exception as error:  # Arrow raises errors of many types for damaged files and wrong columns
        reason = errors.first_line(error)
        raise data_rows.DataError(f"{path}: not a readable table of weights: {reason}") from error
    _check_values(path, weights)
    pa.default_memory_pool().release_unused()  # more than half of what reading a large table took
    return weights


def _check_values(path: pathlib.Path, weights: pa.Table) -> None:
    """Refuses a table with a null, except in `NULLABLE`, or with a number that is not finite or, for a weight, below 0.

    Raises:
      DataError: names the row and the column.
    """
    for name in weights.column_names:
        column = weights[name].combine_chunks()
        wrong = np.zeros(len(column), bool) if name in NULLABLE else column.is_null().to_numpy(zero_copy_only=False)
        if pa.types.is_floating(column.type):
            values = column.fill_null(0).to_numpy()
            wrong |= ~np.isfinite(values) | (values < 0 if name == "weight" else False)
        if wrong.any():
            i = int(wrong.argmax())
            what = f"{path}: row {i + 1} (id {weights['id'][i].as_py()}) has {name}={column[i].as_py()}"
            raise data_rows.DataError(f"{what}, which is not valid; restore the file, or run again")
    if "rank" in weights.column_names and not np.array_equal(np.sort(weights["rank"]), np.arange(1, len(weights) + 1)):
        raise data_rows.DataError(f"{path}: the ranks are not 1 to {len(weights)}; restore the file, or run again")
    if not len(weights):
        raise data_rows.DataError(f"{path}: the table of weights has no rows; restore the file, or run again")
    ids = matching.as_bytes(weights["id"])
    ids.sort()
    if np.any(ids[1:] == ids[:-1]):
        raise data_rows.DataError(f"{path}: an id occurs twice; restore the file, or run again")


def known_measures(weights: pa.Table) -> list[str]:
    """The `MEASURES` that have a value in the table."""
    return [name for name in MEASURES if weights[name].null_count < len(weights)]


def epoch_files(workdir: pathlib.Path) -> dict[int, pathlib.Path]:
    """The tables of a run by epoch, in order."""
    names = ((path.stem.removeprefix("epoch_"), path) for path in (workdir / "weights").glob("epoch_*.parquet"))
    return dict(sorted((int(epoch), path) for epoch, path in names if epoch.isascii() and epoch.isdecimal()))


def latest(workdir: pathlib.Path) -> pa.Table | None:
    """The table of a run's last epoch; None if there is none."""
    paths = epoch_files(workdir)
    return read(paths[max(paths)]) if paths else None


# --------------------------------------------------------------------------------------------------------------------
# Tokens
# --------------------------------------------------------------------------------------------------------------------


def token_table(rows: Sequence[data_rows.Row], offsets: Sequence[np.ndarray], weights: Sequence[np.ndarray]) -> pa.Table:
    """Columns `id`, `weight` [T] (mean 1 over the learned tokens of a row), `start` and `stop` [T] (characters of the response).

    Of a conversation the table has the last answer.

    Args:
      rows: training rows.
      offsets: [R, 2] for each row, from `templates.response_offsets`. Leading tokens without a prediction have no weight, and are
        left out.
      weights: of all learned tokens of each row, those of the response last.
    """
    numbers = [min(len(offsets_Rx2), len(weight)) for offsets_Rx2, weight in zip(offsets, weights)]
    offsets = [offsets_Rx2[len(offsets_Rx2) - T :] for offsets_Rx2, T in zip(offsets, numbers)]
    columns = {"id": [*sequences.ids(rows)], "weight": [weight[len(weight) - T :] for weight, T in zip(weights, numbers)]}
    columns |= {name: [offsets_Tx2[:, i] for offsets_Tx2 in offsets] for i, name in enumerate(("start", "stop"))}
    return pa.table(columns, schema=TOKENS_SCHEMA)


def token_auroc(tokens: pa.Table, rows: Sequence[data_rows.Row], field: str) -> float:
    """AUROC of the weights of tokens for bad parts of responses; NaN if no token or every token is bad.

    Args:
      tokens: a `token_table`.
      rows: its rows.
      field: of a row; lists its bad parts as [[start, stop], ...] in characters of the response.
    """
    bad, weight = [], []
    for row, columns in zip(rows, tokens.to_pylist()):
        start, stop = np.array(columns["start"]), np.array(columns["stop"])
        spans = np.array(data_rows.spans(row, field)).reshape(-1, 2)
        bad.append(((start[:, None] < spans[:, 1]) & (spans[:, 0] < stop[:, None])).any(axis=1))
        weight.append(columns["weight"])
    return ranking.auroc(-np.concatenate(weight), np.concatenate(bad))


def read_tokens(workdir: pathlib.Path) -> pa.Table | None:
    """The token table of a run; None if there is none.

    Raises:
      DataError: it is damaged.
    """
    path = workdir / TOKENS
    if not path.exists():
        return None
    tokens = read(path, TOKENS_SCHEMA)
    sizes = {name: [len(value) for value in tokens[name].to_pylist()] for name in ("weight", "start", "stop")}
    if not sizes["weight"] == sizes["start"] == sizes["stop"]:
        raise data_rows.DataError(f"{path}: a row has other numbers of weights and of tokens; restore the file, or run again")
    return tokens

"""Reads the files in a workdir, of a finished or unfinished run, and computes the numbers of the report."""

import collections
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import ml_collections
import numpy as np
import pyarrow as pa

from bilevel_jax import files, selector
from bilevel_jax.data import levels, shuffle
from bilevel_jax.data import rows as data_rows
from bilevel_jax.runtime import metrics, stored, weight_table
from bilevel_jax.runtime.workdir import read_config

NUM_MISSING = 10  # ids shown of rows that are no longer in the data

# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """The content of a workdir."""

    name: str
    config: ml_collections.ConfigDict
    summary: dict[str, float]  # empty before the end of the run
    events: list[dict]  # of metrics.jsonl
    tables: dict[int, dict[str, np.ndarray]]  # epoch -> columns of its weight table
    responses: list[dict]  # of responses.jsonl, in the order of steps
    rows: dict[str, data_rows.Row]  # by id; incomplete where the data changed since the run
    notice: str  # why rows are missing, or ""
    tokens: pa.Table | None = None  # weights of tokens, or None


def read(workdir: pathlib.Path, rows: Iterable[data_rows.Row] | None = None) -> Run:
    """Reads a workdir.

    Args:
      rows: the rows of the lower level. None reads them again and matches them by id.

    Raises:
      FileNotFoundError: the directory holds no run.
    """
    config = read_config(workdir)
    tables = {epoch: _columns(weight_table.read(file)) for epoch, file in weight_table.epoch_files(workdir).items()}
    _check_same_rows(workdir, tables)
    by_id, notice = {}, ""
    if tables:
        try:
            ids = dict.fromkeys(tables[max(tables)]["id"])  # in their order
            by_id = {row.id: row for row in (levels.reopen(config) if rows is None else rows) if row.id in ids}
            notice = _missing_rows([row_id for row_id in ids if row_id not in by_id], len(ids), config.data.lower)
        except (ValueError, OSError) as error:
            notice = f"The rows cannot be read, so their ids are shown instead of their texts ({error})."
    return Run(
        name=workdir.resolve().name,
        config=config,
        summary=stored.read_summary(workdir) if (workdir / "summary.json").exists() else {},
        events=events(workdir),
        tables=tables,
        responses=_read_lines(workdir / "responses.jsonl", step=int, id=str, text=str),
        rows=by_id,
        notice=notice,
        tokens=weight_table.read_tokens(workdir),
    )


def _check_same_rows(workdir: pathlib.Path, tables: Mapping[int, Mapping[str, np.ndarray]]) -> None:
    """Refuses tables of different rows: those of a run have the same ones in each epoch, in the same order."""
    for epoch, table in tables.items():
        if not np.array_equal(table["id"], tables[min(tables)]["id"]):
            raise data_rows.DataError(
                f"{workdir}/weights: the tables of epochs {min(tables)} and {epoch} have other rows; remove those of another run"
            )


def _missing_rows(missing: Sequence[str], number: int, source: str) -> str:
    """Which rows of the run are not in its data any more, and what that means for the report; "" for none."""
    if not missing:
        return ""
    shown = ", ".join(missing[:NUM_MISSING]) + (", …" if len(missing) > NUM_MISSING else "")
    are = "row is" if len(missing) == 1 else "rows are"
    return (
        f"{len(missing)} of {number} {are} no longer in {source}: {shown}. Their ids are shown instead of their texts. Generated "
        "responses to them are not shown, and numbers that need labels are those of the other rows."
    )


def _columns(table: pa.Table) -> dict[str, np.ndarray]:
    return {name: table[name].to_numpy() for name in table.column_names}


def events(workdir: pathlib.Path) -> list[dict]:
    """The events that a run logged."""
    logged = _read_lines(workdir / "metrics.jsonl", step=int, epoch=(int, float))
    return [event for event in logged if math.isfinite(event["epoch"])]


def _read_lines(file: pathlib.Path, **types) -> list[dict]:
    """The objects in a JSONL file whose fields have these types. Damaged and unfinished lines are skipped."""
    objects = []
    files.check_regular(file)
    for line in file.read_bytes().split(b"\n") if file.exists() else ():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in types.items()):
            objects.append(value)
    return objects


def series(events: Sequence[dict], key: str) -> tuple[list[float], list[float]]:
    """Epochs and values of one metric, where it is a finite number."""
    with_key = [event for event in events if isinstance(event.get(key), (int, float)) and math.isfinite(event[key])]
    return [event["epoch"] for event in with_key], [event[key] for event in with_key]


# --------------------------------------------------------------------------------------------------------------------
# Numbers
# --------------------------------------------------------------------------------------------------------------------


def has_ranking(run: Run) -> bool:
    """Whether the weights differ. A frozen selector leaves all weights equal, and their order means nothing."""
    return any(np.ptp(table["weight"]) > 0 for table in run.tables.values())


def labels(run: Run, table: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Which rows of a table are marked bad in the data; None if no row has the label."""
    field = run.config.data.label
    values = [data_rows.mark(run.rows[row_id], field) if row_id in run.rows else None for row_id in table["id"]]
    return np.array([bool(value) for value in values]) if any(value is not None for value in values) else None


def in_data(run: Run, table: Mapping[str, np.ndarray]) -> np.ndarray:
    """Which rows of a table are in the data, [n] bool."""
    return np.array([row_id in run.rows for row_id in table["id"]], bool)


def epoch_metrics(run: Run, epoch: int) -> dict[str, float]:
    """ESS/N, range and masked share of an epoch's weights. With labels also AUROC and the two shares of bad rows.

    `bad_kept` is the share of the bad rows that are kept; `bad_among_kept` is the share of the kept rows that are bad.
    """
    table = run.tables[epoch]
    weight, bad = table["weight"], labels(run, table)
    values = {
        "ess": selector.effective_sample_size(weight / weight.sum()),
        "low": weight.min(),
        "median": np.median(weight),
        "high": weight.max(),
        "masked": table["masked"].mean() if "masked" in table else 0.0,
    }
    known = in_data(run, table)  # a row that is missing is not a good one
    if bad is not None and bad[known].any() and not bad[known].all():
        scores, bad = -table["rank"][known], bad[known]
        values["auroc"] = metrics.auroc(-weight[known], bad)
        values["bad_kept"] = metrics.bad_kept(scores, bad, run.config.eval.keep)
        values["bad_among_kept"] = metrics.bad_among_kept(scores, bad, run.config.eval.keep)
    return {name: float(value) for name, value in values.items()}


def source_shares(run: Run) -> list[tuple[str, int, np.ndarray]]:
    """(source, number of rows, shares [1 + epochs]) of each source, the largest change first.

    The first share is that of the rows, the others are shares of the total weight after each epoch.
    """
    tables = list(run.tables.values())
    names, source_index, count = np.unique(tables[0]["source"], return_inverse=True, return_counts=True)
    shares = [count / count.sum()]
    shares += [np.bincount(source_index, table["weight"], len(names)) / table["weight"].sum() for table in tables]
    sources = [(str(name), int(number), share) for name, number, share in zip(names, count, np.stack(shares, 1))]
    return sorted(sources, key=lambda item: -abs(item[2][-1] - item[2][0]))


class Repeated(NamedTuple):
    """Rows of a level that occur more than once."""

    level: str
    copies: int  # beyond the first row of each cluster
    clusters: list[tuple[int, int]]  # (size, number of clusters), the largest first
    dropped: bool
    overlap: int  # rows that are also on the upper level
    held_out: int  # training rows left out as copies of held-out ones


def repeated_rows(run: Run) -> list[Repeated]:
    """What the summary says about duplicates and overlap, by level; empty without any."""
    levels_with_some = []
    for level, name in (("upper", "trusted rows"), ("lower", "mixture")):
        values = {
            key.removeprefix(f"data/{level}_"): value for key, value in run.summary.items() if key.startswith(f"data/{level}_")
        }
        if values:
            sizes = values.get("duplicate_clusters", {})
            clusters = sorted(((int(size), int(count)) for size, count in sizes.items()), reverse=True)
            counts = (int(values.get(key, 0)) for key in ("overlap", "held_out_copies"))
            dropped = run.config.data.get("deduplicate", "off") != "off"
            levels_with_some.append(Repeated(name, int(values.get("duplicates", 0)), clusters, dropped, *counts))
    return levels_with_some


def responses_in_use(run: Run, epoch: int) -> dict[str, list[str]]:
    """The generated responses that replaced those of the data at the end of an epoch, by row id."""
    if not run.responses:
        return {}
    steps = epoch * shuffle.steps_per_epoch(len(run.tables[epoch]["id"]), run.config.batch.size)
    last_step = min(steps, int(run.summary.get("steps", steps))) - 1  # `eval.patience` may end a run within an epoch
    every = run.config.online.refresh_every
    texts = collections.defaultdict(list)
    for response in run.responses:
        if response["step"] == last_step // every * every:
            texts[response["id"]].append(response["text"])
    return texts


def response_lengths(run: Run, share: float = 0.1) -> dict[str, list[float]]:
    """Mean words of the responses in use, by epoch: of the `share` heaviest rows, of all rows, of the `share` lightest rows."""
    means = {"heaviest tenth": [], "all rows": [], "lightest tenth": []}
    of_data = {row_id: float(len(row.response.split())) for row_id, row in run.rows.items()}
    for epoch, table in run.tables.items():
        in_use = responses_in_use(run, epoch)
        generated = {row_id: float(np.mean([len(text.split()) for text in texts])) for row_id, texts in in_use.items()}
        length = np.array([generated.get(row_id, of_data.get(row_id, np.nan)) for row_id in table["id"]])
        length = length[np.argsort(table["rank"])]
        number = max(1, round(share * len(length)))
        for name, part in zip(means, (length[:number], length, length[-number:])):
            values = part[~np.isnan(part)]
            means[name].append(float(values.mean()) if len(values) else float("nan"))
    return means


def words_in_common(a: str, b: str) -> float:
    """Share of the words that two texts have in common, as multisets: 2 |A ∩ B| / (|A| + |B|), in [0, 1]."""
    first, second = (collections.Counter(text.lower().split()) for text in (a, b))
    total = first.total() + second.total()
    return 2 * (first & second).total() / total if total else 1.0


def time_split(run: Run) -> dict[str, float]:
    """Seconds by activity, the longest first. The report's own time is left out, so that a report can be reproduced exactly."""
    seconds = {key.removeprefix("time/"): value for key, value in run.summary.items() if key.startswith("time/")}
    seconds.pop("report", None)
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))

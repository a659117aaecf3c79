"""What a run left in its workdir, finished or not, and what a report measures of it."""

import collections
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import ml_collections
import numpy as np
import pyarrow as pa

from bilevel_jax import files
from bilevel_jax.data import levels, shuffle
from bilevel_jax.data import rows as data_rows
from bilevel_jax.runtime import metrics, weight_table
from bilevel_jax.runtime.workdir import read_config

# --------------------------------------------------------------------------------------------------------------------
# What a run left
# --------------------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """What there is of a run so far."""

    name: str
    config: ml_collections.ConfigDict
    summary: dict[str, float]  # empty before the end
    events: list[dict]  # of metrics.jsonl
    tables: dict[int, dict[str, np.ndarray]]  # epoch -> columns of its weights
    answers: list[dict]  # of responses.jsonl
    rows: dict[str, data_rows.Row]  # by id, as far as they are at hand
    notice: str  # why rows are missing, or ""
    tokens: pa.Table | None = None  # weights of tokens, where they have any


def read(workdir: pathlib.Path, rows: Iterable[data_rows.Row] | None = None) -> Run:
    """Reads a workdir.

    Args:
      rows: the lower level's, where they are at hand; otherwise they are read again, and matched by id.

    Raises:
      FileNotFoundError: if there is no run.
    """
    config = read_config(workdir)
    summary = workdir / "summary.json"
    tables = {epoch: _columns(weight_table.read(file)) for epoch, file in weight_table.epoch_files(workdir).items()}
    found, notice = {}, ""
    if tables:
        try:
            ids = set(tables[max(tables)]["id"])
            found = {row.id: row for row in (levels.reopen(config) if rows is None else rows) if row.id in ids}
            if len(found) < len(ids):
                notice = f"{len(ids) - len(found)} rows are no longer in {config.data.lower}; only their ids are shown."
        except (ValueError, OSError) as error:
            notice = f"The rows could not be read again, so only their ids are shown ({error})."
    return Run(
        name=workdir.resolve().name,
        config=config,
        summary=files.read_json(summary) if summary.exists() else {},
        events=events(workdir),
        tables=tables,
        answers=_lines(workdir / "responses.jsonl", step=int, id=str, text=str),
        rows=found,
        notice=notice,
        tokens=weight_table.of_tokens(workdir),
    )


def _columns(table: pa.Table) -> dict[str, np.ndarray]:
    return {name: table[name].to_numpy() for name in table.column_names}


def events(workdir: pathlib.Path) -> list[dict]:
    """What a run logged."""
    return _lines(workdir / "metrics.jsonl", step=int, epoch=(int, float))


def _lines(file: pathlib.Path, **kinds) -> list[dict]:
    """The objects of a file of lines with fields of these kinds, but for what is damaged or still being written."""
    found = []
    for line in file.read_bytes().split(b"\n") if file.exists() else ():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in kinds.items()):
            found.append(value)
    return found


def series(events: Sequence[dict], key: str) -> tuple[list[float], list[float]]:
    """Epochs and values of one measure."""
    held = [event for event in events if key in event]
    return [event["epoch"] for event in held], [event[key] for event in held]


# --------------------------------------------------------------------------------------------------------------------
# What is measured of it
# --------------------------------------------------------------------------------------------------------------------


def ranked(run: Run) -> bool:
    """Whether the weights say anything: frozen ones are all equal, and their order means nothing."""
    return any(np.ptp(table["weight"]) > 0 for table in run.tables.values())


def marks(run: Run, table: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Which rows of a table the data mark as bad; None where they do not say."""
    field = run.config.data.label
    found = [run.rows[row_id].fields.get(field) if row_id in run.rows else None for row_id in table["id"]]
    return np.array([bool(mark) for mark in found]) if any(mark is not None for mark in found) else None


def epoch_measures(run: Run, epoch: int) -> dict[str, float]:
    """ESS/N, spread, masked share and, where the data carry labels, AUROC and the share of bad rows that is kept."""
    table = run.tables[epoch]
    w, bad = table["weight"], marks(run, table)
    found = {"ess": w.sum() ** 2 / (len(w) * (w**2).sum()), "low": w.min(), "median": np.median(w), "high": w.max()}
    found["masked"] = table["masked"].mean() if "masked" in table else 0.0
    if bad is not None and bad.any() and not bad.all():
        found["auroc"] = metrics.auroc(-w, bad)
        found["bad_kept"] = metrics.bad_kept(-table["rank"], bad, run.config.eval.keep)
    return {name: float(value) for name, value in found.items()}


def source_shares(run: Run) -> list[tuple[str, int, np.ndarray]]:
    """(source, rows, share of all weight [1 + epochs], first that of rows), those that moved most first."""
    tables = list(run.tables.values())
    names, place, count = np.unique(tables[0]["source"], return_inverse=True, return_counts=True)
    shares = [count / count.sum()]
    shares += [np.bincount(place, table["weight"], len(names)) / table["weight"].sum() for table in tables]
    moved = np.stack(shares, 1)
    found = [(str(name), int(rows), share) for name, rows, share in zip(names, count, moved)]
    return sorted(found, key=lambda item: -abs(item[2][-1] - item[2][0]))


def in_use(run: Run, epoch: int) -> dict[str, list[str]]:
    """The model's own answers that stood for those of the data when an epoch ended, by row."""
    if not run.answers:
        return {}
    last_step = epoch * shuffle.steps_per_epoch(len(run.tables[epoch]["id"]), run.config.batch.size) - 1
    every = run.config.online.refresh_every
    found = collections.defaultdict(list)
    for answer in run.answers:
        if answer["step"] == last_step // every * every:
            found[answer["id"]].append(answer["text"])
    return found


def answer_lengths(run: Run, share: float = 0.1) -> dict[str, list[float]]:
    """Mean number of words of the answers in use, by epoch: of the `share` heaviest rows, of all, of the `share` lightest."""
    found = {"heaviest tenth": [], "all rows": [], "lightest tenth": []}
    of_data = {row_id: float(len(row.response.split())) for row_id, row in run.rows.items()}
    for epoch, table in run.tables.items():
        own = {row_id: float(np.mean([len(text.split()) for text in texts])) for row_id, texts in in_use(run, epoch).items()}
        length = np.array([own.get(row_id, of_data.get(row_id, np.nan)) for row_id in table["id"]])
        length = length[np.argsort(table["rank"])]
        number = max(1, round(share * len(length)))
        for name, part in zip(found, (length[:number], length, length[-number:])):
            known = part[~np.isnan(part)]
            found[name].append(float(known.mean()) if len(known) else float("nan"))
    return found


def words_in_common(a: str, b: str) -> float:
    """Share of words that two texts have in common, as often as both have them: 2 |A ∩ B| / (|A| + |B|), in [0, 1]."""
    first, second = (collections.Counter(text.lower().split()) for text in (a, b))
    total = first.total() + second.total()
    return 2 * (first & second).total() / total if total else 1.0


def time_split(run: Run) -> dict[str, float]:
    """Seconds by activity, the longest first; without those of the report, which is to be the same when it is made again."""
    seconds = {key.removeprefix("time/"): value for key, value in run.summary.items() if key.startswith("time/")}
    seconds.pop("report", None)
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))

"""Reads the files in a workdir, of a finished or unfinished run, and computes the numbers of the report."""

import collections
import json
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np
import pyarrow as pa

from bilevel_jax import files, progress, ranking, selector
from bilevel_jax.data import matching, shuffle, streaming
from bilevel_jax.data import rows as data_rows
from bilevel_jax.report import shown_rows
from bilevel_jax.runtime import stored, weight_table
from bilevel_jax.runtime.workdir import read_config

NUM_MISSING = 10  # ids shown of rows that are no longer in the data
MISSING = -2

# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


class RunData(NamedTuple):
    """The content of a workdir."""

    name: str
    config: ml_collections.ConfigDict
    summary: dict[str, Any]  # empty before the end of the run
    events: list[dict]  # of metrics.jsonl
    tables: dict[int, dict[str, np.ndarray]]  # epoch -> columns of its weight table
    responses: list[dict]  # of responses.jsonl, in the order of steps
    rows: dict[str, data_rows.Row]  # by id, those that may be shown; incomplete where the data changed since the run
    labels: np.ndarray  # [N] int8, whether the data mark each row of a table as bad; `rows.UNLABELLED`, or MISSING from the data
    words: np.ndarray  # [N] words of the response of the data; NaN where the row is missing
    notice: str  # why rows are missing, or ""
    tokens: pa.Table | None = None  # weights of tokens, or None


def read(workdir: pathlib.Path, rows: Iterable[data_rows.Row] | None = None) -> RunData:
    """Reads a workdir.

    Args:
      rows: the rows of the lower level. None reads them again and matches them by id.

    Raises:
      FileNotFoundError: the directory holds no run.
    """
    config = read_config(workdir)
    tables, ids = _tables(workdir)
    responses = _read_lines(workdir / "responses.jsonl", step=int, id=str, text=str)
    tokens = weight_table.read_tokens(workdir)
    by_id, labels, words, notice = {}, np.full(len(ids), MISSING, np.int8), np.full(len(ids), np.nan), ""
    if tables:
        needed = shown_rows.rows(tables, {one["id"] for one in responses}, tokens)
        try:
            candidates = streaming.reopen(config) if rows is None else rows
            for i, row in matching.match(progress.bar(candidates, desc="reading rows", unit="row"), ids, strict=False):
                labels[i] = data_rows.mark_code(row, config.data.label)
                words[i] = len(row.response.split())
                if needed[i]:
                    by_id[row.id] = row
            missing = np.flatnonzero(labels == MISSING)
            named = [ids[int(i)].as_py() for i in missing[:NUM_MISSING]]
            notice = _missing_rows(named, len(missing), len(ids), config.data.lower)
        except (ValueError, OSError) as error:
            by_id, labels[:], words[:] = {}, MISSING, np.nan
            notice = f"The rows cannot be read, so their ids are shown instead of their texts ({error})."
    return RunData(
        name=workdir.resolve().name,
        config=config,
        summary=stored.read_summary(workdir) if (workdir / "summary.json").exists() else {},
        events=events(workdir),
        tables=tables,
        responses=responses,
        rows=by_id,
        labels=labels,
        words=words,
        notice=notice,
        tokens=tokens,
    )


def _tables(workdir: pathlib.Path) -> tuple[dict[int, dict[str, np.ndarray]], pa.ChunkedArray]:
    """The columns of the tables by epoch, which share their texts, and the ids of their rows.

    Raises:
      DataError: the tables have different rows. Those of a run have the same ones in each epoch, in the same order.
    """
    tables: dict[int, dict[str, np.ndarray]] = {}
    ids, texts = pa.chunked_array([], pa.string()), {}
    for epoch, file in weight_table.epoch_files(workdir).items():
        table = weight_table.read(file)
        if not tables:
            ids, texts = table["id"], {name: _texts(table[name]) for name in ("id", "source")}
        elif not table["id"].equals(ids):
            raise data_rows.DataError(
                f"{workdir}/weights: the tables of epochs {min(tables)} and {epoch} have other rows; remove those of another run"
            )
        tables[epoch] = {name: texts[name] if name in texts else table[name].to_numpy() for name in table.column_names}
    return tables, ids


def _texts(column: pa.ChunkedArray) -> np.ndarray:
    """A column of texts as objects, equal ones of which are the same."""
    coded = column.combine_chunks().dictionary_encode()
    return np.array(coded.dictionary.to_pylist(), object)[coded.indices.to_numpy()]


def _missing_rows(examples: Sequence[str], num_missing: int, number: int, source: str) -> str:
    """Which rows of the run are not in its data any more, and what that means for the report; "" for none."""
    if not num_missing:
        return ""
    named = ", ".join(examples) + (", …" if num_missing > len(examples) else "")
    are = "row is" if num_missing == 1 else "rows are"
    return (
        f"{num_missing} of {number} {are} no longer in {source}: {named}. Their ids are shown instead of their texts. Generated "
        "responses to them are not shown, and numbers that need labels are those of the other rows."
    )


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


def loss_key(run: RunData, level: str) -> str:
    """The held-out loss of a level that compares with what is trained on: of pairs, that of the pair."""
    pair = f"{level}_pair_loss"
    return pair if series(run.events, f"eval/{pair}")[0] else f"{level}_loss"


def unit(key: str) -> str:
    """What a loss of `loss_key` is measured in."""
    return "loss of a pair" if key.endswith("pair_loss") else "nats per token"


def has_ranking(run: RunData) -> bool:
    """Whether the weights differ. A frozen selector leaves all weights equal, and their order means nothing."""
    return any(np.ptp(table["weight"]) > 0 for table in run.tables.values())


def labels(run: RunData) -> np.ndarray | None:
    """Which rows of the tables are marked bad in the data, [N] bool; None if no row has the label."""
    return run.labels == 1 if (run.labels >= 0).any() else None


def in_data(run: RunData) -> np.ndarray:
    """Which rows of the tables are in the data, [N] bool."""
    return run.labels != MISSING


def epoch_metrics(run: RunData, epoch: int) -> dict[str, float]:
    """ESS/N, range and masked share of an epoch's weights. With labels also AUROC and the two shares of bad rows.

    `bad_kept` is the share of the bad rows that are kept; `bad_among_kept` is the share of the kept rows that are bad.
    """
    table = run.tables[epoch]
    weight, bad = table["weight"], labels(run)
    values = {
        "ess": selector.effective_sample_size(weight / weight.sum()),
        "low": weight.min(),
        "median": np.median(weight),
        "high": weight.max(),
        "masked": table["masked"].mean() if "masked" in table else 0.0,
    }
    known = in_data(run)  # a row that is missing is not a good one
    if bad is not None and bad[known].any() and not bad[known].all():
        scores, bad = -table["rank"][known], bad[known]
        values["auroc"] = ranking.auroc(-weight[known], bad)
        values["bad_kept"] = ranking.bad_kept(scores, bad, run.config.eval.keep)
        if not np.isnan(share := ranking.bad_among_kept(scores, bad, run.config.eval.keep)):  # of few rows none may be kept
            values["bad_among_kept"] = share
    return {name: float(value) for name, value in values.items()}


def source_shares(run: RunData) -> list[tuple[str, int, np.ndarray]]:
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


def repeated_rows(run: RunData) -> list[Repeated]:
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
            dropped = run.config.data.deduplicate != "off"
            levels_with_some.append(Repeated(name, int(values.get("duplicates", 0)), clusters, dropped, *counts))
    return levels_with_some


def responses_in_use(run: RunData, epoch: int) -> dict[str, list[str]]:
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


def response_lengths(run: RunData, share: float = 0.1) -> dict[str, list[float]]:
    """Mean words of the responses in use, by epoch: of the `share` heaviest rows, of all rows, of the `share` lightest rows."""
    means: dict[str, list[float]] = {"heaviest tenth": [], "all rows": [], "lightest tenth": []}
    answered = {response["id"] for response in run.responses}
    ids = run.tables[min(run.tables)]["id"]
    index_of = {row_id: i for i, row_id in enumerate(ids) if row_id in answered}
    for epoch, table in run.tables.items():
        in_use = responses_in_use(run, epoch)
        length = run.words.copy()
        for row_id, texts in in_use.items():
            if row_id in index_of:
                length[index_of[row_id]] = np.mean([len(text.split()) for text in texts])
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


def time_split(run: RunData) -> dict[str, float]:
    """Seconds by activity, the longest first. The report's own time is left out, so that a report can be reproduced exactly."""
    seconds = {key.removeprefix("time/"): value for key, value in run.summary.items() if key.startswith("time/")}
    seconds.pop("report", None)
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))

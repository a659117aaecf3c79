"""Prepares the rows of a source: reads it in chunks, makes a shard of each in several processes, and writes an index."""

import collections
import itertools
import json
import os
import pathlib
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute

from bilevel_jax import files, progress
from bilevel_jax.data import limits, parts, readers, rows, sources
from bilevel_jax.data.columns import MAX_SEEN, Columns
from bilevel_jax.data.prepared import shards, stored, workers
from bilevel_jax.data.rejections import Line, Rejection, suffix_of
from bilevel_jax.data.rows import Report
from bilevel_jax.text import say

CHUNK_ROWS, CHUNK_BYTES = 4096, (1 << 20, 32 << 20)  # of a chunk, at most: objects, and bytes in small and in large sources
NUM_CHUNKS = 16  # of a source, so that all processes end at about the same time, unless its chunks would be too small
SMALL_COLUMNS = ("content", "unpaired", "line", "file", "marked", "turns")  # of shards, which the index has too


class Source(NamedTuple):
    """A source of rows, and how it is prepared."""

    name: str
    parts: list[parts.Part]
    job: shards.Job
    num_rows: int  # size of a random subset; 0: all rows
    seed: int


def num_processes() -> int:
    """The processes that prepare rows: one for each processor that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare(folder: pathlib.Path, source: Source, tokenizer, known: Mapping[str, stored.Shard]) -> dict[str, Any]:
    """Writes the shards that the folder does not have yet, and the index.

    Args:
      folder: of the entry.
      source: what to prepare.
      tokenizer: of the model.
      known: shards of an earlier preparation that was finished, as they were written.

    Returns:
      What the manifest has: shards, index, and what a report says.

    Raises:
      DataError: the source cannot be read, or has no usable row.
      ValueError, LimitError: as `templates.encode`.
      Unstorable: a row cannot be stored.
      OSError: a file cannot be written.
    """
    say(f"{source.name}: preparing its rows in {folder}", flush=True)
    processes = num_processes()
    try:
        return _prepare(folder, source, tokenizer, processes, known)
    except workers.OtherTokenizer:  # one that was changed after it was loaded
        return _prepare(folder, source, tokenizer, 0, known)


def _prepare(folder: pathlib.Path, source: Source, tokenizer, processes: int, known: Mapping[str, stored.Shard]) -> dict[str, Any]:
    picks, copies = _subset(source, tokenizer, processes)
    shard_files: dict[str, stored.Shard] = {}
    with _bar(source, "preparing rows") as bar:
        numbers: list[int] = []  # objects of each chunk
        tasks = _tasks(folder, source, picks, known, numbers)
        for number, shard in enumerate(_results(tasks, source.job, tokenizer, processes)):
            shard_files[_file(number)] = shard
            bar.update(numbers[number])
    return _finish(folder, source, shard_files, copies)


def _bar(source: Source, text: str):
    return progress.bar(total=_expected(source.parts), desc=text, unit="row")


def _expected(source_parts: Sequence[parts.Part]) -> int | None:
    """About how many objects there are; None if that is not known before they are read."""
    total = 0
    for part in source_parts:
        suffix = suffix_of(part.path)
        if not os.path.isfile(part.path):
            total += len(readers.open_indexed(part.path))
        elif suffix not in (".jsonl", ".csv") or not part.path.lower().endswith(suffix):
            return None
        else:
            with open(part.path, "rb") as file:
                while block := file.read(1 << 20):
                    total += block.count(b"\n")
    return total


# --------------------------------------------------------------------------------------------------------------------
# Chunks
# --------------------------------------------------------------------------------------------------------------------


def _chunks(source: Source) -> Iterator[list[tuple[int, Any]]]:
    """The objects of a source, some at a time; always the same ones."""
    drawn = sources.drawn(source.name, source.num_rows, source.seed)
    objects: list[tuple[int, Any]] = []
    size, most = 0, _chunk_bytes(source)
    for line, value in readers.read_encoded(source.name) if drawn is None else drawn:
        objects.append((line, value))
        size += limits.text_size(value)
        if len(objects) == CHUNK_ROWS or size >= most:
            yield objects
            objects, size = [], 0
    if objects:
        yield objects


def _chunk_bytes(source: Source) -> int:
    """The most bytes of a chunk, which depend on the size of the source alone."""
    least, most = CHUNK_BYTES
    paths = [part.path for part in source.parts]
    sizes = [os.path.getsize(path) if os.path.isfile(path) else most * NUM_CHUNKS for path in paths]
    return min(max(sum(sizes) // NUM_CHUNKS, least), most)


def _file(number: int) -> str:
    return f"{number:06}.arrow"


def _tasks(
    folder: pathlib.Path, source: Source, picks: list[np.ndarray] | None, known: Mapping[str, stored.Shard], numbers: list[int]
) -> Iterator[workers.Task | stored.Shard]:
    """The shards to prepare, and those that are there already. Appends the number of objects of each to `numbers`."""
    for number, objects in enumerate(_chunks(source)):
        numbers.append(len(objects))
        file = folder / _file(number)
        chunk = shards.Chunk(objects, None if picks is None else picks[number])
        yield _existing(file, known.get(file.name)) or workers.Task(source.job, chunk, file)


def _existing(file: pathlib.Path, known: stored.Shard | None) -> stored.Shard | None:
    """A shard that is there already, of an interrupted preparation, or the one that is `known`."""
    if known:
        return None if stored.check_shard(file, known) else known
    try:
        content = file.read_bytes()
        rows_in_it = pa.ipc.open_file(content).get_batch(0).num_rows
    except (FileNotFoundError, pa.ArrowException):
        return None
    return stored.Shard(rows_in_it, len(content), zlib.crc32(content))


def _results(tasks: Iterator[workers.Task | stored.Shard], job: shards.Job, tokenizer, processes: int) -> Iterator[Any]:
    """The results of the tasks in order. A single one needs no other process."""
    first, encode_rows = list(itertools.islice(tasks, 2)), workers.encoder(tokenizer, job)
    if processes > 1 and len(first) > 1:
        yield from workers.in_order(itertools.chain(first, tasks), processes, encode_rows)
        return
    for task in itertools.chain(first, tasks):
        yield workers.run(task, encode_rows) if isinstance(task, workers.Task) else task


def _subset(source: Source, tokenizer, processes: int) -> tuple[list[np.ndarray] | None, np.ndarray | None]:
    """Which usable rows of each chunk are in the random subset, and the numbers of copies of these rows; None: all rows."""
    if not source.num_rows or readers.is_indexed(source.name):
        return None, None
    contents = []
    with _bar(source, "counting rows") as bar:
        tasks = (workers.Task(source.job, shards.Chunk(objects), None) for objects in _chunks(source))
        for content in _results(tasks, source.job, tokenizer, processes):
            contents.append(content)
            bar.update(len(content))
    ends = np.cumsum([len(content) for content in contents])
    picked = sources.subset_indices(int(ends[-1]) if contents else 0, source.num_rows, source.seed)
    picks = [picked[(picked >= end - len(content)) & (picked < end)] - (end - len(content)) for content, end in zip(contents, ends)]
    return picks, _copies(np.concatenate([np.zeros(0, np.uint64), *contents]))[picked]


# --------------------------------------------------------------------------------------------------------------------
# Index and report
# --------------------------------------------------------------------------------------------------------------------


def _copies(contents: np.ndarray) -> np.ndarray:
    """The number of each row among those of equal content, from 1, [n] int32."""
    order = np.argsort(contents, kind="stable")
    is_first = np.diff(contents[order], prepend=~contents[order[:1]]) != 0
    first = np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))
    copies = np.empty(len(order), np.int32)
    copies[order] = np.arange(len(order)) - first + 1
    return copies


def _finish(
    folder: pathlib.Path, source: Source, shard_files: dict[str, stored.Shard], copies: np.ndarray | None
) -> dict[str, Any]:
    """Writes the index. Returns the manifest."""
    columns: dict[str, list] = {}
    summaries = []
    for name in shard_files:
        batch = pa.ipc.open_file(pa.memory_map(str(folder / name))).get_batch(0)
        summaries.append(json.loads(batch.schema.metadata[shards.SUMMARY]))
        lengths = {name: pa.array(np.diff(batch.column(name).offsets.to_numpy())) for name in ("prompt", "response", "rejected")}
        lengths["rejected"] = pa.compute.if_else(
            batch.column("rejected").is_valid(), lengths["rejected"], pa.scalar(-1, pa.int32())
        )
        small = {name: batch.column(name) for name in (*SMALL_COLUMNS, "source", "reason")}
        for column, values in {**small, **lengths}.items():
            columns.setdefault(column, []).append(_in_memory(values))
    summary = _merged(summaries)
    if not summary["num_rows"]:
        shutil.rmtree(folder)
        raise _unusable(source, summary)
    whole = {column: pa.chunked_array(values).combine_chunks() for column, values in columns.items()}
    for text in ("source", "reason"):
        whole[text] = whole[text].dictionary_encode()
    whole["copy"] = pa.array(_copies(whole["content"].to_numpy()) if copies is None else copies)
    batch = pa.RecordBatch.from_pydict(whole)
    out = pa.BufferOutputStream()
    with pa.ipc.new_file(out, batch.schema) as writer:
        writer.write_batch(batch)
    content = out.getvalue()
    files.write_atomically(folder / stored.INDEX, content)
    index = stored.Shard(batch.num_rows, len(content), zlib.crc32(content))
    num_kept = batch.num_rows if batch.num_rows < summary["num_rows"] else None
    return {**summary, "num_kept": num_kept, "shards": shard_files, "index": index, "label": source.job.label}


def _in_memory(values: pa.Array) -> pa.Array:
    """A copy, so that the file need not stay mapped."""
    return pa.concat_arrays([values, values[:0]])


def _merged(summaries: Sequence[dict]) -> dict[str, Any]:
    """What the summaries of the shards say of the source."""
    counts: dict[str, collections.Counter] = {"schemas": collections.Counter(), "not_read": collections.Counter()}
    rejected: dict[str, tuple[int, Any]] = {}
    for one in summaries:
        for name, counter in counts.items():
            counter.update(one[name])
        for reason, count, location in one["rejected"]:
            before, first = rejected.get(reason, (0, location))
            rejected[reason] = (before + count, first)
    missing = [set(one["columns"][0]) for one in summaries]
    seen = dict.fromkeys(name for one in summaries for name in one["columns"][1])
    return {
        "num_rows": sum(one["usable"] for one in summaries),
        **{name: dict(counter) for name, counter in counts.items()},
        "rejected": [[reason, *values] for reason, values in rejected.items()],
        "first": next((one["first"] for one in summaries if one["first"]), None),
        "cut": [location for one in summaries for location in one["cut"]][:1],
        "num_cut": sum(one["num_cut"] for one in summaries),
        "missing": sorted(set.intersection(*missing)) if missing else [],
        "seen": list(seen)[:MAX_SEEN],
        "largest_token": max((one["largest_token"] for one in summaries), default=-1),
    }


def _line(location: Sequence[int], source: Source) -> int:
    line, file = location
    return line if file < 0 else Line(line, source.parts[file].path, source.parts[file].source)


def _unusable(source: Source, summary: dict) -> Exception:
    """Why no row can be used; a missing column explains it best."""
    columns = Columns(source.job.columns)
    columns.add(summary["missing"], summary["seen"])
    try:
        columns.check(source.name)
    except rows.DataError as error:
        return error
    first = summary["first"] and Rejection(_line(summary["first"][0], source), summary["first"][1], tuple(summary["first"][2]))
    return rows.unusable(source.name, first, sum(count for _, count, _ in summary["rejected"]))


def report(source: Source, summary: dict) -> Report:
    """The report on a prepared source. Of the rejections with one reason it has the first, as often as there are."""
    rejections: list[Rejection] = []
    for reason, count, location in summary["rejected"]:
        rejections += [Rejection(_line(location, source), reason)] * count
    cut = [Rejection(_line(location, source), rows.CUT) for location in summary["cut"]] * summary["num_cut"]
    return Report(
        source.name,
        summary["schemas"],
        summary["num_rows"],
        tuple(rejections),
        num_kept=summary["num_kept"],
        cut=tuple(cut),
        not_read=summary["not_read"],
    )

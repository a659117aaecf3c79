"""Prepared rows on disk: sequences of rows, examples and ids whose elements are made when they are used.

A folder has shards (see `shards`), an index with the small columns of all rows, and a manifest, which is written last. The files
are mapped into memory. Pages that were read count as memory of this process, so they are given back now and then.
"""

import contextlib
import dataclasses
import functools
import mmap
import pathlib
import weakref
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow as pa
import tqdm

from bilevel_jax.data import by_turn, rows, templates
from bilevel_jax.data.parts import Part
from bilevel_jax.data.prepared import shards
from bilevel_jax.data.rejections import DataError, Line
from bilevel_jax.data.rows import Row

INDEX = "index.arrow"
TOKENS = ("prompt", "response", "rejected", "earlier")  # columns of lists
MAX_OPEN = 256  # shards that are mapped at a time: each uses a file descriptor
RELEASE = 512  # rows that are read before their pages are given back
BLOCK = 1024  # rows whose tokens are put together at a time


class Shard(NamedTuple):
    """A shard as the manifest has it."""

    rows: int
    size: int  # in bytes
    checksum: int  # CRC-32 of the file


class _Mapped:
    """The columns of a shard, mapped into memory."""

    def __init__(self, path: pathlib.Path):
        with open(path, "rb") as file:
            self._memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        batch = pa.ipc.open_file(pa.py_buffer(self._memory)).get_batch(0)
        self.lists = {name: (batch.column(name).offsets.to_numpy(), batch.column(name).values.to_numpy()) for name in TOKENS}
        _, offsets, content = batch.column("value").buffers()
        self._offsets, self._content = np.frombuffer(offsets, np.int64), memoryview(content)

    def value(self, i: int) -> bytes:
        return bytes(self._content[self._offsets[i] : self._offsets[i + 1]])

    def tokens(self, name: str, i: int) -> np.ndarray:
        offsets, values = self.lists[name]
        return values[offsets[i] : offsets[i + 1]].copy()

    def release(self) -> None:
        """Gives the pages back; they are read again when they are used."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED)


class Store:
    """The prepared rows of a source.

    Args:
      folder: with the shards and the index.
      job: how the rows were prepared.
      files: of the shards, in order; each with its name in the folder.
      parts: of the source as it is now.
      largest_token: of all rows.
    """

    def __init__(
        self, folder: pathlib.Path, job: shards.Job, files: Mapping[str, Shard], parts: Sequence[Part], largest_token: int
    ):
        self.folder, self.job, self.largest_token = folder, job, largest_token
        self._files, self._parts = list(files.items()), parts
        self._ends = np.cumsum([shard.rows for shard in files.values()])
        batch = pa.ipc.open_file(pa.memory_map(str(folder / INDEX))).get_batch(0)
        self.text = {name: batch.column(name) for name in ("source", "reason")}  # dictionary arrays
        self.index = {name: batch.column(name).to_numpy() for name in batch.schema.names if name not in self.text}
        self._checked: set[int] = set()
        self._open: weakref.WeakSet[_Mapped] = weakref.WeakSet()
        self._num_reads = 0
        self._shard = functools.lru_cache(MAX_OPEN)(self._open_shard)

    def __len__(self) -> int:
        return len(self.index["line"])

    @property
    def num_bytes(self) -> int:
        """The size of the shards."""
        return sum(shard.size for _, shard in self._files)

    def verify(self) -> None:
        """Compares all shards with their checksums.

        Raises:
          DataError: a shard is damaged; it is removed.
        """
        for number in tqdm.trange(len(self._files), desc="checking", unit="shard", delay=2, leave=False, disable=None):
            self._check(number)

    def _check(self, number: int) -> None:
        name, expected = self._files[number]
        if number in self._checked:
            return
        if problem := check_shard(self.folder / name, expected):
            with contextlib.suppress(OSError):  # of others; `data.cache=off` goes on without the cache
                (self.folder / name).unlink()
            raise DataError(f"{problem}; start again: its rows are then prepared again")
        self._checked.add(number)

    def _open_shard(self, number: int) -> _Mapped:
        self._check(number)
        mapped = _Mapped(self.folder / self._files[number][0])
        self._open.add(mapped)
        return mapped

    def shard_of(self, index: np.ndarray | int) -> np.ndarray:
        """The shards of some rows."""
        return np.searchsorted(self._ends, index, "right")

    def first_row(self, number: int) -> int:
        """The first row of a shard."""
        return int(self._ends[number]) - self._files[number][1].rows

    def locate(self, i: int) -> tuple[int, int]:
        """The shard of a row, and the index of the row in it."""
        number = int(self.shard_of(i))
        return number, int(i) - self.first_row(number)

    def mapped(self, number: int) -> _Mapped:
        """A shard. Gives back what was read before if that is much."""
        self._num_reads += 1
        if self._num_reads % RELEASE == 0:
            self.release()
        return self._shard(number)

    def release(self) -> None:
        """Gives back the memory of all pages that were read."""
        for shard in list(self._open):
            shard.release()

    def line(self, i: int) -> int:
        file, line = int(self.index["file"][i]), int(self.index["line"][i])
        return line if file < 0 else Line(line, self._parts[file].path, self._parts[file].source)

    def value(self, i: int) -> bytes:
        number, k = self.locate(i)
        return self.mapped(number).value(k)

    def id(self, i: int) -> str:
        copy = int(self.index["copy"][i])
        return f"{int(self.index['content'][i]):016x}{f'-{copy}' if copy > 1 else ''}"

    def row(self, i: int) -> Row:
        return dataclasses.replace(shards.make_row(self.job, self.line(i), self.value(i)), id=self.id(i))

    def example(self, i: int) -> templates.Example:
        number, k = self.locate(i)
        shard = self.mapped(number)
        earlier = shard.tokens("earlier", k).reshape(-1, 2).tolist()
        return templates.Example(
            prompt=shard.tokens("prompt", k),
            response=shard.tokens("response", k),
            rejected=shard.tokens("rejected", k) if self.index["rejected"][i] >= 0 else None,
            reason=self.text["reason"][i].as_py(),
            earlier=tuple((start, stop) for start, stop in earlier),
        )

    def rows(self) -> "StoredRows":
        return StoredRows(self, np.arange(len(self)))


def check_shard(path: pathlib.Path, expected: Shard) -> str:
    """Why a file is not the one that was written; "" if it is."""
    try:
        with open(path, "rb") as file:
            size, checksum = 0, 0
            while part := file.read(1 << 20):
                size, checksum = size + len(part), zlib.crc32(part, checksum)
    except FileNotFoundError:
        return f"{path}: it is missing"
    if size != expected.size:
        return f"{path}: {size} bytes in place of {expected.size}"
    return "" if checksum == expected.checksum else f"{path}: it is damaged"


# --------------------------------------------------------------------------------------------------------------------
# Sequences
# --------------------------------------------------------------------------------------------------------------------


class Stored(Sequence):
    """Elements that are made from a store when they are used.

    Subclasses are dataclasses. Their fields that are arrays have an element for each of this sequence.
    """

    store: Store
    index: np.ndarray  # [n] rows of the store

    def _get(self, i: int) -> Any:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.index)

    @overload
    def __getitem__(self, i: int) -> Any: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence: ...
    def __getitem__(self, i):
        if isinstance(i, slice):
            return self.take(np.arange(len(self))[i])
        if not -len(self) <= i < len(self):
            raise IndexError(f"{i} is out of range for {len(self)} rows")
        return self._get(int(i) % len(self))

    def _arrays(self) -> dict[str, np.ndarray]:
        return {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}

    def take(self, indices: np.ndarray):
        """The elements at some indices."""
        return dataclasses.replace(self, **{name: array[indices] for name, array in self._arrays().items()})  # type: ignore[type-var]

    def __add__(self, other):
        """One sequence after another of the same store."""
        both = self._arrays(), other._arrays() if isinstance(other, type(self)) and other.store is self.store else {}
        if both[0].keys() != both[1].keys():
            return [*self, *other]
        joined = {name: np.concatenate([array, both[1][name]]) for name, array in both[0].items()}
        return dataclasses.replace(self, **joined)  # type: ignore[type-var]


@dataclasses.dataclass(frozen=True, eq=False)
class StoredRows(Stored):
    """Rows; with `turn`, rows of single answers, see `by_turn`."""

    store: Store
    index: np.ndarray
    turn: np.ndarray | None = None  # [n] index of the answer; -1: the row as it is
    of_last: tuple[str, ...] = ()  # as in `by_turn.rows_of`

    def _get(self, i: int) -> Row:
        row = self.store.row(self.index[i])
        is_whole = self.turn is None or self.turn[i] < 0
        return row if is_whole else by_turn.rows_of(row, self.of_last)[int(self.turn[i])]

    def examples(self) -> "StoredExamples":
        """The tokens of the rows as they are in the source; not those of single answers."""
        return StoredExamples(self.store, self.index)

    @property
    def ids(self) -> "StoredIds":
        return StoredIds(self.store, self.index, self.turn)

    @property
    def contents(self) -> np.ndarray:
        """`rows.content_of` of each row as a number, [n] uint64."""
        return self.store.index["content"][self.index]

    def sources(self) -> pa.DictionaryArray:
        """The source of each row, [n]."""
        return self.store.text["source"].take(pa.array(self.index))

    def marks(self, field: str) -> np.ndarray:
        """`rows.mark` of each row, [n] int8; -1 for none. Reads all rows if it is another field than that of the preparation."""
        if field == self.store.job.label and field not in self.of_last:
            return self.store.index["marked"][self.index]
        marks = np.full(len(self), -1, np.int8)
        for i in tqdm.trange(len(self), desc=f"reading {field}", unit="row", delay=2, leave=False, disable=None):
            mark = rows.mark(self[i], field)
            marks[i] = -1 if mark is None else mark
        return marks

    def fields(self, name: str) -> "StoredField":
        return StoredField(self, name)


@dataclasses.dataclass(frozen=True, eq=False)
class StoredIds(Stored):
    """The ids of rows."""

    store: Store
    index: np.ndarray
    turn: np.ndarray | None = None

    def _get(self, i: int) -> str:
        whole = self.store.id(self.index[i])
        return whole if self.turn is None or self.turn[i] < 0 else f"{whole}.{int(self.turn[i]) + 1}"

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), BLOCK):
            part = slice(first, first + BLOCK)
            index = self.index[part]
            contents, copies = self.store.index["content"][index].tolist(), self.store.index["copy"][index].tolist()
            turns = [-1] * len(index) if self.turn is None else self.turn[part].tolist()
            for content, copy, turn in zip(contents, copies, turns):
                yield f"{content:016x}{f'-{copy}' if copy > 1 else ''}{f'.{turn + 1}' if turn >= 0 else ''}"


class StoredField(Sequence):
    """A field of each row; None where it is not a text."""

    def __init__(self, stored: StoredRows, name: str):
        self._stored, self._name = stored, name

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(len(self))[i]]
        value = self._stored[i].fields.get(self._name)
        return value if isinstance(value, str) else None


@dataclasses.dataclass(frozen=True, eq=False)
class StoredExamples(Stored):
    """Token ids; with `start` and `stop`, the answers there with what precedes them."""

    store: Store
    index: np.ndarray
    max_length: int = 0  # to which examples are cut as by `templates.fit`; 0: they are not
    cut_turns: bool = True
    start: np.ndarray | None = None  # [n] first token of the answer; -1: the example as it is
    stop: np.ndarray | None = None

    @property
    def largest_token(self) -> int:
        """A bound of all tokens."""
        return self.store.largest_token

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of each row, [n]: question and response, or a pair's question twice with both responses."""
        prompt, response, rejected = (self.store.index[name][self.index] for name in ("prompt", "response", "rejected"))
        sizes = prompt + response + np.where(rejected >= 0, prompt + rejected, 0)
        if self.max_length:
            sizes = np.where(rejected >= 0, sizes, np.minimum(sizes, self.max_length))
            for i in np.flatnonzero(prompt >= self.max_length):
                sizes[i] = self[i].size
        return sizes if self.start is None or self.stop is None else np.where(self.start >= 0, self.stop, sizes)

    def _get(self, i: int) -> templates.Example:
        example = self.store.example(self.index[i])
        if self.max_length:
            example, note = templates.fit_one(example, self.max_length, self.cut_turns)
            assert example is not None, note  # `fit` leaves the others out
        if self.start is None or self.stop is None or self.start[i] < 0:
            return example
        tokens = np.concatenate([example.prompt, example.response])
        return templates.Example(tokens[: self.start[i]], tokens[self.start[i] : self.stop[i]], None)

    def fit(self, max_length: int, cut_turns: bool) -> tuple[np.ndarray, "StoredExamples", dict[str, tuple[int, int]]]:
        """`templates.fit` of these examples."""
        prompt, response, rejected = (self.store.index[name][self.index] for name in ("prompt", "response", "rejected"))
        reasons = self.store.text["reason"].take(pa.array(self.index))
        reason = reasons.indices.fill_null(-1).to_numpy()
        refused, is_pair = reason >= 0, rejected >= 0
        empty = ~refused & ((prompt == 0) | (response == 0) | (rejected == 0))
        usable = ~refused & ~empty
        over = usable & is_pair & (2 * prompt + response + rejected > max_length)
        long = usable & ~is_pair & (prompt >= max_length)
        where = {
            "question or response without a token": empty,
            f"pair over {max_length} tokens": over,
            f"response cut to {max_length} tokens": usable & ~is_pair & ~long & (prompt + response > max_length),
        }
        noted = {note: np.flatnonzero(mask).tolist() for note, mask in where.items()}
        for code, text in enumerate(reasons.dictionary.to_pylist()):
            noted[text] = np.flatnonzero(reason == code).tolist()
        keeps = usable & ~over
        for i in np.flatnonzero(long):
            shorter, note = templates.fit_one(self.store.example(self.index[i]), max_length, cut_turns)
            noted.setdefault(note, []).append(int(i))
            keeps[i] = shorter is not None
        in_order = sorted((found[0], note, len(found)) for note, found in noted.items() if found)
        counts = {note: (number, self.store.line(self.index[first])) for first, note, number in in_order}
        kept = np.flatnonzero(keeps)
        return kept, StoredExamples(self.store, self.index[kept], max_length, cut_turns), counts

    def token_blocks(self) -> Iterator[bytes]:
        """`Example.token_bytes` of all, of many at a time."""
        prompt = self.store.index["prompt"][self.index]
        cut = prompt >= self.max_length if self.max_length else np.zeros(len(self), bool)
        numbers = self.store.shard_of(self.index)
        bounds = np.flatnonzero(np.diff(numbers)) + 1
        for first, end in zip([0, *bounds.tolist()], [*bounds.tolist(), len(self)]):
            for begin in range(first, end, BLOCK):
                part = slice(begin, min(begin + BLOCK, end))
                if self.start is not None or cut[part].any():
                    yield b"".join(self[i].token_bytes for i in range(part.start, part.stop))
                else:
                    yield self._tokens(int(numbers[begin]), self.index[part]).astype("<i4").tobytes()
            self.store.release()

    def _tokens(self, number: int, index: np.ndarray) -> np.ndarray:
        """The tokens of uncut rows of one shard: each part that a row has, with -1 after it."""
        shard, local = self.store.mapped(number), index - self.store.first_row(number)
        is_pair, pieces = self.store.index["rejected"][index] >= 0, []
        for name in TOKENS:
            offsets, values = shard.lists[name]
            start, length = offsets[local].astype(np.int64), np.diff(offsets)[local].astype(np.int64)
            has = {"rejected": is_pair, "earlier": length > 0}.get(name, np.ones(len(index), bool))
            if name == "response" and self.max_length:
                room = self.max_length - pieces[0].length
                length = np.where(is_pair, length, np.minimum(length, room))
            pieces.append(_Piece(values, start, length, has))
        sizes = np.stack([np.where(piece.has, piece.length + 1, 0) for piece in pieces], 1)
        starts = (np.cumsum(sizes) - sizes.ravel()).reshape(sizes.shape)
        out = np.full(sizes.sum(), -1, np.int32)
        for piece, destination in zip(pieces, starts.T):
            length = piece.length[piece.has]
            within = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
            out[np.repeat(destination[piece.has], length) + within] = piece.values[
                np.repeat(piece.start[piece.has], length) + within
            ]
        return out


class _Piece(NamedTuple):
    """A column of lists, and where the lists of some rows are in its values."""

    values: np.ndarray
    start: np.ndarray  # [n]
    length: np.ndarray  # [n]
    has: np.ndarray  # [n] bool, whether the row has the list


def split_turns(stored_rows: StoredRows, examples: StoredExamples, of_last: Collection[str]) -> tuple[StoredRows, StoredExamples]:
    """`by_turn.split` of stored rows."""
    turns = stored_rows.store.index["turns"][stored_rows.index]
    whole = np.flatnonzero(turns == 1)
    places, numbers, starts, stops = [whole], [np.full(len(whole), -1)], [np.full(len(whole), -1)], [np.full(len(whole), -1)]
    several = np.flatnonzero(turns > 1)
    for i in tqdm.tqdm(several, desc="splitting conversations", unit="row", delay=2, leave=False, disable=None):
        example = examples[i]
        spans = [*example.earlier, (len(example.prompt), example.size)][: turns[i]]  # fewer spans than answers if it is cut
        learned = np.array([(k, start, stop) for k, (start, stop) in enumerate(spans) if 0 < start < stop]).reshape(-1, 3)
        places.append(np.full(len(learned), i))
        for column, values in zip((numbers, starts, stops), learned.T):
            column.append(values)
    place, number, start, stop = map(np.concatenate, (places, numbers, starts, stops))
    order = np.lexsort((number, place))
    place, number, start, stop = place[order], number[order].astype(np.int32), start[order], stop[order]
    new_rows = dataclasses.replace(stored_rows.take(place), turn=number, of_last=tuple(of_last))
    return new_rows, dataclasses.replace(examples.take(place), start=start.astype(np.int32), stop=stop.astype(np.int32))

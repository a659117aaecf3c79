"""Prepared rows on disk: the shards of a source, mapped into memory. `sequences` makes rows and examples of them.

A folder has shards (see `shards`), an index with the small columns of all rows, and a manifest, which is written last. The files
are mapped into memory. Pages that were read count as memory of this process, so they are given back now and then.
"""

import contextlib
import dataclasses
import functools
import mmap
import pathlib
import threading
import weakref
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from bilevel_jax import progress
from bilevel_jax.data import templates
from bilevel_jax.data.parts import Part
from bilevel_jax.data.prepared import shards
from bilevel_jax.data.rejections import DataError, Line
from bilevel_jax.data.rows import Row

INDEX = "index.arrow"
TOKENS = ("prompt", "response", "rejected", "earlier")  # columns of lists
MAX_OPEN = 256  # shards that are mapped at a time: each uses a file descriptor
RELEASE = 512  # rows that are read before their pages are given back


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
        self._lock = threading.Lock()  # of `_open`: one thread packs the next step, while another evaluates
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
        for number in progress.bar(range(len(self._files)), desc="checking", unit="shard"):
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
        with self._lock:
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
        with self._lock:
            mapped = list(self._open)
        for shard in mapped:
            shard.release()

    def line(self, i: int) -> int:
        """The line of a row in its file."""
        file, line = int(self.index["file"][i]), int(self.index["line"][i])
        return line if file < 0 else Line(line, self._parts[file].path, self._parts[file].source)

    def value(self, i: int) -> bytes:
        """The object of a row, as `shards.dump` wrote it."""
        number, k = self.locate(i)
        return self.mapped(number).value(k)

    def id(self, i: int) -> str:
        """The id of a row, as in `rows.parse`."""
        copy = int(self.index["copy"][i])
        return f"{int(self.index['content'][i]):016x}{f'-{copy}' if copy > 1 else ''}"

    def row(self, i: int) -> Row:
        """A row, which is parsed again."""
        return dataclasses.replace(shards.make_row(self.job, self.line(i), self.value(i)), id=self.id(i))

    def example(self, i: int) -> templates.Example:
        """The tokens of a row: each array int32, of the length of its part."""
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

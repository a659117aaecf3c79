"""Hidden states of segments, kept in memory or in two mapped files, see `frozen`.

The states of all keys share one array, in the order in which they were put. The index says where those of a key are, with a
CRC-32: states that a killed process or a full disk left half written are computed again.
"""

import os
import pathlib
import shutil
import zlib

import numpy as np

from bilevel_jax.errors import RunError
from bilevel_jax.runtime import disk

FOLDER = "cache"
STATES, INDEX = "frozen_states.bin", "frozen_states.index"
ENTRY = np.dtype([("end", "<i8"), ("size", "<u4"), ("checksum", "<u4")])  # end: 0 for none, else that of its tokens in `states`


class StateStore:
    """Hidden states [size, D] by key.

    Args:
      index: [keys] of `ENTRY`.
      states: [tokens, D], of all keys together.
    """

    def __init__(self, index: np.ndarray, states: np.ndarray):
        self._index, self._states = index, states
        self._end = int(index["end"].max(initial=0))

    def get(self, key: int) -> np.ndarray | None:
        """The states of a key; None if they were not put, or are damaged."""
        entry = self._index[key]
        end = int(entry["end"])
        states = self._states[end - int(entry["size"]) : end]
        return states if end and zlib.crc32(states.view(np.uint8).data) == entry["checksum"] else None

    def put(self, key: int, states: np.ndarray) -> None:
        """Keeps the states of a key, if there is space. Those that were there and proved to be damaged are replaced."""
        size, end = len(states), int(self._index[key]["end"])
        if not end:
            if self._end + size > len(self._states):  # the machine stopped before it wrote all of the index
                return
            end = self._end = self._end + size
        self._states[end - size : end] = states
        self._index[key] = end, size, zlib.crc32(np.ascontiguousarray(states).view(np.uint8).data)


def in_memory(num_keys: int, num_tokens: int, width: int, dtype) -> StateStore:
    """A store in the memory of this process.

    Raises:
      RunError: this machine has less memory.
    """
    needed, memory = num_bytes(num_keys, num_tokens, width, dtype), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        what = f"needs {disk.amount(needed)}, this machine has {disk.amount(memory)}"
        raise RunError(f"model.cache_frozen=memory {what}; take model.cache_frozen=disk or off, or fewer rows")
    return StateStore(np.zeros(num_keys, ENTRY), np.empty((num_tokens, width), dtype))


def on_disk(directory: pathlib.Path, num_keys: int, num_tokens: int, width: int, dtype, resumed: bool) -> StateStore:
    """A store in two files of a directory, which a resumed run finds again.

    Raises:
      OSError: the file system has no space for them.
    """
    shape = num_tokens, width
    sizes = {STATES: num_tokens * width * np.dtype(dtype).itemsize, INDEX: num_keys * ENTRY.itemsize}
    kept = resumed and all((directory / name).exists() and (directory / name).stat().st_size == sizes[name] for name in sizes)
    if not kept:
        shutil.rmtree(directory, ignore_errors=True)  # of another run
        directory.mkdir(parents=True)
        for name, size in sizes.items():
            with open(directory / name, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)  # a mapped file that cannot grow would end the process by a signal
    index = np.memmap(directory / INDEX, ENTRY, "r+", shape=(num_keys,))
    return StateStore(index, np.memmap(directory / STATES, dtype, "r+", shape=shape))


def bytes_on_disk(workdir: pathlib.Path) -> int:
    """Bytes of the files of an unfinished run in its workdir."""
    files = (workdir / FOLDER / name for name in (STATES, INDEX))
    return sum(file.stat().st_size for file in files if file.exists())


def remove(workdir: pathlib.Path) -> None:
    """Removes the files of a run, if it has any."""
    shutil.rmtree(workdir / FOLDER, ignore_errors=True)


def num_bytes(num_keys: int, num_tokens: int, width: int, dtype) -> int:
    """Bytes of a store with all keys filled."""
    return num_tokens * width * np.dtype(dtype).itemsize + num_keys * ENTRY.itemsize

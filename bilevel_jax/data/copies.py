"""Counts the copies of a row while rows are read, in 8 bytes for each row that has none."""

import array
import bisect

import numpy as np

RECENT = 1 << 16  # ids in a set; older ones are in sorted arrays


class CopyCounter:
    """How often each id has occurred so far. An id is 16 hex digits, `rows.content_id`.

    The ids are in sorted arrays, each at least twice as long as the next one, so that there are few of them.
    """

    def __init__(self, recent: int = RECENT):
        self._size = recent
        self._recent: set[int] = set()
        self._sorted: list[array.array] = []
        self._repeated: dict[int, int] = {}  # id -> count, if over 1

    def add(self, row_id: str) -> int:
        """Counts one more row with this id. Returns how many there are now."""
        number = int(row_id, 16)
        count = self._repeated.get(number, 0) or int(number in self._recent or any(_holds(ids, number) for ids in self._sorted))
        if count:
            self._repeated[number] = count + 1
        else:
            self._recent.add(number)
            if len(self._recent) == self._size:
                self._sort()
        return count + 1

    def _sort(self) -> None:
        """Moves the recent ids to the sorted arrays."""
        ids = np.fromiter(self._recent, np.uint64, len(self._recent))
        self._recent = set()
        while self._sorted and len(self._sorted[-1]) < 2 * len(ids):
            ids = np.concatenate([np.frombuffer(self._sorted.pop(), np.uint64), ids])
        self._sorted.append(array.array("Q", np.sort(ids).tobytes()))


def _holds(ids: array.array, number: int) -> bool:
    index = bisect.bisect_left(ids, number)
    return index < len(ids) and ids[index] == number

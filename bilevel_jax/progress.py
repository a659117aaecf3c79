"""Progress bars of loops that may take long."""

from collections.abc import Iterable

import tqdm


def bar(iterable: Iterable | None = None, *, desc: str, unit: str, total: int | None = None) -> tqdm.tqdm:
    """A bar that appears after two seconds, only on a terminal, and is removed at its end.

    Args:
      iterable: what the loop reads; None if the loop calls `update`.
      desc: what the loop does.
      unit: what it counts.
      total: how many there are; None: the length of `iterable`, if it has one.
    """
    return tqdm.tqdm(iterable, desc=desc, unit=unit, total=total, delay=2, leave=False, disable=None)

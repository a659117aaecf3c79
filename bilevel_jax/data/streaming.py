"""The rows of a run's lower level again, one at a time, for commands that need each of them once."""

from collections.abc import Iterator

from bilevel_jax.data import by_turn, levels, readers, rows, sources
from bilevel_jax.data.rows import Row


def reopen(config) -> Iterator[Row]:
    """Yields the rows of the lower level of a run, in stored order, including the held-out rows.

    With `selection.unit=turn` they are those of all answers. Of files and data sets only one row is in memory at a time. Generated
    rows, recipes and random subsets (`data.num_lower`) are read as a whole.

    Raises:
      DataError: the source no longer exists, or has no usable row.
    """
    if config.data.num_lower or config.data.lower.partition(":")[0] in ("recipe", "synthetic"):
        yield from _read_whole(config)
        return
    by_answer, columns, number = levels.weighs_turns(config), levels.columns_of(config), 0
    for item in rows.parse_columns(readers.read_objects(config.data.lower), columns, preference=levels.prefers(config)):
        if isinstance(item, Row):
            number += 1
            yield from by_turn.rows_of(item, of_last=[config.data.truth]) if by_answer else (item,)
    if not number:
        _read_whole(config)  # raises and says why


def _read_whole(config) -> list[Row]:
    """The rows of `reopen`, all in memory."""
    lower_rows, _ = sources.open_source(
        config.data.lower,
        seed=config.seed,
        num_rows=config.data.num_lower,
        bad_fraction=config.data.bad_fraction,
        preference=levels.prefers(config),
        columns=levels.columns_of(config),
    )
    if levels.weighs_turns(config):
        return [part for row in lower_rows for part in by_turn.rows_of(row, of_last=[config.data.truth])]
    return lower_rows

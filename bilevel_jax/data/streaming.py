"""The rows of a run's lower level again, one at a time, for commands that need each of them once."""

from collections.abc import Iterable, Iterator

from bilevel_jax.data import by_turn, levels, readers, rows, sources
from bilevel_jax.data.rows import Row


def reopen(config) -> Iterator[Row]:
    """Yields the rows of the lower level of a run, in stored order, including the held-out rows.

    With `selection.unit=turn` they are those of all answers. Of files and data sets only one row is in memory at a time. Generated
    rows, recipes and random subsets (`data.num_lower`) are read as a whole.

    Raises:
      DataError: the source no longer exists, or has no usable row.
    """
    return (row for _, row in numbered(config))


def numbered(config) -> Iterator[tuple[int, Row]]:
    """`reopen`, each row with its position: the number of its object in the source, from 0.

    Objects that cannot be used count too, and the count goes on from file to file. Answers of a conversation have its position.
    """
    source, size = config.data.lower, config.data.num_lower
    with_positions: Iterable[tuple[int, Row]]
    if source.partition(":")[0] in ("recipe", "synthetic") or (size and readers.is_indexed(source)):
        with_positions = ((row.line - 1, row) for row in _read_whole(config))
    else:
        columns, preference = levels.columns_of(config), levels.prefers(config)
        items = rows.parse_columns(readers.read_objects(source), columns, preference=preference)
        with_positions = ((position, item) for position, item in enumerate(items) if isinstance(item, Row))
        if size:
            usable = list(with_positions)
            with_positions = (usable[i] for i in sources.subset_indices(len(usable), size, config.seed))
    by_answer, is_empty = levels.weighs_turns(config), True
    for position, row in with_positions:
        is_empty = False
        for part in by_turn.rows_of(row, of_last=[config.data.truth]) if by_answer else (row,):
            yield position, part
    if is_empty:
        _read_whole(config)  # raises and says why


def _read_whole(config) -> list[Row]:
    """The rows of the lower level, all in memory."""
    lower_rows, _ = sources.open_source(
        config.data.lower,
        seed=config.seed,
        num_rows=config.data.num_lower,
        bad_fraction=config.data.bad_fraction,
        preference=levels.prefers(config),
        columns=levels.columns_of(config),
    )
    return lower_rows

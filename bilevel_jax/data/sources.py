"""Opens a source of rows by name, draws random subsets, and splits off held-out rows."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from bilevel_jax import random_streams
from bilevel_jax.data import readers, recipes, rows, synthetic
from bilevel_jax.data.columns import Columns
from bilevel_jax.data.rejections import DataError
from bilevel_jax.data.rows import Report, Row

MAX_HELD_OUT = 200  # the most rows that are held out where a share of them is asked for

Generate = Callable[[int, int], list[dict]]  # (number of rows, seed) -> rows


def open_source(
    name: str, *, seed: int, num_rows: int, bad_fraction: float, preference: bool = False, columns: Columns | None = None
) -> tuple[list[Row], Report]:
    """Reads or generates the rows of a source, with a report.

    Args:
      name: `synthetic:upper`, `synthetic:lower`, `synthetic:domains`, `synthetic:tokens`, `synthetic:trusted`,
        `synthetic:mixture`, `recipe:blueorca`, `recipe:redorca`, or files, folders and data sets as in `readers.read_objects`.
      seed: seed of generators, recipes and random subsets.
      num_rows: number of generated rows (required), or of a recipe's rows (0: the full size). For other sources, the size of a
        random subset in stored order; 0, or more rows than there are: all rows.
      bad_fraction: share of bad rows of `synthetic:lower`, and of rows with bad words of `synthetic:tokens`.
      preference: rows must have a chosen and a rejected response; generated rows then have both.
      columns: other names of columns; generated rows and recipes have none. A column that is missing is no error by itself, since
        the other level may have it.

    Raises:
      DataError: the source does not exist, or has no usable row.
    """
    if num_rows < 0:
        raise DataError(f"{name}: num_rows must not be negative, not {num_rows}")
    kind, _, part = name.partition(":")
    generated = [entry.strip() for entry in name.split(",") if entry.strip().partition(":")[0] in ("recipe", "synthetic")]
    if generated and "," in name and not os.path.exists(name):
        raise DataError(f"{name}: {generated[0]} cannot be part of a list; write its rows to a file first, or name it alone")
    if kind == "recipe":
        objects = recipes.build(part, num_rows=num_rows, seed=seed)
    elif kind == "synthetic":
        objects = _generate(name, part, num_rows, seed, bad_fraction, preference)
    else:
        return _read(name, num_rows, seed, preference, columns or Columns())
    return rows.collect(rows.parse(enumerate(objects, 1), preference=preference), name)


def num_held_out(number: float, num_rows: int) -> int:
    """How many of `num_rows` rows are held out.

    Args:
      number: of rows; below 1, the share of the rows: rounded, from 1 to `MAX_HELD_OUT`, and at least one row is left for training.
        0 holds out none.
    """
    if number >= 1 or not number:
        return int(number)
    return min(max(round(number * num_rows), 1), MAX_HELD_OUT, num_rows - 1)


def split(stored: Sequence, num_eval: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits rows into training and held-out rows by a seeded permutation.

    Returns:
      train, held_out: int64 indices into `stored`, a partition of all indices, each in stored order.

    Raises:
      DataError: no row would be left for training.
    """
    if not 0 <= num_eval < len(stored):
        raise DataError(f"cannot hold out {num_eval} of {len(stored)} rows: at least one must be left for training")
    order = np.random.default_rng([seed, random_streams.HELD_OUT]).permutation(len(stored))
    return np.sort(order[num_eval:]), np.sort(order[:num_eval])


def _generate(name: str, part: str, num_rows: int, seed: int, bad_fraction: float, preference: bool) -> list[dict]:
    generators: dict[str, Generate] = {
        "upper": synthetic.upper,
        "lower": functools.partial(synthetic.lower, bad_fraction=bad_fraction),
        "domains": synthetic.domains,
        "tokens": functools.partial(synthetic.tokens, bad_fraction=bad_fraction),
        "trusted": synthetic.trusted,
        "mixture": synthetic.mixture,
    }
    pairs: dict[str, Generate] = {
        "upper": synthetic.upper_pairs,
        "lower": functools.partial(synthetic.lower_pairs, bad_fraction=bad_fraction),
    }
    if part not in generators:
        *names, last = (f"synthetic:{generator}" for generator in generators)
        raise DataError(f"{name}: no such generator; choose {', '.join(names)} or {last}")
    if preference and part not in pairs:
        raise DataError(f"{name} has no preference rows; take synthetic:lower")
    if num_rows == 0:
        raise DataError(f"{name}: generated rows need a number of rows")
    return (pairs if preference else generators)[part](num_rows, seed)


def subset_indices(size: int, num_rows: int, seed: int) -> np.ndarray:
    """Indices of a random subset of `num_rows` rows in stored order; all rows if `num_rows` is 0 or at least `size`."""
    if not 0 < num_rows < size:
        return np.arange(size)
    return np.sort(np.random.default_rng([seed, random_streams.SUBSET]).permutation(size)[:num_rows])


def _subset(stored: list[Row], report: Report, num_rows: int, seed: int) -> tuple[list[Row], Report]:
    kept = [stored[i] for i in subset_indices(len(stored), num_rows, seed)]
    return kept, report if len(kept) == len(stored) else dataclasses.replace(report, num_kept=len(kept))


def _read(name: str, num_rows: int, seed: int, preference: bool, columns: Columns) -> tuple[list[Row], Report]:
    """Reads files and data sets.

    Of a single data set with millions of rows, row numbers are drawn before reading. Unusable rows reduce the size of that subset.
    """
    of_subset = drawn(name, num_rows, seed)
    objects = readers.read_objects(name) if of_subset is None else of_subset
    try:
        stored, report = rows.collect(rows.parse_columns(objects, columns, preference=preference), name)
    except DataError:
        columns.check(name)  # a missing column explains why no row can be used
        raise
    return _subset(stored, report, num_rows, seed) if of_subset is None else (stored, report)


def drawn(name: str, num_rows: int, seed: int) -> Iterator[tuple[int, Any]] | None:
    """The numbered objects of a random subset that is drawn before reading; None if all objects are to be read."""
    if not num_rows or not readers.is_indexed(name):
        return None
    dataset = readers.open_indexed(name)
    return ((int(i) + 1, dataset[int(i)]) for i in subset_indices(len(dataset), num_rows, seed))

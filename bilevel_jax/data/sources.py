"""Where rows come from, by name, and how a part of them is drawn."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from bilevel_jax.data import recipes, rows, synthetic
from bilevel_jax.data.rows import DataError, Report, Row

SUBSET, SPLIT = 1, 2  # keep the random streams of the two functions apart


def open_source(name: str, *, seed: int, num_rows: int, bad_fraction: float, preference: bool = False) -> tuple[list[Row], Report]:
    """Rows and a report on what was found.

    Args:
      name: `synthetic:upper`, `synthetic:lower`, `synthetic:domains`, `synthetic:tokens`, `recipe:blueorca`,
        `recipe:redorca`, a file, or a hub data set as in `rows.iter_rows`. A file of that name wins over the hub.
      seed: of the generator and recipes, and of the random subset.
      num_rows: of the generator (there is no default) and recipes (0: their own size); otherwise, if > 0, the size of a
        random subset in stored order, which is never simply the head, or everything where there are fewer rows.
      bad_fraction: the share of planted bad rows of `synthetic:lower`, of rows with bad words of `synthetic:tokens`.
      preference: the rows must have a chosen and a rejected response; generated ones have.

    Raises:
      DataError: if there is no such source, or it has no usable row.
    """
    if num_rows < 0:
        raise DataError(f"{name}: num_rows must not be negative, not {num_rows}")
    kind, _, part = name.partition(":")
    if kind == "recipe":
        objects = recipes.build(part, num_rows=num_rows, seed=seed)
    elif kind == "synthetic":
        objects = _generate(name, part, num_rows, seed, bad_fraction, preference)
    elif num_rows and rows.is_hub(name):
        return _hub_subset(name, num_rows, seed, preference)
    else:
        return _subset(*rows.read_rows(name, preference=preference), num_rows, seed)
    return rows.collect(rows.parse(enumerate(objects, 1), preference=preference), name)


def split(stored: Sequence, num_eval: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Parts rows into training and held-out ones by a seeded permutation.

    Returns:
      train, held_out: int64 indices into `stored`, disjoint and together complete, each in stored order.

    Raises:
      DataError: if nothing would be left to train on.
    """
    if not 0 <= num_eval < len(stored):
        raise DataError(f"cannot hold out {num_eval} of {len(stored)} rows: at least one must be left for training")
    order = np.random.default_rng([seed, SPLIT]).permutation(len(stored))
    return np.sort(order[num_eval:]), np.sort(order[:num_eval])


def _generate(name: str, part: str, num_rows: int, seed: int, bad_fraction: float, preference: bool) -> list[dict]:
    plain = {
        "upper": synthetic.upper,
        "lower": functools.partial(synthetic.lower, bad_fraction=bad_fraction),
        "domains": synthetic.domains,
        "tokens": functools.partial(synthetic.tokens, bad_fraction=bad_fraction),
    }
    pairs = {"upper": synthetic.upper_pairs, "lower": functools.partial(synthetic.lower_pairs, bad_fraction=bad_fraction)}
    if part not in plain:
        *names, last = (f"synthetic:{known}" for known in plain)
        raise DataError(f"{name}: no such generator; choose {', '.join(names)} or {last}")
    if preference and part not in pairs:
        raise DataError(f"{name} has no preference rows; take synthetic:lower")
    if num_rows == 0:
        raise DataError(f"{name}: generated rows need a number of rows")
    return (pairs if preference else plain)[part](num_rows, seed)


def _places(size: int, num_rows: int, seed: int) -> np.ndarray:
    """A random subset of `num_rows` places in stored order; all where there are no more, or none are asked for."""
    if not 0 < num_rows < size:
        return np.arange(size)
    return np.sort(np.random.default_rng([seed, SUBSET]).permutation(size)[:num_rows])


def _subset(stored: list[Row], report: Report, num_rows: int, seed: int) -> tuple[list[Row], Report]:
    kept = [stored[place] for place in _places(len(stored), num_rows, seed)]
    return kept, report if len(kept) == len(stored) else dataclasses.replace(report, num_kept=len(kept))


def _hub_subset(name: str, num_rows: int, seed: int, preference: bool) -> tuple[list[Row], Report]:
    """Draws before it reads: hub data may have millions of rows. What cannot be used among those drawn is missing then."""
    dataset = rows.open_hub(name)
    objects = ((int(place) + 1, dataset[int(place)]) for place in _places(len(dataset), num_rows, seed))
    return rows.collect(rows.parse(objects, preference=preference), name)

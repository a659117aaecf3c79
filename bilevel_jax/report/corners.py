"""Splits rows into corners: plausible or not, and useful or not.

`plausible` and `useful` are columns of the weight table, NaN where they are not known.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from bilevel_jax.runtime import weight_table

NUM_EXAMPLES = 3  # rows shown of each corner
MAX_DOTS = 5000  # rows in the figure

Table = Mapping[str, np.ndarray]


class Corner(NamedTuple):
    """Rows that are alike."""

    name: str
    number: int
    share: float  # of the rows that are split
    weight: float | None  # mean; None without rows
    bad: float | None  # share of its labelled rows that are bad; None without labels or rows
    examples: np.ndarray  # indices in the table, the most extreme row first


def measures(table: Table) -> list[str]:
    """The names of the measures that some row has. `useful` alone splits nothing and does not count."""
    names = [name for name in weight_table.MEASURES if not np.isnan(table[name]).all()]
    return names if "plausible" in names else []


def known_rows(table: Table) -> np.ndarray:
    """Indices of the rows that have all measures of the table."""
    return np.flatnonzero(~np.any([np.isnan(table[name]) for name in measures(table)], axis=0))


def split(table: Table, bad: np.ndarray | None, known: np.ndarray | None = None) -> list[Corner]:
    """Splits the rows in four: `plausible` from its median on or below it, `useful` above 0 or not. In two without `useful`.

    The most extreme rows of a corner are those with the largest product of distances from both lines.

    Args:
      table: columns of a weight table with `measures`.
      bad: whether each row is bad, or None.
      known: whether the label of each row is known; None for all.
    """
    rows = known_rows(table)
    plausible = table["plausible"][rows].astype(float)
    distance = plausible - np.median(plausible)
    if "useful" in measures(table):
        useful = table["useful"][rows].astype(float)
        kinds = {
            "Plausible and useful": (distance >= 0) & (useful > 0),
            "Plausible, not useful": (distance >= 0) & (useful <= 0),
            "Implausible, but useful": (distance < 0) & (useful > 0),
            "Implausible, not useful": (distance < 0) & (useful <= 0),
        }
        distance = distance * useful
    else:
        kinds = {"Plausible": distance >= 0, "Implausible": distance < 0}
    extreme = np.argsort(-np.abs(distance), kind="stable")
    corners = []
    for name, is_in in kinds.items():
        inside = rows[is_in]
        weight = float(table["weight"][inside].mean()) if len(inside) else None
        labelled = inside if known is None else inside[known[inside]]
        share_bad = float(bad[labelled].mean()) if bad is not None and len(labelled) else None
        examples = rows[extreme[is_in[extreme]]][:NUM_EXAMPLES]
        corners.append(Corner(name, len(inside), len(inside) / len(rows), weight, share_bad, examples))
    return corners


def sample(rows: np.ndarray) -> np.ndarray:
    """At most MAX_DOTS of the rows, always the same ones."""
    if len(rows) <= MAX_DOTS:
        return rows
    return np.sort(np.random.default_rng(0).choice(rows, MAX_DOTS, replace=False))

"""Which rows a report may show, before their texts are read: of a large run, only these are kept in memory."""

from collections.abc import Collection, Mapping

import numpy as np
import pyarrow as pa

from bilevel_jax import selector
from bilevel_jax.report import corners

ALL = 100_000  # a run with at most as many rows keeps the texts of all
ROWS = 5_000  # rows with generated responses that are compared with those of the data, in a larger run
NUM_EXTREMES = 5  # rows shown from each end of an epoch's ranking
NUM_TOKEN_WEIGHTED = 8  # responses shown with the weights of their words

Table = Mapping[str, np.ndarray]


def extremes(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the heaviest rows, heaviest first, and of the lightest rows, lightest first."""
    order = np.argsort(table["rank"])
    number = min(NUM_EXTREMES, len(order) // 2)
    return order[:number], order[::-1][:number]


def unlike(table: Table) -> np.ndarray:
    """Indices of the rows that are least like the trusted ones, the least first; none where that was not measured."""
    known = np.flatnonzero(~np.isnan(table["similar"]))
    return known[np.argsort(table["similar"][known], kind="stable")][:NUM_EXTREMES]


def token_ess(tokens: pa.Table) -> np.ndarray:
    """ESS/T of the weights of each response's tokens; 0 without weights."""
    weights = tokens["weight"].to_numpy()
    return np.array([selector.effective_sample_size(w / w.sum()) if len(w) and w.any() else 0.0 for w in weights])


def rows(tables: Mapping[int, Table], answered: Collection[str], tokens: pa.Table | None) -> np.ndarray:
    """Which rows may be shown, [N] bool.

    Args:
      tables: of all epochs, with the same rows.
      answered: ids of the rows with generated responses.
      tokens: the weights of tokens, if there are any.
    """
    last = tables[max(tables)]
    if len(last["id"]) <= ALL:
        return np.ones(len(last["id"]), bool)
    needed = np.zeros(len(last["id"]), bool)
    for table in tables.values():
        needed[np.concatenate(extremes(table))] = True
    needed[unlike(last)] = True
    if corners.measures(last):
        for corner in corners.split(last, None):
            needed[corner.examples] = True
    compared = np.array([i for i in np.flatnonzero(last["masked"]) if last["id"][i] in answered], int)
    needed[compared if len(compared) <= ROWS else np.random.default_rng(0).choice(compared, ROWS, replace=False)] = True
    if tokens is not None:
        has_weights = [len(weights) > 1 for weights in tokens["weight"].to_numpy()]  # not of responses that were cut
        weighed = np.argsort(np.where(has_weights, token_ess(tokens), np.inf), kind="stable")[: 2 * NUM_TOKEN_WEIGHTED]
        needed |= np.isin(last["id"], tokens["id"].take(weighed).to_pylist())
    return needed

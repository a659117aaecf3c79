"""Log-probabilities of preference pairs under the reference model: computed before the first step, read again by a resumed run."""

import dataclasses
import pathlib
import zipfile
from collections.abc import Callable

import numpy as np

from bilevel_jax import files, preferences, scoring
from bilevel_jax.data import levels


def file_of(directory: pathlib.Path, name: str) -> pathlib.Path:
    """The file of the level `upper` or `lower`."""
    return directory / f"references_{name}.npy"


def complete(level: levels.Level, loss: str, score: Callable, base, stored: np.ndarray | None = None) -> levels.Level:
    """The level with the reference model's log-probabilities of its pairs, [n, 2], where its loss is one of pairs.

    Args:
      level: upper or lower level; returned as it is where it has references.
      loss: of the level.
      score: see `scoring.make_scorer`.
      base: the reference model.
      stored: from `read`; None: they are computed.
    """
    if loss not in preferences.PAIRS or level.references is not None:
        return level
    if stored is None or stored.shape != (len(level.examples), 2) or not np.isfinite(stored).all():
        stored = scoring.pair_log_probs(score, base, None, level.examples, "reference")
    return dataclasses.replace(level, references=stored)


def read(file: pathlib.Path) -> np.ndarray | None:
    """What `write` wrote; None if the file is absent or damaged."""
    try:
        stored = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    return stored if isinstance(stored, np.ndarray) and stored.dtype == np.float64 else None


def write(file: pathlib.Path, level: levels.Level) -> None:
    """Writes the references of a level, if it has any."""
    if level.references is not None:
        with files.replacing(file) as out:
            np.save(out, level.references)

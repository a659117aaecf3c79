"""Stored log-probabilities of pairs: what is read again, and what is computed again."""

import types

import numpy as np
import pytest

from bilevel_jax import references
from bilevel_jax.data import levels

PAIR = types.SimpleNamespace(prompt=np.array([1, 2]), response=np.array([3]), rejected=np.array([4, 5]))
STORED = np.array([[-1.5, -2.5], [-0.25, -4.0], [-3.0, -1.0]])


def score(base, adapter, segments, description):
    return np.arange(len(segments), dtype=float), None


@pytest.fixture
def level():
    return levels.Level((), [PAIR] * 3, (), ())


def test_what_was_written_is_read(tmp_path, level):
    file = references.file_of(tmp_path, "lower")
    references.write(file, level)
    assert not file.exists()  # it has none
    references.write(file, references.complete(level, "dpo", score, None, STORED))
    again = references.complete(level, "dpo", None, None, references.read(file))  # nothing is scored
    np.testing.assert_array_equal(again.references, STORED)
    assert references.complete(again, "dpo", None, None) is again
    assert references.complete(level, "sft", None, None) is level


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"PK\x03\x04",
        b"\x93NUMPY",
        STORED[:2],
        np.where(STORED == -4, np.nan, STORED),
        STORED.astype(str),
        STORED.astype(np.float32),
    ],
    ids=["absent", "empty", "a broken archive", "cut", "of other rows", "NaN", "texts", "float32"],
)
def test_anything_else_is_computed_again(tmp_path, level, content):
    file = references.file_of(tmp_path, "upper")
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        np.save(file, content)
    done = references.complete(level, "ipo", score, None, references.read(file))
    np.testing.assert_array_equal(done.references, [[0, -1], [-2, -3], [-4, -5]])

"""Bilevel data selection and online self-refining fine-tuning of language models.

Arrays carry their axes in their names: `logits_SxV` is [S, V]. A letter means the same axis in every module, unless its
docstring gives another meaning:

    N  rows of the lower level                        L  positions of a sequence
    E  entries of a step, one per response            T  tokens of a micro-batch, S·L
    J  groups of entries: pairs, or questions         P  target slots of a micro-batch
    M  micro-batches of a step                        Z  targets of a chunk
    S  sequences side by side, or decoding slots      X  tokens of a response
    G  responses to a question                        V  vocabulary

    D  hidden width                                   Q  positions of a block of queries
    F  feed-forward width                             U  positions that a block of queries attends to
    H  query heads                                    B  blocks of a key/value cache
    K  key/value heads                                W  positions of a cache block
    R  query heads per key/value head, H/K            I, O  input and output width of a matrix
    C  width of a head                                A  features of a row that the selector reads
    Y  layers; of an adapter, those that it has

Lower-case letters are local to the function that uses them.

In Python, `select` runs a selection and `Run` opens a finished one; `score` and `sample` use a model. docs/python.md has examples.
"""

import importlib

__all__ = ["Run", "sample", "score", "select"]


def __getattr__(name: str):
    """Imports the Python interface at its first use: `import bilevel_jax` alone imports no library."""
    if name in ("Run", "select"):
        return getattr(importlib.import_module("bilevel_jax.api"), name)
    if name in ("sample", "score"):  # packages that can be called
        return importlib.import_module(f"bilevel_jax.{name}")
    raise AttributeError(f"module 'bilevel_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

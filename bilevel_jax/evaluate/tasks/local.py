"""Rows for the local task files: `$BILEVEL_JAX_DATA/bench/NAME.jsonl`, with the fields that lm-eval's own tasks read."""

import json
import os
import pathlib
import re

import datasets
from lm_eval.tasks.hellaswag import utils as official_hellaswag

from bilevel_jax.data import rows

LAST_WORDS = re.compile(r"(.*[.!?][\"')]*) ([^.!?]*)", re.DOTALL)


def load(name: str, **metadata) -> dict[str, datasets.Dataset]:
    """The file as a validation split."""
    root = os.environ.get("BILEVEL_JAX_DATA")
    if not root:
        raise rows.DataError(
            f"local_{name} needs BILEVEL_JAX_DATA, the environment variable for the directory of bench/{name}.jsonl"
        )
    file = pathlib.Path(root) / "bench" / f"{name}.jsonl"
    docs = []
    try:
        with open(file, encoding="utf-8") as lines:
            for line in lines:
                docs.append(json.loads(line))
    except OSError as error:
        raise rows.DataError(f"{file} cannot be read ({error.strerror}); it is derived from BILEVEL_JAX_DATA={root}") from error
    except ValueError as error:
        raise rows.DataError(f"{file}:{len(docs) + 1}: {error}") from error
    return {"validation": datasets.Dataset.from_list(docs)}


def boolq(dataset: datasets.Dataset) -> datasets.Dataset:
    """The answer as the index of no, yes."""
    return dataset.map(lambda doc: {"label": int(doc["answer"])})


def hellaswag(dataset: datasets.Dataset) -> datasets.Dataset:
    """Splits `ctx` into `ctx_a` and `ctx_b`, the beginning of the sentence to complete, which the official prompt capitalises."""

    def split(doc: dict) -> dict:
        match = LAST_WORDS.fullmatch(doc["ctx"])
        return dict(zip(("ctx_a", "ctx_b"), match.groups() if match else (doc["ctx"], "")))

    return official_hellaswag.process_docs(dataset.map(split))

"""`responses.jsonl`: every generated response that a run used."""

import json
import pathlib
from collections.abc import Callable, Collection, Sequence

import numpy as np

from bilevel_jax import files, importance
from bilevel_jax.online import ResponseStore


class ResponseLog:
    """Appends responses to a file when they are replaced, each with its last importance ratio.

    Args:
      file: `responses.jsonl` of a run.
      start: step at which the run starts or resumes. Responses replaced at or after it are removed, because they are written again.
      refresh_every: steps between refreshes.
    """

    def __init__(self, file: pathlib.Path, start: int, refresh_every: int):
        if file.exists():
            with open(file, "rb") as lines, files.replacing(file) as kept:
                kept.writelines(line.rstrip(b"\n") + b"\n" for line in lines if self._is_older(line, start - refresh_every))
        self._file = open(file, "a", encoding="utf-8")

    @staticmethod
    def _is_older(line: bytes, step: int) -> bool:
        try:
            return json.loads(line)["step"] < step
        except (ValueError, TypeError, KeyError, RecursionError):  # cut short by a crash, or damaged
            return False

    def write(self, store: ResponseStore, ids: Sequence[str], detokenize: Callable, eos: Collection[int]) -> None:
        """Appends a line for each response of `store`; `ids` are those of all lower-level rows."""
        columns = zip(store.row_index, store.sample_index, store.tokens, store.log_prob, store.log_ratio)
        for i, (row_index, sample_index, tokens, log_prob, log_ratio) in enumerate(columns):
            line = {
                "step": store.step,
                "id": ids[row_index],
                "sample": int(sample_index),
                "text": detokenize(tokens),
                "logprob": float(log_prob),
                "ratio": None if np.isnan(log_ratio) else float(np.exp(min(log_ratio, importance.LARGE))),
                "finish_reason": "stop" if tokens[-1] in eos else "length",
            }
            if store.reward is not None:
                line["reward"] = float(store.reward[i])
            self._file.write(files.to_json(line, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

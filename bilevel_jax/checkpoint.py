"""Saves and restores everything that a run carries from step to step.

That is the `State` (θ, ω, both optimizers, the step), the model's own responses, and a few counters. The order of the data and
all randomness are functions of (seed, step), so nothing else is needed to continue exactly.
"""

import copy
import hashlib
import pathlib
from collections.abc import Iterable

import jax
from orbax.checkpoint import v1 as ocp

from bilevel_jax import online


def fingerprint(ids: Iterable[str]) -> str:
    """Identifies a sequence of rows by their content."""
    digest = hashlib.sha256()
    for row_id in ids:
        digest.update(row_id.encode() + b"\n")
    return digest.hexdigest()[:16]


class Checkpoints:
    """The checkpoints of one run, the newest `keep` of them. Saving goes on in the background."""

    def __init__(self, directory: pathlib.Path, keep: int):
        self._checkpointer = ocp.training.Checkpointer(
            directory.resolve(),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            cleanup_tmp_directories=True,
        )

    def latest(self) -> int | None:
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def save(self, step: int, state, own: online.Own, counters: dict) -> None:
        """Starts writing; returns as soon as the arrays are copied. A step that is there already is not written again."""
        if self.latest() == step:
            return
        whole = {"state": state, "responses": own.arrays()}
        self._checkpointer.save_checkpointables_async(step, whole, custom_metadata=copy.deepcopy(counters))

    def counters(self, step: int) -> dict:
        return dict(self._checkpointer.metadata(step).custom_metadata)

    def restore(self, step: int, like) -> tuple:
        """The state of `step`, with the shapes, types and shardings of `like`, and the model's own responses."""
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        found = self._checkpointer.load_checkpointables(step, {"state": abstract, "responses": None})
        return found["state"], online.from_arrays(found["responses"])

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._checkpointer.close()

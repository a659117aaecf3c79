"""Saves and restores everything that a run carries from step to step.

That is the `State` (θ, ω, both optimizers, the step), the model's own responses, and a few counters. The order of the data and
all randomness are functions of (seed, step), so nothing else is needed to continue exactly.

Orbax commits a checkpoint by renaming its directory, so that one cut short never counts. Damage that comes later it finds in part
or not at all; `manifest.json` holds a checksum of every file, and goes into the directory before it gets its name. A checkpoint is
whole if all its files are as they were.
"""

import contextlib
import copy
import errno
import functools
import hashlib
import json
import os
import pathlib
import shutil
import time
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from bilevel_jax import online
from bilevel_jax.data import templates
from bilevel_jax.errors import RunError

MANIFEST = "manifest.json"
METADATA = "_CHECKPOINT_METADATA"  # Orbax's; the counters are in it
LATER = (MANIFEST, "commit_success.txt")  # written after the checksums; nothing is read from the latter
SETTINGS = 1 << 17  # bytes of a checkpoint beside its arrays


def fingerprint(ids: Iterable[str]) -> str:
    """Identifies a sequence of rows by their content."""
    digest = hashlib.sha256()
    for row_id in ids:
        digest.update(row_id.encode() + b"\n")
    return digest.hexdigest()[:16]


@jax.jit
def _sums(arrays: list[jax.Array]) -> list[jax.Array]:
    """A number for each array that any change of a single value changes; integers, so it is the same on every mesh."""
    found = []
    for array in arrays:
        bits = jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}").astype(jnp.uint32)
        place = jnp.zeros(array.shape, jnp.uint32)
        for axis, size in enumerate(array.shape):
            place = place * size + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        found.append((bits * (2 * place + 1)).sum(dtype=jnp.uint32))
    return found


def fingerprint_model(base, examples: Iterable[templates.Example]) -> str:
    """Identifies a base by its weights, and a tokenizer by what it makes of the rows."""
    digest = hashlib.sha256()
    arrays = jax.tree.leaves(base)
    for array, number in zip(arrays, jax.device_get(_sums(arrays)), strict=True):
        digest.update(f"{array.shape} {array.dtype} {number}\n".encode())
    for example in examples:
        for tokens in (example.prompt, example.response, example.rejected):
            if tokens is not None:
                digest.update(np.append(tokens, -1).astype("<i4").tobytes())
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------------------------------------------
# Damage
# --------------------------------------------------------------------------------------------------------------------


def _checksum(file: pathlib.Path) -> str:
    if file.name == METADATA:  # Orbax adds the time of the commit at the very end
        content = json.loads(file.read_text())
        content.pop("commit_timestamp_nsecs", None)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _settle(directory: pathlib.Path, seconds: float = 60.0) -> None:
    """Waits until Orbax's thread for metadata has written the counters, the last thing before the time of the commit.

    Raises:
      TimeoutError: it has not.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(ValueError, FileNotFoundError):  # it may be writing this very moment
            if json.loads((directory / METADATA).read_text()).get("item_handlers"):  # in one with the counters
                return
        time.sleep(0.01)
    raise TimeoutError(f"{METADATA} is not written after {seconds:g} seconds")


def sign(directory: pathlib.Path) -> None:
    """Writes the manifest of a checkpoint: a checksum of every file."""
    files = sorted(file for file in directory.rglob("*") if file.is_file() and file.name not in LATER)
    manifest = {file.relative_to(directory).as_posix(): _checksum(file) for file in files}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def damage(directory: pathlib.Path) -> str:
    """What is wrong with a checkpoint, in a few words; "" if it is whole."""
    name = MANIFEST
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        if not isinstance(manifest, dict) or not manifest:
            return f"{MANIFEST} lists no files"
        for name, expected in manifest.items():
            if _checksum(directory / name) != expected:
                return f"{name} is not what was written"
    except FileNotFoundError:
        return f"{name} is missing"
    except (OSError, ValueError, AttributeError) as error:  # the last two: no JSON, or another kind than was written
        return f"{name} cannot be read ({type(error).__name__})"
    return ""


# --------------------------------------------------------------------------------------------------------------------
# The checkpoints of a run
# --------------------------------------------------------------------------------------------------------------------


class Checkpoints:
    """The checkpoints of one run, the newest `keep` of them. Saving goes on in the background.

    Damaged ones that are newer than the newest whole one are set aside as `damaged-STEP` when the run goes on from that one.

    Raises:
      RunError: there are checkpoints, and none is whole.
    """

    def __init__(self, directory: pathlib.Path, keep: int):
        self._directory, self._keep = directory.resolve(), keep
        self._saving = self._response = self._newest = None
        self._damaged: dict[int, str] = {}
        found = (int(entry.name) for entry in self._directory.glob("*") if entry.name.isdecimal() and entry.is_dir())
        for step in sorted(found, reverse=True):
            reason = damage(self._directory / str(step))
            if not reason:
                self._newest = step
                break
            self._damaged[step] = reason
        if self._damaged and self._newest is None:
            reasons = "; ".join(f"{step}: {reason}" for step, reason in self._damaged.items())
            raise RunError(f"{directory}: no checkpoint is whole ({reasons}); put one back, or start anew in another --workdir")

    @functools.cached_property
    def _checkpointer(self) -> ocp.training.Checkpointer:
        if jax.process_index() == 0:
            for step, reason in self._damaged.items():
                self._set_aside(step, reason)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        context = ocp.Context()
        context.asynchronous.post_finalization_callback = lambda: self._sign()  # Orbax copies it: of a method, all of `self`
        return ocp.training.Checkpointer(
            self._directory,
            context=context,
            preservation_policy=ocp.training.preservation_policies.LatestN(self._keep),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            cleanup_tmp_directories=True,
        )

    def _set_aside(self, step: int, reason: str) -> None:
        place, number = self._directory / str(step), 0
        while (aside := self._directory / f"damaged-{step}{f'.{number}' if number else ''}").exists():
            number += 1
        place.rename(aside)
        print(f"{place} is damaged ({reason}): set aside as {aside.name}; step {self._newest} is used")

    def _sign(self) -> None:
        """Called in the background, by the first process, when all files are written; the directory gets its name after that."""
        (unnamed,) = self._directory.glob(f"{self._saving}.orbax-checkpoint-tmp*")
        _settle(unnamed)
        sign(unnamed)

    @contextlib.contextmanager
    def _telling(self):
        try:
            yield
        except Exception as error:  # Orbax and its storage raise errors of every family; all mean that nothing was saved
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            what = f"{self._directory / str(self._saving)}: the checkpoint could not be written ({reason:.200})"
            raise RunError(f"{what}; the one before it is whole, and the same command continues from there") from error

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self._newest

    def save(self, step: int, state, own: online.ResponseStore, counters: dict) -> None:
        """Starts writing; returns as soon as the arrays are copied. A step that is there already is not written again.

        Raises:
          RunError: this one or the one before it could not be written.
        """
        if self._newest == step:
            return
        whole = {"state": state, "responses": own.arrays()}
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(whole)) + SETTINGS
        with self._telling():
            if self._response:
                self._response.result()
            self._saving = step
            checkpointer, free = self._checkpointer, shutil.disk_usage(self._directory).free
            if needed > free:  # met while writing, Orbax's threads would fill the screen
                raise OSError(f"{os.strerror(errno.ENOSPC)}: it takes {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free")
            self._response = checkpointer.save_checkpointables_async(step, whole, custom_metadata=copy.deepcopy(counters))
        self._newest = step

    def counters(self, step: int) -> dict:
        return json.loads((self._directory / str(step) / METADATA).read_text())["custom_metadata"]

    def restore(self, step: int, like) -> tuple:
        """The state of `step`, with the shapes, types and shardings of `like`, and the model's own responses."""
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        found = self._checkpointer.load_checkpointables(step, {"state": abstract, "responses": None})
        return found["state"], online.from_arrays(found["responses"])

    def close(self) -> None:
        """Waits until everything is on disk.

        Raises:
          RunError: the last one could not be written.
        """
        if "_checkpointer" in vars(self):
            with self._telling():
                self._checkpointer.close()

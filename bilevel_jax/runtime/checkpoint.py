"""Saves and restores everything that a run carries from step to step.

A checkpoint holds the `State` (θ, ω, both optimizers, the step), the generated responses and a few counters. Data order and
randomness are functions of (seed, step), so nothing else is needed to continue with the same bits.

Orbax commits a checkpoint by renaming its directory, so an interrupted save never counts. It detects only part of the damage that
happens later. `manifest.json` therefore holds a checksum of every file, and is written before the rename. A checkpoint is intact if
all its files match their checksums.
"""

import concurrent.futures
import contextlib
import copy
import errno
import functools
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import time
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from bilevel_jax import errors, files, online
from bilevel_jax.data import templates
from bilevel_jax.data.prepared.sequences import StoredExamples
from bilevel_jax.errors import RunError
from bilevel_jax.text import say

MANIFEST = "manifest.json"
METADATA = "_CHECKPOINT_METADATA"  # written by Orbax; contains the counters
NOT_IN_MANIFEST = (MANIFEST, "commit_success.txt")  # written after the checksums; the second has no content that is read
OVERHEAD = 1 << 17  # bytes of a checkpoint in addition to its arrays
METADATA_TIMEOUT = 60.0  # seconds
BEST = {"loss", "step", "stale"}  # the counters of `early_stopping.Best`
CHUNK = 4096  # rows of which the digest takes the bytes at once


def num_bytes(state) -> int:
    """The most bytes that a checkpoint of a tree of arrays takes."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + OVERHEAD


def fingerprint(ids: Iterable[str]) -> str:
    """Identifies a sequence of rows by their content."""
    digest, ids = hashlib.sha256(), iter(ids)
    while chunk := list(itertools.islice(ids, CHUNK)):
        digest.update("\n".join([*chunk, ""]).encode())
    return digest.hexdigest()[:16]


@jax.jit
def _array_checksums(arrays: list[jax.Array]) -> list[jax.Array]:
    """A uint32 for each array that changes if any single value changes. Integer sums are the same on every mesh."""
    checksums = []
    for array in arrays:
        array = array.astype(jnp.uint8) if array.dtype == jnp.uint4 else array
        bits = jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}").astype(jnp.uint32)
        flat_index = jnp.zeros(array.shape, jnp.uint32)
        for axis, size in enumerate(array.shape):
            flat_index = flat_index * size + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        checksums.append((bits * (2 * flat_index + 1)).sum(dtype=jnp.uint32))
    return checksums


def fingerprint_model(base, *examples: Iterable[templates.Example]) -> str:
    """Identifies a base model by its weights, and a tokenizer by the tokens of the rows."""
    digest = hashlib.sha256()
    arrays = jax.tree.leaves(base)
    for array, checksum in zip(arrays, jax.device_get(_array_checksums(arrays)), strict=True):
        digest.update(f"{array.shape} {array.dtype} {checksum}\n".encode())
    for some in examples:
        blocks = some.token_blocks() if isinstance(some, StoredExamples) else (example.token_bytes for example in some)
        for block in blocks:
            digest.update(block)
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------------------------------------------
# Damage
# --------------------------------------------------------------------------------------------------------------------


def _is_step(name: str) -> bool:
    return name.isdecimal() and name == str(int(name))


def _checksum(path: pathlib.Path) -> str:
    files.check_regular(path)
    if path.name == METADATA:  # Orbax adds the commit time after the manifest is written
        content = json.loads(path.read_text())
        content.pop("commit_timestamp_nsecs", None)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _wait_for_metadata(directory: pathlib.Path, seconds: float = METADATA_TIMEOUT) -> None:
    """Waits until Orbax's background thread has written the counters. Only the commit time is written after them.

    Raises:
      TimeoutError: they are not written after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(ValueError, FileNotFoundError):  # the file may be half written
            if json.loads((directory / METADATA).read_text()).get("item_handlers"):  # written together with the counters
                return
        time.sleep(0.01)
    raise TimeoutError(f"{METADATA} is not written after {seconds:g} seconds")


def write_manifest(directory: pathlib.Path) -> None:
    """Writes the checksum of every file of a checkpoint into `manifest.json`."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.name not in NOT_IN_MANIFEST)
    manifest = {path.relative_to(directory).as_posix(): _checksum(path) for path in paths}
    (directory / MANIFEST).write_text(files.to_json(manifest, indent=1) + "\n")


def damage(directory: pathlib.Path) -> str:
    """Describes the first damage of a checkpoint in a few words; "" if the checkpoint is intact.

    A checkpoint under the name of another step is damaged: its state and its number do not belong together.
    """
    name = MANIFEST
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        if not isinstance(manifest, dict) or not manifest:
            return f"{MANIFEST} lists no files"
        for name, expected in manifest.items():
            if _checksum(directory / name) != expected:
                return f"{name} does not match its checksum"
        name, counters = METADATA, _counters(directory)
        _check_types(counters)
        step = counters.get("step", int(directory.name))  # earlier versions wrote no step
        if str(step) != directory.name:
            return f"it is that of step {step}"
    except FileNotFoundError:
        return f"{name} is missing"
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:  # all but OSError: invalid JSON, or other JSON
        return f"{name} cannot be read ({type(error).__name__})"
    return ""


def _check_types(counters: dict) -> None:
    """Raises a TypeError if a counter has another type than `train` gives it."""
    if not isinstance(counters, dict) or not isinstance(counters.get("config", {}), dict):
        raise TypeError("not an object")
    for key in ("seconds", "at_start", "refreshed", "best"):
        numbers = counters.get(key, {})
        if not isinstance(numbers, dict) or not all(isinstance(value, (int, float)) for value in numbers.values()):
            raise TypeError(key)
    if "best" in counters and counters["best"].keys() != BEST:
        raise TypeError("best")
    if not isinstance(counters.get("num_steps", 0), int):
        raise TypeError("num_steps")


def _counters(directory: pathlib.Path) -> dict:
    return json.loads((directory / METADATA).read_text())["custom_metadata"]


# --------------------------------------------------------------------------------------------------------------------
# The checkpoints of a run
# --------------------------------------------------------------------------------------------------------------------


class Checkpoints:
    """The newest `keep` checkpoints of one run. Saving continues in the background.

    If the newest checkpoints are damaged, the run continues from the newest intact one, and the damaged ones are renamed to
    `damaged-STEP`.

    Raises:
      RunError: there are checkpoints, and all are damaged.
    """

    def __init__(self, directory: pathlib.Path, keep: int):
        self._directory, self._keep = directory.resolve(), keep
        self._saving_step: int | None = None
        self._response: ocp.AsyncResponse | concurrent.futures.Future | None = None  # of the save in progress
        self._worker = concurrent.futures.ThreadPoolExecutor(1)
        self._newest: int | None = None  # intact, or being written
        self._written: int | None = None  # the newest one that is completely written
        self._damaged: dict[int, str] = {}  # step -> description; steps after the newest intact one
        steps = [int(entry.name) for entry in self._directory.glob("*") if _is_step(entry.name) and entry.is_dir()]
        for step in sorted(steps, reverse=True):
            reason = damage(self._directory / str(step))
            if not reason:
                self._newest = self._written = step
                break
            self._damaged[step] = reason
        if self._damaged and self._newest is None:
            reasons = "; ".join(f"{step}: {reason}" for step, reason in self._damaged.items())
            raise RunError(f"{directory}: no checkpoint is intact ({reasons}); restore one, or start again in another --workdir")

    @functools.cached_property
    def _checkpointer(self) -> ocp.training.Checkpointer:
        if jax.process_index() == 0:
            for step, reason in self._damaged.items():
                self._set_aside(step, reason)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        context = ocp.Context()
        # A lambda: Orbax copies the callback, and a bound method would make it copy all of `self`.
        context.asynchronous.post_finalization_callback = lambda: self._finalize()
        return ocp.training.Checkpointer(
            self._directory,
            context=context,
            preservation_policy=ocp.training.preservation_policies.LatestN(self._keep),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            cleanup_tmp_directories=True,
        )

    def _set_aside(self, step: int, reason: str) -> None:
        path, number = self._directory / str(step), 0
        while (target := self._directory / f"damaged-{step}{f'.{number}' if number else ''}").exists():
            number += 1
        path.rename(target)
        say(f"{path} is damaged ({reason}): renamed to {target.name}; step {self._newest} is used")

    def _finalize(self) -> None:
        """Writes the manifest. Orbax calls it in the background in the first process, after all files and before the rename."""
        (temporary,) = self._directory.glob(f"{self._saving_step}.orbax-checkpoint-tmp*")
        _wait_for_metadata(temporary)
        write_manifest(temporary)

    @contextlib.contextmanager
    def _save_errors(self):
        """Turns errors of Orbax and its storage, which have many types, into one line."""
        try:
            yield
        except Exception as error:
            reason = errors.first_line(error)
            what = f"{self._directory / str(self._saving_step)}: the checkpoint could not be written ({reason:.200})"
            if self._written is None:
                raise RunError(f"{what}; there is no earlier one, so the same command starts from step 0") from error
            raise RunError(f"{what}; that of step {self._written} is intact, and the same command continues from there") from error

    def latest(self) -> int | None:
        """The step of the newest intact checkpoint."""
        return self._newest

    def save(self, step: int, state, store: online.ResponseStore, counters: dict, best=None) -> None:
        """Starts to write a checkpoint, and returns before it is written. A step that is already saved is skipped.

        Args:
          step: the number of steps taken.
          state: a tree of arrays. It is copied, because the next step donates its buffers.
          store: the generated responses in use.
          counters: a JSON object.
          best: the adapter of `early_stopping.Best`, if the run keeps it.

        Raises:
          RunError: this checkpoint or the previous one could not be written.
        """
        if self._newest == step:
            return
        tree = {"state": jax.tree.map(jnp.copy, state), "responses": store.arrays()} | ({} if best is None else {"best": best})
        needed = num_bytes(tree)
        with self._save_errors():
            if self._response:
                self._response.result()
                self._written = self._saving_step
            self._saving_step = step
            checkpointer, free = self._checkpointer, shutil.disk_usage(self._directory).free
            if needed > free:  # checked here because Orbax's threads print long tracebacks if the disk fills while they write
                raise OSError(f"{os.strerror(errno.ENOSPC)}: {needed / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free")
            start = functools.partial(checkpointer.save_checkpointables_async, step, tree, custom_metadata=copy.deepcopy(counters))
            # Orbax makes directories and plans its files before it returns, which would hold up the loop. Several processes wait
            # for each other meanwhile, in the order of their steps, so that there only the writing is in the background.
            self._response = start() if jax.process_count() > 1 else self._worker.submit(lambda: start().result())
        self._newest = step

    def counters(self, step: int) -> dict:
        """The counters that were saved at `step`."""
        return _counters(self._directory / str(step))

    def restore(self, step: int, like, keeps_best: bool = False) -> tuple:
        """Reads a checkpoint.

        Args:
          step: of the checkpoint.
          like: a state with the shapes, dtypes and shardings to restore.
          keeps_best: whether the run keeps the adapter of the lowest trusted loss.

        Returns:
          The state, the response store, and that adapter or None.

        Raises:
          RunError: the checkpoint has other arrays, as those of another version of the package may.
        """
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        wanted = {"state": abstract, "responses": None} | ({"best": abstract.policy.adapter} if keeps_best else {})
        try:
            tree = self._checkpointer.load_checkpointables(step, wanted)
        except Exception as error:  # its files are intact; Orbax has many types for arrays of other names and shapes
            reason = " ".join(str(error.__cause__ or error).split())
            raise RunError(
                f"{self._directory / str(step)}: this version of the package does not read it ({reason:.120}); continue with the "
                "version that wrote it, or start again in another --workdir"
            ) from error
        return tree["state"], online.from_arrays(tree["responses"]), tree.get("best")

    def close(self) -> None:
        """Waits until everything is on disk.

        Raises:
          RunError: the last checkpoint could not be written.
        """
        if "_checkpointer" in vars(self):  # created on first use
            with self._save_errors():
                try:
                    if self._response:
                        self._response.result()  # also ends its thread, which nothing else does
                finally:
                    self._worker.shutdown()
                    self._checkpointer.close()

"""The directory of a run: lock, config, and errors of writing."""

import contextlib
import errno
import fcntl
import fnmatch
import glob
import json
import os
import pathlib
import platform
import stat
import sys
from collections.abc import Sequence
from typing import IO

import ml_collections

from bilevel_jax import files, text
from bilevel_jax.errors import RunError
from bilevel_jax.runtime import disk, stored
from bilevel_jax.text import say

LOCK = ".lock"
OPENED = (  # what a run opens in its workdir; other files are replaced, which follows no link
    *("metrics.jsonl", "responses.jsonl", "adapter", "adapters", "checkpoints", "inputs", "profile", "tensorboard", "wandb"),
    *("cache", "weights"),
)
NO_RESULT = ("data.cache", "log.profile", "mesh.*", "model.cache_frozen")  # keys that change nothing that a finished run leaves
# Keys that may change when a run is resumed.
RESUMABLE = ("checkpoint.*", "data.cache", "eval.keep", "log.*", "mesh.*", "model.cache_frozen")
PATHS = ("model.path", "data.upper", "data.lower", "online.reward", "selection.init", "lora.init")
REWARDS = ("truth", "likelihood")  # values that are no paths, whatever files there are
PREFIXES = ("recipe:", "synthetic:", "column:", "bilevel_jax/tiny")  # the same, of such values
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


@contextlib.contextmanager
def open_workdir(config: ml_collections.ConfigDict, workdir: pathlib.Path, lock: bool = True):
    """Creates the workdir, or accepts an unfinished run of the same config in it, and locks it.

    Args:
      config: of the run.
      workdir: its directory.
      lock: False if another process of the same run holds the lock.

    Raises:
      RunError: the run in the workdir is finished, has another config, or is still running; or a file cannot be written.
    """
    refuse_finished(workdir)
    for path in (workdir, *workdir.parents):
        if os.path.lexists(path) and not path.is_dir():
            raise RunError(f"--workdir={workdir}: {path} is not a directory; give another --workdir")
    with _write_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        with locked(workdir) if lock else contextlib.nullcontext():
            refuse_finished(workdir)  # the other process may have finished it before the lock was released
            refuse_another(config, workdir, resumes=True)
            refuse_links(workdir)
            yield


@contextlib.contextmanager
def locked(workdir: pathlib.Path):
    """Locks a workdir. The kernel releases the lock when this process ends for any reason.

    Locked are the directory and the file `.lock` in it: without the first, another process could remove the file and lock a new
    one; network file systems may have no lock for a directory.

    Raises:
      RunError: another process holds the lock, or `.lock` is a link.
    """
    with contextlib.ExitStack() as stack:
        directory = os.open(workdir, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, directory)
        file = stack.enter_context(_open_lock(workdir / LOCK))
        try:
            reasons = [_lock(directory), _lock(file.fileno())]
        except BlockingIOError:
            owner = f"process {text.one_line(file.read(200), 80) or 'of another user'}"
            raise RunError(f"{workdir} is in use by {owner}; wait until it ends, or give another --workdir") from None
        if all(reasons):
            say(f"{workdir} cannot be locked ({reasons[-1]}): make sure that no other process uses it", file=sys.stderr)
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()
        yield


def _open_lock(path: pathlib.Path) -> IO[str]:
    """Opens the lock file of a workdir, and follows no link: the owner's name is written into it."""
    _refuse_link(path)
    return open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+", encoding="utf-8", errors="replace")


def _lock(descriptor: int) -> str:
    """Locks a file or directory. Returns why the file system has no locks for it; "" if it has.

    Raises:
      BlockingIOError: another process holds the lock.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:  # of some network file systems
        return error.strerror or str(error)
    return ""


def refuse_links(workdir: pathlib.Path) -> None:
    """Refuses a workdir in which a run would write somewhere else, because what it opens there is a link, a pipe or a device.

    Raises:
      RunError: names the entry.
    """
    for name in OPENED:
        path = workdir / name
        _refuse_link(path)
        for entry in path.rglob("*") if path.is_dir() and name != "wandb" else ():  # wandb makes links of its own
            _refuse_link(entry)


def _refuse_link(path: pathlib.Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            what = "a symbolic link" if stat.S_ISLNK(mode) else "not a regular file"
            raise RunError(f"{path} is {what}, into which a run would write; remove it, or give another --workdir")


@contextlib.contextmanager
def _write_errors(workdir: pathlib.Path):
    """Turns errors of writing into the workdir into one line that says what to do."""
    try:
        yield
    except OSError as error:
        path = pathlib.Path(error.filename or workdir).absolute()
        concerns_workdir = path.is_relative_to(workdir.absolute()) or workdir.absolute().is_relative_to(path)
        if error.errno not in WRITE_ERRORS or not concerns_workdir:
            raise
        what = f"{workdir}: {f'{error.filename}: ' if error.filename else ''}{error.strerror}"
        if disk.num_saved(workdir):
            remedy = "saved files are kept, and the same command continues when files can be written again"
        else:
            remedy = "there is no checkpoint yet, so the same command starts from step 0 when files can be written again"
        raise RunError(f"{what}; {remedy}") from error


def refuse_finished(workdir: pathlib.Path) -> None:
    """Raises a RunError if the run in the workdir is finished."""
    if (workdir / "summary.json").exists():
        raise RunError(f"{workdir} holds a finished run; give another --workdir, or remove it to run again")


def refuse_another(config: ml_collections.ConfigDict, workdir: pathlib.Path, resumes: bool = False) -> None:
    """Refuses a workdir that holds a run of another config. Paths are compared as absolute ones.

    Args:
      config: of the run that wants the workdir.
      workdir: its directory.
      resumes: an unfinished run goes on with this config, so the keys of `RESUMABLE` may differ, and `num_epochs` may be larger,
        except where earlier steps depend on it: with a schedule of the learning rate or `selection.rule=metagradient`. Otherwise
        only the keys of `NO_RESULT` may differ.

    Raises:
      RunError: one line with the keys that differ, and those that may.
    """
    file = workdir / "config.json"
    if file.exists():
        refuse_other_settings(_flatten(config), _flatten(_read_config_file(file)), str(workdir), resumes)


def settings(config: ml_collections.ConfigDict) -> dict:
    """All keys of a config with their values, its paths absolute. Every checkpoint stores them."""
    return _flatten(ml_collections.ConfigDict(json.loads(config_json(config))))


def fixed_settings(values: dict) -> dict:
    """Those of `settings` that no continued run may change."""
    return _without(values, RESUMABLE)


def _without(values: dict, patterns: Sequence[str]) -> dict:
    """The settings whose keys match none of the patterns."""
    return {key: value for key, value in values.items() if not any(fnmatch.fnmatch(key, pattern) for pattern in patterns)}


def refuse_other_settings(now: dict, there: dict, what: str, resumes: bool) -> None:
    """`refuse_another` for the settings of two configs; `what` names the workdir or the checkpoint that holds those `there`."""
    compared = _without(now | there, RESUMABLE if resumes else NO_RESULT)
    different = sorted(key for key in compared if not _equal(key, there.get(key), now.get(key)))
    if resumes and different == ["num_epochs"] and _may_grow(now, there):
        return
    if different:
        changes = ", ".join(f"{key}: {there.get(key)!r} there, {now.get(key)!r} now" for key in different)
        hint = f" (only {', '.join(RESUMABLE)} may change, and num_epochs may grow with a constant rate)" if resumes else ""
        raise RunError(f"{what} holds a run of another config ({changes}); give another --workdir{hint}")


def _may_grow(now: dict, there: dict) -> bool:
    """Whether a run may go on with another number of epochs: the steps so far are the same ones."""
    before, after = there.get("num_epochs"), now["num_epochs"]
    whole_runs = now["method"] != "mixing" and now["selection.rule"] == "metagradient"
    same_rates = now["optimizer.schedule"] == "constant" and not 0 < now["optimizer.warmup"] < 1
    return isinstance(before, int) and after > before and same_rates and not whole_runs


def _equal(key: str, there, now) -> bool:
    if key not in PATHS:
        return there == now
    is_gone = isinstance(now, str) and there == os.path.abspath(now)  # reading it fails later, with a better message
    return absolute(there) == absolute(now) or is_gone


def absolute(value):
    """A source of rows or a directory by its absolute path; names of the hub, of recipes and the like as they are.

    Args:
      value: a path, a pattern, several of them separated by commas, or a sequence of them.
    """
    if isinstance(value, (list, tuple)):
        return [absolute(part) for part in value]
    if not isinstance(value, str) or not value or value in REWARDS or value.startswith(PREFIXES):
        return value
    folder, colon, split = value.rpartition(":")
    if os.path.exists(value) or _matches(value):
        return os.path.abspath(value)
    if colon and os.path.isdir(folder):  # a split of a saved data set
        return f"{os.path.abspath(folder)}:{split}"
    return ",".join(absolute(part.strip()) for part in value.split(",")) if "," in value else value


def _matches(pattern: str) -> bool:
    """Whether a file matches a pattern."""
    try:
        return any(glob.iglob(pattern, recursive=True))
    except ValueError:  # a NUL or half a surrogate pair, which no file name has
        return False


def config_json(config: ml_collections.ConfigDict) -> str:
    """The content of `config.json`. Its paths are absolute, so that commands find them from any directory."""
    resolved = config.copy_and_resolve_references()
    with resolved.ignore_type():
        for key in PATHS:
            section, _, name = key.partition(".")
            resolved[section][name] = absolute(resolved[section][name])
    return resolved.to_json(indent=2, sort_keys=True) + "\n"


def _read_config_file(file: pathlib.Path) -> ml_collections.ConfigDict:
    content = files.read_json(file)
    try:
        return ml_collections.ConfigDict(content)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(f"{file} is not a config ({error}); put it back, or give another --workdir") from error


def read_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """The resolved config of the run in a workdir, finished or not, with those of `stored.EARLIER` that it lacks.

    Raises:
      FileNotFoundError: the workdir holds no run.
      RunError: a key that commands read is missing or invalid.
    """
    file = workdir / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{workdir} holds no run (config.json is missing)")
    config = _read_config_file(file)
    stored.check_config(config, file)
    stored.complete_config(config)
    return config


def read_finished(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """The resolved config of the finished run in a workdir.

    Raises:
      FileNotFoundError: the workdir holds no finished run.
    """
    if not (workdir / "summary.json").exists():
        raise FileNotFoundError(f"{workdir} holds no finished run (summary.json is missing)")
    return read_config(workdir)


def learned(workdir: pathlib.Path, config) -> tuple[str, pathlib.Path | None]:
    """Model and adapter that a finished run leaves: its base with adapter/, or model/ alone where all weights were learned."""
    return (config.model.path, workdir / "adapter") if config.lora.rank else (str(workdir / "model"), None)


def _flatten(config, prefix: str = "") -> dict:
    flat: dict = {}
    for key, value in config.items():
        inner = isinstance(value, ml_collections.ConfigDict)
        flat |= _flatten(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return flat

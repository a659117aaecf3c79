"""The directory of a run: whose it is, whole files, and what ends a run before its time."""

import contextlib
import errno
import fcntl
import os
import pathlib
import platform
import sys

import ml_collections

from bilevel_jax import files
from bilevel_jax.errors import RunError

LOCK = ".lock"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


@contextlib.contextmanager
def open_workdir(config: ml_collections.ConfigDict, workdir: pathlib.Path, lock: bool = True):
    """Makes the workdir, or recognises an unfinished run of the same config in it, and keeps other processes out meanwhile.

    Args:
      lock: false where another process of the same run has the lock.

    Raises:
      RunError: the run there is finished, is another one, or goes on in another process; or, at any time, what is to be written
        cannot be.
    """
    refuse_finished(workdir)
    with _writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        with locked(workdir) if lock else contextlib.nullcontext():
            refuse_finished(workdir)  # it may have ended a moment ago
            refuse_another(config, workdir)
            yield


@contextlib.contextmanager
def locked(workdir: pathlib.Path):
    """Keeps other processes out of a workdir. The kernel lets go of it when this one ends, however it does.

    Raises:
      RunError: one is in there.
    """
    with open(workdir / LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = f"process {file.read().strip() or 'of another user'}"
            raise RunError(f"{workdir} is in use by {who}; wait until it ends, or give another --workdir") from None
        except OSError as error:  # some network file systems lock nothing
            print(f"{workdir} cannot be locked ({error.strerror}): see to it that no other process works on it", file=sys.stderr)
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()
        yield


@contextlib.contextmanager
def _writing(workdir: pathlib.Path):
    """Names the workdir, and what to do, where a file cannot be written."""
    try:
        yield
    except OSError as error:
        place = pathlib.Path(error.filename or workdir).absolute()
        mine = place.is_relative_to(workdir.absolute()) or workdir.absolute().is_relative_to(place)
        if error.errno not in NO_ROOM or not mine:
            raise
        what = f"{workdir}: {f'{error.filename}: ' if error.filename else ''}{error.strerror}"
        raise RunError(f"{what}; what is saved stays: once files can be written, the same command continues") from error


def refuse_finished(workdir: pathlib.Path) -> None:
    if (workdir / "summary.json").exists():
        raise RunError(f"{workdir} holds a finished run; give another --workdir, or remove it to run again")


def refuse_another(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Nothing, if the workdir holds no run or one of the same config. Mesh and profile may differ: they change no result.

    Raises:
      RunError: the run there is another one.
    """
    file = workdir / "config.json"
    if not file.exists():
        return
    earlier = _config_of(file)
    mine, theirs = _flatten(config), _flatten(earlier)
    said = {key for key in mine | theirs if not key.startswith(("mesh.", "log.profile"))}
    differs = sorted(key for key in said if mine.get(key) != theirs.get(key))
    changes = ", ".join(f"{key}: {theirs.get(key)!r} there, {mine.get(key)!r} now" for key in differs)
    if differs:
        raise RunError(f"{workdir} holds a run of another config ({changes}); give another --workdir")


def _config_of(file: pathlib.Path) -> ml_collections.ConfigDict:
    content = files.read_json(file)
    try:
        return ml_collections.ConfigDict(content)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(f"{file} is not a config ({error}); put it back, or give another --workdir") from error


def read_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """The resolved config of the run in a workdir, finished or not.

    Raises:
      FileNotFoundError: if there is none.
    """
    file = workdir / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{workdir} holds no run (config.json is missing)")
    return _config_of(file)


def read_finished(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """The same of a finished run.

    Raises:
      FileNotFoundError: if it is not, or there is none.
    """
    if not (workdir / "summary.json").exists():
        raise FileNotFoundError(f"{workdir} holds no finished run (summary.json is missing)")
    return read_config(workdir)


def _flatten(config, prefix: str = "") -> dict:
    flat = {}
    for key, value in config.items():
        inner = isinstance(value, ml_collections.ConfigDict)
        flat |= _flatten(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return flat

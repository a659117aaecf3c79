"""The directory of a run: whose it is, whole files, and what ends a run before its time."""

import contextlib
import json
import os
import pathlib
import signal

import ml_collections

REMEDY = "the last checkpoint is from before. Lower the learning rates, or look at the rows"


class RunError(RuntimeError):
    """A run that cannot start or go on; the message is one line with the cause and what to do."""


class Interrupted(Exception):
    """SIGTERM or SIGINT arrived; everything is saved and the same command continues."""


def open_workdir(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Makes the workdir, or recognises an unfinished run of the same config in it.

    Raises:
      RunError: the run there is finished, or is another one.
    """
    if (workdir / "summary.json").exists():
        raise RunError(f"{workdir} holds a finished run; give another --workdir, or remove it to run again")
    workdir.mkdir(parents=True, exist_ok=True)
    refuse_another(config, workdir)


def refuse_another(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Nothing, if the workdir holds no run or one of the same config.

    Raises:
      RunError: the run there is another one.
    """
    file = workdir / "config.json"
    if not file.exists():
        return
    try:
        earlier = ml_collections.ConfigDict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise RunError(f"{file} is not a config ({error}); give another --workdir") from error
    mine, theirs = _flatten(config), _flatten(earlier)
    differs = sorted(key for key in mine | theirs if mine.get(key) != theirs.get(key))
    changes = ", ".join(f"{key}: {theirs.get(key)!r} there, {mine.get(key)!r} now" for key in differs)
    if differs:
        raise RunError(f"{workdir} holds a run of another config ({changes}); give another --workdir")


def read_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """The resolved config of the run in a workdir, finished or not.

    Raises:
      FileNotFoundError: if there is none.
    """
    file = workdir / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{workdir} holds no run (config.json is missing)")
    return ml_collections.ConfigDict(json.loads(file.read_text()))


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


def write_atomically(file: pathlib.Path, text: str) -> None:
    """All of `text` or, if the process dies, what was there before."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


@contextlib.contextmanager
def noticing_signals():
    """Yields a list to which SIGTERM and SIGINT are appended instead of ending the process."""
    seen: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in handlers:
        signal.signal(number, lambda number, frame: seen.append(number))
    try:
        yield seen
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

"""Atomic writes, JSON without NaN, and reading of files that other people may have prepared."""

import contextlib
import fcntl
import functools
import glob
import json
import math
import os
import pathlib
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from typing import IO, Any

from bilevel_jax.errors import RunError

SUFFIX = ".tmp"  # of temporaries, which are named .NAME.RANDOM.tmp


# --------------------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------------------


def write_atomically(file: pathlib.Path, content: str | bytes) -> None:
    """Writes all of `content`, or keeps the previous file if writing fails or the process dies."""
    with replacing(file) as out:
        out.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(file: pathlib.Path) -> Iterator[IO[bytes]]:
    """Yields a new file, open for writing, which takes the place of `file` if no exception is raised.

    Its name is random and it must not exist, so a symbolic link that somebody left in the directory is never followed. A device or
    pipe, such as /dev/stdout, is written to as it is.
    """
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a directory; name a file")
    if file.exists() and not file.is_file():
        with open(file, "wb") as out:
            yield out
        return
    remove_stale(file)
    temporary, descriptor = _claim(file, lambda path: os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
    try:
        with open(descriptor, "wb") as out:  # closed after the rename: until then the lock marks it as in use
            yield out
            out.flush()
            os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)  # it would use space on a full disk
        raise


def check_out(file: pathlib.Path, flag: str) -> None:
    """Refuses, before any work, a file that could not be written at its end.

    Raises:
      OSError: one line that names the flag and the directory.
    """
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{flag}: there is no directory {file.parent}")
    if file.is_dir():
        raise IsADirectoryError(f"{flag}={file} is a directory; name a file")
    if file.exists() and not file.is_file():
        return  # a device or pipe, which is written to as it is
    try:
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise PermissionError(f"{flag}: no file can be written to {file.parent} ({error.strerror})") from error


@contextlib.contextmanager
def new_directory(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a new directory, private to the user, which takes the place of `out` if no exception is raised."""
    remove_stale(out)

    def make(path: pathlib.Path) -> int:
        path.mkdir(mode=0o700)
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)

    temporary, descriptor = _claim(out, make)
    try:
        yield temporary
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # exists only after a failure
        os.close(descriptor)


def _claim(file: pathlib.Path, make: Callable[[pathlib.Path], int]) -> tuple[pathlib.Path, int]:
    """Makes a temporary beside `file` and locks it. Returns its path and its descriptor, which holds the lock."""
    while True:
        path = file.with_name(f".{file.name}.{secrets.token_hex(8)}{SUFFIX}")
        descriptor = make(path)
        with contextlib.suppress(OSError):  # a file system without locks: `remove_stale` leaves the temporary alone
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return path, descriptor
        os.close(descriptor)  # `remove_stale` of another process was between the two calls


def remove_stale(file: pathlib.Path) -> None:
    """Removes temporaries of `file` whose process has died: nobody holds their lock."""
    for path in file.parent.glob(f".{glob.escape(file.name)}.*{SUFFIX}"):
        with contextlib.suppress(OSError):  # in use, of another user, or removed by another process
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(descriptor)


# --------------------------------------------------------------------------------------------------------------------
# JSON
# --------------------------------------------------------------------------------------------------------------------


def to_json(value: Any, **options: Any) -> str:
    """`json.dumps` with null for NaN and infinities, which JSON does not have."""
    text = _encoder(**options).encode(value)
    if "NaN" not in text and "Infinity" not in text:
        return text
    options.pop("default", None)  # it is applied
    return json.dumps(_without_nan(json.loads(text)), allow_nan=False, **options)


@functools.lru_cache(32)
def _encoder(**options: Any) -> json.JSONEncoder:
    """The encoder of `json.dumps`, which makes one at every call with options."""
    return json.JSONEncoder(**options)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(field) for key, field in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list) else value


# --------------------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------------------


def check_regular(path: str | os.PathLike) -> None:
    """Refuses pipes, devices and the like, which may have no end. A path that does not exist passes.

    Raises:
      OSError: the path is not a regular file, nor a link to one.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(f"{path}: not a regular file; write its content to a file first")


def read_json(file: pathlib.Path) -> dict:
    """Reads a JSON object from a file in a workdir.

    Raises:
      RunError: the file does not contain a JSON object.
    """
    check_regular(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RunError(f"{file} is damaged ({error}); put it back, or give another --workdir") from error
    if not isinstance(content, dict):
        raise RunError(f"{file} is damaged (a {type(content).__name__}, not an object); put it back, or give another --workdir")
    return content

"""The disk space that a run needs, and whether its workdir has it."""

import os
import pathlib
import shutil

from bilevel_jax.errors import RunError


def num_saved(workdir: pathlib.Path) -> int:
    """The number of checkpoints in a workdir."""
    return sum(entry.name.isdecimal() for entry in (workdir / "checkpoints").glob("*"))


def existing(path: pathlib.Path) -> pathlib.Path:
    """The directory, or the nearest one above it that exists."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def free_bytes(workdir: pathlib.Path) -> int:
    """The free bytes of the file system on which a workdir is, or will be."""
    return shutil.disk_usage(existing(workdir)).free


def amount(size: int) -> str:
    """A number of bytes as text."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def check(workdir: pathlib.Path, needed: int) -> None:
    """Refuses a workdir in which a run could not be written. Writes nothing.

    Raises:
      RunError: one line that names the directory, and the bytes that are needed and free.
    """
    for directory in (existing(workdir), workdir / "checkpoints", workdir / "weights"):
        if directory.exists() and not (directory.is_dir() and os.access(directory, os.W_OK | os.X_OK)):
            raise RunError(f"{directory}: no files can be written in it; change its permissions, or give another --workdir")
    free = free_bytes(workdir)
    if needed > free:
        what = f"{workdir}: {amount(needed)} are needed for checkpoints and results, {amount(free)} are free"
        raise RunError(f"{what}; free some space, lower checkpoint.keep, or give another --workdir")

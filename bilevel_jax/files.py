"""Atomic writes, and reading of JSON files with errors of one line."""

import json
import os
import pathlib

from bilevel_jax.errors import RunError


def write_atomically(file: pathlib.Path, content: str | bytes) -> None:
    """Writes all of `content`, or keeps the previous file if writing fails or the process dies."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, file)
    except OSError:
        temporary.unlink(missing_ok=True)  # it would use space on a full disk
        raise


def read_json(file: pathlib.Path) -> dict:
    """Reads a JSON object from a file in a workdir.

    Raises:
      RunError: the file does not contain a JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RunError(f"{file} is damaged ({error}); put it back, or give another --workdir") from error
    if not isinstance(content, dict):
        raise RunError(f"{file} is damaged (a {type(content).__name__}, not an object); put it back, or give another --workdir")
    return content

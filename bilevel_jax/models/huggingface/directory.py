"""Finding a model directory, and reading its JSON files."""

import json
import os
import pathlib
import stat

from bilevel_jax import errors

PACKAGE = pathlib.Path(__file__).parents[2]
MODEL_FILES = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja")  # of a hub download: no pickles


class ModelError(ValueError):
    """An invalid model or adapter directory. The message names the file, the key and the remedy."""


def locate(path: str, files: tuple[str, ...] = MODEL_FILES) -> pathlib.Path:
    """The local directory of a model, downloaded from the hub if necessary.

    Args:
      path: a directory, a directory of this package (`bilevel_jax/tiny`), or a hub id.
      files: patterns of the files to download.

    Raises:
      ModelError: no such directory, and the hub does not have it or cannot be reached.
    """
    local = pathlib.Path(path)
    if local.is_dir():
        check_regular_files(local)
        return local
    if local.exists():
        raise ModelError(f"{path} is a file; a model is a directory with config.json, safetensors and a tokenizer")
    if local.parts[:1] == (PACKAGE.name,) and (PACKAGE.parent / local).is_dir():
        return PACKAGE.parent / local
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ModelError(f"{path}: no such directory; give a model directory or a hub id such as EleutherAI/pythia-1b")
    import huggingface_hub

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(path, allow_patterns=list(files)))
    except Exception as error:  # the hub raises a dozen types, from DNS to permissions; the user sees one message
        reason = errors.first_line(error)
        raise ModelError(f"{path}: no such directory, and the hub could not be reached for it ({reason})") from error


def check_regular_files(directory: pathlib.Path) -> None:
    """Refuses a directory with a pipe, a device or the like in it, from which reading may never end.

    Raises:
      ModelError: names the file.
    """
    for entry in os.scandir(directory):
        if os.path.exists(entry) and not (entry.is_dir() or stat.S_ISREG(entry.stat().st_mode)):
            raise ModelError(f"{entry.path}: not a regular file; remove it from the model directory")


def check_inside(file: pathlib.Path, directory: pathlib.Path) -> None:
    """Refuses to copy a file that is a link out of its model directory. Links of the hub's cache are into its own `blobs`.

    Raises:
      ModelError: names the file and its target.
    """
    home, target = directory.resolve(), file.resolve()
    homes = [home, *([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])]
    if not any(target.is_relative_to(one) for one in homes):
        raise ModelError(f"{file}: a link to {target}, outside the model directory, is not copied; put the file itself there")


def read_json(file: pathlib.Path) -> dict:
    """The JSON object of a file.

    Raises:
      ModelError: the file is missing, or is not a JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{file}: missing") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: contains a {type(content).__name__}, not an object")
    return content


def positive(file: pathlib.Path, name: str, value, is_integer: bool = False):
    """A value of a JSON file, a float unless `is_integer`.

    Raises:
      ModelError: it is not a number, not positive, or not below 2^31.
    """
    is_valid = type(value) is int if is_integer else isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_valid or not 0 < value < 2**31:
        raise ModelError(f"{file}: {name} must be a positive {'integer' if is_integer else 'number'}, got {value!r:.80}")
    return value if is_integer else float(value)

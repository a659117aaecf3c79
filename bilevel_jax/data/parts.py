"""From the name of a source to its parts: lists, globs and folders become files, saved data sets and hub ids."""

import collections
import contextlib
import difflib
import glob
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from bilevel_jax.data.rejections import COMPRESSED, DataError, suffix_of

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+){0,2}")
SAVED_DATASET, SAVED_DICT = "state.json", "dataset_dict.json"  # what `datasets` writes into a folder
NOT_ROWS = ("dataset_info.json", "dataset_infos.json")
SHARD = re.compile(r"[-_.]?\d{5}-of-\d{5}")
SPLIT = re.compile(r"(?:^|[/_.-])(train|test|validation|valid|val|dev|eval)(?=[/_.\d-])")
NOT_READ = (".arrow", ".bz2", ".feather", ".lz4", ".orc", ".tar", ".tsv", ".txt", ".xlsx", ".xz", ".zip")


class Part(NamedTuple):
    """A file, a saved data set, or a hub data set."""

    path: str
    source: str  # `source` of rows that name none; "" if the parts have one name


def resolve(name: str) -> list[Part]:
    """The parts of a source, in the order in which they are read.

    Args:
      name: names separated by commas: files, globs, folders (all files in them, also in folders below), folders written by
        `datasets.save_to_disk`, and hub data sets. An existing file whose own name contains commas takes precedence.

    Raises:
      DataError: nothing matches, a part is named twice, or a folder holds several splits.
    """
    entries = [name] if os.path.lexists(name) else [entry.strip() for entry in name.split(",")]
    if len(entries) > 1 and not all(entries):
        raise DataError(f"{name}: an empty name between commas")
    paths, labels = [], []
    for entry in entries:
        for path in _matches(entry):
            files = _folder(path) if is_folder(path) else [path]
            paths += files
            labels += [path] * len(files) if len(entries) > 1 else files
    twice = [path for path, count in collections.Counter(paths).items() if count > 1]
    if twice:
        raise DataError(f"{name}: {twice[0]} is named twice")
    names = _names(labels)
    return [Part(path, source if len(set(names)) > 1 else "") for path, source in zip(paths, names)]


def paths(source: str) -> list[str]:
    """The paths of the parts of a source; none if it cannot be resolved, since its reader says why."""
    with contextlib.suppress(DataError):
        return [part.path for part in resolve(source)]
    return []


def refuse_overwriting(out: str | os.PathLike[str], flag: str, *sources: str) -> None:
    """Refuses an output that is a file of its own input, which would be replaced.

    Args:
      out: the file to write.
      flag: that names it.
      sources: what is read, as for `resolve`.

    Raises:
      DataError: one line that names flag and file.
    """
    if not os.path.exists(out):
        return
    for source in sources:
        if any(os.path.exists(path) and os.path.samefile(path, out) for path in paths(source)):
            break
    else:
        return
    raise DataError(f"{flag}={os.fspath(out)} is a file of {source}, which would be overwritten; name another file")


def is_saved(path: str) -> bool:
    """Whether `datasets.save_to_disk` wrote the folder."""
    return any(os.path.isfile(os.path.join(path, name)) for name in (SAVED_DATASET, SAVED_DICT))


def is_folder(path: str) -> bool:
    """Whether the path is a folder of files."""
    return os.path.isdir(path) and not is_saved(path)


def is_hub(path: str) -> bool:
    """Whether `path` names a hub data set: no file has that name, and it has no file suffix."""
    named_as_file = suffix_of(path) in FORMATS or path.lower().endswith(COMPRESSED)
    return not os.path.exists(path) and not named_as_file and HUB_NAME.fullmatch(path) is not None


def nearest_file(path: str) -> str:
    """` (did you mean FILE?)` for the file of the same folder with the most similar name, or an empty text."""
    folder, name = os.path.split(path)
    try:
        close = difflib.get_close_matches(name, os.listdir(folder or "."), 1)
    except (OSError, ValueError):
        return ""
    return f" (did you mean {os.path.join(folder, close[0])}?)" if close else ""


def _matches(entry: str) -> list[str]:
    if os.path.lexists(entry) or not glob.has_magic(entry):
        return [entry]
    matches = sorted(glob.glob(entry, recursive=True))
    if not matches:
        raise DataError(f"{entry}: no file matches")
    return matches


def _folder(folder: str) -> list[str]:
    """The data files in a folder and below it, sorted. Hidden files and files that are no data are left out."""
    files, unreadable = [], []
    for directory, below, names in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith((".", "_")))
        for name in sorted(names):
            path = os.path.join(directory, name)
            if name.startswith((".", "_")) or name in NOT_ROWS:
                continue
            if suffix_of(name) in FORMATS:
                files.append(path)
            elif name.lower().endswith((*NOT_READ, *COMPRESSED)):
                unreadable.append(path)
    formats = f"{', '.join(FORMATS)}, each also {' or '.join(COMPRESSED)}"
    if unreadable:
        raise DataError(f"{unreadable[0]}: unknown file type; name the other files with a glob, such as '{folder}/*.jsonl'")
    if not files:
        raise DataError(f"{folder}: a folder without data; there must be files of {formats} in it")
    splits = {match[1]: path for path in files if (match := SPLIT.search(os.path.relpath(path, folder)))}
    if len(splits) > 1 and "train" in splits:
        examples = " and ".join(map(os.path.basename, list(splits.values())[:2]))
        raise DataError(f"{folder}: files of several splits ({examples}); name those of one with a glob, such as '{folder}/train*'")
    return files


def _names(labels: Sequence[str]) -> list[str]:
    """Short names of files and folders: relative to the folder that they share, and without the numbers of shards."""
    local = {label: os.path.abspath(label) for label in labels if os.path.exists(label)}
    shared = os.path.commonpath([os.path.dirname(path) for path in local.values()]) if local else ""
    return [SHARD.sub("", os.path.relpath(local[label], shared)) if label in local else label for label in labels]

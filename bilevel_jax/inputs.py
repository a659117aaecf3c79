"""From the arguments of `api.select` to a config and a workdir: settings, rows in memory, and what an earlier run was given."""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections
import numpy as np

from bilevel_jax import checks, config_files, files, near_names
from bilevel_jax import config as configuration
from bilevel_jax.data import in_memory, parts, rows
from bilevel_jax.errors import RunError
from bilevel_jax.runtime.workdir import locked, read_config

EMBEDDED = configuration.Model().path
FOLDER = "inputs"  # in the workdir: rows that were given in memory, and digests of all rows
DIGESTS = pathlib.Path(FOLDER, "digests.json")
CONFIG = "config.json"  # in the workdir once a run has started

# --------------------------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------------------------


def configure(model: Any, settings: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """The config of a run, without its data.

    Args:
      model: a directory or hub id, None for the embedded model, or the settings of the section `model`.
      settings: keys of the config with their values: full names, or sections with their keys.

    Raises:
      ConfigError: a setting does not exist or has no valid value; one line that names it and the nearest one.
    """
    flat = dict(_flatten(settings))
    if isinstance(model, Mapping):
        flat |= dict(_flatten({"model": model}))
    elif model is not None:
        if "model.path" in flat:
            raise configuration.ConfigError(f"model={str(model)!r} and model.path={flat['model.path']!r}: give one of them")
        flat["model.path"] = EMBEDDED if str(model) == EMBEDDED else _absolute(model)
    embedded = flat.get("model.path", EMBEDDED) == EMBEDDED
    config = config_files.load("finetune:tiny" if embedded else "finetune")
    known = checks.keys(config)
    for key, value in flat.items():
        if isinstance(config.get(key), ml_collections.ConfigDict):
            raise configuration.ConfigError(f"{key} is a section; give {key}={{...}} with keys {', '.join(config[key])}")
        if key in ("data.upper", "data.lower"):
            raise configuration.ConfigError(f"{key} is set by the argument {key.removeprefix('data.')}")
        if key not in known:
            raise configuration.ConfigError(f"there is no setting {key}{near_names.hint(key, known)}")
        section, _, name = key.rpartition(".")
        target = config[section] if section else config
        with target.ignore_type():  # `checks.build` refuses wrong types, in one line
            value = value.item() if isinstance(value, np.generic) else value  # NumPy's numbers, as of a loop over `arange`
            target[name] = os.fspath(value) if isinstance(value, os.PathLike) else value
    config.data.upper = config.data.lower = "rows"  # until `stored`
    checks.build(config)
    return config


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _absolute(path: Any) -> str:
    """The absolute path of a file or directory that exists; another name, such as a hub id, as it is."""
    path = os.fspath(path)
    return os.path.abspath(path) if os.path.exists(path) else path


# --------------------------------------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GivenRows:
    """The rows of a level."""

    source: str  # the name of a source; a temporary file for rows in memory
    digest: str  # of its rows, from `_digest`
    in_memory: bool


@contextlib.contextmanager
def read(given: Mapping[str, Any]):
    """Yields `GivenRows` for each of the given sources or rows; rows in memory are in temporary files meanwhile.

    Raises:
      DataError: what is given for a level are no rows.
    """
    with tempfile.TemporaryDirectory() as scratch:
        levels = {}
        for name, source in given.items():
            if in_memory.is_source(source):
                names = source if isinstance(source, (list, tuple)) else [source]
                path = in_memory.source_name([_absolute(one) for one in names])
                levels[name] = GivenRows(path, _digest(path), in_memory=False)
                continue
            file = pathlib.Path(scratch, f"{name}.jsonl")
            try:
                in_memory.write_jsonl(source, file)
            except rows.DataError as error:
                raise rows.DataError(f"{name}: {error}") from error
            levels[name] = GivenRows(str(file), _digest(str(file)), in_memory=True)
        yield levels


def _digest(source: str) -> str:
    """SHA-256 of the contents of the files of a source and, where it is not one file, of its name."""
    total = hashlib.sha256(source.encode() if not os.path.isfile(source) else b"")
    for path in parts.paths(source):
        _add_files(total, path if os.path.exists(path) else path.rpartition(":")[0])  # path:split, of a saved data set
    return total.hexdigest()


def _add_files(total, path: str) -> None:
    """Adds the contents of a file, or of all files in a folder, to a hash."""
    inside = sorted(map(str, pathlib.Path(path).rglob("*"))) if os.path.isdir(path) else [path]
    for file in filter(os.path.isfile, inside):
        with open(file, "rb") as content:
            total.update(hashlib.file_digest(content, "sha256").digest())


def _start_digest(path: str) -> str:
    """SHA-256 of an adapter, a table of weights, or the tables of a run."""
    total, tables = hashlib.sha256(), os.path.join(path, "weights")
    _add_files(total, tables if os.path.isdir(tables) else path)
    return total.hexdigest()


def digests(config: ml_collections.ConfigDict, levels: Mapping[str, GivenRows]) -> dict[str, str]:
    """SHA-256 of what a run reads beside its model: the rows of both levels, and the weights and adapter that it starts from."""
    starts = {"selection.init": config.selection.init, "lora.init": config.lora.init}
    of_starts = {name: _start_digest(path) for name, path in starts.items() if path and os.path.exists(path)}
    return {name: level.digest for name, level in levels.items()} | of_starts


def default_workdir(config: ml_collections.ConfigDict, levels: Mapping[str, GivenRows]) -> pathlib.Path:
    """`runs/select-HASH`: the same rows, settings and files to start from have the same workdir."""
    content = config.to_json(sort_keys=True) + "".join(digests(config, levels).values())
    return pathlib.Path("runs", f"select-{hashlib.sha256(content.encode()).hexdigest()[:10]}")


@contextlib.contextmanager
def stored(config: ml_collections.ConfigDict, levels: Mapping[str, GivenRows], workdir: pathlib.Path):
    """Moves rows in memory into the workdir, where commands and later calls read them, and names the sources in the config.

    If the run cannot start, the rows are removed again.

    Raises:
      RunError: the workdir holds a run of other rows.
    """
    now = digests(config, levels)
    file, folder = workdir / DIGESTS, workdir / FOLDER
    before = files.read_json(file) if file.exists() and (workdir / CONFIG).exists() else now
    for name in now:
        # Earlier versions stored no digests of the files to start from.
        if before.get(name, None if name in levels else now[name]) != now[name]:
            what = f"other {name} rows" if name in levels else f"another content of {name}"
            raise RunError(f"{workdir} holds a run of {what}; give another workdir, or overwrite=True")
    if folder.exists() and not file.exists():
        raise RunError(f"{folder} exists, and no run made it; give another workdir")
    is_new, is_of_others = not folder.exists(), (workdir / CONFIG).exists()
    folder.mkdir(parents=True, exist_ok=True)
    files.write_atomically(file, files.to_json(now, indent=2) + "\n")
    try:
        for name, level in levels.items():
            config.data[name] = level.source
            if level.in_memory:
                config.data[name] = str(folder / f"{name}.jsonl")
                if not os.path.exists(config.data[name]) or _digest(config.data[name]) != level.digest:
                    shutil.move(level.source, config.data[name])
        yield
    except BaseException as error:
        # A run that has begun needs the rows to go on. A folder that was there may be that of another call, which still starts.
        if is_new and (is_of_others or not (workdir / CONFIG).exists()):
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, rows.DataError):  # about files that the caller never wrote
                raise rows.DataError(_about_rows(str(error), folder)) from error
        raise


def _about_rows(message: str, folder: pathlib.Path) -> str:
    """A message about the files of a folder from `stored`, with levels and numbers of rows, from 1, in place of files and lines."""
    named = re.compile(rf"{re.escape(str(folder))}/(upper|lower)\.jsonl(?::(\d+))?")
    return named.sub(lambda match: f"{match[1]}, row {match[2]}" if match[2] else match[1], message)


def remove_run(workdir: pathlib.Path, config: ml_collections.ConfigDict, levels: Mapping[str, GivenRows]) -> None:
    """Removes a workdir with all files in it, unless there is none.

    Raises:
      RunError: it holds something else, is in use, or has the current directory or an input of the new run in it.
    """
    if pathlib.Path.cwd().is_relative_to(workdir.resolve()):
        raise RunError(f"overwrite=True would remove the current directory, {workdir}; give another workdir")
    if not workdir.exists() or not any(workdir.iterdir()):
        return
    is_run = (workdir / DIGESTS).exists()
    if not is_run:
        with contextlib.suppress(FileNotFoundError, RunError):  # no config, or that of something else
            is_run = "selection" in read_config(workdir)
    if not is_run:
        raise RunError(f"{workdir} holds no run; overwrite=True removes runs only")
    sources = {name: parts.paths(level.source) for name, level in levels.items() if not level.in_memory}
    named = {"model": [config.model.path], "selection.init": [config.selection.init], "lora.init": [config.lora.init]}
    for name, paths in (sources | named).items():
        for path in paths:
            if path and os.path.exists(path) and pathlib.Path(path).resolve().is_relative_to(workdir.resolve()):
                raise RunError(f"overwrite=True would remove {path}, which {name} names; move it, or give another workdir")
    with locked(workdir):
        shutil.rmtree(workdir.resolve())

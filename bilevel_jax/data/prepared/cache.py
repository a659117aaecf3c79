"""The cache of prepared rows: sources are read and tokenized once, and mapped into memory from then on.

An entry is a folder that is named by the content of the source, the tokenizer, and the options that matter. It is made by one
process; others wait for it. Shards are written one by one, so that an interrupted preparation goes on where it stood.
"""

import concurrent.futures
import contextlib
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import shutil
import stat
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from bilevel_jax import files
from bilevel_jax.data import parts, readers, templates
from bilevel_jax.data.columns import Columns
from bilevel_jax.data.prepared import preparation, shards, stored, workers
from bilevel_jax.data.prepared.preparation import Source
from bilevel_jax.data.rejections import DataError, suffix_of
from bilevel_jax.data.rows import Report
from bilevel_jax.text import say

AUTO, OFF = "auto", "off"  # values of `data.cache`; others are directories
VARIABLE = "BILEVEL_JAX_ROWS"  # of the environment: the directory of `auto`
SMALL = 4 << 20  # bytes of a source that `auto` does not cache: reading it takes a few seconds
SMALL_DATASET = 5000  # the same, in rows of a saved or hub data set
JOB, MANIFEST = "job.json", "manifest.json"
LIBRARIES = ("tokenizers", "transformers", "jinja2", "pyarrow", "datasets")
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
WAIT = 0.2  # seconds between two looks at a lock


class Options(NamedTuple):
    """What decides on the rows and tokens of a source."""

    template: str
    learn: str
    preference: bool
    columns: str
    num_rows: int
    seed: int
    label: str  # is not part of the name of an entry


def directory(setting: str) -> pathlib.Path:
    """The directory that a value of `data.cache` means."""
    if setting != AUTO:
        return pathlib.Path(setting)
    if VARIABLE in os.environ:
        return pathlib.Path(os.environ[VARIABLE])
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return cache / "bilevel_jax" / "rows"


@functools.cache
def version() -> str:
    """Identifies the code that prepares rows: that of this package and of its libraries."""
    code = hashlib.sha256()
    for file in sorted(pathlib.Path(__file__).parents[1].rglob("*.py")):
        code.update(file.read_bytes())
    installed = " ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    return f"{code.hexdigest()[:16]}, {installed}"


# --------------------------------------------------------------------------------------------------------------------
# Names of entries
# --------------------------------------------------------------------------------------------------------------------


def _digest(path: str) -> str:
    """Identifies the content of a part of a source."""
    folder = path if parts.is_saved(path) else path.rpartition(":")[0]
    if os.path.isfile(path):
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if folder and parts.is_saved(folder):
        inside = sorted(file for file in pathlib.Path(folder).rglob("*") if file.is_file())
        return " ".join([path.removeprefix(folder), *(f"{file.relative_to(folder)} {_digest(str(file))}" for file in inside)])
    return readers.open_indexed(path)._fingerprint  # of the hub: of its files and the code that reads them


def _name(source_parts: list[parts.Part], digest: str, options: Options) -> str:
    """The name of the entry of a source: any change of content, tokenizer or options gives another one."""
    with concurrent.futures.ThreadPoolExecutor() as threads:
        contents = list(threads.map(_digest, [part.path for part in source_parts]))
    seed = options.seed if options.num_rows else 0
    what = [[suffix_of(part.path), part.source] for part in source_parts], contents, digest, options._replace(seed=seed, label="")
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]


def _is_small(source_parts: list[parts.Part]) -> bool:
    paths = [part.path for part in source_parts]
    if all(os.path.isfile(path) for path in paths):
        return sum(map(os.path.getsize, paths)) < SMALL
    return (
        not any(os.path.isfile(path) for path in paths) and sum(len(readers.open_indexed(path)) for path in paths) < SMALL_DATASET
    )


# --------------------------------------------------------------------------------------------------------------------
# Entries
# --------------------------------------------------------------------------------------------------------------------


def open_rows(setting: str, source: str, tokenizer, options: Options, columns: Columns) -> tuple[stored.Store, Report] | None:
    """The prepared rows of a source, which are prepared if they are not in the cache yet.

    Args:
      setting: `data.cache`.
      source: files, folders and data sets; others are not cached.
      tokenizer: of the model.
      options: of the preparation.
      columns: gets to know which columns the source has.

    Returns:
      The rows with the report on the source; None if the rows are to be read into memory.

    Raises:
      DataError: the source has no usable row, or the disk is full.
      ValueError: as `templates.encode`.
    """
    if setting == OFF or any(entry.strip().startswith(("recipe:", "synthetic:")) for entry in source.split(",")):
        return None
    try:
        source_parts = parts.resolve(source)
        if not all(_is_readable(part.path) for part in source_parts) or (setting == AUTO and _is_small(source_parts)):
            return None
    except DataError:
        return None  # reading it says the same
    digest = workers.tokenizer_digest(tokenizer)
    if not digest:
        say(f"{source}: its rows are not cached: the tokenizer has no tokenizer.json")
        return None
    job = shards.Job(
        tokenizer=tokenizer.name_or_path,
        tokenizer_digest=digest,
        template=templates.resolve(options.template, tokenizer),
        learn=options.learn,
        preference=options.preference,
        columns=options.columns,
        label=options.label,
        files=tuple(part.path for part in source_parts) if len(source_parts) > 1 else (),
    )
    options = options._replace(template=job.template)
    name = functools.partial(_name, source_parts, digest, options)
    entry = directory(setting) / name()
    described = Source(source, source_parts, job, options.num_rows, options.seed)
    try:
        with _disk_errors(entry):
            store, summary = _prepared(entry, described, tokenizer, setting == AUTO, name)
    except (shards.Unstorable, _Unwritable) as error:
        say(f"{source}: its rows are not cached: {error}")
        return None
    columns.add(summary["missing"], summary["seen"])
    return store, preparation.report(described, summary)


def _is_readable(path: str) -> bool:
    return os.access(path, os.R_OK) if os.path.isfile(path) else readers.is_indexed(path)


class _Unwritable(ValueError):
    """A directory cannot be used; the message says why."""


@contextlib.contextmanager
def _disk_errors(entry: pathlib.Path) -> Iterator[None]:
    """Turns errors of writing an entry into one line."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            what = f"{entry}: {error.strerror}; what is prepared is kept, and the same command goes on from there"
            raise DataError(f"{what} when there is space, or name another directory by data.cache") from error
        if error.errno in UNWRITABLE:
            raise _Unwritable(f"{error.filename or entry}: {error.strerror}; data.cache=DIR names another directory") from error
        raise


def _prepared(
    entry: pathlib.Path, source: Source, tokenizer, private: bool, name: functools.partial
) -> tuple[stored.Store, dict[str, Any]]:
    """The rows of an entry, which is made or repaired if need be."""
    opened = _open(entry, source) if not private or not _not_private(entry.parent) else None
    if isinstance(opened, tuple):
        return opened
    entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if private and (problem := _not_private(entry.parent)):
        raise _Unwritable(problem)
    with _locked(entry.with_suffix(".lock"), source.name):
        opened = _open(entry, source)  # another process may have made it
        if isinstance(opened, tuple):
            return opened
        if opened:
            say(f"{opened}; its rows are prepared again")
        entry.mkdir(mode=0o700, exist_ok=True)
        _begin(entry, source)
        summary = preparation.prepare(entry, source, tokenizer, _known_shards(entry))
        if name() != entry.name:
            shutil.rmtree(entry)
            raise DataError(f"{source.name}: it changed while it was read; start again")
        files.write_atomically(entry / MANIFEST, json.dumps(summary))
        opened = _open(entry, source)
    if not isinstance(opened, tuple):
        raise DataError(f"{opened or entry}; rows cannot be stored there, name another directory by data.cache")
    return opened


def _known_shards(entry: pathlib.Path) -> dict[str, stored.Shard]:
    """The shards of an entry that was finished once; none if it was not, or if its manifest is damaged."""
    try:
        return {name: stored.Shard(*numbers) for name, numbers in json.loads((entry / MANIFEST).read_text())["shards"].items()}
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _begin(entry: pathlib.Path, source: Source) -> None:
    """Removes what another version has left, or has marked by another field of labels, and says in the entry what it is."""
    job = source.job
    what = {"version": version(), "source": source.name, "tokenizer": job.tokenizer, "template": job.template, "label": job.label}
    with contextlib.suppress(OSError, ValueError, AttributeError):
        there = json.loads((entry / JOB).read_text())
        if all(there.get(name) == what[name] for name in ("version", "label")):
            return
    for path in entry.iterdir():
        path.unlink()
    files.write_atomically(entry / JOB, json.dumps(what, indent=2) + "\n")


def _open(entry: pathlib.Path, source: Source) -> tuple[stored.Store, dict[str, Any]] | str:
    """The rows of an entry; or why it has none, "" if it was never finished."""
    try:
        if json.loads((entry / JOB).read_text())["version"] != version():
            return f"{entry}: it is of another version of the package or its libraries"
        summary = json.loads((entry / MANIFEST).read_text())
        shard_files = {name: stored.Shard(*numbers) for name, numbers in summary["shards"].items()}
        index = stored.Shard(*summary["index"])
    except FileNotFoundError:
        return ""
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{entry}: its manifest is damaged"
    problem = stored.check_shard(entry / stored.INDEX, index)
    for name, shard in shard_files.items():
        size = os.path.getsize(entry / name) if (entry / name).exists() else -1
        if size != shard.size:  # the content is compared when it is used
            problem = stored.check_shard(entry / name, shard)
    if problem:
        return problem
    job = source.job._replace(label=summary["label"])
    return stored.Store(entry, job, shard_files, source.parts, summary["largest_token"]), summary


def _not_private(path: pathlib.Path) -> str:
    """Why the default directory is not one of the user alone; "" if it is."""
    try:
        state = path.lstat()
    except FileNotFoundError:
        return f"{path}: there is no such directory"
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.geteuid():
        return f"{path} is a link, or belongs to another user; remove it, or name another directory by data.cache"
    if state.st_mode & 0o077:
        path.chmod(0o700)
    return ""


@contextlib.contextmanager
def _locked(path: pathlib.Path, source: str) -> Iterator[None]:
    """Locks an entry. Waits for the process that prepares it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        announced = False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not announced:
                    say(f"{source}: waiting for another process, which prepares its rows", flush=True)
                announced = True
                time.sleep(WAIT)
            except OSError as error:
                say(f"{path} cannot be locked ({error.strerror}): make sure that no other process prepares the same rows")
                break
        yield
    finally:
        os.close(descriptor)

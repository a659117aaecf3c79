"""A private directory with checksums for JAX's cache of compiled programs: JAX executes what it reads there.

JAX keeps an entry that it cannot read, and warns of it every time. It executes any entry that it can read. So the directory of this
package belongs to the user alone, and every entry in it starts with a checksum of its key and content. A directory that the user
gives by JAX's own variables is used as JAX does.
"""

import contextlib
import hashlib
import os
import pathlib
import platform
import stat
import sys
import zlib
from collections.abc import Iterator

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
DIGEST = 32  # bytes before the content of an entry


def directory() -> pathlib.Path:
    """The cache of this user for this kind of processor.

    Machines with different processors may share a home directory, and code compiled for one may not run on another.
    """
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    kind = f"{platform.machine()}-{zlib.crc32(features.encode()):08x}"
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return cache / "bilevel_jax" / kind


def enable() -> None:
    """Lets JAX, which must not be imported yet, use the cache, unless its own variable names one."""
    if VARIABLE not in os.environ:
        path = directory()
        if problem := _make_private(path.parent) or _make_private(path):
            print(f"compiled programs are not cached: {problem}", file=sys.stderr)
            return
        os.environ[VARIABLE] = str(path)
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**30))  # a limit would remove entries of other programs
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def _make_private(path: pathlib.Path) -> str:
    """Makes a directory that only the user can open, or gives one of the user this mode. Returns why that fails; "" otherwise."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = path.lstat()
        if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.geteuid():
            return f"{path} is a link, or belongs to another user; remove it, or set {VARIABLE}"
        if state.st_mode & 0o077:
            path.chmod(0o700)
    except OSError as error:
        return f"{path}: {error.strerror}"
    return ""


def check_entries() -> None:
    """Makes JAX check the entries of this package's cache. To be called before anything is compiled; later calls do nothing."""
    from jax._src import compilation_cache, lru_cache  # no public API

    if os.environ.get(VARIABLE) != str(directory()) or not hasattr(compilation_cache, "LRUCache"):
        return
    if not issubclass(compilation_cache.LRUCache, CheckedEntries):
        compilation_cache.LRUCache = type("CheckedCache", (CheckedEntries, lru_cache.LRUCache), {})
        compilation_cache.reset_cache()  # another cache may be open already


@contextlib.contextmanager
def not_cached() -> Iterator[None]:
    """Compiles without the cache. Programs for devices that are not there can be written into it, and not be read."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it keeps whether it is used
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


class CheckedEntries:
    """What JAX's `LRUCache` does in addition, as the first base class."""

    def put(self, key: str, value: bytes) -> None:
        """Adds an entry.

        JAX writes an entry and then its time of use. A process that is killed between the two leaves an entry without a time, with
        which JAX can evict nothing, and so adds nothing to the cache anymore. Such entries are removed.
        """
        if self.eviction_enabled:
            with self.lock.acquire(timeout=self.lock_timeout_secs):  # another process may be between the two
                for entry in pathlib.Path(str(self.path)).glob("*-cache"):
                    if not entry.with_name(f"{entry.name.removesuffix('-cache')}-atime").exists():
                        entry.unlink()
        super().put(key, _digest(key, value) + value)

    def get(self, key: str) -> bytes | None:
        """The value of an entry; None for no entry, and for one that is damaged or of another key, which is removed."""
        content = super().get(key)
        if content is None:
            return None
        value = content[DIGEST:]
        if content[:DIGEST] == _digest(key, value):
            return value
        for suffix in ("-cache", "-atime"):
            pathlib.Path(str(self.path), key + suffix).unlink(missing_ok=True)
        return None


def _digest(key: str, value: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\n" + value).digest()

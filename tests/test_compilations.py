"""The cache of compiled programs: private to the user, and only entries that were written under their key are executed."""

import os

import jax
import pytest
from jax._src import compilation_cache, lru_cache

from bilevel_jax import compilations


@pytest.fixture
def cache(tmp_path):
    kind = type("Cache", (compilations.CheckedEntries, lru_cache.LRUCache), {})
    cache = kind(str(tmp_path), max_size=2**20)
    cache.put("a", b"program a")
    cache.put("b", b"program b")
    return cache


def test_entries(cache, tmp_path):
    assert cache.get("a") == b"program a" and cache.get("b") == b"program b" and cache.get("c") is None


def test_swapped_entries_are_not_used(cache, tmp_path):
    first, second = tmp_path / "a-cache", tmp_path / "b-cache"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert cache.get("a") is None and cache.get("b") is None and not first.exists()
    cache.put("a", b"program a")  # compiled again
    assert cache.get("a") == b"program a"


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:-1], lambda content: content[:-1] + b"x"])
def test_damaged_entries_are_replaced(cache, tmp_path, damage):
    file = tmp_path / "a-cache"
    content = file.read_bytes()
    file.write_bytes(damage(content))
    assert cache.get("a") is None and not file.exists() and not (tmp_path / "a-atime").exists()
    cache.put("a", b"program a")
    assert file.read_bytes() == content


def test_an_entry_of_a_killed_process_is_removed(cache, tmp_path):
    """Without its time of use, JAX could not add another entry."""
    (tmp_path / "a-atime").unlink()
    with pytest.raises(FileNotFoundError):
        lru_cache.LRUCache.put(cache, "c", b"program c")
    cache.put("c", b"program c")
    assert cache.get("c") == b"program c" and cache.get("b") == b"program b" and cache.get("a") is None


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The directory of the cache, which does not exist yet, under another home."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(compilations.VARIABLE)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "0")
    return compilations.directory()


def test_the_directory_is_private(own, capsys):
    own.mkdir(parents=True, mode=0o777)
    os.chmod(own, 0o777)
    compilations.enable()
    assert os.environ[compilations.VARIABLE] == str(own) and capsys.readouterr().err == ""
    assert [path.stat().st_mode & 0o777 for path in (own, own.parent)] == [0o700, 0o700]


def test_a_directory_of_others_is_not_used(own, capsys, monkeypatch):
    own.mkdir(parents=True)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    compilations.enable()
    assert compilations.VARIABLE not in os.environ
    line = capsys.readouterr().err
    assert f"not cached: {own.parent} is a link, or belongs to another user; remove it" in line and line.count("\n") == 1


def test_a_link_is_not_followed(own, capsys, tmp_path):
    own.parent.mkdir()
    own.symlink_to(tmp_path)
    compilations.enable()
    assert compilations.VARIABLE not in os.environ and f"{own} is a link" in capsys.readouterr().err


def test_a_cache_of_the_user_is_left_to_jax(own, monkeypatch, tmp_path):
    monkeypatch.setenv(compilations.VARIABLE, str(tmp_path / "mine"))
    monkeypatch.setattr(compilation_cache, "LRUCache", lru_cache.LRUCache)
    compilations.enable()
    compilations.check_entries()
    assert os.environ[compilations.VARIABLE] == str(tmp_path / "mine") and compilation_cache.LRUCache is lru_cache.LRUCache


@pytest.fixture
def used_by_jax(own, monkeypatch):
    """The directory `own`, in which JAX keeps its cache meanwhile."""
    compilations.enable()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "-1")
    monkeypatch.setattr(compilation_cache, "LRUCache", lru_cache.LRUCache)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(own))
    compilation_cache.reset_cache()
    yield own
    jax.config.update("jax_compilation_cache_dir", before)
    monkeypatch.undo()
    compilation_cache.reset_cache()


def test_nothing_is_cached_meanwhile(used_by_jax):
    with compilations.not_cached():
        assert float(jax.jit(lambda x: x + 4.25)(2.0)) == 6.25
    assert not list(used_by_jax.glob("*-cache"))
    assert float(jax.jit(lambda x: x * 4.25)(2.0)) == 8.5
    assert list(used_by_jax.glob("*-cache"))


def test_jax_uses_the_checks(used_by_jax):
    """Entries of two programs are swapped, and each of them is compiled again and computes what it should."""
    compilations.check_entries()
    programs = [lambda x: x + 3.25, lambda x: x * 3.25]
    assert [float(jax.jit(program)(2.0)) for program in programs] == [5.25, 6.5]
    files = sorted(used_by_jax.glob("*-cache"))
    contents = [file.read_bytes() for file in files]
    wrong = dict(zip(files, [*contents[1:], contents[0]]))
    for file, content in wrong.items():
        file.write_bytes(content)
    jax.clear_caches()
    compilation_cache.reset_cache()
    assert [float(jax.jit(program)(2.0)) for program in programs] == [5.25, 6.5]
    assert len(files) > 1 and all(file.read_bytes() != content for file, content in wrong.items())

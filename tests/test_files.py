"""Atomic writes beside links and temporaries that other processes left."""

import contextlib
import os
import pathlib

import pytest

from bilevel_jax import errors, files


@pytest.mark.parametrize("name", ["out.json", "out.json.tmp", ".out.json.tmp"])
def test_links_are_not_followed(tmp_path, name):
    """Also not the file itself: it is replaced."""
    (tmp_path / "secret").write_text("precious")
    (tmp_path / name).symlink_to(tmp_path / "secret")
    files.write_atomically(tmp_path / "out.json", "new")
    assert (tmp_path / "out.json").read_text() == "new" and not (tmp_path / "out.json").is_symlink()
    assert (tmp_path / "secret").read_text() == "precious"


def test_after_an_error_the_previous_file_remains(tmp_path):
    (tmp_path / "out").write_text("old")
    with pytest.raises(ZeroDivisionError), files.replacing(tmp_path / "out") as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"out": "old"}


def test_permissions_follow_the_umask(tmp_path):
    mask = os.umask(0o027)
    try:
        files.write_atomically(tmp_path / "out", "new")
    finally:
        os.umask(mask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o640


def test_stale_temporaries_are_removed_and_others_stay(tmp_path):
    """Stale are those of this file whose process is gone; what another writer is writing stays."""
    out = tmp_path / "out"
    (tmp_path / ".out.0123.tmp").write_text("half")
    (tmp_path / ".out.4567.tmp").mkdir()
    (tmp_path / ".out.4567.tmp" / "part").write_text("half")
    (tmp_path / ".other.89ab.tmp").write_text("of another file")
    with files.replacing(out) as first:
        first.write(b"first")
        assert len(list(tmp_path.glob(".out.*"))) == 1
        files.write_atomically(out, "second")
        assert len(list(tmp_path.glob(".out.*"))) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".other.89ab.tmp"}
    assert out.read_text() == "first"


def test_a_directory_takes_its_place_at_the_end(tmp_path):
    (tmp_path / ".out.4567.tmp").mkdir()
    with contextlib.suppress(ZeroDivisionError), files.new_directory(tmp_path / "out") as scratch:
        assert scratch.stat().st_mode & 0o777 == 0o700
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with files.new_directory(tmp_path / "out") as scratch:
        (scratch / "a").write_text("b")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "a").read_text() == "b"


def test_devices_are_written_to():
    """As root, `--out=/dev/null` must not replace the device."""
    files.write_atomically(pathlib.Path("/dev/null"), "gone")
    assert not os.path.isfile("/dev/null")


def test_pipes_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(OSError, match="config.json: not a regular file; write its content to a file first"):
        files.read_json(tmp_path / "config.json")
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(errors.RunError, match="half.json is damaged"):
        files.read_json(tmp_path / "half.json")

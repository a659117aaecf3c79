"""Disk space: bytes by hand, and which directories are refused before a run compiles anything."""

import os
import shutil

import pytest

from bilevel_jax import checks, errors, run_sizes, train
from bilevel_jax import setup as setups
from bilevel_jax.runtime import disk


def test_saved_checkpoints(tmp_path):
    assert disk.num_saved(tmp_path) == 0
    for name in ("4", "6", "damaged-2", "8.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert disk.num_saved(tmp_path) == 2


def test_amount():
    assert [disk.amount(size) for size in (0, 123_456, 2_500_000_000)] == ["0.0 MB", "0.1 MB", "2.50 GB"]


def test_a_directory_that_does_not_exist_yet(tmp_path):
    disk.check(tmp_path / "a" / "b", 1000)
    assert not any(tmp_path.iterdir())
    assert disk.free_bytes(tmp_path / "a" / "b") > 0


@pytest.mark.parametrize("part", ["", "checkpoints", "weights"])
def test_directories_that_cannot_be_written(tmp_path, monkeypatch, part):
    locked = tmp_path / part
    locked.mkdir(exist_ok=True)
    access = os.access
    monkeypatch.setattr(disk.os, "access", lambda path, mode: str(path) != str(locked) and access(path, mode))
    with pytest.raises(errors.RunError, match=f"^{locked}: no files can be written in it; .*--workdir$"):
        disk.check(tmp_path, 1000)


@pytest.mark.parametrize(
    "rank, num_saved, sizes", [(4, 0, 3 * 1010 + 10), (4, 1, 2 * 1010 + 10), (4, 3, 1010 + 10), (0, 0, 3 * 1000 + 10)]
)
def test_disk_bytes(make_config, monkeypatch, rank, num_saved, sizes):
    """Two checkpoints stay and a third is being written, each with an adapter; those on disk are not needed again.

    All weights are in the checkpoints and at the end only. Two epochs have a table of five rows each."""
    config = checks.build(make_config({"lora.rank": rank, "checkpoint.keep": 2, "num_epochs": 2}))
    monkeypatch.setattr(run_sizes, "checkpoint_bytes", lambda *_: 1000)
    monkeypatch.setattr(run_sizes, "_adapter_bytes", lambda _: 10)
    needed = run_sizes.disk_bytes(config, None, 5, num_saved)
    assert needed == sizes + 5 * 2 * run_sizes.TABLE_BYTES + run_sizes.OTHER


def test_a_run_is_refused_before_it_compiles(make_config, tmp_path, monkeypatch):
    def compiled(*_):
        raise AssertionError

    monkeypatch.setattr(setups, "compile_program", compiled)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda directory: shutil._ntuple_diskusage(10**9, 10**9, 123_456))
    with pytest.raises(
        errors.RunError, match=r"run: 1\.\d MB are needed for checkpoints and results, 0.1 MB are free; free some"
    ) as caught:
        train.run(make_config(), tmp_path / "run")
    assert str(caught.value).startswith(f"{tmp_path / 'run'}: ") and "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "config.json").exists()

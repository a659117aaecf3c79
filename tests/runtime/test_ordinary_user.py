"""Files of somebody else: what an ordinary user gets where files cannot be read or written. One line each, and nothing is changed.

The tests take the rights of root away from this process for a while. They need root to begin with.
"""

import contextlib
import os
import pathlib
import shutil
import tempfile

import pytest

from bilevel_jax import compilations, errors, train
from bilevel_jax.data.prepared import cache
from tests.conftest import call_main, make_rows, run_command, write_jsonl
from tests.data import test_cache

NOBODY = 65534
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@contextlib.contextmanager
def ordinary_user():
    """Takes the effective ids of an ordinary user, and with them all rights to files of root."""
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.fixture
def folder(tmp_path):
    """A directory that everybody can enter and only its owner, root, can write. pytest's own are closed to others."""
    open_to_all = pathlib.Path(tempfile.gettempdir())
    if not tmp_path.is_relative_to(open_to_all):
        pytest.skip(f"{tmp_path} is not in {open_to_all}, which every user can enter")
    for directory in (tmp_path, *tmp_path.parents):
        if directory == open_to_all:
            break
        directory.chmod(0o755)
    return tmp_path


@pytest.fixture
def model(neox, folder):
    """A copy of a model that everybody can read."""
    return pathlib.Path(shutil.copytree(neox, folder / "model"))


@pytest.fixture
def source(folder):
    return write_jsonl(folder / "rows.jsonl", make_rows(45, 0, bad_every=4))


def line_of(call, *arguments) -> str:
    """The error of a call by an ordinary user, which `cli.call` prints as one line."""
    with ordinary_user(), pytest.raises((ValueError, OSError, errors.RunError)) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def snapshot(directory) -> dict:
    return {file: file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def test_the_rights_come_back(folder):
    with ordinary_user(), pytest.raises(PermissionError):
        (folder / "file").touch()
    (folder / "file").touch()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", ""])
def test_a_model_that_cannot_be_read(folder, model, source, name):
    (model / name).chmod(0)
    out = folder / "out"
    out.mkdir()
    out.chmod(0o777)
    line = line_of(run_command, "score", [f"--model={model}", f"--data={source}", f"--out={out / 'scores.jsonl'}"])
    assert str(model / name) in line and not any(out.iterdir())


def test_rows_that_cannot_be_read(folder, model, source):
    source.chmod(0)
    out = folder / "out"
    out.mkdir()
    out.chmod(0o777)
    line = line_of(run_command, "score", [f"--model={model}", f"--data={source}", f"--out={out / 'scores.jsonl'}"])
    assert str(source) in line and "Permission denied" in line


@pytest.mark.parametrize("command", ["score", "sample"])
def test_a_result_that_cannot_be_written_is_refused_before_the_work(folder, model, source, command, monkeypatch):
    """Not after hours of computation."""
    from bilevel_jax.models import huggingface

    monkeypatch.setattr(huggingface, "load_params", lambda *_: pytest.fail("the model is loaded"))
    rows = "--data" if command == "score" else "--prompts"
    line = line_of(run_command, command, [f"--model={model}", f"{rows}={source}", f"--out={folder / 'out.jsonl'}"])
    assert line == f"--out: no file can be written to {folder} (Permission denied)"


def test_a_directory_of_runs_that_cannot_be_written(folder, make_config):
    line = line_of(train.run, make_config(), folder / "run")
    assert line.startswith(f"{folder}") and not (folder / "run").exists()


def test_an_unfinished_run_of_somebody_else(folder, make_config, model, source):
    """It is not continued, and its files stay as they are."""
    config = make_config({"model.path": str(model), "data.upper": str(source), "data.lower": str(source)})
    workdir = folder / "run"
    (workdir / "checkpoints").mkdir(parents=True)
    (workdir / ".lock").touch()
    before = snapshot(folder)
    line = line_of(train.run, config, workdir)
    assert "Permission denied" in line and str(workdir) in line
    assert snapshot(folder) == before


def test_a_finished_run_of_somebody_else(folder, finished):
    """Its report and what is exported from it are written elsewhere, or not at all."""
    workdir = pathlib.Path(shutil.copytree(finished, folder / "run"))
    before = snapshot(workdir)
    assert str(workdir) in line_of(run_command, "report", [f"--workdir={workdir}"])
    assert str(folder) in line_of(run_command, "export", [f"--workdir={workdir}", f"--selected={folder / 'kept.jsonl'}"])
    assert snapshot(workdir) == before
    (workdir / "config.json").chmod(0)
    assert str(workdir / "config.json") in line_of(run_command, "report", [f"--workdir={workdir}"])


def test_a_cache_of_rows_that_cannot_be_written(folder, source, monkeypatch, capsys):
    """The rows are read into memory, and the reason is said."""
    (folder / "cache").mkdir()
    with ordinary_user():
        assert test_cache.open_rows(folder / "cache", str(source)) is None
    printed = capsys.readouterr().out
    assert f"{source}: its rows are not cached: {folder / 'cache'}" in printed and "Permission denied" in printed
    # The default one, which belongs to root.
    monkeypatch.setenv(cache.VARIABLE, str(folder / "cache"))
    monkeypatch.setattr(cache, "SMALL", 0)
    with ordinary_user():
        assert test_cache.open_rows("auto", str(source)) is None
    assert "belongs to another user" in capsys.readouterr().out
    assert not any((folder / "cache").iterdir())


def test_a_cache_of_rows_that_can_be_read(folder, source):
    """One that somebody else has prepared is used."""
    test_cache.open_rows(folder / "cache", str(source))
    for path in (folder / "cache").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (folder / "cache").chmod(0o755)
    with ordinary_user():
        store, _ = test_cache.open_rows(folder / "cache", str(source))
        assert len(store) == 45


def test_a_cache_of_programs_that_cannot_be_written(folder, monkeypatch, capsys):
    monkeypatch.delenv(compilations.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    with ordinary_user():
        compilations.enable()
    assert f"compiled programs are not cached: {folder / 'bilevel_jax'}: Permission denied" in capsys.readouterr().err
    assert compilations.VARIABLE not in os.environ


def test_check_says_it_before_a_run(folder, model, source, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (folder / "configs.py").write_text(
        "from bilevel_jax import config\ndef get_config(tier=''):\n    c = config.default()\n"
        f"    c.model.path, c.data.upper, c.data.lower = {str(model)!r}, {str(source)!r}, {str(source)!r}\n    return c\n"
    )
    source.chmod(0)
    with ordinary_user(), pytest.raises(SystemExit):
        call_main(monkeypatch, "--config=configs.py", "--check", "--config.data.max_length=96")
    printed = capsys.readouterr().err
    assert str(source) in printed and "Permission denied" in printed and "Traceback" not in printed

"""The console script, configs by name, and what an installed package has."""

import importlib.util
import os
import pathlib
import runpy
import subprocess
import sys
import zipfile

import pytest

from bilevel_jax import __main__ as console
from bilevel_jax import config_files

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def call(monkeypatch):
    """`call(*arguments) -> (module, argv)` that the console script would run."""

    def call(*arguments):
        ran = []
        monkeypatch.setattr(sys, "argv", ["bilevel-jax", *arguments])
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setattr(runpy, "run_module", lambda module, **options: ran.append((module, options, sys.argv[1:])))
        console.main()
        return ran

    return call


@pytest.mark.parametrize("name", [*console.COMMANDS, "main"])
def test_a_command_is_its_module(call, name):
    ((module, options, argv),) = call(name, "--workdir=a", "--help")
    assert module == ("bilevel_jax.main" if name in ("main", "train") else f"bilevel_jax.{name}")
    assert options == {"run_name": "__main__", "alter_sys": True} and argv == ["--workdir=a", "--help"]
    assert importlib.util.find_spec(module)


def test_modules_of_the_current_directory_are_found_last(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call("report")
    assert sys.path[-1] == os.fspath(tmp_path)


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("help",)])
def test_help_lists_every_package_that_is_a_command(call, capsys, arguments):
    assert call(*arguments) == []
    printed = capsys.readouterr().out
    packages = {file.parent.name for file in (ROOT / "bilevel_jax").glob("*/__main__.py")}
    assert packages | {"train"} == set(console.COMMANDS) and all(f"\n  {name} " in printed for name in console.COMMANDS)


def test_unknown_command(call, capsys):
    with pytest.raises(SystemExit) as caught:
        call("trian")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: there is no command 'trian' (did you mean train?); choose train, ")


# --------------------------------------------------------------------------------------------------------------------
# Configs
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["finetune", "finetune.py", "configs/finetune.py", "finetune:tiny", "configs/finetune.py:tiny"])
def test_configs_are_found_from_any_directory(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    file, _, tier = config_files.resolve(name).partition(":")
    assert pathlib.Path(file) == ROOT / "configs" / "finetune.py" and tier == ("tiny" if ":" in name else "")
    assert config_files.load(name).method == "offline"


def test_files_take_precedence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    for name in ("finetune.py", "configs/finetune.py"):
        (tmp_path / name).write_text("def get_config(): return 3\n")
        assert config_files.resolve(name) == name and config_files.load(name) == 3


@pytest.mark.parametrize("name", ["finetun", "configs/finetun.py", "elsewhere/finetun.py", "."])
def test_configs_that_do_not_exist(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="there is no config .*choose finetune, preferences, quality, safety, or name a file"):
        config_files.resolve(name)


@pytest.mark.slow
def test_an_installed_package(tmp_path):
    """From a wheel, in a folder of its own, run in another directory."""
    copy = tmp_path / "copy"
    copy.mkdir()
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file() and (name.startswith(("bilevel_jax/", "configs/")) or "/" not in name):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", f"--wheel-dir={tmp_path}", str(copy)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {f"bilevel_jax/{file.relative_to(ROOT)}" for file in (ROOT / "configs").glob("*.py")} <= names
    assert not any(name.startswith(("configs/", "tests/", "experiments/")) for name in names)

    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", f"--target={site}", str(wheel)], check=True)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); from bilevel_jax import __main__ as console; "
        f"assert console.__file__.startswith({str(site)!r}); console.main()"
    )

    def run(*arguments):
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        command = [sys.executable, "-I", "-c", code, *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)

    for name in ("safety", "configs/safety.py"):
        done = run("train", f"--config={name}", "--plan")
        assert done.returncode == 0 and "fits devices of 16 GB and more" in done.stdout, done.stderr
    done = run("train", "--config=finetun")
    assert done.returncode == 2 and "did you mean finetune?" in done.stderr


def test_a_reader_that_ends():
    """As `| head -1` does."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bilevel_jax.export", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1

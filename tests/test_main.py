"""The training command as a person meets it: help, mistakes in one line, the default place of a run."""

import json
import os
import subprocess
import sys

import pytest


def run(*arguments, cwd):
    command = [sys.executable, "-m", "bilevel_jax.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.fixture
def place(tmp_path, make_config):
    """A directory with a config file `tiny.py` that takes tiers, and things that are not what they should be."""
    (tmp_path / "tiny.json").write_text(make_config().to_json())
    (tmp_path / "tiny.py").write_text(
        "import json, ml_collections\n"
        "def get_config(tier=''):\n"
        "    if tier not in ('', 'a/b'):\n"
        "        raise ValueError(f'no tier {tier}')\n"
        "    return ml_collections.ConfigDict(json.load(open('tiny.json')))\n"
    )
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    (tmp_path / "importing.py").write_text("import nowhere\n")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "file").touch()
    return tmp_path


@pytest.mark.parametrize("flag", ["--help", "--helpshort", "--helpfull"])
def test_help(tmp_path, flag):
    done = run(flag, cwd=tmp_path)
    assert done.returncode in (0, 1)  # absl's own choice
    assert "--workdir" in done.stdout and "--config" in done.stdout and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ([], "--config"),
        (["--config=absent.py"], "absent.py"),
        (["--config=file"], "without get_config()"),
        (["--config=importing.py"], "No module named 'nowhere'"),
        (["--config=broken.py"], "broken.py"),
        (["--config=tiny.py:giant"], "no tier giant"),
        (["--config=tiny.py", "--wokdir=x"], "wokdir"),
        (["--config=tiny.py", "extra"], "'extra'"),
        (["--config=tiny.py", "--config.sede=1"], "the config has no key sede; Did you mean seed"),
        (["--config=tiny.py", "--config.lora.size=1"], "the config has no key size"),
        (["--config=tiny.py", "--config.num_epochs=two"], "two"),
        (["--config=tiny.py", "--config.optimizer.learning_rate=fast"], "fast"),
        (["--config=tiny.py", "--config.method=ofline"], "method='ofline'"),
        (["--config=tiny.py", "--config.data.lower=absent.jsonl"], "absent.jsonl: no such file"),
        (["--config=tiny.py", "--config.data.upper=empty.jsonl"], "empty.jsonl: no rows"),
        (["--config=tiny.py", "--config.model.path=./absent"], "./absent: no such directory"),
        (["--config=tiny.py", "--config.data.max_length=999"], "data.max_length=999"),
        (["--config=tiny.py", "--workdir=file"], "file"),
        (["--config=tiny.py", "--workdir=file/run"], "file"),
    ],
)
def test_mistakes_are_told_in_one_line(place, arguments, reason):
    done = run(*arguments, cwd=place)
    assert done.returncode != 0 and reason in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_run(place):
    changes = ["--config.num_epochs=1", "--config.seed=3", "--config.eval.keep=0.5", "--config.method=mixing"]
    done = run("--config=tiny.py", *changes, cwd=place)
    assert done.returncode == 0, done.stderr
    config = json.loads((place / "runs" / "tiny" / "config.json").read_text())
    assert (config["num_epochs"], config["seed"], config["eval"]["keep"], config["method"]) == (1, 3, 0.5, "mixing")
    for shown in ("held-out loss", "trusted rows", "mixture, right answers", "in runs/tiny"):
        assert shown in done.stdout


@pytest.mark.parametrize("tier, name", [("", "tiny"), (":a/b", "tiny-a_b")])
def test_default_workdir(place, tier, name):
    run(f"--config=tiny.py{tier}", "--config.data.lower=absent.jsonl", cwd=place)  # stops as soon as it has its place
    assert [file.name for file in (place / "runs").iterdir()] == [name]


def test_the_next_process_finds_what_this_one_compiled(tmp_path):
    code = """if True:
        from bilevel_jax import cli
        def main():
            import jax  # as late as commands do
            jax.jit(lambda x: x + 3)(1.0)
        cli.run(main)
    """

    def kept(**environment):
        environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")} | environment
        subprocess.run([sys.executable, "-c", code], check=True, env=environment)
        return {str(file): file.stat().st_mtime for file in tmp_path.rglob("*-cache")}

    first = kept(XDG_CACHE_HOME=str(tmp_path))
    assert first and kept(XDG_CACHE_HOME=str(tmp_path)) == first
    kept(XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))
    assert any(file.startswith(str(tmp_path / "mine")) for file in kept(XDG_CACHE_HOME=str(tmp_path)))

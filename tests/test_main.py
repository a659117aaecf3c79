"""The training command as a user meets it: help, errors of one line, the default workdir; and the flags of all commands."""

import copy
import functools
import importlib
import json
import os
import pkgutil
import subprocess
import sys

import pytest
from absl import flags

import bilevel_jax
from bilevel_jax import cli, config, main
from tests.conftest import call_main, run_command

COMMANDS = ("main", "evaluate", "export", "judge", "report", "sample", "score")


def run(*arguments, cwd):
    """Runs the command in a new process."""
    command = [sys.executable, "-m", "bilevel_jax.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.fixture
def call(start, capsys):
    """`call(*arguments) -> (status, stderr)`: the command, which fails, in this process."""

    def call(*arguments):
        with pytest.raises(SystemExit) as caught:
            start(*arguments)
        return caught.value.code, capsys.readouterr().err

    return call


@pytest.fixture
def start(directory, monkeypatch):
    """`start(*arguments)`: the command in this process, in `directory`."""
    monkeypatch.chdir(directory)
    return functools.partial(call_main, monkeypatch)


@pytest.fixture
def directory(tmp_path, make_config):
    """A directory with a config file `tiny.py` that takes tiers, and with invalid files."""
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
    (tmp_path / "misspelled.py").write_text(
        "from bilevel_jax import config\ndef get_config():\n    c = config.default()\n    c.lorra.rank = 2\n    return c\n"
    )
    (tmp_path / "by_name.py").write_text(
        'from bilevel_jax import config\ndef get_config():\n    c = config.default()\n    c["lorra"]["rank"] = 2\n    return c\n'
    )
    (tmp_path / "wrong.py").write_text("def get_config():\n    return {}['absent']\n")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "file").touch()
    return tmp_path


def one_line(stderr) -> bool:
    return stderr.startswith("error: ") and stderr.count("\n") == 1


# --------------------------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--help", "--helpshort", "--helpfull"])
def test_help(tmp_path, flag):
    done = run(flag, cwd=tmp_path)
    assert done.returncode in (0, 1)  # absl's own choice
    assert "--workdir" in done.stdout and "--config" in done.stdout and "Traceback" not in done.stderr
    assert "plan" in done.stdout


def test_help_lists_every_config_key():
    """With type, default and comment, as far as the dataclasses tell; the comments by hand."""
    text = " ".join(main.FLAGS.get_help().split())
    for name, default in config.default().to_dict().items():
        values = {f"{name}.{key}": value for key, value in default.items()} if isinstance(default, dict) else {name: default}
        for key, value in values.items():
            assert f"--config.{key}={value!r} ({type(value).__name__}): " in text
    assert "--config.lora.alpha=16.0 (float): the adapter's output is scaled by alpha/rank --config.lora.layers=" in text
    assert "--config.optimizer.learning_rate=5e-06 (float): the paper's; small models take far more --config" in text
    assert "(str): mixing: (1-ρ) L0 + ρ mean ℓ; offline: bilevel selection; online, dynamic: the model answers" in text


def test_all_modules_import_in_one_process():
    modules = [module.name for module in pkgutil.walk_packages(bilevel_jax.__path__, "bilevel_jax.")]
    assert {f"bilevel_jax.{name}.__main__" for name in COMMANDS[1:]} | {"bilevel_jax.main"} <= set(modules)
    for name in modules:
        importlib.import_module(name)


@pytest.fixture(params=COMMANDS)
def registered(request):
    """Flags from which a command parses, beside flags of absl, as `cli.run` registers them."""
    command = importlib.import_module(f"bilevel_jax.{request.param}{'' if request.param == 'main' else '.__main__'}")
    target = flags.FlagValues()
    flags.DEFINE_integer("verbosity", -1, "As absl's.", flag_values=target)
    cli.register(copy.deepcopy(command.FLAGS), target=target)
    return command.FLAGS, target


def test_registered_flags_are_listed(registered):
    command_flags, target = registered
    text = target.main_module_help()
    assert len(command_flags) and all(f"--{name}:" in text or f"--[no]{name}:" in text for name in command_flags)


def test_unknown_flags_are_refused(registered, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.parse(["command", "--wokdir=x"], registered[1])
    stderr = capsys.readouterr().err
    assert caught.value.code == 2 and "wokdir" in stderr and one_line(stderr)


# --------------------------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------------------------

FLAG_ERRORS = [
    (["--config=absent.py"], "there is no config 'absent.py'"),
    (["--config=absent.py", "--config.seed=1"], "there is no config 'absent.py'"),
    (["--config=finetun"], "there is no config 'finetun' (did you mean finetune?)"),
    (["--config=."], "there is no config '.'"),
    ([], "--config"),
    (["--config=file"], "without get_config()"),
    (["--config=importing.py"], "No module named 'nowhere'"),
    (["--config=broken.py"], "broken.py"),
    (["--config=misspelled.py"], "misspelled.py:4: the config has no key lorra.rank (did you mean lora.rank?)"),
    (["--config=by_name.py"], "by_name.py:4: the config has no key lorra.rank (did you mean lora.rank?)"),
    (["--config=wrong.py"], "--config cannot be read: wrong.py:2: no key or attribute absent"),
    (["--config=tiny.py:giant"], "no tier giant"),
    (["--config=tiny.py", "--wokdir=x"], "wokdir"),
    (["--config=tiny.py", "extra"], "'extra'"),
    (["--config=tiny.py", "--config.sede=1"], "the config has no key sede (did you mean seed?)"),
    (["--config=tiny.py", "--config.seed=1", "--config.lora.size=1"], "the config has no key lora.size"),
    (["--config=tiny.py", "--config.selection.lr=1"], "no key selection.lr (did you mean selection.learning_rate?)"),
    (["--config=tiny.py", "--config.lr=1"], "no key lr (did you mean optimizer.learning_rate or selection.learning_rate?)"),
    (["--config=tiny.py", "--config.learning_rate=1"], "(did you mean optimizer.learning_rate or selection.learning_rate?)"),
    (["--config=tiny.py", "--noconfig.model.remt"], "no key model.remt (did you mean model.remat?)"),
    (["--config=tiny.py", "--config.seed.x=1"], "the config has no key seed.x (did you mean seed?)"),
    (["--config=tiny.py", "--config.a.b.c=1"], "the config has no key a.b.c"),
    (["--config=tiny.py", "--config.data.upper[0]=x"], "the config has no key data.upper[0] (did you mean data.upper?)"),
    (
        ["--config=tiny.py", "--config.lora=1"],
        "--config.lora=1: lora is a section; name a key of it: lora.rank, lora.alpha, lora.layers, lora.targets",
    ),
    (["--config=tiny.py", "--config.model=x"], "--config.model=x: model is a section; name a key of it: model.path, "),
    (["--config=tiny.py", "--config.max_len=1"], "the config has no key max_len (did you mean data.max_length?)"),
    (["--config=tiny.py", "--config.num_epochs=two"], "two"),
    (["--config=tiny.py", "--config.optimizer.learning_rate=fast"], "fast"),
]
CONFIG_ERRORS = [
    (["--config=finetune"], "data.upper is empty"),
    (["--config=configs/finetune.py", "--config.data.upper=a", "--config.data.lower=b"], "model.path is empty"),
    (["--config=tiny.py", "--config.method=ofline"], "method='ofline'"),
    (["--config=tiny.py", "--config.data.lower=absent.jsonl"], "absent.jsonl: no such file"),
    (["--config=tiny.py", "--config.data.upper=empty.jsonl"], "empty.jsonl: no rows"),
    (["--config=tiny.py", "--config.model.path=./absent"], "./absent: no such directory"),
    (["--config=tiny.py", "--config.data.max_length=999"], "data.max_length=999"),
    (["--config=tiny.py", "--workdir=file"], "file"),
    (["--config=tiny.py", "--workdir=file/run"], "file"),
]


@pytest.mark.parametrize("arguments, reason", FLAG_ERRORS)
def test_wrong_flags(call, arguments, reason):
    """One line, and status 2."""
    status, stderr = call(*arguments)
    assert status == 2 and reason in stderr and one_line(stderr)


@pytest.mark.parametrize("arguments, reason", CONFIG_ERRORS)
def test_wrong_values(call, arguments, reason):
    """One line, and status 1."""
    status, stderr = call(*arguments)
    assert status == 1 and reason in stderr and one_line(stderr)


@pytest.mark.parametrize(
    "arguments, status, reason",
    [
        (["--config.selection.lr=1"], 2, "no key selection.lr (did you mean selection.learning_rate?)"),
        (["--config.data.lower=absent.jsonl"], 1, "absent.jsonl: no such file"),
    ],
)
def test_errors_end_the_process(directory, arguments, status, reason):
    done = run("--config=tiny.py", *arguments, cwd=directory)
    assert done.returncode == status and reason in done.stderr and one_line(done.stderr)


@pytest.mark.parametrize("name, rows", [("score", "data"), ("sample", "prompts")])
@pytest.mark.parametrize(
    "model, reason",
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "awq"}}, "quantised weights .awq. are not supported"),
    ],
)
def test_the_model_is_looked_at_before_its_tokenizer(tmp_path, data, name, rows, model, reason):
    """The directory has no tokenizer."""
    (tmp_path / "config.json").write_text(json.dumps(model))
    with pytest.raises(ValueError, match=reason):
        run_command(name, [f"--model={tmp_path}", f"--{rows}={data / 'lower.jsonl'}", f"--out={tmp_path / 'out.jsonl'}"])


# --------------------------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------------------------


def test_run(directory):
    changes = ["--config.num_epochs=1", "--config.seed=3", "--config.eval.keep=0.5", "--config.method=mixing"]
    done = run("--config=tiny.py", *changes, cwd=directory)
    assert done.returncode == 0, done.stderr
    config = json.loads((directory / "runs" / "tiny" / "config.json").read_text())
    assert (config["num_epochs"], config["seed"], config["eval"]["keep"], config["method"]) == (1, 3, 0.5, "mixing")
    for title in ("held-out loss", "trusted rows", "mixture, right answers", "in runs/tiny"):
        assert title in done.stdout


def test_check(start, directory, capsys):
    """The dry run writes nothing."""
    before = sorted(directory.rglob("*"))
    start("--config=tiny.py", "--check", "--plan", "--config.num_epochs=1")
    stdout = capsys.readouterr().out
    assert "steps: 6 in 1 epochs" in stdout and "are free at runs/tiny" in stdout and "together while training" in stdout
    assert "the same command without --check starts the run" in stdout
    assert sorted(directory.rglob("*")) == before


@pytest.mark.parametrize("tier, name", [("", "tiny"), (":a/b", "tiny-a_b")])
def test_default_workdir(call, directory, tier, name):
    call(f"--config=tiny.py{tier}", "--config.data.lower=absent.jsonl")  # fails after the workdir is created
    assert [file.name for file in (directory / "runs").iterdir()] == [name]


def test_compilations_are_cached_for_the_next_process(tmp_path):
    code = """if True:
        from bilevel_jax import cli
        def main():
            import jax  # as late as commands do
            jax.jit(lambda x: x + 3)(1.0)
        cli.run(main)
    """

    def cached():
        return {str(file): file.stat().st_mtime for file in tmp_path.rglob("*-cache")}

    def run(**environment):
        environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")} | environment
        subprocess.run([sys.executable, "-c", code], check=True, env=environment)
        return cached()

    first = run(XDG_CACHE_HOME=str(tmp_path))
    assert first and run(XDG_CACHE_HOME=str(tmp_path)) == first
    after = run(XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))
    assert any(file.startswith(str(tmp_path / "mine")) for file in after)

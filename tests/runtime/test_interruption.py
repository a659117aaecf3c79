"""A run with a full disk, a read-only disk, a second process, or another model."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest

from bilevel_jax import cli, errors, train
from bilevel_jax.models import huggingface
from bilevel_jax.runtime import interruption, metrics
from bilevel_jax.runtime.workdir import locked, open_workdir
from tests.conftest import make_model
from tests.test_train import REFINED, without


def test_a_thread_has_no_handlers():
    """Python allows them in the main thread only; a run in another one ends with its process."""
    before, caught = signal.getsignal(signal.SIGTERM), []

    def run():
        with interruption.catch_signals() as received:
            caught.append((received, signal.getsignal(signal.SIGTERM) is before))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert caught == [([], True)]


# --------------------------------------------------------------------------------------------------------------------
# Locks
# --------------------------------------------------------------------------------------------------------------------


def snapshot(directory):
    return {file: file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def test_a_second_process_is_refused(make_config, tmp_path):
    """Before it reads a model, and as long as the first process has not ended; it may end by SIGKILL."""
    workdir, config = tmp_path / "run", make_config({"model.path": "absent/dir/ectory"})
    holding = "import sys, time, pathlib\nfrom bilevel_jax.runtime import workdir\n"
    holding += "with workdir.locked(pathlib.Path(sys.argv[1])):\n    print('in', flush=True)\n    time.sleep(60)\n"
    workdir.mkdir()
    with subprocess.Popen([sys.executable, "-c", holding, workdir], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "in\n"
        before = snapshot(workdir)
        with pytest.raises(errors.RunError, match=f"run is in use by process {first.pid} on .*; wait .*--workdir") as caught:
            train.run(config, workdir)
        assert "\n" not in str(caught.value) and snapshot(workdir) == before
        first.kill()
    with pytest.raises(ValueError, match="absent/dir/ectory: no such directory"):
        train.run(config, workdir)


def test_without_locks_a_warning_is_printed(make_config, tmp_path, monkeypatch, capsys):
    def unsupported(file, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locked(tmp_path):
        assert "cannot be locked (Operation not supported)" in capsys.readouterr().err


def test_the_lock_is_released_after_the_run(make_config, tmp_path):
    for _ in range(2):
        with open_workdir(make_config(), tmp_path / "run"):
            pass


# --------------------------------------------------------------------------------------------------------------------
# Signals
# --------------------------------------------------------------------------------------------------------------------

# Prints the first signal. Then the main thread sleeps in C, for good or for short times.
CATCHING = """
import ctypes, sys
from bilevel_jax.runtime import interruption
with interruption.catch_signals() as received:
    print("in", flush=True)
    while ctypes.CDLL(None).usleep(100_000) or True:
        if received:
            print(*received, flush=True)
            while True:
                ctypes.CDLL(None).pause() if sys.argv[1] == "hangs" else ctypes.CDLL(None).usleep(10_000)
"""


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("main_thread", ["hangs", "runs"])
def test_a_second_signal_ends_the_process(second, main_thread):
    """The first one is only noted, also if it is delivered twice, as `timeout` does."""
    command = [sys.executable, "-c", CATCHING, main_thread]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "in\n"
        for _ in range(2):
            process.send_signal(signal.SIGINT)
        assert process.stdout.readline().split()[0] == str(int(signal.SIGINT))
        time.sleep(2 * interruption.SAME)
        assert process.poll() is None
        process.send_signal(second)
        assert process.wait(timeout=10) == 128 + second
        stderr = process.stderr.read()
        assert stderr.count("SIGINT: stopping; a second signal ends the process without saving") == 1
        assert f"{second.name}: the second signal ends the process" in stderr


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_exit_status(number, status, capsys):
    def main():
        raise errors.Interrupted(f"{number.name}: saved", number)

    with pytest.raises(SystemExit) as caught:
        cli.call(main)
    assert caught.value.code == status and capsys.readouterr().err == f"\n{number.name}: saved\n"


# --------------------------------------------------------------------------------------------------------------------
# Another model
# --------------------------------------------------------------------------------------------------------------------


def test_refuses_another_model_under_the_same_name(make_config, tmp_path, monkeypatch):
    """Refuses other weights, and another tokenizer."""
    model = make_model(tmp_path / "model", "gpt_neox")
    config = make_config({"model.path": str(model), "checkpoint.every": 1, "method": "mixing", "eval.num_upper": 0})
    workdir = tmp_path / "run"

    def interrupt(*_):
        raise KeyboardInterrupt  # ends the run without saving

    with monkeypatch.context() as patch:
        patch.setattr(metrics.MetricsWriter, "write", lambda self, step, *_: step and interrupt())
        with pytest.raises(KeyboardInterrupt):
            train.run(config, workdir)
    assert (workdir / "checkpoints" / "1").is_dir()
    before = snapshot(workdir)

    def refused():
        with pytest.raises(errors.RunError, match="weights or tokenizer at .*model changed since this run began") as caught:
            train.run(config, workdir)
        return "\n" not in str(caught.value) and snapshot(workdir) == before

    shape = huggingface.read_config(model)
    weights = huggingface.load_params(model, shape)
    huggingface.save_params(model, shape, weights | {"norm": jax.tree.map(lambda x: 1.001 * x, weights["norm"])})
    assert refused()
    huggingface.save_params(model, shape, weights)
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"].pop()
    file.write_text(json.dumps(content))
    assert refused()


# --------------------------------------------------------------------------------------------------------------------
# A disk that is full, or read-only
# --------------------------------------------------------------------------------------------------------------------

# Runs in a mount namespace, on a file system of a few MB. The disk is filled before a stage of the run: the run fails there, and
# the next attempt continues. Prints the outcome of each attempt.
DISK = """
import json, pathlib, subprocess, sys
import ml_collections
from bilevel_jax import errors, files, train
from bilevel_jax.models import huggingface
from bilevel_jax.runtime import checkpoint, metrics, response_log, weight_table

disk, stages = pathlib.Path(sys.argv[1]), json.loads(sys.argv[3])
config = ml_collections.ConfigDict(json.loads(pathlib.Path(sys.argv[2]).read_text()))
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16M", "tmpfs", disk], check=True)

def fill():
    with open(disk / "ballast", "ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                pass

def attempt(disk=disk):
    try:
        train.run(config, disk / "run")
        return "finished"
    except errors.RunError as error:
        return str(error)

def full_for(name, write):
    def write_on_full(file, content):
        if file.name == name:
            fill()
        write(file, content)
    return write_on_full

OWNERS = {
    "metrics": (metrics.MetricsWriter, "write"),
    "checkpoint": (checkpoint.Checkpoints, "save"),
    "responses": (response_log.ResponseLog, "write"),
    "weights": (weight_table, "write_blocks"),
    "adapter": (huggingface, "save_adapter"),
}
outcomes = {}
for stage in stages:
    owner, name = OWNERS.get(stage, (files, "write_atomically"))
    original = getattr(owner, name)
    def full(*args, original=original, **options):
        fill()
        return original(*args, **options)
    setattr(owner, name, full if stage in OWNERS else full_for(stage, original))
    outcomes[stage] = attempt()
    setattr(owner, name, original)
    (disk / "ballast").unlink()
locked = disk.parent / "locked"
subprocess.run(["mount", "--bind", disk, locked], check=True)
subprocess.run(["mount", "-o", "remount,bind,ro", locked], check=True)
outcomes["read-only"] = attempt(locked)
outcomes["finally"] = attempt()
subprocess.run(["cp", "-r", disk / "run", sys.argv[4]], check=True)
print(json.dumps(outcomes))
"""
PRIVATE = ["unshare", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]), "--mount"]


def mounts() -> bool:
    try:
        return not subprocess.run([*PRIVATE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode
    except OSError:
        return False


ALL_STAGES = ["config.json", "metrics", "checkpoint", "responses", "weights", "adapter", "summary.json"]


@pytest.fixture(scope="module")
def uninterrupted(make_config, tmp_path_factory):
    """Config and workdir of a run with enough space."""
    config, workdir = make_config(REFINED | {"log.tensorboard": True, "num_epochs": 1}), tmp_path_factory.mktemp("expected") / "run"
    train.run(config, workdir)
    return config, workdir


@pytest.mark.skipif(not mounts(), reason="this machine does not allow tests to mount")
@pytest.mark.parametrize(
    "stages", [["metrics", "checkpoint", "weights", "summary.json"], pytest.param(ALL_STAGES, marks=pytest.mark.long)]
)
@pytest.mark.slow
def test_a_full_disk_loses_nothing(uninterrupted, tmp_path, stages):
    """The run fails with one line at each stage, and with free space it ends as an uninterrupted run."""
    config, expected = uninterrupted
    (tmp_path / "config.json").write_text(config.to_json())
    for name in ("disk", "locked"):
        (tmp_path / name).mkdir()
    arguments = [tmp_path / "disk", tmp_path / "config.json", json.dumps(stages), tmp_path / "run"]
    done = subprocess.run([*PRIVATE, sys.executable, "-c", DISK, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert outcomes.pop("finally") == "finished"
    assert "Read-only file system" in outcomes.pop("read-only")
    assert list(outcomes) == stages
    for stage, line in outcomes.items():
        # The first checkpoint, after two steps, is written once the disk was full for `checkpoint`, or if the stage comes later.
        remedy = "starts from step 0" if stage in ("config.json", "metrics", "checkpoint") else "continues"
        assert "No space left on device" in line and f"the same command {remedy}" in line and "\n" not in line, (stage, line)
    run = tmp_path / "run"
    for file in ("config.json", "responses.jsonl", "adapter/adapter_model.safetensors", "weights/epoch_1.parquet"):
        assert (run / file).read_bytes() == (expected / file).read_bytes(), file
    summaries = (json.loads((directory / "summary.json").read_text()) for directory in (run, expected))
    assert len({json.dumps(without(summary, "time/")) for summary in summaries}) == 1

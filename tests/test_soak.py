"""The soak in small: a run that is killed twice and has a checkpoint damaged ends as the one that was left alone."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from experiments import soaking

ROOT = pathlib.Path(__file__).parent.parent


def run(tmp_path, *arguments):
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiles much and computes little
    command = [sys.executable, "-m", "experiments.soak", f"--workdir={tmp_path / 'soak'}", f"--out={tmp_path / 'out'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | quick)


def test_killed_twice(tmp_path):
    done = run(tmp_path, "--kills=2", "--faults=1", "--long_steps=0")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert found["mismatches"] == [] and found["runs"] == 1 and sum(found["kills"].values()) == 2 and found["tries"] == 3
    assert "| mismatches with the uninterrupted run | 0 |" in done.stdout and done.stdout.strip() == (tmp_path / "out.md").read_text().strip()


def test_it_removes_only_its_own(tmp_path):
    (tmp_path / "soak").mkdir()
    (tmp_path / "soak" / "precious").touch()
    done = run(tmp_path, "--kills=0")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "holds something else" in done.stderr
    assert (tmp_path / "soak" / "precious").exists()


def fake(directory, loss=1.5, seconds=3.0, weight=b"w"):
    """What a run leaves, as far as it is compared."""
    for name in ("adapter", "weights"):
        (directory / name).mkdir(parents=True)
    for name in ("config.json", "responses.jsonl", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"):
        (directory / name).write_bytes(b"{}")
    (directory / "weights" / "epoch_1.parquet").write_bytes(weight)
    (directory / "metrics.jsonl").write_text(json.dumps({"step": 1, "train/loss": loss, "speed/tokens_per_s": seconds}) + "\n")
    (directory / "summary.json").write_text(json.dumps({"eval/upper_loss": loss, "time/train": seconds}))
    return soaking.results(directory)


@pytest.mark.parametrize(
    "changes, differing",
    [
        ({"seconds": 4.0}, []),
        ({"loss": np.nextafter(1.5, 2)}, ["metrics.jsonl", "summary.json"]),
        ({"weight": b"v"}, ["weights/epoch_1.parquet"]),
    ],
)
def test_everything_but_times_is_compared_to_the_bit(tmp_path, changes, differing):
    assert soaking.differing(fake(tmp_path / "one"), fake(tmp_path / "other", **changes)) == differing

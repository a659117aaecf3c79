"""Whole runs on eight devices, for every mesh of a table, against the same run on one."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pyarrow.parquet
import pytest
import safetensors.numpy
from conftest import NUM_LOWER, read_jsonl

from bilevel_jax import checkpoint, config as configuration, sharding, train
from bilevel_jax.models import huggingface

MESHES = [(8, 1, 1), (1, 8, 1), (2, 4, 1), (4, 1, 2), (2, 2, 2), (1, 2, 4), (1, 1, 8)]
NAMES = ["x".join(map(str, shape)) for shape in MESHES]
STEPS = 3
SETTINGS = {
    "num_epochs": 1,
    "method": "dynamic",
    "batch.size": 8,
    "batch.micro_size": 8,
    "online.ratio": 0.5,
    "online.refresh_every": 2,
    "online.max_new_tokens": 6,
    "online.temperature": 0.0,
    "online.slots": 8,
    "optimizer.name": "sgd",
    "optimizer.learning_rate": 0.1,
    "selection.learning_rate": 1.0,
    "selection.coefficient_at": "current",
    "eval.num_upper": 0,
    "checkpoint.every": 0,
}


def run_on_meshes(directory: str):
    """To a directory for each mesh; in a process of its own. Beside each run stands where its arrays were."""
    load, save = huggingface.load_params, checkpoint.Checkpoints.save

    def load_and_note(*args):
        base = load(*args)
        noted["base"] = {"/".join(path): leaf.addressable_shards[0].data.shape for path, leaf in huggingface.flatten(base)}
        return base

    def save_and_note(self, step, state, *rest):
        noted["whole"] = [len(leaf.sharding.device_set) * leaf.is_fully_replicated for leaf in jax.tree.leaves(state)]
        save(self, step, state, *rest)

    huggingface.load_params, checkpoint.Checkpoints.save = load_and_note, save_and_note
    for shape in [(1, 1, 1), *MESHES]:
        config = configuration.default()
        config.update(json.loads((pathlib.Path(directory) / "config.json").read_text()))
        config.mesh = dict(zip(sharding.AXES, shape))
        noted, name = {}, "x".join(map(str, shape))
        train.run(config, pathlib.Path(directory) / name)
        (pathlib.Path(directory) / f"{name}.json").write_text(json.dumps(noted))


@pytest.fixture(scope="module")
def runs(make_config, tmp_path_factory):
    """`f(name)` -> θ, ω, responses and the note of where arrays were, of the run on this mesh."""
    directory = tmp_path_factory.mktemp("meshes")
    (directory / "config.json").write_text(make_config(SETTINGS).to_json())
    command = [sys.executable, "-c", f"import test_mesh; test_mesh.run_on_meshes({str(directory)!r})"]
    devices = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    environment = os.environ | devices | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(command, cwd=pathlib.Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def read(name):
        workdir = directory / name
        theta = safetensors.numpy.load_file(workdir / "adapter" / "adapter_model.safetensors")
        omega = pyarrow.parquet.read_table(workdir / "weights" / "epoch_1.parquet")["logit"].to_numpy()
        return theta, omega, read_jsonl(workdir / "responses.jsonl"), json.loads((directory / f"{name}.json").read_text())

    return read


@pytest.mark.parametrize("name", NAMES)
def test_every_mesh_gives_the_trajectory_of_one_device(runs, name):
    (theta, omega, responses, _), (expected_theta, expected_omega, expected, _) = runs(name), runs("1x1x1")
    assert theta.keys() == expected_theta.keys()
    for key, matrix in theta.items():
        np.testing.assert_allclose(matrix, expected_theta[key], rtol=0, atol=1e-5)
    np.testing.assert_allclose(omega, expected_omega, rtol=0, atol=1e-5)
    told = [[(x["step"], x["id"], x["text"], x["finish_reason"]) for x in lines] for lines in (responses, expected)]
    assert told[0] == told[1] and len(told[0]) > 4
    for key in ("logprob", "ratio"):
        np.testing.assert_allclose([x[key] for x in responses], [x[key] for x in expected], rtol=0, atol=1e-4)


def test_the_trajectory_goes_somewhere(runs):
    """Or the tolerance would mean nothing."""
    theta, omega, _, _ = runs("1x1x1")
    assert max(np.abs(matrix).max() for key, matrix in theta.items() if "lora_B" in key) > 1e-2  # zero at the start
    assert np.abs(omega).max() > 1e-2

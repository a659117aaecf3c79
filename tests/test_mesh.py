"""Whole runs on eight devices, for every mesh of a table, and on two processes, against the same run on one device."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pyarrow.parquet
import pytest
import safetensors.numpy

from bilevel_jax import checkpoint, page, sharding, train
from bilevel_jax import config as configuration
from bilevel_jax.models import huggingface
from tests.conftest import read_jsonl

MESHES = [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 2, 4)]
NAMES = {shape: "x".join(map(str, shape)) for shape in [(1, 1, 1), *MESHES]}
ROOT = pathlib.Path(__file__).parent.parent
ONE = NAMES[1, 1, 1]
SETTINGS = {
    "num_epochs": 1,
    "method": "dynamic",
    "batch.size": 8,
    "batch.micro_size": 8,
    "online.ratio": 0.5,
    "online.generate": "all",  # refreshes of one shape
    "online.refresh_every": 2,
    "online.max_new_tokens": 6,
    "online.temperature": 0.0,
    "online.slots": 8,
    "optimizer.name": "sgd",
    "optimizer.learning_rate": 0.1,
    "selection.learning_rate": 1.0,
    "selection.coefficient_at": "current",
    "eval.num_upper": 0,
    "eval.num_lower": 0,
    "checkpoint.every": 0,
}
CONFIG = """
import json, pathlib, ml_collections

def get_config():
    return ml_collections.ConfigDict(json.loads((pathlib.Path(__file__).parent / "config.json").read_text()))
"""
QUICK = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiles much and computes little


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

    huggingface.load_params, checkpoint.Checkpoints.save, page.write = load_and_note, save_and_note, lambda *_: None
    for shape, name in NAMES.items():
        config = configuration.default()
        config.update(json.loads((pathlib.Path(directory) / "config.json").read_text()))
        config.mesh = dict(zip(sharding.AXES, shape))
        noted = {}
        train.run(config, pathlib.Path(directory) / name)
        (pathlib.Path(directory) / f"{name}.json").write_text(json.dumps(noted))

    def save_and_stop(*args):
        save(*args)
        raise InterruptedError

    config.checkpoint.every = 2
    for shape, save_or_stop in (((1, 1, 1), save_and_stop), ((2, 2, 2), save)):  # begun on one device, ended on eight
        config.mesh, checkpoint.Checkpoints.save = dict(zip(sharding.AXES, shape)), save_or_stop
        with contextlib.suppress(InterruptedError):
            train.run(config, pathlib.Path(directory) / "moved")


def start(*arguments, **environment):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=os.environ | QUICK | environment, **pipes)


@pytest.fixture(scope="module")
def under_way(make_config, tmp_path_factory):
    """The directory of all runs; two processes that share one; what they are compared with, made meanwhile."""
    directory = tmp_path_factory.mktemp("meshes")
    (directory / "config.json").write_text(make_config(SETTINGS).to_json())
    (directory / "config.py").write_text(CONFIG)
    meshes = f"from tests import test_mesh; test_mesh.run_on_meshes({str(directory)!r})"
    alone = start("-c", meshes, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    arguments = [f"--config={directory / 'config.py'}", f"--workdir={directory / 'pair'}", "--config.mesh.fsdp=2"]
    place = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    pair = [start("-m", "bilevel_jax.main", *arguments, **place, JAX_PROCESS_ID=str(i)) for i in range(2)]
    yield directory, alone, pair
    for process in (alone, *pair):
        process.kill()


@pytest.fixture(scope="module")
def directory(under_way):
    """Where the runs on every mesh are."""
    directory, alone, _ = under_way
    _, errors = alone.communicate()
    assert alone.returncode == 0, errors
    return directory


def assert_same_run(workdir, other):
    """θ, ω, responses and their last ratios."""
    theta, like = (safetensors.numpy.load_file(run / "adapter" / "adapter_model.safetensors") for run in (workdir, other))
    assert theta.keys() == like.keys()
    for key, matrix in theta.items():
        np.testing.assert_allclose(matrix, like[key], rtol=0, atol=1e-5)
    omega, like = (pyarrow.parquet.read_table(run / "weights" / "epoch_1.parquet") for run in (workdir, other))
    assert omega["id"] == like["id"]
    np.testing.assert_allclose(omega["logit"].to_numpy(), like["logit"].to_numpy(), rtol=0, atol=1e-5)
    said, like = (read_jsonl(run / "responses.jsonl") for run in (workdir, other))
    keys = "step", "id", "sample", "text", "finish_reason"
    assert [[x[key] for key in keys] for x in said] == [[x[key] for key in keys] for x in like] and len(said) > 4
    for key in ("logprob", "ratio"):
        found, expected = (np.array([x[key] for x in lines], float) for lines in (said, like))  # NaN: not used
        assert np.isfinite(found).sum() > 4
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_every_mesh_gives_the_trajectory_of_one_device(directory, shape):
    assert_same_run(directory / NAMES[shape], directory / ONE)


def test_a_run_goes_on_with_another_mesh(directory):
    assert_same_run(directory / "moved", directory / ONE)


def test_the_trajectory_goes_somewhere(directory):
    """Or the tolerance would mean nothing."""
    theta = safetensors.numpy.load_file(directory / ONE / "adapter" / "adapter_model.safetensors")
    omega = pyarrow.parquet.read_table(directory / ONE / "weights" / "epoch_1.parquet")["logit"].to_numpy()
    assert max(np.abs(matrix).max() for key, matrix in theta.items() if "lora_B" in key) > 1e-2  # zero at the start
    assert np.abs(omega).max() > 1e-2


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_the_base_is_split_and_what_learns_is_whole(directory, shape):
    """Two layers of hidden width 16, 2 heads of 8, feed-forward 24, vocabulary 300."""
    (data, fsdp, tensor), found = shape, json.loads((directory / f"{NAMES[shape]}.json").read_text())
    expected = {
        "embed_tokens": [300 // tensor, 16 // fsdp],
        "lm_head": [300 // tensor, 16 // fsdp],
        "norm/scale": [16],
        "layers/input_layernorm/bias": [2, 16],
        "layers/attention/query_key_value/kernel": [2, 16 // fsdp, 48 // tensor],
        "layers/attention/query_key_value/bias": [2, 48 // tensor],
        "layers/attention/dense/kernel": [2, 16 // tensor, 16 // fsdp],
        "layers/attention/dense/bias": [2, 16 // fsdp],
        "layers/mlp/dense_h_to_4h/kernel": [2, 16 // fsdp, 24 // tensor],
        "layers/mlp/dense_4h_to_h/kernel": [2, 24 // tensor, 16 // fsdp],
    }
    assert {key: found["base"][key] for key in expected} == expected
    assert set(found["whole"]) == {data * fsdp * tensor}


def test_two_processes_give_the_trajectory_of_one(under_way, directory):
    """The weights are split between them; one of them writes the run."""
    _, _, pair = under_way
    told = [process.communicate(timeout=100) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], told
    assert f"in {directory / 'pair'}" in told[0][0] and "pair" not in told[1][0]
    assert_same_run(directory / "pair", directory / ONE)

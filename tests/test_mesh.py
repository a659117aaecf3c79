"""Whole runs on eight devices, for every mesh of a table, and on two processes, against the same run on one device."""

import contextlib
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

from bilevel_jax import config as configuration
from bilevel_jax import selector, sharding, train
from bilevel_jax.models import huggingface
from bilevel_jax.report import page
from bilevel_jax.runtime import checkpoint, weight_table
from tests.conftest import read_jsonl
from tests.runtime.test_distributed import free_address

SINGLE = (1, 1, 1)
MESHES = [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 2, 4)]
NAMES = {shape: "x".join(map(str, shape)) for shape in [SINGLE, *MESHES]}
ROOT = pathlib.Path(__file__).parent.parent
ONE = NAMES[SINGLE]
NUM_SPLIT = 8 * 1013
SETTINGS = {
    "num_epochs": 1,
    "method": "dynamic",
    "data.num_lower": 24,  # eight devices divide them
    "batch.size": 7,
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
OFFLINE = {"method": "offline"}  # a greedy answer would hang on the last bit
TOKENS = OFFLINE | {"selection.unit": "token", "selection.token_learning_rate": 0.5, "selection.coefficient_at": "next"}
LLAMAS = {  # run -> mesh and what differs; it has fewer heads of keys and values than `tensor` has parts, and a tied head
    "llama": (SINGLE, {}),
    "llama, eight": ((1, 2, 4), {}),
    "llama, offline": (SINGLE, OFFLINE),
    "llama, tokens": (SINGLE, TOKENS),
    "llama, tokens, eight": ((1, 2, 4), TOKENS),
    "llama, half": (SINGLE, OFFLINE | {"model.dtype": "bfloat16"}),
    "llama, half, eight": ((1, 2, 4), OFFLINE | {"model.dtype": "bfloat16"}),
}
MORTAL = """
import os, runpy, signal
from bilevel_jax import checkpoint

save = checkpoint.Checkpoints.save

def save_or_die(self, step, *rest):
    if step == 3:
        self._response.result()
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, step, *rest)

checkpoint.Checkpoints.save = save_or_die
runpy.run_module("bilevel_jax.main", run_name="__main__")
"""
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

    def configured(shape, changes=()):
        config = configuration.default()
        config.update(json.loads((pathlib.Path(directory) / "config.json").read_text()))
        config.update_from_flattened_dict({f"mesh.{axis}": size for axis, size in zip(sharding.AXES, shape)} | dict(changes))
        return config

    huggingface.load_params, checkpoint.Checkpoints.save, page.write = load_and_note, save_and_note, lambda *_: None
    for shape, name in NAMES.items():
        noted = {}
        train.run(configured(shape), pathlib.Path(directory) / name)
        (pathlib.Path(directory) / f"{name}.json").write_text(json.dumps(noted))
    huggingface.load_params, checkpoint.Checkpoints.save = load, save
    for name, (shape, changes) in LLAMAS.items():
        model = {"model.path": str(pathlib.Path(directory) / "model")}
        train.run(configured(shape, model | changes), pathlib.Path(directory) / name)

    def save_and_stop(self, step, state, *rest):
        save_and_note(self, step, state, *rest)
        if step == last:
            raise InterruptedError

    # Begun on one device, gone on with on eight, ω split between them, ended on eight with ω whole.
    checkpoint.Checkpoints.save, noted, split = save_and_stop, {}, {"mesh.shard_selector": True}
    for last, shape, changes in ((1, SINGLE, {}), (3, (2, 2, 2), split), (None, (8, 1, 1), {})):
        with contextlib.suppress(InterruptedError):
            train.run(configured(shape, {"checkpoint.every": 1} | changes), pathlib.Path(directory) / "moved")
        (pathlib.Path(directory) / f"moved_{last}.json").write_text(json.dumps(noted))
    (pathlib.Path(directory) / "update.hlo").write_text(compiled_update())


def compiled_update() -> str:
    """One move of an ω that is split over eight devices, as each of them computes it."""
    mesh, adam = sharding.make_mesh(8), selector.Selector(optimizer="adam")
    state = selector.init(adam, NUM_SPLIT)
    state = jax.tree.map(sharding.device_put, state, sharding.shardings(mesh, state, "examples"))
    entries = sharding.replicate((np.arange(4, dtype=np.int32), *np.ones((2, 4), np.float32)), mesh)

    def update(state, sample, share, cost):
        return selector.update(adam, state, sample, share, 4.0, cost, 0.1)

    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(update, out_shardings=places).lower(state, *entries).compile().as_text()


def start(*arguments, **environment):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=os.environ | QUICK | environment, **pipes)


def start_pair(directory, name: str, *changes: str, mortal=()) -> list[subprocess.Popen]:
    """Two processes of one run, the base and ω split between them. A mortal one dies when it has two checkpoints."""
    arguments = [f"--config={directory / 'config.py'}", f"--workdir={directory / name}", "--config.mesh.fsdp=2"]
    arguments += ["--config.mesh.shard_selector=True", *changes]
    place = {"JAX_COORDINATOR_ADDRESS": free_address(), "JAX_NUM_PROCESSES": "2"}
    commands = [("-c", MORTAL) if i in mortal else ("-m", "bilevel_jax.main") for i in range(2)]
    return [start(*command, *arguments, **place, JAX_PROCESS_ID=str(i)) for i, command in enumerate(commands)]


@pytest.fixture(scope="module")
def under_way(make_config, llama, tmp_path_factory):
    """The directory of all runs; two processes that share one; what they are compared with, made meanwhile."""
    directory = tmp_path_factory.mktemp("meshes")
    (directory / "config.json").write_text(make_config(SETTINGS).to_json())
    (directory / "config.py").write_text(CONFIG)
    (directory / "model").symlink_to(llama)
    meshes = f"from tests import test_mesh; test_mesh.run_on_meshes({str(directory)!r})"
    alone = start("-c", meshes, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    pair = start_pair(directory, "pair")
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


def learned(run) -> tuple[np.ndarray, np.ndarray]:
    """θ and ω."""
    theta = safetensors.numpy.load_file(run / "adapter" / "adapter_model.safetensors")
    omega = pyarrow.parquet.read_table(run / "weights" / "epoch_1.parquet")["logit"].to_numpy()
    return np.concatenate([theta[key].ravel() for key in sorted(theta)]), omega


def test_so_it_does_with_few_heads_of_keys_and_a_tied_head(directory):
    assert_same_run(directory / "llama, eight", directory / "llama")


def test_and_with_weights_of_tokens(directory):
    runs = [directory / name for name in ("llama, tokens", "llama, tokens, eight")]
    for one, eight in zip(*map(learned, runs)):
        np.testing.assert_allclose(eight, one, rtol=0, atol=1e-5)
    one, eight = (np.concatenate(weight_table.of_tokens(run)["weight"].to_pylist()) for run in runs)
    np.testing.assert_allclose(eight, one, rtol=0, atol=1e-4)
    assert np.ptp(one) > 0.01


def test_in_half_precision_a_mesh_changes_less_than_the_precision_does(directory):
    """Both are rounding to 8 bits: on a mesh sums are split, and their parts rounded, but inputs and weights stay as they are."""
    runs = [learned(directory / name) for name in ("llama, offline", "llama, half", "llama, half, eight")]
    for full, half, eight in zip(*runs):
        assert 0 < np.linalg.norm(eight - half) < np.linalg.norm(half - full) < 0.1 * np.linalg.norm(full)


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


def test_no_device_sees_all_of_a_split_omega(directory):
    program = (directory / "update.hlo").read_text()
    assert f"f32[{NUM_SPLIT // 8}]" in program and f"[{NUM_SPLIT}]" not in program


def test_omega_is_split_where_it_is_to_be(directory):
    """Logits and visits, nothing else: mirror descent has no moments."""
    for last, split in ((1, 0), (3, 2), (None, 0)):
        found = json.loads((directory / f"moved_{last}.json").read_text())["whole"]
        assert found.count(0) == split and set(found) - {0} == {1 if last == 1 else 8}


def test_two_processes_give_the_trajectory_of_one(under_way, directory):
    """The weights are split between them; one of them writes the run."""
    _, _, pair = under_way
    told = [process.communicate(timeout=100) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], told
    assert f"in {directory / 'pair'}" in told[0][0] and "pair" not in told[1][0]
    assert_same_run(directory / "pair", directory / ONE)


def test_where_the_first_process_dies_the_other_ends_and_the_pair_goes_on(under_way, directory):
    """To the very bits. The first one holds JAX's coordinator, without which the other could not even wait."""
    pair = start_pair(directory, "killed", "--config.checkpoint.every=1", mortal=[0])
    errors = [process.communicate(timeout=100)[1] for process in pair]
    assert [process.returncode for process in pair] == [-9, 1], errors
    assert errors[1].splitlines()[-1].startswith("error: process 0 died, "), errors[1]
    pair = start_pair(directory, "killed", "--config.checkpoint.every=1")
    told = [process.communicate(timeout=100) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], told
    assert "at step 2 of 4" in told[0][0]
    for file in ("responses.jsonl", "adapter/adapter_model.safetensors", "weights/epoch_1.parquet"):
        assert (directory / "killed" / file).read_bytes() == (directory / "pair" / file).read_bytes(), file

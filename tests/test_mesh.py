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
from bilevel_jax import selector, sharding
from bilevel_jax.models import huggingface
from bilevel_jax.runtime import checkpoint, weight_table
from tests.conftest import read_jsonl, train_without_report
from tests.runtime.test_distributed import free_address

SINGLE = (1, 1, 1)
QUICK_MESH, MORE_MESHES = (2, 2, 2), [(8, 1, 1), (2, 4, 1), (1, 2, 4)]
MESHES = [QUICK_MESH, *(pytest.param(shape, marks=pytest.mark.long) for shape in MORE_MESHES)]
NAMES = {shape: "x".join(map(str, shape)) for shape in [SINGLE, QUICK_MESH, *MORE_MESHES]}
ROOT = pathlib.Path(__file__).parent.parent
ONE = NAMES[SINGLE]
NUM_SPLIT = 8 * 1013
TIMEOUT = 600  # seconds; for a slow machine
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
INFLUENCE = {"selection.cost": "influence", "selection.coefficient_at": "next"}
LLAMAS = {  # run -> mesh and what differs; it has fewer heads of keys and values than `tensor` has parts, and a tied head
    "llama": (SINGLE, INFLUENCE),
    "llama, eight": ((1, 2, 4), INFLUENCE),
}
LLAMAS_OF_TOKENS = {"llama, tokens": (SINGLE, TOKENS), "llama, tokens, eight": ((1, 2, 4), TOKENS)}
HALVES = {
    "llama, offline": (SINGLE, OFFLINE),
    "llama, half": (SINGLE, OFFLINE | {"model.dtype": "bfloat16"}),
    "llama, half, eight": ((1, 2, 4), OFFLINE | {"model.dtype": "bfloat16"}),
}
MORTAL = """
import os, runpy, signal
from bilevel_jax.runtime import checkpoint

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


def configured(directory: str, shape, changes=()):
    config = configuration.default()
    config.update(json.loads((pathlib.Path(directory) / "config.json").read_text()))
    config.update_from_flattened_dict({f"mesh.{axis}": size for axis, size in zip(sharding.AXES, shape)} | dict(changes))
    return config


@contextlib.contextmanager
def recorded_shardings():
    """Yields a dictionary that receives the shapes of the base's shards and, at each save, where the state's arrays are."""
    record = {}
    load, save = huggingface.load_params, checkpoint.Checkpoints.save

    def load_and_record(*args):
        base = load(*args)
        record["base"] = {"/".join(path): leaf.addressable_shards[0].data.shape for path, leaf in huggingface.flatten(base)}
        return base

    def save_and_record(self, step, state, *rest):
        record["replicated"] = [len(leaf.sharding.device_set) * leaf.is_fully_replicated for leaf in jax.tree.leaves(state)]
        save(self, step, state, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface, "load_params", load_and_record)
        patch.setattr(checkpoint.Checkpoints, "save", save_and_record)
        yield record


def run_on_meshes(directory: str, shapes):
    """One run for each mesh, with a file of its shardings beside it. In a process of its own."""
    for shape in shapes:
        with recorded_shardings() as record:
            train_without_report(configured(directory, shape), pathlib.Path(directory) / NAMES[shape])
        (pathlib.Path(directory) / f"{NAMES[shape]}.json").write_text(json.dumps(record))


def run_llamas(directory: str, runs):
    for name, (shape, changes) in runs.items():
        model = {"model.path": str(pathlib.Path(directory) / "model")}
        with recorded_shardings():
            train_without_report(configured(directory, shape, model | changes), pathlib.Path(directory) / name)


def run_moved(directory: str):
    """One run in three parts: on one device, on eight with ω split between them, and on eight with ω replicated."""
    for last, shape, changes in ((1, SINGLE, {}), (3, (2, 2, 2), {"mesh.shard_selector": True}), (None, (8, 1, 1), {})):
        with recorded_shardings() as record, pytest.MonkeyPatch.context() as patch, contextlib.suppress(InterruptedError):
            save = checkpoint.Checkpoints.save

            def save_and_stop(self, step, *rest, last=last, save=save):
                save(self, step, *rest)
                if step == last:
                    raise InterruptedError

            patch.setattr(checkpoint.Checkpoints, "save", save_and_stop)
            train_without_report(configured(directory, shape, {"checkpoint.every": 1} | changes), pathlib.Path(directory) / "moved")
        (pathlib.Path(directory) / f"moved_{last}.json").write_text(json.dumps(record))


def compiled_update() -> str:
    """One move of an ω that is split over eight devices, as each of them computes it."""
    mesh, adam = sharding.make_mesh(8), selector.Selector(optimizer="adam")
    state = selector.init(adam, NUM_SPLIT)
    state = jax.tree.map(sharding.device_put, state, sharding.shardings(mesh, state, "examples"))
    entries = sharding.replicate((np.arange(4, dtype=np.int32), *np.ones((2, 4), np.float32)), mesh)

    def update(state, row_index, share, cost):
        return selector.update(adam, state, row_index, share, 4.0, cost, 0.1)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(update, out_shardings=shardings).lower(state, *entries).compile().as_text()


def start(*arguments, **environment):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, **pipes)


def start_on_eight_devices(directory, calls: str) -> subprocess.Popen:
    """A process with eight devices that makes calls of this module; `d` is the directory in them."""
    script = f"from tests.test_mesh import *; d = {str(directory)!r}; {calls}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    return start("-c", script, XLA_FLAGS=flags)


def wait(process) -> None:
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def start_pair(directory, name: str, *changes: str, mortal=()) -> list[subprocess.Popen]:
    """Two processes of one run, the base and ω split between them. A mortal one dies when it has two checkpoints."""
    arguments = [f"--config={directory / 'config.py'}", f"--workdir={directory / name}", "--config.mesh.fsdp=2"]
    arguments += ["--config.mesh.shard_selector=True", *changes]
    cluster = {"JAX_COORDINATOR_ADDRESS": free_address(), "JAX_NUM_PROCESSES": "2"}
    commands = [("-c", MORTAL) if i in mortal else ("-m", "bilevel_jax.main") for i in range(2)]
    return [start(*command, *arguments, **cluster, JAX_PROCESS_ID=str(i)) for i, command in enumerate(commands)]


@pytest.fixture(scope="module")
def directory(make_config, llama, tmp_path_factory):
    """Directory of all runs, with those on one device and on `QUICK_MESH`."""
    directory = tmp_path_factory.mktemp("meshes")
    (directory / "config.json").write_text(make_config(SETTINGS).to_json())
    (directory / "config.py").write_text(CONFIG)
    (directory / "model").symlink_to(llama)
    calls = f"run_on_meshes(d, {[SINGLE, QUICK_MESH]}); (pathlib.Path(d) / 'update.hlo').write_text(compiled_update())"
    wait(start_on_eight_devices(directory, calls))
    return directory


@pytest.fixture(scope="module")
def under_way(directory):
    """The process of the other runs on eight devices, and two processes that share a run meanwhile."""
    alone = start_on_eight_devices(directory, "run_llamas(d, LLAMAS); run_moved(d)")
    pair = start_pair(directory, "pair")
    yield alone, pair
    for process in (alone, *pair):
        process.kill()


@pytest.fixture(scope="module")
def all_runs(directory, under_way):
    """The directory, when the runs of `under_way` on eight devices are in it."""
    wait(under_way[0])
    return directory


@pytest.fixture(scope="module")
def more_meshes(directory):
    """Runs on `MORE_MESHES`."""
    wait(start_on_eight_devices(directory, f"run_on_meshes(d, {MORE_MESHES})"))


@pytest.fixture(scope="module")
def half_runs(directory):
    """The directory, with the runs of `HALVES`."""
    wait(start_on_eight_devices(directory, "run_llamas(d, HALVES)"))
    return directory


@pytest.fixture(scope="module")
def token_runs(directory):
    """The directory, with the runs of `LLAMAS_OF_TOKENS`."""
    wait(start_on_eight_devices(directory, "run_llamas(d, LLAMAS_OF_TOKENS)"))
    return directory


@pytest.fixture
def run_of(directory, request):
    """`f(shape)` -> the workdir of the run on a mesh."""

    def workdir(shape):
        if shape in MORE_MESHES:
            request.getfixturevalue("more_meshes")
        return directory / NAMES[shape]

    return workdir


def assert_same_run(workdir, other):
    """θ, ω, responses and their last ratios."""
    theta, like = (safetensors.numpy.load_file(run / "adapter" / "adapter_model.safetensors") for run in (workdir, other))
    assert theta.keys() == like.keys()
    for key, matrix in theta.items():
        np.testing.assert_allclose(matrix, like[key], rtol=0, atol=1e-5)
    omega, like = (pyarrow.parquet.read_table(run / "weights" / "epoch_1.parquet") for run in (workdir, other))
    assert omega["id"] == like["id"]
    np.testing.assert_allclose(omega["logit"].to_numpy(), like["logit"].to_numpy(), rtol=0, atol=1e-5)
    responses, like = (read_jsonl(run / "responses.jsonl") for run in (workdir, other))
    keys = "step", "id", "sample", "text", "finish_reason"
    assert [[x[key] for key in keys] for x in responses] == [[x[key] for key in keys] for x in like] and len(responses) > 4
    for key in ("logprob", "ratio"):
        result, expected = (np.array([x[key] for x in lines], float) for lines in (responses, like))  # NaN: not used
        assert np.isfinite(result).sum() > 4
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_every_mesh_gives_the_trajectory_of_one_device(run_of, shape):
    assert_same_run(run_of(shape), run_of(SINGLE))


def learned(run) -> tuple[np.ndarray, np.ndarray]:
    """θ and ω."""
    theta = safetensors.numpy.load_file(run / "adapter" / "adapter_model.safetensors")
    omega = pyarrow.parquet.read_table(run / "weights" / "epoch_1.parquet")["logit"].to_numpy()
    return np.concatenate([theta[key].ravel() for key in sorted(theta)]), omega


@pytest.mark.slow
def test_so_it_does_with_influences_few_heads_of_keys_and_a_tied_head(all_runs):
    """A mesh rounds other sums, and a vote changes only where a product is nearly 0."""
    runs = [all_runs / name for name in ("llama, eight", "llama")]
    assert_same_run(*runs)
    useful = [pyarrow.parquet.read_table(run / "weights" / "epoch_1.parquet")["useful"].to_numpy() for run in runs]
    np.testing.assert_allclose(useful[1], useful[0], rtol=0, atol=1e-5)
    assert np.nanmax(useful[0]) - np.nanmin(useful[0]) > 0.1  # NaN: held out, or masked from the start


@pytest.mark.long
def test_and_with_weights_of_tokens(token_runs):
    runs = [token_runs / name for name in ("llama, tokens", "llama, tokens, eight")]
    for one, eight in zip(*map(learned, runs)):
        np.testing.assert_allclose(eight, one, rtol=0, atol=1e-5)
    one, eight = (np.concatenate(weight_table.read_tokens(run)["weight"].to_pylist()) for run in runs)
    np.testing.assert_allclose(eight, one, rtol=0, atol=1e-4)
    assert np.ptp(one) > 0.01


@pytest.mark.long
def test_in_half_precision_a_mesh_changes_less_than_the_precision_does(half_runs):
    """Both are rounding to 8 bits: on a mesh sums are split, and their parts rounded, but inputs and weights stay as they are."""
    runs = [learned(half_runs / name) for name in ("llama, offline", "llama, half", "llama, half, eight")]
    for full, half, eight in zip(*runs):
        assert 0 < np.linalg.norm(eight - half) < np.linalg.norm(half - full) < 0.1 * np.linalg.norm(full)


@pytest.mark.slow
def test_a_run_goes_on_with_another_mesh(all_runs):
    assert_same_run(all_runs / "moved", all_runs / ONE)


def test_the_trajectory_goes_somewhere(directory):
    """Or the tolerance would mean nothing."""
    theta = safetensors.numpy.load_file(directory / ONE / "adapter" / "adapter_model.safetensors")
    omega = pyarrow.parquet.read_table(directory / ONE / "weights" / "epoch_1.parquet")["logit"].to_numpy()
    assert max(np.abs(matrix).max() for key, matrix in theta.items() if "lora_B" in key) > 1e-2  # zero at the start
    assert np.abs(omega).max() > 1e-2


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_the_base_is_split_and_what_learns_is_replicated(run_of, shape):
    """Two layers of hidden width 16, 2 heads of 8, feed-forward 24, vocabulary 300."""
    (data, fsdp, tensor), record = shape, json.loads(run_of(shape).with_suffix(".json").read_text())
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
    assert {key: record["base"][key] for key in expected} == expected
    assert set(record["replicated"]) == {data * fsdp * tensor}


def test_no_device_sees_all_of_a_split_omega(directory):
    program = (directory / "update.hlo").read_text()
    assert f"f32[{NUM_SPLIT // 8}]" in program and f"[{NUM_SPLIT}]" not in program


@pytest.mark.slow
def test_omega_is_split_where_it_is_to_be(all_runs):
    """Logits, both counts of visits, losses and costs, nothing else: mirror descent has no moments."""
    for last, split in ((1, 0), (3, 5), (None, 0)):
        result = json.loads((all_runs / f"moved_{last}.json").read_text())["replicated"]
        assert result.count(0) == split and set(result) - {0} == {1 if last == 1 else 8}


@pytest.mark.slow
def test_two_processes_give_the_trajectory_of_one(under_way, directory):
    """The weights are split between them; one of them writes the run."""
    _, pair = under_way
    told = [process.communicate(timeout=TIMEOUT) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], told
    assert f"in {directory / 'pair'}" in told[0][0] and "pair" not in told[1][0]
    assert_same_run(directory / "pair", directory / ONE)


@pytest.mark.long
def test_where_the_first_process_dies_the_other_ends_and_the_pair_goes_on(under_way, directory):
    """To the very bits. The first one holds JAX's coordinator, without which the other could not even wait."""
    pair = start_pair(directory, "killed", "--config.checkpoint.every=1", mortal=[0])
    errors = [process.communicate(timeout=TIMEOUT)[1] for process in pair]
    assert [process.returncode for process in pair] == [-9, 1], errors
    assert errors[1].splitlines()[-1].startswith("error: process 0 died, "), errors[1]
    pair = start_pair(directory, "killed", "--config.checkpoint.every=1")
    told = [process.communicate(timeout=TIMEOUT) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], told
    assert "at step 2 of 4" in told[0][0]
    for file in ("responses.jsonl", "adapter/adapter_model.safetensors", "weights/epoch_1.parquet"):
        assert (directory / "killed" / file).read_bytes() == (directory / "pair" / file).read_bytes(), file


@pytest.mark.long
def test_two_processes_learn_all_weights(directory):
    """No process has the whole of them."""
    changes = "--config.lora.rank=0", "--config.method=offline", "--config.optimizer.learning_rate=0.01"
    pair = start_pair(directory, "all weights, pair", *changes)
    told = [process.communicate(timeout=TIMEOUT) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], told
    arguments = f"--config={directory / 'config.py'}", f"--workdir={directory / 'all weights'}", *changes
    wait(start("-m", "bilevel_jax.main", *arguments))
    runs = [directory / name for name in ("all weights, pair", "all weights")]
    pair, one = (safetensors.numpy.load_file(run / "model" / "model.safetensors") for run in runs)
    assert pair.keys() == one.keys()
    for key in one:
        np.testing.assert_allclose(pair[key], one[key], rtol=0, atol=1e-5)
    pair, one = (pyarrow.parquet.read_table(run / "weights" / "epoch_1.parquet")["logit"].to_numpy() for run in runs)
    np.testing.assert_allclose(pair, one, rtol=0, atol=1e-5)
    assert np.ptp(one) > 1e-2

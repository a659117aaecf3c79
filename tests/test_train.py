"""Whole runs: what they leave, that they continue exactly, what they refuse, and that every method runs."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pyarrow.parquet
import pytest
from ml_collections import ConfigDict

from bilevel_jax import online, progress, train, workspace
from bilevel_jax.data import levels as data_levels
from bilevel_jax.data import packing, templates
from tests.conftest import (
    EPOCH_STEPS,
    EPOCHS,
    EVERYTHING,
    HELD_OUT,
    NUM_LOWER,
    NUM_UPPER,
    load,
    make_rows,
    read_jsonl,
    token_log_probs,
    write_jsonl,
)

STEPS = EPOCHS * EPOCH_STEPS


def summary_of(workdir):
    return json.loads((workdir / "summary.json").read_text())


def table_of(workdir, epoch):
    return pyarrow.parquet.read_table(workdir / "weights" / f"epoch_{epoch}.parquet")


# --------------------------------------------------------------------------------------------------------------------
# What a run leaves
# --------------------------------------------------------------------------------------------------------------------


def test_files(finished):
    expected = {"config.json", "metrics.jsonl", "summary.json", "weights", "adapter", "tensorboard", "checkpoints"}
    assert {file.name for file in finished.iterdir()} == expected
    assert {file.name for file in (finished / "weights").iterdir()} == {"epoch_1.parquet", "epoch_2.parquet"}
    assert {file.name for file in (finished / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert {file.name for file in (finished / "checkpoints").iterdir()} == {"10", "12"}


def test_config_file(finished, make_config):
    assert json.loads((finished / "config.json").read_text()) == make_config(EVERYTHING).to_dict()


SELECTOR = {f"selector/{key}" for key in ("ess", "weight_min", "weight_max")}
EVAL = {"eval/upper_loss", "eval/lower_loss", "eval/lower_clean_loss"}
TRAIN = {"train/loss", "train/upper_loss", "train/lower_loss", "train/gradient_norm", "train/rho", "speed/tokens_per_s"}


def test_metrics(finished):
    events = read_jsonl(finished / "metrics.jsonl")
    training = [event for event in events if "train/loss" in event]
    assert [event["step"] for event in training] == [2, 4, 6, 8, 10, 12]
    assert [event["train/rho"] for event in training] == pytest.approx([0.1] * 3 + [0.2] * 3)
    assert all(event.keys() >= TRAIN | SELECTOR for event in training)
    evaluations = [event for event in events if "eval/upper_loss" in event]
    assert [(event["step"], event["epoch"]) for event in evaluations] == [(0, 0), (6, 1), (12, 2)]
    assert all(event.keys() >= EVAL | SELECTOR | {"selector/auroc"} for event in evaluations[1:])
    assert all(math.isfinite(value) for event in events for value in event.values())


def test_summary(finished):
    summary = summary_of(finished)
    times = {f"time/{key}" for key in ("load", "compile", "train", "eval", "checkpoint")}
    assert summary.keys() >= EVAL | SELECTOR | times | {"selector/auroc", "selector/bad_kept"}
    last = read_jsonl(finished / "metrics.jsonl")[-1]
    assert {key: summary[key] for key in EVAL | SELECTOR} == {key: last[key] for key in EVAL | SELECTOR}
    first = read_jsonl(finished / "metrics.jsonl")[0]
    assert {key: first[key] for key in EVAL} == {key: summary[key.replace("eval", "start")] for key in EVAL}


@pytest.mark.parametrize("epoch", [1, 2])
def test_weights(finished, epoch):
    table = table_of(finished, epoch)
    assert table.column_names == ["id", "weight", "logit", "rank", "visits", "masked", "source"]
    columns = table.to_pydict()
    assert columns["visits"] == [epoch] * (NUM_LOWER - HELD_OUT)  # every row once an epoch
    assert set(columns["source"]) == {"sums-2"}
    np.testing.assert_allclose(np.mean(columns["weight"]), 1.0, rtol=1e-6)


def test_selector_measures(finished, data, make_config):
    """Recomputed from the table: pairs of a bad and a good row counted one by one."""
    level = data_levels.load_level(make_config(), "lower", load_tokenizer(make_config()))
    bad_ids = {row.id for row in level.rows if row.fields["bad"]}
    table = table_of(finished, 2).to_pylist()
    bad = [row["weight"] for row in table if row["id"] in bad_ids]
    good = [row["weight"] for row in table if row["id"] not in bad_ids]
    wins = sum(1.0 if b < g else 0.5 * (b == g) for b in bad for g in good)
    summary = summary_of(finished)
    assert summary["selector/auroc"] == pytest.approx(wins / (len(bad) * len(good)))
    kept = sorted(table, key=lambda row: -row["weight"])[: round(0.8 * len(table))]
    assert summary["selector/bad_kept"] == sum(row["id"] in bad_ids for row in kept) / len(bad)
    weights = np.array([row["weight"] for row in table])
    assert summary["selector/ess"] == pytest.approx(weights.sum() ** 2 / (len(table) * (weights**2).sum()), rel=1e-5)


@pytest.mark.parametrize("when", ["start", "eval"])
def test_evaluation(finished, neox, data, when):
    """Means over held-out rows, each of them scored alone: lower ones are those without a weight."""
    loaded = load(neox, finished / "adapter" if when == "eval" else None)

    def mean_loss(rows, field="response"):
        return np.mean([-np.mean(token_log_probs(loaded, row["question"], row[field])) for row in rows])

    config = ConfigDict(json.loads((finished / "config.json").read_text()))
    held_out = {level: data_levels.load_level(config, level, loaded[3]).eval_rows for level in ("upper", "lower")}
    weighted = set(table_of(finished, 1)["id"].to_pylist())
    assert len(held_out["lower"]) == HELD_OUT and not weighted & {row.id for row in held_out["lower"]}
    upper, lower = ([row.fields for row in held_out[level]] for level in ("upper", "lower"))
    assert any(row["bad"] for row in lower)
    found = summary_of(finished)
    assert found[f"{when}/upper_loss"] == pytest.approx(mean_loss(upper), rel=1e-5)
    assert found[f"{when}/lower_loss"] == pytest.approx(mean_loss(lower), rel=1e-5)
    assert found[f"{when}/lower_clean_loss"] == pytest.approx(mean_loss(lower, "truth"), rel=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# Continuing
# --------------------------------------------------------------------------------------------------------------------

# The training command, with a signal to itself at a step: `term` after the step, `torn` as soon as its checkpoint has
# begun to be written, `kill` once that is on disk.
COMMAND = """
import os, pathlib, runpy, signal, sys, time
from bilevel_jax import checkpoint, progress

how, at, workdir = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
sys.argv[1:] = [f"--config={workdir.parent / 'config.py'}", f"--workdir={workdir}"]
dispatched, save = progress.StepLog.dispatched, checkpoint.Checkpoints.save

def dispatch(log, done, *rest):
    dispatched(log, done, *rest)
    if how == "term" and done == at:
        os.kill(os.getpid(), signal.SIGTERM)

def save_and_die(checkpoints, step, *rest):
    save(checkpoints, step, *rest)
    if how != "term" and step == at:
        while how == "kill" and not (workdir / "checkpoints" / str(at)).is_dir():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

progress.StepLog.dispatched, checkpoint.Checkpoints.save = dispatch, save_and_die
runpy.run_module("bilevel_jax.main", run_name="__main__")
"""
CONFIG = """
import json, pathlib, ml_collections

def get_config():
    return ml_collections.ConfigDict(json.loads((pathlib.Path(__file__).parent / "config.json").read_text()))
"""


def write_config(directory, config):
    (directory / "config.json").write_text(config.to_json())
    (directory / "config.py").write_text(CONFIG)


def without(event, prefixes):
    return {key: value for key, value in event.items() if not key.startswith(prefixes)}


def test_an_interrupted_run_ends_as_if_it_had_not_been(finished, make_config, tmp_path, capsys):
    """Stopped in the middle of an epoch, killed while a checkpoint was written, after one, and after the last."""
    workdir = tmp_path / "run"
    write_config(tmp_path, make_config(EVERYTHING))
    # 6 may or may not be complete, depending on who is faster; it is never used when it is not.
    for how, at, resumed in [("term", 3, [""]), ("torn", 6, ["3"]), ("kill", 8, ["4", "6"]), ("kill", STEPS, ["8"])]:
        command = [sys.executable, "-u", "-c", COMMAND, how, str(at), str(workdir)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == (143 if how == "term" else -signal.SIGKILL), done.stderr
        assert "".join(re.findall(rf"resuming .* at step (\d+) of {STEPS}", done.stdout)) in resumed
        assert (f"saved at step {at} of {STEPS}" in done.stderr) == (how == "term")
        assert not (workdir / "summary.json").exists()
    train.run(make_config(EVERYTHING), workdir)
    assert f"at step {STEPS} of {STEPS}" in capsys.readouterr().out

    for file in ("config.json", "adapter/adapter_model.safetensors", *(f"weights/epoch_{k}.parquet" for k in (1, 2))):
        assert (workdir / file).read_bytes() == (finished / file).read_bytes(), file
    assert without(summary_of(workdir), "time/") == without(summary_of(finished), "time/")
    events, expected = (read_jsonl(directory / "metrics.jsonl") for directory in (workdir, finished))
    assert [event["step"] for event in events] == [event["step"] for event in expected]
    evaluations = [[event for event in found if "eval/upper_loss" in event] for found in (events, expected)]
    assert evaluations[0] == evaluations[1]


def stop_at(monkeypatch, at):
    """A SIGTERM to this process after step `at`."""
    dispatched = progress.StepLog.dispatched

    def dispatch(log, done, *rest):
        dispatched(log, done, *rest)
        if done == at:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(progress.StepLog, "dispatched", dispatch)


@pytest.fixture(scope="module")
def interrupted(make_config, data, tmp_path_factory):
    """A run with data of its own that was stopped after step 3: its directory and its config."""
    directory = tmp_path_factory.mktemp("interrupted")
    for level in ("upper", "lower"):
        shutil.copy(data / f"{level}.jsonl", directory)
    paths = {f"data.{level}": str(directory / f"{level}.jsonl") for level in ("upper", "lower")}
    config = make_config(paths | {"selection.rule": "uniform"})
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop_at(monkeypatch, 3)
        with pytest.raises(workspace.Interrupted, match=f"SIGTERM: saved at step 3 of {STEPS}"):
            train.run(config, directory / "run")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    return directory, config


def snapshot(workdir):
    return {file: file.read_bytes() for file in workdir.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"batch.size": 5, "lora.rank": 3}, "batch.size: 4 there, 5 now, lora.rank: 2 there, 3 now"),
    ],
)
def test_refuses_another_config(interrupted, changes, named):
    directory, config = interrupted
    before = snapshot(directory / "run")
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict(changes)
    with pytest.raises(workspace.RunError, match=named):
        train.run(other, directory / "run")
    assert snapshot(directory / "run") == before


@pytest.mark.parametrize("level", ["upper", "lower"])
@pytest.mark.parametrize("number, seed", [(0, 7), (-2, 0)])  # as many other rows, or two fewer
def test_refuses_changed_data(interrupted, level, number, seed):
    directory, config = interrupted
    before = snapshot(directory / "run")
    file = directory / f"{level}.jsonl"
    text = file.read_text()
    count = {"upper": NUM_UPPER, "lower": NUM_LOWER}[level] + number
    write_jsonl(file, make_rows(count, seed) if seed else read_jsonl(file)[:count])
    with pytest.raises(workspace.RunError, match="the data changed"):
        train.run(config, directory / "run")
    file.write_text(text)
    assert snapshot(directory / "run") == before


def test_refuses_a_finished_run(finished, make_config):
    before = snapshot(finished)
    with pytest.raises(workspace.RunError, match="finished run"):
        train.run(make_config(EVERYTHING), finished)
    assert snapshot(finished) == before


def test_a_run_that_could_not_start_leaves_its_workdir_to_the_next(make_config, tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        train.run(make_config({"data.lower": "absent.jsonl"}), tmp_path / "run")
    with pytest.raises(ValueError, match="eval.num_lower=25.*lower.jsonl"):
        train.run(make_config({"eval.num_lower": NUM_LOWER}), tmp_path / "run")  # not: another config


# --------------------------------------------------------------------------------------------------------------------
# Going wrong
# --------------------------------------------------------------------------------------------------------------------


def test_stops_where_the_loss_is_not_finite(make_config, tmp_path, data):
    config = make_config({"optimizer.learning_rate": 1e30, "checkpoint.every": 0})
    level = {name: data_levels.load_level(config, name, load_tokenizer(config)) for name in ("upper", "lower")}
    ids = batch_ids(config, level, 1)
    with pytest.raises(workspace.RunError) as caught:  # the first step is the one that leaps
        train.run(config, tmp_path / "run")
    message = str(caught.value)
    assert message.startswith("step 2: ") and all(row_id in message for row_id in ids)
    assert not (tmp_path / "run" / "summary.json").exists()
    assert [event["step"] for event in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [0]


def test_stops_where_the_last_step_spoils_the_model(make_config, tmp_path):
    config = make_config({"optimizer.learning_rate": 1e30, "batch.size": 32, "num_epochs": 1})  # a single step
    with pytest.raises(workspace.RunError, match="step 1: eval/upper_loss, .* not finite"):
        train.run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"data.max_length": 129}, "data.max_length=129 is over the model's 128 positions"),
        ({"data.max_length": 5}, "no row fits data.max_length=5"),
        ({"lora.targets": "q_proj"}, "lora.targets"),
        ({"lora.targets": ""}, "lora.targets"),
        ({"model.path": "absent/dir/ectory"}, "no such directory"),
        ({"loss.upper": "dpo"}, "no field 'chosen'"),
        ({"data.template": "chat"}, "no chat template"),
        ({"mesh.data": 9}, "mesh.data=9"),
        ({"eval.num_upper": NUM_UPPER}, "eval.num_upper=13"),
    ],
)
def test_refuses_before_compiling(make_config, tmp_path, monkeypatch, changes, reason):
    monkeypatch.setattr(train.step, "make_step", None)
    with pytest.raises((ValueError, workspace.RunError), match=reason) as caught:
        train.run(make_config(changes), tmp_path / "run")
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------------------------


def load_tokenizer(config):
    return templates.load_tokenizer(config.model.path)


def batch_ids(config, level, k) -> list[str]:
    layout = packing.Layout(config.batch.micro_size, config.data.max_length, 2 * config.batch.size)
    own = online.nothing_yet(len(level["lower"].rows))
    return train.make_batch(config, level["upper"], level["lower"], None, layout, k, own).ids


@pytest.fixture(scope="module")
def levels(make_config):
    """`f(changes)` -> the config and both of its levels."""

    def make(changes):
        config = make_config(changes)
        return config, {name: data_levels.load_level(config, name, load_tokenizer(config)) for name in ("upper", "lower")}

    return make


def ids(rows):
    return {row.id for row in rows}


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_rows_are_never_trained_on(levels, seed):
    config, level = levels({"seed": seed})
    seen = {row_id for k in range(STEPS) for row_id in batch_ids(config, level, k)}
    assert seen == ids(level["upper"].rows) | ids(level["lower"].rows)
    assert not seen & (ids(level["upper"].eval_rows) | ids(level["lower"].eval_rows))
    assert len(level["upper"].eval_rows) == len(level["lower"].eval_rows) == HELD_OUT


def test_seeds_split_differently(levels):
    (_, one), (_, other) = levels({"seed": 0}), levels({"seed": 1})
    for name in ("upper", "lower"):
        assert ids(one[name].eval_rows) != ids(other[name].eval_rows)
        assert ids(one[name].rows + one[name].eval_rows) == ids(other[name].rows + other[name].eval_rows)


@pytest.mark.parametrize("rho, trained", [(0.0, {"upper"}), (0.5, {"upper", "lower"}), (1.0, {"lower"})])
def test_mixing_draws_from_the_levels_it_weighs(levels, rho, trained):
    config, level = levels({"method": "mixing", "mixing.rho": rho})
    seen = {row_id for k in range(EPOCH_STEPS) for row_id in batch_ids(config, level, k)}
    for name in ("upper", "lower"):
        assert bool(seen & ids(level[name].rows)) == (name in trained)


def test_only_measurement_reads_labels_and_truth(levels, make_config, data, tmp_path):
    """The same rows without them train the same batches."""
    bare = [{key: row[key] for key in ("question", "response")} for row in read_jsonl(data / "lower.jsonl")]
    (config, marked), (_, plain) = levels({}), levels({"data.lower": str(write_jsonl(tmp_path / "bare.jsonl", bare))})
    assert batch_ids(config, marked, 0) == batch_ids(config, plain, 0)
    assert data_levels.labels(plain["lower"], "bad") is None
    assert data_levels.with_truth(plain["lower"], config, load_tokenizer(config)) == []


# --------------------------------------------------------------------------------------------------------------------
# Every method
# --------------------------------------------------------------------------------------------------------------------

SHORT = {"num_epochs": 1, "checkpoint.every": 0}


def finish(make_config, changes, workdir):
    summary = train.run(make_config(SHORT | changes), workdir)
    assert summary == summary_of(workdir)
    assert all(math.isfinite(value) for value in summary.values())
    return summary, [event for event in read_jsonl(workdir / "metrics.jsonl") if "train/loss" in event]


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_mixing(make_config, tmp_path, rho):
    summary, events = finish(make_config, {"method": "mixing", "mixing.rho": rho}, tmp_path)
    assert not any(key.startswith("selector/") for key in summary) and not (tmp_path / "weights").exists()
    seen = {0.0: {"upper"}, 0.5: {"upper", "lower"}, 1.0: {"lower"}}[rho]
    for event in events:
        assert {level for level in ("upper", "lower") if f"train/{level}_loss" in event} == seen
        parts = {"upper": 1 - rho, "lower": rho}
        assert event["train/loss"] == pytest.approx(sum(parts[x] * event[f"train/{x}_loss"] for x in seen), rel=1e-5)
    assert all(summary[f"eval/{level}_loss"] < summary[f"start/{level}_loss"] for level in seen)


@pytest.mark.parametrize(
    "rule, optimizer, options",
    [
        ("bds", "adam", {"baseline": "none"}),
        ("bds", "sgd", {"coefficient_at": "current", "baseline": "batch"}),
        ("bds", "mirror", {"weight_scale": "literal"}),
        ("bmo", "adam", {"value_function": "tracked"}),
        ("bmo", "sgd", {"coefficient_at": "current"}),
        ("bmo", "mirror", {}),
    ],
)
def test_offline(make_config, tmp_path, rule, optimizer, options):
    options = {"rule": rule, "optimizer": optimizer} | options
    summary, _ = finish(make_config, {f"selection.{key}": value for key, value in options.items()}, tmp_path)
    assert 0 < summary["selector/ess"] < 1 and 0 <= summary["selector/auroc"] <= 1
    assert summary["selector/weight_min"] < 1 < summary["selector/weight_max"]


def test_uniform(make_config, tmp_path):
    changes = {"selection.rule": "uniform", "log.every": 1, "optimizer.name": "sgd", "loss.reduction": "sum"}
    summary, events = finish(make_config, changes, tmp_path)
    assert summary["selector/ess"] == pytest.approx(1) and "selector/auroc" not in summary
    assert set(table_of(tmp_path, 1)["weight"].to_pylist()) == {1.0}
    for event in events:  # γ = 0.1 / 0.9
        expected = event["train/upper_loss"] + event["train/lower_loss"] / 9
        assert event["train/loss"] == pytest.approx(expected, rel=1e-5)


def test_dpo(make_config, tmp_path):
    rows = [
        {"prompt": row["question"], "chosen": row["truth"], "rejected": f"No {i}."}
        for i, row in enumerate(make_rows(12, seed=5))
    ]
    upper = str(write_jsonl(tmp_path / "upper.jsonl", rows))
    changes = {"loss.upper": "dpo", "data.upper": upper, "data.max_length": 128, "log.every": 1}
    summary, events = finish(make_config, changes, tmp_path / "run")
    losses = [event["train/upper_loss"] for event in events]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-5)  # the policy is the reference before the first step
    assert losses[-1] < losses[0]
    assert summary["start/upper_loss"] > 1  # in nats per token of the chosen response, not a DPO loss


def test_every_row_in_one_batch_and_none_held_out(make_config, tmp_path):
    summary, events = finish(make_config, {"batch.size": 32, "eval.num_upper": 0, "eval.num_lower": 0}, tmp_path)
    assert summary["steps"] == 1 and summary["rows"] == NUM_LOWER
    assert not any(key.startswith(("eval/", "start/")) for key in summary)


def test_devices_share_a_batch(finished, make_config, tmp_path):
    """Two devices come to what one comes to, but for rounding."""
    write_config(tmp_path, make_config(EVERYTHING | {"mesh.data": 2}))
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    arguments = [f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "bilevel_jax.main", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found, expected = summary_of(tmp_path / "run"), summary_of(finished)
    for key in EVAL | {"selector/ess"}:
        assert found[key] == pytest.approx(expected[key], rel=1e-3)

"""Whole runs: what they leave, that they continue exactly, what they refuse, and that every method runs."""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pyarrow.parquet
import pytest
from ml_collections import ConfigDict

from bilevel_jax import batches, errors, features, online, rewards, sampling, scoring, search, similarity, train
from bilevel_jax import config as configuration
from bilevel_jax import setup as setups
from bilevel_jax.data import levels as data_levels
from bilevel_jax.data import packing, shuffle, streaming, templates
from bilevel_jax.data import rows as data_rows
from bilevel_jax.planning import memory
from bilevel_jax.runtime import phases, response_log, weight_table
from tests.conftest import (
    AMORTISED,
    EPOCH_STEPS,
    EPOCHS,
    EVERYTHING,
    HELD_OUT,
    NUM_LOWER,
    NUM_UPPER,
    TRAINED,
    load,
    make_rows,
    read_jsonl,
    response_logits,
    stop_at,
    summary_of,
    token_log_probs,
    train_without_report,
    without,
    write_jsonl,
)

STEPS = EPOCHS * EPOCH_STEPS


def table_of(workdir, epoch):
    return pyarrow.parquet.read_table(workdir / "weights" / f"epoch_{epoch}.parquet")


# --------------------------------------------------------------------------------------------------------------------
# What a run leaves
# --------------------------------------------------------------------------------------------------------------------


def test_files(finished):
    expected = {"config.json", "metrics.jsonl", "summary.json", "weights", "adapter", "tensorboard", "checkpoints"}
    expected |= {"report.html", "adapters", ".lock"}
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
EVAL = {"eval/upper_loss", "eval/lower_loss", "eval/lower_clean_loss", "eval/upper_right", "eval/lower_clean_right"}
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


@pytest.mark.slow
def test_seconds_add_up(make_config, tmp_path):
    """To the wall time of the run, the time before it included; the rest is loading the test's own modules."""
    began = time.perf_counter()
    time.sleep(0.1)
    summary = train_without_report(make_config({"log.profile": "1:2", "num_epochs": 1}), tmp_path / "run", began)
    wall = time.perf_counter() - began
    assert sum(value for key, value in summary.items() if key.startswith("time/")) == pytest.approx(wall, rel=0.02)
    assert summary["time/start"] >= 0.1
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_refuses_to_trace_steps_beyond_the_run(make_config, tmp_path):
    with pytest.raises(ValueError, match=f"log.profile='0:{STEPS + 1}' goes beyond the {STEPS} steps"):
        train_without_report(make_config({"log.profile": f"0:{STEPS + 1}"}), tmp_path / "run")


@pytest.mark.parametrize("epoch", [1, 2])
def test_weights(finished, epoch):
    table = table_of(finished, epoch)
    names = ["id", "weight", "logit", "rank", "plausible", "useful", "similar", "nearest", "visits", "masked", "source"]
    assert table.column_names == names
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

    def right(rows, field="response"):
        answers = (response_logits(loaded, row["question"], row[field]) for row in rows)
        return np.mean([(logits.argmax(-1) == answer).all() for logits, answer in answers])

    config = ConfigDict(json.loads((finished / "config.json").read_text()))
    held_out = {level: data_levels.load_level(config, level, loaded[3]).eval_rows for level in ("upper", "lower")}
    weighted = set(table_of(finished, 1)["id"].to_pylist())
    assert len(held_out["lower"]) == HELD_OUT and not weighted & {row.id for row in held_out["lower"]}
    upper, lower = ([row.fields for row in held_out[level]] for level in ("upper", "lower"))
    assert any(row["bad"] for row in lower)
    result = summary_of(finished)
    assert result[f"{when}/upper_loss"] == pytest.approx(mean_loss(upper), rel=1e-5)
    assert result[f"{when}/lower_loss"] == pytest.approx(mean_loss(lower), rel=1e-5)
    assert result[f"{when}/lower_clean_loss"] == pytest.approx(mean_loss(lower, "truth"), rel=1e-5)
    assert result[f"{when}/upper_right"] == right(upper) and result[f"{when}/lower_clean_right"] == right(lower, "truth")


# --------------------------------------------------------------------------------------------------------------------
# Continuing
# --------------------------------------------------------------------------------------------------------------------

# The training command, with a signal to itself at a step: `term` after the step, `torn` as soon as its checkpoint has
# begun to be written, `kill` once that is on disk; `asking` while the responses of its refresh are sampled and `step` after the
# step, both once the checkpoint before it, of an even step, is on disk.
COMMAND = """
import os, pathlib, runpy, signal, sys, time
from bilevel_jax import online
from bilevel_jax.runtime import checkpoint, step_log

how, at, workdir = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
sys.argv[1:] = [f"--config={workdir.parent / 'config.py'}", f"--workdir={workdir}"]
dispatched, save, make_refresh = step_log.StepLog.push, checkpoint.Checkpoints.save, online.make_refresh

def die_once_saved(step):
    while not (workdir / "checkpoints" / str(step)).is_dir():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)

def dispatch(log, done, *rest):
    dispatched(log, done, *rest)
    if how == "term" and done == at:
        os.kill(os.getpid(), signal.SIGTERM)
    if how == "step" and done == at:
        die_once_saved((at - 1) // 2 * 2)

def save_and_die(checkpoints, step, *rest):
    save(checkpoints, step, *rest)
    if how == "torn" and step == at:
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "kill" and step == at:
        die_once_saved(at)

def make_and_die(*args):
    refresh = make_refresh(*args)
    def refresh_and_die(base, adapter, step, masked, visited, stopped):
        die = how == "asking" and step == at
        return refresh(base, adapter, step, masked, visited, lambda: die_once_saved((at - 1) // 2 * 2) if die else stopped())
    return refresh_and_die

step_log.StepLog.push, checkpoint.Checkpoints.save, online.make_refresh = dispatch, save_and_die, make_and_die
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
    train_without_report(make_config(EVERYTHING), workdir)
    assert f"at step {STEPS} of {STEPS}" in capsys.readouterr().out

    for file in ("config.json", "adapter/adapter_model.safetensors", *(f"weights/epoch_{k}.parquet" for k in (1, 2))):
        assert (workdir / file).read_bytes() == (finished / file).read_bytes(), file
    assert without(summary_of(workdir), "time/") == without(summary_of(finished), "time/")
    events, expected = (read_jsonl(directory / "metrics.jsonl") for directory in (workdir, finished))
    assert [event["step"] for event in events] == [event["step"] for event in expected]
    evaluations = [[event for event in result if "eval/upper_loss" in event] for result in (events, expected)]
    assert evaluations[0] == evaluations[1]


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
        with pytest.raises(errors.Interrupted, match=f"SIGTERM: saved at step 3 of {STEPS}"):
            train_without_report(config, directory / "run")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    return directory, config


def test_adapters_of_checkpoints(finished, neox):
    """Those of the two checkpoints that are kept: the last one is the adapter of the run, and the one before is near it."""
    names = sorted(path.name for path in (finished / "adapters").iterdir())
    assert names == ["step_10", f"step_{STEPS}"] and {path.name for path in (finished / "checkpoints").iterdir()} == {"10", "12"}
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (finished / "adapters" / f"step_{STEPS}" / file).read_bytes() == (finished / "adapter" / file).read_bytes()
    before, after = (load(neox, finished / path)[2]["layers"] for path in ("adapters/step_10", "adapter"))
    moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)]
    assert all(0 < distance < 2 * 2e-2 for distance in moved)  # two steps of Adam with a learning rate of 1e-2


def test_more_epochs_and_other_logs(finished, make_config, tmp_path):
    """Stopped in the first of what was to be one epoch, and continued for two, with other logs and checkpoints."""
    workdir = tmp_path / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop_at(monkeypatch, 3, signal.SIGINT)
        with pytest.raises(errors.Interrupted, match=f"SIGINT: saved at step 3 of {EPOCH_STEPS}"):
            train_without_report(make_config(EVERYTHING | {"num_epochs": 1}), workdir)
    config = make_config(EVERYTHING | {"log.every": 1, "log.tensorboard": False, "checkpoint.every": 0, "checkpoint.keep": 1})
    train_without_report(config, workdir)
    for file in TRAINED:
        assert (workdir / file).read_bytes() == (finished / file).read_bytes(), file
    evaluations = [{k: v for k, v in summary_of(x).items() if k.startswith(("eval/", "selector/"))} for x in (workdir, finished)]
    assert evaluations[0] == evaluations[1]
    assert [event["step"] for event in read_jsonl(workdir / "metrics.jsonl") if "train/loss" in event] == [2, *range(4, STEPS + 1)]


def test_more_epochs_than_there_are_responses_for(make_config, tmp_path, capsys):
    """Refused, and the run can still be finished as it was."""
    changes = REFINED | {"method": "online", "online.refresh_every": 20, "num_epochs": 1}
    workdir = tmp_path / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop_at(monkeypatch, 3)
        with pytest.raises(errors.Interrupted):
            train_without_report(make_config(changes), workdir)
    before = snapshot(workdir)
    with pytest.raises(errors.RunError, match="the responses of step 0 are for the steps before 6 only; put num_epochs back"):
        train_without_report(make_config(changes | {"num_epochs": 2}), workdir)
    assert snapshot(workdir) == before
    train_without_report(make_config(changes), workdir)
    assert summary_of(workdir)["steps"] == 6


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
    with pytest.raises(errors.RunError, match=named):
        train_without_report(other, directory / "run")
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
    with pytest.raises(errors.RunError, match="the data changed"):
        train_without_report(config, directory / "run")
    file.write_text(text)
    assert snapshot(directory / "run") == before


def test_refuses_a_finished_run(finished, make_config):
    before = snapshot(finished)
    with pytest.raises(errors.RunError, match="finished run"):
        train_without_report(make_config(EVERYTHING), finished)
    assert snapshot(finished) == before


def test_a_run_that_could_not_start_leaves_its_workdir_to_the_next(make_config, tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        train_without_report(make_config({"data.lower": "absent.jsonl"}), tmp_path / "run")
    with pytest.raises(ValueError, match="eval.num_lower=25.*lower.jsonl"):
        train_without_report(make_config({"eval.num_lower": NUM_LOWER}), tmp_path / "run")  # not: another config


# --------------------------------------------------------------------------------------------------------------------
# Going wrong
# --------------------------------------------------------------------------------------------------------------------


def test_stops_where_the_loss_is_not_finite(make_config, tmp_path, data):
    config = make_config({"optimizer.learning_rate": 1e30, "checkpoint.every": 0})
    level = {name: data_levels.load_level(config, name, load_tokenizer(config)) for name in ("upper", "lower")}
    ids = batch_ids(config, level, 1)
    with pytest.raises(errors.RunError) as caught:  # the first step is the one that leaps
        train_without_report(config, tmp_path / "run")
    message = str(caught.value)
    assert message.startswith("step 2: ") and all(row_id in message for row_id in ids)
    assert not (tmp_path / "run" / "summary.json").exists()
    assert [event["step"] for event in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [0]


def test_stops_where_the_last_step_spoils_the_model(make_config, tmp_path):
    config = make_config({"optimizer.learning_rate": 1e30, "batch.size": 32, "num_epochs": 1})  # a single step
    with pytest.raises(errors.RunError, match="step 1: eval/upper_loss, .* not finite"):
        train_without_report(config, tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()


def test_stops_where_the_last_step_spoils_the_model_and_no_row_would_tell(make_config, tmp_path):
    leap = {"method": "mixing", "optimizer.name": "sgd", "optimizer.learning_rate": 1e38, "lora.alpha": 1e3}
    single = {"batch.size": 32, "num_epochs": 1, "eval.num_upper": 0, "eval.num_lower": 0}
    with pytest.raises(errors.RunError, match="step 1: θ not finite"):
        train_without_report(make_config(leap | single), tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"mesh.tensor": 9}, "mesh.tensor=9"),
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
    monkeypatch.setattr("bilevel_jax.step.make_step", None)
    with pytest.raises((ValueError, errors.RunError), match=reason) as caught:
        train_without_report(make_config(changes), tmp_path / "run")
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------------------------


def load_tokenizer(config):
    return templates.load_tokenizer(config.model.path)


def batch_ids(config, level, k) -> list[str]:
    layout = packing.Layout(config.batch.micro_size, config.data.max_length, 2 * config.batch.size)
    store = online.empty(len(level["lower"].rows))
    return batches.make_batch(config, level["upper"], level["lower"], layout, k, store).ids


@pytest.fixture(scope="module")
def levels(make_config):
    """`f(changes)` -> the config and both of its levels."""

    def make(changes):
        config = make_config(changes)
        return config, {name: data_levels.load_level(config, name, load_tokenizer(config)) for name in ("upper", "lower")}

    return make


def ids(rows):
    return {row.id for row in rows}


def make_pairs(directory) -> str:
    """A file of preference rows."""
    texts = enumerate(make_rows(12, seed=5))
    rows = [{"prompt": row["question"], "chosen": row["truth"], "rejected": f"No {i}."} for i, row in texts]
    return str(write_jsonl(directory / "upper.jsonl", rows))


class Counted(list):
    """A list that notes which of its elements are read."""

    def __init__(self, values):
        super().__init__(values)
        self.read = set()

    def __getitem__(self, i):
        self.read.add(i)
        return super().__getitem__(i)

    def __iter__(self):
        return (self[i] for i in range(len(self)))


def test_a_batch_reads_its_own_rows_alone(levels):
    """So that a step costs the same however many rows there are; their ids are known before."""
    config, level = levels({})
    counted = {
        name: dataclasses.replace(one, rows=Counted(one.rows), examples=Counted(one.examples)) for name, one in level.items()
    }
    for one in counted.values():
        assert len(one.ids) == len(one.rows)
        one.rows.read.clear()
    batches.make_batch(config, counted["upper"], counted["lower"], packing.Layout(2, 96, 8), 1, online.empty(NUM_ROWS))
    draws = {"lower": shuffle.lower_rows, "upper": shuffle.upper_rows}
    for name, one in counted.items():
        assert one.examples.read == {int(i) for i in draws[name](config.seed, len(one.rows), 4, 1)} and not one.rows.read


def test_a_batch_with_responses_of_the_models_own(levels, tmp_path):
    """Beside preference pairs, whose numbers are not those of questions. The third row of four was answered once, the first
    three times; the second is masked, but has no answer."""
    config, level = levels({"loss.upper": "dpo", "data.upper": make_pairs(tmp_path), "data.max_length": 128})
    first, second, third, fourth = (int(i) for i in shuffle.lower_rows(config.seed, len(level["lower"].rows), 4, 0))
    store = online.ResponseStore(
        step=0,
        masked=np.isin(np.arange(len(level["lower"].rows)), [first, second, third]),
        row_index=np.array([third, first, first, first]),
        sample_index=np.array([1, 0, 1, 2]),
        tokens=[np.arange(1, 2 + n, dtype=np.int32) for n in range(4)],
        log_prob=np.array([-1.0, -2.0, -3.0, -4.0]),
        log_ratio=np.full(4, np.nan),
    )
    layout = packing.Layout(2, 128, (2 + 3) * 4)
    above = dataclasses.replace(level["upper"], references=np.zeros((len(level["upper"].rows), 2)))
    drawn = batches.make_batch(config, above, level["lower"], layout, 0, store)
    lower = [first] * 3 + [second, third, fourth]
    assert drawn.store_index.tolist() == [1, 2, 3, -1, 0, -1] + [-1] * 8
    assert drawn.ids[:6] == [level["lower"].rows[i].id for i in lower] and len(drawn.ids) == 14
    batch = drawn.batch
    np.testing.assert_array_equal(batch.row_index[:6], lower)
    np.testing.assert_allclose(batch.share[:6], [1 / 12] * 3 + [1 / 4] * 3)
    np.testing.assert_array_equal(batch.old_log_prob[:6], [-2, -3, -4, np.nan, -1, np.nan])
    responses = [len(level["lower"].examples[i].response) for i in (second, fourth)]
    np.testing.assert_array_equal(batch.packed.length[:6], [2, 3, 4, responses[0], 1, responses[1]])
    assert len(set(batch.group[:3])) == 1 and batch.group[0] != batch.group[4]
    assert not {batch.group[0], batch.group[4]} & {*batch.group[6:14]} and max(batch.group[0], batch.group[4]) < layout.entries
    prompts = [len(level["lower"].examples[i].prompt) for i in lower]
    upper = [level["upper"].examples[j] for j in shuffle.upper_rows(config.seed, len(level["upper"].rows), 4, 0)]
    pairs = sum(2 * len(pair.prompt) + len(pair.response) + len(pair.rejected) for pair in upper)
    assert drawn.num_tokens == sum(prompts) + sum(batch.packed.length[:6]) + pairs and batch.num_lower == 4


def test_entries_have_the_factors_of_equation_7(levels):
    """Of the rows that are masked, with or without a stored response; upper rows have 1."""
    config, level = levels({"method": "online", "online.normalization": "eq7"})
    num_rows, layout = len(level["lower"].rows), packing.Layout(config.batch.micro_size, config.data.max_length, 8)
    masked = np.arange(num_rows) < 3
    store = dataclasses.replace(online.empty(num_rows), masked=masked)
    drawn = [batches.make_batch(config, level["upper"], level["lower"], layout, k, store).batch for k in range(STEPS)]
    for batch in drawn:
        expected = [1 if i == num_rows else num_rows / 3 if i < 3 else num_rows / (num_rows - 3) for i in batch.row_index]
        np.testing.assert_allclose(batch.row_factor, expected, rtol=1e-6)
    assert {i < 3 for batch in drawn for i in batch.row_index} == {True, False}
    for changes in ({"method": "online"}, {"method": "offline", "online.normalization": "eq7"}):
        assert batches.make_batch(levels(changes)[0], level["upper"], level["lower"], layout, 0, store).batch.row_factor is None


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
    summary = train_without_report(make_config(SHORT | changes), workdir)
    assert summary == summary_of(workdir)
    assert all(math.isfinite(value) for value in summary.values())
    return summary, [event for event in read_jsonl(workdir / "metrics.jsonl") if "train/loss" in event]


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_mixing(make_config, tmp_path, rho):
    """It has no use for a selector, nor for responses of the model's own, whatever is said about them."""
    summary, events = finish(make_config, {"method": "mixing", "mixing.rho": rho, "online.ratio": 1.0}, tmp_path)
    assert not any(key.startswith("selector/") for key in summary) and not (tmp_path / "weights").exists()
    assert not any(key.startswith("online/") for event in [summary, *events] for key in event)
    assert not (tmp_path / "responses.jsonl").exists() and summary["time/generate"] == 0
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
@pytest.mark.slow
def test_offline(make_config, tmp_path, rule, optimizer, options):
    options = {"rule": rule, "optimizer": optimizer} | options
    summary, _ = finish(make_config, {f"selection.{key}": value for key, value in options.items()}, tmp_path)
    assert 0 < summary["selector/ess"] < 1 and 0 <= summary["selector/auroc"] <= 1
    assert summary["selector/weight_min"] < 1 < summary["selector/weight_max"]


def test_features(amortised, make_config, tmp_path, monkeypatch):
    """Logits are those of the stored features and φ; a run that was stopped does not make features again, and ends the same."""
    encoder, stored = features.read(amortised / features.FILE)
    phi = features.read_params(amortised / features.PARAMS_FILE)
    assert stored.shape == (NUM_LOWER - HELD_OUT, features.SIZE) and phi.any()
    np.testing.assert_allclose(table_of(amortised, EPOCHS)["logit"], stored @ phi.astype(np.float64), rtol=1e-4, atol=1e-6)

    with monkeypatch.context() as once:
        stop_at(once, 3)
        with pytest.raises(errors.Interrupted):
            train_without_report(make_config(AMORTISED), tmp_path)
    monkeypatch.setattr(features, "pooled", None)
    train_without_report(make_config(AMORTISED), tmp_path)
    for file in ("adapter/adapter_model.safetensors", f"weights/epoch_{EPOCHS}.parquet", features.FILE, features.PARAMS_FILE):
        assert (tmp_path / file).read_bytes() == (amortised / file).read_bytes(), file


@pytest.mark.slow
def test_rows_of_a_source_weigh_the_same(by_source, tmp_path, monkeypatch):
    config, workdir = by_source
    table = table_of(workdir, EPOCHS)
    pairs = set(zip(table["source"].to_pylist(), table["logit"].to_pylist()))
    assert len(pairs) == 3 and len({logit for _, logit in pairs}) == 3
    with monkeypatch.context() as once:
        stop_at(once, 3)
        with pytest.raises(errors.Interrupted):
            train_without_report(config, tmp_path)
    train_without_report(config, tmp_path)
    file = f"weights/epoch_{EPOCHS}.parquet"
    assert (tmp_path / file).read_bytes() == (workdir / file).read_bytes()


def test_one_source_is_nothing_to_choose_from(make_config, tmp_path):
    changes = {"selection.unit": "domain", "selection.optimizer": "adam"}
    with pytest.raises(data_rows.DataError, match="lower.jsonl: all rows have source 'sums-2'; .* needs several"):
        train_without_report(make_config(changes), tmp_path)


@pytest.mark.slow
def test_weights_of_tokens(make_config, data, tmp_path, monkeypatch):
    """As a run leaves them: against the adapter that it left, token by token; and the same after an interruption."""
    lower = read_jsonl(data / "lower.jsonl")
    spans = [row | ({"odd": [[0, 2]]} if i % 2 else {}) for i, row in enumerate(lower)]
    changes = {"selection.unit": "token", "selection.token_learning_rate": 0.3, "data.spans": "odd"}
    config = make_config(changes | {"data.lower": str(write_jsonl(tmp_path / "lower.jsonl", spans))})
    workdir, broken = tmp_path / "run", tmp_path / "broken"
    summary = train_without_report(config, workdir)
    phi = np.array([summary["selector/token_own"], summary["selector/token_before"]])
    assert phi[0] < -0.05  # a token that is more surprising than others of its response is trusted less

    rows, loaded = {row.id: row for row in streaming.reopen(config)}, load(config.model.path, workdir / "adapter")
    marked, result = [], []
    for of_row in weight_table.read_tokens(workdir).to_pylist():
        row = rows[of_row["id"]]
        nll = -np.array(token_log_probs(loaded, row.question, row.response))
        share = np.exp(phi @ [nll, np.maximum.accumulate([0.0, *nll[:-1]])])
        np.testing.assert_allclose(of_row["weight"], len(nll) * share / share.sum(), rtol=1e-3)
        assert of_row["start"][-1] == of_row["stop"][-1] == len(row.response)
        marked += [start < 2 for start in of_row["start"]] if row.fields.get("odd") else [False] * len(nll)
        result += of_row["weight"]
    by_hand = [(a < b) + 0.5 * (a == b) for a, bad in zip(result, marked) if bad for b, other in zip(result, marked) if not other]
    assert summary["selector/token_auroc"] == pytest.approx(np.mean(by_hand))

    with monkeypatch.context() as once:
        stop_at(once, 3)
        with pytest.raises(errors.Interrupted):
            train_without_report(config, broken)
    train_without_report(config, broken)
    for file in (weight_table.TOKENS, f"weights/epoch_{EPOCHS}.parquet", "adapter/adapter_model.safetensors"):
        assert (broken / file).read_bytes() == (workdir / file).read_bytes()


@pytest.mark.slow
def test_influence(make_config, tmp_path, monkeypatch):
    """The default: its numbers are in the table."""
    monkeypatch.setattr(similarity, "MIN_TRUSTED", 2)  # there are few trusted rows
    changes = {"selection.cost": "influence", "eval.similar": True}
    assert np.isfinite(list(train_without_report(make_config(changes), tmp_path / "whole").values())).all()
    table = table_of(tmp_path / "whole", EPOCHS)
    assert table_of(tmp_path / "whole", 1)["similar"].null_count == len(table) and table["similar"].null_count == 0
    assert abs(np.mean(table["similar"])) < 1e-5 and np.std(table["similar"]) > 0.3  # the mean of two numbers of deviation 1
    assert np.ptp(table["logit"]) > 0.1 and len(set(table["nearest"].to_pylist())) > 1
    assert table["useful"].null_count == 0 and 0 < min(table["plausible"].to_pylist()) <= max(table["plausible"].to_pylist()) <= 1


@pytest.mark.slow
def test_metagradient(make_config, tmp_path, monkeypatch):
    """The search moves the weights before the first step, they stay, and a search that was interrupted is not repeated.

    It keeps equal weights where those by the metagradient have the higher loss."""
    measured = [2.0, 1.0]
    monkeypatch.setattr(search, "_measured", lambda *_: measured.pop(0))
    changes = {"method": "offline", "selection.rule": "metagradient", "selection.outer_steps": 1}
    train_without_report(make_config(changes), tmp_path / "run")
    first = table_of(tmp_path / "run", 1)["logit"].to_numpy()
    assert np.ptp(first) > 0.1 and (table_of(tmp_path / "run", EPOCHS)["logit"].to_numpy() == first).all()
    stored = np.load(tmp_path / "run" / search.FILE)
    assert len(stored["losses"]) == 2 and len(stored["gradients"]) == 1
    gradient = stored["gradients"][0]
    assert ((first < -0.1) <= (gradient > gradient.mean())).all()  # rows that help less than the average, and no other, lose weight
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / search.FILE).write_bytes((tmp_path / "run" / search.FILE).read_bytes())
    train_without_report(make_config(changes), tmp_path / "again")
    assert (table_of(tmp_path / "again", 1)["logit"].to_numpy() == first).all()
    (tmp_path / "worse").mkdir()
    np.savez(tmp_path / "worse" / search.FILE, gradients=stored["gradients"], losses=[1.0, 2.0], identity=stored["identity"])
    train_without_report(make_config(changes), tmp_path / "worse")
    assert (table_of(tmp_path / "worse", 1)["logit"].to_numpy() == 0).all()


def test_logits_of_metagradients():
    """-10 z / (z + 0.1) for rows above the mean, -0.01 z for the others; z sums (g - mean) / std over the iterations."""
    first, second = np.array([1.0, 2.0, 6.0]), np.array([0.0, 0.0, -3.0])  # means 3 and -1, std √(14/3) and √2
    z = np.array([-2, -1, 3]) / (14 / 3) ** 0.5
    np.testing.assert_array_equal(search.to_logits([], 3), [0, 0, 0])
    np.testing.assert_allclose(search.to_logits([first], 3), [-0.01 * z[0], -0.01 * z[1], -10 * z[2] / (z[2] + 0.1)], rtol=1e-6)
    z += np.array([1, 1, -2]) / 2**0.5
    expected = [-0.01 * z[0], -10 * z[1] / (z[1] + 0.1), -0.01 * z[2]]
    np.testing.assert_allclose(search.to_logits([first, second], 3), expected, rtol=1e-5)


def test_uniform(make_config, tmp_path):
    changes = {"selection.rule": "uniform", "log.every": 1, "optimizer.name": "sgd", "loss.reduction": "sum"}
    summary, events = finish(make_config, changes, tmp_path)
    assert summary["selector/ess"] == pytest.approx(1) and "selector/auroc" not in summary
    assert set(table_of(tmp_path, 1)["weight"].to_pylist()) == {1.0}
    for event in events:  # γ = 0.1 / 0.9
        expected = event["train/upper_loss"] + event["train/lower_loss"] / 9
        assert event["train/loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_dpo(make_config, tmp_path):
    changes = {"loss.upper": "dpo", "data.upper": make_pairs(tmp_path), "data.max_length": 128, "log.every": 1}
    summary, events = finish(make_config, changes, tmp_path / "run")
    losses = [event["train/upper_loss"] for event in events]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-5)  # the policy is the reference before the first step
    assert losses[-1] < losses[0]
    assert summary["start/upper_loss"] > 1  # in nats per token of the chosen response, not a DPO loss


def test_every_row_in_one_batch_and_none_held_out(make_config, tmp_path):
    summary, events = finish(make_config, {"batch.size": 32, "eval.num_upper": 0, "eval.num_lower": 0}, tmp_path)
    assert summary["steps"] == 1 and summary["rows"] == NUM_LOWER
    assert not any(key.startswith(("eval/", "start/")) for key in summary)


# --------------------------------------------------------------------------------------------------------------------
# Self-refining generation
# --------------------------------------------------------------------------------------------------------------------

EVERY, NUM_ROWS, NUM_MASKED = 3, NUM_LOWER - HELD_OUT, 8  # ⌊0.4 · 21⌋
REFINED = {
    "method": "dynamic",
    "online.ratio": 0.4,
    "online.num_samples": 2,
    "online.refresh_every": EVERY,  # every other one is between two checkpoints
    "online.max_new_tokens": 12,
    "online.slots": 4,  # fewer than there are responses to make
    "online.clip": 1.2,
    "selection.coefficient_at": "current",
    "log.every": 1,
}
SINGLE = {"online.num_samples": 1}  # the shapes of an offline run


@pytest.fixture(scope="module")
def refined(make_config, tmp_path_factory):
    """`f(changes)` -> workdir of a finished run of `REFINED` with these changes, and what was recorded of each refresh."""

    @functools.cache
    def run(items):
        workdir, stores, write = tmp_path_factory.mktemp("refined") / "run", [], response_log.ResponseLog.write

        def write_and_keep(log, store, *rest):
            stores.append(store)
            write(log, store, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(response_log.ResponseLog, "write", write_and_keep)
            train_without_report(make_config(REFINED | dict(items)), workdir)
        return workdir, [store for store in stores if store.step >= 0]

    return lambda changes=(): run(tuple(sorted(dict(changes).items())))


def responses_of(workdir) -> list[dict]:
    """Lines as JSON ends them: a random model may say what else ends a line."""
    return [json.loads(line) for line in (workdir / "responses.jsonl").read_bytes().split(b"\n")[:-1]]


def masked_in(workdir, epoch) -> set[str]:
    return {row["id"] for row in table_of(workdir, epoch).to_pylist() if row["masked"]}


def rows_of_step(table, k, batch=4) -> set[str]:
    return {table["id"][int(i)].as_py() for i in shuffle.lower_rows(0, NUM_ROWS, batch, k)}


REFRESH = {"online/masked", "online/masked_bad", "online/responses", "online/response_length", "online/eos_rate", "online/empty"}
REFRESH |= {"online/time_share", "speed/generated_tokens_per_s"}
RATIOS = {f"online/{key}" for key in ("ratio_mean", "ratio_p05", "ratio_p50", "ratio_p95", "clip_fraction", "ess")}


def test_metrics_of_refreshes(refined):
    workdir, _ = refined()
    events = read_jsonl(workdir / "metrics.jsonl")
    refreshes = [event for event in events if "online/responses" in event]
    assert [(event["step"], event["epoch"]) for event in refreshes] == [(1, 0), (4, 0.5), (7, 1), (10, 1.5)]
    assert refreshes[0]["online/masked"] == refreshes[0]["online/responses"] == 0  # all weights are equal
    assert all(event.keys() >= REFRESH and event["online/masked"] == NUM_MASKED for event in refreshes[1:])
    assert any("online/correction_rate" in event for event in refreshes)
    training = [event for event in events if "train/loss" in event]
    assert [event["step"] for event in training] == list(range(1, STEPS + 1))
    used = [event for event in training if "online/ratio_mean" in event]
    assert used and all(event.keys() >= RATIOS for event in used)
    assert any(event["online/clip_fraction"] > 0 for event in used) and any(event["online/ess"] < 1 for event in used)
    assert all(math.isfinite(value) for event in events for value in event.values())
    summary = summary_of(workdir)
    assert summary["time/generate"] > 0
    assert summary["online/responses"] == sum(event["online/responses"] for event in refreshes) > 0


@pytest.mark.parametrize("method", ["online", "dynamic"])
@pytest.mark.slow
def test_recorded_responses(refined, method):
    """Of every refresh: two to each question that was masked and visited before the next one, all of them used."""
    workdir, stores = refined({"method": method})
    lines = responses_of(workdir)
    assert all(list(line) == ["step", "id", "sample", "text", "logprob", "ratio", "finish_reason"] for line in lines)
    eos = load_tokenizer(ConfigDict(json.loads((workdir / "config.json").read_text()))).eos_token_id
    ends = ["stop" if tokens[-1] == eos else "length" for store in stores for tokens in store.tokens]
    assert [line["finish_reason"] for line in lines] == ends
    assert set(ends) == {"stop", "length"} or method == "dynamic"  # which generates fewer
    table = table_of(workdir, 2)
    for store, step in zip(stores, range(0, STEPS, EVERY), strict=True):
        masked = {table["id"][int(i)].as_py() for i in np.flatnonzero(store.masked)}
        visited = set.union(*(rows_of_step(table, k) for k in range(step, step + EVERY)))
        mine = [line for line in lines if line["step"] == step]
        assert (
            len(masked) == (NUM_MASKED if step or method == "online" else 0) and {line["id"] for line in mine} == masked & visited
        )
        assert len({(line["id"], line["sample"]) for line in mine}) == len(mine) == 2 * len(masked & visited)
        # θ has not moved when a step follows a refresh at once; later it has.
        fresh = [line["ratio"] for line in mine if line["id"] in rows_of_step(table, step)]
        stale = [line["ratio"] for line in mine if line["id"] not in rows_of_step(table, step)]
        np.testing.assert_allclose(fresh, 1, atol=1e-4)
        assert all(abs(ratio - 1) > 1e-3 for ratio in stale)
    assert masked_in(workdir, 2) == masked  # that of the last refresh
    if method == "online":
        assert all((store.masked == stores[0].masked).all() for store in stores)
    else:
        assert len({store.masked.tobytes() for store in stores}) == len(stores)


def test_refreshes_ask_for_what_the_config_says(levels, monkeypatch):
    """Seed and row ids make the keys: SHA-256, as `sampling` says."""
    asked = []

    def make_sampler(model, settings, eos, **rest):
        def sample(base, adapter, prompts, keys, *more):
            asked.append((settings, tuple(eos), rest["slots"], rest["length"], prompts, keys))

        return sample

    monkeypatch.setattr(setups.sampling, "make_sampler", make_sampler)
    changes = {"temperature": 0.7, "max_new_tokens": 5, "slots": 6, "num_samples": 3}
    config, level = levels({f"online.{key}": value for key, value in changes.items()} | {"seed": 7})
    refresh = setups.build_refresh(config, setups.load(config), score=None)
    assert refresh(None, None, 6, np.array([2, 5]), np.array([1, 5]), lambda: False) is None
    (settings, eos, slots, length, prompts, keys), lower = asked[0], level["lower"]
    assert settings == sampling.Settings(temperature=0.7, max_new_tokens=5)
    assert (eos, slots, length) == ((load_tokenizer(config).eos_token_id,), 6, 96)
    np.testing.assert_array_equal(prompts, [lower.examples[5].prompt])
    texts = [f"7/{lower.rows[5].id}/6/{g}".encode() for g in range(3)]
    np.testing.assert_array_equal(keys, [[np.frombuffer(hashlib.sha256(text).digest()[:8], "<u4") for text in texts]])


class Verbatim:
    """A tokenizer for what is tokens already."""

    eos_token_id = None

    def __call__(self, tokens):
        return {"input_ids": [int(token) for token in tokens]}


def test_recorded_log_probabilities(refined, neox, make_config):
    """π_old at step 0 is the base model, plain and at temperature 1, and each response scored alone."""
    workdir, stores = refined({"method": "online"})
    model, base, _, tokenizer = load(neox)
    rows = data_levels.load_level(make_config(REFINED), "lower", tokenizer).rows
    lines = [line for line in responses_of(workdir) if line["step"] == 0]
    for line, row, sample, tokens in zip(lines, stores[0].row_index, stores[0].sample_index, stores[0].tokens, strict=True):
        assert (line["id"], line["sample"]) == (rows[row].id, sample)
        spoken = [token for token in tokens if token != tokenizer.eos_token_id]
        assert line["text"] == tokenizer.backend_tokenizer.decode(spoken)  # to the space
        prompt = tokenizer(f"Human: {rows[row].question}\n\nAssistant: ")["input_ids"]
        expected = token_log_probs((model, base, None, Verbatim()), prompt, tokens, template="none", eos=False)
        assert line["logprob"] == pytest.approx(sum(expected), rel=1e-5)


def test_loss_of_the_rows_in_use(refined, neox, make_config):
    """Of some `HELD_OUT` rows of the last refresh interval, each response scored alone; which of them is left to the run."""
    workdir, stores = refined({"method": "online"})
    model, base, adapter, tokenizer = load(neox, workdir / "adapter")
    loaded, plain = (model, base, adapter, tokenizer), (model, base, adapter, Verbatim())
    rows = data_levels.load_level(make_config(REFINED), "lower", tokenizer).rows
    visited = {int(row) for k in range(STEPS - EVERY, STEPS) for row in shuffle.lower_rows(0, NUM_ROWS, 4, k)}
    losses = []
    for index in sorted(visited):
        row, answers = rows[index], [stores[-1].tokens[i] for i in stores[-1].by_row.get(index, ())]
        of_data = -np.mean(token_log_probs(loaded, row.question, row.response))
        prompt = tokenizer(f"Human: {row.question}\n\nAssistant: ")["input_ids"]
        own = [-np.mean(token_log_probs(plain, prompt, answer, template="none", eos=False)) for answer in answers]
        losses.append((np.mean(own) if own else of_data, of_data, bool(own)))
    summary = summary_of(workdir)
    result = [summary[f"eval/used_{key}"] for key in ("loss", "data_loss", "generated")]
    means = [np.mean(four, axis=0) for four in itertools.combinations(losses, HELD_OUT)]
    assert sum(np.allclose(mean, result, rtol=1e-5) for mean in means) == 1
    assert result[2] > 0 and abs(result[0] - result[1]) > 0.01


def test_without_generation_the_rows_in_use_are_those_of_the_data(finished):
    summary = summary_of(finished)
    assert summary["eval/used_loss"] == summary["eval/used_data_loss"] > 0 and summary["eval/used_generated"] == 0


def test_a_run_says_what_it_does(make_config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(phases, "EVERY", 1e6)  # on a busy machine a phase takes longer than that
    train_without_report(make_config(REFINED | {"num_epochs": 1, "checkpoint.every": 0}), tmp_path / "run")
    about_rows = ".jsonl", "no chat template"
    printed = [line for line in capsys.readouterr().out.splitlines() if not any(part in line for part in about_rows)]
    printed = [line for line in printed if line and not line.startswith(" ")]  # without the row that shows the template
    (answering,) = (line for line in printed if line.startswith("step 3: "))
    number, asked = len(responses_of(tmp_path / "run")), re.fullmatch("step 3: answering (\\d+) questions 2 times each", answering)
    assert asked and 0 < number <= 2 * int(asked[1])  # blank responses are not kept
    assert printed == [
        "loading rows",
        "data.upper has only 13 trusted rows; what they want is clearer with 20 or more",
        "loading the model",
        "compiling the training step",
        "preparing the held-out rows",
        "evaluating before the first step",
        "step 0: answering 0 questions, because all weights are equal",
        answering,
        "evaluating at step 6",
        "writing the report",
    ]


@pytest.mark.parametrize("changes, refused", [({}, True), ({"online.ratio": 1.0}, False), ({"method": "online"}, False)])
def test_a_dynamic_run_that_would_mask_nothing(make_config, tmp_path, monkeypatch, changes, refused):
    monkeypatch.setattr("bilevel_jax.step.make_step", None)  # what is not refused fails here
    changes = REFINED | {"online.refresh_every": STEPS} | changes
    with pytest.raises(configuration.ConfigError if refused else TypeError) as caught:
        train_without_report(make_config(changes), tmp_path / "run")
    assert not refused or "online.refresh_every=12 reaches to the end of this run of 12 steps; lower it" in str(caught.value)


def test_dynamic_masks_follow_the_weights(refined):
    """The rows that weigh least when the second epoch begins; before that, none weighs less than another, and none is masked."""
    workdir, _ = refined({"online.refresh_every": EPOCH_STEPS})
    logits = {row["id"]: row["logit"] for row in table_of(workdir, 1).to_pylist()}
    assert len(set(logits.values())) == NUM_ROWS
    lightest = set(sorted(logits, key=logits.get)[:NUM_MASKED])
    assert masked_in(workdir, 2) == lightest and masked_in(workdir, 1) == set()


@pytest.mark.parametrize("method", ["online", "dynamic"])
@pytest.mark.slow
def test_answers_that_are_not_needed_change_nothing(refined, method):
    (needed, _), (every, _) = refined({"method": method}), refined({"method": method, "online.generate": "all"})
    for file in TRAINED:
        assert (every / file).read_bytes() == (needed / file).read_bytes()
    result, expected = ([e for e in read_jsonl(x / "metrics.jsonl") if "online/masked" not in e] for x in (every, needed))
    assert [without(event, "speed/") for event in result] == [without(event, "speed/") for event in expected]
    result, expected = responses_of(every), responses_of(needed)
    assert [line for line in result if line["ratio"] is not None] == expected
    first = 2 * NUM_MASKED if method == "online" else 0
    assert [sum(line["step"] == step for line in result) for step in range(0, STEPS, EVERY)] == [first, *[2 * NUM_MASKED] * 3]


def interrupt_refresh(patch, at):
    """A SIGTERM to this process while the responses of the refresh at step `at` are sampled."""
    make_refresh = online.make_refresh

    def make(*args):
        refresh = make_refresh(*args)

        def interrupted(base, adapter, step, masked, visited, stopped):
            def asked():
                if step == at:
                    signal.raise_signal(signal.SIGTERM)
                return stopped()

            return refresh(base, adapter, step, masked, visited, asked)

        return interrupted

    patch.setattr(online, "make_refresh", make)


@pytest.mark.slow
def test_an_interrupted_refresh_ends_as_if_it_had_not_been(refined, make_config, tmp_path, capsys):
    """Stopped while responses are sampled, in the first refresh that masks and later; killed there, and between a refresh and the
    next checkpoint, when the record is ahead of what will be resumed."""
    expected, _ = refined()
    workdir, config = tmp_path / "run", make_config(REFINED)
    write_config(tmp_path, config)
    for how, at, resumed in [("term", 3, ""), ("asking", 9, "3"), ("step", 10, "8"), ("term", 9, "8")]:
        if how == "term":
            with pytest.MonkeyPatch.context() as patch:
                interrupt_refresh(patch, at)
                with pytest.raises(errors.Interrupted, match=f"SIGTERM: saved at step {at} of {STEPS}"):
                    train_without_report(config, workdir)
            printed = capsys.readouterr().out
        else:
            command = [sys.executable, "-u", "-c", COMMAND, how, str(at), str(workdir)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == -signal.SIGKILL, done.stderr
            printed = done.stdout
        assert "".join(re.findall(rf"resuming .* at step (\d+) of {STEPS}", printed)) == resumed
    train_without_report(config, workdir)
    assert f"at step 9 of {STEPS}" in capsys.readouterr().out

    for file in ("config.json", "responses.jsonl", *TRAINED):
        assert (workdir / file).read_bytes() == (expected / file).read_bytes(), file
    assert without(summary_of(workdir), "time/") == without(summary_of(expected), "time/")
    timings = "speed/", "online/time_share"
    result, events = ([without(e, timings) for e in read_jsonl(x / "metrics.jsonl")] for x in (workdir, expected))
    assert result == events


@pytest.mark.slow
def test_no_mask_is_offline(refined, tmp_path, make_config):
    """Bit for bit: R = 0 generates nothing and changes nothing."""
    nothing, stores = refined(SINGLE | {"online.ratio": 0.0})
    offline, _ = refined(SINGLE | {"method": "offline"})
    assert not (offline / "responses.jsonl").exists() and responses_of(nothing) == []
    for file in TRAINED:
        assert (nothing / file).read_bytes() == (offline / file).read_bytes()
    assert masked_in(nothing, 2) == set() and summary_of(nothing)["online/responses"] == 0
    assert "time/generate" in summary_of(nothing) and summary_of(offline)["time/generate"] == 0


@pytest.mark.slow
def test_all_masked(refined):
    """R = 1: no response of the data is looked at. What is told of the ratios is of all that were used since the last event."""
    workdir, stores = refined(SINGLE | {"online.ratio": 1.0, "log.every": 4})
    assert len(masked_in(workdir, 1)) == len(masked_in(workdir, 2)) == NUM_ROWS
    table, lines = table_of(workdir, 2), responses_of(workdir)
    seen = [rows_of_step(table, k) for k in range(STEPS)]
    for store in stores:
        of_refresh = {line["id"] for line in lines if line["step"] == store.step}
        assert of_refresh == set.union(*seen[store.step : store.step + EVERY])
    assert all(line["ratio"] is not None for line in lines) and len(lines) == EPOCHS * NUM_ROWS

    training = [event for event in read_jsonl(workdir / "metrics.jsonl") if "train/loss" in event]
    assert [event["step"] for event in training] == [4, 6, 8, 12]
    for event, steps in zip(training, [range(4), range(4, 6), range(6, 8), range(8, 12)]):
        used = [x["ratio"] for x in lines for k in steps if x["step"] == k // EVERY * EVERY and x["id"] in seen[k]]
        assert event["online/ratio_mean"] == pytest.approx(np.mean(used), rel=1e-5)
        assert event["online/clip_fraction"] == np.mean([ratio > 1.2 for ratio in used])
        assert "online/ess" not in event  # there is nothing to compare with where a question has one answer
    assert any(0 < event["online/clip_fraction"] < 1 for event in training)


def test_preferences_above_and_own_responses_below(make_config, tmp_path):
    changes = {"method": "dynamic", "online.ratio": 0.4, "online.refresh_every": 2, "online.max_new_tokens": 8, "online.slots": 4}
    preferences = {"loss.upper": "dpo", "data.upper": make_pairs(tmp_path), "data.max_length": 128, "log.every": 1}
    _, events = finish(make_config, changes | preferences, tmp_path / "run")
    losses = [event["train/upper_loss"] for event in events]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-5)  # the policy is the reference before the first step
    assert losses[-1] < losses[0]
    used = [line["ratio"] for line in responses_of(tmp_path / "run")]
    assert used and all(ratio is not None for ratio in used)


# --------------------------------------------------------------------------------------------------------------------
# Pairs below, and rewards
# --------------------------------------------------------------------------------------------------------------------

COMPARED = REFINED | {
    "method": "online",
    "loss.lower": "dpo",
    "online.objective": "dpo",
    "online.reward": "likelihood",
    "data.max_length": 128,
    "log.every": 1,
}


def make_flipped(directory) -> str:
    """A file of preference rows of which every third is the wrong way round, and two that are none."""
    rows = []
    for i, row in enumerate(make_rows(12, seed=5)):
        answers = (row["truth"], f"No {i}.")[:: 1 if i % 3 else -1]
        pair = dict(zip(("chosen", "rejected"), answers))
        rows.append({"prompt": row["question"], "truth": row["truth"], "bad": not i % 3} | pair)
    rows += [{"prompt": "a", "chosen": "b"}, {"prompt": "a", "chosen": "b", "rejected": "b "}]
    return str(write_jsonl(directory / "lower.jsonl", rows))


@pytest.mark.slow
def test_pairs_of_the_model_itself_resume(make_config, tmp_path, capsys):
    """Own pairs stand among pairs of the data. Stopped while responses are sampled, and between a refresh and the next one, a
    run ends with the same bits: rewards and references are saved with the responses."""
    config = make_config(COMPARED | {"data.lower": make_flipped(tmp_path)})
    expected, workdir = tmp_path / "whole", tmp_path / "parts"
    train_without_report(config, expected)
    printed = capsys.readouterr().out
    assert "left out 1: no field 'rejected'" in printed and "left out 1: chosen and rejected are the same" in printed
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 1)
        with pytest.raises(errors.Interrupted):
            train_without_report(config, workdir)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_refresh(patch, 3)
        with pytest.raises(errors.Interrupted):
            train_without_report(config, workdir)
    with pytest.MonkeyPatch.context() as patch:
        scored, pair_log_probs = [], scoring.pair_log_probs
        patch.setattr(scoring, "pair_log_probs", lambda *args: scored.append(len(args[3])) or pair_log_probs(*args))
        train_without_report(config, workdir)
    assert len(np.load(workdir / "references_lower.npy")) not in scored  # the references of training rows are read
    for file in ("responses.jsonl", *TRAINED):
        assert (workdir / file).read_bytes() == (expected / file).read_bytes(), file
    summary = summary_of(workdir)
    assert without(summary, "time/") == without(summary_of(expected), "time/")

    lines, events = responses_of(workdir), read_jsonl(workdir / "metrics.jsonl")
    assert lines and all(line["reward"] < 0 for line in lines)
    told = [event for event in events if "online/reward" in event]
    assert told and all(event["online/reward_gap"] >= 0 <= event["online/reward_ties"] for event in told)
    losses = [event["train/lower_loss"] for event in events if "train/loss" in event]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-4)  # all margins are 0 before the first step
    assert not any("online/clip_fraction" in event for event in events)  # pairs take no ratio
    assert summary["start/lower_pair_loss"] == pytest.approx(math.log(2), rel=1e-6) != summary["eval/lower_pair_loss"]
    assert 0 <= summary["eval/lower_pair_accuracy"] <= 1 and summary["start/lower_pair_accuracy"] == 0.5
    assert 0 <= summary["selector/auroc"] <= 1


@pytest.mark.parametrize("level", ["upper", "lower"])
@pytest.mark.slow
def test_pair_accuracy(make_config, tmp_path, neox, level):
    """Against each held-out response scored alone: the share whose log-probability per token, which IPO compares, rose more than
    that of the rejected one."""
    file = make_flipped(tmp_path)
    changes = {f"loss.{level}": "ipo", f"data.{level}": file, "data.max_length": 128, "num_epochs": 1, "eval.num_lower": 5}
    summary, _ = finish(make_config, changes, tmp_path / "run")
    before, after = load(neox), load(neox, tmp_path / "run" / "adapter")
    config = ConfigDict(json.loads((tmp_path / "run" / "config.json").read_text()))
    rows = data_levels.load_level(config, level, before[3]).eval_rows
    rose = []
    for row in rows:
        gain = [np.mean(token_log_probs(x, row.question, text)) for text in (row.response, row.rejected) for x in (before, after)]
        rose.append(gain[1] - gain[0] > gain[3] - gain[2])
    assert summary[f"eval/{level}_pair_accuracy"] == np.mean(rose)
    if level == "lower":
        assert {row.id for row in streaming.reopen(config)} > set(table_of(tmp_path / "run", 1)["id"].to_pylist())


def test_a_reward_that_cannot_be_had_stops_the_run_before_it_begins(make_config, tmp_path):
    changes = REFINED | {"online.objective": "best_of", "online.reward": "nowhere_at_all:reward"}
    with pytest.raises(rewards.RewardError, match="^online.reward=nowhere_at_all:reward: cannot be imported"):
        train_without_report(make_config(changes), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("key", ["online.slots", "batch.micro_size"])
def test_devices_take_equal_parts(make_config, tmp_path, monkeypatch, key):
    monkeypatch.setattr(train.sharding, "make_mesh", memory.make_mesh)
    with pytest.raises(ValueError, match=f"{key}=3 must be a multiple of mesh.data · mesh.fsdp, 2 devices"):
        train_without_report(make_config(REFINED | {"mesh.data": 2, key: 3}), tmp_path / "run")


# --------------------------------------------------------------------------------------------------------------------
# The smallest of everything
# --------------------------------------------------------------------------------------------------------------------


def test_one_row_one_answer_one_token(make_config, tmp_path, neox):
    """N = 1, R = 1, G = 1, an answer of one token, and a question that leaves room for no more."""
    (row,) = make_rows(1, seed=3)
    lower = write_jsonl(tmp_path / "lower.jsonl", [row])
    prompt = len(load(neox)[3](f"Human: {row['question']}\n\nAssistant: ")["input_ids"])
    upper = write_jsonl(tmp_path / "upper.jsonl", [{"question": mark, "response": "yes"} for mark in "?!.:;"])
    changes = {"method": "dynamic", "online.ratio": 1.0, "online.max_new_tokens": 1, "online.refresh_every": 1, "online.slots": 2}
    changes |= {"data.lower": str(lower), "data.upper": str(upper), "data.max_length": prompt + 1, "eval.num_lower": 0}
    summary, events = finish(make_config, changes | {"num_epochs": 2}, tmp_path / "run")
    assert summary["rows"] == 1 and summary["steps"] == 2 and summary["online/responses"] == 2
    assert summary["selector/ess"] == 1 and "selector/auroc" not in summary
    assert table_of(tmp_path / "run", 2)["weight"].to_pylist() == [1.0] and len(masked_in(tmp_path / "run", 2)) == 1
    assert all(line["ratio"] == pytest.approx(1, abs=1e-4) for line in responses_of(tmp_path / "run"))


@pytest.mark.parametrize("optimizer, outcome", [("sgd", "stops"), ("mirror", "one row has all weight")])
@pytest.mark.slow
def test_weights_that_overflow(make_config, tmp_path, optimizer, outcome):
    """ω beyond float32 stops the run in one line; ω that is merely huge is a weight of N on one row."""
    rate = {"sgd": 3e38, "mirror": 1e30}[optimizer]
    changes = {"selection.optimizer": optimizer, "selection.learning_rate": rate, "selection.baseline": "none"}
    if outcome == "stops":
        with pytest.raises(errors.RunError, match=r"^step \d+: .*not finite") as caught:
            train_without_report(make_config(SHORT | changes), tmp_path)
        assert "\n" not in str(caught.value) and not (tmp_path / "summary.json").exists()
        return
    summary, _ = finish(make_config, changes, tmp_path)
    assert summary["selector/weight_max"] == pytest.approx(NUM_LOWER - HELD_OUT) and summary["selector/weight_min"] == 0

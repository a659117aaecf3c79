"""The writer of events across a resume."""

import json
import struct

import numpy as np
import pytest

from bilevel_jax.runtime import metrics


def test_keys_of_earlier_versions():
    values = {"online/another_chance": 0.5, "selector/auroc": 0.9}
    assert metrics.with_current_keys(values) == {"online/correction_rate": 0.5, "selector/auroc": 0.9}
    assert metrics.with_current_keys(current := {"online/correction_rate": 0.5}) == current


def write(workdir, start, events):
    writer = metrics.MetricsWriter(workdir, start=start, tensorboard=False, wandb="", config={})
    for step, value in events:
        writer.write(step, step / 3, {"train/loss": value})
    writer.close()
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_writer(tmp_path):
    events = write(tmp_path, -1, [(0, 1.5), (1, np.float32(0.25))])
    assert events == [{"step": 0, "epoch": 0, "train/loss": 1.5}, {"step": 1, "epoch": 0.3333, "train/loss": 0.25}]


@pytest.mark.parametrize("start, kept", [(-1, []), (0, [0]), (4, [0, 2, 4]), (9, [0, 2, 4, 6])])
def test_writer_removes_later_events(tmp_path, start, kept):
    write(tmp_path, -1, [(step, 0.0) for step in (0, 2, 4, 6)])
    events = write(tmp_path, start, [(10, 1.0)])
    assert [event["step"] for event in events] == [*kept, 10]


@pytest.mark.parametrize("incomplete", ['{"step": 2, "epo', '{"step": ', "{", "7", "[]", "{}", '{"epoch": 1}'])
def test_writer_removes_incomplete_lines(tmp_path, incomplete):
    write(tmp_path, -1, [(0, 0.0), (2, 0.0)])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(incomplete)
    assert [event["step"] for event in write(tmp_path, 4, [(6, 1.0)])] == [0, 2, 6]


def records(file):
    """The records of a TFRecord file: length, checksum, bytes, checksum."""
    content, offset = file.read_bytes(), 0
    while offset < len(content):
        (length,) = struct.unpack_from("<Q", content, offset)
        yield content[offset + 12 : offset + 12 + length]
        offset += 12 + length + 4


def test_writer_sends_the_same_scalars_to_tensorboard(tmp_path):
    """They are in the file before the writer is closed, because a process may end at any time."""
    from tensorboardX.proto import event_pb2

    writer = metrics.MetricsWriter(tmp_path, start=1, tensorboard=True, wandb="", config={})
    writer.write(3, 1.0, {"train/loss": 0.5, "train/rho": 0.25})
    (file,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    first, start, *events = (event_pb2.Event.FromString(record) for record in records(file))
    writer.close()
    assert first.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (2, event_pb2.SessionLog.START)  # hides later events of an earlier process
    scalars = [(value.tag, value.simple_value, event.step) for event in events for value in event.summary.value]
    assert scalars == [("train/loss", 0.5, 3), ("train/rho", 0.25, 3)]


def test_runs_of_one_name_have_ids_of_their_own_in_weights_and_biases(tmp_path):
    workdirs = [tmp_path / name / "mine" for name in ("first", "second")]
    for workdir in workdirs:
        workdir.mkdir(parents=True)
    ids = [metrics.wandb_id(workdir) for workdir in (*workdirs, *workdirs)]
    assert ids[:2] == ids[2:] and len(set(ids)) == 2

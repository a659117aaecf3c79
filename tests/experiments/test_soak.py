"""The soak in small: a run that is killed twice and has a checkpoint damaged ends as the one that was left alone."""

import json
import shutil

import numpy as np
import pytest

from bilevel_jax.runtime import checkpoint
from experiments.reliability import commands, kills, page, soak
from tests.experiments.commands import command_line


@pytest.mark.long
def test_killed_twice(neox, tmp_path, monkeypatch):
    """With a smaller model than that of the command, and shorter."""
    smaller = {"model.path": str(neox), "data.max_length": 128, "num_epochs": 1, "online.refresh_every": 3, "checkpoint.every": 2}
    smaller |= {"data.num_upper": 20, "data.num_lower": 70, "eval.num_upper": 4, "eval.num_lower": 4, "online.max_new_tokens": 8}
    monkeypatch.setattr(kills, "SMALL", kills.SMALL | smaller | {"log.tensorboard": False})
    monkeypatch.setattr(kills, "PHASES", {"train": (6, 0.2), "checkpoint": (3, 0.05)})
    results = kills.interrupt(tmp_path, num_kills=2, num_faults=1, rng=np.random.default_rng(0))
    assert results["mismatches"] == []
    assert sum(results["kills"].values()) == 2 and results["tries"] == results["runs"] + 2
    lines = page.lines("command", {"runs": results})
    assert "| runs killed | 2 |" in lines and "| mismatches with the uninterrupted run | 0 |" in lines


@pytest.mark.parametrize("kind", kills.KINDS)
def test_only_the_newest_of_two_whole_checkpoints_is_damaged(kind, tmp_path):
    for step in ("4", "12"):
        (tmp_path / step / "state").mkdir(parents=True)
        (tmp_path / step / "state" / "d").write_bytes(b"12345678")
        (tmp_path / step / checkpoint.METADATA).write_text(json.dumps({"custom_metadata": {"step": int(step)}}))
        checkpoint.write_manifest(tmp_path / step)
    rng = np.random.default_rng(0)
    assert kills.spoil(tmp_path, kind, rng) == "detected"
    assert checkpoint.damage(tmp_path / "12") and not checkpoint.damage(tmp_path / "4")
    assert kills.spoil(tmp_path, kind, rng) is None  # the older one is what is left
    assert not checkpoint.damage(tmp_path / "4")


def test_it_removes_only_its_own(tmp_path):
    (tmp_path / "soak").mkdir()
    (tmp_path / "soak" / "precious").touch()
    with command_line("experiments.soak", [f"--workdir={tmp_path / 'soak'}", "--kills=0"], soak.FLAGS):
        with pytest.raises(ValueError, match="holds something else"):
            soak.main()
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
    return kills.results(directory)


@pytest.mark.parametrize(
    "changes, differing",
    [
        ({"seconds": 4.0}, []),
        ({"loss": np.nextafter(1.5, 2)}, ["metrics.jsonl", "summary.json"]),
        ({"weight": b"v"}, ["weights/epoch_1.parquet"]),
    ],
)
def test_everything_but_times_is_compared_to_the_bit(tmp_path, changes, differing):
    assert kills.differing(fake(tmp_path / "one"), fake(tmp_path / "other", **changes)) == differing


class Stopped(Exception):
    """In the place of a signal."""


def test_it_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """After some kills, until the numbers are reached; not with the counts of another version."""
    left = [3]  # pieces until it is stopped

    def piece(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise Stopped
        return next(value for value in arguments if isinstance(value, int))

    def runs(directory, number, faults, rng):
        kills_now = piece(number)
        return {"runs": 1, "tries": 1, "kills": {"train": kills_now}, "faults": {}, "set_aside": 0, "mismatches": []}

    monkeypatch.setattr(kills, "interrupt", runs)
    monkeypatch.setattr(commands, "interrupt", lambda *rest: {"ended": 1, "kills": piece(*rest), "mismatches": []})
    flags = [f"--workdir={tmp_path / 'soak'}", f"--out={tmp_path / 'out'}", "--kills=200", "--pair_kills=0", "--long_steps=0"]

    def counted() -> list[int]:
        result = json.loads((tmp_path / "out.json").read_text())
        return [soak.killed(result.get(name)) for name in ("runs", *soak.SHARES)]

    with command_line("experiments.soak", flags, soak.FLAGS), pytest.raises(Stopped):
        soak.main()
    assert counted() == [120, 0, 0, 0]  # three pieces of 40
    left[0] = 100
    with command_line("experiments.soak", [*flags, "--resume"], soak.FLAGS):
        soak.main()
    assert counted() == [140, 20, 20, 20] and left[0] == 96
    assert "| runs ended | 4 |" in (tmp_path / "out.md").read_text()
    with command_line("experiments.soak", [*flags, "--resume"], soak.FLAGS):
        soak.main()
    assert left[0] == 96  # nothing is left to do
    result = json.loads((tmp_path / "out.json").read_text()) | {"version": "another"}
    (tmp_path / "out.json").write_text(json.dumps(result))
    with command_line("experiments.soak", [*flags, "--resume"], soak.FLAGS), pytest.raises(ValueError, match="another version"):
        soak.main()


@pytest.mark.long
@pytest.mark.parametrize("name", commands.COMMANDS)
def test_a_command_that_is_killed(name, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "reference")
    result = commands.interrupt(name, tmp_path, 2, np.random.default_rng(0))
    assert result == {"ended": 1, "kills": 2, "mismatches": []}

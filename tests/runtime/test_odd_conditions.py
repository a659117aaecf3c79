"""A clock that goes back, runs that race for a workdir, files that grow, rows of exactly the limit, arithmetic that overflows."""

import itertools
import json
import os
import pathlib
import shutil
import threading
import time

import numpy as np
import pytest
import safetensors.numpy

from bilevel_jax import errors, files
from bilevel_jax.data import levels, rows, templates
from bilevel_jax.runtime import clock, metrics, workdir
from tests.conftest import make_rows, read_jsonl, run_command, write_jsonl


def test_a_clock_that_goes_back(tmp_path, monkeypatch):
    """Seconds, events and the temporaries of dead processes do not depend on the time of day."""
    backwards = itertools.count(time.time(), -86_400)
    monkeypatch.setattr(time, "time", lambda: float(next(backwards)))
    timer = clock.Clock()
    writer = metrics.MetricsWriter(tmp_path, start=-1, tensorboard=True, wandb="", config={})
    for step in range(3):
        with timer("train"):
            writer.write(step, 0.0, {"train/loss": 1.0 - step})
    writer.close()
    assert timer.seconds["train"] >= 0
    assert [event["step"] for event in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    stale = tmp_path / f".a.json.0123456789abcdef{files.SUFFIX}"
    stale.touch()
    os.utime(stale, (2**32, 2**32))  # of the year 2106
    files.write_atomically(tmp_path / "a.json", "{}")
    assert not stale.exists()


def test_runs_that_race_for_a_workdir(tmp_path):
    """Of eight that start at once, one has it; the others say who. Fifty times."""
    barrier, inside, refused = threading.Barrier(8), [], []

    def race():
        for _ in range(50):
            barrier.wait()
            try:
                with workdir.locked(tmp_path):
                    inside.append(threading.get_ident())
                    assert len(inside) == 1
                    barrier.wait()  # all others have tried
                    inside.clear()
            except errors.RunError as error:
                refused.append(str(error))
                barrier.wait()

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert len(refused) == 50 * 7 and all(f"{tmp_path} is in use by process" in line for line in refused)


def test_a_file_that_another_process_writes(tmp_path):
    """Its last line is half a row, which is named; the rows before it are not used without a word."""
    source = write_jsonl(tmp_path / "rows.jsonl", make_rows(20, 0))
    content = source.read_bytes()
    source.write_bytes(content[:-30])
    _, report = rows.read_rows(source)
    assert any("rows.jsonl:20" in line for line in report.summary()), report.summary()


@pytest.mark.parametrize("method", ["offline", "online"])
def test_rows_of_exactly_the_limit(make_config, neox, tmp_path, capsys, method):
    """Of `data.max_length` tokens, they are used as they are; of one more, the response is cut, and counted."""
    tokenizer = templates.load_tokenizer(str(neox))
    source = write_jsonl(tmp_path / "rows.jsonl", make_rows(30, 3))
    read, _ = rows.read_rows(source)
    encoded = templates.encode(read, tokenizer, template="human", learn="all")
    whole = {row.id: example for row, example in zip(read, encoded)}
    limit = sorted(example.size for example in encoded)[15]
    changes = {"method": method, "data.lower": str(source), "data.max_length": limit, "eval.num_lower": 0, "data.template": "human"}
    level = levels.load_level(make_config(changes), "lower", tokenizer)
    num_cut = 0
    for row, example in zip(level.rows, level.examples):
        num_cut += whole[row.id].size > limit
        assert example.size == min(limit, whole[row.id].size)
        np.testing.assert_array_equal(example.response, whole[row.id].response[: len(example.response)])
    assert 0 < num_cut < 15 and max(example.size for example in level.examples) == limit
    assert f"{num_cut}: response cut to {limit} tokens" in capsys.readouterr().out


def test_arithmetic_that_overflows_in_half_precision(neox, tmp_path):
    """Weights that are numbers in bfloat16, with products that are not: no loss is made up, and the file is JSON."""
    model = pathlib.Path(shutil.copytree(neox, tmp_path / "model"))
    file = model / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = next(name for name in sorted(tensors) if "embed_out" in name or "lm_head" in name)
    tensors[name] = np.sign(tensors[name]) * np.float32(3e38)
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    source, out = write_jsonl(tmp_path / "rows.jsonl", make_rows(3, 0)), tmp_path / "scores.jsonl"
    arguments = [f"--model={model}", f"--data={source}", f"--out={out}", "--dtype=bfloat16"]
    with pytest.raises((errors.RunError, ValueError), match="not finite"):
        run_command("score", arguments)
    assert not out.exists() or all(json.loads(line, parse_constant=pytest.fail) for line in out.read_text().splitlines())

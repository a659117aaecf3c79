"""Two real processes that prepare the same rows at the same time."""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.conftest import make_rows, write_jsonl

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.long
def test_both_end_with_the_same_rows(neox, tmp_path):
    """One prepares them and the other waits; the entry is that of a process that was alone."""
    source = write_jsonl(tmp_path / "rows.jsonl", make_rows(20_000, 0))
    settings = [f"--config.data.{level}={source}" for level in ("upper", "lower")]
    settings += [f"--config.model.path={neox}", "--config.data.max_length=96"]

    def start(cache: str) -> subprocess.Popen:
        command = [
            sys.executable,
            "-m",
            "bilevel_jax.prepare",
            "--config=finetune",
            *settings,
            f"--config.data.cache={tmp_path / cache}",
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, **pipes)

    both = [start("both") for _ in range(2)]
    printed = [process.communicate(timeout=500)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert all("Traceback" not in text and f"rows in {tmp_path / 'both'}" in text for text in printed)
    alone = start("alone")
    alone.communicate(timeout=500)

    def contents(cache: str) -> dict:
        files = [file for pattern in ("*.arrow", "*.json") for file in (tmp_path / cache).rglob(pattern)]
        return {file.relative_to(tmp_path / cache): file.read_bytes() for file in files}

    assert contents("both") == contents("alone") and contents("both")
    assert not list((tmp_path / "both").rglob("*.tmp"))

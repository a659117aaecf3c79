"""The command that prepares rows ahead of a run."""

import pytest

from bilevel_jax.data.prepared import preparation, workers
from bilevel_jax.data.rejections import DataError
from bilevel_jax.prepare import __main__ as command
from tests.conftest import make_rows, write_jsonl


@pytest.fixture
def prepare(make_config, tmp_path, monkeypatch, capsys):
    """`f(changes)` -> what the command prints for a lower level of 30 rows."""
    monkeypatch.setattr(preparation, "CHUNK_ROWS", 10)
    monkeypatch.setattr(preparation, "num_processes", lambda: 1)
    lower = str(write_jsonl(tmp_path / "lower.jsonl", make_rows(30, 5)))

    def run(changes):
        config = make_config({"data.lower": lower, **changes})
        monkeypatch.setattr(command, "CONFIG", type("Flag", (), {"value": config}))
        command.main()
        return capsys.readouterr().out

    return run


def test_rows_are_prepared_once_and_checked(prepare, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    printed = prepare({"data.cache": str(folder)})
    assert "data.upper: 13 rows in " in printed and f"data.lower: 30 rows in {folder}/" in printed
    with monkeypatch.context() as again:
        again.setattr(workers, "run", lambda *_: pytest.fail("prepared again"))
        assert "data.lower: 30 rows in " in prepare({"data.cache": str(folder)})
    (shard,) = [file for file in folder.glob("*/000002.arrow")]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match="000002.arrow: it is damaged"):
        prepare({"data.cache": str(folder)})
    assert "data.lower: 30 rows in " in prepare({"data.cache": str(folder)})


def test_small_sources_and_no_cache(prepare):
    assert "data.lower: not stored; a run reads it at its start" in prepare({"data.cache": "auto"})
    with pytest.raises(ValueError, match="data.cache=off stores nothing"):
        prepare({"data.cache": "off"})

"""What a run says while it works."""

import io
import sys
import time

import jax
import pytest
import tqdm

from bilevel_jax.runtime import phases


def test_a_long_phase_is_not_silent(monkeypatch, capsys):
    """Its name at once, then the seconds so far; nothing after its end."""
    monkeypatch.setattr(phases, "EVERY", 0.1)
    with phases.phase("compiling"):
        assert capsys.readouterr().out == "compiling\n"
        time.sleep(0.35)
    lines = capsys.readouterr().out.splitlines()
    assert 2 <= len(lines) <= 4 and set(lines) == {"compiling: 0 s so far"}
    time.sleep(0.2)
    assert not capsys.readouterr().out


def test_a_failure_ends_the_phase(monkeypatch, capsys):
    monkeypatch.setattr(phases, "EVERY", 0.05)
    with pytest.raises(ValueError, match="^no rows$"):
        with phases.phase("loading rows"):
            raise ValueError("no rows")
    time.sleep(0.15)
    assert capsys.readouterr().out == "loading rows\n"


def test_only_the_first_process_speaks(monkeypatch, capsys):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    phases.announce("compiling")
    assert capsys.readouterr().out == ""


def test_lines_reach_a_log_at_once(monkeypatch):
    """A pipe is buffered, and a progress bar stays whole."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, write_through=False))
    with tqdm.tqdm(total=3, file=io.StringIO()):
        phases.announce("compiling")
        assert raw.getvalue() == b"compiling\n"

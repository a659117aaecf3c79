"""Progress bars: on a terminal, and only of loops that take long."""

import io
import sys

import pytest

from bilevel_jax import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("seconds", [0, 3])
@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_bar(monkeypatch, kind, seconds):
    stream = kind()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        bar = progress.bar(["a", "b", "c"], desc="reading", unit="row")
        if not bar.disable:  # as if it had begun some seconds ago
            bar.start_t, bar.last_print_t = bar.start_t - seconds, bar.last_print_t - seconds
        assert list(bar) == ["a", "b", "c"]
    printed = stream.getvalue()
    assert ("reading:  33%" in printed and "1/3 [00:03<" in printed) == (kind is Terminal and seconds > 2)
    assert not printed.rsplit("\r", 2)[-2:][0].strip()  # removed

"""What comes from data is printed escaped, and cannot forge a line."""

import json
import sys

import jax
import pytest

from bilevel_jax import cli, errors, text
from bilevel_jax.data import rejections, rows
from bilevel_jax.runtime import phases
from tests.conftest import make_rows, run_command, write_jsonl

FORGED = "x\nerror: all fine\x1b[2J\x1b]0;title\x07\u202e"
ROLE = {"messages": [{"role": FORGED, "content": "a"}, {"role": "assistant", "content": "b"}]}


def is_harmless(printed: str) -> bool:
    return not any(c in printed for c in "\x1b\x07\u202e") and "\nerror: all fine" not in printed


def test_reasons_of_a_report(tmp_path):
    """A reason may quote a row; of 3000 different ones 20 are shown, and the others are counted."""
    odd = [{"messages": [{"role": f"{FORGED} {i}", "content": "a"}]} for i in range(3000)]
    file = write_jsonl(tmp_path / "rows.jsonl", [*make_rows(1, 0), *odd])
    _, report = rows.read_rows(str(file))
    lines = report.summary()
    assert len(lines) == 1 + 20 + 1 and lines[-1] == "  left out 2980: 2980 other reasons"
    assert all(is_harmless(line) and "\n" not in line and len(line) < 400 for line in lines)
    assert r"\x1b[2J" in lines[1] and f"(first: {file}:2)" in lines[1]


def test_an_error_is_one_line(capsys, tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", [ROLE])

    def read():
        rows.read_rows(str(file))

    with pytest.raises(SystemExit):
        cli.call(read)
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and printed.startswith(f"error: {file}:1: ") and is_harmless(printed)


@pytest.mark.parametrize("kind", [rejections.DataError, errors.RunError])
def test_a_line_feed_in_an_error_of_ours_is_data(capsys, kind):
    def fail():
        raise kind(f"{FORGED} is odd")

    with pytest.raises(SystemExit):
        cli.call(fail)
    assert capsys.readouterr().err == "error: x\\nerror: all fine\\x1b[2J\\x1b]0;title\\x07\\u202e is odd\n"


def test_the_last_line_of_other_errors_counts(capsys):
    def fail():
        raise ValueError("Traceback of a library\n\nthe cause\x1b[2J\n")

    with pytest.raises(SystemExit):
        cli.call(fail)
    assert capsys.readouterr().err == "error: the cause\\x1b[2J\n"


def test_a_library_that_fails_in_rust(capsys):
    """Its error is no `Exception`."""

    def fail():
        raise type("PanicException", (BaseException,), {})("called `unwrap()`\nnote: set RUST_BACKTRACE=1")

    with pytest.raises(SystemExit):
        cli.call(fail)
    assert capsys.readouterr().err == "error: a library failed on its input: called `unwrap()`\n"


def test_a_file_that_is_not_there(capsys, tmp_path):
    with pytest.raises(SystemExit):
        cli.call(lambda: (tmp_path / "nowhere").read_text())
    assert capsys.readouterr().err == f"error: {tmp_path / 'nowhere'}: No such file or directory\n"


def test_a_lack_of_memory(capsys):
    """Whatever JAX says of it in many lines."""

    def fail():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 6 bytes.\nAllocations: ...")

    with pytest.raises(SystemExit):
        cli.call(fail)
    expected = "error: out of memory (RESOURCE_EXHAUSTED: Out of memory allocating 6 bytes.); lower batch.micro_size, "
    assert capsys.readouterr().err.startswith(expected)


def test_names_of_columns(neox, tmp_path):
    """Such as those that an error or a note lists."""
    file = write_jsonl(tmp_path / "rows.jsonl", [{FORGED: "a"}])
    with pytest.raises(ValueError) as caught:
        run_command("score", [f"--model={neox}", f"--data={file}", f"--out={tmp_path / 'out.jsonl'}"])
    assert is_harmless(str(caught.value))


def test_output(capsys):
    text.say(FORGED)
    phases.announce(FORGED)
    assert "\x1b" not in capsys.readouterr().out


def test_only_the_first_process_of_a_run_prints(monkeypatch, capsys):
    """Errors and warnings of all processes are printed."""
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    for number in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda number=number: number)
        text.say(f"rows {number}")
        phases.announce(f"loading {number}")
        text.say(f"error {number}", file=sys.stderr)
    printed = capsys.readouterr()
    assert printed.out == "rows 0\nloading 0\n" and printed.err == "error 0\nerror 1\n"


def test_outputs_keep_what_the_data_say(tmp_path):
    """Only what is printed is escaped."""
    file = write_jsonl(tmp_path / "rows.jsonl", [{"question": FORGED, "response": "a"}])
    (row,), _ = rows.read_rows(str(file))
    assert row.question == FORGED and json.loads(file.read_text())["question"] == FORGED

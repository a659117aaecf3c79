"""The command against a real server: win rates by hand, the requests, the key, and signals."""

import contextlib
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
import types

import pandas
import pytest
from absl import flags

from bilevel_jax.data import rows
from tests.conftest import read_jsonl, run_command, write_jsonl
from tests.judge.test_endpoint import KEY, completion, serve

OBJECTS = [  # with the answer of the model
    ({"question": "Zero?", "response": "of two", "source": "alpaca_eval/vicuna"}, "a long answer"),  # the longer one
    ({"question": "One?", "response": "quite a long response"}, "short"),  # the shorter one
    ({"question": "Two?", "response": "identical"}, "identical\n"),  # the same
    ({"question": "Three?", "response": "of one length"}, "of one size ."),  # as long
    ({"question": "Four?", "response": "x", "source": "alpaca_eval/koala"}, "Grüße ☃"),  # longer
]
PROMPTS = [row for row, _ in OBJECTS]
ANSWERS = [text for _, text in OBJECTS]
TAGGED = re.compile(r"<(question|answer-A|answer-B)-(\w+)>\n(.*?)\n</\1-\2>", re.S)


def texts(body) -> tuple[str, str, str]:
    """Question, answer A and answer B of a request."""
    return tuple(text for _, _, text in TAGGED.findall(body["messages"][0]["content"]))


def longer(number, body):
    """Prefers the longer answer, and explains itself."""
    _, first, second = texts(body)
    verdict = "tie" if len(first) == len(second) else "AB"[len(second) > len(first)]
    return completion(f"A and B compared.\n\n**{verdict}**", (100, 3))


def write(directory, objects=PROMPTS, answers=ANSWERS):
    """The files of prompts and answers as flags."""
    prompts = write_jsonl(directory / "prompts.jsonl", objects)
    lines = [{"id": row.id, "sample": 0, "text": text, "tokens": []} for row, text in zip(rows.iter_rows(prompts), answers)]
    return [f"--prompts={prompts}", f"--answers={write_jsonl(directory / 'answers.jsonl', lines)}"]


@pytest.fixture
def files(tmp_path):
    return write(tmp_path)


ENVIRONMENT = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()} | {"OPENAI_API_KEY": KEY}


def command(*arguments):
    return [sys.executable, "-m", "bilevel_jax.judge", *map(str, arguments)]


def run_process(*arguments, **environment):
    """The command in a process."""
    options = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL, "timeout": 60}
    return subprocess.run(command(*arguments), env=ENVIRONMENT | environment, **options)


def run(*arguments, **environment):
    """The command in this process, without a terminal: its output. It raises the errors of the command."""
    with pytest.MonkeyPatch.context() as patch, open(os.devnull) as no_input:
        patch.setattr(os, "environ", ENVIRONMENT | environment)
        patch.setattr(sys, "stdin", no_input)
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            stdout = run_command("judge", map(str, arguments))
    return types.SimpleNamespace(stdout=stdout, stderr=stderr.getvalue())


def judged(server, directory, *arguments):
    """The flags of a comparison."""
    out = f"--out={directory / 'verdicts.jsonl'}"
    return [f"--endpoint={server.endpoint}", "--judge=judge-1", out, "--backoff=0.01", *arguments]


def shown(done) -> dict[str, str]:
    """The printed table: name -> value."""
    return dict(re.split(r" {2,}", line.strip(), maxsplit=1) for line in done.stdout.splitlines() if re.match(r"  \S.* {2,}", line))


# --------------------------------------------------------------------------------------------------------------------
# Win rates
# --------------------------------------------------------------------------------------------------------------------


def test_a_comparison_and_its_repetition(files, tmp_path):
    with serve(longer) as server:
        summary = tmp_path / "summary.json"
        arguments = [*files, *judged(server, tmp_path, "--yes", "--price_in=2", "--price_out=10", f"--summary={summary}")]
        done = run(*arguments)
        asked = list(server.requests)
        again = run(*arguments)
        assert len(server.requests) == len(asked)

    # Won, lost, the same, a tie, won: scores 1, 0, ½, ½, 1, of standard deviation √(0.7 / 4).
    result = shown(done)
    assert result["win rate (win 1, tie ½, loss 0)"] == "0.6000 ± 0.1871"
    assert result["pairs won, tied, lost"] == "2, 2, 1"
    assert result["pairs with both verdicts"] == "5 of 5"
    assert result["pairs whose two orders disagree"] == "0.0%"
    assert result["verdicts for the answer that is first"] == "50.0%"
    assert result["pairs won by the longer answer"] == "100.0%"
    assert result["mean length, characters"] == "9 against 10"  # 13 + 5 + 9 + 13 + 7 and 6 + 21 + 9 + 13 + 1
    # 8 x 100 and 8 x 3 tokens: 800 x 2 + 24 x 10 millionths
    assert result["tokens in and out, says the endpoint"] == "800, 24; cost 0.00184 at 2 and 10 a million"
    written = json.loads(summary.read_text())
    assert written["win_rate"] == pytest.approx(0.6) and [written[key] for key in ("wins", "ties", "losses")] == [2, 2, 1]
    assert shown(again) == result and "8 verdicts, 8 of them in" in again.stdout

    # What was asked: all but the pair of the same answers, in both orders, once.
    expected = [(row["question"], row["response"], text) for row, text in OBJECTS if row["question"] != "Two?"]
    expected = {(question, *pair) for question, other, own in expected for pair in ((own, other), (other, own))}
    assert {texts(body) for _, _, body, _ in asked} == expected and len(asked) == 8
    for path, headers, body, _ in asked:
        assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge-1", 0, 256)

    # What was told before: 4 characters a token, 256 tokens a reply.
    characters = sum(len(body["messages"][0]["content"]) for _, _, body, _ in asked)
    assert f"about {characters // 4} tokens in (4 characters each), at most {8 * 256} out" in done.stdout
    assert f"cost {(characters // 4 * 2 + 2048 * 10) / 1e6:.4g} at 2 and 10 a million" in done.stdout

    verdicts = read_jsonl(tmp_path / "verdicts.jsonl")
    assert [list(verdict) for verdict in verdicts] == [["request", "id", "first", "judge", "winner", "reply", "tokens"]] * 8
    names = {row.id: row.question for row in rows.iter_rows(tmp_path / "prompts.jsonl")}
    winners = {(names[verdict["id"]], verdict["first"]): verdict["winner"] for verdict in verdicts}
    by_hand = {"Zero?": "answers", "One?": "against", "Three?": "tie", "Four?": "answers"}
    assert winners == {(name, first): winner for name, winner in by_hand.items() for first in ("answers", "against")}

    for content in (done.stdout, done.stderr, again.stdout, again.stderr, *(file.read_text() for file in tmp_path.iterdir())):
        assert KEY not in content


def test_a_judge_that_always_prefers_the_first_answer(files, tmp_path):
    with serve(lambda *_: completion("A")) as server:
        result = shown(run(*files, *judged(server, tmp_path, "--yes")))
    assert result["win rate (win 1, tie ½, loss 0)"] == "0.5000 ± 0.0000"
    assert result["pairs whose two orders disagree"] == "80.0%"  # all but that of the same answers
    assert result["verdicts for the answer that is first"] == "100.0%"


def test_replies_that_cannot_be_read(files, tmp_path):
    """About question One never; about Zero when asked again; and a second call does not ask again."""

    def answer(number, body):
        question, *_ = texts(body)
        if question == "One?" or (question == "Zero?" and len(body["messages"]) == 1):
            return completion("Both have their merits.")
        return completion("Verdict: B") if question == "Zero?" else longer(number, body)

    with serve(answer) as server:
        arguments = [*files, *judged(server, tmp_path, "--yes")]
        result = shown(run(*arguments))
        assert len(server.requests) == 8 + 4
        assert shown(run(*arguments)) == result and len(server.requests) == 12
    # Zero ½ (the second wins in both orders), Two ½, Three ½, Four 1
    assert result["win rate (win 1, tie ½, loss 0)"] == "0.6250 ± 0.1250"
    assert result["pairs with both verdicts"] == "4 of 5" and result["verdicts that could not be read"] == "2"


def test_against_other_answers(files, tmp_path):
    others = [{"id": row.id, "sample": 0, "text": "the other model's answer"} for row in rows.iter_rows(tmp_path / "prompts.jsonl")]
    against = write_jsonl(tmp_path / "others.jsonl", others)
    with serve(longer) as server:
        result = shown(run(*files, f"--against={against}", *judged(server, tmp_path, "--yes")))
    assert result["win rate (win 1, tie ½, loss 0)"] == "0.0000 ± 0.0000"
    assert len(server.requests) == 10
    assert all("the other model's answer" in texts(body)[1:] for _, _, body, _ in server.requests)


def test_a_limit_selects_a_subset(files, tmp_path):
    asked = []
    for limit in (2, 3):
        with serve(longer) as server:
            directory = tmp_path / str(limit)
            directory.mkdir()
            result = shown(run(*files, f"--limit={limit}", *judged(server, directory, "--yes")))
        assert result["pairs with both verdicts"] == f"{limit} of {limit}"
        asked.append({texts(body) for _, _, body, _ in server.requests})
    assert asked[0] < asked[1] or asked[0] == asked[1]  # equal where the third is the pair of the same answers


# --------------------------------------------------------------------------------------------------------------------
# Trouble
# --------------------------------------------------------------------------------------------------------------------


def test_transient_errors_do_not_change_the_result(files, tmp_path):
    def answer(number, body):
        troubles = [(429, {"Retry-After": "0"}, "{}"), (500, {}, ""), None, (200, {}, "{"), (503, {}, "busy")]
        return troubles[number % 5] if number < 10 else longer(number, body)

    with serve(answer) as server:
        result = shown(run(*files, *judged(server, tmp_path, "--yes", "--concurrency=3")))
        assert len(server.requests) == 18
    assert result["win rate (win 1, tie ½, loss 0)"] == "0.6000 ± 0.1871"


def test_an_error_ends_it_in_one_line(files, tmp_path):
    def answer(number, body):
        return longer(number, body) if number < 3 else (401, {}, json.dumps({"error": {"message": f"Incorrect key {KEY}."}}))

    with serve(answer) as server:
        done = run_process(*files, *judged(server, tmp_path, "--yes", "--concurrency=1"), BILEVEL_JAX_TRACEBACK="")
        assert done.returncode == 1 and len(server.requests) == 4
        assert done.stderr.splitlines()[-1] == f"error: {server.endpoint}/chat/completions: HTTP 401: Incorrect key [key]."
        traced = run_process(*files, *judged(server, tmp_path, "--yes", "--concurrency=1"), BILEVEL_JAX_TRACEBACK="1")
    assert "Traceback" in traced.stderr
    assert KEY not in done.stdout + done.stderr + traced.stdout + traced.stderr
    assert len(read_jsonl(tmp_path / "verdicts.jsonl")) == 3


MANY = [{"question": f"{number}?", "response": "r" * 20} for number in range(40)]


def wait_for(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.02)
    raise TimeoutError


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_signals_and_resuming(tmp_path, number):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and hands that on
    files, out = write(tmp_path, MANY, ["a" * size for size in range(40)]), tmp_path / "verdicts.jsonl"
    hold, replied = threading.Event(), []

    def answer(count, body):
        if count >= 20 and not hold.is_set():
            hold.wait(2.0)
        replied.append(texts(body))
        return longer(count, body)

    with serve(answer) as server:
        arguments = [*files, *judged(server, tmp_path, "--yes", "--concurrency=4")]
        pipes = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command(*arguments), env=ENVIRONMENT, text=True, **pipes)
        wait_for(lambda: len(server.requests) > 20)
        process.send_signal(number)
        error = process.communicate(timeout=120)[1]
        # SIGKILL and SIGTERM end it at once, SIGINT when the verdicts under way are there: none that was paid for is lost.
        assert process.returncode == (130 if number == signal.SIGINT else -number) and KEY not in error
        time.sleep(0.2)  # a last request may still be on its way
        asked, before = len(server.requests), out.read_bytes()
        kept = read_jsonl(out)
        assert 21 - 4 <= len(kept) < 80
        if number == signal.SIGINT:
            assert len(kept) == asked and "waiting for running requests" in error
        hold.set()
        wait_for(lambda: len(replied) == asked)

        out.write_bytes(before + b'{"request": "00ff", "id"')  # as if it had been writing
        result = shown(run(*arguments))
        done = read_jsonl(out)
    assert out.read_bytes().startswith(before) and len(done) == 80
    names = {row.id: row.question for row in rows.iter_rows(tmp_path / "prompts.jsonl")}
    later = {(texts(body)[0], texts(body)[1].startswith("r")) for _, _, body, _ in server.requests[asked:]}
    earlier = {(names[verdict["id"]], verdict["first"] == "against") for verdict in kept}
    assert len(later) == len(server.requests) - asked == 80 - len(kept) and not later & earlier
    # Lengths 0 to 39 against 20: 19 wins, 1 tie, 20 losses.
    assert result["pairs won, tied, lost"] == "19, 1, 20" and result["win rate (win 1, tie ½, loss 0)"].startswith("0.4875")


# --------------------------------------------------------------------------------------------------------------------
# Agreement and complaints
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("message, requests", [("y\n", 8), ("n\n", 0), ("\n", 0), ("\x04", 0)])  # \x04 ends a terminal's input
def test_confirmation(files, tmp_path, message, requests):
    main, side = pty.openpty()
    with serve(longer) as server:
        arguments = command(*files, *judged(server, tmp_path))
        process = subprocess.Popen(arguments, env=ENVIRONMENT, stdin=side, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        os.write(main, message.encode())
        told, error = process.communicate(timeout=120)
    os.close(main)
    os.close(side)
    assert process.returncode == 0, error
    assert b"8 requests to judge-1" in told and b"go on? [y/N]" in told and len(server.requests) == requests
    assert (tmp_path / "verdicts.jsonl").exists() == bool(requests)


def test_refusals(files, tmp_path):
    (tmp_path / "other").mkdir()
    other = write(tmp_path / "other", [{"question": "Else?", "response": "x"}], ["y"])
    asked = write_jsonl(tmp_path / "asked.jsonl", [{"question": "Else?"}])
    unanswered = [f"--prompts={asked}", f"--answers={tmp_path / 'of_asked.jsonl'}"]
    write_jsonl(tmp_path / "of_asked.jsonl", [{"id": row.id, "text": ""} for row in rows.iter_rows(asked, questions_only=True)])
    with serve(longer) as server:
        comparison = judged(server, tmp_path, "--yes")
        cases = [
            ([*files], "give --outputs"),
            ([*files, *comparison[1:]], "--endpoint, --judge and --out belong together"),
            ([*files, f"--outputs={tmp_path}/o.json", "--limit=1"], "--limit goes with --endpoint"),
            ([*files, f"--outputs={tmp_path}/o.json", "--options=x"], "--options goes with --endpoint"),
            ([*files, *comparison, "--generator=x"], "--generator goes with --outputs"),
            ([*files, *comparison[:3]], "give --yes"),
            ([files[0], other[1], *comparison], "no answer to 5 of 5 prompts"),
            ([*unanswered, *comparison], "has no responses to compare with; give --against"),
            ([*files, *comparison, "--options={"], "--options is not JSON"),
            ([*files, *comparison, '--options={"temperature": NaN}'], "--options is not JSON (NaN is no number of JSON)"),
            ([*files, *comparison, '--options={"stream": true}'], "--options must be an object without"),
            ([*files, *comparison, f"--out={tmp_path / 'answers.jsonl'}"], "answers.jsonl:1: not a verdict"),
            ([*files, *comparison, f"--summary={tmp_path / 'answers.jsonl'}"], "answers.jsonl, which would be overwritten"),
            ([*files, *comparison, f"--summary={comparison[2].partition('=')[2]}"], "--out and --summary are the same file"),
            ([*files, *comparison, f"--outputs={comparison[2].partition('=')[2]}"], "--out and --outputs are the same file"),
            ([*files, *comparison, "--options=" + "[" * 100_000], "--options is not JSON"),
            ([*files, *comparison, '--options={"seed": 1e999}'], "--options is not JSON"),
            ([*files, f"--outputs={files[0].partition('=')[2]}"], "which would be overwritten"),
            ([*files, *comparison, "--endpoint=http://judge.example/v1"], "to judge.example unencrypted"),
            ([*files, *comparison, "--price_in=-1"], "price_in"),
            ([*files, *comparison, "--timeout=nan"], "--timeout=nan must be a finite number"),
        ]
        before = (tmp_path / "answers.jsonl").read_bytes()
        for arguments, complaint in cases:
            with pytest.raises((ValueError, OSError, flags.Error)) as error:
                run(*arguments)
            last = str(error.value).splitlines()[-1]
            assert complaint in last and KEY not in str(error.value)
        assert not server.requests and (tmp_path / "answers.jsonl").read_bytes() == before


def test_another_key_or_none(files, tmp_path):
    with serve(longer) as server:
        run(*files, *judged(server, tmp_path, "--yes", "--limit=1", "--key_variable=MINE"), MINE=" mine\n")
        assert {headers["Authorization"] for _, headers, _, _ in server.requests} == {"Bearer mine"}
        (tmp_path / "verdicts.jsonl").unlink()
        count = len(server.requests)
        done = run(*files, *judged(server, tmp_path, "--yes", "--limit=1", "--key_variable="))
        assert "without a key" in done.stdout and len(server.requests) == 2 * count > 0
        assert not any("Authorization" in headers for _, headers, _, _ in server.requests[count:])


# --------------------------------------------------------------------------------------------------------------------
# AlpacaEval
# --------------------------------------------------------------------------------------------------------------------


def test_alpaca_eval_file(files, tmp_path):
    """By hand, and read and joined with a reference as alpaca_eval does: `pandas.read_json`, then a merge on `instruction`."""
    out = tmp_path / "model_outputs.json"
    done = run(*files, f"--outputs={out}")
    assert "5 answers of answers, 0 of them empty" in done.stdout
    dataset = [{"dataset": "vicuna"}, {}, {}, {}, {"dataset": "koala"}]
    texts = [{"instruction": row["question"], "output": text.strip(), "generator": "answers"} for row, text in OBJECTS]
    assert json.loads(out.read_text()) == [text | name for text, name in zip(texts, dataset)]

    run(*files, f"--outputs={out}", "--generator=mine")
    mine = pandas.read_json(out)
    reference = pandas.DataFrame([{"instruction": row["question"], "output": row["response"]} for row in PROMPTS])
    both = pandas.merge(reference, mine[["instruction", "output"]], on=["instruction"], suffixes=("_1", "_2"))
    assert list(both["output_1"]) == [row["response"] for row in PROMPTS]
    assert list(both["output_2"]) == [text.strip() for text in ANSWERS]
    assert list(mine["generator"].unique()) == ["mine"]

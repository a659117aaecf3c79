"""Scores against float64 log-softmax of the logits of each row alone."""

import gzip
import json
import subprocess
import sys

import numpy as np
import pytest
from absl import flags

from bilevel_jax import scoring
from bilevel_jax.data import rows
from bilevel_jax.score import scorer
from tests.conftest import load, make_rows, read_jsonl, run_command, token_log_probs, write_jsonl

SCHEMAS = [
    {"question": "Where?", "response": "Über ☃ here"},
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"prompt": "Once", "completion": " upon a time"},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    {"question": "Long? " + "yes " * 8, "response": "no " * 6},
]
OBJECTS = make_rows(7, seed=4) + SCHEMAS
NONE = "none", False
HUMAN = "human", True


@pytest.fixture(autouse=True, scope="module")
def shared_scorers():
    """Calls with equal settings share their compiled programs."""
    make_scorer, scorers = scoring.make_scorer, {}

    def cached(*settings):
        key = *settings, scoring.SHORT, scoring.ENTRIES
        return scorers.setdefault(key, make_scorer(*settings))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "make_scorer", cached)
        yield


@pytest.fixture(scope="module")
def adapters(neox, llama, make_adapter, tmp_path_factory):
    """Model directory -> adapter directory."""
    root = tmp_path_factory.mktemp("adapters")
    return {directory: make_adapter(directory, root / directory.name) for directory in (neox, llama)}


def question_and_response(row) -> tuple[str, str]:
    """Question and response of a row above, by hand."""
    if "messages" in row:
        return row["messages"][0]["content"], row["messages"][1]["content"]
    if "instruction" in row:
        return f"{row['instruction']}\n{row['input']}", row["output"]
    return row.get("question") or row["prompt"], row.get("response") or row["completion"]


def check(results, loaded, objects, template, eos):
    assert len(results) == len(objects)
    for result, row in zip(results, objects):
        expected = token_log_probs(loaded, *question_and_response(row), template=template, eos=eos)
        assert result["num_tokens"] == len(expected)
        assert result["logprob"] == pytest.approx(sum(expected), rel=1e-5)
        assert result["loss"] == pytest.approx(-np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("template, eos", [NONE, HUMAN])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("architecture", ["neox", "llama"])
def test_values(architecture, adapted, template, eos, adapters, request):
    directory = request.getfixturevalue(architecture)
    loaded = load(directory, adapters[directory] if adapted else None)
    items = list(rows.parse(enumerate(OBJECTS, 1)))
    results = scorer.score_rows(items, *loaded, template=template, eos=eos, batch_size=4)
    check(results, loaded, OBJECTS, template, eos)
    assert [result["id"] for result in results] == [item.id for item in items]


def test_an_adapter_and_the_eos_change_the_result(neox, adapters):
    items = list(rows.parse(enumerate(OBJECTS, 1)))
    results = {
        (adapted, eos): scorer.score_rows(
            items, *load(neox, adapters[neox] if adapted else None), template="none", eos=eos, batch_size=4
        )
        for adapted in (False, True)
        for eos in (False, True)
    }
    for i in range(len(items)):
        assert len({round(scores[i]["logprob"], 3) for scores in results.values()}) == 4
        assert results[False, True][i]["num_tokens"] == results[False, False][i]["num_tokens"] + 1


def test_all_answers_of_a_conversation(llama):
    """Each is scored after what is before it. Only the last one ends with EOS, since this template has no end of a turn."""
    turns = [("user", "Hi"), ("assistant", "Ho, who is there?"), ("user", "You?"), ("assistant", "No")]
    items = list(rows.parse([(1, {"messages": [{"role": role, "content": content} for role, content in turns]})]))
    loaded = load(llama)
    first = token_log_probs(loaded, "Hi\n\n", "Ho, who is there?", template="none", eos=False)
    last = token_log_probs(loaded, "Hi\n\nHo, who is there?\n\nYou?", "No", template="none")
    for learn, expected in (("all", first + last), ("last", last)):
        (result,) = scorer.score_rows(items, *loaded, template="none", eos=True, batch_size=4, learn=learn)
        assert result["num_tokens"] == len(expected)
        assert result["loss"] == pytest.approx(-np.mean(expected), rel=1e-5)
        assert result["logprob"] == pytest.approx(np.sum(expected), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("short, entries", [(512, 256), (8, 5)])  # one shape for all, or one for every power of two
@pytest.mark.slow
def test_batches_do_not_change_results(monkeypatch, neox, batch_size, short, entries):
    monkeypatch.setattr(scoring, "SHORT", short)
    monkeypatch.setattr(scoring, "ENTRIES", entries)
    loaded = load(neox)
    items = list(rows.parse(enumerate(OBJECTS, 1)))
    results = scorer.score_rows(items, *loaded, template="none", eos=True, batch_size=batch_size)
    check(results, loaded, OBJECTS, "none", True)


@pytest.mark.parametrize("of_length", [False, True])
def test_rows_are_scored_some_at_a_time(monkeypatch, neox, tmp_path, of_length):
    """The results are those of all at once; a model whose rope depends on the longest row knows it from the start."""
    lines = [*map(json.dumps, OBJECTS[:3]), "{", json.dumps(OBJECTS[0]), *map(json.dumps, OBJECTS[3:]), "[]"]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(lines))
    expected = scorer.score(str(file), str(neox))
    longest = []
    monkeypatch.setattr(scorer.layer_settings, "for_length", lambda model, length: longest.append(length) or model)
    if of_length:
        monkeypatch.setattr(scorer.rotary, "LongRope", type(load(neox)[0].rope_scaling))
    monkeypatch.setattr(scorer, "CHUNK", 4)
    for source in (str(file), [json.loads(line) for line in lines if line != "{"]):
        results = scorer.score(source, str(neox))
        those = expected if source == str(file) else [one for one in expected if one.get("line") != 4]
        assert [one["id"] for one in results] == [one["id"] for one in those] and results[-1]["reason"] == "not an object"
        for name in ("loss", "logprob", "num_tokens"):
            values = [[np.nan if one[name] is None else one[name] for one in some] for some in (results, those)]
            np.testing.assert_allclose(*values, rtol=1e-5, err_msg=name)
    assert len(longest) == 8 and (len(set(longest)) == 1) == of_length


def test_without_a_chat_template_a_row_is_shown(neox, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", SCHEMAS)
    arguments = [f"--model={neox}", f"--data={data}", f"--out={tmp_path / 'scores.jsonl'}", "--batch_size=4"]
    stdout = run_command("score", arguments)
    assert "no chat template, so rows are rendered with the template 'human'" in stdout
    assert "    Human: Where?\n\n    Assistant: ⟦Über ☃ here<|end|>⟧" in stdout
    assert "chat template" not in run_command("score", [*arguments, "--template=human"])


TOO_LONG = {"question": "How?", "response": "so " * 200}


def test_a_command_that_scores_nothing_fails(neox, tmp_path):
    data, out = write_jsonl(tmp_path / "data.jsonl", [TOO_LONG] * 2), tmp_path / "scores.jsonl"
    with pytest.raises(ValueError, match="^no row was scored; .*scores.jsonl has the reason for each"):
        run_command("score", [f"--model={neox}", f"--data={data}", f"--out={out}"])
    assert len(read_jsonl(out)) == 2
    with pytest.raises(ValueError, match="scores.csv: the rows are written as JSONL"):
        run_command("score", [f"--model={neox}", f"--data={data}", f"--out={tmp_path / 'scores.csv'}"])


def test_command(neox, adapters, tmp_path):
    """Rows that cannot be scored keep their position."""
    good = [json.dumps(row, ensure_ascii=False) for row in OBJECTS[-5:]]
    empty = json.dumps({"question": "Why?", "response": " "})
    lines = [good[0], "{not json", good[1], empty, json.dumps(TOO_LONG), *good[2:], '{"a": 1}']
    data, out = tmp_path / "data.jsonl", tmp_path / "scores.jsonl"
    data.write_text("\n".join(lines), encoding="utf-8")
    arguments = [f"--model={neox}", f"--adapter={adapters[neox]}", f"--data={data}", f"--out={out}"]
    arguments += ["--template=none", "--noeos", "--batch_size=3"]
    done = subprocess.run([sys.executable, "-m", "bilevel_jax.score", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "5 of 9 rows scored" in done.stdout and "  1: over the model's 128 positions\n" in done.stdout

    results = read_jsonl(out)
    bad = {1: "JSON", 3: "empty response", 4: "128 positions", 8: "no field"}
    for location, reason in bad.items():
        assert reason in results[location].pop("reason")
        assert results[location].pop("line") == location + 1
        nulls = {"id": results[4]["id"] if location == 4 else None, "loss": None, "logprob": None, "num_tokens": 0}
        assert results[location] == nulls
    scored = [result for location, result in enumerate(results) if location not in bad]
    assert all(result.keys() == {"id", "loss", "logprob", "num_tokens"} for result in scored)
    check(scored, load(neox, adapters[neox]), OBJECTS[-5:], *NONE)


def test_no_row_that_fits(neox):
    items = list(rows.parse([(1, TOO_LONG)]))
    (result,) = scorer.score_rows(items, *load(neox), template="none", eos=True, batch_size=2)
    assert result["loss"] is None and "128 positions" in result["reason"]


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"data": "absent.jsonl"}, "absent.jsonl"),
        ({"data": "empty.jsonl"}, "no rows"),
        ({"model": "absent/dir/ectory"}, "no such directory"),
        ({"adapter": "absent"}, "absent/adapter_config.json"),
        ({"out": "absent/scores.jsonl"}, "--out"),
        ({"out": "data.jsonl"}, "--out=data.jsonl is a file of data.jsonl, which would be overwritten"),
        ({"data": "*.jsonl", "out": "empty.jsonl"}, r"--out=empty.jsonl is a file of \*.jsonl"),
        ({"dtype": "float64"}, "dtype"),
    ],
)
def test_command_refuses(neox, tmp_path, monkeypatch, changes, reason):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "data.jsonl", OBJECTS)
    (tmp_path / "empty.jsonl").touch()
    values = {"model": str(neox), "data": "data.jsonl", "out": "scores.jsonl"} | changes
    with pytest.raises((ValueError, OSError, flags.Error), match=reason) as error:
        run_command("score", [f"--{key}={value}" for key, value in values.items()])
    assert "\n" not in str(error.value)


def test_errors_are_one_line(neox, tmp_path):
    arguments = [f"--model={neox}", "--data=data.jsonl", "--out=scores.jsonl", "--bach_size=1"]
    command = [sys.executable, "-m", "bilevel_jax.score", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0 and "bach_size" in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_files_and_columns(neox, tmp_path):
    """Rows of several files, with other names of columns, have the scores of the same rows in one file."""
    objects = make_rows(5, seed=6)
    renamed = [{"query": row["question"], "answer": row["response"]} for row in objects]
    write_jsonl(tmp_path / "one.jsonl", objects)
    write_jsonl(tmp_path / "a.jsonl", renamed[:2])
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in [*renamed[2:], {"query": "no answer"}]))
    common = [f"--model={neox}", f"--out={tmp_path / 'out.jsonl'}"]
    run_command("score", [*common, f"--data={tmp_path / 'one.jsonl'}"])
    expected = read_jsonl(tmp_path / "out.jsonl")
    run_command("score", [*common, f"--data={tmp_path}/a.jsonl,{tmp_path}/b.*", "--columns=question:query,response:answer"])
    *scored, rejected = read_jsonl(tmp_path / "out.jsonl")
    assert scored == expected
    assert (rejected["reason"], rejected["line"], rejected["file"]) == ("no field 'response'", 4, f"{tmp_path}/b.jsonl.gz")


def test_says_what_it_does_not_read(neox, tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", [row | {"context": "long"} for row in make_rows(2, seed=6)])
    printed = run_command("score", [f"--model={neox}", f"--data={file}", f"--out={tmp_path / 'out.jsonl'}"])
    assert "fields that are neither prompt nor response here: context (in 2 rows)" in printed


def test_tools_without_a_chat_template_have_a_reason(neox, tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    chat = {
        "messages": [
            {"role": "user", "content": "a"},
            call,
            {"role": "tool", "content": "b"},
            {"role": "assistant", "content": "c"},
        ]
    }
    items = list(rows.parse(enumerate([*make_rows(1, seed=6), chat], 1)))
    results = scorer.score_rows(items, *load(neox), template="auto", eos=True, batch_size=4)
    assert results[0]["loss"] > 0 and results[1]["loss"] is None
    assert results[1]["reason"] == "tools, which need a chat template; the template here is 'human'"

"""Responses against float64 log-softmax of the logits of each row alone, against `score`, and against each other."""

import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from absl import flags as absl_flags

from bilevel_jax.data import rows
from bilevel_jax.models import decoder, huggingface
from bilevel_jax.score import scorer
from tests.conftest import load, make_rows, read_jsonl, run_command, write_jsonl

KEYS = ["id", "sample", "text", "tokens", "logprob", "sampled_logprob", "finish_reason", "question"]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho"},
    {"role": "user", "content": "And?"},
]
OBJECTS = [  # with their text in the template `human`
    ({"question": "Where?"}, "Human: Where?\n\nAssistant: "),
    ({"instruction": "Add.", "input": "1 2", "output": "3"}, "Human: Add.\n1 2\n\nAssistant: "),
    ({"prompt": "Once", "completion": " upon a time"}, "Human: Once\n\nAssistant: "),
    ({"messages": CHAT}, "Be brief.\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: And?\n\nAssistant: "),
    ({"question": "Über ☃ " + "yes " * 9, "response": ""}, "Human: Über ☃ " + "yes " * 9 + "\n\nAssistant: "),
    ({"question": "Where?", "source": "again"}, "Human: Where?\n\nAssistant: "),  # the first one's content
]
TEXTS = [text for _, text in OBJECTS]
SOME = ["--temperature=0.8", "--top_k=20", "--max_new_tokens=12"]
GREEDY = ["--temperature=0", "--max_new_tokens=24"]


@pytest.fixture(scope="module")
def command():
    """`f(arguments)` -> the output of the command."""
    return lambda *arguments: run_command("sample", list(map(str, arguments)))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", [row for row, _ in OBJECTS])


@pytest.fixture(scope="module")
def sampled(command, prompts, tmp_path_factory):
    """`f(model, *flags)` -> the rows written for the prompts above; equal calls are cached."""
    out = tmp_path_factory.mktemp("sampled") / "out.jsonl"

    @functools.cache
    def run(model, *arguments, prompts=prompts):
        command(f"--model={model}", f"--prompts={prompts}", f"--out={out}", *arguments)
        return read_jsonl(out)

    return run


@pytest.fixture(scope="module")
def adapter(neox, make_adapter, tmp_path_factory):
    return make_adapter(neox, tmp_path_factory.mktemp("adapter") / "neox")


@pytest.fixture
def model_copy(neox, tmp_path):
    """A copy of the tiny model, to be changed."""
    return shutil.copytree(neox, tmp_path / "model")


_logits = jax.jit(decoder.logits, static_argnums=0)


def logits_after(loaded, text, tokens):
    """Float64 logits [n, V] before each of the tokens that follow a text."""
    model, base, adapter, tokenizer = loaded
    prompt = tokenizer(text)["input_ids"]
    row = [*prompt, *tokens]
    padded = jnp.array([row + [0] * (model.max_positions - len(row))])
    return np.asarray(_logits(model, base, adapter, padded), np.float64)[0, len(prompt) - 1 : len(row) - 1]


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def total(log_probs, tokens):
    return log_probs[np.arange(len(tokens)), tokens].sum()


def with_eos(result, tokenizer):
    return result["tokens"] + [tokenizer.eos_token_id] * (result["finish_reason"] == "stop")


# --------------------------------------------------------------------------------------------------------------------
# Values
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture, adapted", [("neox", False), ("neox", True), ("llama", False)])
@pytest.mark.slow
def test_schema_order_and_log_probs(sampled, adapter, architecture, adapted, request):
    directory = request.getfixturevalue(architecture)
    loaded = load(directory, adapter if adapted else None)
    adapters = [f"--adapter={adapter}"] if adapted else []
    results = sampled(directory, *adapters, "--num_samples=6", "--temperature=0.7", "--top_k=200", "--max_new_tokens=40")
    items = list(rows.parse(enumerate((row for row, _ in OBJECTS), 1), questions_only=True))
    expected = [(item.id, text, sample) for item, text in zip(items, TEXTS) for sample in range(6)]
    assert [(result["id"], result["sample"]) for result in results] == [(name, sample) for name, _, sample in expected]
    assert results[-1]["id"] == results[0]["id"] + "-2" and results[-6]["tokens"] != results[0]["tokens"]
    for result, (_, text, _) in zip(results, expected):
        assert list(result) == KEYS
        tokens = with_eos(result, loaded[3])
        assert loaded[3].eos_token_id not in result["tokens"]
        assert len(tokens) == 40 if result["finish_reason"] == "length" else len(tokens) <= 40
        assert result["text"] == loaded[3].decode(result["tokens"])
        logits = logits_after(loaded, text, tokens)
        assert result["logprob"] == pytest.approx(total(log_softmax(logits), tokens), rel=1e-5)
        lowest = np.sort(logits / 0.7, axis=-1)[:, -200, None]
        kept = np.where(logits / 0.7 >= lowest, logits / 0.7, -np.inf)
        assert result["sampled_logprob"] == pytest.approx(total(log_softmax(kept), tokens), rel=1e-5)
    assert {result["finish_reason"] for result in results} == {"length", "stop"}


def test_nucleus(sampled, neox):
    """Every token is among the most likely whose probability reaches p, and is renormalised by what they add up to."""
    for result, text in zip(sampled(neox, "--top_p=0.6", "--max_new_tokens=20"), TEXTS):
        tokens = with_eos(result, load(neox)[3])
        log_probs = log_softmax(logits_after(load(neox), text, tokens))
        expected = 0.0
        for row, token in zip(log_probs, tokens):
            ranked = np.sort(np.exp(row))[::-1]
            number = np.searchsorted(np.cumsum(ranked), 0.6) + 1
            assert np.exp(row[token]) >= ranked[number - 1] - 1e-6
            expected += row[token] - np.log(ranked[:number].sum())
        assert result["sampled_logprob"] == pytest.approx(expected, rel=1e-4)


def test_plain_sampling_has_one_log_probability(sampled, neox):
    for result in sampled(neox, "--max_new_tokens=12"):
        assert result["sampled_logprob"] == pytest.approx(result["logprob"], rel=1e-5)


@pytest.mark.parametrize("adapted", [False, True])
def test_greedy(sampled, neox, adapter, adapted):
    """The most likely token each time, whatever the seed and the sample number."""
    loaded = load(neox, adapter if adapted else None)
    adapters = [f"--adapter={adapter}"] if adapted else []
    results = sampled(neox, *adapters, *GREEDY)
    for result, text in zip(results, TEXTS):
        tokens = with_eos(result, loaded[3])
        logits = logits_after(loaded, text, tokens)
        assert logits.argmax(-1).tolist() == tokens
        assert result["logprob"] == pytest.approx(total(log_softmax(logits), tokens), rel=1e-5)
        assert result["sampled_logprob"] == 0
    again = sampled(neox, *adapters, *GREEDY, "--num_samples=2", "--seed=7")
    assert [result["sample"] for result in again] == [0, 1] * len(TEXTS)
    for first, result in zip([result for result in results for _ in range(2)], again):
        assert result == first | {"sample": result["sample"], "logprob": pytest.approx(first["logprob"], rel=1e-5)}


def test_the_adapter_has_an_effect(sampled, neox, adapter):
    base, adapted = sampled(neox, *GREEDY), sampled(neox, f"--adapter={adapter}", *GREEDY)
    assert all(a["tokens"] != b["tokens"] for a, b in zip(base, adapted))


def test_the_log_prob_is_that_of_score(sampled, tmp_path):
    """On the embedded model, whose words are tokenized again as they were generated."""
    tiny = huggingface.locate("bilevel_jax/tiny")
    objects = [{"question": row["question"]} for row in make_rows(6, seed=5)]
    asked = write_jsonl(tmp_path / "sums.jsonl", objects)
    loaded = load(tiny)
    results = sampled(tiny, "--num_samples=4", "--temperature=0.9", "--max_new_tokens=11", prompts=asked)
    compared = {"stop": 0, "length": 0}
    for reason in compared:
        ended = [(i // 4, r) for i, r in enumerate(results) if r["finish_reason"] == reason and r["text"].strip()]
        same = [(position, r) for position, r in ended if loaded[3](r["text"])["input_ids"] == r["tokens"]]
        answered = [objects[position] | {"response": result["text"]} for position, result in same]
        items = list(rows.parse(enumerate(answered, 1)))
        scores = scorer.score_rows(items, *loaded, template="auto", eos=reason == "stop", batch_size=4)
        for (_, result), scored in zip(same, scores):
            assert result["logprob"] == pytest.approx(scored["logprob"], rel=1e-4, abs=1e-4)
            assert scored["num_tokens"] == len(with_eos(result, loaded[3]))
        compared[reason] = len(same)
    assert min(compared.values()) > 1


def test_bfloat16(sampled, neox, adapter):
    """Against the forward pass in the same precision; only about, since both round at every step."""
    tokenizer = load(neox)[3]
    model, base = huggingface.load_model(str(neox), "bfloat16")
    model, weights = huggingface.load_adapter(adapter, model)
    loaded = model, base, weights, tokenizer
    for result, text in zip(sampled(neox, f"--adapter={adapter}", "--dtype=bfloat16", "--max_new_tokens=16"), TEXTS):
        tokens = with_eos(result, tokenizer)
        log_probs = log_softmax(logits_after(loaded, text, tokens))
        assert result["logprob"] == pytest.approx(total(log_probs, tokens), rel=0.01)


# --------------------------------------------------------------------------------------------------------------------
# Dependence on seed and batch
# --------------------------------------------------------------------------------------------------------------------


def test_seeds(command, neox, prompts, tmp_path):
    written = {}
    for name, seed in {"a": 3, "b": 3, "c": 4}.items():
        out = tmp_path / f"{name}.jsonl"
        command(f"--model={neox}", f"--prompts={prompts}", f"--out={out}", *SOME, f"--seed={seed}", "--num_samples=2")
        written[name] = out.read_bytes()
    assert written["a"] == written["b"] != written["c"]
    tokens = {name: [row["tokens"] for row in map(json.loads, written[name].splitlines())] for name in written}
    assert all(a != c for a, c in zip(tokens["a"], tokens["c"]))
    assert len(set(map(tuple, tokens["a"]))) == len(tokens["a"])  # samples and repeated questions differ, too


ALL = slice(None)


@pytest.mark.parametrize(
    "flags, part",
    [
        (["--batch_size=1", "--num_samples=3"], ALL),
        (["--batch_size=5", "--num_samples=3"], ALL),
        (["--num_samples=1"], ALL),
        (["--num_samples=3"], slice(None, None, -1)),
        (["--num_samples=3"], slice(3, 4)),
    ],
)
@pytest.mark.slow
def test_responses_do_not_depend_on_the_batch(sampled, neox, flags, part, tmp_path):
    expected = {(r["id"], r["sample"]): r for r in sampled(neox, *SOME, "--num_samples=3")}
    chosen = [row for row, _ in OBJECTS[:5]][part]  # without the repeated question
    results = sampled(neox, *SOME, *flags, prompts=write_jsonl(tmp_path / "chosen.jsonl", chosen))
    assert len(results) == len(chosen) * int(flags[-1][-1])
    for result in results:
        same = expected[result["id"], result["sample"]]
        assert result["tokens"] == same["tokens"] and result["finish_reason"] == same["finish_reason"]
        assert result["logprob"] == pytest.approx(same["logprob"], rel=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# Ends of responses
# --------------------------------------------------------------------------------------------------------------------


def test_stop_strings(sampled, neox):
    """Text ends before the first of them, tokens with the one that completes it; other responses stay as they were."""
    loaded = load(neox)
    free = sampled(neox, *SOME[:2], "--max_new_tokens=60")
    whole = free[1]["text"]
    stops = [whole[len(whole) // 2 :][:2], whole[len(whole) // 3 :][:3], "never said"]
    ended = sampled(neox, *SOME[:2], "--max_new_tokens=60", *(f"--stop={stop}" for stop in stops))
    cut = 0
    for before, after, text in zip(free, ended, TEXTS):
        actual = [before["text"].index(stop) for stop in stops if stop in before["text"]]
        if not actual:
            assert after == before
            continue
        cut += 1
        assert after["text"] == before["text"][: min(actual)] and after["finish_reason"] == "stop"
        count = next(n for n in range(61) if any(stop in loaded[3].decode(before["tokens"][:n]) for stop in stops))
        assert after["tokens"] == before["tokens"][:count]
        log_probs = log_softmax(logits_after(loaded, text, after["tokens"]))
        assert after["logprob"] == pytest.approx(total(log_probs, after["tokens"]), rel=1e-5)
    assert 0 < cut < len(free)


@pytest.mark.parametrize("most", [1, 7])
def test_max_new_tokens_counts_the_eos(sampled, neox, most):
    longer = sampled(neox, *SOME[:2], "--max_new_tokens=12")
    for result, longer_one in zip(sampled(neox, *SOME[:2], f"--max_new_tokens={most}"), longer):
        assert result["tokens"] == longer_one["tokens"][:most]
        ended = longer_one["finish_reason"] == "stop" and len(longer_one["tokens"]) < most
        assert result["finish_reason"] == ("stop" if ended else "length")


def test_positions_are_the_limit(sampled, neox, tmp_path):
    """Of prompt and response together there are at most 128 tokens, the model's positions."""
    loaded = load(neox)
    texts = [("z9" * 64)[:length] for length in (120, 127, 128, 3)]
    assert [len(loaded[3](text)["input_ids"]) for text in texts] == [120, 127, 128, 3]
    asked = write_jsonl(tmp_path / "long.jsonl", [{"question": text} for text in texts])
    results = sampled(neox, "--template=none", *GREEDY, prompts=asked)
    assert [len(result["tokens"]) for result in results if result["tokens"] is not None] == [8, 1, 24]
    assert "128 positions" in results[2]["reason"] and results[2]["line"] == 3
    for text, result in zip(texts, results):
        if result["tokens"] is not None:
            logits = logits_after(loaded, text, result["tokens"])
            assert logits.argmax(-1).tolist() == result["tokens"] and result["finish_reason"] == "length"


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("several", [False, True])
def test_eos_of_the_model(sampled, neox, model_copy, name, several):
    """Besides the tokenizer's: a list or a single id."""
    loaded = load(neox)
    before = sampled(neox, *GREEDY)
    chosen = [before[0]["tokens"][5], before[3]["tokens"][2]]
    chosen = chosen if several else chosen[0]
    file = model_copy / name
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | {"eos_token_id": chosen}))
    ends = {loaded[3].eos_token_id} | set(chosen if several else [chosen])
    for old, new, text in zip(before, sampled(model_copy, *GREEDY), TEXTS):
        own_tokens = with_eos(old, loaded[3])
        count = next((position for position, token in enumerate(own_tokens) if token in ends), len(own_tokens))
        assert new["tokens"] == own_tokens[:count]
        assert new["finish_reason"] == ("stop" if count < len(own_tokens) else "length")
        log_probs = log_softmax(logits_after(loaded, text, own_tokens[: count + 1]))
        assert new["logprob"] == pytest.approx(total(log_probs, own_tokens[: count + 1]), rel=1e-5)


def test_template_none_takes_the_question_as_it_is(sampled, neox):
    texts = ["Where?", "Add.\n1 2", "Once", "Hi\n\nHo\n\nAnd?", "Über ☃ " + "yes " * 9, "Where?"]
    for result, text in zip(sampled(neox, "--template=none", *GREEDY), texts):
        tokens = with_eos(result, load(neox)[3])
        assert logits_after(load(neox), text, tokens).argmax(-1).tolist() == tokens


# --------------------------------------------------------------------------------------------------------------------
# Unusable prompts and refusals
# --------------------------------------------------------------------------------------------------------------------


def test_without_a_chat_template_a_row_is_shown(command, neox, prompts, tmp_path):
    arguments = [f"--model={neox}", f"--prompts={prompts}", f"--out={tmp_path / 'out.jsonl'}", *GREEDY]
    stdout = command(*arguments)
    assert "no chat template, so rows are rendered with the template 'human'" in stdout
    assert f"    {TEXTS[0].strip()}\n".replace("\n\n", "\n\n    ") in stdout
    assert [row["question"] for row in read_jsonl(tmp_path / "out.jsonl")][:3] == ["Where?", "Add.\n1 2", "Once"]
    assert "chat template" not in command(*arguments, "--template=human")


def test_command(neox, adapter, tmp_path):
    """Prompts that cannot be used keep their position."""
    good = [json.dumps(row, ensure_ascii=False) for row, _ in OBJECTS[:5]]
    empty = json.dumps({"question": " "})
    lines = [good[0], "{not json", good[1], empty, json.dumps({"question": "so " * 200}), *good[2:], '{"a": 1}']
    asked, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    asked.write_text("\n".join(lines), encoding="utf-8")
    out.write_text("what was here before\n")
    arguments = [f"--model={neox}", f"--adapter={adapter}", f"--prompts={asked}", f"--out={out}"]
    arguments += ["--template=none", "--batch_size=3", "--num_samples=2", "--top_p=0.9", "--max_new_tokens=6", "--stop=never said"]
    done = subprocess.run([sys.executable, "-m", "bilevel_jax.sample", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    results = read_jsonl(out)
    bad = {2: "JSON", 5: "empty question", 6: "128 positions", 13: "no field"}
    for (position, reason), line in zip(bad.items(), (2, 4, 5, 9)):
        assert reason in results[position].pop("reason") and results[position].pop("line") == line
        assert (results[position].pop("id") is not None) == (position == 6)
        assert results[position].pop("question") == ("so " * 200 if position == 6 else None)
        assert results[position] == dict.fromkeys(KEYS[1:-1])
    used = [result for position, result in enumerate(results) if position not in bad]
    assert all(list(result) == KEYS for result in used) and [result["sample"] for result in used] == [0, 1] * 5
    stops = sum(result["finish_reason"] == "stop" for result in used)
    mean = np.mean([len(result["tokens"]) for result in used])
    summary = f"{out}: 10 responses to 5 of 9 prompts, {stops} stop, {10 - stops} length, mean {mean:.1f} tokens\n"
    assert done.stdout == summary
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.jsonl", "prompts.jsonl"]


def test_prompts_without_valid_tokens(sampled, model_copy, tmp_path):
    file = model_copy / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.normalizer = tokenizers.normalizers.Replace("gone", "")
    tokenizer.add_tokens([f"<{number}>" for number in range(tokenizer.get_vocab_size(), 301)])
    assert tokenizer.token_to_id("<300>") == 300
    tokenizer.save(str(file))
    asked = write_jsonl(tmp_path / "odd.jsonl", [{"question": text} for text in ("gone", "a <300>", "a")])
    none, unknown, good = sampled(model_copy, "--template=none", *GREEDY, prompts=asked)
    assert none["reason"] == "no token in the prompt"
    assert unknown["reason"] == "token 300 ('<300>') is not in the model's vocabulary of 300; the tokenizer has 301 tokens"
    assert good["sample"] == 0


BAD_VALUES = {
    "temperature": ["-0.5", "nan", "inf"],
    "top_k": ["-1"],
    "top_p": ["0", "1.5", "nan"],
    "max_new_tokens": ["0"],
    "stop": [""],
}


@pytest.mark.parametrize("flag, value", [(flag, value) for flag, values in BAD_VALUES.items() for value in values])
def test_values_are_checked_before_anything_is_read(command, flag, value, tmp_path):
    with pytest.raises(ValueError, match=f"^--{flag}"):
        command("--model=absent", "--prompts=absent.jsonl", f"--out={tmp_path}/out.jsonl", f"--{flag}={value}")


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"prompts": "absent.jsonl"}, "absent.jsonl: no such file"),
        ({"prompts": "empty.jsonl"}, "no rows"),
        ({"prompts": "bad.jsonl"}, "bad.jsonl:1: empty question; none of the 2"),
        ({"prompts": "long.jsonl"}, "long.jsonl:1: no room .* 128 positions; none of the 1"),
        ({"out": "absent/out.jsonl"}, "--out: there is no directory"),
        ({"out": "long.jsonl/out.jsonl"}, "--out: there is no directory"),
        ({"out": "."}, "--out=.* is not a file"),
        ({"prompts": "bad.jsonl", "out": "bad.jsonl"}, "--out=.*bad.jsonl is a file of .*, which would be overwritten"),
        ({"model": "absent/dir/ectory"}, "no such directory"),
        ({"adapter": "absent"}, "absent/adapter_config.json"),
        ({"template": "chat"}, "chat template"),
    ],
)
def test_refusals(command, neox, prompts, tmp_path, changes, reason):
    (tmp_path / "empty.jsonl").touch()
    write_jsonl(tmp_path / "bad.jsonl", [{"question": " "}, {"a": 1}])
    write_jsonl(tmp_path / "long.jsonl", [{"question": "so " * 200}])
    here = {name: tmp_path / value for name, value in changes.items() if name in ("prompts", "out")}
    flags = {"model": neox, "prompts": prompts, "out": tmp_path / "out.jsonl"} | changes | here
    with pytest.raises((ValueError, OSError), match=reason) as error:
        command(*(f"--{name}={value}" for name, value in flags.items()))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no directory that even root cannot write to")
def test_a_directory_that_cannot_be_written_to(command, prompts):
    """Fails before the model is read."""
    with pytest.raises(OSError, match="--out: no file can be written to /proc"):
        command("--model=absent/dir/ectory", f"--prompts={prompts}", "--out=/proc/self/out.jsonl")


def test_a_failure_leaves_the_old_file(command, model_copy, prompts, tmp_path):
    """Weights that are numbers, but so large that probabilities are not, are detected last."""
    file = model_copy / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file({name: np.full_like(tensor, 3e38) for name, tensor in tensors.items()}, file)
    out = tmp_path / "out.jsonl"
    out.write_text("what was here before\n")
    with pytest.raises(ValueError, match="not numbers"):
        command(f"--model={model_copy}", f"--prompts={prompts}", f"--out={out}", *SOME)
    assert out.read_text() == "what was here before\n"
    assert not list(pathlib.Path(tmp_path).glob("*.tmp"))


def test_settings_for_generation_that_cannot_be_read(command, model_copy, prompts, tmp_path):
    (model_copy / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match="generation_config.json: not valid JSON"):
        command(f"--model={model_copy}", f"--prompts={prompts}", f"--out={tmp_path}/out.jsonl")


@pytest.mark.parametrize("flag, named, error", [("--template=x", "template", absl_flags.Error), ("--top_p=2", "top_p", ValueError)])
def test_errors_name_the_flag(command, neox, prompts, flag, named, error):
    with pytest.raises(error, match=named) as raised:
        command(f"--model={neox}", f"--prompts={prompts}", "--out=out.jsonl", flag)
    assert "\n" not in str(raised.value)


def test_errors_are_one_line(neox, prompts):
    named, arguments = "num_smaples", [f"--model={neox}", f"--prompts={prompts}", "--out=out.jsonl", "--num_smaples=2"]
    done = subprocess.run([sys.executable, "-m", "bilevel_jax.sample", *arguments], capture_output=True, text=True)
    assert done.returncode != 0 and named in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1

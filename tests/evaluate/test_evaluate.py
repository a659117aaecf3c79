"""lm-eval's requests against float64 log-softmax of the logits of each request alone, and by hand."""

import functools
import json
import pathlib
import subprocess
import sys

import datasets
import huggingface_hub
import jax.numpy as jnp
import lm_eval
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from bilevel_jax import sampling, scoring
from bilevel_jax.evaluate import __main__, lm_eval_adapter
from tests.conftest import _logits, load, run_command, write_jsonl

LOCAL = pathlib.Path("bilevel_jax/evaluate/tasks").absolute()
OFFICIAL = pathlib.Path(lm_eval.__file__).parent / "tasks"
END = "<|end|>"
LONG = "1 and 2 make 3, as you can check. " * 20


LMS = {}


def make_lm(loaded, eos=None):
    """The model behind lm-eval's interface. Equal calls share one, with its compiled programs."""
    model, base, adapter, tokenizer = loaded
    eos = (tokenizer.eos_token_id,) if eos is None else tuple(eos)
    key = id(base), id(adapter), eos  # `load` keeps the weights alive
    if key not in LMS:
        LMS[key] = lm_eval_adapter.JaxLM(model, base, adapter, tokenizer, eos, batch_size=2)
    return LMS[key]


def instances(kind, *arguments):
    return [Instance(kind, {}, each, position) for position, each in enumerate(arguments)]


def logits_after(loaded, tokens):
    """After each of the last 128 tokens, [128, V]; later rows are padding."""
    model, base, adapter, _ = loaded
    tokens = list(tokens)[-model.max_positions :]
    padded = jnp.array([tokens + [0] * (model.max_positions - len(tokens))])
    return np.asarray(_logits(model, base, adapter, padded), np.float64)[0], len(tokens)


def by_hand(loaded, context, continuation):
    """Log-likelihood, and whether every token is the most likely one."""
    logits, given = logits_after(loaded, [*context, *continuation][:-1])
    logits = logits[given - len(continuation) : given]
    log_normalizer = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    log_probs = logits[np.arange(len(continuation)), continuation] - log_normalizer
    return log_probs.sum(), bool((logits.argmax(-1) == continuation).all())


def greedy_tokens(loaded, prompt, number):
    tokens = list(prompt)
    for _ in range(number):
        logits, given = logits_after(loaded, tokens)
        tokens.append(int(logits[given - 1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def adapter(neox, make_adapter, tmp_path_factory):
    return make_adapter(neox, tmp_path_factory.mktemp("adapters") / "neox")


# --------------------------------------------------------------------------------------------------------------------
# Log-likelihoods
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapted", [False, True])
def test_loglikelihood(neox, adapter, adapted):
    loaded = load(neox, adapter if adapted else None)
    encode = loaded[3].encode
    end = loaded[3].eos_token_id
    whole, context = encode("1 and 2 make 345"), encode("1 and 2 make")
    assert whole[: len(context)] == context
    requests = {  # texts -> context and continuation in tokens
        ("1 and 2 make", " 345"): (context, whole[len(context) :]),
        ("1 and 2 make ", "345"): (context, whole[len(context) :]),  # the space moves to the continuation
        ("", "nothing"): ([end], encode("nothing")),
        ("", END + "x"): ([end], encode("x")),
        (LONG + "so", " yes"): (encode(LONG + "so"), encode(" yes")),
        ("a", LONG[:200]): (encode("a"), encode("a" + LONG[:200])[1:]),
    }
    assert len(encode(LONG)) > 128 > len(encode(LONG[:200])) > 40
    result = make_lm(loaded).loglikelihood(instances("loglikelihood", *requests), disable_tqdm=True)
    for (log_likelihood, greedy), tokens in zip(result, requests.values()):
        expected, likely = by_hand(loaded, *tokens)
        assert log_likelihood == pytest.approx(expected, rel=1e-5) and greedy == likely


def test_greedy_means_every_token(neox):
    """Also if a request uses all positions, and the last token one more."""
    loaded = load(neox)
    prompt = loaded[3].encode("1 and 2 make")
    best = greedy_tokens(loaded, prompt, 128)
    swapped = [best[:position] + [(best[position] + 1) % 256] + best[position + 1 : 6] for position in (0, 3, 5)]
    continuations = [best[:1], best[:6], best[: 129 - len(prompt)], *swapped]
    result = make_lm(loaded)._loglikelihood_tokens([(None, prompt, continuation) for continuation in continuations])
    assert [greedy for _, greedy in result] == [True, True, True, False, False, False]
    assert [by_hand(loaded, prompt, continuation)[1] for continuation in continuations] == [greedy for _, greedy in result]


def test_equal_requests_are_scored_once(neox, monkeypatch):
    lm, number = make_lm(load(neox)), []
    score = lm._score
    monkeypatch.setattr(lm, "_score", lambda segments: number.append(len(segments)) or score(segments))
    result = lm.loglikelihood(instances("loglikelihood", ("a", " b"), ("a", " c"), ("a", " b")), disable_tqdm=True)
    assert number == [2] and result[0] == result[2] != result[1]


def test_rolling(neox):
    loaded = load(neox)
    text = LONG + LONG[: len(LONG) // 2]
    tokens = loaded[3].encode(text)
    n = len(tokens)
    assert 2 * 128 < n < 3 * 128
    windows = [  # each token once; the last window has as much context as fits
        ([loaded[3].eos_token_id], tokens[:128]),
        (tokens[127:128], tokens[128:256]),
        (tokens[n - 129 : 256], tokens[256:]),
    ]
    short = ([loaded[3].eos_token_id], loaded[3].encode("short"))
    result = make_lm(loaded).loglikelihood_rolling(instances("loglikelihood_rolling", (text,), ("",), ("short",)))
    expected = [sum(by_hand(loaded, *window)[0] for window in windows), 0, by_hand(loaded, *short)[0]]
    np.testing.assert_allclose(result, expected, rtol=1e-5)


@pytest.mark.parametrize("arguments", [("a", ""), (" ", "a"), ("a", LONG)])
def test_requests_that_cannot_be_scored(neox, arguments):
    with pytest.raises(ValueError, match="cannot be scored within 128 positions"):
        make_lm(load(neox)).loglikelihood(instances("loglikelihood", arguments), disable_tqdm=True)


# --------------------------------------------------------------------------------------------------------------------
# Generation
# --------------------------------------------------------------------------------------------------------------------


def test_generate_until(neox):
    loaded = load(neox)
    tokenizer = loaded[3]
    prompts = ["1 and 2 make", "so", LONG, ""]
    given = [tokenizer.encode(prompt)[-(128 - 12) :] or [tokenizer.eos_token_id] for prompt in prompts]
    tokens = [greedy_tokens(loaded, prompt, 12) for prompt in given]
    texts = [tokenizer.decode(row) for row in tokens]
    assert len(set(texts)) == 4
    ends = [next(c for c in text[2:] if c.isascii() and c.isprintable()) for text in texts[:2]]
    requests = [(prompt, {"until": [], "max_gen_toks": 12}) for prompt in prompts]
    requests += [(prompt, {"until": ends, "max_gen_toks": 12}) for prompt in prompts]
    requests += [("so", {"until": "never said", "max_new_tokens": 3, "do_sample": False, "temperature": 0.7})]
    result = make_lm(loaded, eos=[]).generate_until(instances("generate_until", *requests))
    assert result[:4] == texts
    assert result[4:8] == [text.split(ends[0])[0].split(ends[1])[0] for text in texts]
    assert result[8] == tokenizer.decode(tokens[1][:3])


def test_generation_ends_at_the_eos(neox):
    loaded = load(neox)
    tokens = greedy_tokens(loaded, loaded[3].encode("so"), 12)
    last = max(tokens.index(token) for token in set(tokens))
    assert last < 11
    (result,) = make_lm(loaded, eos=[tokens[last]]).generate_until(instances("generate_until", ("so", {"max_gen_toks": 12})))
    assert result == loaded[3].decode(tokens[: last + 1])


def test_options():
    assert lm_eval_adapter.read_options({}) == sampling.Settings(0, 0, 1.0, 256, ())
    options = {"until": "\n", "do_sample": False, "temperature": 0.5}
    assert lm_eval_adapter.read_options(options) == sampling.Settings(0, 0, 1.0, 256, ("\n",))
    options = {"until": ["a", "b"], "max_gen_toks": 7, "do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.9}
    assert lm_eval_adapter.read_options(options) == sampling.Settings(0.5, 3, 0.9, 7, ("a", "b"))
    for options, named in (
        ({"num_beams": 4}, "num_beams"),
        ({"do_sample": True}, "temperature"),
        ({"do_sample": True, "temperature": 1, "top_p": 2}, "top_p"),
    ):
        with pytest.raises(ValueError, match=named):
            lm_eval_adapter.read_options(options)


def test_no_room_for_a_prompt(neox):
    with pytest.raises(ValueError, match="max_gen_toks=128"):
        make_lm(load(neox)).generate_until(instances("generate_until", ("so", {"max_gen_toks": 128})))


# --------------------------------------------------------------------------------------------------------------------
# Local tasks
# --------------------------------------------------------------------------------------------------------------------

DOCS = {
    "arc_easy": {"question": "Soft?", "choices": {"text": ["stone", "fur"], "label": ["A", "B"]}, "answerKey": "B"},
    "boolq": {"question": "is ice cold", "passage": "Ice is cold.", "answer": True},
    "hellaswag": {"activity_label": "Cats", "ctx": "A cat sits. It [x] waits. the CAT", "label": 1}
    | {"endings": [" runs [y] off.", "sleeps."]},
    "piqa": {"goal": "Cut it.", "sol1": "A knife.", "sol2": "A spoon.", "label": 0},
    "winogrande": {"sentence": "Ann beat Bea as _ was fast.", "option1": "Ann", "option2": "Bea", "answer": "1"},
}
RENDERED = {  # by hand, from the official task files: requests and the index of the right one
    "arc_easy": ([("Question: Soft?\nAnswer:", " stone"), ("Question: Soft?\nAnswer:", " fur")], 1),
    "boolq": ([("Ice is cold.\nQuestion: is ice cold?\nAnswer:", f" {word}") for word in ("no", "yes")], 1),
    "hellaswag": ([("Cats: A cat sits. It waits. The cat", f" {ending}") for ending in ("runs off.", "sleeps.")], 1),
    "piqa": ([("Question: Cut it.\nAnswer:", " A knife."), ("Question: Cut it.\nAnswer:", " A spoon.")], 0),
    "winogrande": ([("Ann beat Bea as Ann", " was fast."), ("Ann beat Bea as Bea", " was fast.")], 0),
}
FILES = {
    "arc_easy": "arc/arc_easy.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
}
OF_THE_DATA = {"task", "tag", "dataset_path", "dataset_name", "training_split", "validation_split", "test_split", "process_docs"}
OF_THE_DATA |= {"custom_dataset", "dataset_kwargs", "should_decontaminate", "doc_to_decontamination_query"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Where BILEVEL_JAX_DATA points to: four rows for each task."""
    root = tmp_path_factory.mktemp("data")
    (root / "bench").mkdir()
    for name, doc in DOCS.items():
        write_jsonl(root / "bench" / f"{name}.jsonl", [doc | {"id": str(i)} for i in range(4)])
    ends = zip(("A knife.", "An axe.", "A saw.", "Scissors."), (0, 1, 0, 1))
    write_jsonl(root / "bench" / "piqa.jsonl", [DOCS["piqa"] | {"sol1": end, "label": label} for end, label in ends])
    return root


@pytest.mark.parametrize("name", DOCS)
def test_local_tasks_are_the_official_ones(name):
    """Prompt, target, choices and metrics, to the letter."""

    def described(file):
        result = {key: value for key, value in load_yaml(file).items() if key not in OF_THE_DATA}
        return {key: f"{value.__module__}.{value.__name__}" if callable(value) else value for key, value in result.items()}

    assert described(LOCAL / f"local_{name}.yaml") == described(OFFICIAL / FILES[name])


@pytest.mark.parametrize("name", DOCS)
def test_requests_of_local_tasks(name, bench, monkeypatch):
    monkeypatch.setenv("BILEVEL_JAX_DATA", str(bench))
    task = TaskManager(include_path=str(LOCAL), include_defaults=False).load([f"local_{name}"])["tasks"][f"local_{name}"]
    task.set_config("num_fewshot", 0)
    task.build_all_requests(limit=1, rank=0, world_size=1)
    requests, right = RENDERED[name]
    assert [instance.args for instance in task.instances] == requests
    for best in (0, 1):
        results = [(-1.0 if position == best else -2.0, False) for position in (0, 1)]
        assert task.process_results(task.instances[0].doc, results)["acc"] == (best == right)


@pytest.mark.parametrize(
    "ctx, query",
    [
        ("He ran. He fell.", "X: He ran. He fell."),  # nothing begun
        ("He ran (fast!) a man", "X: He ran (fast!) A man"),
        ('He said "no." the Man', 'X: He said "no." The man'),
    ],
)
def test_beginning_of_a_hellaswag_sentence(ctx, query, bench, monkeypatch):
    monkeypatch.setenv("BILEVEL_JAX_DATA", str(bench))
    write_jsonl(bench / "bench" / "hellaswag.jsonl", [DOCS["hellaswag"] | {"activity_label": "X", "ctx": ctx}])
    task = TaskManager(include_path=str(LOCAL), include_defaults=False).load(["local_hellaswag"])["tasks"]["local_hellaswag"]
    assert task.validation_docs()[0]["query"] == query


# --------------------------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command(bench):
    """`f(arguments)` -> the output of the command. It raises what the command raises. Calls share their compiled programs."""
    make_scorer, scorers = scoring.make_scorer, {}

    def cached(*settings, greedy):
        return scorers.setdefault(settings, make_scorer(*settings, greedy=greedy))

    @functools.cache
    def manager(paths, defaults):  # it takes seconds to list all tasks of lm-eval
        return TaskManager(include_path=list(paths), include_defaults=defaults)

    def cached_manager(include_path, include_defaults=True):
        return manager(tuple(include_path), include_defaults)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BILEVEL_JAX_DATA", str(bench))
        patch.setattr(lm_eval.tasks, "TaskManager", cached_manager)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(scoring, "make_scorer", cached)
        yield lambda *arguments: run_command("evaluate", list(map(str, arguments)))


@pytest.mark.slow
def test_command(command, finished):
    printed = command(f"--workdir={finished}", "--tasks=local_p*,local_boolq", "--limit=3", "--samples", "--batch_size=2")
    assert "|local_boolq|" in printed and "|acc_norm|" in printed and str(finished / "lm_eval.json") in printed
    results = json.loads((finished / "lm_eval.json").read_text())
    (finished / "lm_eval.json").unlink()
    assert results["config"]["adapter"] == str(finished / "adapter") and results["n-samples"]["local_piqa"]["effective"] == 3

    path = json.loads((finished / "config.json").read_text())["model"]["path"]
    loaded = load(path, finished / "adapter")
    encode = loaded[3].encode
    for name, measures in (("local_piqa", ("acc", "acc_norm")), ("local_boolq", ("acc",))):
        hits = {measure: [] for measure in measures}
        for sample in results["samples"][name]:
            texts = [tuple(pair) for pair in sample["arguments"]]
            pairs = [(encode(context), encode(context + ending)[len(encode(context)) :]) for context, ending in texts]
            expected = np.array([by_hand(loaded, *pair)[0] for pair in pairs])
            np.testing.assert_allclose([resp[0][0] for resp in sample["resps"]], expected, rtol=1e-5)
            lengths = np.array([len(ending) - 1 for _, ending in texts])  # characters, without the space before
            right = sample["doc"]["label"]
            hits["acc"].append(expected.argmax() == right)
            if "acc_norm" in hits:
                hits["acc_norm"].append((expected / lengths).argmax() == right)
        for measure, result in hits.items():
            assert results["results"][name][f"{measure},none"] == pytest.approx(np.mean(result))


def test_command_on_a_model(command, neox, adapter, tmp_path):
    """Base and adapter differ; without --out nothing is written."""
    out = tmp_path / "out.json"
    flags = [f"--model={neox}", "--tasks=local_winogrande", "--num_fewshot=2", "--limit=1", "--samples"]
    command(*flags, f"--out={out}")
    base = json.loads(out.read_text())["samples"]["local_winogrande"][0]
    command(*flags, f"--out={out}", f"--adapter={adapter}")
    adapted = json.loads(out.read_text())["samples"]["local_winogrande"][0]
    assert base["arguments"] == adapted["arguments"] and base["resps"] != adapted["resps"]
    assert base["arguments"][0][0].count("was fast.") == 2  # the solved examples
    before = set(tmp_path.iterdir())
    assert "|local_winogrande|" in command(*flags, "--nosamples")
    assert set(tmp_path.iterdir()) == before == {out}


@pytest.mark.parametrize(
    "flags, error, message",
    [
        (["--tasks=local_nothing"], ValueError, "unknown task 'local_nothing'"),
        (["--tasks=piqa"], ValueError, "task piqa cannot be loaded .*local_arc_easy, local_boolq"),
        (["--workdir=runs/absent"], ValueError, "either --workdir or --model"),
        (["--model=absent/dir/ectory"], ValueError, "no such directory"),
        (["--adapter=absent"], ValueError, "absent/adapter_config.json"),
        (["--out=absent/out.json"], OSError, "--out"),
        (["--include_path=absent"], OSError, "--include_path"),
        (["--chat_template"], ValueError, "--chat_template"),
    ],
)
@pytest.mark.slow
def test_command_refuses(command, neox, flags, error, message):
    with pytest.raises(error, match=message):
        command(f"--model={neox}", "--tasks=local_piqa", *flags)


def test_the_model_is_looked_at_before_its_tokenizer(tmp_path):
    """The directory has no tokenizer."""
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match="model_type 'mamba' is not supported"):
        __main__.load_lm(__main__.EvaluatedModel(str(tmp_path), None, "float32", "none", None))


def test_command_refuses_an_unfinished_run(command, tmp_path):
    with pytest.raises(FileNotFoundError, match="summary.json is missing"):
        command(f"--workdir={tmp_path}", "--tasks=local_piqa")
    with pytest.raises(ValueError, match="--adapter goes with --model"):
        command(f"--workdir={tmp_path}", "--adapter=x", "--tasks=local_piqa")
    with pytest.raises(ValueError, match="--samples goes with --out"):
        command("--model=x", "--samples", "--tasks=local_piqa")


def test_missing_data(bench, monkeypatch):
    manager = TaskManager(include_path=str(LOCAL), include_defaults=False)
    monkeypatch.setenv("BILEVEL_JAX_DATA", str(bench / "absent"))
    with pytest.raises(ValueError, match="absent/bench/piqa.jsonl cannot be read .*BILEVEL_JAX_DATA"):
        manager.load(["local_piqa"])
    monkeypatch.delenv("BILEVEL_JAX_DATA")
    with pytest.raises(ValueError, match="needs BILEVEL_JAX_DATA"):
        manager.load(["local_piqa"])


def test_without_lm_eval():
    program = "import sys, runpy; sys.modules['lm_eval'] = None; runpy.run_module('bilevel_jax.evaluate', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program, "--model=x", "--tasks=piqa"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: lm-eval is not installed: pip install 'bilevel_jax[eval]'\n"

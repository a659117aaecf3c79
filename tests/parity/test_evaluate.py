"""The model behind lm-eval against lm-eval's `hf` backend with PyTorch: `make parity`."""

import os
import pathlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from bilevel_jax.data import templates
from bilevel_jax.evaluate import lm_eval_adapter
from bilevel_jax.models import huggingface

pytestmark = pytest.mark.parity
SMOLLM2 = pathlib.Path("local/smollm2")
REAL = os.environ.get("BILEVEL_JAX_DATA")
TASKS = ["local_arc_easy", "local_boolq", "local_hellaswag", "local_piqa", "local_winogrande"]
LIMIT = 3  # items of each
ATOL = 1e-3  # nats per continuation
LONG = "1 and 2 make 3, as you can check. " * 20

needs_smollm2 = pytest.mark.skipif(not SMOLLM2.exists(), reason="local/smollm2 is absent: make smollm2")


def make_pair(directory, adapter=None):
    """The `hf` backend and the backend under test."""
    theirs = HFLM(str(directory), peft=adapter and str(adapter), device="cpu", dtype="float32", batch_size=8)
    tokenizer = templates.load_tokenizer(str(directory))
    model, base = huggingface.load_model(str(directory))
    model, adapter = huggingface.load_adapter(adapter, model) if adapter else (model, None)
    return theirs, lm_eval_adapter.JaxLM(model, base, adapter, tokenizer, huggingface.eos_ids(directory, tokenizer), batch_size=4)


@pytest.fixture(scope="module")
def smollm2():
    return make_pair(SMOLLM2)


def ask(pair, kind, *arguments):
    """The results of both backends."""
    return [getattr(lm, kind)([Instance(kind, {}, each, index) for index, each in enumerate(arguments)]) for lm in pair]


def assert_same_scores(theirs, ours):
    np.testing.assert_allclose([score for score, _ in ours], [score for score, _ in theirs], rtol=0, atol=ATOL)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


@pytest.mark.skipif(not REAL, reason="BILEVEL_JAX_DATA does not name a folder of real rows")
@needs_smollm2
def test_tasks(smollm2):
    """Same items and requests, accuracies equal, log-likelihoods within 1e-3."""
    result = []
    for lm in smollm2:
        manager = TaskManager(include_path="bilevel_jax/evaluate/tasks", include_defaults=False)
        result.append(evaluator.simple_evaluate(lm, tasks=TASKS, limit=LIMIT, task_manager=manager, bootstrap_iters=0))
    theirs, ours = result
    for task in TASKS:
        for key, value in theirs["results"][task].items():
            assert ours["results"][task][key] == value, f"{task}: {key}"
        for one, other in zip(theirs["samples"][task], ours["samples"][task], strict=True):
            assert [one[key] for key in ("doc_hash", "arguments")] == [other[key] for key in ("doc_hash", "arguments")]
            assert_same_scores([resp[0] for resp in one["resps"]], [resp[0] for resp in other["resps"]])


@needs_smollm2
def test_smollm2(smollm2):
    """Requests with trailing spaces and no context, under the chat template, most likely and not; rolling; greedy texts."""
    theirs, ours = smollm2
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    assert theirs.apply_chat_template(chat) == ours.apply_chat_template(chat)
    templated = ours.apply_chat_template(chat)
    prefixes = ["The capital of France is ", "Count: one, two, three,", templated]
    options = {"until": ["\n\n"], "max_gen_toks": 6}
    prompts = [(text, options) for text in prefixes] + [(text, {"until": [","], "max_gen_toks": 6}) for text in prefixes[1:]]
    expected, answers = ask(smollm2, "generate_until", *prompts)
    assert answers == expected and len(set(answers)) > 3 and all("," not in text for text in answers[3:])

    texts = [(prefixes[0], "Paris"), (prefixes[0], "London"), ("", "Hello world"), ("", "<|im_start|>user"), (templated, "Paris.")]
    texts.append((templated, answers[2]))  # what greedy decoding gives
    result = ask(smollm2, "loglikelihood", *texts)
    assert_same_scores(*result)
    assert {greedy for _, greedy in result[1]} == {False, True}
    rolled = ask(smollm2, "loglikelihood_rolling", ("A text by itself, scored as it stands.",), ("Another one\n",))
    np.testing.assert_allclose(rolled[1], rolled[0], rtol=0, atol=ATOL)


@pytest.mark.parametrize("architecture", ["neox", "llama"])
def test_peft_adapter(architecture, make_adapter, request, tmp_path):
    """A tiny model, so that contexts are cut and texts need several windows."""
    directory = request.getfixturevalue(architecture)
    plain, adapted = make_pair(directory), make_pair(directory, make_adapter(directory, tmp_path / "adapter"))
    texts = [("1 and 2 make ", "345"), ("", "nothing"), (LONG + "so", " yes"), ("a", LONG[:200]), ("so", " 1 and")]
    result = ask(adapted, "loglikelihood", *texts)
    assert_same_scores(*result)
    (base,) = ask(plain[1:], "loglikelihood", *texts)
    assert min(abs(one - other) for (one, _), (other, _) in zip(base, result[1])) > 10 * ATOL
    rolled = ask(adapted, "loglikelihood_rolling", (LONG,), ("short",))
    np.testing.assert_allclose(rolled[1], rolled[0], rtol=0, atol=ATOL)
    options = {"until": ["e"], "max_gen_toks": 20}
    prompts = [(prompt, options) for prompt in ("1 and 2 make", "so", LONG)] + [("a", {"max_gen_toks": 9})]
    expected, texts = ask(adapted, "generate_until", *prompts)
    assert texts == expected and len(set(texts)) > 1

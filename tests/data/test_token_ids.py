"""A tokenizer with more tokens than its model: JAX would read another token instead, so every command refuses the rows."""

import dataclasses
import shutil

import numpy as np
import pytest
import transformers

from bilevel_jax import checks, scoring, sharding
from bilevel_jax import setup as setups
from bilevel_jax.data import packing, rows, templates, token_ids
from bilevel_jax.evaluate import lm_eval_adapter
from bilevel_jax.score import scorer
from tests.conftest import load, make_rows, write_jsonl

PROBLEM = r"token 300 \('<new>'\) is not in the model's vocabulary of 300; the tokenizer has 301 tokens"


@pytest.fixture(scope="module")
def added(neox, tmp_path_factory):
    """A model directory whose tokenizer has one token more than the model."""
    directory = shutil.copytree(neox, tmp_path_factory.mktemp("added") / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(neox)
    tokenizer.add_tokens([f"<{i}>" for i in range(300 - len(tokenizer))] + ["<new>"])
    assert tokenizer.convert_tokens_to_ids("<new>") == 300
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("field", ["question", "response"])
def test_score(added, field):
    model, base, adapter, tokenizer = load(added)
    objects = make_rows(3, 0)
    objects[1][field] += "<new>"
    items = list(rows.parse(enumerate(objects, 1)))
    with pytest.raises(token_ids.TokenError, match=PROBLEM) as caught:
        scorer.score_rows(items, model, base, adapter, tokenizer, template="none", eos=True, batch_size=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("level", ["upper", "lower"])
@pytest.mark.parametrize("position", [0, -1])
def test_training(added, make_config, tmp_path, level, position):
    objects = make_rows(20, 0)
    objects[position]["question"] += "<new>"
    config = make_config({"model.path": str(added), f"data.{level}": str(write_jsonl(tmp_path / "rows.jsonl", objects))})
    with pytest.raises(token_ids.TokenError, match=PROBLEM):
        setups.load(checks.build(config))


def test_benchmarks(added):
    model, base, adapter, tokenizer = load(added)
    lm = lm_eval_adapter.JaxLM(model, base, adapter, tokenizer, (tokenizer.eos_token_id,))
    assert lm.tok_encode("a")
    with pytest.raises(token_ids.TokenError, match=PROBLEM):
        lm.tok_encode("a <new>")


def test_every_scorer(neox):
    """Also where texts meet the model by another way, such as right responses that only measurement uses."""
    model, base, *_ = load(neox)
    score = scoring.make_scorer(model, 1, 16, sharding.make_mesh(1))
    segment = packing.Segment(np.array([1], np.int32), np.array([model.vocab_size], np.int32))
    with pytest.raises(ValueError, match="token 300 is not in the model's vocabulary of 300"):
        score(base, None, [segment], "scoring")


def test_a_pair(neox):
    *_, tokenizer = load(neox)
    example = templates.Example(*(np.array([token], np.int32) for token in (1, 2, 300)))
    with pytest.raises(token_ids.TokenError, match="token 300"):
        token_ids.check([example], tokenizer, 300)
    token_ids.check([dataclasses.replace(example, rejected=None)], tokenizer, 300)

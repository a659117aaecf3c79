"""Rankings of rows against their formulas: by hand, and by whole logits and whole gradients of a small model."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax import scoring, sharding
from bilevel_jax.data import levels, rows, templates
from bilevel_jax.models import decoder, huggingface, lora
from experiments import measures
from experiments.selection import scores
from tests.models.test_decoder import FIXTURES

LENGTHS = [(3, 2), (1, 4), (30, 9), (5, 2)]  # of prompts and responses; the third needs a sequence of 64

logits = jax.jit(decoder.logits, static_argnums=0)


@pytest.fixture(scope="module")
def model():
    config, base = huggingface.load_model(str(FIXTURES / "llama_gqa_tied"))
    adapter = lora.init_adapter(config, jax.random.key(0), 2, ("q_proj", "down_proj"))
    adapter = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), adapter)
    return config, base, adapter


def examples(vocab: int, seed: int, lengths) -> list[templates.Example]:
    rng = np.random.default_rng(seed)
    return [templates.Example(*(rng.integers(1, vocab, size).astype(np.int32) for size in pair), None) for pair in lengths]


def nll(config, base, adapter, example, first: int, start: int = 0):
    """-Σ log p of the tokens from `first` on of prompt and response, as read from `start`; and how many these are."""
    tokens = np.concatenate([example.prompt, example.response])[start:]
    log_probs = jax.nn.log_softmax(logits(config, base, adapter, tokens[None])[0])
    places = np.arange(first - start, len(tokens))
    return -log_probs[places - 1, tokens[places]].sum(), len(places)


def test_difficulty_is_the_ratio_of_losses_with_and_without_the_question(model):
    config, base, _ = model
    given = examples(config.vocab_size, 0, LENGTHS)
    score = scoring.make_scorer(config, 2, 64, sharding.make_mesh(1))
    expected = []
    for one in given:
        first = len(one.prompt) + 1  # of the tokens that both predict
        ratio = float(nll(config, base, None, one, first)[0] / nll(config, base, None, one, first, len(one.prompt))[0])
        expected.append(-ratio if ratio > 1 else ratio)
    assert min(expected) < 0 < max(expected)
    np.testing.assert_allclose(scores.difficulty(score, base, given), expected, rtol=1e-4)


def test_alignment_is_the_cosine_of_whole_gradients(model):
    config, base, adapter = model
    trusted, given = (examples(config.vocab_size, seed, LENGTHS) for seed in (1, 2))

    def gradient(example):
        def loss(adapter):
            total, count = nll(config, base, adapter, example, len(example.prompt))
            return total / count

        return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(jax.grad(loss)(adapter))]).astype(np.float64)

    mean = np.mean([gradient(one) for one in trusted], axis=0)
    expected = [g @ mean / np.linalg.norm(g) / np.linalg.norm(mean) for g in map(gradient, given)]
    upper, lower = (levels.Level([], some, [], []) for some in (trusted, given))
    found = scores.alignment(config, jax.tree.map(jnp.asarray, base), adapter, upper, lower)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def row(question: str, response: str, **fields) -> rows.Row:
    return rows.Row(question, "", (("user", question),), response, None, "", fields, 1, "")


def test_importance_by_hand(monkeypatch):
    """Trusted: a, b, "a b"; given: a, c, "a c" and b, b, "b b". Every n-gram has a bucket of its own here."""
    monkeypatch.setattr(scores, "BUCKETS", 997)
    buckets = {gram: scores.zlib.crc32(gram.encode()) % 997 for gram in ("a", "b", "c", "a b", "a c", "b b")}
    assert len(set(buckets.values())) == 6
    found = scores.importance([row("a", "b")], [row("a", "c"), row("B", "b")])
    p = {"a": 2, "b": 2, "c": 1, "a c": 1, "b b": 1}  # counts of the trusted, raised by 1
    q = {"a": 2, "b": 3, "c": 2, "a c": 2, "b b": 2}
    unit = math.log((997 + 6) / (997 + 3))  # what the two totals make of each n-gram
    first = sum(math.log(p[gram] / q[gram]) + unit for gram in ("a", "c", "a c"))
    second = sum(math.log(p[gram] / q[gram]) + unit for gram in ("b", "b", "b b"))
    np.testing.assert_allclose(found, [first, second])


def test_rankings_are_judged_by_kind_and_beside_hard_rows():
    """Scores fall from left to right: good and easy, bad (wrong), good and hard, bad (garbage)."""
    marks = [(False, "clean", "easy"), (True, "wrong", "easy"), (False, "clean", "hard"), (True, "garbage", "hard")]
    given = [row("", "", bad=bad, kind=kind, difficulty=difficulty) for bad, kind, difficulty in marks]
    found = measures.ranked_rows(np.array([4.0, 3.0, 2.0, 1.0]), measures.marks(given), keep=0.5)
    assert found == {
        "selector/auroc": 0.75,  # 3 of 4 pairs
        "selector/bad_kept": 0.5,
        "auroc_hard": 0.5,  # the hard good row is above one of two bad ones
        "kind/garbage": 1.0,
        "kind/wrong": 0.5,
    }

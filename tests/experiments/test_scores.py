"""Rankings of rows against their formulas: by hand, and by full logits and full gradients of a small model."""

import functools
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
from tests.models.models import FIXTURES

LENGTHS = [(3, 2), (1, 4), (30, 9), (5, 2)]  # of prompts and responses; the third needs a sequence of 64
LONGEST = 39


@pytest.fixture(scope="module")
def model():
    config, base = huggingface.load_model(str(FIXTURES / "llama_gqa_tied"))
    adapter = lora.init_adapter(config, jax.random.key(0), 2, ("q_proj", "down_proj"))
    adapter = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), adapter)
    return config, base, adapter


def examples(vocab: int, seed: int, lengths) -> list[templates.Example]:
    rng = np.random.default_rng(seed)
    return [templates.Example(*(rng.integers(1, vocab, size).astype(np.int32) for size in pair), None) for pair in lengths]


@functools.partial(jax.jit, static_argnums=0)
def target_nll(config, base, adapter, tokens):
    """-log p of tokens 1, 2, ... of a sequence."""
    log_probs = jax.nn.log_softmax(decoder.logits(config, base, adapter, tokens[None])[0, :-1])
    return -jnp.take_along_axis(log_probs, tokens[1:, None], axis=1)[:, 0]


def pad(tokens: np.ndarray) -> np.ndarray:
    """To `LONGEST`, so that all sequences share a compilation. Attention is causal, so padding at the end has no effect."""
    return np.pad(tokens, (0, LONGEST - len(tokens)))


def nll(config, base, example, first: int, start: int = 0) -> float:
    """-Σ log p of the tokens of prompt and response from index `first` on, if the sequence begins at `start`."""
    tokens = np.concatenate([example.prompt, example.response])[start:]
    return float(target_nll(config, base, None, pad(tokens))[first - start - 1 : len(tokens) - 1].sum())


@functools.partial(jax.jit, static_argnums=0)
def response_gradient(config, base, adapter, tokens, weights):
    """Gradient of Σ weights · -log p in the adapter."""
    return jax.grad(lambda adapter: target_nll(config, base, adapter, tokens) @ weights)(adapter)


def test_difficulty_is_the_ratio_of_losses_with_and_without_the_question(model):
    config, base, _ = model
    given = examples(config.vocab_size, 0, LENGTHS)
    score = scoring.make_scorer(config, 2, 64, sharding.make_mesh(1))
    expected = []
    for example in given:
        first = len(example.prompt) + 1  # of the tokens that both sequences predict
        ratio = nll(config, base, example, first) / nll(config, base, example, first, len(example.prompt))
        expected.append(-ratio if ratio > 1 else ratio)
    assert min(expected) < 0 < max(expected)
    np.testing.assert_allclose(scores.difficulty(score, base, given), expected, rtol=1e-4)


@pytest.mark.slow
def test_alignment_is_the_cosine_of_full_gradients(model):
    config, base, adapter = model
    base = jax.tree.map(jnp.asarray, base)
    trusted, given = (examples(config.vocab_size, seed, LENGTHS) for seed in (1, 2))

    def gradient(example):
        """Of the mean loss of the response."""
        weights = np.zeros(LONGEST - 1, np.float32)
        weights[len(example.prompt) - 1 : example.size - 1] = 1 / len(example.response)
        leaves = response_gradient(config, base, adapter, pad(np.concatenate([example.prompt, example.response])), weights)
        return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(leaves)]).astype(np.float64)

    mean = np.mean([gradient(example) for example in trusted], axis=0)
    expected = [g @ mean / np.linalg.norm(g) / np.linalg.norm(mean) for g in map(gradient, given)]
    upper, lower = (levels.Level([], level_examples, [], []) for level_examples in (trusted, given))
    alignment = scores.alignment(config, base, adapter, upper, lower)
    np.testing.assert_allclose(alignment, expected, rtol=0, atol=1e-5)


def row(question: str, response: str, **fields) -> rows.Row:
    return rows.Row(question, "", (("user", question),), response, None, "", fields, 1, "")


def test_importance_by_hand(monkeypatch):
    """Trusted: a, b, "a b"; given: a, c, "a c" and b, b, "b b". Here every n-gram has its own bucket."""
    monkeypatch.setattr(scores, "BUCKETS", 997)
    buckets = {gram: scores.zlib.crc32(gram.encode()) % 997 for gram in ("a", "b", "c", "a b", "a c", "b b")}
    assert len(set(buckets.values())) == 6
    importance = scores.importance([row("a", "b")], [row("a", "c"), row("B", "b")])
    p = {"a": 2, "b": 2, "c": 1, "a c": 1, "b b": 1}  # counts of the trusted, raised by 1
    q = {"a": 2, "b": 3, "c": 2, "a c": 2, "b b": 2}
    unit = math.log((997 + 6) / (997 + 3))  # of each n-gram, from the two totals
    first = sum(math.log(p[gram] / q[gram]) + unit for gram in ("a", "c", "a c"))
    second = sum(math.log(p[gram] / q[gram]) + unit for gram in ("b", "b", "b b"))
    np.testing.assert_allclose(importance, [first, second])


def test_rankings_by_kind_and_against_hard_rows():
    """Scores fall from left to right: good and easy, bad (wrong), good and hard, bad (garbage)."""
    marks = [(False, "clean", "easy"), (True, "wrong", "easy"), (False, "clean", "hard"), (True, "garbage", "hard")]
    given = [row("", "", bad=bad, kind=kind, difficulty=difficulty) for bad, kind, difficulty in marks]
    metrics = measures.ranked_rows(np.array([4.0, 3.0, 2.0, 1.0]), measures.labels(given), keep=0.5)
    assert metrics == {
        "selector/auroc": 0.75,  # 3 of 4 pairs
        "selector/bad_kept": 0.5,
        "selector/bad_among_kept": 0.5,
        "auroc_hard": 0.5,  # the hard good row is above one of two bad ones
        "kind/garbage": 1.0,
        "kind/wrong": 0.5,
    }

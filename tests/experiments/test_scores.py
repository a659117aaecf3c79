"""Rankings of rows against their formulas: by hand, and by full logits and full gradients of a small model."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import flatten_util

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


def row_gradient(config, base, adapter, example) -> np.ndarray:
    """Of the mean loss of the response, as a vector."""
    weights = np.zeros(LONGEST - 1, np.float32)
    weights[len(example.prompt) - 1 : example.size - 1] = 1 / len(example.response)
    leaves = response_gradient(config, base, adapter, pad(np.concatenate([example.prompt, example.response])), weights)
    return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(leaves)]).astype(np.float64)


def cosine(a, b) -> float:
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.mark.slow
def test_alignment_is_the_cosine_of_full_gradients(model):
    config, base, adapter = model
    base = jax.tree.map(jnp.asarray, base)
    trusted, given = (examples(config.vocab_size, seed, LENGTHS) for seed in (1, 2))
    mean = np.mean([row_gradient(config, base, adapter, example) for example in trusted], axis=0)
    expected = [cosine(row_gradient(config, base, adapter, example), mean) for example in given]
    upper, lower = (levels.Level([], level_examples, [], []) for level_examples in (trusted, given))
    alignment = scores.alignment(config, base, adapter, upper, lower)
    np.testing.assert_allclose(alignment, expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def less_case(model):
    """Arguments of `less` with two checkpoints and two targets, and s_ij by NumPy in float64."""
    config, base, _ = model
    base = jax.tree.map(jnp.asarray, base)
    rng = np.random.default_rng(0)
    trusted = examples(config.vocab_size, 1, [(3, 5), (1, 6), (4, 4), (5, 8)])
    # Each candidate has the response of a trusted row to another prompt: some are close to one target, some to the other.
    given = [dataclasses.replace(trusted[i % 4], prompt=rng.integers(1, config.vocab_size, 4, np.int32)) for i in range(12)]
    targets, rates = ["b", "a", "b", "b"], [1.0, 0.3]
    checkpoints, expected = [], np.zeros((len(given), 2))
    for rate, steps in zip(rates, (8, 31)):
        adapter = lora.init_adapter(config, jax.random.key(steps), 16, ("q_proj", "down_proj"))
        values, unravel = flatten_util.ravel_pytree(adapter)
        adapter = unravel(values + 0.1 * rng.normal(size=values.size).astype(np.float32))
        upper = np.stack([row_gradient(config, base, adapter, example) for example in trusted])
        scale = np.abs(upper).mean()  # so that the row's own gradient and the state both matter
        m, v = (0.02 * scale * rng.normal(size=values.size), (scale * rng.uniform(0.3, 3, values.size)) ** 2)
        state = optax.adam(1e-3).init(adapter)
        moments = {"mu": unravel(m.astype(np.float32)), "nu": unravel(v.astype(np.float32)), "count": jnp.int32(steps - 1)}
        checkpoints.append((adapter, (state[0]._replace(**moments), *state[1:])))
        goals = [upper[[target == name for target in targets]].mean(axis=0) for name in ("a", "b")]
        for i, example in enumerate(given):
            g = row_gradient(config, base, adapter, example)
            first, second = (0.9 * m + 0.1 * g) / (1 - 0.9**steps), (0.999 * v + 0.001 * g**2) / (1 - 0.999**steps)
            expected[i] += [rate * cosine(first / (np.sqrt(second) + 1e-8), goal) for goal in goals]
    return (config, base, checkpoints, trusted, given, targets, rates), expected


def test_less_without_projection_is_the_formula(less_case):
    arguments, expected = less_case
    assert len(set(expected.argmax(axis=1))) == 2  # the maximum is not always that of one target
    np.testing.assert_allclose(scores.less(*arguments, dimension=None), expected.max(axis=1), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_less_with_projection_is_close_to_the_formula(less_case):
    arguments, expected = less_case
    projected = scores.less(*arguments, dimension=2048)
    assert 0.95 < np.corrcoef(projected, expected.max(axis=1))[0, 1] < 0.9999  # of about 4000 parameters


def test_less_needs_moments(less_case):
    config, base, ((adapter, _), _), *others = less_case[0]
    with pytest.raises(ValueError, match="adam"):
        scores.less(config, base, [(adapter, optax.sgd(1.0).init(adapter))] * 2, *others)


def test_projected_inner_products_are_unbiased():
    """Their mean over projections is exact, with at most the variance of a dense Rademacher matrix. With d ≥ p each is exact."""
    p, d, number = 50, 8, 4000
    a, b = np.random.default_rng(0).normal(size=(2, p)).astype(np.float32)

    def product(key, dimension):
        projection = scores.make_projection(key, p, dimension)
        return scores.project({"x": a[:30].reshape(5, 6), "y": a[30:]}, projection) @ scores.project(b, projection)

    products = np.asarray(jax.jit(jax.vmap(lambda key: product(key, d)))(jax.random.split(jax.random.key(0), number)))
    variance = ((a @ a) * (b @ b) + (a @ b) ** 2 - 2 * (a**2 @ b**2)) / d
    assert abs(products.mean() - a @ b) < 4 * math.sqrt(variance / number)
    assert 0.7 * variance < products.var() < 1.1 * variance
    np.testing.assert_allclose(product(jax.random.key(1), 64), a @ b, rtol=1e-5)


def test_round_robin_by_hand():
    """The second target takes row 1 first, so the first target's second turn skips it; ties go to the first row."""
    score = np.array([[9.0, 0.0], [8.0, 5.0], [7.0, 4.0], [1.0, 4.0], [0.0, 9.0]])
    # Turns: 0 (9), 4 (9), 1 (8), then 1 is taken: 2 (4, before row 3), 3.
    np.testing.assert_array_equal(scores.round_robin(score), [5, 3, 2, 1, 4])
    np.testing.assert_array_equal(scores.round_robin(score[:, :1]), [5, 4, 3, 2, 1])


def test_rds_is_the_cosine_of_weighted_means_of_single_rows(model):
    """Each row alone in the decoder; the weight of a token is its position, from 1."""
    config, base, _ = model
    trusted, given = (examples(config.vocab_size, seed, lengths) for seed, lengths in ((1, LENGTHS[:2]), (2, [*LENGTHS, (4, 0)])))
    apply = jax.jit(lambda *batch: decoder.Decoder(config).apply({"params": base}, *batch))

    def embedding(example):
        tokens = np.concatenate([example.prompt, example.response])
        hidden = np.asarray(apply(pad(tokens)[None], np.arange(LONGEST)[None], np.ones((1, LONGEST), np.int32)))[0, : len(tokens)]
        return np.average(hidden.astype(np.float64), axis=0, weights=np.arange(1, len(tokens) + 1))

    expected = np.array([[cosine(embedding(x), embedding(z)) for z in trusted] for x in given])
    batch = config, base, trusted, given, 2, 64, sharding.make_mesh(1)
    np.testing.assert_allclose(scores.rds(*batch, combine="max"), expected.max(axis=1), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(scores.rds(*batch), scores.round_robin(expected))


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

"""Token choice against NumPy in float64: filters, frequencies, log-probabilities, and the inverse CDF."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from bilevel_jax import token_choice
from bilevel_jax.token_choice import Settings

# --------------------------------------------------------------------------------------------------------------------
# Reference implementations
# --------------------------------------------------------------------------------------------------------------------

FALSE_ALARM = 1e-6  # probability that a chi-square test rejects the right distribution


def distribution(settings: Settings, logits) -> np.ndarray:
    """Probabilities [V] in float64, token by token: the most likely first, until top-k or top-p is full; ties are kept."""
    scaled = np.asarray(logits, np.float64) / settings.temperature
    weight = np.exp(scaled - scaled.max())
    ranked = sorted(range(len(scaled)), key=lambda token: -scaled[token])
    if settings.top_k:
        ranked = [token for token in ranked if scaled[token] >= scaled[ranked[: settings.top_k][-1]]]
    total, members, mass = weight[ranked].sum(), [], 0.0
    for token in ranked:
        if mass >= settings.top_p * total and scaled[token] < scaled[members[-1]]:
            break
        members.append(token)
        mass += weight[token]
    probs = np.zeros(len(scaled))
    probs[members] = weight[members] / mass
    return probs


def log_softmax(logits) -> np.ndarray:
    """Over the last axis, in float64."""
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def p_value(counts, probs) -> float:
    """p-value of Pearson's chi-square test. Outcomes that are expected fewer than five times are pooled."""
    counts, expected = np.asarray(counts, float), np.asarray(probs) * np.sum(counts)
    if counts[expected == 0].any():
        return 0.0
    rare = expected < 5
    counts, expected = np.append(counts[~rare], counts[rare].sum()), np.append(expected[~rare], expected[rare].sum())
    if expected[-1] < 5:  # the pool is still too small: add it to the rarest other outcome
        rarest = np.argmin(expected[:-1])
        for values in (counts, expected):
            values[rarest] += values[-1]
        counts, expected = counts[:-1], expected[:-1]
    return scipy.stats.chisquare(counts, expected).pvalue


def test_chi_square_test():
    """600 throws of a die with squared deviations from 100 that sum to about 1107: chi-square 11.07, the 5% point."""
    deviations = np.array([20, -20, 12, -12, 3, -3])  # 2 · (400 + 144 + 9) = 1106
    assert p_value(100 + deviations, np.full(6, 1 / 6)) == pytest.approx(0.05, abs=1e-3)
    assert p_value([50, 50, 1], [0.5, 0.5, 0]) == 0


# --------------------------------------------------------------------------------------------------------------------
# Filters, frequencies, log-probabilities
# --------------------------------------------------------------------------------------------------------------------

SETTINGS = [
    Settings(),
    Settings(temperature=0.6),
    Settings(temperature=1.7),
    Settings(temperature=0.8, top_k=4),
    Settings(temperature=1.3, top_p=0.8),
    Settings(temperature=1.3, top_k=6, top_p=0.9),
]
EXTREMES = [
    Settings(top_k=1),
    Settings(top_k=39),
    Settings(top_k=40),
    Settings(top_k=1000),
    Settings(top_p=1e-9),
    Settings(top_p=0.9999),
    Settings(temperature=0.01, top_p=0.5),
    Settings(temperature=100.0, top_k=1000, top_p=0.5),
]
LOGITS_5x40 = 2 * np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32)  # rows of logits


@pytest.mark.parametrize("settings", SETTINGS + EXTREMES, ids=str)
def test_filters_equal_numpy(settings):
    filtered = jax.jit(functools.partial(token_choice.filter_logits, settings))(LOGITS_5x40)
    expected = np.array([distribution(settings, row) for row in LOGITS_5x40])
    np.testing.assert_array_equal(np.isfinite(filtered), expected > 0)
    np.testing.assert_allclose(jax.nn.softmax(filtered, axis=-1), expected, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(
    "top_k, top_p, kept",
    [
        (1, 1.0, [1]),
        (2, 1.0, [1, 2, 4]),  # 4 ties with the second
        (3, 1.0, [1, 2, 4]),
        (4, 1.0, [0, 1, 2, 3, 4]),  # 0 and 3 tie for rank 4
        (0, 1.0, [0, 1, 2, 3, 4]),
        (0, 1e-30, [1]),
        (0, 0.39, [1]),
        (0, 0.41, [1, 2, 4]),
        (0, 0.79, [1, 2, 4]),
        (0, 0.81, [0, 1, 2, 3, 4]),
        (3, 0.49, [1]),  # 0.4 of the 0.8 that top-k keeps
        (3, 0.51, [1, 2, 4]),
        (2, 0.51, [1, 2, 4]),  # the same 0.8, since 4 is kept
    ],
)
def test_filters_with_ties(top_k, top_p, kept):
    probs = np.array([0.1, 0.4, 0.2, 0.1, 0.2], np.float32)
    filtered = token_choice.filter_logits(Settings(top_k=top_k, top_p=top_p), jnp.log(probs)[None])[0]
    assert np.flatnonzero(np.isfinite(filtered)).tolist() == kept


LOGITS = np.array([1.1, -0.3, 0.2, 2.0, -1.0, 0.9, 1.5, -0.6, 0.0, 0.5, -2.0, 1.2, 0.7], np.float32)
DRAWS = 20_000


def frequencies(settings: Settings) -> np.ndarray:
    """How often `choose` returns each token of `LOGITS` for `DRAWS` uniform numbers."""
    uniform = np.random.default_rng(1).random(DRAWS, np.float32)
    logits = np.broadcast_to(LOGITS, (DRAWS, len(LOGITS)))
    token, _, _ = jax.jit(functools.partial(token_choice.choose, settings))(logits, uniform)
    return np.bincount(token, minlength=len(LOGITS))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_frequencies_match_the_distribution(settings):
    assert p_value(frequencies(settings), distribution(settings, LOGITS)) > FALSE_ALARM


@pytest.mark.parametrize("settings", SETTINGS[1:], ids=str)
def test_frequencies_reject_wrong_distributions(settings):
    """No temperature, no filters, temperature off by a quarter: the test rejects each of them far below `FALSE_ALARM`."""
    counts = frequencies(settings)
    wrong = [dataclasses.replace(settings, temperature=1.0), dataclasses.replace(settings, top_k=0, top_p=1.0), Settings()]
    wrong += [dataclasses.replace(settings, temperature=1.25 * settings.temperature)]
    for other in wrong:
        if other != settings:
            assert p_value(counts, distribution(other, LOGITS)) < FALSE_ALARM / 1000, other


@pytest.mark.parametrize("settings", SETTINGS + EXTREMES, ids=str)
def test_log_probabilities_of_both_distributions(settings):
    uniform = np.random.default_rng(2).random(len(LOGITS_5x40), np.float32)
    token, plain, sampled = jax.jit(functools.partial(token_choice.choose, settings))(LOGITS_5x40, uniform)
    for row in range(len(LOGITS_5x40)):
        assert plain[row] == pytest.approx(log_softmax(LOGITS_5x40[row])[token[row]], abs=1e-5)
        assert sampled[row] == pytest.approx(np.log(distribution(settings, LOGITS_5x40[row])[token[row]]), abs=1e-4)


def test_temperature_zero_chooses_the_most_likely_token():
    settings = Settings(temperature=0, top_k=3, top_p=0.2)
    for uniform in (0.0, 0.999):
        token, plain, sampled = token_choice.choose(settings, LOGITS_5x40, np.full(len(LOGITS_5x40), uniform, np.float32))
        np.testing.assert_array_equal(token, LOGITS_5x40.argmax(-1))
        np.testing.assert_allclose(plain, log_softmax(LOGITS_5x40).max(-1), rtol=1e-5)
        np.testing.assert_array_equal(sampled, np.zeros(len(LOGITS_5x40)))


# --------------------------------------------------------------------------------------------------------------------
# Inverse CDF
# --------------------------------------------------------------------------------------------------------------------

WIDTHS = [1, 2, 5, 127, 128, 129, 300, 1000, 4096]
NEAR_ONE = np.float32(1 - 2**-24)  # the largest below 1


def searchsorted(weight, uniform) -> np.ndarray:
    """The first index whose cumulative weight exceeds uniform · total, in float64."""
    cumulative = np.cumsum(weight, dtype=np.float64)
    return np.searchsorted(cumulative, np.float64(uniform) * cumulative[-1], side="right")


@pytest.mark.parametrize("size", WIDTHS)
def test_inverse_cdf_is_exact(size):
    """Integer weights and multiples of 2^-10 make every sum and product exact in float32. Half of the weights are zero."""
    rng = np.random.default_rng(size)
    rows = 2000
    weight = (rng.integers(1, 8, (rows, size)) * (rng.random((rows, size)) < 0.5)).astype(np.float32)
    weight[:, rng.integers(size)] = 3  # at least one is possible
    uniform = rng.integers(0, 1024, rows).astype(np.float32) / 1024
    index = jax.jit(token_choice.inverse_cdf)(weight, uniform)
    np.testing.assert_array_equal(index, [searchsorted(w, u) for w, u in zip(weight, uniform)])


@pytest.mark.parametrize("size", WIDTHS)
def test_inverse_cdf_is_correct_up_to_rounding(size):
    rng = np.random.default_rng(size)
    weight, uniform = rng.exponential(size=(500, size)).astype(np.float32), rng.random(500, np.float32)
    index = np.asarray(jax.jit(token_choice.inverse_cdf)(weight, uniform))
    cumulative = np.cumsum(weight, axis=-1, dtype=np.float64) / weight.sum(axis=-1, keepdims=True, dtype=np.float64)
    rows = np.arange(500)
    assert (uniform <= cumulative[rows, index] + 1e-5).all()
    assert (uniform >= np.where(index > 0, cumulative[rows, index - 1], 0) - 1e-5).all()


@pytest.mark.parametrize("size", WIDTHS)
def test_ends_of_the_uniform_interval_give_possible_tokens(size):
    """Zero weight at both ends, which u = 0 and u -> 1 select, and a single possible token at any index."""
    rng = np.random.default_rng(size)
    first = rng.integers(0, size, 400)
    last = np.minimum(size - 1, first + rng.integers(0, size, 400))
    inside = (np.arange(size) >= first[:, None]) & (np.arange(size) <= last[:, None])
    weight = np.where(inside, rng.exponential(size=(400, size)), 0).astype(np.float32)
    invert = jax.jit(token_choice.inverse_cdf)
    np.testing.assert_array_equal(invert(weight, np.zeros(400, np.float32)), first)
    highest = np.asarray(invert(weight, np.full(400, NEAR_ONE)))
    assert (weight[np.arange(400), highest] > 0).all()
    single = np.eye(size, dtype=np.float32)[first] * np.float32(1e-6)
    for uniform in (0.0, 0.5, NEAR_ONE):
        np.testing.assert_array_equal(invert(single, np.full(400, uniform, np.float32)), first)

"""Response weights against float64 NumPy, masks against integers and brute force, refreshes with a model that is made up."""

import dataclasses
import fractions
import hashlib
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax import config as configuration
from bilevel_jax import errors, importance, online, sampling
from bilevel_jax.data import shuffle
from bilevel_jax.runtime import response_log, response_metrics
from experiments.didactic import objectives

# --------------------------------------------------------------------------------------------------------------------
# Response weights
# --------------------------------------------------------------------------------------------------------------------

weights = jax.jit(importance.response_weights, static_argnums=(0, 5))
QUESTIONS = np.array([3, 0, 5, 3, 9, 0, 3, 5, 9, 3, 0, 9], np.int32)  # interleaved, of one to four responses
FROM_DATA = (2, 5, 8, 11)  # two of them share a number with a question, as preference pairs might
KINDS = pytest.mark.parametrize("kind", importance.RESPONSE_WEIGHTS)


def entries(seed, spread=1.0, start=-40.0):
    """log π_θ, log π_old, lengths and groups of a dozen responses, as float32 and int32."""
    rng = np.random.default_rng(seed)
    log_prob = start + rng.normal(0, 3 * spread, 12)
    old = log_prob - rng.normal(0, spread, 12)
    old[list(FROM_DATA)] = np.nan
    return np.float32(log_prob), np.float32(old), rng.integers(1, 60, 12).astype(np.int32), QUESTIONS


def by_hand(kind, log_prob, old, length, group, clip):
    log_prob, old = np.float64(log_prob), np.float64(old)
    own = [e for e in range(len(old)) if not np.isnan(old[e])]
    result = np.ones(len(old))
    for e in own:
        if kind == "sequence":
            result[e] = min(math.exp(log_prob[e] - old[e]), clip)
        elif kind == "geometric":
            result[e] = min(math.exp(log_prob[e] - old[e]) ** (1 / length[e]), clip)
        elif kind == "softmax":
            rivals = [f for f in own if group[f] == group[e]]
            result[e] = len(rivals) / sum(math.exp(log_prob[f] - log_prob[e]) for f in rivals)
    return result


@KINDS
@pytest.mark.parametrize("seed, spread, start", [(0, 1.0, -40.0), (1, 0.1, -2.0), (2, 4.0, -900.0)])
def test_response_weights(kind, seed, spread, start):
    """The last case is one of long responses, whose probabilities are 0 in float32 and float64 alike."""
    result = weights(kind, *entries(seed, spread, start), 1.7)
    np.testing.assert_allclose(result, by_hand(kind, *entries(seed, spread, start), 1.7), rtol=2e-5)
    assert (np.asarray(result)[list(FROM_DATA)] == 1).all()


@pytest.mark.parametrize("clip", [1.0, 2.0, 2.45, 3.68, 4.67, 10.0])
@pytest.mark.parametrize("kind", ["sequence", "geometric"])
def test_clipped_ratios_are_the_clip_itself(kind, clip):
    """The share of clipped ratios is counted by comparing with it, and exp(log 3.68) is less than 3.68 in float32."""
    log_prob, old, length, group = entries(0)
    old[0], old[1], length[:2] = log_prob[0] - 1000, log_prob[1] + 1000, 3
    result = np.asarray(weights(kind, log_prob, old, length, group, clip))
    assert result[0] == np.float32(clip) == result.max() and result[1] < 1e-30


def test_lemma_6():
    """λ_{i,g} = exp(-L_g) / Σ_g' exp(-L_g') with L the summed NLL; π_old has no part in it; and r^g · π_old^g ∝ λ_{i,g}."""
    log_prob, old, length, group = entries(3, start=-5.0)
    own = ~np.isnan(old)
    result = np.asarray(weights("softmax", log_prob, old, length, group, 2.0))
    ratio = np.float64(weights("sequence", log_prob, old, length, group, 1e9))
    for question in np.unique(group[own]):
        mine = own & (group == question)
        likelihood = np.exp(np.float64(log_prob[mine]))
        lemma = likelihood / likelihood.sum()
        np.testing.assert_allclose(result[mine] / mine.sum(), lemma, rtol=1e-5)
        factor = ratio[mine] * np.exp(np.float64(old[mine])) / lemma
        np.testing.assert_allclose(factor, factor[0], rtol=1e-5)
    np.testing.assert_array_equal(weights("softmax", log_prob, old - 7, length, group, 2.0), result)


def test_softmax_has_mean_one_and_is_one_where_there_is_no_choice():
    log_prob, old, length, group = entries(4)
    own = ~np.isnan(old)
    result = np.asarray(weights("softmax", log_prob, old, length, group, 2.0))
    sizes = {question: (own & (group == question)).sum() for question in group}
    assert sorted(sizes.values()) == [1, 1, 2, 4]
    for question, size in sizes.items():
        mine = result[own & (group == question)]
        np.testing.assert_allclose(mine.mean(), 1, rtol=1e-5)
        assert size > 1 or mine == 1  # exactly
    alone = weights("softmax", log_prob, old, length, np.arange(12, dtype=np.int32)[::-1], 2.0)
    np.testing.assert_array_equal(alone, np.ones(12))


@KINDS
def test_nothing_is_nan(kind):
    """Not for responses of the data, for ones in another micro-batch, whose log π_θ is taken for 0, nor for hopeless ones."""
    nan = np.nan
    log_prob = np.float32([0, -5000, -4, 0, -7, -9000])
    old = np.float32([-5000, 0, nan, nan, -7, -9100])
    length, group = np.array([40, 900, 3, 0, 1, 0], np.int32), np.array([0, 0, 6, 6, 1, 1], np.int32)
    with jax.debug_nans(True):
        result = np.asarray(weights(kind, log_prob, old, length, group, 2.0))
    assert (result >= 0).all() and (result <= 2).all() and (result[2:4] == 1).all()


# --------------------------------------------------------------------------------------------------------------------
# Masks
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [1, 7, 100, 1999])
def test_size_of_the_mask(num_rows):
    """⌊R·N⌋ where a product of floats falls short of it: 0.29 · 100 is 28.999..."""
    logits = np.random.default_rng(0).normal(size=num_rows)
    for percent in range(101):
        for given in (None, logits):
            result = online.masked_rows(given, num_rows, percent / 100, seed=1)
            assert len(result) == math.floor(fractions.Fraction(percent, 100) * num_rows)
            assert (np.diff(result) > 0).all() and ((result >= 0) & (result < num_rows)).all()


@pytest.mark.parametrize("seed", range(3))
def test_dynamic_masks_hold_the_smallest_weights(seed):
    logits = np.random.default_rng(seed).normal(size=50).astype(np.float32)
    result = online.masked_rows(logits, 50, 0.3, seed)
    assert set(result) == {i for i in range(50) if sum(logits < logits[i]) < 15}


def test_rows_of_equal_weight_are_taken_at_random():
    """The tied ones of the 40 seeds: none always, none never; the order in which rows are stored says nothing about them."""
    logits = np.float32([2, 0, 1, 0, 1, 1, 3, 1, 1, 2])  # two at 0, five at 1, of which a mask of half takes three
    tied = np.flatnonzero(logits == 1)
    masks = [online.masked_rows(logits, 10, 0.5, seed) for seed in range(200)]
    assert all(set(mask) >= {1, 3} and set(mask) <= {1, 3, *tied} for mask in masks)
    times = np.array([sum(i in mask for mask in masks) for i in tied])
    assert (abs(times - 120) < 5 * math.sqrt(200 * 0.6 * 0.4)).all()  # five standard deviations
    again = [online.masked_rows(logits, 10, 0.5, seed) for seed in range(200)]
    assert [*map(list, masks)] == [*map(list, again)]


@pytest.mark.parametrize("kinds", [2, 5, 1000])
def test_the_smallest_are_the_first_of_a_stable_sort(kinds):
    """With many ties, with few, and at every number."""
    values = np.random.default_rng(kinds).integers(kinds, size=60).astype(np.float32)
    for number in range(1, 61):
        expected = sorted(range(60), key=lambda i: (values[i], i))[:number]
        assert sorted(online.smallest(values, number)) == sorted(expected)


def test_nothing_is_masked_while_all_weights_are_equal():
    """But for R = 1, where no row is chosen before another, and from the first difference on."""
    for value in (0.0, 1.5):
        equal = np.full(10, value, np.float32)
        assert online.masked_rows(equal, 10, 0.5, 0).tolist() == []
        assert online.masked_rows(equal, 10, 1.0, 0).tolist() == list(range(10))
        equal[7] = np.nextafter(np.float32(value), np.float32(-1))
        assert online.masked_rows(equal, 10, 0.1, 0).tolist() == [7]
        assert len(online.masked_rows(equal, 10, 0.5, 0)) == 5


def test_fixed_masks_are_random_and_follow_from_the_seed():
    masks = [online.masked_rows(None, 60, 0.25, seed) for seed in range(200)]
    times = np.bincount(np.concatenate(masks), minlength=60)
    assert (abs(times - 50) < 5 * math.sqrt(200 * 0.25 * 0.75)).all()
    for seed, mask in enumerate(masks[:20]):
        np.testing.assert_array_equal(mask, online.masked_rows(None, 60, 0.25, seed))
        assert set(mask) != set(shuffle.lower_rows(seed, 60, 15, 0))  # the mask is not what comes first


@pytest.mark.parametrize("number", [0, 1, 5, 19, 20])
def test_factors_of_equation_7(number):
    """1/N Σ factor_i x_i is the mean of x over the masked rows plus that over the others, or one of them without the other."""
    rng = np.random.default_rng(number)
    masked, x = rng.permutation(20) < number, rng.normal(size=20)
    printed = sum(x[rows].mean() for rows in (masked, ~masked) if rows.any())
    assert np.mean(online.row_factors(masked) * x) == pytest.approx(printed, rel=1e-6)


@pytest.mark.parametrize("size, batch, first, last", [(21, 4, 0, 1), (21, 4, 3, 9), (21, 4, 5, 6), (8, 8, 2, 3), (9, 2, 1, 5)])
def test_visited_rows(size, batch, first, last):
    """Across the end of an epoch, and with a last batch that is smaller."""
    seen = {int(row) for k in range(first, last) for row in shuffle.lower_rows(5, size, batch, k)}
    assert online.visited_rows(5, size, batch, first, last).tolist() == sorted(seen)


@pytest.mark.parametrize(
    "step, start, num_steps, every, generate, enough",
    [
        (-1, 9, 20, 30, "needed", True),  # nothing is generated
        (5, 8, 20, 5, "needed", True),  # the next refresh, at 10, is in time
        (5, 8, 20, 6, "needed", False),  # responses for the steps 5 to 9, but the next refresh is at 11
        (5, 10, 20, 6, "needed", False),
        (5, 5, 20, 6, "needed", True),  # step 5 refreshes again
        (5, 8, 10, 6, "needed", True),  # no more epochs
        (5, 8, 20, 6, "all", True),  # every masked question has its responses
    ],
)
def test_responses_for_more_epochs(step, start, num_steps, every, generate, enough):
    """The run had 10 steps, and its last refresh was at `step`."""
    config = configuration.Online(refresh_every=every, generate=generate)
    store = online.from_arrays(online.empty(4).arrays() | {"step": [step]})
    assert online.covers_remaining_steps(store, config, 10, num_steps, start) == enough


# --------------------------------------------------------------------------------------------------------------------
# Responses
# --------------------------------------------------------------------------------------------------------------------


def int32(*tokens):
    return np.array(tokens, np.int32)


def some(step=8):
    """Two responses to row 4, one to row 1; one of the three was used."""
    return online.ResponseStore(
        step=step,
        masked=np.array([False, True, True, False, True]),
        row_index=np.array([1, 4, 4]),
        sample_index=np.array([1, 0, 1]),
        tokens=[int32(7, 8, 2), int32(9), int32(7, 7)],
        log_prob=np.array([-1.5, -1 / 3, -700.0]),
        log_ratio=np.array([np.nan, 0.25, np.nan]),
    )


def judged():
    return dataclasses.replace(some(), reward=np.array([0.5, -2.0, 1e9]), reference=np.array([-1.0, -2.0, -700.5]))


@pytest.mark.parametrize("own", [some(), judged(), online.empty(5)], ids=["some", "judged", "none"])
def test_arrays_hold_everything(own):
    arrays = own.arrays()
    assert all(array.size for array in arrays.values())  # an empty one could not be saved
    result = online.from_arrays(arrays)
    assert result.step == own.step
    for name in ("masked", "row_index", "sample_index", "log_prob", "log_ratio"):
        np.testing.assert_array_equal(getattr(result, name), getattr(own, name))
        assert getattr(result, name).dtype == getattr(own, name).dtype
    for name in ("reward", "reference"):  # None where there are none
        np.testing.assert_array_equal(getattr(result, name), getattr(own, name))
    assert [list(tokens) for tokens in result.tokens] == [list(tokens) for tokens in own.tokens]
    assert all(tokens.dtype == np.int32 for tokens in result.tokens)


def test_arrays_stay_as_they_were():
    """A checkpoint is written in the background while ratios go on being noted."""
    own = some()
    arrays = own.arrays()
    own.log_ratio[:] = 9.0
    own.masked[:] = True
    np.testing.assert_array_equal(arrays["log_ratio"], [np.nan, 0.25, np.nan])
    assert arrays["masked"].tolist() == [False, True, True, False, True]
    online.from_arrays(arrays).log_ratio[0] = 1.0  # and what is restored may be written to
    assert np.isnan(arrays["log_ratio"][0])


def test_nothing_yet_masks_nothing():
    own = online.empty(3)
    assert own.step < 0 and own.masked.tolist() == [False] * 3
    assert online.response_segments(own, 1, int32(5), 0.25, 6) == []


def segments(*args, **options):
    """Without their places."""
    return [segment for _, segment in online.response_segments(*args, **options)]


REWARDED = dataclasses.replace(
    some(),
    row_index=np.array([4, 1, 4, 4, 4, 1]),
    sample_index=np.array([0, 0, 1, 2, 3, 1]),
    tokens=[int32(*[7] * n) for n in (3, 1, 2, 5, 4, 1)],
    log_prob=np.array([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]),
    log_ratio=np.full(6, np.nan),
    reward=np.array([0.5, 1.0, 2.0, -1.0, 2.0, 1.0]),
    reference=np.array([-1.5, -2.5, -3.5, -4.5, -5.5, -6.5]),
)


@pytest.mark.parametrize("objective", ["rwr", "reinforce"])
def test_rewards_travel_with_all_responses(objective):
    result = online.response_segments(REWARDED, 4, int32(3, 3), 0.5, 6, objective)
    assert [index for index, _ in result] == [0, 2, 3, 4]
    assert [(s.share, s.reward, s.sign, s.old_log_prob) for _, s in result] == [
        (0.125, 0.5, 0, -1.0),
        (0.125, 2.0, 0, -3.0),
        (0.125, -1.0, 0, -4.0),
        (0.125, 2.0, 0, -5.0),
    ]


def test_the_best_stands_for_all():
    """And the first of equals, as `objectives.best_of` has it, which gives it the weight of all G."""
    [(index, segment)] = online.response_segments(REWARDED, 4, int32(3, 3), 0.5, 6, "best_of")
    assert (index, segment.share, segment.sign, list(segment.response)) == (2, 0.5, 0, [7, 7]) and np.isnan(segment.reward)
    [(index, _)] = online.response_segments(REWARDED, 1, int32(3, 3), 0.5, 6, "best_of")
    assert index == 1
    weight = objectives.best_of(jnp.asarray(REWARDED.reward), jnp.asarray(REWARDED.row_index))
    assert np.flatnonzero(weight).tolist() == [1, 2]


@pytest.mark.parametrize("objective", ["dpo", "ipo"])
def test_the_best_against_the_worst(objective):
    """The pair of `objectives.best_against_worst`, each with its reference and the whole share; none of equals, nor of two that
    do not fit together."""
    prompt, sign = int32(3, 3), objectives.best_against_worst(jnp.asarray(REWARDED.reward), jnp.asarray(REWARDED.row_index))
    result = online.response_segments(REWARDED, 4, prompt, 0.5, 6, objective, max_pair_tokens=2 * 2 + 2 + 5)
    assert [(index, s.share, s.sign, s.reference, s.group) for index, s in result] == [(2, 0.5, 1, -3.5, 6), (3, 0.5, -1, -4.5, 6)]
    assert [int(sign[index]) for index, _ in result] == [1, -1] and np.abs(sign).sum() == 2
    [(index, segment)] = online.response_segments(REWARDED, 1, prompt, 0.5, 6, objective, max_pair_tokens=1)  # there is no pair
    assert (index, segment.share, segment.sign, segment.old_log_prob) == (1, 0.5, 0, REWARDED.log_prob[1])
    assert online.response_segments(REWARDED, 4, prompt, 0.5, 6, objective, 2 * 2 + 2 + 5 - 1) == []  # that of the data is used
    rounded = dataclasses.replace(REWARDED, reward=np.array([0.5, 1.0, 2.0, -1.0, 2.0, 1.0 - 1e-7]))  # of one and the same text
    assert [index for index, _ in online.response_segments(rounded, 1, prompt, 0.5, 6, objective, 100)] == [1]


def test_responses_to_one_question_divide_its_share():
    own, prompt = some(), int32(3, 3)
    assert [index for index, _ in online.response_segments(own, 4, prompt, 0.25, group=6)] == [1, 2]
    two = segments(own, 4, prompt, 0.25, group=6)
    assert [(s.row_index, s.share, s.group, s.sign, s.old_log_prob) for s in two] == [
        (4, 0.125, 6, 0, -1 / 3),
        (4, 0.125, 6, 0, -700.0),
    ]
    assert [list(s.response) for s in two] == [[9], [7, 7]] and all(s.prompt is prompt for s in two)
    assert all(s.earlier == () for s in two)  # of a conversation, the generated answer alone is learned
    (one,) = segments(own, 1, prompt, 0.25, group=7)  # its other response had no words
    assert (one.share, one.group, one.old_log_prob, list(one.response)) == (0.25, 7, -1.5, [7, 8, 2])
    assert online.response_segments(own, 2, prompt, 0.25, group=8) == []  # masked, but without an answer


# --------------------------------------------------------------------------------------------------------------------
# Refresh
# --------------------------------------------------------------------------------------------------------------------

NUM_ROWS, EOS = 8, 2
IDS = [f"row-{i}" for i in range(NUM_ROWS)]
PROMPTS = [int32(*[10 + i] * (i + 1)) for i in range(NUM_ROWS)]
EXAMPLES = [types.SimpleNamespace(prompt=prompt) for prompt in PROMPTS]
SPOKEN = {0: "", 1: " \n", 10: "yes", 11: "no"}


def say(tokens):
    return "".join(SPOKEN[int(token)] for token in tokens)


def answer(*tokens, reason="stop"):
    """A response with the EOS where it ended by itself; log-probabilities that nobody should look at."""
    log_probs = np.full(len(tokens) + (reason == "stop"), np.nan)
    return sampling.Response(int32(*tokens), EOS if reason == "stop" else None, log_probs, log_probs, reason)


class Model:
    """Says for each question what is written for it, and remembers what it was asked and what it scored."""

    def __init__(self, answers=None, stop_after=None):
        self.answers, self.asked, self.scored, self.stop_after = answers or {}, [], [], stop_after

    def stopped(self):
        return self.stop_after is not None and len(self.asked) > self.stop_after

    def sample(self, base, adapter, prompts, keys, description, stopped):
        assert (base, adapter) == ("base", "adapter") and len(prompts) == len(keys)
        rows = [len(prompt) - 1 for prompt in prompts]
        assert all(prompt is PROMPTS[row] for prompt, row in zip(prompts, rows))
        self.asked.append((rows, keys))
        default = [answer(10), answer(11, 10, reason="length")][: keys.shape[1]]
        return None if stopped() else [self.answers.get(row, default) for row in rows]

    def score(self, base, adapter, segments, description):
        assert (base, adapter) == ("base", "adapter")
        self.scored.append([(len(s.prompt) - 1, tuple(s.response)) for s in segments])
        return np.array([self.nll(*scored) for scored in self.scored[-1]]), np.array([len(s.response) for s in segments])

    @staticmethod
    def nll(row, response):
        return 100.0 * row + sum(response)

    def refresh(self, masked, visited, generate="needed", num_samples=2, step=6, seed=3):
        generator = online.Generator(self.sample, self.score, say, IDS, EXAMPLES, seed, num_samples)
        go = online.make_refresh(generator, generate)
        return go("base", "adapter", step, np.array(masked, np.int64), np.array(visited, np.int64), self.stopped)


def rows_asked(model):
    return [rows for rows, _ in model.asked]


MASKED, VISITED = [1, 2, 4, 6], [0, 2, 3, 6, 7]


def test_asks_what_is_masked_and_will_be_visited():
    model = Model()
    own, produced = model.refresh(MASKED, VISITED)
    assert rows_asked(model) == [[2, 6]]
    assert own.step == 6 and np.flatnonzero(own.masked).tolist() == MASKED and len(own.masked) == NUM_ROWS
    assert own.row_index.tolist() == [2, 2, 6, 6] and own.sample_index.tolist() == [0, 1, 0, 1]
    assert [list(tokens) for tokens in own.tokens] == [[10, EOS], [11, 10]] * 2
    assert np.isnan(own.log_ratio).all()
    expected = [(2, 0, "yes"), (2, 1, "noyes"), (6, 0, "yes"), (6, 1, "noyes")]
    assert [(one.row_index, one.sample_index, one.text) for one in produced] == expected


def test_all_asks_the_needed_ones_first_and_by_themselves():
    """So that these are computed exactly as `needed` computes them."""
    needed, every = Model(), Model()
    own, _ = needed.refresh(MASKED, VISITED)
    more, produced = every.refresh(MASKED, VISITED, "all")
    assert rows_asked(every) == [[2, 6], [1, 4]] and len(produced) == 8
    np.testing.assert_array_equal(every.asked[0][1], needed.asked[0][1])
    assert every.scored[0] == needed.scored[0]
    assert more.row_index.tolist() == [2, 2, 6, 6, 1, 1, 4, 4] and more.sample_index.tolist() == [0, 1] * 4
    np.testing.assert_array_equal(more.log_prob[:4], own.log_prob)
    assert {row: more.by_row[row] for row in (2, 6)} == own.by_row


@pytest.mark.parametrize(
    "masked, visited, generate, expected",
    [
        ([], VISITED, "needed", []),
        ([], VISITED, "all", []),
        ([1, 4], VISITED, "needed", []),
        ([1, 4], VISITED, "all", [[1, 4]]),
        ([0, 7], VISITED, "all", [[0, 7]]),
    ],
)
def test_nothing_is_asked_in_vain(masked, visited, generate, expected):
    model = Model()
    own, produced = model.refresh(masked, visited, generate)
    assert rows_asked(model) == expected and len(model.scored) == len(expected)
    assert np.flatnonzero(own.masked).tolist() == masked
    assert len(produced) == len(own.row_index) == len(own.tokens) == len(own.log_prob) == sum(map(len, expected)) * 2


@pytest.mark.parametrize("step, seed, num_samples", [(6, 3, 2), (7, 3, 2), (6, 4, 2), (6, 3, 1)])
def test_randomness_is_that_of_seed_row_step_and_sample(step, seed, num_samples):
    """The first eight bytes of SHA-256, whatever else is asked beside the row."""
    for generate in online.GENERATE:
        model = Model()
        model.refresh(MASKED, VISITED, generate, num_samples, step, seed)
        for rows, keys in model.asked:
            for row, key in zip(rows, keys, strict=True):
                texts = [f"{seed}/row-{row}/{step}/{g}".encode() for g in range(num_samples)]
                expected = [np.frombuffer(hashlib.sha256(text).digest()[:8], "<u4") for text in texts]
                np.testing.assert_array_equal(key, expected)


def test_old_log_probabilities_are_those_of_the_training_forward():
    """Of question and whole response with its EOS, and not what decoding came to."""
    model = Model({2: [answer(11), answer(10, 10)]})
    own, _ = model.refresh([2, 6], [2, 6])
    assert model.scored == [[(2, (11, EOS)), (2, (10, 10, EOS)), (6, (10, EOS)), (6, (11, 10))]]
    np.testing.assert_array_equal(own.log_prob, [-213, -222, -612, -621])


def test_responses_without_words_are_dropped():
    """An EOS at once, and blanks. A question without any keeps the response of the data; one with fewer keeps its share."""
    model = Model({2: [answer(), answer(1, 0, reason="length")], 4: [answer(1), answer(10)]})
    own, produced = model.refresh([2, 4, 6], range(NUM_ROWS))
    assert own.row_index.tolist() == [4, 6, 6] and own.sample_index.tolist() == [1, 0, 1]
    assert len(produced) == 6 and [one.text for one in produced[:4]] == ["", " \n", " \n", "yes"]
    np.testing.assert_array_equal(own.log_prob, [-412, -612, -621])  # each of its own
    assert own.masked[2] and online.response_segments(own, 2, PROMPTS[2], 0.5, 9) == []
    assert [s.share for s in segments(own, 4, PROMPTS[4], 0.5, 9)] == [0.5]
    assert [s.share for s in segments(own, 6, PROMPTS[6], 0.5, 9)] == [0.25, 0.25]


def test_nobody_has_words():
    model = Model({row: [answer(), answer(0)] for row in range(NUM_ROWS)})
    own, produced = model.refresh([2, 4], [2, 4])
    assert len(produced) == 4 and len(own.row_index) == 0 and model.scored == []
    assert online.from_arrays(own.arrays()).masked.tolist() == own.masked.tolist()


def test_rewards_and_references_of_what_is_kept():
    """Judged once, all together, after the scoring that both need; the reference is the base without its adapter."""
    model, judged = Model({2: [answer(), answer(10)]}), []

    def judge(produced, log_prob):
        judged.append(([(one.row_index, one.sample_index, one.text) for one in produced], log_prob))
        return np.arange(len(produced), dtype=np.float64)

    def score(base, adapter, segments, description):
        if adapter is None:
            return np.array([1000.0 + Model.nll(len(s.prompt) - 1, s.response) for s in segments]), None
        return model.score(base, adapter, segments, description)

    generator = online.Generator(model.sample, score, say, IDS, EXAMPLES, 3, 2, paired=True)
    go = online.make_refresh(generator, "all", judge)
    own, _ = go("base", "adapter", 6, np.array([2, 4, 6]), np.array([2, 6]), model.stopped)
    [(texts, log_prob)] = judged
    assert texts == [(2, 1, "yes"), (6, 0, "yes"), (6, 1, "noyes"), (4, 0, "yes"), (4, 1, "noyes")]
    np.testing.assert_array_equal(log_prob, own.log_prob)
    np.testing.assert_array_equal(own.reward, range(5))
    np.testing.assert_array_equal(own.reference, own.log_prob - 1000)
    nothing, _ = go("base", "adapter", 6, np.array([], int), np.array([2]), model.stopped)
    assert nothing.reward is None and nothing.reference is None and len(judged) == 1


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_answers_without_a_probability_stop_the_run(broken, monkeypatch):
    """A model that has come apart is found out before its answers are trained on."""
    monkeypatch.setattr(Model, "nll", staticmethod(lambda row, response: broken if row == 6 else 1.0))
    with pytest.raises(errors.RunError, match="^step 6: .*row-6"):
        Model().refresh(MASKED, VISITED)


@pytest.mark.parametrize("stop_after", [0, 1])
def test_a_stop_ends_it_without_a_result(stop_after):
    """At once: what was asked before is not scored any more after it, nor is the rest asked."""
    model = Model(stop_after=stop_after)
    assert model.refresh(MASKED, VISITED, "all") is None
    assert len(model.asked) == stop_after + 1 and len(model.scored) == stop_after


# --------------------------------------------------------------------------------------------------------------------
# What is told about it
# --------------------------------------------------------------------------------------------------------------------


def test_group_ess():
    weight = np.float32([1, 2, 1, 0, 1, 2, 0, 3, 0])
    group = np.array([5, 7, 5, 8, 3, 7, 8, 7, 5])
    # Group 3 has one response, which says nothing. 5: {1, 1, 0}, 7: {2, 2, 3}, 8: {0, 0}.
    assert sorted(response_metrics.group_ess(weight, group)) == pytest.approx(sorted([4 / (3 * 2), 49 / (3 * 17), 0.0]))
    assert response_metrics.group_ess(weight[:1], group[:1]) == []


def test_ratio_measures():
    """Percentiles between the values: 0.5 + 0.1 · 0.5 and 1 + 0.9 · 3."""
    result = response_metrics.ratio_metrics(np.log([4, 0.5, 1]), [np.array([True, False]), np.array([False])], [0.5, 1.0])
    assert result == pytest.approx(
        {
            "online/ratio_mean": 5.5 / 3,
            "online/ratio_p05": 0.55,
            "online/ratio_p50": 1.0,
            "online/ratio_p95": 3.7,
            "online/clip_fraction": 1 / 3,
            "online/ess": 0.75,
        }
    )
    few = response_metrics.ratio_metrics(np.array([2000.0, 0.0]), [], [])  # JSON has no infinity
    assert few.keys() == {"online/ratio_mean", "online/ratio_p05", "online/ratio_p50", "online/ratio_p95"}
    assert all(math.isfinite(value) for value in few.values())


def tell(bad, truths):
    """Rows 2, 4 and 6 are masked; 2 answers nothing and the truth, 4 blanks and something else, 6 twice the same."""
    answers = {2: [answer(), answer(10)], 4: [answer(1), answer(10, 11)], 6: [answer(11, reason="length")] * 2}
    own, produced = Model(answers).refresh([2, 4, 6], range(NUM_ROWS))
    return response_metrics.refresh_metrics(own, produced, bad, truths)


def test_refresh_measures():
    bad = np.array([False, False, True, True, True, False, False, False])
    truths = [None, None, " yes ", "yes", "no", None, "no", None]
    assert tell(bad, truths) == pytest.approx(
        {
            "online/masked": 3,
            "online/responses": 6,
            "online/response_length": (0 + 1 + 1 + 2 + 1 + 1) / 6,  # tokens without the EOS
            "online/eos_rate": 4 / 6,
            "online/empty": 2 / 6,
            "online/masked_bad": 2 / 3,
            "online/bad_answered": 4,  # both answers to rows 2 and 4
            "online/bad_right": 1,  # row 6 is right too, but was not bad
            "online/correction_rate": 1 / 4,
        }
    )
    assert tell(bad, [None] * 4 + ["yesno"] + [None] * 3)["online/correction_rate"] == 1 / 2  # the truth of row 2 is not known


def test_measures_of_rewards():
    """Rows 2 and 4 answer right and wrong, 6 wrong twice, 3 without a known truth; the right one wins in row 2 alone."""
    answers = {2: [answer(10), answer(11)], 4: [answer(10), answer(11)], 6: [answer(11)] * 2, 3: [answer(10), answer(11)]}
    own, produced = Model(answers).refresh([2, 3, 4, 6], range(NUM_ROWS))
    own = dataclasses.replace(own, reward=np.array([3.0, 1.0, 0.0, 0.5, 0.0, 2.0, 7.0, 7.0]))
    assert own.row_index.tolist() == [2, 2, 3, 3, 4, 4, 6, 6]
    result = response_metrics.refresh_metrics(own, produced, None, [None, None, "yes", None, "yes ", None, "yes", None])
    assert {key: value for key, value in result.items() if "reward" in key or "right" in key} == pytest.approx(
        {
            "online/reward": 20.5 / 8,
            "online/reward_gap": (2 + 0.5 + 2 + 0) / 4,
            "online/reward_ties": 1 / 4,
            "online/right": 2 / 6,
            "online/best_right": 1 / 3,
        }
    )


def test_counts_of_all_refreshes():
    """Another chance is counted over all answers: 0 of 2 and 6 of 6 are 6 of 8, not one half."""
    totals = {}
    for responses, answered, right in ((6, 2, 0), (5, 0, 0), (9, 6, 6), (0, 0, 0)):
        values = {"online/masked": 3.0, "online/responses": float(responses)}
        if answered:
            values |= {"online/bad_answered": answered, "online/bad_right": right, "online/correction_rate": right / answered}
        totals = response_metrics.add_counts(totals, values)
    assert totals == {
        "online/responses": 20,
        "online/bad_answered": 8,
        "online/bad_right": 6,
        "online/correction_rate": 3 / 4,
    }
    assert "online/correction_rate" not in response_metrics.add_counts({}, {"online/responses": 2.0})


@pytest.mark.parametrize("bad", [None, np.zeros(NUM_ROWS, bool)], ids=["unknown", "none"])
def test_measures_without_bad_rows(bad):
    result = tell(bad, ["yes"] * NUM_ROWS)
    assert "online/correction_rate" not in result
    assert result.get("online/masked_bad") == (None if bad is None else 0.0)


def test_measures_of_an_empty_mask():
    own, produced = Model().refresh([], VISITED)
    result = response_metrics.refresh_metrics(own, produced, np.ones(NUM_ROWS, bool), ["yes"] * NUM_ROWS)
    assert result == {"online/masked": 0, "online/responses": 0}


# --------------------------------------------------------------------------------------------------------------------
# The record
# --------------------------------------------------------------------------------------------------------------------

LETTERS = {2: "", 7: "Grüße ☃", 8: "\u2028\x85\n", 9: '"'}  # some of these end a line for `str.splitlines`


def spell(tokens):
    return "".join(LETTERS[int(token)] for token in tokens)


def write(log, store):
    log.write(store, IDS, spell, eos=(2,))


def recorded(file):
    """Lines as JSON ends them."""
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]


def test_what_is_recorded(tmp_path):
    log = response_log.ResponseLog(tmp_path / "responses.jsonl", 0, 4)
    own = some()
    own.log_ratio[2] = 5000.0
    write(log, own)
    log.close()
    result = recorded(tmp_path / "responses.jsonl")
    assert [list(line) for line in result] == [["step", "id", "sample", "text", "logprob", "ratio", "finish_reason"]] * 3
    first = {"step": 8, "id": "row-1", "sample": 1, "text": "Grüße ☃\u2028\x85\n", "logprob": -1.5, "ratio": None}
    assert result[0] == first | {"finish_reason": "stop"}
    second = {"id": "row-4", "sample": 0, "text": '"', "logprob": -1 / 3, "ratio": math.exp(0.25), "finish_reason": "length"}
    assert result[1] == first | second
    assert result[2]["ratio"] > 1e30 and math.isfinite(result[2]["ratio"])


def test_rewards_are_recorded(tmp_path):
    log = response_log.ResponseLog(tmp_path / "responses.jsonl", 0, 4)
    write(log, judged())
    log.close()
    assert [line["reward"] for line in recorded(tmp_path / "responses.jsonl")] == [0.5, -2.0, 1e9]


def advance(log, first, last, every, num_steps):
    """A run from step `first`: at each refresh the responses of the one before go out of use, at the end the last ones."""
    for k in range(first, last):
        if k and k % every == 0:
            write(log, some(k - every))
    if last == num_steps:
        write(log, some((num_steps - 1) // every * every))


@pytest.mark.parametrize("every", [1, 2, 3, 5, 20])
def test_an_interrupted_record_ends_as_if_it_had_not_been(every, tmp_path):
    """Killed anywhere, after a refresh too, and resumed from any checkpoint before that."""
    num_steps = 10
    expected = [step for step in range(0, num_steps, every) for _ in range(3)]
    for died in range(1, num_steps + 1):
        for resumed in range(died + 1):
            file = tmp_path / f"{died}-{resumed}.jsonl"
            log = response_log.ResponseLog(file, 0, every)
            advance(log, 0, died, every, num_steps)
            log.close()
            with open(file, "a") as torn:
                torn.write('{"step": 0, "id": "row')
            log = response_log.ResponseLog(file, resumed, every)
            advance(log, resumed, num_steps, every, num_steps)
            log.close()
            assert [line["step"] for line in recorded(file)] == expected, (died, resumed)


def test_a_line_cut_short_is_dropped(tmp_path):
    """Wherever it was cut, in the middle of a letter too. Nothing else is."""
    file = tmp_path / "responses.jsonl"
    log = response_log.ResponseLog(file, 0, 4)
    write(log, some(0))
    write(log, some(4))
    log.close()
    whole = file.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for end in range(last, len(whole) - 1):
        file.write_bytes(whole[:end])
        response_log.ResponseLog(file, 12, 4).close()
        assert file.read_bytes() == whole[:last]
    file.write_bytes(whole[:-1])  # all but the end of the line
    log = response_log.ResponseLog(file, 12, 4)
    write(log, some(8))
    log.close()
    assert [line["step"] for line in recorded(file)] in ([0] * 3 + [4] * 3 + [8] * 3, [0] * 3 + [4] * 2 + [8] * 3)


def test_a_new_run_starts_a_new_record(tmp_path):
    file = tmp_path / "responses.jsonl"
    log = response_log.ResponseLog(file, 0, 4)
    write(log, some(0))
    log.close()
    response_log.ResponseLog(file, 0, 4).close()
    assert file.read_bytes() == b""

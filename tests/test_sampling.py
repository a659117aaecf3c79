"""Sampling against plain NumPy in float64: one token's distribution, whole responses, and what a response may depend on."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from bilevel_jax import sampling, sharding
from bilevel_jax.models import decoder, lora
from bilevel_jax.sampling import Settings

# --------------------------------------------------------------------------------------------------------------------
# Witnesses
# --------------------------------------------------------------------------------------------------------------------

FALSE_ALARM = 1e-6  # chance that a chi-square test rejects the right distribution


def distribution(settings: Settings, logits) -> np.ndarray:
    """Probabilities [V] in float64, token by token: the most likely first, until top-k or top-p is full; ties stay."""
    scaled = np.asarray(logits, np.float64) / settings.temperature
    weight = np.exp(scaled - scaled.max())
    ranked = sorted(range(len(scaled)), key=lambda token: -scaled[token])
    if settings.top_k:
        ranked = [token for token in ranked if scaled[token] >= scaled[ranked[: settings.top_k][-1]]]
    total, within, mass = weight[ranked].sum(), [], 0.0
    for token in ranked:
        if mass >= settings.top_p * total and scaled[token] < scaled[within[-1]]:
            break
        within.append(token)
        mass += weight[token]
    probs = np.zeros(len(scaled))
    probs[within] = weight[within] / mass
    return probs


def log_softmax(logits) -> np.ndarray:
    """Over the last axis, in float64."""
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def p_value(counts, probs) -> float:
    """Of Pearson's chi-square test; outcomes that are expected fewer than five times count as one."""
    counts, expected = np.asarray(counts, float), np.asarray(probs) * np.sum(counts)
    if counts[expected == 0].any():
        return 0.0
    rare = expected < 5
    counts, expected = np.append(counts[~rare], counts[rare].sum()), np.append(expected[~rare], expected[rare].sum())
    if expected[-1] < 5:  # too little even together: part of the rarest of the others
        rarest = np.argmin(expected[:-1])
        for values in (counts, expected):
            values[rarest] += values[-1]
        counts, expected = counts[:-1], expected[:-1]
    return scipy.stats.chisquare(counts, expected).pvalue


def test_the_chi_square_test_itself():
    """600 throws of a die whose squared deviations from 100 add up to 1107: chi-square 11.07, the 5% point in any table."""
    deviations = np.array([20, -20, 12, -12, 3, -3])  # 2 · (400 + 144 + 9) = 1106
    assert p_value(100 + deviations, np.full(6, 1 / 6)) == pytest.approx(0.05, abs=1e-3)
    assert p_value([50, 50, 1], [0.5, 0.5, 0]) == 0


# --------------------------------------------------------------------------------------------------------------------
# One token
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
SEVERAL = 2 * np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32)  # rows of logits


@pytest.mark.parametrize("settings", SETTINGS + EXTREMES, ids=str)
def test_filters_equal_plain_numpy(settings):
    found = jax.jit(functools.partial(sampling.filtered, settings))(SEVERAL)
    expected = np.array([distribution(settings, row) for row in SEVERAL])
    np.testing.assert_array_equal(np.isfinite(found), expected > 0)
    np.testing.assert_allclose(jax.nn.softmax(found, axis=-1), expected, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(
    "top_k, top_p, left",
    [
        (1, 1.0, [1]),
        (2, 1.0, [1, 2, 4]),  # 4 ties with the second
        (3, 1.0, [1, 2, 4]),
        (4, 1.0, [0, 1, 2, 3, 4]),  # 0 and 3 tie for the fourth place
        (0, 1.0, [0, 1, 2, 3, 4]),
        (0, 1e-30, [1]),
        (0, 0.39, [1]),
        (0, 0.41, [1, 2, 4]),
        (0, 0.79, [1, 2, 4]),
        (0, 0.81, [0, 1, 2, 3, 4]),
        (3, 0.49, [1]),  # 0.4 of the 0.8 that top-k leaves
        (3, 0.51, [1, 2, 4]),
        (2, 0.51, [1, 2, 4]),  # the same 0.8, since 4 stays
    ],
)
def test_filters_by_hand_with_ties(top_k, top_p, left):
    probs = np.array([0.1, 0.4, 0.2, 0.1, 0.2], np.float32)
    found = sampling.filtered(Settings(top_k=top_k, top_p=top_p), jnp.log(probs)[None])[0]
    assert np.flatnonzero(np.isfinite(found)).tolist() == left


LOGITS = np.array([1.1, -0.3, 0.2, 2.0, -1.0, 0.9, 1.5, -0.6, 0.0, 0.5, -2.0, 1.2, 0.7], np.float32)
DRAWS = 20_000


def frequencies(settings: Settings) -> np.ndarray:
    """How often `choose` takes each token of `LOGITS`, of `DRAWS` uniform numbers."""
    uniform = np.random.default_rng(1).random(DRAWS, np.float32)
    logits = np.broadcast_to(LOGITS, (DRAWS, len(LOGITS)))
    token, _, _ = jax.jit(functools.partial(sampling.choose, settings))(logits, uniform)
    return np.bincount(token, minlength=len(LOGITS))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_frequencies_are_those_of_the_distribution(settings):
    assert p_value(frequencies(settings), distribution(settings, LOGITS)) > FALSE_ALARM


@pytest.mark.parametrize("settings", SETTINGS[1:], ids=str)
def test_frequencies_tell_wrong_distributions(settings):
    """Temperature left out, filters left out, temperature off by a quarter: each is far beyond the false alarm above."""
    counts = frequencies(settings)
    wrong = [dataclasses.replace(settings, temperature=1.0), dataclasses.replace(settings, top_k=0, top_p=1.0), Settings()]
    wrong += [dataclasses.replace(settings, temperature=1.25 * settings.temperature)]
    for other in wrong:
        if other != settings:
            assert p_value(counts, distribution(other, LOGITS)) < FALSE_ALARM / 1000, other


@pytest.mark.parametrize("settings", SETTINGS + EXTREMES, ids=str)
def test_log_probabilities_of_both_distributions(settings):
    uniform = np.random.default_rng(2).random(len(SEVERAL), np.float32)
    token, plain, sampled = jax.jit(functools.partial(sampling.choose, settings))(SEVERAL, uniform)
    for row in range(len(SEVERAL)):
        assert plain[row] == pytest.approx(log_softmax(SEVERAL[row])[token[row]], abs=1e-5)
        assert sampled[row] == pytest.approx(np.log(distribution(settings, SEVERAL[row])[token[row]]), abs=1e-4)


def test_temperature_zero_is_the_most_likely_token():
    settings = Settings(temperature=0, top_k=3, top_p=0.2)
    for uniform in (0.0, 0.999):
        token, plain, sampled = sampling.choose(settings, SEVERAL, np.full(len(SEVERAL), uniform, np.float32))
        np.testing.assert_array_equal(token, SEVERAL.argmax(-1))
        np.testing.assert_allclose(plain, log_softmax(SEVERAL).max(-1), rtol=1e-5)
        np.testing.assert_array_equal(sampled, np.zeros(len(SEVERAL)))


# ---- from a uniform number to a token ----

WIDTHS = [1, 2, 5, 127, 128, 129, 300, 1000, 4096]
NEAR_ONE = np.float32(1 - 2**-24)  # the largest below 1


def searched(weight, uniform) -> np.ndarray:
    """The first index whose cumulative weight exceeds uniform · total, in float64."""
    cumulative = np.cumsum(weight, dtype=np.float64)
    return np.searchsorted(cumulative, np.float64(uniform) * cumulative[-1], side="right")


@pytest.mark.parametrize("size", WIDTHS)
def test_inverse_cdf_is_exact(size):
    """Whole weights and quarters of 2^-10 make every sum and product exact in float32 too. Half of the weights are zero."""
    rng = np.random.default_rng(size)
    rows = 2000
    weight = (rng.integers(1, 8, (rows, size)) * (rng.random((rows, size)) < 0.5)).astype(np.float32)
    weight[:, rng.integers(size)] = 3  # at least one is possible
    uniform = rng.integers(0, 1024, rows).astype(np.float32) / 1024
    found = jax.jit(sampling._inverse_cdf)(weight, uniform)
    np.testing.assert_array_equal(found, [searched(w, u) for w, u in zip(weight, uniform)])


@pytest.mark.parametrize("size", WIDTHS)
def test_inverse_cdf_is_as_near_as_rounding_allows(size):
    rng = np.random.default_rng(size)
    weight, uniform = rng.exponential(size=(500, size)).astype(np.float32), rng.random(500, np.float32)
    found = np.asarray(jax.jit(sampling._inverse_cdf)(weight, uniform))
    cumulative = np.cumsum(weight, axis=-1, dtype=np.float64) / weight.sum(axis=-1, keepdims=True, dtype=np.float64)
    rows = np.arange(500)
    assert (uniform <= cumulative[rows, found] + 1e-5).all()
    assert (uniform >= np.where(found > 0, cumulative[rows, found - 1], 0) - 1e-5).all()


@pytest.mark.parametrize("size", WIDTHS)
def test_the_ends_of_the_uniform_interval_give_possible_tokens(size):
    """Zero weight at either end, where u = 0 and u -> 1 arrive, and a single possible token anywhere."""
    rng = np.random.default_rng(size)
    first = rng.integers(0, size, 400)
    last = np.minimum(size - 1, first + rng.integers(0, size, 400))
    between = (np.arange(size) >= first[:, None]) & (np.arange(size) <= last[:, None])
    weight = np.where(between, rng.exponential(size=(400, size)), 0).astype(np.float32)
    invert = jax.jit(sampling._inverse_cdf)
    np.testing.assert_array_equal(invert(weight, np.zeros(400, np.float32)), first)
    highest = np.asarray(invert(weight, np.full(400, NEAR_ONE)))
    assert (weight[np.arange(400), highest] > 0).all()
    single = np.eye(size, dtype=np.float32)[first] * np.float32(1e-6)
    for uniform in (0.0, 0.5, NEAR_ONE):
        np.testing.assert_array_equal(invert(single, np.full(400, uniform, np.float32)), first)


# --------------------------------------------------------------------------------------------------------------------
# Responses
# --------------------------------------------------------------------------------------------------------------------

VOCAB = 26
LENGTH = 64
NEW = 24  # most new tokens
SAMPLES = 3
EOS = (3, 17)
IDS = [f"row {i}" for i in range(7)]
SIZES = (31, 1, 2, 32, 40, 33, 34)  # of prompts; the first four are padded alike
PROMPTS = [np.random.default_rng(i).integers(0, VOCAB, size).astype(np.int32) for i, size in enumerate(SIZES)]
KEYS = sampling.row_keys(0, IDS, 0, SAMPLES)
WARM = Settings(temperature=1.2, top_k=20, max_new_tokens=NEW)


@functools.cache
def model(vocab: int = VOCAB, architecture: str = "llama", dtype: str = "float32"):
    """Config, random weights that make a distinct distribution everywhere, and a random adapter."""
    config = decoder.ModelConfig(
        architecture=architecture,
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=24,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1 if architecture == "llama" else 2,
        head_dim=8,
        rotary_dim=8,
        max_positions=128,
        activation="silu",
        norm_eps=1e-5,
        rope_theta=1e4,
        adapter_scale=1.5,
        dtype=dtype,
    )
    rng = np.random.default_rng(0)

    def disturbed(tree, scale):
        return jax.tree.map(lambda x: x + jnp.asarray(scale * rng.normal(size=x.shape), x.dtype), tree)

    targets = lora.resolve_targets(config, "all-linear")
    start = jax.jit(decoder.init_params, static_argnums=0)(config, jax.random.key(0))
    return config, disturbed(start, 0.3), disturbed(lora.init_adapter(config, jax.random.key(0), 2, targets), 0.2)


def make(settings=WARM, eos=EOS, config=None, *, slots=3, length=LENGTH, devices=1, **options):
    """A sampler of `model()`, or of another's config."""
    options |= {"slots": slots, "length": length, "mesh": sharding.make_mesh(devices)}
    return sampling.make_sampler(config or model()[0], settings, eos, **options)


kept = functools.cache(make)  # saves compilations, where nothing is patched


@functools.cache
def shared(settings=WARM, eos=EOS, with_adapter=False):
    """The responses that several tests compare with: seven prompts, three samples, three slots."""
    _, params, adapter = model()
    return kept(settings, eos)(params, adapter if with_adapter else None, PROMPTS, KEYS)


def assert_same(found, expected):
    """Response by response. Numbers of slots change shapes, and so the last bits of a log-probability, but no token."""
    assert [len(row) for row in found] == [len(row) for row in expected]
    for mine, theirs in zip(sum(found, []), sum(expected, [])):
        np.testing.assert_array_equal(mine.tokens, theirs.tokens)
        assert (mine.eos, mine.finish_reason) == (theirs.eos, theirs.finish_reason)
        np.testing.assert_allclose(mine.log_probs, theirs.log_probs, rtol=0, atol=1e-5)
        np.testing.assert_allclose(mine.sampled_log_probs, theirs.sampled_log_probs, rtol=0, atol=1e-5)


_logits = jax.jit(decoder.logits, static_argnums=0)


def next_logits(using, prompt, ids, adapter=None) -> np.ndarray:
    """Logits [n, V] that the whole forward pass gives for the n places of a response."""
    config, params, _ = using
    tokens = np.zeros((1, 128), np.int32)
    tokens[0, : len(prompt) + len(ids)] = [*prompt, *ids]
    return np.asarray(_logits(config, params, adapter, tokens))[0, len(prompt) - 1 : len(prompt) + len(ids) - 1]


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_whole_responses_have_their_exact_frequencies(architecture):
    """Two tokens of a vocabulary of seven, one of which ends: 6 · 7 + 1 outcomes, each with its probability from the whole
    forward pass. 4000 samples of one prompt."""
    settings, end, number = Settings(temperature=1.4, top_k=4, top_p=0.75, max_new_tokens=2), 2, 4000
    using, prompt = model(7, architecture), np.array([1, 5, 0], np.int32)

    def exact(settings):
        probs = {}
        first = distribution(settings, next_logits(using, prompt, [0])[0])
        for a in range(7):
            if a == end:
                probs[a,] = first[a]
                continue
            second = distribution(settings, next_logits(using, prompt, [a, 0])[1])
            probs |= {(a, b): first[a] * second[b] for b in range(7)}
        assert len(probs) == 43 and sum(probs.values()) == pytest.approx(1)
        return probs

    sample = make(settings, (end,), using[0], slots=500, length=8)
    (found,) = sample(using[1], None, [prompt], sampling.row_keys(3, ["a row"], 500, number))
    probs = exact(settings)
    counts = dict.fromkeys(probs, 0)
    for response in found:
        counts[tuple(response.ids.tolist())] += 1
    assert p_value(list(counts.values()), list(probs.values())) > FALSE_ALARM
    for change in ({"temperature": 1.0}, {"top_k": 0, "top_p": 1.0}, {"top_p": 1.0}):
        wrong = dataclasses.replace(settings, **change)
        assert p_value(list(counts.values()), list(exact(wrong).values())) < FALSE_ALARM / 1000


@pytest.mark.parametrize("with_adapter", [False, True])
def test_log_probabilities_are_those_of_the_whole_forward(with_adapter):
    adapter = model()[2] if with_adapter else None
    for prompt, row in zip(PROMPTS, shared(with_adapter=with_adapter)):
        for response in row:
            logits = next_logits(model(), prompt, response.ids, adapter)
            places = np.arange(len(response.ids)), response.ids
            np.testing.assert_allclose(response.log_probs, log_softmax(logits)[places], rtol=0, atol=1e-4)
            sampled = np.log([distribution(WARM, row)[token] for row, token in zip(logits, response.ids)])
            np.testing.assert_allclose(response.sampled_log_probs, sampled, rtol=0, atol=1e-4)
            assert response.log_probs.dtype == response.sampled_log_probs.dtype == np.float64


def test_greedy_takes_the_most_likely_token_at_every_place():
    settings = Settings(temperature=0, max_new_tokens=NEW)
    for prompt, (response, *others) in zip(PROMPTS, shared(settings)):
        logits = next_logits(model(), prompt, response.ids)
        np.testing.assert_array_equal(response.ids, logits.argmax(-1))
        np.testing.assert_allclose(response.log_probs, log_softmax(logits).max(-1), rtol=0, atol=1e-4)
        assert not response.sampled_log_probs.any()
        assert all((other.ids == response.ids).all() for other in others)


# ---- what a response does not depend on ----


@pytest.mark.parametrize(
    "changes",
    [{"slots": 1}, {"slots": 16}, {"slots": 30}, {"refill": False}, {"length": 128}],
    ids=str,
)
def test_a_response_does_not_depend_on_slots_or_refill(changes):
    assert_same(make(**changes)(model()[1], None, PROMPTS, KEYS), shared())


def test_a_response_does_not_depend_on_order_neighbours_or_number_of_samples():
    sample, params = kept(), model()[1]
    order = [4, 0, 6, 2]
    assert_same(sample(params, None, [PROMPTS[i] for i in order], KEYS[order]), [shared()[i] for i in order])
    assert_same(sample(params, None, PROMPTS[2:3], KEYS[2:3]), shared()[2:3])
    assert_same(sample(params, None, PROMPTS, KEYS[:, :1]), [row[:1] for row in shared()])


@pytest.mark.parametrize("longest, room, window", [(0, 64, 64), (0, 512, 256), (224, 512, 256), (225, 512, 512), (500, 576, 576)])
def test_the_window_leaves_leeway_within_the_room(longest, room, window):
    assert sampling._window(longest, room) == window


def test_a_response_does_not_depend_on_how_much_of_the_cache_is_looked_at(monkeypatch):
    """To the last bit: two slots whose responses pass from the first block into the second, against both blocks from the start."""
    prompts = [np.random.default_rng(size).integers(0, VOCAB, size).astype(np.int32) for size in (2, 50, 58, 70, 3)]
    keys, windows, window_of = sampling.row_keys(0, map(str, prompts), 0, 2), [], sampling._window

    def noted(*args):
        windows.append(window_of(*args))
        return windows[-1]

    monkeypatch.setattr(sampling, "_window", noted)
    found = {}
    for shortest in (64, 128):
        monkeypatch.setattr(sampling, "SHORTEST_WINDOW", shortest)
        monkeypatch.setattr(sampling, "LEEWAY", 4)
        windows.clear()
        found[shortest] = make(slots=2, length=128)(model()[1], None, prompts, keys)
        assert set(windows) == ({64, 128} if shortest == 64 else {128})
    assert max(len(prompt) + len(one.ids) for prompt, row in zip(prompts, found[64]) for one in row if len(prompt) < 60) > 64
    for mine, theirs in zip(sum(found[64], []), sum(found[128], []), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_samples_of_a_prompt_and_of_other_seeds_differ():
    texts = [tuple(response.ids) for response in sum(unending(), [])]
    assert len(set(texts)) == len(texts)
    other = kept(WARM, ())(model()[1], None, PROMPTS, sampling.row_keys(1, IDS, 0, SAMPLES))
    assert not set(texts) & {tuple(response.ids) for response in sum(other, [])}


def test_equal_prompts_under_one_key_are_answered_alike():
    same = [PROMPTS[0]] * 5
    found = kept()(model()[1], None, same, np.broadcast_to(KEYS[:1], (5, SAMPLES, 2)))
    assert_same(found, [shared()[0]] * 5)


def test_an_adapter_counts_and_merging_it_changes_nothing(monkeypatch):
    _, params, adapter = model()
    merged = shared(with_adapter=True)
    assert any(tuple(mine.ids) != tuple(plain.ids) for mine, plain in zip(sum(merged, []), sum(shared(), [])))
    monkeypatch.setattr(sampling, "merges", lambda config: False)
    monkeypatch.setattr(lora, "merge_adapter", None)  # not to be called
    assert_same(make()(params, adapter, PROMPTS, KEYS), merged)


def test_half_precision_keeps_the_adapter_apart():
    """An update of 2^-10 of a weight is lost when their sum is rounded to eight bits; applied apart, it is not."""
    config, params, adapter = model(dtype="bfloat16")
    assert not sampling.merges(config) and sampling.merges(model()[0])
    small = jax.tree.map(lambda x: x / 16, adapter)  # of A and of B
    settings = Settings(temperature=0, max_new_tokens=2)
    ((found,),) = make(settings, (), config)(params, small, PROMPTS[:1], KEYS[:1, :1])
    expected = log_softmax(next_logits((config, params, None), PROMPTS[0], found.ids, small)).max(-1)
    np.testing.assert_allclose(found.log_probs, expected, rtol=0, atol=0.05)


def respond_on_four_devices(path: str):
    """Writes the tokens of `shared()`'s responses, from eight slots on four devices. Called in a process of its own."""
    sample, (params, adapter) = make(slots=8, devices=4), sharding.replicate(model()[1:], sharding.make_mesh(4))
    found = [sample(params, using, PROMPTS, KEYS) for using in (None, adapter)]
    texts = [[[response.ids.tolist() for response in row] for row in responses] for responses in found]
    pathlib.Path(path).write_text(json.dumps(texts))


def test_slots_on_four_devices_give_the_same_responses(tmp_path):
    path, here = tmp_path / "texts.json", pathlib.Path(__file__).parent
    command = [sys.executable, "-c", f"import test_sampling; test_sampling.respond_on_four_devices({str(path)!r})"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for found, expected in zip(json.loads(path.read_text()), (shared(), shared(with_adapter=True)), strict=True):
        assert found == [[response.ids.tolist() for response in row] for row in expected]


# ---- keys ----


def test_keys_are_the_hash_of_seed_row_refresh_and_sample():
    keys = sampling.row_keys(7, ["a", "b"], 500, 3)
    assert keys.shape == (2, 3, 2) and keys.dtype == np.uint32
    for i, row_id in enumerate("ab"):
        for g in range(3):
            digest = hashlib.sha256(f"7/{row_id}/500/{g}".encode()).digest()
            words = [int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")]
            assert keys[i, g].tolist() == words
    np.testing.assert_array_equal(sampling.row_keys(7, ["b"], 500, 1)[0], keys[1, :1])


def test_keys_of_different_seeds_rows_refreshes_and_samples_differ():
    grid = [sampling.row_keys(seed, IDS, refresh, 5) for seed in (0, 1, 11) for refresh in (0, 1, 10)]
    words = np.concatenate(grid).reshape(-1, 2)
    assert len(np.unique(words, axis=0)) == len(words) == 3 * 3 * len(IDS) * 5


# ---- where a response ends ----


def unending():
    """Responses that nothing but the limit ends. Others are beginnings of these, since places are keyed one by one."""
    return shared(WARM, ())


def test_without_an_end_responses_are_as_long_as_the_limit():
    for response in sum(unending(), []):
        assert len(response.tokens) == len(response.log_probs) == NEW
        assert (response.eos, response.finish_reason) == (None, "length")
        np.testing.assert_array_equal(response.ids, response.tokens)


@pytest.mark.parametrize("eos", [EOS, (11,), tuple(range(0, VOCAB, 2))], ids=str)
def test_a_response_ends_with_its_first_eos(eos):
    """Its log-probabilities include that of the EOS, its tokens do not."""
    reasons = set()
    for response, whole in zip(sum(shared(WARM, eos), []), sum(unending(), [])):
        ends = np.flatnonzero(np.isin(whole.tokens, eos))
        count = ends[0] if len(ends) else NEW
        expected = whole.tokens[: count + 1]
        np.testing.assert_array_equal(response.tokens, whole.tokens[:count])
        np.testing.assert_array_equal(response.ids, expected)
        np.testing.assert_allclose(response.log_probs, whole.log_probs[: count + 1], rtol=0, atol=1e-5)
        assert len(response.sampled_log_probs) == len(response.log_probs) == len(expected)
        assert response.eos == (expected[-1] if len(ends) else None)
        assert response.finish_reason == ("stop" if len(ends) else "length")
        reasons.add(response.finish_reason)
    assert "stop" in reasons


@pytest.mark.parametrize("most, length", [(1, 64), (5, 36), (500, 33)])
def test_a_response_ends_at_the_limit_and_where_there_is_no_room(most, length):
    sample = make(dataclasses.replace(WARM, max_new_tokens=most), (), length=length)
    for prompt, row, wholes in zip(PROMPTS, sample(model()[1], None, PROMPTS[:4], KEYS[:4]), unending()):
        for response, whole in zip(row, wholes):
            count = min(most, length - len(prompt))
            assert len(response.tokens) == count and response.finish_reason == "length"
            common = min(count, NEW)
            np.testing.assert_array_equal(response.tokens[:common], whole.tokens[:common])


def test_an_eos_at_the_last_place_is_an_end():
    whole = unending()[0][0].tokens
    fresh = [i for i in range(1, NEW) if whole[i] not in whole[:i]]  # where a token occurs for the first time
    place = fresh[-1]
    settings = dataclasses.replace(WARM, max_new_tokens=place + 1)
    ((found,),) = make(settings, (whole[place],))(model()[1], None, PROMPTS[:1], KEYS[:1, :1])
    assert (len(found.tokens), found.eos, found.finish_reason) == (place, whole[place], "stop")


def letters(tokens) -> str:
    return "".join(chr(ord("a") + int(token)) for token in tokens)


ENDS = (4, 7, *(sampling.STEPS_TO_STOP + i for i in (0, 1, 3)), NEW)  # tokens that it takes to complete the stop strings


def stops_of_every_kind() -> tuple[str, ...]:
    """Stop strings, one from each of the first responses: completed at once, just at the host's first look, across it, late."""
    texts = [letters(response.tokens) for response in sum(unending(), [])]
    return tuple(text[end - 4 : end] for text, end in zip(texts, ENDS))


@pytest.mark.parametrize("eos", [(), EOS], ids=str)
def test_stop_strings_cut_as_soon_as_they_are_complete(eos):
    """Also where they come across the host's looks, and where an EOS came in the same look; slots are refilled meanwhile."""
    stop, counts = stops_of_every_kind(), set()
    settings = dataclasses.replace(WARM, stop=stop)
    found = make(settings, eos, detokenize=letters)(model()[1], None, PROMPTS, KEYS)
    for response, whole in zip(sum(found, []), sum(shared(WARM, eos), [])):
        text = letters(whole.tokens)
        ends = [text.index(end) + len(end) for end in stop if end in text]
        if not ends:
            assert_same([[response]], [[whole]])
            continue
        counts.add(min(ends))
        np.testing.assert_array_equal(response.tokens, whole.tokens[: min(ends)])
        assert (response.eos, response.finish_reason) == (None, "stop")
        np.testing.assert_allclose(response.log_probs, whole.log_probs[: min(ends)], rtol=0, atol=1e-5)
        assert len(response.sampled_log_probs) == len(response.log_probs)
    if not eos:
        assert counts >= set(ENDS)


def test_a_stop_string_wins_over_an_eos_after_it_and_loses_to_one_before():
    whole = unending()[0][0].tokens
    fresh = [i for i in range(NEW) if whole[i] not in whole[:i]]
    place = next(i for i in fresh if 4 <= i < sampling.STEPS_TO_STOP - 2)  # of an EOS, before the host looks
    text = letters(whole)
    for end, count, eos in ((text[1:3], 3, None), (text[place : place + 2], place, whole[place])):
        settings = dataclasses.replace(WARM, stop=(end,))
        sample = make(settings, (whole[place],), detokenize=letters)
        ((found,),) = sample(model()[1], None, PROMPTS[:1], KEYS[:1, :1])
        assert (len(found.tokens), found.eos, found.finish_reason) == (count, eos, "stop")


def test_a_signal_to_stop_ends_without_responses():
    asked = []

    def stopped():
        asked.append(True)
        return len(asked) == 2

    assert kept()(model()[1], None, PROMPTS, KEYS, stopped=stopped) is None
    assert len(asked) == 2
    assert_same(kept()(model()[1], None, PROMPTS, KEYS, stopped=lambda: False), shared())


# ---- work ----


def test_refill_leaves_no_slot_idle_while_prompts_wait(monkeypatch):
    """Decoding steps, counted: with refill those of a queue before S counters, without it the longest of every S responses."""
    steps, advance = [], sampling._advance

    def counted(*args):
        jax.debug.callback(lambda: steps.append(1))
        return advance(*args)

    monkeypatch.setattr(sampling, "_advance", counted)
    params, short = model()[1], PROMPTS[:4]  # of one padded length, so that they start in order
    keys = sampling.row_keys(5, IDS[:4], 0, 6)
    number = {}
    for refill in (True, False):
        steps.clear()
        found = make(slots=2, refill=refill)(params, None, short, keys)
        jax.effects_barrier()
        number[refill] = len(steps)
    lengths = [len(response.ids) for response in sum(found, [])]
    busy = [0, 0]
    for length in lengths:
        busy[busy.index(min(busy))] += length
    assert number == {True: max(busy), False: sum(max(pair) for pair in zip(lengths[::2], lengths[1::2]))}
    assert number[True] < number[False]


@pytest.mark.parametrize("num_samples", [1, 5])
def test_prompts_are_prefilled_once_in_few_shapes(num_samples):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, VOCAB, size).astype(np.int32) for size in [*range(1, 70), 199, 200]]
    window = 192 + 64
    batches = sampling._prefill_batches(prompts, num_samples, window)
    jobs = [(job.prompt, job.sample) for jobs, _ in batches for job in jobs]
    assert sorted(jobs) == [(i, g) for i in range(len(prompts)) for g in range(num_samples)]
    for members, tokens in batches:
        rows, length = tokens.shape
        assert length in (32, 64, 128, 256) and rows * length <= max(sampling.PREFILL_TOKENS, length)
        for job in members:
            prefix = prompts[job.prompt][:-1]
            assert job.row < rows
            np.testing.assert_array_equal(tokens[job.row, : len(prefix)], prefix)
    assert len({tokens.shape for _, tokens in batches}) <= 4
    assert sum(len(tokens) for _, tokens in batches) < 2 * len(prompts)  # rows do not multiply with the samples


def test_nothing_is_compiled_in_a_second_call(caplog):
    _, params, adapter = model()
    sample = make()

    def compiled(adapter, keys):
        caplog.clear()
        with jax.log_compiles():
            sample(params, adapter, PROMPTS, keys)
        return sum(record.message.startswith("Finished XLA compilation") for record in caplog.records)

    assert compiled(adapter, KEYS) >= 4  # weights, prefill, filling slots, decoding
    changed = jax.tree.map(lambda x: 2 * x, adapter)
    assert compiled(changed, sampling.row_keys(1, IDS, 0, SAMPLES)) == 0


def test_no_distribution_is_kept_for_every_token(intermediate_shapes):
    config, params, _ = model(53)
    slots, most = 3, 37
    state = sampling.init_slots(config, slots, 64, most)
    run = functools.partial(sampling._run, config, WARM, EOS, 1)
    shapes = intermediate_shapes(run, *sampling._by_layer(config, sharding.make_mesh(1), params, None), state, slots, 5)
    assert (slots, 53) in shapes and (slots, most) in shapes
    assert not any({53, most} <= set(shape) for shape in shapes)


# ---- errors ----


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"temperature": -0.1}, "temperature=-0.1 must be"),
        ({"temperature": float("inf")}, "temperature=inf must be"),
        ({"temperature": float("nan")}, "temperature=nan must be"),
        ({"top_k": -1}, "top_k=-1 must be"),
        ({"top_p": 0.0}, "top_p=0.0 must be"),
        ({"top_p": 1.1}, "top_p=1.1 must be"),
        ({"top_p": float("nan")}, "top_p=nan must be"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be"),
        ({"stop": ("a", "")}, "stop string is empty"),
    ],
    ids=str,
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        Settings(**changes)


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        make(Settings(stop=("a",)))


@pytest.mark.parametrize("size", [0, LENGTH, LENGTH + 1])
def test_a_prompt_has_a_token_and_leaves_room(size):
    prompts = [PROMPTS[0], np.zeros(size, np.int32)]
    with pytest.raises(ValueError, match=f"prompt 1 has {size} tokens; there is room for 1 to {LENGTH - 1}"):
        kept()(model()[1], None, prompts, KEYS[:2])


def test_no_prompts_give_no_responses():
    assert kept()(model()[1], None, [], np.zeros((0, 2, 2), np.uint32)) == []

"""Sampling: complete responses against NumPy in float64, what a response may depend on, where it ends, and the amount of work."""

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

from bilevel_jax import decoding, sampling, sharding
from bilevel_jax.models import decoder, lora, model_config
from bilevel_jax.token_choice import Settings
from tests.test_token_choice import FALSE_ALARM, distribution, log_softmax, p_value

ROOT = pathlib.Path(__file__).parent.parent

VOCAB = 26
LENGTH = 64
NEW = 24  # maximum number of new tokens
SAMPLES = 3
EOS = (3, 17)
IDS = [f"row {i}" for i in range(7)]
SIZES = (31, 1, 2, 32, 40, 33, 34)  # of prompts; the first four have one padded length
PROMPTS = [np.random.default_rng(i).integers(0, VOCAB, size).astype(np.int32) for i, size in enumerate(SIZES)]
KEYS = sampling.row_keys(0, IDS, 0, SAMPLES)
WARM = Settings(temperature=1.2, top_k=20, max_new_tokens=NEW)


@functools.cache
def model(vocab: int = VOCAB, architecture: str = "llama", dtype: str = "float32"):
    """Config, random weights that give a distinct distribution at every position, and a random adapter."""
    config = model_config.ModelConfig(
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

    def perturb(tree, scale):
        return jax.tree.map(lambda x: x + jnp.asarray(scale * rng.normal(size=x.shape), x.dtype), tree)

    targets = lora.resolve_targets(config, "all-linear")
    start = jax.jit(decoder.init_params, static_argnums=0)(config, jax.random.key(0))
    return config, perturb(start, 0.3), perturb(lora.init_adapter(config, jax.random.key(0), 2, targets), 0.2)


def make(settings=WARM, eos=EOS, config=None, *, slots=3, length=LENGTH, devices=1, **options):
    """A sampler for `model()`, or for another config."""
    options |= {"slots": slots, "length": length, "mesh": sharding.make_mesh(devices)}
    return sampling.make_sampler(config or model()[0], settings, eos, **options)


@pytest.fixture
def uncached():
    """This test shares no compiled programs with other tests: it counts compilations, or patches what is compiled."""
    sampling.jit_functions.cache_clear()
    yield
    sampling.jit_functions.cache_clear()


@functools.cache
def shared(settings=WARM, eos=EOS, with_adapter=False):
    """The responses that several tests compare with: seven prompts, three samples, three slots."""
    _, params, adapter = model()
    return make(settings, eos)(params, adapter if with_adapter else None, PROMPTS, KEYS)


def assert_same(actual, expected):
    """Compares responses. The number of slots changes shapes, and so the last bits of log-probabilities, but no token."""
    assert [len(row) for row in actual] == [len(row) for row in expected]
    for a, b in zip(sum(actual, []), sum(expected, [])):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        assert (a.eos, a.finish_reason) == (b.eos, b.finish_reason)
        np.testing.assert_allclose(a.log_probs, b.log_probs, rtol=0, atol=1e-5)
        np.testing.assert_allclose(a.sampled_log_probs, b.sampled_log_probs, rtol=0, atol=1e-5)


_logits = jax.jit(decoder.logits, static_argnums=0)


def next_logits(model, prompt, ids, adapter=None) -> np.ndarray:
    """Logits [n, V] of a full forward pass for the n tokens of a response."""
    config, params, _ = model
    tokens = np.zeros((1, 128), np.int32)
    tokens[0, : len(prompt) + len(ids)] = [*prompt, *ids]
    return np.asarray(_logits(config, params, adapter, tokens))[0, len(prompt) - 1 : len(prompt) + len(ids) - 1]


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_frequencies_of_complete_responses(architecture):
    """Two tokens of a vocabulary of seven with one EOS: 6 · 7 + 1 outcomes, each with its probability from a full forward pass.
    4000 samples of one prompt."""
    settings, end, number = Settings(temperature=1.4, top_k=4, top_p=0.75, max_new_tokens=2), 2, 4000
    small, prompt = model(7, architecture), np.array([1, 5, 0], np.int32)

    def exact(settings):
        probs = {}
        first = distribution(settings, next_logits(small, prompt, [0])[0])
        for a in range(7):
            if a == end:
                probs[a,] = first[a]
                continue
            second = distribution(settings, next_logits(small, prompt, [a, 0])[1])
            probs |= {(a, b): first[a] * second[b] for b in range(7)}
        assert len(probs) == 43 and sum(probs.values()) == pytest.approx(1)
        return probs

    sample = make(settings, (end,), small[0], slots=500, length=8)
    (responses,) = sample(small[1], None, [prompt], sampling.row_keys(3, ["a row"], 500, number))
    probs = exact(settings)
    counts = dict.fromkeys(probs, 0)
    for response in responses:
        counts[tuple(response.ids.tolist())] += 1
    assert p_value(list(counts.values()), list(probs.values())) > FALSE_ALARM
    for change in ({"temperature": 1.0}, {"top_k": 0, "top_p": 1.0}, {"top_p": 1.0}):
        wrong = dataclasses.replace(settings, **change)
        assert p_value(list(counts.values()), list(exact(wrong).values())) < FALSE_ALARM / 1000


@pytest.mark.parametrize("with_adapter", [False, True])
def test_log_probabilities_equal_those_of_a_full_forward_pass(with_adapter):
    adapter = model()[2] if with_adapter else None
    for prompt, row in zip(PROMPTS, shared(with_adapter=with_adapter)):
        for response in row:
            logits = next_logits(model(), prompt, response.ids, adapter)
            index = np.arange(len(response.ids)), response.ids
            np.testing.assert_allclose(response.log_probs, log_softmax(logits)[index], rtol=0, atol=1e-4)
            sampled = np.log([distribution(WARM, row)[token] for row, token in zip(logits, response.ids)])
            np.testing.assert_allclose(response.sampled_log_probs, sampled, rtol=0, atol=1e-4)
            assert response.log_probs.dtype == response.sampled_log_probs.dtype == np.float64


def test_greedy_takes_the_most_likely_token_at_every_position():
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
    [{"slots": 1}, {"slots": 16}, {"slots": 30}, {"length": 128}],
    ids=str,
)
def test_a_response_does_not_depend_on_slots_or_length(changes):
    assert_same(make(**changes)(model()[1], None, PROMPTS, KEYS), shared())


def test_a_response_does_not_depend_on_order_neighbours_or_number_of_samples():
    sample, params = make(), model()[1]
    order = [4, 0, 6, 2]
    assert_same(sample(params, None, [PROMPTS[i] for i in order], KEYS[order]), [shared()[i] for i in order])
    assert_same(sample(params, None, PROMPTS[2:3], KEYS[2:3]), shared()[2:3])
    assert_same(sample(params, None, PROMPTS, KEYS[:, :1]), [row[:1] for row in shared()])


@pytest.mark.parametrize(
    "longest, cache_length, window", [(0, 64, 64), (0, 512, 256), (224, 512, 256), (225, 512, 512), (500, 576, 576)]
)
def test_window_size(longest, cache_length, window):
    """A window leaves `LEEWAY` positions, within the cache."""
    assert decoding.window_size(longest, cache_length) == window


@pytest.mark.parametrize("cache_length", [64, 256, 320, 512, 576, 2048])
def test_window_sizes_are_those_that_are_taken(cache_length):
    taken = {decoding.window_size(longest, cache_length) for longest in range(cache_length)}
    assert decoding.window_sizes(cache_length) == sorted(taken)


def test_a_response_does_not_depend_on_the_window_size(monkeypatch):
    """To the last bit: responses that cross from the first block into the second, against both blocks from the start."""
    prompts = [np.random.default_rng(size).integers(0, VOCAB, size).astype(np.int32) for size in (2, 50, 58, 70, 3)]
    keys, windows, window_size = sampling.row_keys(0, map(str, prompts), 0, 2), [], decoding.window_size

    def recorded(*args):
        windows.append(window_size(*args))
        return windows[-1]

    monkeypatch.setattr(decoding, "window_size", recorded)
    responses = {}
    for shortest in (64, 128):
        monkeypatch.setattr(decoding, "SHORTEST_WINDOW", shortest)
        monkeypatch.setattr(decoding, "LEEWAY", 4)
        windows.clear()
        responses[shortest] = make(slots=2, length=128)(model()[1], None, prompts, keys)
        assert set(windows) == ({64, 128} if shortest == 64 else {128})
    assert max(len(prompt) + len(one.ids) for prompt, row in zip(prompts, responses[64]) for one in row if len(prompt) < 60) > 64
    for actual, expected in zip(sum(responses[64], []), sum(responses[128], []), strict=True):
        for a, b in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_samples_of_a_prompt_and_of_other_seeds_differ():
    texts = [tuple(response.ids) for response in sum(unending(), [])]
    assert len(set(texts)) == len(texts)
    other = make(WARM, ())(model()[1], None, PROMPTS, sampling.row_keys(1, IDS, 0, SAMPLES))
    assert not set(texts) & {tuple(response.ids) for response in sum(other, [])}


def test_equal_prompts_with_equal_keys_get_equal_responses():
    same = [PROMPTS[0]] * 5
    responses = make()(model()[1], None, same, np.broadcast_to(KEYS[:1], (5, SAMPLES, 2)))
    assert_same(responses, [shared()[0]] * 5)


def test_the_adapter_has_an_effect_and_merging_it_has_none(monkeypatch, uncached):
    _, params, adapter = model()
    merged = shared(with_adapter=True)
    sampling.jit_functions.cache_clear()
    assert any(tuple(adapted.ids) != tuple(plain.ids) for adapted, plain in zip(sum(merged, []), sum(shared(), [])))
    monkeypatch.setattr(decoding, "merges_adapter", lambda config: False)
    monkeypatch.setattr(lora, "merge_adapter", None)  # must not be called
    assert_same(make()(params, adapter, PROMPTS, KEYS), merged)


def test_half_precision_keeps_the_adapter_separate():
    """An update of 2^-10 of a weight is lost when their sum is rounded to eight bits, but not when it is applied separately."""
    config, params, adapter = model(dtype="bfloat16")
    assert not decoding.merges_adapter(config) and decoding.merges_adapter(model()[0])
    small = jax.tree.map(lambda x: x / 16, adapter)  # A and B
    settings = Settings(temperature=0, max_new_tokens=2)
    ((response,),) = make(settings, (), config)(params, small, PROMPTS[:1], KEYS[:1, :1])
    expected = log_softmax(next_logits((config, params, None), PROMPTS[0], response.ids, small)).max(-1)
    np.testing.assert_allclose(response.log_probs, expected, rtol=0, atol=0.05)


def respond_on_four_devices(path: str):
    """Writes the tokens of the `shared()` responses from eight slots on four devices. Runs in a separate process."""
    sample, (params, adapter) = make(slots=8, devices=4), sharding.replicate(model()[1:], sharding.make_mesh(4))
    results = [sample(params, used, PROMPTS, KEYS) for used in (None, adapter)]
    tokens = [[[response.ids.tolist() for response in row] for row in responses] for responses in results]
    pathlib.Path(path).write_text(json.dumps(tokens))


@pytest.mark.slow
def test_slots_on_four_devices_give_the_same_responses(tmp_path):
    path = tmp_path / "tokens.json"
    command = [sys.executable, "-c", f"from tests import test_sampling; test_sampling.respond_on_four_devices({str(path)!r})"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for tokens, expected in zip(json.loads(path.read_text()), (shared(), shared(with_adapter=True)), strict=True):
        assert tokens == [[response.ids.tolist() for response in row] for row in expected]


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
    """Responses that only the limit ends. All others are prefixes of these, since every token has its own random number."""
    return shared(WARM, ())


def test_without_eos_responses_reach_the_limit():
    for response in sum(unending(), []):
        assert len(response.tokens) == len(response.log_probs) == NEW
        assert (response.eos, response.finish_reason) == (None, "length")
        np.testing.assert_array_equal(response.ids, response.tokens)


@pytest.mark.parametrize("eos", [EOS, (11,), tuple(range(0, VOCAB, 2))], ids=str)
def test_a_response_ends_with_its_first_eos(eos):
    """The log-probabilities include the EOS, the tokens do not."""
    reasons = set()
    for response, full in zip(sum(shared(WARM, eos), []), sum(unending(), [])):
        ends = np.flatnonzero(np.isin(full.tokens, eos))
        count = ends[0] if len(ends) else NEW
        expected = full.tokens[: count + 1]
        np.testing.assert_array_equal(response.tokens, full.tokens[:count])
        np.testing.assert_array_equal(response.ids, expected)
        np.testing.assert_allclose(response.log_probs, full.log_probs[: count + 1], rtol=0, atol=1e-5)
        assert len(response.sampled_log_probs) == len(response.log_probs) == len(expected)
        assert response.eos == (expected[-1] if len(ends) else None)
        assert response.finish_reason == ("stop" if len(ends) else "length")
        reasons.add(response.finish_reason)
    assert "stop" in reasons


@pytest.mark.parametrize("max_new_tokens, length", [(1, 64), (5, 36), (500, 33)])
def test_a_response_ends_at_the_limits(max_new_tokens, length):
    sample = make(dataclasses.replace(WARM, max_new_tokens=max_new_tokens), (), length=length)
    for prompt, row, full_row in zip(PROMPTS, sample(model()[1], None, PROMPTS[:4], KEYS[:4]), unending()):
        for response, full in zip(row, full_row):
            count = min(max_new_tokens, length - len(prompt))
            assert len(response.tokens) == count and response.finish_reason == "length"
            common = min(count, NEW)
            np.testing.assert_array_equal(response.tokens[:common], full.tokens[:common])


def test_an_eos_as_last_token_ends_a_response():
    full = unending()[0][0].tokens
    last = [i for i in range(1, NEW) if full[i] not in full[:i]][-1]  # the last first occurrence of a token
    settings = dataclasses.replace(WARM, max_new_tokens=last + 1)
    ((response,),) = make(settings, (full[last],))(model()[1], None, PROMPTS[:1], KEYS[:1, :1])
    assert (len(response.tokens), response.eos, response.finish_reason) == (last, full[last], "stop")


def letters(tokens) -> str:
    return "".join(chr(ord("a") + int(token)) for token in tokens)


ENDS = (4, 7, *(sampling.STEPS_TO_STOP + i for i in (0, 1, 3)), NEW)  # number of tokens that complete the stop strings


def stops_of_every_kind() -> tuple[str, ...]:
    """Stop strings, one of each of the first responses: complete early, at the host's first check, across it, and late."""
    texts = [letters(response.tokens) for response in sum(unending(), [])]
    return tuple(text[end - 4 : end] for text, end in zip(texts, ENDS))


@pytest.mark.parametrize("eos", [(), EOS], ids=str)
def test_stop_strings_cut_a_response_as_soon_as_they_are_complete(eos):
    """Also if they cross a check of the host, and if an EOS follows before the same check. Slots are refilled meanwhile."""
    stop, counts = stops_of_every_kind(), set()
    settings = dataclasses.replace(WARM, stop=stop)
    responses = make(settings, eos, detokenize=letters)(model()[1], None, PROMPTS, KEYS)
    for response, full in zip(sum(responses, []), sum(shared(WARM, eos), [])):
        text = letters(full.tokens)
        ends = [text.index(end) + len(end) for end in stop if end in text]
        if not ends:
            assert_same([[response]], [[full]])
            continue
        counts.add(min(ends))
        np.testing.assert_array_equal(response.tokens, full.tokens[: min(ends)])
        assert (response.eos, response.finish_reason) == (None, "stop")
        np.testing.assert_allclose(response.log_probs, full.log_probs[: min(ends)], rtol=0, atol=1e-5)
        assert len(response.sampled_log_probs) == len(response.log_probs)
    if not eos:
        assert counts >= set(ENDS)


def test_a_stop_string_wins_over_an_eos_after_it_and_loses_to_one_before():
    full = unending()[0][0].tokens
    first = [i for i in range(NEW) if full[i] not in full[:i]]
    at = next(i for i in first if 4 <= i < sampling.STEPS_TO_STOP - 2)  # index of the EOS, before the host checks
    text = letters(full)
    for end, count, eos in ((text[1:3], 3, None), (text[at : at + 2], at, full[at])):
        settings = dataclasses.replace(WARM, stop=(end,))
        sample = make(settings, (full[at],), detokenize=letters)
        ((response,),) = sample(model()[1], None, PROMPTS[:1], KEYS[:1, :1])
        assert (len(response.tokens), response.eos, response.finish_reason) == (count, eos, "stop")


def test_a_signal_ends_sampling_without_responses():
    calls = []

    def stopped():
        calls.append(True)
        return len(calls) == 2

    assert make()(model()[1], None, PROMPTS, KEYS, stopped=stopped) is None
    assert len(calls) == 2
    assert_same(make()(model()[1], None, PROMPTS, KEYS, stopped=lambda: False), shared())


# ---- work ----


def test_refill_leaves_no_slot_idle_while_prompts_wait(monkeypatch, uncached):
    """Counts decoding steps: as many as a queue with S servers needs, fewer than the longest of every S responses add up to."""
    steps, advance = [], decoding.advance

    def counted(*args):
        jax.debug.callback(lambda: steps.append(1))
        return advance(*args)

    monkeypatch.setattr(decoding, "advance", counted)
    params, short = model()[1], PROMPTS[:4]  # with one padded length, so that they start in order
    keys = sampling.row_keys(5, IDS[:4], 0, 6)
    responses = make(slots=2)(params, None, short, keys)
    jax.effects_barrier()
    lengths = [len(response.ids) for response in sum(responses, [])]
    busy = [0, 0]
    for length in lengths:
        busy[busy.index(min(busy))] += length
    assert len(steps) == max(busy) < sum(max(pair) for pair in zip(lengths[::2], lengths[1::2]))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("num_samples", [1, 5])
def test_prompts_are_prefilled_once_in_few_shapes(num_samples, full):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, VOCAB, size).astype(np.int32) for size in [*range(1, 70), 199, 200]]
    cache_length = 192 + 64
    batches = sampling._prefill_batches(prompts, num_samples, cache_length, full)
    jobs = [(job.prompt, job.sample_index) for jobs, _ in batches for job in jobs]
    assert sorted(jobs) == [(i, g) for i in range(len(prompts)) for g in range(num_samples)]
    for members, tokens in batches:
        rows, length = tokens.shape
        assert length in (32, 64, 128, 256) and rows * length <= max(sampling.PREFILL_TOKENS, length)
        for job in members:
            prefix = prompts[job.prompt][:-1]
            assert job.prefill_row < rows
            np.testing.assert_array_equal(tokens[job.prefill_row, : len(prefix)], prefix)
    assert len({tokens.shape for _, tokens in batches}) <= 4
    assert full or sum(len(tokens) for _, tokens in batches) < 2 * len(prompts)  # the samples of a prompt share its row
    few = sampling._prefill_batches(prompts[:2], num_samples, cache_length, full)
    assert [tokens.shape for _, tokens in few] == [(32 if full else 2, 32)]


def test_nothing_is_compiled_in_a_second_call(caplog, uncached):
    """Nor by a second sampler with the same arguments, or with other stop strings, which the host looks for."""
    _, params, adapter = model()

    def compiled(sample, adapter, keys=KEYS, prompts=PROMPTS):
        caplog.clear()
        with jax.log_compiles():
            responses = sample(params, adapter, prompts, keys)
        return sum(record.message.startswith("Finished XLA compilation") for record in caplog.records), responses

    sample = make()
    number, first = compiled(sample, adapter)
    assert number >= 4  # weights, prefill, filling slots, decoding
    changed = jax.tree.map(lambda x: 2 * x, adapter)
    assert compiled(sample, changed, sampling.row_keys(1, IDS, 0, SAMPLES))[0] == 0

    number, second = compiled(make(eos=np.array(EOS)), adapter)
    assert number == 0
    assert_same(second, first)
    stop = letters(first[0][0].tokens)[2:4]
    number, stopped = compiled(make(dataclasses.replace(WARM, stop=(stop,)), detokenize=letters), adapter)
    assert number == 0 and letters(stopped[0][0].tokens).endswith(stop) and len(stopped[0][0].tokens) < len(first[0][0].tokens)
    number, _ = compiled(make(dataclasses.replace(WARM, top_k=19)), adapter)
    assert number >= 1  # not the same distribution
    few = slice(0, len(PROMPTS), 3)
    assert compiled(make(full_batches=True), adapter)[0] >= 1  # more rows than `sample` needs for these prompts
    number, responses = compiled(make(full_batches=True), adapter, KEYS[few], PROMPTS[few])
    assert number == 0
    assert_same(responses, first[few])


def test_no_distribution_is_stored_for_every_token(intermediate_shapes):
    config, params, _ = model(53)
    slots, max_new_tokens = 3, 37
    state = decoding.init_slots(config, slots, 64, max_new_tokens)
    decode = functools.partial(decoding.decode_steps, config, WARM, EOS, 1)
    weights = decoding.make_weights(config, sharding.make_mesh(1))(params, None)
    shapes = intermediate_shapes(decode, *weights, state, slots, 5)
    assert (slots, 53) in shapes and (slots, max_new_tokens) in shapes
    assert not any({53, max_new_tokens} <= set(shape) for shape in shapes)


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
def test_a_prompt_must_have_a_token_and_leave_room(size):
    prompts = [PROMPTS[0], np.zeros(size, np.int32)]
    with pytest.raises(ValueError, match=f"prompt 1 has {size} tokens; there is room for 1 to {LENGTH - 1}"):
        make()(model()[1], None, prompts, KEYS[:2])


def test_no_prompts_give_no_responses():
    assert make()(model()[1], None, [], np.zeros((0, 2, 2), np.uint32)) == []

"""Adapters in the last layers only, and what the layers below compute of a row, once or at each visit."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax import checks, forward, frozen, sharding
from bilevel_jax import setup as setups
from bilevel_jax.config import ConfigError
from bilevel_jax.data import packing
from bilevel_jax.errors import Interrupted, RunError
from bilevel_jax.models import decoder, huggingface, kv_cache, layer_range, lora
from bilevel_jax.planning import dry_run, memory, program_costs
from bilevel_jax.runtime import state_store
from tests.conftest import TRAINED, make_model, stop_at, summary_of, train_without_report
from tests.test_step import LLAMA, NEOX, jitter

LAYERS, ADAPTED = 4, 1
MODEL = dataclasses.replace(LLAMA, num_layers=LAYERS)
LAYOUT = packing.Layout(2, 16, 6)
TARGETS = lora.resolve_targets(MODEL, "all-linear")


@functools.cache
def weights(config=MODEL):
    """Random weights, an adapter of the last layer, and the same one with zeros for the others."""
    params = jitter(jax.jit(decoder.init_params, static_argnums=0)(config, jax.random.key(0)), 1, 0.25)
    targets = lora.resolve_targets(config, "all-linear")
    adapter = jitter(lora.init_adapter(config, jax.random.key(1), 3, targets, ADAPTED), 2, 0.1)
    padding = (config.num_layers - ADAPTED, 0), (0, 0), (0, 0)
    return params, adapter, jax.tree.map(lambda leaf: jnp.pad(leaf, padding), adapter)


@functools.cache
def segments():
    rng = np.random.default_rng(0)
    sizes = (3, 4), (5, 2), (2, 9), (6, 1), (1, 12)
    return [packing.Segment(*(rng.integers(1, 48, n).astype(np.int32) for n in size), i, 0.2) for i, size in enumerate(sizes)]


def batch_of(order):
    return packing.pack_step([segments()[i] for i in order], 5, len(order), LAYOUT)


def make_frozen(slots=5, keeps=True):
    params, adapter, _ = weights()
    store = state_store.in_memory(slots, 64, 16, jnp.float32) if keeps else None
    return frozen.FrozenLayers(MODEL, params, frozen.num_frozen(MODEL, adapter), sharding.make_mesh(1), store)


# --------------------------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------------------------


def losses(config, params, adapter, packed):
    return forward.entry_nll(config, params, adapter, packed)


entry_losses = jax.jit(losses, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def gradient(config, params, adapter, packed):
    return jax.grad(lambda adapter: jnp.sum(forward.micro_nll(config, params, adapter, packed, 0)))(adapter)


@pytest.mark.parametrize("config", [MODEL, dataclasses.replace(NEOX, num_layers=3)], ids=["llama", "gpt_neox"])
def test_an_adapter_of_the_last_layers_is_one_of_zeros_below(config):
    params, adapter, padded = weights(config)
    packed = batch_of(range(5)).packed
    np.testing.assert_allclose(
        entry_losses(config, params, adapter, packed), entry_losses(config, params, padded, packed), rtol=1e-5
    )
    of_last, of_all = gradient(config, params, adapter, packed), gradient(config, params, padded, packed)
    for one, all_layers in zip(jax.tree.leaves(of_last), jax.tree.leaves(of_all)):
        np.testing.assert_allclose(one, all_layers[-ADAPTED:], rtol=1e-4, atol=1e-6)
    merged, expected = lora.merge_adapter(config, params, adapter), lora.merge_adapter(config, params, padded)
    for one, other in zip(jax.tree.leaves(merged), jax.tree.leaves(expected)):
        np.testing.assert_array_equal(one, other)


def test_prefill_and_decoding_with_an_adapter_of_the_last_layers():
    params, adapter, padded = weights()
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 48, (2, 10)))

    @jax.jit
    def decoded(adapter):
        cache = kv_cache.prefill(MODEL, params, adapter, tokens[:, :9])
        hidden, cache = kv_cache.decode(MODEL, params, adapter, cache, tokens[:, 9], jnp.full(2, 9))
        return hidden, cache

    for one, other in zip(jax.tree.leaves(decoded(adapter)), jax.tree.leaves(decoded(padded))):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_files_of_peft(tmp_path):
    """`layers_to_transform` is PEFT's key; tensors have the numbers of their layers."""
    _, adapter, _ = weights()
    huggingface.save_adapter(tmp_path, MODEL, adapter, alpha=6.0, base="base")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["layers_to_transform"] == [LAYERS - 1]
    names = huggingface.adapters.safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    assert {name.split(".")[4] for name in names} == {str(LAYERS - 1)} and len(names) == 2 * len(TARGETS)
    _, loaded = huggingface.load_adapter(tmp_path, MODEL)
    for one, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(adapter), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_adapter_of_other_layers_is_refused(tmp_path):
    first = dataclasses.replace(MODEL, num_layers=2)
    huggingface.save_adapter(tmp_path, first, lora.init_adapter(first, jax.random.key(0), 2, TARGETS), alpha=2.0, base="base")
    with pytest.raises(huggingface.ModelError, match="it adapts layers 0, 1; only adapters of all 4 layers or of the last ones"):
        huggingface.load_adapter(tmp_path, MODEL)


# --------------------------------------------------------------------------------------------------------------------
# Cost
# --------------------------------------------------------------------------------------------------------------------


def layer_flops(config, sequences, length):
    """FLOPs of a layer's forward pass, by hand: weights, and both products of attention in blocks of a quarter of the queries."""
    weights = sum(width_in * width_out for _, width_in, width_out in lora.projections(config).values())
    scores = sum(length // 4 * end for end in range(length // 4, length + 1, length // 4))
    return sequences * (2 * length * weights + 2 * 2 * scores * config.num_heads * config.head_dim)


def test_the_backward_pass_ends_at_the_first_adapter():
    """Beyond what follows the frozen layers, a gradient costs their forward pass; the backward pass would be twice that."""
    params, adapter, _ = weights()
    batch = batch_of(range(5))
    given = frozen.with_states(batch, frozen.empty_states(MODEL, batch.packed.tokens.shape))

    def flops(batch):
        loss = lambda adapter: jnp.sum(forward.micro_nll(MODEL, params, adapter, batch.packed, 0))  # noqa: E731
        return program_costs.products(jax.make_jaxpr(jax.grad(loss))(adapter).jaxpr).flops

    assert flops(batch) - flops(given) == (LAYERS - ADAPTED) * layer_flops(MODEL, 2, 16)


def test_frozen_layers_keep_nothing_for_the_backward_pass():
    """The residuals are those of a model that has the adapted layers alone."""

    def kept(num_layers, num_adapted):
        model = dataclasses.replace(MODEL, num_layers=num_layers)
        shapes = memory.base_shapes(model), memory.adapter_shapes(model, 3, TARGETS, num_adapted)
        packed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch_of(range(5)).packed)

        def residuals(base, adapter, packed):
            return jax.vjp(lambda adapter: forward.micro_nll(model, base, adapter, packed, 0), adapter)[1]

        return memory._result_bytes(residuals, *shapes, packed)

    shared = kept(2, 2) - (kept(3, 3) - kept(2, 2)) * 2
    assert kept(6, 2) - kept(2, 2) < 0.1 * (kept(3, 3) - kept(2, 2))
    assert shared < kept(2, 2) < kept(6, 6)


# --------------------------------------------------------------------------------------------------------------------
# Kept states
# --------------------------------------------------------------------------------------------------------------------


def test_losses_from_kept_states():
    params, adapter, _ = weights()
    batch = batch_of(range(5))
    filled = make_frozen().fill(batch, np.arange(5))
    expected = entry_losses(MODEL, params, adapter, batch.packed)
    np.testing.assert_allclose(entry_losses(MODEL, params, adapter, filled.packed), expected, rtol=1e-5)


def test_a_row_is_computed_once_whatever_it_is_packed_with(monkeypatch):
    layers, computed = make_frozen(), []
    compute = frozen.FrozenLayers.states_of
    monkeypatch.setattr(
        frozen.FrozenLayers, "states_of", lambda self, tokens: computed.extend(map(len, tokens)) or compute(self, tokens)
    )
    first, second = (0, 1, 2), (4, 2, 1, 3)
    layers.fill(batch_of(first), np.array(first))
    assert computed == [7, 7, 11]
    again = layers.fill(batch_of(second), np.array(second))
    assert computed == [7, 7, 11, 13, 7]
    anew = make_frozen(keeps=False).fill(batch_of(second), np.array(second))
    np.testing.assert_array_equal(again.packed.entering, anew.packed.entering)


def test_only_micro_batches_in_use_are_sent(monkeypatch):
    """One program is compiled for all numbers of micro-batches. The losses are those from a batch that is sent whole."""
    params, adapter, _ = weights()
    layers, sent, device_put = make_frozen(), [], sharding.device_put

    def recorded(x, target):
        sent.extend([x.shape] if x.ndim > 2 and x.dtype == np.float32 else [])
        return device_put(x, target)

    monkeypatch.setattr(sharding, "device_put", recorded)
    frozen._overwriting.cache_clear()
    M, S, L = batch_of(range(5)).packed.tokens.shape
    for order, used in ((range(5), 2), ((0,), 1), ((4, 2, 1, 3), 2)):
        batch, slots = batch_of(order), np.array(order)
        assert batch.packed.num_micro == used < M
        expected = layers.fill(batch, slots).packed
        sent.clear()
        on_devices = layers.put_batch(batch, slots).packed
        assert sent == [(S, L, MODEL.hidden_size)] * used
        np.testing.assert_array_equal(on_devices.entering[:used], expected.entering[:used])
        of_all = entry_losses(MODEL, params, adapter, sharding.put_batch(expected, layers.mesh))
        np.testing.assert_array_equal(entry_losses(MODEL, params, adapter, on_devices), of_all)
        assert on_devices.entering.sharding == sharding.batch_shardings(expected, layers.mesh).entering
        assert frozen._overwriting(on_devices.entering.sharding)._cache_size() == 1


def test_generated_responses_are_not_kept(monkeypatch):
    layers = make_frozen(slots=1)
    layers.fill(batch_of((0, 1)), np.array([0, -1]))
    monkeypatch.setattr(layers.store, "put", lambda slot, states: pytest.fail("kept"))
    layers.fill(batch_of((0, 1)), np.array([0, -1]))


def test_indices_of_segments():
    """By hand: first-fit decreasing puts 13 tokens first, then 11, both sevens into a third sequence, and 7 beside none of 16."""
    packed = batch_of((4, 2, 0, 1)).packed
    assert frozen.segment_indices(packed, 4) == [(0, slice(0, 13)), (1, slice(0, 11)), (2, slice(0, 7)), (2, slice(7, 14))]


@pytest.mark.parametrize("size, length", [(1, 64), (64, 64), (65, 96), (97, 128), (129, 192), (193, 256), (600, 768)])
def test_padded_lengths(size, length):
    assert frozen.padded_length(size) == length


def test_the_store_on_disk(tmp_path):
    directory = tmp_path / "cache"
    states = {slot: np.full((2 + slot, 4), slot, np.float32) for slot in range(3)}
    store = state_store.on_disk(directory, 4, 9, 4, np.float32, resumed=False)
    for slot in (2, 0, 1):
        store.put(slot, states[slot])
    file = directory / state_store.STATES
    assert file.stat().st_size == 9 * 4 * 4 and store.get(3) is None
    with open(file, "r+b") as opened:  # the states of slot 0 are after the four of slot 2
        opened.seek(4 * 4 * 4)
        opened.write(b"\1")
    again = state_store.on_disk(directory, 4, 9, 4, np.float32, resumed=True)
    assert again.get(0) is None
    np.testing.assert_array_equal(again.get(2), states[2])
    again.put(0, states[0])
    for slot in range(3):
        np.testing.assert_array_equal(again.get(slot), states[slot])
    with open(directory / state_store.INDEX, "r+b") as opened:  # what a machine that stopped had not written: slot 1, the last one
        opened.seek(state_store.ENTRY.itemsize)
        opened.write(bytes(state_store.ENTRY.itemsize))
        opened.seek(3 * state_store.ENTRY.itemsize)
        opened.write(np.array((9, 3, 0), state_store.ENTRY).tobytes())
    full = state_store.on_disk(directory, 4, 9, 4, np.float32, resumed=True)
    full.put(1, states[1])  # there is no space left
    assert full.get(1) is None
    np.testing.assert_array_equal(full.get(2), states[2])
    assert state_store.on_disk(directory, 4, 9, 4, np.float32, resumed=False).get(2) is None


def test_memory_that_this_machine_does_not_have():
    with pytest.raises(
        RunError, match="model.cache_frozen=memory needs 4000000.00 GB, this machine has .*; take model.cache_frozen=disk"
    ):
        state_store.in_memory(1, 10**12, 1000, np.float32)


# --------------------------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lora.layers": "first:2"}, "lora.layers='first:2' is not all or last:K"),
        ({"lora.layers": "last:0"}, "lora.layers='last:0' is not all or last:K"),
        ({"model.cache_frozen": "disk"}, "lora.layers=all has none; take last:K or off"),
        ({"model.cache_frozen": "ram"}, "model.cache_frozen='ram' is not among off, memory, disk"),
        ({"lora.layers": "last:1", "lora.rank": 0}, "lora.layers is an option of adapters"),
        ({"lora.layers": "last:1", "selection.rule": "metagradient"}, "lora.layers=last:1 must be all"),
    ],
)
def test_refused_settings(make_config, changes, message):
    with pytest.raises(ConfigError, match=message):
        checks.build(make_config(changes))


def test_more_layers_than_the_model_has(make_config):
    with pytest.raises(ValueError, match="lora.layers=last:9, but the model has 2 layers"):
        memory.make_plan(make_config({"lora.layers": "last:9"}))


def test_more_layers_than_the_model_has_are_refused_before_it_is_loaded(make_config, monkeypatch):
    monkeypatch.setattr(setups.huggingface, "load_params", None)
    with pytest.raises(ValueError, match="lora.layers=last:9, but the model has 2 layers"):
        setups.load(checks.build(make_config({"lora.layers": "last:9"})))


def test_plan(make_config):
    """By hand: four micro-batches of two sequences, for four rows of each level; and the adapter of one of two layers."""
    changes = {"lora.layers": "last:1", "model.cache_frozen": "disk", "data.num_lower": 25, "selection.coefficient_at": "current"}
    plan, whole = memory.make_plan(make_config(changes)), memory.make_plan(make_config())
    items, of_all = ({item.name: item.size for item in one.items} for one in (plan, whole))
    assert 2 * items["adapter θ"] == of_all["adapter θ"]
    assert items["hidden states that leave the frozen layers"] == (4 + 4 + 2) * 96 * 16 * 4  # sequences, tokens, width, bytes
    assert items["the same of the lower level, kept"] == (25 - 4) * 96 * 16 * 4
    assert items["activations of a micro-batch"] < of_all["activations of a micro-batch"]
    assert "on the disk, GB" in memory.table(make_config(changes), plan)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Directory of a model of four layers."""
    from tests import conftest

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(conftest.COMMON, "num_hidden_layers", LAYERS)
        return make_model(tmp_path_factory.mktemp("deep") / "model", "llama")


def test_runs_with_and_without_the_cache_have_the_same_bits(deep, make_config, tmp_path, monkeypatch):
    """Also where the files of the cache are found again by a run that was interrupted; they are removed at its end."""
    settings = {"model.path": str(deep), "lora.layers": f"last:{ADAPTED}", "selection.coefficient_at": "current"}
    for cache in frozen.CACHES:
        config, workdir = make_config(settings | {"model.cache_frozen": cache}), tmp_path / cache
        if cache == "disk":
            with monkeypatch.context() as patch, pytest.raises(Interrupted):
                stop_at(patch, 7)
                train_without_report(config, workdir)
            assert state_store.bytes_on_disk(workdir) > 0
        train_without_report(config, workdir)
        assert not (workdir / state_store.FOLDER).exists()
        for file in TRAINED:
            assert (workdir / file).read_bytes() == (tmp_path / "off" / file).read_bytes(), (cache, file)
    assert summary_of(tmp_path / "off")["eval/upper_loss"] > 0
    model = huggingface.read_config(deep)
    assert layer_range.num_adapted(huggingface.load_adapter(tmp_path / "off" / "adapter", model)[1]) == ADAPTED


def test_the_dry_run_says_what_the_cache_takes(deep, make_config, tmp_path):
    """From the tokens of both levels' rows: 64 bytes for a float32 state of width 16, and 16 for each of two slots of a row."""
    settings = {"model.path": str(deep), "lora.layers": f"last:{ADAPTED}", "selection.coefficient_at": "current"}
    config = make_config(settings | {"model.cache_frozen": "memory"})
    parts = list(dry_run.check(config, tmp_path / "run"))
    setup = setups.load(checks.build(config))
    rows = [*setup.upper.examples, *setup.lower.examples]
    size = 64 * sum(len(row.prompt) + len(row.response) for row in rows) + 2 * 16 * len(rows)
    assert f"cache: {size / 1e6:.1f} MB of memory keep the hidden states of all rows that leave the frozen layers" in parts
    assert not (tmp_path / "run").exists()

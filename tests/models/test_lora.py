"""Initial adapters against PEFT, and identities of an adapter. `test_huggingface.py` tests the files of PEFT."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax.models import decoder, layers, lora
from tests.models import models
from tests.models.models import FIXTURES, initial_adapter, random_adapter

TOKENS = np.random.default_rng(0).integers(0, 64, (2, 12))
BASES = ["neox_parallel", "llama_mha"]


def base(variant, dtype="float32"):
    config, params = models.load(variant, dtype)
    return dataclasses.replace(config, adapter_scale=1.5), params


@pytest.mark.parametrize("variant", BASES)
def test_adapter_starts_as_in_peft(variant):
    config, _ = base(variant)
    reference = json.loads((FIXTURES / "adapters" / "initial.json").read_text())[variant]
    adapter = initial_adapter(config, reference["rank"])
    initial = {name: pair for module in adapter["layers"].values() for name, pair in module.items()}
    assert initial.keys() == reference["projections"].keys()
    for name, expected in reference["projections"].items():
        _, width_in, width_out = lora.projections(config)[name]
        a, b = initial[name]["a"], initial[name]["b"]
        assert a.shape == (config.num_layers, width_in, reference["rank"]) and a.dtype == jnp.float32
        assert b.shape == (config.num_layers, reference["rank"], width_out) and b.dtype == jnp.float32
        bound = 1 / math.sqrt(width_in)  # the maximum of 4096 draws is within 1% of it
        assert 0.99 * bound < expected["a_max"] <= bound and 0.99 * bound < jnp.abs(a).max() <= bound
        np.testing.assert_allclose(a.std(), expected["a_std"], rtol=0.03)
        np.testing.assert_allclose(a.std(), bound / math.sqrt(3), rtol=0.03)
        assert expected["b_max"] == 0 and not b.any()


@pytest.mark.parametrize("variant", BASES)
def test_projections_have_independent_initial_values(variant):
    """Projections of the same shape share no draw."""
    config, _ = base(variant)
    adapter = initial_adapter(config)
    draws = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(adapter) if leaf.any()])
    assert len(np.unique(draws)) > 0.99 * len(draws)


@pytest.mark.parametrize("variant", BASES)
def test_initial_adapter_computes_the_base_model(variant):
    config, params = base(variant)
    adapter = initial_adapter(config)
    without = models.logits(config, params, None, TOKENS)
    np.testing.assert_array_equal(models.logits(config, params, adapter, TOKENS), without)


@pytest.mark.parametrize("targets", ["all-linear", "subset"])
@pytest.mark.parametrize("variant", BASES)
def test_merged_weights_equal_adapter(variant, targets):
    config, params = base(variant)
    if targets == "subset":
        targets = ("query_key_value",) if variant.startswith("neox") else ("v_proj", "up_proj")
    adapter = random_adapter(config, targets=targets)
    adapted = models.logits(config, params, adapter, TOKENS)
    assert jnp.abs(adapted - models.logits(config, params, None, TOKENS)).max() > 0.1
    merged = lora.merge_adapter(config, params, adapter)
    np.testing.assert_allclose(models.logits(config, merged, None, TOKENS), adapted, rtol=0, atol=1e-4)


def test_merge_equals_the_formula_rounded_once():
    config, params = base("llama_mha", "bfloat16")
    adapter = random_adapter(config, targets="down_proj")
    merged = lora.merge_adapter(config, params, adapter)["layers"]["mlp"]["down_proj"]["kernel"]
    pair = adapter["layers"]["mlp"]["down_proj"]
    exact = params["layers"]["mlp"]["down_proj"]["kernel"].astype(jnp.float32) + 1.5 * pair["a"] @ pair["b"]
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_allclose(merged.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("variant", BASES)
def test_merge_does_not_change_its_inputs(variant):
    config, params = base(variant)
    before = jax.tree.map(np.asarray, params)
    lora.merge_adapter(config, params, random_adapter(config))
    jax.tree.map(np.testing.assert_array_equal, params, before)


@pytest.mark.parametrize("variant", BASES)
def test_every_projection_learns(variant):
    config, params = base(variant)

    @jax.jit
    @jax.grad
    def gradients(adapter):
        return decoder.logits(config, params, adapter, TOKENS).var()

    grads = gradients(random_adapter(config))
    assert all((np.abs(np.asarray(leaf)).max(axis=(1, 2)) > 1e-6).all() for leaf in jax.tree.leaves(grads))


def test_targets():
    llama, _ = base("llama_mha")
    neox, _ = base("neox_parallel")
    assert lora.resolve_targets(llama, "all-linear") == tuple(lora.projections(llama))
    assert lora.resolve_targets(neox, "dense") == ("dense",)
    assert lora.resolve_targets(llama, ["v_proj", "q_proj"]) == ("v_proj", "q_proj")
    with pytest.raises(ValueError, match="lora.targets.*query_key_value.*q_proj"):
        lora.resolve_targets(llama, ["q_proj", "query_key_value"])
    with pytest.raises(ValueError, match="lora.targets.*nothing"):
        lora.resolve_targets(llama, [])


def test_rank_below_one_is_refused():
    config, _ = base("llama_mha")
    with pytest.raises(ValueError, match="rank .* at least 1, got 0"):
        lora.init_adapter(config, jax.random.key(0), 0, ("q_proj",))


def test_dropout():
    """Of the adapter's inputs alone, independent in each layer, and only where the caller gives a key."""
    rate, width = 0.3, 64
    config = dataclasses.replace(base("llama_mha")[0], adapter_dropout=rate, adapter_scale=2.0, dtype="float32")
    projection = layers.Projection(width, False, config)
    x, eye = jnp.ones((200, width)), jnp.eye(width)
    variables = {"params": {"kernel": 10 * eye}, "adapter": {"a": eye, "b": eye}}
    np.testing.assert_array_equal(projection.apply(variables, x), jnp.full((200, width), 12.0))
    dropped = projection.apply(variables, x, rngs={"dropout": jax.random.key(0)})
    kept = np.isclose(dropped, 10 + 2 / (1 - rate))
    assert (kept | (np.asarray(dropped) == 10)).all()
    deviation = np.sqrt(rate * (1 - rate) / kept.size)
    assert abs(kept.mean() - (1 - rate)) < 5 * deviation


@pytest.mark.parametrize("rank, rslora, expected", [(4, False, 2.0), (4, True, 4.0), (0, False, 1.0)])
def test_scale(rank, rslora, expected):
    assert lora.scale(8.0, rank, rslora) == expected

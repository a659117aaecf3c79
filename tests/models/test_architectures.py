"""A new architecture is one record: Qwen2, as docs/adding_a_model.md adds it, against an equivalent Llama."""

import dataclasses
import json
import pathlib
import re

import jax
import numpy as np
import pytest

from bilevel_jax.export import merged_model
from bilevel_jax.models import architectures, decoder, huggingface
from tests.models import models

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "adding_a_model.md"
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 12))


@pytest.fixture
def qwen2(monkeypatch):
    """The record of the page, registered."""
    code = next(block for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S) if "QWEN2 =" in block)
    namespace = vars(architectures).copy()
    exec(code, namespace)
    monkeypatch.setattr(architectures, "ARCHITECTURES", namespace["ARCHITECTURES"])
    return namespace["QWEN2"]


@pytest.fixture
def pair(qwen2, tmp_path):
    """A Llama with attention biases, that of its output 0, and a Qwen2 directory with the same weights: `(config, params) x 2`."""
    config, params = models.load("llama_bias")
    config = dataclasses.replace(config, mlp_bias=False)
    layers = jax.tree.map(lambda leaf: leaf, params["layers"])
    for name in ("gate_proj", "up_proj", "down_proj"):
        del layers["mlp"][name]["bias"]
    layers["self_attn"]["o_proj"]["bias"] = np.zeros_like(layers["self_attn"]["o_proj"]["bias"])
    llama = config, params | {"layers": layers}

    without = jax.tree.map(lambda leaf: leaf, layers)
    del without["self_attn"]["o_proj"]["bias"]
    settings = json.loads((models.FIXTURES / "llama_bias" / "config.json").read_text())
    settings |= {"model_type": "qwen2", "use_sliding_window": False, "attention_bias": True}  # which Qwen2 does not read
    config = dataclasses.replace(config, architecture="qwen2", attention_bias=False)
    huggingface.save_params(tmp_path / "qwen2", config, params | {"layers": without})
    (tmp_path / "qwen2" / "config.json").write_text(json.dumps(settings))
    assert huggingface.read_config(tmp_path / "qwen2") == config
    return llama, huggingface.load_model(str(tmp_path / "qwen2"))


def test_a_new_record_is_loaded_computed_and_decoded(pair):
    (llama, llama_params), (config, params) = pair
    expected = models.logits(llama, llama_params, None, TOKENS)
    np.testing.assert_allclose(models.logits(config, params, None, TOKENS), expected, rtol=0, atol=1e-5)
    cache = decoder.prefill(config, params, None, TOKENS[:, :-1])
    layers = decoder.split_layers(params, config)
    hidden, _ = decoder.decode(config, layers, None, cache, TOKENS[:, -1], np.full(2, TOKENS.shape[1] - 1))
    np.testing.assert_allclose(hidden @ decoder.head(params).T, expected[:, -1], rtol=0, atol=1e-4)


def test_a_new_record_takes_adapters_and_merges(pair, tmp_path):
    _, (config, params) = pair
    adapter = models.random_adapter(config)
    assert adapter["layers"]["self_attn"].keys() == {"q_proj", "k_proj", "v_proj", "o_proj"}
    huggingface.save_adapter(tmp_path / "adapter", config, adapter, alpha=4.0, base="qwen2")  # rank 4: scale 1
    loaded_config, loaded = huggingface.load_adapter(tmp_path / "adapter", config)
    assert loaded_config == config
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)
    merged_model.write_merged_model(tmp_path / "qwen2", tmp_path / "adapter", tmp_path / "merged")
    _, merged = huggingface.load_model(str(tmp_path / "merged"))
    expected = models.logits(config, params, adapter, TOKENS)
    np.testing.assert_allclose(models.logits(config, merged, None, TOKENS), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("change, words", [({"use_sliding_window": True}, "use_sliding_window=True is not supported")])
def test_unsupported_keys_are_refused(qwen2, tmp_path, change, words):
    settings = json.loads((models.FIXTURES / "llama_mha" / "config.json").read_text()) | {"model_type": "qwen2"}
    (tmp_path / "config.json").write_text(json.dumps(settings | change))
    with pytest.raises(huggingface.ModelError, match=f"config.json: {words}"):
        huggingface.read_config(tmp_path)


@pytest.mark.parametrize("record", architectures.ARCHITECTURES.values(), ids=architectures.ARCHITECTURES)
def test_names_of_projections_are_unique(record):
    assert len(record.projections) == len(record.qkv) + len(record.mlp_inputs) + 2


def test_one_name_with_two_shardings_is_refused(monkeypatch):
    output = architectures.Linear("o_proj", "mlp", "hidden", False)
    other = dataclasses.replace(architectures.LLAMA, model_type="other", mlp_output=output)
    monkeypatch.setitem(architectures.ARCHITECTURES, "other", other)
    with pytest.raises(ValueError, match="other: o_proj"):
        architectures.sharding_axes()

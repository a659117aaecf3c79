"""Models of random weights, for benchmarks."""

import json

import jax
import jax.numpy as jnp
import pytest

from bilevel_jax.models import decoder, huggingface
from experiments.benchmarks import random_model
from tests.conftest import COMMON, MODELS


@pytest.mark.parametrize("architecture", list(MODELS))
@pytest.mark.slow
def test_the_model_has_the_shape_and_loads(neox, tmp_path, architecture):
    out = tmp_path / "model"
    random_model.make(out, COMMON | MODELS[architecture], str(neox))
    model, base = huggingface.load_model(str(out), "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(base)} == {jnp.dtype("bfloat16")}
    logits = decoder.logits(model, base, None, jnp.arange(5)[None])
    assert logits.shape == (1, 5, COMMON["vocab_size"]) and jnp.isfinite(logits).all() and jnp.ptp(logits) > 0
    with pytest.raises(ValueError, match="already exists"):
        random_model.make(out, COMMON | MODELS[architecture], str(neox))
    with pytest.raises(ValueError, match="has 300 tokens, the model only 299"):
        random_model.make(tmp_path / "other", COMMON | MODELS[architecture] | {"vocab_size": 299}, str(neox))


@pytest.mark.parametrize("name, parameters", [("pythia-1b", 1_011_781_632), ("llama3-8b", 8_030_261_248)])
def test_shapes_are_the_published_ones(tmp_path, name, parameters):
    """Counts of the published checkpoints."""
    (tmp_path / "config.json").write_text(json.dumps(random_model.SHAPES[name]))
    model = huggingface.read_config(tmp_path)
    shapes = jax.eval_shape(lambda: decoder.init_params(model, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters

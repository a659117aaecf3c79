"""Models of the fixtures, and compiled functions, shared by the tests of this directory."""

import functools
import pathlib

import jax
import safetensors.numpy

from bilevel_jax.models import decoder, huggingface, lora, model_config

FIXTURES = pathlib.Path(__file__).parent / "fixtures"

logits = jax.jit(decoder.logits, static_argnums=0)
init_params = jax.jit(decoder.init_params, static_argnums=0)


@functools.cache
def load(variant: str, dtype: str = "float32"):
    """Config and weights of a fixture. All tests share them."""
    return huggingface.load_model(str(FIXTURES / variant), dtype)


@functools.cache
def reference(directory: str) -> dict:
    """The tokens and the reference logits of a fixture."""
    return safetensors.numpy.load_file(FIXTURES / directory / "reference.safetensors")


@functools.cache
def initial_adapter(config: model_config.ModelConfig, rank: int = 4, targets: str | tuple = "all-linear"):
    """The adapter at the start of training."""
    init = jax.jit(lora.init_adapter, static_argnums=(0, 2, 3))
    return init(config, jax.random.key(0), rank, lora.resolve_targets(config, targets))


@functools.cache
def random_adapter(config: model_config.ModelConfig, rank: int = 4, scale: float = 0.3, targets: str | tuple = "all-linear"):
    """An adapter whose matrices are all random, large enough to change each logit."""
    leaves, tree = jax.tree.flatten(initial_adapter(config, rank, targets))

    @jax.jit
    def draw(key):
        keys = jax.random.split(key, len(leaves))
        return [scale * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]

    return tree.unflatten(draw(jax.random.key(1)))

"""What is learned: LoRA adapters, their projections, initial values and merge into the base; or all weights of the model.

An adapter mirrors the base: `{"layers": {"mlp": {"down_proj": {"a": [Y, in, r], "b": [Y, r, out]}}}}`, float32, stacked over the
Y layers that are adapted: all, or the last ones (`lora.layers`). With `lora.rank=0` there is no adapter: in its place is a float32
copy of all weights, in the layout of the base.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from bilevel_jax.models import model_config


def projections(config: model_config.ModelConfig) -> dict[str, tuple[str, int, int]]:
    """All linear layers of a decoder layer: name -> (submodule, input width, output width)."""
    return {
        name: (module, config.width(linear.inputs), config.width(linear.outputs))
        for name, (module, linear) in config.record.projections.items()
    }


def resolve_targets(config: model_config.ModelConfig, targets) -> tuple[str, ...]:
    """The names of the projections to adapt.

    Args:
      config: shape of the model.
      targets: `"all-linear"`, names separated by commas, or a list of names.

    Raises:
      ValueError: the architecture does not have a name, or there is none.
    """
    available = projections(config)
    if targets == "all-linear":
        return tuple(available)
    names = tuple(targets.split(",") if isinstance(targets, str) else targets)
    unknown = [name for name in names if name not in available]
    if unknown or not names:
        raise ValueError(f"lora.targets: {unknown or 'nothing'} is not among {', '.join(available)} of {config.architecture}")
    return names


def is_layers(layers: str) -> bool:
    """Whether this is a value of `lora.layers`: `all`, or `last:K` with K of at least 1."""
    return layers == "all" or bool(re.fullmatch(r"last:[1-9]\d{0,5}", layers))


def resolve_layers(config: model_config.ModelConfig, layers: str) -> int:
    """The number of layers to adapt, which are the last ones.

    Args:
      config: shape of the model.
      layers: `all` or `last:K`, see `is_layers`.

    Raises:
      ValueError: the model has fewer layers.
    """
    number = config.num_layers if layers == "all" else int(layers.removeprefix("last:"))
    if number > config.num_layers:
        raise ValueError(
            f"lora.layers={layers}, but the model has {config.num_layers} layers; take last:K with a smaller K, or all"
        )
    return number


def scale(alpha: float, rank: int, rslora: bool = False) -> float:
    """The factor of A B: alpha / rank, or alpha / √rank (rsLoRA, Kalajdzievski 2023); 1 without an adapter."""
    if not rank:
        return 1.0
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def is_full(adapter) -> bool:
    """Whether the learned parameters are all weights of the model, and not an adapter."""
    return adapter is not None and "embed_tokens" in adapter


def in_use(config: model_config.ModelConfig, base, adapter) -> tuple[Any, Any]:
    """`(params, adapter)` with which the model computes: all weights that were learned, rounded, stand in for the base."""
    if is_full(adapter):
        return jax.tree.map(lambda leaf: leaf.astype(config.dtype), adapter), None
    return base, adapter


def init_adapter(
    config: model_config.ModelConfig, key: jax.Array, rank: int, targets: tuple[str, ...], num_layers: int | None = None
):
    """Initial adapter, as in PEFT: A ~ U(-1/√in, 1/√in), which is kaiming_uniform(a=√5), and B = 0, so the model is unchanged.

    It has the last `num_layers` layers, by default all.

    Raises:
      ValueError: the rank is below 1.
    """
    if rank < 1:
        raise ValueError(f"the rank of an adapter must be at least 1, got {rank}")
    modules: dict[str, dict[str, dict[str, jax.Array]]] = {}
    num_layers = num_layers or config.num_layers
    for name, (module, width_in, width_out) in projections(config).items():
        if name not in targets:
            continue
        key, key_a = jax.random.split(key)
        bound = 1 / math.sqrt(width_in)
        a = jax.random.uniform(key_a, (num_layers, width_in, rank), jnp.float32, -bound, bound)
        b = jnp.zeros((num_layers, rank, width_out), jnp.float32)
        modules.setdefault(module, {})[name] = {"a": a, "b": b}
    return {"layers": modules}


def init_full(base):
    """All weights as learned parameters at their start: a float32 copy of the base, of the same sharding."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), base)


def merge_adapter(config: model_config.ModelConfig, params, adapter):
    """Base weights W + scale · A B, computed in float32 and rounded once to the dtype of the base."""
    params, adapter = in_use(config, params, adapter)
    if adapter is None:
        return params
    layers = {module: dict(weights) for module, weights in params["layers"].items()}
    for module, weights in adapter["layers"].items():
        for name, low_rank in weights.items():
            kernel = layers[module][name]["kernel"]
            delta = jnp.einsum("nir,nro->nio", low_rank["a"], low_rank["b"]) * config.adapter_scale
            first = kernel.shape[0] - delta.shape[0]
            merged = (kernel[first:].astype(jnp.float32) + delta).astype(kernel.dtype)
            merged = jnp.concatenate([kernel[:first], merged]) if first else merged
            layers[module][name] = layers[module][name] | {"kernel": merged}
    return params | {"layers": layers}

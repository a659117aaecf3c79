"""Low-rank adapters: which projections carry one, how it starts, how it merges into the base.

An adapter is a pytree that mirrors the base: `{"layers": {"mlp": {"down_proj": {"a": [N, in, r], "b": [N, r, out]}}}}`, float32,
stacked over the N layers like the base itself.
"""

import math

import jax
import jax.numpy as jnp

from bilevel_jax.models import decoder


def projections(config: decoder.ModelConfig) -> dict[str, tuple[str, int, int]]:
    """Every linear layer of a decoder layer: name -> (submodule, input width, output width)."""
    D, F, C = config.hidden_size, config.intermediate_size, config.head_dim
    if config.architecture == "llama":
        return {
            "q_proj": ("self_attn", D, config.num_heads * C),
            "k_proj": ("self_attn", D, config.num_kv_heads * C),
            "v_proj": ("self_attn", D, config.num_kv_heads * C),
            "o_proj": ("self_attn", config.num_heads * C, D),
            "gate_proj": ("mlp", D, F),
            "up_proj": ("mlp", D, F),
            "down_proj": ("mlp", F, D),
        }
    return {
        "query_key_value": ("attention", D, 3 * config.num_heads * C),
        "dense": ("attention", config.num_heads * C, D),
        "dense_h_to_4h": ("mlp", D, F),
        "dense_4h_to_h": ("mlp", F, D),
    }


def resolve_targets(config: decoder.ModelConfig, targets) -> tuple[str, ...]:
    """Projection names for `"all-linear"`, names separated by commas, or a list of names.

    Raises:
      ValueError: a name that this architecture does not have.
    """
    known = projections(config)
    if targets == "all-linear":
        return tuple(known)
    names = tuple(targets.split(",") if isinstance(targets, str) else targets)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"lora.targets: {unknown or 'nothing'} is not among {', '.join(known)} of {config.architecture}")
    return names


def init_adapter(config: decoder.ModelConfig, key: jax.Array, rank: int, targets: tuple[str, ...]):
    """PEFT's initialisation: A ~ U(-1/√in, 1/√in), which is kaiming_uniform(a=√5), and B = 0, so the model starts unchanged."""
    if rank < 1:
        raise ValueError(f"lora.rank must be at least 1, got {rank}")
    modules = {}
    for name, (module, width_in, width_out) in projections(config).items():
        if name not in targets:
            continue
        key, key_a = jax.random.split(key)
        bound = 1 / math.sqrt(width_in)
        a = jax.random.uniform(key_a, (config.num_layers, width_in, rank), jnp.float32, -bound, bound)
        b = jnp.zeros((config.num_layers, rank, width_out), jnp.float32)
        modules.setdefault(module, {})[name] = {"a": a, "b": b}
    return {"layers": modules}


def merge_adapter(config: decoder.ModelConfig, params, adapter):
    """Base weights with the adapter folded in: W + scale · A B, computed in float32 and rounded once to the base's dtype."""
    layers = {module: dict(weights) for module, weights in params["layers"].items()}
    for module, weights in adapter["layers"].items():
        for name, low_rank in weights.items():
            kernel = layers[module][name]["kernel"]
            delta = jnp.einsum("nir,nro->nio", low_rank["a"], low_rank["b"]) * config.adapter_scale
            merged = (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
            layers[module][name] = layers[module][name] | {"kernel": merged}
    return params | {"layers": layers}

"""What differs between the layers of a model: sliding windows, and rotary positions with another base or none.

Layers are stacked and scanned, so these are arrays over layers, and tables from which a layer takes one by its index. A model whose
layers are equal has neither.

Axes: Y layers, S sequences, L positions.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax.models import rotary
from bilevel_jax.models.model_config import ModelConfig

EVERYTHING = np.iinfo(np.int32).max  # the window of a layer without one, where others have one


def settings(config: ModelConfig, length: int) -> dict[str, np.ndarray]:
    """The arrays over layers, int32 [Y].

    Args:
      config: of the model.
      length: of the sequences, or of the cache; a window of this length or more hides nothing.

    Returns:
      `window`, if a layer has one, and `rotation`, the index of the layer in `rotary_table`, if there are several.
    """
    arrays, rotations = {}, _rotations(config)
    distinct = list(dict.fromkeys(rotations))
    if len(distinct) > 1:
        arrays["rotation"] = np.array([distinct.index(rotation) for rotation in rotations], np.int32)
    windows = config.windows[: config.num_layers]
    if any(0 < window < length for window in windows):
        arrays["window"] = np.array([window or EVERYTHING for window in windows], np.int32)
    return arrays


def distinct_windows(config: ModelConfig, length: int) -> tuple[int, ...]:
    """All values that `window` of `settings` has; none if it has no `window`."""
    return tuple(sorted({int(window) for window in settings(config, length).get("window", ())}))


def rotary_table(positions_SxL: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """`rotary.table` of the positions; a stack of tables if layers differ. A layer without rotary positions has angles of 0."""
    tables = []
    for rotation in dict.fromkeys(_rotations(config)):
        theta, scaling = rotation or (config.rope_theta, None)
        frequency = rotary.frequencies(config.rotary_dim, theta, scaling)
        factor = getattr(scaling, "attention_factor", 1.0)
        tables.append(rotary.table(positions_SxL, frequency if rotation else jnp.zeros_like(frequency), factor))
    return tables[0] if len(tables) == 1 else jax.tree.map(lambda *parts: jnp.stack(parts), *tables)


def _rotations(config: ModelConfig) -> list[tuple[float, rotary.Scaling | None] | None]:
    """Base and scaling of the rotary positions of each layer; None for a layer without."""

    def rotation(layer: int):
        if config.rotated and not config.rotated[layer]:
            return None
        is_local = config.local_rope_theta is not None and config.windows and config.windows[layer]
        return (config.local_rope_theta, None) if is_local else (config.rope_theta, config.rope_scaling)

    return [rotation(layer) for layer in range(config.num_layers)]


def for_length(config: ModelConfig, length: int) -> ModelConfig:
    """The config for a run whose sequences have up to `length` tokens.

    Only LongRoPE depends on it: a run with sequences beyond the original context uses the long factors for all its sequences.
    """
    scaling = config.rope_scaling
    if not isinstance(scaling, rotary.LongRope):
        return config
    is_long = length > scaling.original_max_positions
    return dataclasses.replace(config, rope_scaling=dataclasses.replace(scaling, is_long=is_long))

"""Rotary positions: the angle of each pair of features at each position, and their scalings for long contexts.

Axes: S sequences, L positions, H heads, C head width.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """All frequencies divided by `factor`."""

    factor: float


@dataclasses.dataclass(frozen=True)
class Llama3:
    """The scaling of Llama 3.1: long wavelengths times `factor`, short ones unchanged, interpolated in between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN (Peng et al. 2023): frequencies divided by `factor` where a pair makes fewer than `beta_slow` turns within the original
    context, unchanged where it makes more than `beta_fast`, interpolated in between."""

    factor: float
    attention_factor: float  # multiplies rotated queries and keys
    beta_fast: float
    beta_slow: float
    original_max_positions: int
    truncate: bool  # whether the interval of interpolation is extended to whole pairs


@dataclasses.dataclass(frozen=True)
class LongRope:
    """LongRoPE (Ding et al. 2024): each frequency divided by its own factor, from one of two lists."""

    short_factors: tuple[float, ...]  # for sequences within the original context
    long_factors: tuple[float, ...]
    attention_factor: float  # multiplies rotated queries and keys
    original_max_positions: int
    is_long: bool = False  # which list; see `layer_settings.for_length`


Scaling = LinearScaling | Llama3 | Yarn | LongRope


def frequencies(rotary_dim: int, theta: float, scaling: Scaling | None) -> jax.Array:
    """Angular frequencies [rotary_dim / 2], float32, in radians per position."""
    exponents = jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim
    unscaled = 1.0 / theta**exponents
    if scaling is None:
        return unscaled
    if isinstance(scaling, LinearScaling):
        return unscaled / scaling.factor
    if isinstance(scaling, LongRope):
        return unscaled / jnp.array(scaling.long_factors if scaling.is_long else scaling.short_factors)
    unchanged = _yarn_ramp(rotary_dim, theta, scaling) if isinstance(scaling, Yarn) else _llama3_ramp(unscaled, scaling)
    return unscaled * (unchanged + (1 - unchanged) / scaling.factor)


def _llama3_ramp(unscaled: jax.Array, scaling: Llama3) -> jax.Array:
    """The share of each unscaled frequency: 1 for short wavelengths, 0 for long ones."""
    turns = scaling.original_max_positions * unscaled / (2 * jnp.pi)  # full turns within the original context
    ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return jnp.clip(ramp, 0.0, 1.0)


def _yarn_ramp(rotary_dim: int, theta: float, scaling: Yarn) -> jax.Array:
    """The share of each unscaled frequency. It is linear in the index of the pair, not in its number of turns."""

    def pair(turns: float) -> float:  # the index of the pair that makes so many turns within the original context
        return rotary_dim * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    high += 0.001 if low == high else 0
    return 1 - jnp.clip((jnp.arange(rotary_dim // 2, dtype=jnp.float32) - low) / (high - low), 0, 1)


def table(positions_SxL: jax.Array, frequency: jax.Array, factor: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """`factor` times cosine and sine of the angles of each position, each [S, L, 1, rotary_dim / 2]."""
    angles = positions_SxL[..., None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


def rotate(x_SxLxHxC: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the first rotary_dim features, in pairs (i, i + rotary_dim / 2), by the angles of the table."""
    cos, sin = table
    half = cos.shape[-1]
    x = x_SxLxHxC.astype(jnp.float32)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    rotated = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(rotated, axis=-1).astype(x_SxLxHxC.dtype)

"""Norms that Flax does not have, with the arguments of its norms."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class OffsetRMSNorm(nn.Module):
    """x / √(mean x² + ε) · (1 + w), computed in float32. The weights start at 0."""

    epsilon: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.zeros_init(), (x.shape[-1],), self.param_dtype)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * (1 + scale.astype(jnp.float32))).astype(self.dtype)

"""The parts of a decoder: products, projections, attention, the feed-forward block, one layer, and embeddings.

Axes: S sequences, L positions, T = S·L tokens, D hidden, H query heads, K key/value heads, C head width, F feed-forward width,
V vocabulary, I input and O output width of a product. Activations have shape [T, D], and [S, L, ...] inside attention only: on a
CPU this makes the backward pass of the products 1.4x faster, elsewhere it is free.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import linen as nn

from bilevel_jax import sharding
from bilevel_jax.models import architectures, attention, fused_attention, layer_settings, probes, quantization, rotary
from bilevel_jax.models.model_config import ACTIVATIONS, ModelConfig


def _product(x, y, x_axis: int, y_axis: int, dtype) -> jax.Array:
    return jax.lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=dtype)


def matmul_plain(x_TxI: jax.Array, w_IxO: jax.Array) -> jax.Array:
    """`matmul`, with derivatives of every order and in both modes."""
    return _product(x_TxI.astype(w_IxO.dtype), w_IxO, 1, 0, x_TxI.dtype)


@jax.custom_vjp
def matmul(x_TxI: jax.Array, w_IxO: jax.Array) -> jax.Array:
    """x w, [T, O], in the dtype of x. All factors are rounded to the dtype of w, also in the backward pass.

    The product of a float32 and a bfloat16 array costs as much as a product of two float32 arrays.
    """
    return matmul_plain(x_TxI, w_IxO)


def _matmul_forward(x, w):
    return matmul(x.value, w.value), (x.value if w.perturbed else None, w.value, jnp.zeros((), x.value.dtype))


def _matmul_backward(residuals, d_TxO):
    x, w, like_x = residuals  # `like_x` carries the dtype of x; x itself is None if w is frozen
    d = d_TxO.astype(w.dtype)
    d_w = None if x is None else _product(x.astype(w.dtype), d, 0, 0, w.dtype)
    return _product(d, w, 1, 1, like_x.dtype), d_w


matmul.defvjp(_matmul_forward, _matmul_backward, symbolic_zeros=True)


class Projection(nn.Module):
    """y = x W + b + scale · (x A) B. The last term needs A [I, r] and B [r, O] in the collection `adapter`.

    With a `probe` [T] and a direction in it, the derivative of the probe is measured, see `probes`.

    A quantised W is dequantised here, so that only one layer has it in full at a time.
    """

    features: int
    use_bias: bool
    config: ModelConfig

    @nn.compact
    def __call__(self, x_TxI: jax.Array) -> jax.Array:
        dtype = jnp.dtype(self.config.dtype)
        kernel = self._kernel(x_TxI.shape[-1], dtype)
        product = matmul_plain if self.config.second_order else matmul
        y = product(x_TxI, kernel)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros_init(), (self.features,), dtype)
        if self.has_variable("adapter", "a"):
            a: jax.Array = self.get_variable("adapter", "a").astype(dtype)
            b: jax.Array = self.get_variable("adapter", "b").astype(dtype)
            dropped = self._dropped(x_TxI)
            low_rank = attention.save(product(dropped, a))
            update = self._probed(probes.of_adapter, product(low_rank, b), dropped, low_rank, b)
            y = y + scaled(update, self.config.adapter_scale)
        else:
            y = self._probed(probes.of_weights, y, x_TxI)
        return attention.save(y)

    def _probed(self, function, y_TxO: jax.Array, *factors) -> jax.Array:
        """y itself; with a probe, the function measures the derivative along the directions in the collection."""
        if not self.has_variable("adapter", "probe"):
            return y_TxO
        names = ("direction_a", "direction_b") if function is probes.of_adapter else ("direction_kernel",)
        directions: Iterable[jax.Array] = (self.get_variable("adapter", name).astype(self.config.dtype) for name in names)
        return function(y_TxO, self.get_variable("adapter", "probe"), *factors, *directions)

    def _kernel(self, width: int, dtype) -> jax.Array:
        """W [I, O]."""
        kind = self.config.quantization
        if kind == "none":
            return self.param("kernel", nn.initializers.normal(0.02), (width, self.features), dtype)
        assert self.name is not None  # the parent gives it
        kernel = self.param("kernel", functools.partial(quantization.random, kind), width, self.features)
        return quantization.dequantize(sharding.gather_kernel(self.name, kernel), dtype)

    def _dropped(self, x_TxI: jax.Array) -> jax.Array:
        """The input of LoRA, with dropout where the caller gives a key for it."""
        rate = self.config.adapter_dropout
        if not rate or not self.has_rng("dropout"):
            return x_TxI
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, x_TxI.shape)
        return jnp.where(kept, x_TxI / (1 - rate), 0.0).astype(x_TxI.dtype)


def _linear(config: ModelConfig, linear: architectures.Linear) -> Projection:
    use_bias = linear.bias if isinstance(linear.bias, bool) else getattr(config, linear.bias)
    return Projection(config.width(linear.outputs), use_bias, config, name=linear.name)


def norm(config: ModelConfig, name: str | None) -> nn.Module:
    """The norm of this architecture, as a submodule called `name`."""
    return config.record.norm(epsilon=config.norm_eps, dtype=config.activations, param_dtype=config.dtype, name=name)


def _optional_norm(config: ModelConfig, name: str | None, x_TxD: jax.Array) -> jax.Array:
    return x_TxD if name is None else norm(config, name)(x_TxD)


def scaled(x: jax.Array, scale: float) -> jax.Array:
    """x times a number, rounded once; x itself if the number is 1."""
    return x if scale == 1 else (x.astype(jnp.float32) * scale).astype(x.dtype)


class Attention(nn.Module):
    """Attention within the segments of a packed batch, or, with a `cache`, of one token per row to the cache and itself."""

    config: ModelConfig

    def _heads(self, x_TxD, S: int, L: int) -> list[jax.Array]:
        """Queries [S, L, H, C], keys and values [S, L, K, C]."""
        c, record = self.config, self.config.record
        projected = []
        for linear in record.qkv:
            x_SxLxHxC = _linear(c, linear)(x_TxD).reshape(S, L, -1, c.head_dim)
            projected.append(sharding.constrain(x_SxLxHxC, "rows", None, "heads"))
        if len(projected) == 3:
            return projected
        if record.qkv[0].outputs == "fused_qkv":
            parts = jnp.split(projected[0], [c.num_heads, c.num_heads + c.num_kv_heads], axis=2)
            return [sharding.constrain(part, "rows", None, "heads") for part in parts]
        fused = sharding.constrain(projected[0].reshape(S, L, c.num_heads, 3, c.head_dim), "rows", None, "heads")
        return [fused[..., 0, :], fused[..., 1, :], fused[..., 2, :]]

    def _normed(self, name: str, x_SxLxHxC):
        """Queries or keys, normalised head by head, or over all heads."""
        S, L, *_ = shape = x_SxLxHxC.shape
        x = x_SxLxHxC.reshape(S, L, -1) if self.config.record.norm_over_heads else x_SxLxHxC
        return norm(self.config, name)(x).reshape(shape)

    def _attend(self, q, k, v, segments_SxL, window):
        """Attention within the segments of a packed batch."""
        c = self.config
        if c.second_order:
            return attention.attend_plain(q, k, v, segments_SxL, c.dtype, window, c.attention_cap)
        if fused_attention.takes(c, q.shape[1]):
            windows = layer_settings.distinct_windows(c, q.shape[1])
            return fused_attention.attend(c.attention, q, k, v, segments_SxL, c.dtype, window, c.attention_cap, windows)
        return attention.attend(q, k, v, segments_SxL, c.dtype, window, c.attention_cap)

    @nn.compact
    def __call__(self, x_TxD, table, segments_SxL=None, position_S=None, window=None):
        c, record = self.config, self.config.record
        S, L = table[0].shape[:2]
        q, k, v = self._heads(x_TxD, S, L)
        if record.query_norm and record.key_norm:
            q, k = self._normed(record.query_norm, q), self._normed(record.key_norm, k)
        q, k = rotary.rotate(q, table), rotary.rotate(k, table)
        q = scaled(q, c.query_scale)
        if self.has_variable("cache", "key"):
            cached = {name: self.get_variable("cache", name) for name in ("key", "value")}
            cached = attention.append(cached, k[:, 0], v[:, 0], position_S)
            for name, array in cached.items():
                self.put_variable("cache", name, array)
            attended = attention.attend_cached(q[:, 0], cached["key"], cached["value"], position_S, window, c.attention_cap)
        else:
            for name, array in (("key", k), ("value", v)):
                self.sow("prefilled", name, array, reduce_fn=lambda _, last: last, init_fn=lambda: None)
            attended = self._attend(q, k, v, segments_SxL, window)
        return _linear(c, record.attention_output)(attended.reshape(S * L, -1))


class FeedForward(nn.Module):
    """The feed-forward block: act(x W_gate) · x W_up, or act(x W_up), then the output projection."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_TxD):
        c, record = self.config, self.config.record
        inputs = [_linear(c, linear)(x_TxD) for linear in record.mlp_inputs]
        if record.mlp_inputs[0].outputs == "fused_mlp":
            inputs = jnp.split(inputs[0], 2, axis=-1)
        first, *rest = (sharding.constrain(x_TxF, "rows", "mlp") for x_TxF in inputs)
        hidden_TxF = ACTIVATIONS[c.activation](first)
        for factor_TxF in rest:
            hidden_TxF = hidden_TxF * factor_TxF
        return _linear(c, record.mlp_output)(hidden_TxF)


class Layer(nn.Module):
    """One decoder layer, [T, D] -> ([T, D], None). Takes segments, or positions with a `cache`, see `Attention`."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_TxD, table, segments_SxL=None, settings=None, position_S=None):
        c, record, settings = self.config, self.config.record, settings or {}
        if "rotation" in settings:
            table = jax.tree.map(lambda stack: stack[settings["rotation"]], table)
        attention_input = _optional_norm(c, record.attention_norm, x_TxD)
        attend = Attention(c, name=record.attention)
        attended = attend(attention_input, table, segments_SxL, position_S, settings.get("window"))
        attended = scaled(_optional_norm(c, record.attention_output_norm, attended), c.residual_scale)
        middle = x_TxD if c.parallel_residual else x_TxD + attended
        mlp_output = FeedForward(c, name=record.mlp)(_optional_norm(c, record.mlp_norm, middle))
        y = middle + scaled(_optional_norm(c, record.mlp_output_norm, mlp_output), c.residual_scale)
        return sharding.constrain(y + attended if c.parallel_residual else y, "rows"), None


def embed(config: ModelConfig, embedding_VxD: jax.Array, tokens_T: jax.Array) -> jax.Array:
    """Embeddings [T, D] of tokens, scaled.

    On a mesh, each device looks up its part of D for the tokens of other devices too, and then they exchange the results. This
    sends far less than the embedding itself.
    """
    x_TxD = sharding.constrain(sharding.constrain(embedding_VxD[tokens_T], "stripes", "hidden"), "rows")
    x_TxD = x_TxD.astype(config.activations)
    if config.record.scaled_embedding:
        return x_TxD * jnp.asarray(config.embedding_scale, embedding_VxD.dtype).astype(x_TxD.dtype)  # rounded as in `transformers`
    return scaled(x_TxD, config.embedding_scale)

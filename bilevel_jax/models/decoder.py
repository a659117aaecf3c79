"""One causal decoder, two architectures: GPT-NeoX (Pythia) and Llama.

Linen rather than NNX: the training step is a pure function of `(base, adapter, ...)`, and Linen keeps exactly these apart as
two collections of one `apply` call. `params` is the frozen base, `adapter` the low-rank update; leaving `adapter` out of the
call *is* the base model, which is what a reference policy needs. In the same way a layer that is given a `cache` decodes: its
input is then one token of each row, appended to what the cache holds (see `decode`), and a call with `prefilled` mutable
leaves the keys and values there that a cache starts from. Layers are stacked and scanned, so compilation does not grow with
depth. Submodules carry Hugging Face's names, which makes conversion a rule instead of a table.

Axes: S sequences, L positions, T = S·L tokens, D hidden, H query heads, K key/value heads, C head width, F feed-forward width.
Activations are kept token-flat, [T, D], and take the [S, L, ...] shape only inside attention: on a CPU that makes the backward
pass of the matmuls 1.4x faster, elsewhere it costs nothing.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from bilevel_jax import sharding
from bilevel_jax.models import attention

ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """Frequency-dependent stretch of Llama 3.1: long wavelengths by `factor`, short ones not at all, a ramp in between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that shapes the decoder. Built from a Hugging Face config by `huggingface.read_config`."""

    architecture: str  # "llama" or "gpt_neox"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int  # the first rotary_dim of head_dim are rotated
    max_positions: int
    activation: str
    norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Rope | float | None = None  # a float divides all frequencies ("linear")
    parallel_residual: bool = False  # x + attn(n1(x)) + mlp(n2(x)) instead of one after the other
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    adapter_scale: float = 1.0  # LoRA's alpha / rank
    remat: bool = False  # the backward pass recomputes each layer; else it keeps what products gave, and recomputes the rest
    dtype: str = "float32"  # of base weights, the cache and the factors of matrix products; the rest is computed in float32
    activations: str = "float32"  # of what goes from one operation to the next


# --------------------------------------------------------------------------------------------------------------------
# Rotary positions
# --------------------------------------------------------------------------------------------------------------------


def rotary_frequencies(config: ModelConfig) -> jax.Array:
    """Angular frequencies [rotary_dim / 2], float32, in radians per position."""
    exponents = jnp.arange(0, config.rotary_dim, 2, dtype=jnp.float32) / config.rotary_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if not isinstance(scaling, Llama3Rope):
        return frequencies / scaling
    turns = scaling.original_max_positions * frequencies / (2 * jnp.pi)  # full turns within the original context
    ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    ramp = jnp.clip(ramp, 0.0, 1.0)
    return frequencies * (ramp + (1 - ramp) / scaling.factor)


def rotary_table(positions_SxL: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every position's angles, each [S, L, 1, rotary_dim / 2]."""
    angles = positions_SxL[..., None].astype(jnp.float32) * rotary_frequencies(config)
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def rotate(x_SxLxHxC: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the leading rotary_dim features, paired as (i, i + rotary_dim/2), by the table's angles."""
    cos, sin = table
    half = cos.shape[-1]
    x = x_SxLxHxC.astype(jnp.float32)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    rotated = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(rotated, axis=-1).astype(x_SxLxHxC.dtype)


# --------------------------------------------------------------------------------------------------------------------
# Layers
# --------------------------------------------------------------------------------------------------------------------


def _product(x, y, x_axis: int, y_axis: int, dtype) -> jax.Array:
    return jax.lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=dtype)


@jax.custom_vjp
def matmul(x_TxI: jax.Array, w_IxO: jax.Array) -> jax.Array:
    """x w, [T, O], in x's dtype. All factors are rounded to w's, those of the backward pass too: the product of a float32 and a
    bfloat16 array costs as much as one of two float32 arrays."""
    return _product(x_TxI.astype(w_IxO.dtype), w_IxO, 1, 0, x_TxI.dtype)


def _matmul_forward(x, w):
    return matmul(x.value, w.value), (x.value if w.perturbed else None, w.value, jnp.zeros((), x.value.dtype))


def _matmul_backward(kept, d_TxO):
    x, w, like_x = kept
    d = d_TxO.astype(w.dtype)
    d_w = None if x is None else _product(x.astype(w.dtype), d, 0, 0, w.dtype)
    return _product(d, w, 1, 1, like_x.dtype), d_w


matmul.defvjp(_matmul_forward, _matmul_backward, symbolic_zeros=True)


class Projection(nn.Module):
    """y = x W + b + scale · (x A) B, the last term only where the `adapter` collection holds A [in, r] and B [r, out]."""

    features: int
    use_bias: bool
    config: ModelConfig

    @nn.compact
    def __call__(self, x_TxI: jax.Array) -> jax.Array:
        dtype = jnp.dtype(self.config.dtype)
        kernel = self.param("kernel", nn.initializers.normal(0.02), (x_TxI.shape[-1], self.features), dtype)
        y = matmul(x_TxI, kernel)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros_init(), (self.features,), dtype)
        if self.has_variable("adapter", "a"):
            a = self.get_variable("adapter", "a").astype(dtype)
            b = self.get_variable("adapter", "b").astype(dtype)
            narrow = attention.keep(matmul(x_TxI, a))
            y = y + matmul(narrow, b) * jnp.asarray(self.config.adapter_scale, y.dtype)
        return attention.keep(y)


def _norm(config: ModelConfig, name: str | None) -> nn.Module:
    kind = nn.RMSNorm if config.architecture == "llama" else nn.LayerNorm
    return kind(epsilon=config.norm_eps, dtype=config.activations, param_dtype=config.dtype, name=name)


class Attention(nn.Module):
    """Attention within a packed batch, where `place` is its segments [S, L]; with a `cache`, of one token of each row to what the
    cache holds and itself, where `place` is its position [S]."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_TxD, table, place):
        c = self.config
        S, L = table[0].shape[:2]

        def project(name, heads):
            flat = Projection(heads * c.head_dim, c.attention_bias, c, name=name)(x_TxD)
            return sharding.constrain(flat.reshape(S, L, heads, c.head_dim), "rows", None, "heads")

        if c.architecture == "llama":
            q, k, v = project("q_proj", c.num_heads), project("k_proj", c.num_kv_heads), project("v_proj", c.num_kv_heads)
            out = "o_proj"
        else:  # one matrix, whose columns go head by head: (q, k, v) of head 0, of head 1, ...
            fused = project("query_key_value", 3 * c.num_heads).reshape(S, L, c.num_heads, 3, c.head_dim)
            fused = sharding.constrain(fused, "rows", None, "heads")
            q, k, v = fused[..., 0, :], fused[..., 1, :], fused[..., 2, :]
            out = "dense"
        q, k = rotate(q, table), rotate(k, table)
        if self.has_variable("cache", "key"):
            cached = {name: self.get_variable("cache", name) for name in ("key", "value")}
            cached = attention.append(cached, k[:, 0], v[:, 0], place)
            for name, grown in cached.items():
                self.put_variable("cache", name, grown)
            attended = attention.attend_cached(q[:, 0], cached["key"], cached["value"], place)
        else:
            for name, new in (("key", k), ("value", v)):
                self.sow("prefilled", name, new, reduce_fn=lambda _, last: last, init_fn=lambda: None)
            attended = attention.attend(q, k, v, place, c.dtype)
        return Projection(c.hidden_size, c.attention_bias, c, name=out)(attended.reshape(S * L, -1))


class FeedForward(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_TxD):
        c = self.config
        activation = ACTIVATIONS[c.activation]

        def widen(name):
            return sharding.constrain(Projection(c.intermediate_size, c.mlp_bias, c, name=name)(x_TxD), "rows", "mlp")

        if c.architecture == "llama":
            hidden, out = activation(widen("gate_proj")) * widen("up_proj"), "down_proj"
        else:
            hidden, out = activation(widen("dense_h_to_4h")), "dense_4h_to_h"
        return Projection(c.hidden_size, c.mlp_bias, c, name=out)(hidden)


class Layer(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_TxD, table, place):
        c = self.config
        attend = Attention(c, name="self_attn" if c.architecture == "llama" else "attention")
        feed_forward = FeedForward(c, name="mlp")
        attended = attend(_norm(c, "input_layernorm")(x_TxD), table, place)
        middle = x_TxD if c.parallel_residual else x_TxD + attended
        y = middle + feed_forward(_norm(c, "post_attention_layernorm")(middle))
        return sharding.constrain(y + attended if c.parallel_residual else y, "rows"), None


def embed(embedding_VxD: jax.Array, tokens_T: jax.Array) -> jax.Array:
    """[T, D]. Over a mesh, each device looks up its part of D for the tokens of others too, and then they swap: far less to send
    than the embedding itself."""
    return sharding.constrain(sharding.constrain(embedding_VxD[tokens_T], "stripes", "hidden"), "rows")


class Decoder(nn.Module):
    """Tokens to hidden states. The head is left to the caller, who knows which positions need logits (see `losses`)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens_SxL: jax.Array, positions_SxL: jax.Array, segments_SxL: jax.Array) -> jax.Array:
        """Returns [S, L, D], normalised, ready for the head. Tokens attend to earlier ones of the same segment."""
        c = self.config
        S, L = tokens_SxL.shape
        matrix = functools.partial(self.param, init_fn=nn.initializers.normal(0.02), unbox=True)
        embedding = matrix("embed_tokens", shape=(c.vocab_size, c.hidden_size), dtype=jnp.dtype(c.dtype))
        if not c.tie_embeddings:  # declared here so that `init` makes it; read by `head`
            matrix("lm_head", shape=(c.vocab_size, c.hidden_size), dtype=jnp.dtype(c.dtype))
        table = rotary_table(positions_SxL, c)
        # Norms, activations and rotations cost less to recompute than to write and read.
        policy = None if c.remat else jax.checkpoint_policies.save_only_these_names(attention.KEPT)
        layer = nn.remat(Layer, prevent_cse=False, policy=policy)
        layers = nn.scan(
            layer,
            variable_axes={"params": 0, "adapter": 0, "prefilled": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.num_layers,
        )
        x = embed(embedding, tokens_SxL.reshape(-1)).astype(c.activations)
        x, _ = layers(c, name="layers")(x, table, segments_SxL)
        return _norm(c, "norm")(x).reshape(S, L, -1)


def head(params) -> jax.Array:
    """The output matrix [V, D]; the input embedding where the two are tied."""
    return params["lm_head"] if "lm_head" in params else params["embed_tokens"]


def project(hidden: jax.Array, head_VxD: jax.Array) -> jax.Array:
    """Logits [..., V] of hidden states [..., D], in float32, of factors in the head's dtype."""
    return jnp.einsum("...d,vd->...v", hidden.astype(head_VxD.dtype), head_VxD, preferred_element_type=jnp.float32)


def logits(config: ModelConfig, params, adapter, tokens_SxL, positions_SxL=None, segments_SxL=None) -> jax.Array:
    """All logits [S, L, V] in float32: for tests and short inputs. Training never builds this array."""
    if positions_SxL is None:
        positions_SxL = jnp.broadcast_to(jnp.arange(tokens_SxL.shape[1]), tokens_SxL.shape)
    if segments_SxL is None:
        segments_SxL = jnp.ones_like(tokens_SxL)
    variables = {"params": params} | ({"adapter": adapter} if adapter is not None else {})
    hidden = Decoder(config).apply(variables, tokens_SxL, positions_SxL, segments_SxL)
    return project(hidden, head(params))


# --------------------------------------------------------------------------------------------------------------------
# Decoding
# --------------------------------------------------------------------------------------------------------------------


def split_layers(tree, config: ModelConfig):
    """Base or adapter with one subtree per layer in place of the stack. Decoding reads all weights for every token; a scan
    would copy each layer's out of the stack first."""
    return tree | {"layers": [jax.tree.map(lambda stack, i=i: stack[i], tree["layers"]) for i in range(config.num_layers)]}


def init_cache(config: ModelConfig, sequences: int, length: int) -> list:
    """Keys [S, K, B, C, P] and values [S, K, B, P, C] of every layer, all zero, with room for `length` positions."""
    name = "self_attn" if config.architecture == "llama" else "attention"
    nothing = jnp.zeros((sequences, config.num_kv_heads, attention.cache_window(length), config.head_dim), config.dtype)
    return [{name: dict(zip(("key", "value"), attention.in_blocks(nothing, nothing)))} for _ in range(config.num_layers)]


def prefill(config: ModelConfig, params, adapter, tokens_SxL: jax.Array) -> list:
    """The first ⌈L / P⌉ blocks of `init_cache`'s arrays, for L tokens of each row. What stands beyond the end of a row's prompt is
    not looked at before it is overwritten."""
    positions = jnp.broadcast_to(jnp.arange(tokens_SxL.shape[1]), tokens_SxL.shape)
    variables = {"params": params} | ({"adapter": adapter} if adapter is not None else {})
    _, kept = Decoder(config).apply(variables, tokens_SxL, positions, jnp.ones_like(tokens_SxL), mutable=["prefilled"])
    ((name, stacked),) = kept["prefilled"]["layers"].items()
    key, value = (stacked[kind].swapaxes(2, 3).astype(config.dtype) for kind in ("key", "value"))  # [layers, S, K, L, C]
    return [{name: dict(zip(("key", "value"), attention.in_blocks(key[i], value[i])))} for i in range(config.num_layers)]


def decode(config: ModelConfig, params, adapter, cache: list, token_S: jax.Array, position_S: jax.Array):
    """Final hidden states [S, D] of one token per row, and the cache that it has joined.

    Args:
      params, adapter: by layer, from `split_layers`; `adapter` may be None.
      cache: from `init_cache`, filled for every position before `position_S`.
      position_S: where the token stands in its row.
    """
    x_SxD = embed(params["embed_tokens"], token_S).astype(config.activations)
    table, grown = rotary_table(position_S[:, None], config), []
    for i in range(config.num_layers):
        variables = {"params": params["layers"][i], "cache": cache[i]}
        variables |= {"adapter": adapter["layers"][i]} if adapter is not None else {}
        (x_SxD, _), changed = Layer(config).apply(variables, x_SxD, table, position_S, mutable=["cache"])
        grown.append(changed["cache"])
    return _norm(config, None).apply({"params": params["norm"]}, x_SxD), grown


def init_params(config: ModelConfig, key: jax.Array):
    """Random base weights: normal(0, 0.02), biases 0, norms 1."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return Decoder(config).init(key, tokens, tokens, tokens)["params"]

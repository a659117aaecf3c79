"""One causal decoder for all architectures of `architectures.py`.

The module is Linen, not NNX: the training step is a pure function of `(base, adapter, ...)`, and Linen keeps these apart as
collections of one `apply` call.

- `params`: the frozen base weights.
- `adapter`: LoRA. Without this collection, a call computes the base model, as a reference policy requires.
- `cache`: with this collection, a layer decodes. Its input is one token of each row, see `decode`.
- `prefilled`: if mutable, a call stores the keys and values in it, see `prefill`.

Layers are stacked and scanned, so compile time does not grow with depth. Submodules have their Hugging Face names, so weights
convert by one rule, see `huggingface/weights.py`.

Axes: S sequences, L positions, T = S·L tokens, D hidden, H query heads, K key/value heads, C head width, F feed-forward width,
V vocabulary, I input and O output width of a product; B blocks of W positions in a cache. Activations have shape [T, D], and
[S, L, ...] inside attention only: on a CPU this makes the backward pass of the products 1.4x faster, elsewhere it is free.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from bilevel_jax import sharding
from bilevel_jax.models import architectures, attention, fused_attention, layer_range, layer_settings, quantization, rotary

ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of a decoder. `huggingface.read_config` builds it from a Hugging Face config."""

    architecture: str  # a key of `architectures.ARCHITECTURES`
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int  # the first rotary_dim features of a head are rotated
    max_positions: int
    activation: str
    norm_eps: float
    rope_theta: float
    rope_scaling: rotary.Scaling | None = None
    parallel_residual: bool = False  # x + attn(n1(x)) + mlp(n2(x)); else y + mlp(n2(y)) with y = x + attn(n1(x))
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    adapter_scale: float = 1.0  # LoRA's alpha / rank
    adapter_dropout: float = 0.0  # share of LoRA's inputs set to 0, in calls that give a `dropout` key
    remat: bool = False  # the backward pass recomputes each layer; else it saves the results of products and recomputes the rest
    dtype: str = "float32"  # of base weights, the cache and the factors of products; the rest is computed in float32
    activations: str = "float32"  # dtype of the arrays between operations
    second_order: bool = False  # slower operations that can be differentiated twice and forwards, for `metagradient`
    windows: tuple[int, ...] = ()  # of each layer: a token sees so many tokens, itself included; 0: all. (): no layer has one
    rotated: tuple[bool, ...] = ()  # of each layer: whether it has rotary positions. (): all layers have them
    local_rope_theta: float | None = None  # of layers with a window, unscaled; None: `rope_theta`, scaled, as elsewhere
    query_scale: float = 1.0  # multiplies queries, beside 1 / √head_dim
    attention_cap: float | None = None  # soft cap of attention scores, see `attention.soft_cap`
    logit_cap: float | None = None  # soft cap of logits
    embedding_scale: float = 1.0  # multiplies embeddings on their way in
    residual_scale: float = 1.0  # multiplies the outputs of attention and of the feed-forward block, before they are added
    logit_divisor: float = 1.0  # divides the last hidden states, and with them the logits
    quantization: str = "none"  # of the base's linear layers, see `quantization`
    attention: str = "xla"  # of packed sequences; fused: one kernel where it takes the shapes, see `fused_attention`

    @property
    def record(self) -> architectures.Architecture:
        """The names and the layout of this architecture."""
        return architectures.ARCHITECTURES[self.architecture]

    def width(self, dimension: str) -> int:
        """The size of a dimension of `architectures.Linear`."""
        heads, kv_heads = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        sizes = {"hidden": self.hidden_size, "heads": heads, "kv_heads": kv_heads}
        sizes |= {"fused_heads": 3 * heads, "fused_qkv": heads + 2 * kv_heads}
        return (sizes | {"mlp": self.intermediate_size, "fused_mlp": 2 * self.intermediate_size})[dimension]


# --------------------------------------------------------------------------------------------------------------------
# Layers
# --------------------------------------------------------------------------------------------------------------------


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
            a = self.get_variable("adapter", "a").astype(dtype)
            b = self.get_variable("adapter", "b").astype(dtype)
            low_rank = attention.save(product(self._dropped(x_TxI), a))
            y = y + product(low_rank, b) * jnp.asarray(self.config.adapter_scale, y.dtype)
        return attention.save(y)

    def _kernel(self, width: int, dtype) -> jax.Array:
        """W [I, O]."""
        kind = self.config.quantization
        if kind == "none":
            return self.param("kernel", nn.initializers.normal(0.02), (width, self.features), dtype)
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


def _norm(config: ModelConfig, name: str | None) -> nn.Module:
    return config.record.norm(epsilon=config.norm_eps, dtype=config.activations, param_dtype=config.dtype, name=name)


def _optional_norm(config: ModelConfig, name: str | None, x_TxD: jax.Array) -> jax.Array:
    return x_TxD if name is None else _norm(config, name)(x_TxD)


def _scaled(x: jax.Array, scale: float) -> jax.Array:
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
        return _norm(self.config, name)(x).reshape(shape)

    def _attend(self, q, k, v, segments_SxL, window):
        """Attention within the segments of a packed batch."""
        c = self.config
        if c.second_order:
            return attention.attend_plain(q, k, v, segments_SxL, c.dtype, window, c.attention_cap)
        if c.attention == "fused" and fused_attention.fits(q, k):
            windows = layer_settings.distinct_windows(c, q.shape[1])
            return fused_attention.attend(q, k, v, segments_SxL, c.dtype, window, c.attention_cap, windows)
        return attention.attend(q, k, v, segments_SxL, c.dtype, window, c.attention_cap)

    @nn.compact
    def __call__(self, x_TxD, table, segments_SxL=None, position_S=None, window=None):
        c, record = self.config, self.config.record
        S, L = table[0].shape[:2]
        q, k, v = self._heads(x_TxD, S, L)
        if record.query_norm and record.key_norm:
            q, k = self._normed(record.query_norm, q), self._normed(record.key_norm, k)
        q, k = rotary.rotate(q, table), rotary.rotate(k, table)
        q = _scaled(q, c.query_scale)
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
        attended = _scaled(_optional_norm(c, record.attention_output_norm, attended), c.residual_scale)
        middle = x_TxD if c.parallel_residual else x_TxD + attended
        mlp_output = FeedForward(c, name=record.mlp)(_optional_norm(c, record.mlp_norm, middle))
        y = middle + _scaled(_optional_norm(c, record.mlp_output_norm, mlp_output), c.residual_scale)
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
    return _scaled(x_TxD, config.embedding_scale)


class Decoder(nn.Module):
    """Tokens to hidden states. The caller applies the head, at the positions that need logits (see `losses`)."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, tokens_SxL: jax.Array, positions_SxL: jax.Array, segments_SxL: jax.Array, entering_TxD: jax.Array | None = None
    ) -> jax.Array:
        """Returns the last hidden states [S, L, D]. A token attends to itself and to earlier tokens of its segment.

        `entering_TxD` are the states that enter the first layer with an adapter, from `enter`; the layers below are not computed.
        """
        c = self.config
        S, L = tokens_SxL.shape
        matrix = functools.partial(self.param, init_fn=nn.initializers.normal(0.02), unbox=True)
        embedding = matrix("embed_tokens", shape=(c.vocab_size, c.hidden_size), dtype=jnp.dtype(c.dtype))
        if not c.tie_embeddings:  # declared here so that `init` creates it; `head` reads it
            matrix("lm_head", shape=(c.vocab_size, c.hidden_size), dtype=jnp.dtype(c.dtype))
        table = layer_settings.rotary_table(positions_SxL, c)
        # Norms, activations and rotations are cheaper to recompute than to write and read.
        policy = None if c.remat else jax.checkpoint_policies.save_only_these_names(attention.SAVED)
        x = embed(c, embedding, tokens_SxL.reshape(-1)) if entering_TxD is None else entering_TxD
        if self._is_split():
            x = self._split_layers(x, table, segments_SxL, policy, entering_TxD is not None)
        else:
            layers = nn.scan(
                nn.remat(Layer, prevent_cse=False, policy=policy),
                variable_axes={"params": 0, "adapter": 0, "prefilled": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, nn.broadcast, 0),
                length=c.num_layers,
            )
            x, _ = layers(c, name="layers")(x, table, segments_SxL, layer_settings.settings(c, L))
        return _scaled(_norm(c, "norm")(x), 1 / c.logit_divisor).reshape(S, L, -1)

    def _adapter(self):
        return self.variables.get("adapter")

    def _is_split(self) -> bool:
        """Whether the adapter has the last layers only."""
        return 0 < layer_range.num_adapted(self._adapter()) < self.config.num_layers

    def _split_layers(self, x_TxD, table, segments_SxL, policy, entered: bool):
        """The layers without an adapter, unless their results are given, and those with one."""
        c, adapter = self.config, self._adapter()
        first = c.num_layers - layer_range.num_adapted(adapter)
        stack, settings = self.variables["params"]["layers"], layer_settings.settings(c, segments_SxL.shape[1])
        stores = self.is_mutable_collection("prefilled")
        layer = functools.partial(_apply_layer, c, table, segments_SxL, stores)
        frozen = None
        if not entered:
            x_TxD, frozen = layer_range.scan(layer, stack, x_TxD, range(first), settings=settings)
        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        remat = functools.partial(jax.checkpoint, prevent_cse=False, policy=policy)
        layers = range(first, c.num_layers)
        x_TxD, adapted = layer_range.scan(layer, stack, x_TxD, layers, adapter["layers"], key, settings, remat)
        if stores:
            prefilled = jax.tree.map(lambda *parts: jnp.concatenate(parts), frozen, adapted)
            self.put_variable("prefilled", "layers", prefilled)
        return x_TxD


def _apply_layer(config: ModelConfig, table, segments_SxL, stores: bool, weights, adapter, x_TxD, settings, key):
    """A layer with the weights given, and the keys and values that it stores for `prefill`, if any."""
    variables = {"params": weights} | ({"adapter": adapter} if adapter is not None else {})
    arguments = variables, x_TxD, table, segments_SxL, settings
    rngs = {} if key is None else {"dropout": key}
    layer = Layer(config, parent=None)
    if not stores:
        return layer.apply(*arguments, rngs=rngs)[0], None
    (x_TxD, _), state = layer.apply(*arguments, rngs=rngs, mutable=["prefilled"])
    return x_TxD, state["prefilled"]


def enter(config: ModelConfig, params, num_layers: int, tokens_SxL, positions_SxL, segments_SxL) -> jax.Array:
    """The hidden states [S, L, D] after the first `num_layers` layers of the base, which has no adapter there."""
    S, L = tokens_SxL.shape
    x = embed(config, params["embed_tokens"], tokens_SxL.reshape(-1))
    table, settings = layer_settings.rotary_table(positions_SxL, config), layer_settings.settings(config, L)
    layer = functools.partial(_apply_layer, config, table, segments_SxL, False)
    x, _ = layer_range.scan(layer, params["layers"], x, range(num_layers), settings=settings)
    return x.reshape(S, L, -1)


def head(params) -> jax.Array:
    """The output matrix [V, D]: the input embedding if the two are tied."""
    return params["lm_head"] if "lm_head" in params else params["embed_tokens"]


def project(hidden: jax.Array, head_VxD: jax.Array, cap: float | None = None) -> jax.Array:
    """Float32 logits [..., V] of hidden states [..., D]. The factors are rounded to the dtype of the head.

    `cap` is the soft cap of the logits, `config.logit_cap`.
    """
    logits = jnp.einsum("...d,vd->...v", hidden.astype(head_VxD.dtype), head_VxD, preferred_element_type=jnp.float32)
    return attention.soft_cap(logits, cap)


def logits(config: ModelConfig, params, adapter, tokens_SxL, positions_SxL=None, segments_SxL=None) -> jax.Array:
    """All logits [S, L, V] in float32, for tests and short inputs. Training never builds this array."""
    if positions_SxL is None:
        positions_SxL = jnp.broadcast_to(jnp.arange(tokens_SxL.shape[1]), tokens_SxL.shape)
    if segments_SxL is None:
        segments_SxL = jnp.ones_like(tokens_SxL)
    variables = {"params": params} | ({"adapter": adapter} if adapter is not None else {})
    hidden = Decoder(config).apply(variables, tokens_SxL, positions_SxL, segments_SxL)
    return project(hidden, head(params), config.logit_cap)


# --------------------------------------------------------------------------------------------------------------------
# Decoding
# --------------------------------------------------------------------------------------------------------------------


def split_layers(tree, config: ModelConfig):
    """Base or adapter with a list of layers instead of the stack."""
    number = jax.tree.leaves(tree["layers"])[0].shape[0]
    return tree | {"layers": [jax.tree.map(lambda stack, i=i: stack[i], tree["layers"]) for i in range(number)]}


def init_cache(config: ModelConfig, sequences: int, length: int) -> list:
    """Zero keys [S, K, B, C, W] and values [S, K, B, W, C] of each layer, with room for `length` positions."""
    zeros = jnp.zeros((sequences, config.num_kv_heads, attention.cache_window(length), config.head_dim), config.dtype)
    layers = (attention.in_blocks(zeros, zeros) for _ in range(config.num_layers))
    return [{config.record.attention: {"key": key, "value": value}} for key, value in layers]


def prefill(config: ModelConfig, params, adapter, tokens_SxL: jax.Array) -> list:
    """The first ⌈L / W⌉ blocks of the arrays of `init_cache`, for L tokens of each row.

    Padding beyond the prompt of a row fills positions that `decode` overwrites before it reads them.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens_SxL.shape[1]), tokens_SxL.shape)
    variables = {"params": params} | ({"adapter": adapter} if adapter is not None else {})
    _, state = Decoder(config).apply(variables, tokens_SxL, positions, jnp.ones_like(tokens_SxL), mutable=["prefilled"])
    stacked = state["prefilled"]["layers"][config.record.attention]
    keys, values = (stacked[name].swapaxes(2, 3).astype(config.dtype) for name in ("key", "value"))  # [layers, S, K, L, C]
    layers = (attention.in_blocks(keys[i], values[i]) for i in range(config.num_layers))
    return [{config.record.attention: {"key": key, "value": value}} for key, value in layers]


def _layer(layers, i: int, zero: jax.Array):
    """Layer i of a list, or of a stack.

    Decoding is a loop, and a slice at a fixed index is the same in each turn: XLA would take the slices of all layers before the
    loop, which are a copy of all weights. So the index contains a `zero` that XLA cannot know before the turn.
    """
    if isinstance(layers, list):
        return layers[i]
    return jax.tree.map(lambda stack: jax.lax.dynamic_index_in_dim(stack, i + zero, keepdims=False), layers)


def decode(config: ModelConfig, params, adapter, cache: list, token_S: jax.Array, position_S: jax.Array):
    """Decodes one token per row.

    Args:
      params, adapter: stacked, or by layer from `split_layers`; `adapter` may be None.
      cache: from `init_cache`, filled at all positions before `position_S`.
      position_S: the position of each token in its row.

    Returns:
      The final hidden states [S, D], and the cache with the keys and values of these tokens.
    """
    x_SxD = embed(config, params["embed_tokens"], token_S)
    table, new_cache = layer_settings.rotary_table(position_S[:, None], config), []
    *_, num_blocks, size, _ = cache[0][config.record.attention]["value"].shape
    settings = layer_settings.settings(config, num_blocks * size)
    zero, _ = jax.lax.optimization_barrier((jnp.int32(0), token_S))
    first = config.num_layers - layer_range.num_adapted(adapter)
    for i in range(config.num_layers):
        variables = {"params": _layer(params["layers"], i, zero), "cache": cache[i]}
        variables |= {"adapter": _layer(adapter["layers"], i - first, zero)} if adapter is not None and i >= first else {}
        of_layer = {name: values[i] for name, values in settings.items()}
        (x_SxD, _), state = Layer(config).apply(variables, x_SxD, table, None, of_layer, position_S, mutable=["cache"])
        new_cache.append(state["cache"])
    hidden_SxD = _norm(config, None).apply({"params": params["norm"]}, x_SxD)
    return _scaled(hidden_SxD, 1 / config.logit_divisor), new_cache


def init_params(config: ModelConfig, key: jax.Array):
    """Random base weights: normal(0, 0.02), biases 0, norm weights 1, or 0 if 1 is added to them."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return Decoder(config).init(key, tokens, tokens, tokens)["params"]

"""One causal decoder for all architectures of `architectures.py`.

The module is Linen, not NNX: the training step is a pure function of `(base, adapter, ...)`, and Linen keeps these apart as
collections of one `apply` call.

- `params`: the frozen base weights.
- `adapter`: LoRA. Without this collection, a call computes the base model, as a reference policy requires.
- `cache`: with this collection, a layer decodes. Its input is one token of each row, see `kv_cache.decode`.
- `prefilled`: if mutable, a call stores the keys and values in it, see `kv_cache.prefill`.

Layers are stacked and scanned, so compile time does not grow with depth. Submodules have their Hugging Face names, so weights
convert by one rule, see `huggingface/weights.py`.

Axes: S sequences, L positions, T = S·L tokens, D hidden, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bilevel_jax.models import attention, layer_range, layer_settings
from bilevel_jax.models.layers import Layer, embed, norm, scaled
from bilevel_jax.models.model_config import ModelConfig


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
        return scaled(norm(c, "norm")(x), 1 / c.logit_divisor).reshape(S, L, -1)

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


def variables(params, adapter) -> dict:
    """What `Decoder.apply` takes first: the weights of the base, and those of the adapter if there is one."""
    return {"params": params} | ({"adapter": adapter} if adapter is not None else {})


def _apply_layer(config: ModelConfig, table, segments_SxL, stores: bool, weights, adapter, x_TxD, settings, key):
    """A layer with the weights given, and the keys and values that it stores for `kv_cache.prefill`, if any."""
    arguments = variables(weights, adapter), x_TxD, table, segments_SxL, settings
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
    hidden: Any = Decoder(config).apply(variables(params, adapter), tokens_SxL, positions_SxL, segments_SxL)
    return project(hidden, head(params), config.logit_cap)


def init_params(config: ModelConfig, key: jax.Array):
    """Random base weights: normal(0, 0.02), biases 0, norm weights 1, or 0 if 1 is added to them."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return Decoder(config).init(key, tokens, tokens, tokens)["params"]

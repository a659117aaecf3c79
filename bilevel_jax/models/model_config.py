"""Sizes and options of a decoder, fixed when it is compiled."""

import dataclasses
import functools

import jax

from bilevel_jax.models import architectures, rotary

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
    attention: str = "xla"  # of packed sequences; splash, triton: one kernel where it takes the shapes, see `fused_attention`

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

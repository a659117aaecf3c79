"""The supported architectures, one record each.

The decoder, LoRA, the file formats, merging and sharding read these records; none of them names an architecture. A new
architecture is one entry of `ARCHITECTURES` and one parity test, see docs/adding_a_model.md.
"""

import dataclasses
from collections.abc import Callable, Mapping

from flax import linen as nn

from bilevel_jax.models import norms

SHARDING_AXES = {  # dimension of a linear layer -> its name in `sharding.RULES`
    "hidden": "hidden",
    "heads": "heads",
    "kv_heads": "heads",
    "fused_heads": "heads",  # (query, key, value) of head 0, of head 1, ...
    "fused_qkv": "heads",  # the queries of all heads, then their keys, then their values
    "mlp": "mlp",
    "fused_mlp": "mlp",  # gate, then up
}


@dataclasses.dataclass(frozen=True)
class Linear:
    """A linear layer, by the name that Hugging Face gives it.

    The dimensions are keys of `SHARDING_AXES`; `ModelConfig.width` has their sizes.
    """

    name: str  # unique within the architecture: LoRA targets name it
    inputs: str
    outputs: str
    bias: str | bool  # the field of `ModelConfig` that decides, or the same for all models


@dataclasses.dataclass(frozen=True)
class Key:
    """A value of config.json."""

    name: str | None  # None: the value is always the default
    default: object = None  # if config.json does not have the key

    def read(self, raw: Mapping):
        """The value in a parsed config.json."""
        return self.default if self.name is None else raw.get(self.name, self.default)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Names, layout and configuration keys of one architecture."""

    # Hugging Face
    model_type: str  # in config.json; also the value of `ModelConfig.architecture`
    class_name: str  # for `architectures` in config.json
    outer_names: Mapping[str, str]  # the parameters outside the layers, and the stack of layers -> their Hugging Face names

    # One layer. Submodules have their Hugging Face names.
    norm: type[nn.Module]
    attention_norm: str | None  # of the input of attention
    attention: str
    qkv: tuple[Linear, ...]  # (query, key, value), or one with the outputs `fused_heads` or `fused_qkv`
    attention_output: Linear
    mlp_norm: str | None  # of the input of the feed-forward block
    mlp: str
    mlp_inputs: tuple[Linear, ...]  # (gate, up) or one with the outputs `fused_mlp`: act(gate) · up; or one: act(up)
    mlp_output: Linear

    # config.json
    activation: Key
    norm_eps: Key
    num_kv_heads: Key  # None or 0: as many as query heads
    rotary_fraction: float  # if config.json has neither `partial_rotary_factor` nor `rotary_pct`
    parallel_residual: Key
    attention_bias: Key
    mlp_bias: Key
    tie_embeddings: Key = Key("tie_word_embeddings", False)
    head_dim: Key = Key("head_dim")  # None: hidden size / heads
    rope_theta: float = 10000.0  # if config.json has none
    unsupported: tuple[str, ...] = ()  # keys that must be absent, null or false: the decoder does not implement them

    # What only some architectures have
    attention_output_norm: str | None = None  # before the residual sum
    mlp_output_norm: str | None = None
    query_norm: str | None = None  # of queries, before rotation
    key_norm: str | None = None
    norm_over_heads: bool = False  # whether these two normalise all heads together, or each one
    window: Key = Key(None)  # sliding window, in tokens; None: no layer has one
    window_switch: str | None = None  # key that must be true for a window
    has_window: Callable[[Mapping, int], bool] = lambda raw, layer: True  # whether a layer has it, if there is no `layer_types`
    has_rotation: Callable[[Mapping, int], bool] = lambda raw, layer: True  # whether a layer has rotary positions
    local_rope_theta: Key = Key(None)  # rotary base of layers with a window; None: the same as without
    query_scalar: Key = Key(None)  # scores are divided by its root; None: by √head_dim
    attention_scale: Key = Key(None)  # scores are multiplied by it, and not divided by a root; None: see `query_scalar`
    attention_cap: Key = Key(None)  # soft cap of attention scores
    logit_cap: Key = Key(None)  # soft cap of logits
    scaled_embedding: bool = False  # whether embeddings are multiplied by √hidden_size
    embedding_scale: Key = Key(None, 1.0)  # multiplies embeddings
    residual_scale: Key = Key(None, 1.0)  # multiplies the outputs of attention and of the feed-forward block
    logit_divisor: Key = Key(None, 1.0)

    @property
    def projections(self) -> dict[str, tuple[str, Linear]]:
        """All linear layers of a decoder layer: name -> (submodule, layer). LoRA draws its initial values in this order."""
        attention = {linear.name: (self.attention, linear) for linear in (*self.qkv, self.attention_output)}
        return attention | {linear.name: (self.mlp, linear) for linear in (*self.mlp_inputs, self.mlp_output)}


LLAMA = Architecture(
    model_type="llama",
    class_name="LlamaForCausalLM",
    outer_names={"embed_tokens": "model.embed_tokens", "lm_head": "lm_head", "norm": "model.norm", "layers": "model.layers"},
    norm=nn.RMSNorm,
    attention_norm="input_layernorm",
    attention="self_attn",
    qkv=(
        Linear("q_proj", "hidden", "heads", "attention_bias"),
        Linear("k_proj", "hidden", "kv_heads", "attention_bias"),
        Linear("v_proj", "hidden", "kv_heads", "attention_bias"),
    ),
    attention_output=Linear("o_proj", "heads", "hidden", "attention_bias"),
    mlp_norm="post_attention_layernorm",
    mlp="mlp",
    mlp_inputs=(Linear("gate_proj", "hidden", "mlp", "mlp_bias"), Linear("up_proj", "hidden", "mlp", "mlp_bias")),
    mlp_output=Linear("down_proj", "mlp", "hidden", "mlp_bias"),
    activation=Key("hidden_act", "silu"),
    norm_eps=Key("rms_norm_eps", 1e-6),
    num_kv_heads=Key("num_key_value_heads"),
    rotary_fraction=1.0,
    parallel_residual=Key(None, False),
    attention_bias=Key("attention_bias", False),
    mlp_bias=Key("mlp_bias", False),
)

GPT_NEOX = Architecture(
    model_type="gpt_neox",
    class_name="GPTNeoXForCausalLM",
    outer_names={
        "embed_tokens": "gpt_neox.embed_in",
        "lm_head": "embed_out",
        "norm": "gpt_neox.final_layer_norm",
        "layers": "gpt_neox.layers",
    },
    norm=nn.LayerNorm,
    attention_norm="input_layernorm",
    attention="attention",
    qkv=(Linear("query_key_value", "hidden", "fused_heads", "attention_bias"),),
    attention_output=Linear("dense", "heads", "hidden", "attention_bias"),
    mlp_norm="post_attention_layernorm",
    mlp="mlp",
    mlp_inputs=(Linear("dense_h_to_4h", "hidden", "mlp", "mlp_bias"),),
    mlp_output=Linear("dense_4h_to_h", "mlp", "hidden", "mlp_bias"),
    activation=Key("hidden_act", "gelu"),
    norm_eps=Key("layer_norm_eps", 1e-5),
    num_kv_heads=Key(None),
    rotary_fraction=0.25,
    parallel_residual=Key("use_parallel_residual", True),
    attention_bias=Key("attention_bias", True),
    mlp_bias=Key(None, True),
)

QWEN2 = dataclasses.replace(
    LLAMA,
    model_type="qwen2",
    class_name="Qwen2ForCausalLM",
    qkv=(
        Linear("q_proj", "hidden", "heads", bias=True),
        Linear("k_proj", "hidden", "kv_heads", bias=True),
        Linear("v_proj", "hidden", "kv_heads", bias=True),
    ),
    attention_output=Linear("o_proj", "heads", "hidden", bias=False),
    num_kv_heads=Key("num_key_value_heads", 32),
    attention_bias=Key(None, False),
    mlp_bias=Key(None, False),
    window=Key("sliding_window", 4096),
    window_switch="use_sliding_window",
    has_window=lambda raw, layer: layer >= raw.get("max_window_layers", 28),
)

QWEN3 = dataclasses.replace(
    LLAMA,
    model_type="qwen3",
    class_name="Qwen3ForCausalLM",
    num_kv_heads=Key("num_key_value_heads", 32),
    head_dim=Key("head_dim", 128),
    mlp_bias=Key(None, False),
    query_norm="q_norm",
    key_norm="k_norm",
    window=QWEN2.window,
    window_switch=QWEN2.window_switch,
    has_window=QWEN2.has_window,
)

MISTRAL = dataclasses.replace(
    LLAMA,
    model_type="mistral",
    class_name="MistralForCausalLM",
    num_kv_heads=Key("num_key_value_heads", 8),
    attention_bias=Key(None, False),
    mlp_bias=Key(None, False),
    window=Key("sliding_window", 4096),
    unsupported=("layer_types",),  # transformers ignores it
)

PHI3 = dataclasses.replace(
    LLAMA,
    model_type="phi3",
    class_name="Phi3ForCausalLM",
    qkv=(Linear("qkv_proj", "hidden", "fused_qkv", bias=False),),
    attention_output=Linear("o_proj", "heads", "hidden", bias=False),
    mlp_inputs=(Linear("gate_up_proj", "hidden", "fused_mlp", bias=False),),
    mlp_output=Linear("down_proj", "mlp", "hidden", bias=False),
    attention_bias=Key(None, False),
    mlp_bias=Key(None, False),
    norm_eps=Key("rms_norm_eps", 1e-5),
    window=Key("sliding_window"),
)

GEMMA2 = dataclasses.replace(
    LLAMA,
    model_type="gemma2",
    class_name="Gemma2ForCausalLM",
    norm=norms.OffsetRMSNorm,
    attention_output_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_output_norm="post_feedforward_layernorm",
    activation=Key("hidden_activation", "gelu_pytorch_tanh"),
    num_kv_heads=Key("num_key_value_heads", 4),
    head_dim=Key("head_dim", 256),
    mlp_bias=Key(None, False),
    tie_embeddings=Key("tie_word_embeddings", True),
    unsupported=("use_bidirectional_attention",),
    window=Key("sliding_window", 4096),
    has_window=lambda raw, layer: layer % 2 == 0,
    query_scalar=Key("query_pre_attn_scalar", 256),
    attention_cap=Key("attn_logit_softcapping", 50.0),
    logit_cap=Key("final_logit_softcapping", 30.0),
    scaled_embedding=True,
)

GEMMA3 = dataclasses.replace(
    GEMMA2,
    model_type="gemma3_text",
    class_name="Gemma3ForCausalLM",
    query_norm="q_norm",
    key_norm="k_norm",
    rope_theta=1e6,
    local_rope_theta=Key("rope_local_base_freq", 10000.0),
    has_window=lambda raw, layer: (layer + 1) % raw.get("sliding_window_pattern", 6) != 0,
    attention_cap=Key(None),
    logit_cap=Key("final_logit_softcapping"),
    unsupported=("use_bidirectional_attention", "attn_logit_softcapping"),  # transformers ignores the second
)

OLMO2 = dataclasses.replace(
    LLAMA,
    model_type="olmo2",
    class_name="Olmo2ForCausalLM",
    attention_norm=None,
    attention_output_norm="post_attention_layernorm",
    mlp_norm=None,
    mlp_output_norm="post_feedforward_layernorm",
    norm_eps=Key("rms_norm_eps", 1e-5),
    mlp_bias=Key(None, False),
    query_norm="q_norm",
    key_norm="k_norm",
    norm_over_heads=True,
)


def _smollm3_rotates(raw: Mapping, layer: int) -> bool:
    """`no_rope_layers` has a 1 for a layer with rotary positions."""
    listed = raw.get("no_rope_layers")
    return bool(listed[layer]) if listed else (layer + 1) % raw.get("no_rope_layer_interval", 4) != 0


SMOLLM3 = dataclasses.replace(
    LLAMA,
    model_type="smollm3",
    class_name="SmolLM3ForCausalLM",
    num_kv_heads=Key("num_key_value_heads", 4),
    rope_theta=2e6,
    tie_embeddings=Key("tie_word_embeddings", True),
    window=Key("sliding_window"),
    window_switch="use_sliding_window",
    has_window=lambda raw, layer: not _smollm3_rotates(raw, layer),
    has_rotation=_smollm3_rotates,
)


STABLELM = dataclasses.replace(
    LLAMA,
    model_type="stablelm",
    class_name="StableLmForCausalLM",
    norm=nn.LayerNorm,
    attention_output=Linear("o_proj", "heads", "hidden", bias=False),
    norm_eps=Key("layer_norm_eps", 1e-5),
    num_kv_heads=Key("num_key_value_heads", 32),
    rotary_fraction=0.25,
    attention_bias=Key("use_qkv_bias", False),
    mlp_bias=Key(None, False),
    unsupported=("use_parallel_residual", "qk_layernorm"),
)


GRANITE = dataclasses.replace(
    LLAMA,
    model_type="granite",
    class_name="GraniteForCausalLM",
    attention_scale=Key("attention_multiplier", 1.0),
    embedding_scale=Key("embedding_multiplier", 1.0),
    residual_scale=Key("residual_multiplier", 1.0),
    logit_divisor=Key("logits_scaling", 1.0),
)


ARCHITECTURES = {
    record.model_type: record
    for record in (LLAMA, GPT_NEOX, QWEN2, QWEN3, MISTRAL, PHI3, GEMMA2, GEMMA3, OLMO2, SMOLLM3, STABLELM, GRANITE)
}


def sharding_axes() -> dict[str, tuple[str, str]]:
    """The dimensions (inputs, outputs) of each linear layer, by the names in `sharding.RULES`.

    Raises:
      ValueError: two architectures give one name to layers with different dimensions.
    """
    axes: dict[str, tuple[str, str]] = {}
    for record in ARCHITECTURES.values():
        for name, (_, linear) in record.projections.items():
            dimensions = SHARDING_AXES[linear.inputs], SHARDING_AXES[linear.outputs]
            if axes.setdefault(name, dimensions) != dimensions:
                raise ValueError(f"{record.model_type}: {name} has the dimensions {dimensions}, elsewhere {axes[name]}")
    return axes

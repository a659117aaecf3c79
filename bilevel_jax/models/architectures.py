"""The supported architectures, one record each.

The decoder, LoRA, the file formats, merging and sharding read these records; none of them names an architecture. A new
architecture is one entry of `ARCHITECTURES` and one parity test, see docs/adding_a_model.md.
"""

import dataclasses
from collections.abc import Mapping

from flax import linen as nn

SHARDING_AXES = {  # dimension of a linear layer -> its name in `sharding.RULES`
    "hidden": "hidden",
    "heads": "heads",
    "kv_heads": "heads",
    "fused_heads": "heads",
    "mlp": "mlp",
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
    attention_norm: str
    attention: str
    qkv: tuple[Linear, ...]  # (query, key, value), or one whose outputs are (q, k, v) of head 0, of head 1, ...
    attention_output: Linear
    mlp_norm: str
    mlp: str
    mlp_inputs: tuple[Linear, ...]  # (gate, up): act(gate) · up; or one: act(up)
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
    unsupported: tuple[str, ...] = ()  # keys that must be absent, null or false: the decoder does not implement them

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

ARCHITECTURES = {record.model_type: record for record in (LLAMA, GPT_NEOX)}


def sharding_axes() -> dict[str, tuple[str, str]]:
    """The dimensions (inputs, outputs) of each linear layer, by the names in `sharding.RULES`.

    Raises:
      ValueError: two architectures give one name to layers with different dimensions.
    """
    axes = {}
    for record in ARCHITECTURES.values():
        for name, (_, linear) in record.projections.items():
            dimensions = SHARDING_AXES[linear.inputs], SHARDING_AXES[linear.outputs]
            if axes.setdefault(name, dimensions) != dimensions:
                raise ValueError(f"{record.model_type}: {name} has the dimensions {dimensions}, elsewhere {axes[name]}")
    return axes

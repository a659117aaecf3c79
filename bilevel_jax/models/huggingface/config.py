"""config.json to `decoder.ModelConfig`. What depends on the architecture is in its record."""

import dataclasses
import pathlib

import jax

from bilevel_jax.models import architectures, decoder
from bilevel_jax.models.huggingface.directory import ModelError, read_json

SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}
SWITCHES = ("parallel_residual", "attention_bias", "mlp_bias", "tie_embeddings")  # fields of the config and of the record


def read_config(directory: pathlib.Path, dtype: str = "float32", activations: str | None = None) -> decoder.ModelConfig:
    """The shape of the decoder from `config.json`.

    Args:
      directory: of the model.
      dtype: of the base weights, the cache and the factors of products; `auto` is float32 on a CPU and bfloat16 elsewhere.
      activations: dtype of the activations; by default `dtype`, but float32 on a CPU. There XLA has no arithmetic in half
        precision except products with float32 sums, so it would convert before and after each operation.

    Raises:
      ModelError: an architecture, activation, rope type or quantisation that is not supported, or a missing or invalid key.
    """
    file = pathlib.Path(directory) / "config.json"
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    raw = read_json(file)
    record = _read_architecture(raw, file)
    try:
        activation = record.activation.read(raw)
        if not isinstance(activation, str) or activation not in decoder.ACTIVATIONS:
            raise ModelError(f"{file}: hidden_act '{activation}' is not among {', '.join(decoder.ACTIVATIONS)}")
        theta, scaling, rotary_fraction = _read_rope(raw, record, file)
        sizes = {field: _positive(file, key, raw[key], is_integer=True) for field, key in SIZES.items()}
        sizes |= _read_heads(raw, record, sizes, rotary_fraction, file)
        _check_rope_scaling(scaling, file)
        return decoder.ModelConfig(
            architecture=record.model_type,
            **sizes,
            **_read_switches(raw, record, file),
            max_positions=_positive(file, "max_position_embeddings", raw.get("max_position_embeddings", 2048), is_integer=True),
            activation=activation,
            norm_eps=_positive(file, "the norms' epsilon", record.norm_eps.read(raw)),
            rope_theta=_positive(file, "rope_theta", theta),
            rope_scaling=scaling if scaling is None or isinstance(scaling, decoder.Llama3Rope) else float(scaling),
            dtype=dtype,
            activations=activations or ("float32" if jax.default_backend() == "cpu" else dtype),
        )
    except KeyError as error:
        raise ModelError(f"{file}: key {error} is missing") from error


def _positive(file: pathlib.Path, name: str, value, is_integer: bool = False):
    """Checks that a value is positive and below 2^31."""
    is_valid = type(value) is int if is_integer else isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_valid or not 0 < value < 2**31:
        raise ModelError(f"{file}: {name} must be a positive {'integer' if is_integer else 'number'}, got {value!r:.80}")
    return value if is_integer else float(value)


def _read_architecture(raw: dict, file: pathlib.Path) -> architectures.Architecture:
    model_type, records = raw.get("model_type"), architectures.ARCHITECTURES
    if not isinstance(model_type, str) or model_type not in records:
        raise ModelError(f"{file}: model_type '{model_type}' is not supported; known are {', '.join(records)}")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method") if isinstance(raw["quantization_config"], dict) else None
        what = f"quantised weights ({method})" if isinstance(method, str) else "quantised weights"
        raise ModelError(f"{file}: {what:.80} are not supported; give the model from which they were made, in 16 or 32 bits")
    for key in records[model_type].unsupported:
        if raw.get(key):
            raise ModelError(f"{file}: {key}={raw[key]!r:.80} is not supported")
    return records[model_type]


def _read_rope(raw: dict, record: architectures.Architecture, file: pathlib.Path):
    """`(theta, scaling, rotated fraction of a head)` from a config of transformers 5 (`rope_parameters`) or earlier."""
    new = raw.get("rope_parameters") or {}
    scaling = new if new else (raw.get("rope_scaling") or {})
    if not isinstance(scaling, dict):
        raise ModelError(f"{file}: rope_parameters and rope_scaling must be objects, got {scaling!r:.80}")
    theta = new.get("rope_theta", raw.get("rope_theta", raw.get("rotary_emb_base", 10000.0)))
    default = raw.get("rotary_pct", record.rotary_fraction)
    fraction = new.get("partial_rotary_factor", raw.get("partial_rotary_factor", default))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None, fraction
    if kind == "linear":
        return theta, scaling["factor"], fraction
    if kind == "llama3":
        fields = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        return theta, decoder.Llama3Rope(*(scaling[field] for field in fields)), fraction
    raise ModelError(f"{file}: rope type '{kind}' is not supported; known are default, linear and llama3")


def _check_rope_scaling(scaling, file: pathlib.Path) -> None:
    if isinstance(scaling, decoder.Llama3Rope):
        for field, value in dataclasses.asdict(scaling).items():
            _positive(file, f"rope's {field}", value)
    elif scaling is not None:
        _positive(file, "rope's factor", scaling)


def _read_heads(raw: dict, record: architectures.Architecture, sizes: dict[str, int], rotary_fraction, file: pathlib.Path) -> dict:
    num_heads = sizes["num_heads"]
    num_kv_heads = record.num_kv_heads.read(raw) or num_heads
    head_dim = raw.get("head_dim") or sizes["hidden_size"] // num_heads
    for name, value in (("num_key_value_heads", num_kv_heads), ("head_dim", head_dim)):
        _positive(file, name, value, is_integer=True)
    if num_heads % num_kv_heads:
        raise ModelError(f"{file}: num_attention_heads={num_heads} is no multiple of num_key_value_heads={num_kv_heads}")
    rotary_dim = int(head_dim * _positive(file, "the rotated fraction of a head", rotary_fraction))
    if rotary_dim > head_dim or rotary_dim % 2:
        raise ModelError(f"{file}: the number of rotated features, {rotary_dim}, must be even and at most head_dim={head_dim}")
    return {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "rotary_dim": rotary_dim}


def _read_switches(raw: dict, record: architectures.Architecture, file: pathlib.Path) -> dict[str, bool]:
    switches = {}
    for field in SWITCHES:
        key = getattr(record, field)
        switches[field] = key.read(raw)
        if not isinstance(switches[field], bool):
            raise ModelError(f"{file}: {key.name} must be true or false, got {switches[field]!r:.80}")
    return switches


def eos_ids(directory: pathlib.Path, tokenizer) -> tuple[int, ...]:
    """The tokens that end a response, from the tokenizer, generation_config.json and config.json.

    Raises:
      ModelError: a value in these files is not a token id.
    """
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for name in ("generation_config.json", "config.json"):
        file = pathlib.Path(directory) / name
        value = read_json(file).get("eos_token_id") if file.exists() else None
        more = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(token) is int and 0 <= token < 2**31 for token in more):
            raise ModelError(f"{file}: eos_token_id must be a token id or a list of token ids, got {value!r:.80}")
        ids += more
    return tuple(dict.fromkeys(ids))

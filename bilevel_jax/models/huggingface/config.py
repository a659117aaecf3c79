"""config.json to `model_config.ModelConfig`. What depends on the architecture is in its record."""

import pathlib

import jax

from bilevel_jax.models import architectures, model_config
from bilevel_jax.models.huggingface.directory import ModelError, positive, read_json
from bilevel_jax.models.huggingface.rope import GLOBAL, LOCAL, read_rope, read_scaling
from bilevel_jax.models.quantization import BLOCK, KINDS

SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}
DTYPES = ("float32", "bfloat16", "float16", "auto")
MAX_LAYERS = 10_000
SWITCHES = ("parallel_residual", "attention_bias", "mlp_bias", "tie_embeddings")  # fields of the config and of the record
FACTORS = ("embedding_scale", "residual_scale", "logit_divisor")  # so too; 1 is off


def read_config(
    directory: pathlib.Path, dtype: str = "float32", activations: str | None = None, quantization: str = "none"
) -> model_config.ModelConfig:
    """The shape of the decoder from `config.json`.

    Args:
      directory: of the model.
      dtype: of the base weights, the cache and the factors of products; `auto` is float32 on a CPU and bfloat16 elsewhere.
      activations: dtype of the activations; by default `dtype`, but float32 on a CPU. There XLA has no arithmetic in half
        precision except products with float32 sums, so it would convert before and after each operation.
      quantization: of the linear layers, see `models.quantization`.

    Raises:
      ModelError: an architecture, activation, rope type or quantisation that is not supported, or a missing or invalid key.
    """
    file = pathlib.Path(directory) / "config.json"
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r:.80} is not among {', '.join(DTYPES)}")
    if quantization not in KINDS:
        raise ModelError(f"quantization {quantization!r:.80} is not among {', '.join(KINDS)}")
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    raw = read_json(file)
    record = _read_architecture(raw, file)
    try:
        activation = record.activation.read(raw)
        if not isinstance(activation, str) or activation not in model_config.ACTIVATIONS:
            raise ModelError(f"{file}: hidden_act '{activation}' is not among {', '.join(model_config.ACTIVATIONS)}")
        rope = read_rope(raw, record, file)
        sizes = {field: positive(file, key, raw[key], is_integer=True) for field, key in SIZES.items()}
        sizes |= _read_heads(raw, record, sizes, rope.fraction, file)
        max_positions = positive(file, "max_position_embeddings", raw.get("max_position_embeddings", 2048), is_integer=True)
        config = model_config.ModelConfig(
            architecture=record.model_type,
            **sizes,
            **_read_switches(raw, record, file),
            **_read_layers(raw, record, sizes["num_layers"], file),
            **_read_scales(raw, record, sizes, file),
            max_positions=max_positions,
            activation=activation,
            norm_eps=positive(file, "the norms' epsilon", record.norm_eps.read(raw)),
            rope_theta=rope.theta,
            rope_scaling=read_scaling(raw, rope, sizes["rotary_dim"], max_positions, file),
            local_rope_theta=rope.local_theta,
            dtype=dtype,
            activations=activations or ("float32" if jax.default_backend() == "cpu" else dtype),
            quantization=quantization,
        )
    except KeyError as error:
        raise ModelError(f"{file}: key {error} is missing") from error
    if quantization == "nf4":
        _check_blocks(config, file)
    return config


def _check_blocks(config: model_config.ModelConfig, file: pathlib.Path) -> None:
    """Refuses input widths that blocks of NF4 do not divide."""
    for name, (_, linear) in config.record.projections.items():
        width = config.width(linear.inputs)
        if width % BLOCK:
            what = f"{file}: model.quantization=nf4 has blocks of {BLOCK} inputs, which do not divide the {width} of {name}"
            raise ModelError(f"{what}; take int8")


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


def _read_heads(raw: dict, record: architectures.Architecture, sizes: dict[str, int], rotary_fraction, file: pathlib.Path) -> dict:
    num_heads = sizes["num_heads"]
    num_kv_heads = record.num_kv_heads.read(raw) or num_heads
    head_dim = record.head_dim.read(raw) or sizes["hidden_size"] // num_heads
    for name, value in (("num_key_value_heads", num_kv_heads), ("head_dim", head_dim)):
        positive(file, name, value, is_integer=True)
    if num_heads % num_kv_heads:
        raise ModelError(f"{file}: num_attention_heads={num_heads} is no multiple of num_key_value_heads={num_kv_heads}")
    rotary_dim = int(head_dim * rotary_fraction)
    if rotary_dim > head_dim or rotary_dim % 2:
        raise ModelError(f"{file}: the number of rotated features, {rotary_dim}, must be even and at most head_dim={head_dim}")
    return {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "rotary_dim": rotary_dim}


def _read_switches(raw: dict, record: architectures.Architecture, file: pathlib.Path) -> dict:
    switches = {}
    for field in SWITCHES:
        key = getattr(record, field)
        switches[field] = key.read(raw)
        if not isinstance(switches[field], bool):
            raise ModelError(f"{file}: {key.name} must be true or false, got {switches[field]!r:.80}")
    return switches


def _read_layers(raw: dict, record: architectures.Architecture, num_layers: int, file: pathlib.Path) -> dict:
    """The window of each layer, and whether it has rotary positions; empty if all layers are equal in this."""
    if num_layers > MAX_LAYERS:
        raise ModelError(f"{file}: num_hidden_layers={num_layers} is over {MAX_LAYERS}")
    try:
        rotated = tuple(record.has_rotation(raw, layer) for layer in range(num_layers))
        kinds = raw.get("layer_types") or [LOCAL if record.has_window(raw, layer) else GLOBAL for layer in range(num_layers)]
        if len(kinds) < num_layers or not set(kinds) <= {LOCAL, GLOBAL}:
            raise TypeError
    except (TypeError, IndexError, ZeroDivisionError) as error:
        keys = "layer_types, no_rope_layers and the intervals of layers"
        raise ModelError(f"{file}: {keys} must fit {num_layers} layers of the types {LOCAL} and {GLOBAL}") from error
    is_on = record.window_switch is None or raw.get(record.window_switch, False)
    window = record.window.read(raw) if is_on else None
    layers = {"rotated": () if all(rotated) else rotated}
    if window is None:
        if LOCAL in (raw.get("layer_types") or ()):
            raise ModelError(f"{file}: layer_types has {LOCAL}, but there is no {record.window.name or 'sliding window'}")
        return layers
    window = positive(file, str(record.window.name), window, is_integer=True)
    windows = tuple(window if kind == LOCAL else 0 for kind in kinds[:num_layers])
    return layers | {"windows": windows if any(windows) else ()}


def _read_scales(raw: dict, record: architectures.Architecture, sizes: dict[str, int], file: pathlib.Path) -> dict:
    """Factors of embeddings, queries, branches and logits, and soft caps."""
    factors = {field: getattr(record, field) for field in FACTORS}
    scales: dict = {field: positive(file, str(key.name), key.read(raw)) for field, key in factors.items()}
    if record.scaled_embedding:
        scales["embedding_scale"] = sizes["hidden_size"] ** 0.5
    scalar, scale = record.query_scalar.read(raw), record.attention_scale.read(raw)
    if scalar is not None:
        scales["query_scale"] = (sizes["head_dim"] / positive(file, str(record.query_scalar.name), scalar)) ** 0.5
    if scale is not None:
        scales["query_scale"] = sizes["head_dim"] ** 0.5 * positive(file, str(record.attention_scale.name), scale)
    for field in ("attention_cap", "logit_cap"):
        key = getattr(record, field)
        value = key.read(raw)
        scales[field] = None if value is None else positive(file, key.name, value)
    return scales


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

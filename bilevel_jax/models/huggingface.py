"""Models and adapters in Hugging Face's and PEFT's file formats, read and written without PyTorch.

Names follow one rule: a weight `layers/mlp/up_proj/kernel` of ours, stacked over layers, is
`<prefix>.layers.<i>.mlp.up_proj.weight` of theirs, transposed. Only the few tensors outside the layers are listed one by one.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
import tqdm

from bilevel_jax import files, sharding
from bilevel_jax.models import decoder, lora

PACKAGE = pathlib.Path(__file__).parents[1]
MODEL_FILES = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja")  # what a hub download brings: no pickles

WEIGHT_DTYPES = [np.dtype(dtype) for dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)]

OUTER = {
    "llama": {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head", "norm": "model.norm", "layers": "model.layers"},
    "gpt_neox": {
        "embed_tokens": "gpt_neox.embed_in",
        "lm_head": "embed_out",
        "norm": "gpt_neox.final_layer_norm",
        "layers": "gpt_neox.layers",
    },
}


class ModelError(ValueError):
    """A model or adapter directory that cannot be used; the message names the file, the key and what to do."""


# --------------------------------------------------------------------------------------------------------------------
# Finding and describing a model
# --------------------------------------------------------------------------------------------------------------------


def locate(path: str, files: tuple[str, ...] = MODEL_FILES) -> pathlib.Path:
    """A local directory for `path`: itself, one shipped with this package (`bilevel_jax/tiny`), or a hub download of `files`."""
    local = pathlib.Path(path)
    if local.is_dir():
        return local
    if local.exists():
        raise ModelError(f"{path} is a file; a model is a directory with config.json, safetensors and a tokenizer")
    if local.parts[:1] == (PACKAGE.name,) and (PACKAGE.parent / local).is_dir():
        return PACKAGE.parent / local
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ModelError(f"{path}: no such directory; give a model directory or a hub id such as EleutherAI/pythia-1b")
    import huggingface_hub

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(path, allow_patterns=files))
    except Exception as error:  # the hub raises a dozen types, from DNS to permissions; all mean the same to the user
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{path}: no such directory, and the hub could not be reached for it ({reason})") from error


def _read_json(file: pathlib.Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{file}: missing") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: holds a {type(content).__name__}, not an object")
    return content


def _rope(raw: dict, file: pathlib.Path):
    """`(theta, scaling, rotated fraction of a head)` from a config of transformers 5 (`rope_parameters`) or earlier."""
    new = raw.get("rope_parameters") or {}
    scaling = new if new else (raw.get("rope_scaling") or {})
    if not isinstance(scaling, dict):
        raise ModelError(f"{file}: rope_parameters and rope_scaling must be objects, got {scaling!r:.80}")
    theta = new.get("rope_theta", raw.get("rope_theta", raw.get("rotary_emb_base", 10000.0)))
    default = raw.get("rotary_pct", 0.25 if raw.get("model_type") == "gpt_neox" else 1.0)
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


def _number(file: pathlib.Path, name: str, value, whole: bool = False):
    """A positive number that is no larger than any of a model can be."""
    fits = type(value) is int if whole else isinstance(value, (int, float)) and not isinstance(value, bool)
    if not fits or not 0 < value < 2**31:
        raise ModelError(f"{file}: {name} must be a positive {'integer' if whole else 'number'}, got {value!r:.80}")
    return value if whole else float(value)


def read_config(directory: pathlib.Path, dtype: str = "float32", activations: str | None = None) -> decoder.ModelConfig:
    """The decoder's shape from `config.json`.

    Args:
      dtype: of base weights, cache and factors.
      activations: their dtype; by default that of the weights, but float32 on a CPU, for which XLA has no arithmetic in half
        precision but products that are summed in float32: it would convert to and fro at every operation.

    Raises:
      ModelError: an architecture, activation or rope type that the decoder does not have, or a key that is missing or not what it
        should be.
    """
    file = pathlib.Path(directory) / "config.json"
    raw = _read_json(file)
    architecture = raw.get("model_type")
    if not isinstance(architecture, str) or architecture not in OUTER:
        raise ModelError(f"{file}: model_type '{architecture}' is not supported; known are {', '.join(OUTER)}")
    try:
        llama = architecture == "llama"
        activation = raw.get("hidden_act", "silu" if llama else "gelu")
        if not isinstance(activation, str) or activation not in decoder.ACTIVATIONS:
            raise ModelError(f"{file}: hidden_act '{activation}' is not among {', '.join(decoder.ACTIVATIONS)}")
        theta, scaling, fraction = _rope(raw, file)
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        vocab_size, hidden_size, intermediate_size, num_layers, num_heads = (_number(file, x, raw[x], True) for x in names)
        num_kv_heads = (raw.get("num_key_value_heads") or num_heads) if llama else num_heads
        head_dim = raw.get("head_dim") or hidden_size // num_heads
        for name, value in (("num_key_value_heads", num_kv_heads), ("head_dim", head_dim)):
            _number(file, name, value, True)
        if num_heads % num_kv_heads:
            raise ModelError(f"{file}: num_attention_heads={num_heads} is no multiple of num_key_value_heads={num_kv_heads}")
        rotary_dim = int(head_dim * _number(file, "the rotated fraction of a head", fraction))
        if rotary_dim > head_dim or rotary_dim % 2:
            raise ModelError(f"{file}: {rotary_dim} of {head_dim} places of a head are rotated; they must be pairs within it")
        if isinstance(scaling, decoder.Llama3Rope):
            for field, value in dataclasses.asdict(scaling).items():
                _number(file, f"rope's {field}", value)
        elif scaling is not None:
            scaling = _number(file, "rope's factor", scaling)
        switches = {
            "use_parallel_residual": not llama and raw.get("use_parallel_residual", True),
            "attention_bias": raw.get("attention_bias", not llama),
            "mlp_bias": raw.get("mlp_bias", False) if llama else True,
            "tie_word_embeddings": raw.get("tie_word_embeddings", False),
        }
        for name, value in switches.items():
            if not isinstance(value, bool):
                raise ModelError(f"{file}: {name} must be true or false, got {value!r:.80}")
        parallel_residual, attention_bias, mlp_bias, tie_embeddings = switches.values()
        norm_eps = raw.get("rms_norm_eps", 1e-6) if llama else raw.get("layer_norm_eps", 1e-5)
        return decoder.ModelConfig(
            architecture=architecture,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rotary_dim=rotary_dim,
            max_positions=_number(file, "max_position_embeddings", raw.get("max_position_embeddings", 2048), True),
            activation=activation,
            norm_eps=_number(file, "the norms' epsilon", norm_eps),
            rope_theta=_number(file, "rope_theta", theta),
            rope_scaling=scaling,
            parallel_residual=parallel_residual,
            attention_bias=attention_bias,
            mlp_bias=mlp_bias,
            tie_embeddings=tie_embeddings,
            dtype=dtype,
            activations=activations or ("float32" if jax.default_backend() == "cpu" else dtype),
        )
    except KeyError as error:
        raise ModelError(f"{file}: key {error} is missing") from error


# --------------------------------------------------------------------------------------------------------------------
# Base weights
# --------------------------------------------------------------------------------------------------------------------


class Shards:
    """All tensors of a model directory by name, read one at a time; bfloat16 included, which NumPy lacks by itself."""

    def __init__(self, directory: pathlib.Path):
        index = directory / "model.safetensors.index.json"
        if index.exists():
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise ModelError(f"{index}: weight_map must name a file for each tensor")
            names = sorted(set(weight_map.values()))
            if any(pathlib.PurePath(name).name != name for name in names):
                raise ModelError(f"{index}: a shard lies outside the model directory")
            files = [directory / name for name in names]
        else:
            files = [directory / "model.safetensors"]
        self.files = {}
        for file in files:
            if not file.exists():
                raise ModelError(f"{file}: missing (weights are read from safetensors only)")
            try:
                handle = safetensors.safe_open(file, framework="numpy")
                for name in handle.keys():
                    self.files[name] = (file, handle)
            except (safetensors.SafetensorError, OSError) as error:
                raise ModelError(f"{file}: not a safetensors file ({error})") from error

    def read(self, name: str, shape: tuple[int, ...], transposed: bool, source: pathlib.Path) -> np.ndarray:
        """The tensor, which is `shape` after transposition."""
        if name not in self.files:
            raise ModelError(f"{source}: tensor '{name}' is missing")
        file, handle = self.files[name]
        try:
            tensor = handle.get_tensor(name)
        except Exception as error:  # of every family, for dtypes that NumPy does not have
            raise ModelError(f"{file}: tensor '{name}' cannot be read ({error}); quantised weights are not supported") from error
        if tensor.dtype not in WEIGHT_DTYPES:
            raise ModelError(f"{file}: tensor '{name}' is {tensor.dtype}; quantised weights are not supported")
        expected = shape[::-1] if transposed else shape
        if tensor.shape != expected:
            found, expected = list(tensor.shape), list(expected)
            raise ModelError(f"{file}: tensor '{name}' has shape {found}, the config asks for {expected}")
        return tensor.T if transposed else tensor


def their_name(path: tuple[str, ...], config: decoder.ModelConfig) -> tuple[str, bool]:
    """Hugging Face's name for a weight of ours, `{}` standing for the layer, and whether it is transposed."""
    first, *rest = path
    outer = OUTER[config.architecture][first]
    if not rest:
        return f"{outer}.weight", False
    kind = "bias" if rest[-1] == "bias" else "weight"
    middle = ["{}", *rest[:-1]] if first == "layers" else rest[:-1]
    return ".".join([outer, *middle, kind]), rest[-1] == "kernel"


def flatten(tree) -> list[tuple[tuple[str, ...], object]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(tuple(entry.key for entry in path), leaf) for path, leaf in leaves]


def _unflatten(leaves: dict[tuple[str, ...], object]) -> dict:
    tree = {}
    for path, leaf in leaves.items():
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = leaf
    return tree


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _insert(stack, tensor, layer, place):
    return jax.lax.with_sharding_constraint(stack.at[layer].set(tensor), place)


def load_params(directory: pathlib.Path, config: decoder.ModelConfig, mesh: jax.sharding.Mesh | None = None):
    """Base weights in `config.dtype`, stacked over layers, split over the mesh; without one, on the first device.

    Tensors are read, cast and put in their place on the devices one at a time, so that beside the weights themselves no more
    than a stack of them exists, and no device ever holds more than its part of that.
    """
    mesh = mesh or sharding.make_mesh(1)
    directory = pathlib.Path(directory)
    shards = Shards(directory)
    shapes = jax.eval_shape(lambda: decoder.init_params(config, jax.random.key(0)))
    loaded = {}
    for path, leaf in tqdm.tqdm(flatten(shapes), desc="loading weights", delay=2, leave=False, disable=None):
        (name, transposed), place = their_name(path, config), sharding.weight_sharding(mesh, path, leaf.shape)
        if path[0] == "layers":
            for i in (0, config.num_layers - 1):  # before memory is taken for as many layers as the config claims
                shards.read(name.format(i), leaf.shape[1:], transposed, directory)
            stack, of_layer = jnp.zeros(leaf.shape, leaf.dtype, device=place), sharding.weight_sharding(mesh, path, leaf.shape[1:])
            for i in range(config.num_layers):
                tensor = shards.read(name.format(i), leaf.shape[1:], transposed, directory).astype(leaf.dtype)
                stack = _insert(stack, sharding.device_put(tensor, of_layer), i, place)
        else:
            stack = sharding.device_put(shards.read(name, leaf.shape, transposed, directory).astype(leaf.dtype), place)
        loaded[path] = stack.block_until_ready()
    return _unflatten(loaded)


def eos_ids(directory: pathlib.Path, tokenizer) -> tuple[int, ...]:
    """The tokens that end a response: the tokenizer's, and those that the model's own settings for generation name.

    Raises:
      ModelError: what is named there is not a token id.
    """
    found = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for name in ("generation_config.json", "config.json"):
        file = pathlib.Path(directory) / name
        named = _read_json(file).get("eos_token_id") if file.exists() else None
        ids = [] if named is None else named if isinstance(named, list) else [named]
        if not all(type(token) is int and 0 <= token < 2**31 for token in ids):
            raise ModelError(f"{file}: eos_token_id must be a token id or a list of them, got {named!r:.80}")
        found += ids
    return tuple(dict.fromkeys(found))


def load_model(path: str, dtype: str = "float32") -> tuple[decoder.ModelConfig, dict]:
    """Config and base weights of a model directory or hub id, on the first device."""
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ModelError(f"model.dtype '{dtype}' is not among float32, bfloat16, float16")
    directory = locate(path)
    config = read_config(directory, dtype)
    return config, load_params(directory, config)


def save_params(directory: pathlib.Path, config: decoder.ModelConfig, params, dtype: str | None = None) -> None:
    """Writes `model.safetensors` with Hugging Face's names, in `dtype` or as the weights are."""
    tensors = {}
    for path, leaf in flatten(params):
        name, transposed = their_name(path, config)
        stack = np.asarray(leaf if dtype is None else leaf.astype(dtype))
        for i, tensor in enumerate(stack if path[0] == "layers" else [stack]):
            tensors[name.format(i)] = np.ascontiguousarray(tensor.T if transposed else tensor)
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


# --------------------------------------------------------------------------------------------------------------------
# Adapters
# --------------------------------------------------------------------------------------------------------------------


def save_adapter(directory: pathlib.Path, config: decoder.ModelConfig, adapter, *, alpha: float, base: str) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` as PEFT does, so that `PeftModel.from_pretrained` reads them."""
    tensors, targets, rank = {}, [], 0
    prefix = "base_model.model." + OUTER[config.architecture]["layers"]
    for module, weights in adapter["layers"].items():
        for name, low_rank in weights.items():
            targets.append(name)
            rank = low_rank["a"].shape[-1]
            for ours, theirs in (("a", "lora_A"), ("b", "lora_B")):
                for i, matrix in enumerate(np.asarray(low_rank[ours], np.float32)):
                    tensors[f"{prefix}.{i}.{module}.{name}.{theirs}.weight"] = np.ascontiguousarray(matrix.T)
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    files.write_atomically(directory / "adapter_model.safetensors", weights)
    files.write_atomically(directory / "adapter_config.json", json.dumps(description, indent=2) + "\n")


# Options of PEFT that are read here or do not change the function a saved adapter computes. Any other must be off.
_HARMLESS = {
    *("peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode"),
    *("r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules", "exclude_modules", "layers_pattern"),
    *("init_lora_weights", "eva_config", "corda_config", "loftq_config", "lora_ga_config", "runtime_config"),
    *("megatron_config", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
}
_OFF = (None, False, "none", [], {})
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # others (PiSSA, OLoRA, ...) change the base too


def load_adapter(directory: str | pathlib.Path, config: decoder.ModelConfig) -> tuple[decoder.ModelConfig, dict]:
    """A PEFT LoRA directory: the config with its `adapter_scale`, and the adapter.

    Raises:
      ModelError: not a LoRA of this model, or one with an option (DoRA, biases, ...) that would be lost.
    """
    directory = pathlib.Path(directory)
    file = directory / "adapter_config.json"
    raw = _read_json(file)
    if raw.get("peft_type") != "LORA":
        raise ModelError(f"{file}: peft_type '{raw.get('peft_type')}' is not LORA")
    for option, value in raw.items():
        off = value in (_PLAIN_STARTS if option == "init_lora_weights" else _OFF)
        if not off and (option not in _HARMLESS or option == "init_lora_weights"):
            raise ModelError(f"{file}: {option}={value!r} is not supported")
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if type(rank) is not int or not 0 < rank < 2**31 or type(alpha) not in (int, float) or not abs(alpha) < 2**31:
        raise ModelError(f"{file}: r must be a positive integer and lora_alpha a number")
    scale = alpha / rank**0.5 if raw.get("use_rslora") else alpha / rank
    weights = directory / "adapter_model.safetensors"
    try:
        tensors = safetensors.numpy.load_file(weights)
    except FileNotFoundError:
        raise ModelError(f"{weights}: missing") from None
    except Exception as error:  # of every family, for dtypes that NumPy does not have
        raise ModelError(f"{weights}: not a safetensors file ({error})") from error
    quantised = next((name for name, tensor in tensors.items() if tensor.dtype not in WEIGHT_DTYPES), None)
    if quantised:
        raise ModelError(f"{weights}: tensor '{quantised}' is {tensors[quantised].dtype}; quantised weights are not supported")

    prefix = "base_model.model." + OUTER[config.architecture]["layers"]
    modules = {}
    for name, (module, width_in, width_out) in lora.projections(config).items():
        pair = {}
        for ours, theirs, shape in (("a", "lora_A", (rank, width_in)), ("b", "lora_B", (width_out, rank))):
            names = [f"{prefix}.{i}.{module}.{name}.{theirs}.weight" for i in range(config.num_layers)]
            found = [tensors.pop(key) for key in names if key in tensors]
            if not found:
                continue
            if len(found) != config.num_layers or any(matrix.shape != shape for matrix in found):
                raise ModelError(f"{weights}: {module}.{name}.{theirs} does not fit {config.num_layers} layers of {shape}")
            pair[ours] = jnp.asarray(np.stack([matrix.astype(np.float32).T for matrix in found]))
        if len(pair) == 1:
            raise ModelError(f"{weights}: {module}.{name} has only one of lora_A and lora_B")
        if pair:
            modules.setdefault(module, {})[name] = pair
    if tensors or not modules:
        stray = next(iter(tensors), "none")
        raise ModelError(f"{weights}: tensor '{stray}' does not belong to a LoRA of this {config.architecture}")
    return dataclasses.replace(config, adapter_scale=scale), {"layers": modules}

"""LoRA adapters in the file format of PEFT."""

import dataclasses
import pathlib
import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from bilevel_jax import files
from bilevel_jax.models import layer_range, lora, model_config
from bilevel_jax.models.huggingface.directory import ModelError, check_regular_files, read_json
from bilevel_jax.models.huggingface.weights import WEIGHT_DTYPES, cast, check_finite

MATRICES = {"a": "lora_A", "b": "lora_B"}  # our name -> PEFT's

# Options of PEFT that `load_adapter` reads, or that do not change the function of a saved adapter. All others must be off.
_ALLOWED = {
    *("peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode"),
    *("r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules", "exclude_modules", "layers_pattern"),
    "layers_to_transform",  # of a part of the layers; the tensors say which
    *("init_lora_weights", "eva_config", "corda_config", "loftq_config", "lora_ga_config", "runtime_config"),
    *("megatron_config", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
}
_OFF: tuple = (None, False, "none", [], {})
_ALLOWED_INIT = (None, True, False, "gaussian", "orthogonal", "eva")  # others (PiSSA, OLoRA, ...) change the base too


def _tensor_names(config: model_config.ModelConfig, module: str, name: str, matrix: str, first: int = 0) -> list[str]:
    """PEFT's names of one matrix of a projection, one per layer from `first`."""
    prefix = "base_model.model." + config.record.outer_names["layers"]
    return [f"{prefix}.{i}.{module}.{name}.{MATRICES[matrix]}.weight" for i in range(first, config.num_layers)]


def save_adapter(
    directory: pathlib.Path,
    config: model_config.ModelConfig,
    adapter,
    *,
    alpha: float,
    base: str,
    rslora: bool = False,
    dropout: float = 0.0,
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` for `PeftModel.from_pretrained`."""
    tensors, targets, rank = {}, [], 0
    first = config.num_layers - layer_range.num_adapted(adapter)
    for module, weights in adapter["layers"].items():
        for name, low_rank in weights.items():
            targets.append(name)
            rank = low_rank["a"].shape[-1]
            for matrix in MATRICES:
                stack = np.asarray(low_rank[matrix], np.float32)
                for tensor_name, layer in zip(_tensor_names(config, module, name, matrix, first), stack):
                    tensors[tensor_name] = np.ascontiguousarray(layer.T)
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": rslora,
        "use_dora": False,
        "modules_to_save": None,
    }
    if first:
        description["layers_to_transform"] = list(range(first, config.num_layers))
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    files.write_atomically(directory / "adapter_model.safetensors", weights)
    files.write_atomically(directory / "adapter_config.json", files.to_json(description, indent=2) + "\n")


def load_adapter(directory: str | pathlib.Path, config: model_config.ModelConfig) -> tuple[model_config.ModelConfig, dict]:
    """Reads a PEFT LoRA directory.

    Returns:
      The config with the `adapter_scale` of the adapter, and the adapter.

    Raises:
      ModelError: not a LoRA adapter of all or the last layers of this model, or an option (DoRA, biases, ...) that is not
        supported.
    """
    directory = pathlib.Path(directory)
    if directory.is_dir():
        check_regular_files(directory)
    rank, scale = _read_options(directory / "adapter_config.json")
    file = directory / "adapter_model.safetensors"
    tensors = _read_tensors(file)
    first = _first_layer(config, tensors, file)
    modules: dict[str, dict] = {}
    number = config.num_layers - first
    for name, (module, width_in, width_out) in lora.projections(config).items():
        low_rank = {}
        for matrix, shape in (("a", (rank, width_in)), ("b", (width_out, rank))):
            layers = [tensors.pop(key) for key in _tensor_names(config, module, name, matrix, first) if key in tensors]
            if not layers:
                continue
            if len(layers) != number or any(layer.shape != shape for layer in layers):
                label = f"{module}.{name}.{MATRICES[matrix]}"
                raise ModelError(f"{file}: {label} does not fit {number} layers of {shape}")
            low_rank[matrix] = jnp.asarray(np.stack([layer.T for layer in layers]))
        if len(low_rank) == 1:
            raise ModelError(f"{file}: {module}.{name} has only one of lora_A and lora_B")
        if low_rank:
            modules.setdefault(module, {})[name] = low_rank
    if tensors or not modules:
        tensor = next(iter(tensors), "none")
        raise ModelError(f"{file}: tensor '{tensor}' does not belong to a LoRA of this {config.architecture}")
    return dataclasses.replace(config, adapter_scale=scale), {"layers": modules}


def _first_layer(config: model_config.ModelConfig, tensors: dict[str, np.ndarray], file: pathlib.Path) -> int:
    """The first layer of an adapter; it must have all from there to the last one."""
    pattern = re.compile(re.escape("base_model.model." + config.record.outer_names["layers"]) + r"\.(\d{1,6})\.")
    matches = map(pattern.match, tensors)
    present = sorted({int(match[1]) for match in matches if match and int(match[1]) < config.num_layers})
    if present and present != list(range(present[0], config.num_layers)):
        what = f"it adapts layers {', '.join(map(str, present[:8]))}{' ...' if len(present) > 8 else ''}"
        raise ModelError(f"{file}: {what}; only adapters of all {config.num_layers} layers or of the last ones are supported")
    return present[0] if present else 0


def _read_options(file: pathlib.Path) -> tuple[int, float]:
    """Rank and scale from `adapter_config.json`."""
    raw = read_json(file)
    if raw.get("peft_type") != "LORA":
        raise ModelError(f"{file}: peft_type '{raw.get('peft_type')}' is not LORA")
    for option, value in raw.items():
        is_off = value in (_ALLOWED_INIT if option == "init_lora_weights" else _OFF)
        if not is_off and (option not in _ALLOWED or option == "init_lora_weights"):
            raise ModelError(f"{file}: {option}={value!r} is not supported")
    rank = raw.get("r")
    alpha: Any = raw.get("lora_alpha")
    if type(rank) is not int or not 0 < rank < 2**31 or type(alpha) not in (int, float) or not abs(alpha) < 2**31:
        raise ModelError(f"{file}: r must be a positive integer and lora_alpha a number")
    return rank, alpha / rank**0.5 if raw.get("use_rslora") else alpha / rank


def _read_tensors(file: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        tensors = safetensors.numpy.load_file(file)
    except FileNotFoundError:
        raise ModelError(f"{file}: missing") from None
    except Exception as error:  # its type varies, for dtypes that NumPy does not have
        raise ModelError(f"{file}: not a safetensors file ({error})") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in WEIGHT_DTYPES:
            raise ModelError(f"{file}: tensor '{name}' is {tensor.dtype}; quantised weights are not supported")
        tensors[name] = cast(tensor, np.float32)
        check_finite(tensors[name], name, file)
    return tensors

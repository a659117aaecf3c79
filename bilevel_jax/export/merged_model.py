"""Writes one Hugging Face model directory, tensor by tensor: a base merged with an adapter, or weights that were all learned.

An adapted weight becomes W + scale · (A B)ᵀ, computed in float32. The weights are stored in float32 by default, whatever the dtype
of the base. bfloat16 has 8 significant bits, and an update is often smaller than half the last bit of its weight, so rounding would
drop it. The files contain the tensors that the decoder uses, with the names and the orientation of the base.
"""

import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from bilevel_jax import files, progress
from bilevel_jax.models import decoder, huggingface, layer_range, model_config

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
MAX_SHARD = 5 * 10**9  # bytes per file, as in `save_pretrained`
COPIED = (  # copied from the base: tokenizer, generation settings, licences
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model"),
    *("*.jinja", "generation_config.json", "LICENSE*", "NOTICE*"),
)


class Weight(NamedTuple):
    """One tensor of a model directory."""

    name: str  # in the files
    shape: tuple[int, ...]  # in `params`
    transposed: bool  # whether the files have the transpose
    path: tuple[str, ...]  # in `params`
    layer: int | None


def list_weights(config: model_config.ModelConfig) -> list[Weight]:
    """All tensors of a model, ordered by layer."""
    shapes = jax.eval_shape(lambda: decoder.init_params(config, jax.random.key(0)))
    weights = []
    for path, leaf in huggingface.flatten(shapes):
        name, transposed = huggingface.hf_name(path, config)
        if path[0] == "layers":
            layers = range(config.num_layers)
            weights += [Weight(name.format(i), leaf.shape[1:], transposed, path, i) for i in layers]
        else:
            weights.append(Weight(name, leaf.shape, transposed, path, None))
    return sorted(weights, key=lambda weight: -1 if weight.layer is None else weight.layer)


def split(weights: list[Weight], itemsize: int, max_shard: int) -> list[list[Weight]]:
    """Consecutive weights in shards of at most `max_shard` bytes. A larger weight has its own shard."""
    shards: list[list[Weight]] = [[]]
    size = 0
    for weight in weights:
        num_bytes = int(np.prod(weight.shape)) * itemsize
        if shards[-1] and size + num_bytes > max_shard:
            shards.append([])
            size = 0
        shards[-1].append(weight)
        size += num_bytes
    return shards


def write_merged_model(
    base: pathlib.Path,
    adapter: pathlib.Path,
    out: pathlib.Path,
    *,
    dtype: str = "float32",
    max_shard: int = MAX_SHARD,
    texts: Mapping[str, str] | None = None,
) -> int:
    """Writes the model directory `out` atomically and returns the number of its parameters.

    Memory holds the adapter and one shard.

    Args:
      base: model directory.
      adapter: PEFT directory.
      out: a path that does not exist, or an empty directory.
      dtype: float32 or bfloat16, of the weights written.
      max_shard: bytes per safetensors file.
      texts: further files, by name.

    Raises:
      ModelError: base or adapter is invalid, or the adapter belongs to another model.
      OSError: `out` is in use or cannot be written.
    """
    config, low_rank = huggingface.load_adapter(adapter, huggingface.read_config(base))
    merge = _merge_function(huggingface.TensorReader(base), base, config, low_rank, DTYPES[dtype])
    return _write_model(base, out, config, merge, dtype, max_shard, texts or {})


def write_learned_model(base: pathlib.Path, params, config: model_config.ModelConfig, out: pathlib.Path) -> int:
    """Writes float32 weights, all learned, as the model directory `out` atomically, and returns their number.

    Args:
      base: model directory at which training began, for config and tokenizer.
      params: in the layout of the base, on the host.
      config: of the model.
      out: a path; what is there is replaced.
    """
    leaves = dict(huggingface.flatten(params))

    def tensor(weight: Weight) -> np.ndarray:
        array = leaves[weight.path] if weight.layer is None else leaves[weight.path][weight.layer]
        return np.ascontiguousarray(array.T if weight.transposed else array)

    shutil.rmtree(out, ignore_errors=True)  # of an earlier attempt
    return _write_model(base, out, config, tensor, "float32", MAX_SHARD, {})


def _write_model(
    base: pathlib.Path,
    out: pathlib.Path,
    config: model_config.ModelConfig,
    tensor: Callable[[Weight], np.ndarray],
    dtype: str,
    max_shard: int,
    texts: Mapping[str, str],
) -> int:
    """Writes a model directory whose tensors a function gives, and returns the number of its parameters."""
    check_free(out)
    out = out.absolute()  # a directory cannot take the place of "."
    weights = list_weights(config)
    num_params = sum(int(np.prod(weight.shape)) for weight in weights)
    out.parent.mkdir(parents=True, exist_ok=True)
    num_bytes, free = num_params * DTYPES[dtype].itemsize, shutil.disk_usage(out.parent).free
    if num_bytes > free:
        raise OSError(f"{out}: the weights take {num_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there")

    try:
        with files.new_directory(out) as scratch:
            _write_settings(base, scratch, config, dtype)
            for name, text in texts.items():
                (scratch / name).write_text(text, encoding="utf-8")
            shards = split(weights, DTYPES[dtype].itemsize, max_shard)
            weight_map = _write_shards(scratch, shards, tensor)
            if len(shards) > 1:
                index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
                (scratch / "model.safetensors.index.json").write_text(files.to_json(index, indent=2) + "\n")
            _apply_umask(scratch)
    except safetensors.SafetensorError as error:  # raised for a full disk
        raise OSError(f"{out}: the weights could not be written ({error})") from error
    return num_params


def _merge_function(
    reader: huggingface.TensorReader, base: pathlib.Path, config: model_config.ModelConfig, low_rank, dtype: np.dtype
) -> Callable[[Weight], np.ndarray]:
    """A function from a weight to its merged tensor, as the files store it."""
    modules, first = low_rank["layers"].items(), config.num_layers - layer_range.num_adapted(low_rank)
    adapted = {("layers", module, name, "kernel"): pair for module, pairs in modules for name, pair in pairs.items()}

    def merge(weight: Weight) -> np.ndarray:
        tensor = reader.read(weight.name, weight.shape, weight.transposed, base)
        if weight.path in adapted and weight.layer is not None and weight.layer >= first:
            a, b = (np.asarray(adapted[weight.path][matrix][weight.layer - first]) for matrix in "ab")
            tensor = tensor.astype(np.float32) + np.float32(config.adapter_scale) * (a @ b)
        tensor = huggingface.cast(tensor, dtype)
        huggingface.check_finite(tensor, weight.name, base)
        return np.ascontiguousarray(tensor.T if weight.transposed else tensor)

    return merge


def _write_shards(directory: pathlib.Path, shards: list[list[Weight]], tensor: Callable[[Weight], np.ndarray]) -> dict[str, str]:
    """Writes one safetensors file per shard. Returns the file of each tensor."""
    weight_map: dict[str, str] = {}
    with progress.bar(total=sum(map(len, shards)), desc="writing weights", unit="tensor") as bar:
        for i, shard in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
            tensors = {}
            for weight in shard:
                tensors[weight.name] = tensor(weight)
                bar.update()
            safetensors.numpy.save_file(tensors, directory / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
    return weight_map


def check_free(out: pathlib.Path) -> None:
    """Raises FileExistsError unless the path is free or an empty directory."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} exists already; give another directory")


def _write_settings(base: pathlib.Path, out: pathlib.Path, config: model_config.ModelConfig, dtype: str) -> None:
    """Writes `config.json` with the new dtype, and copies the other files of the base."""
    for file in sorted({file for pattern in COPIED for file in base.glob(pattern) if file.is_file()}):
        huggingface.check_inside(file, base)
        shutil.copyfile(file, out / file.name)
    huggingface.check_inside(base / "config.json", base)
    raw = json.loads((base / "config.json").read_text(encoding="utf-8"))
    raw.setdefault("architectures", [config.record.class_name])
    raw["torch_dtype" if "torch_dtype" in raw else "dtype"] = dtype
    (out / "config.json").write_text(files.to_json(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _apply_umask(directory: pathlib.Path) -> None:
    """Gives a temporary directory, private by default, the usual permissions."""
    mask = os.umask(0)
    os.umask(mask)
    directory.chmod(0o777 & ~mask)
    for file in directory.iterdir():
        file.chmod(0o666 & ~mask)

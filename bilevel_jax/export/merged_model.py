"""A base with its adapter folded in, as one Hugging Face model directory, written tensor by tensor.

An adapted weight becomes W + scale · (A B)ᵀ, computed in float32. float32 is also how it is stored unless asked otherwise, whatever
the base's own dtype: bfloat16 has 8 bits, and an update is often smaller than half of the last one of the weight it goes to, so
that rounding would drop it. Only what the decoder uses is written, under the names and in the orientation of the base.
"""

import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
import tqdm

from bilevel_jax.models import decoder, huggingface

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
MAX_SHARD = 5 * 10**9  # bytes of a file, the limit of `save_pretrained` too
COPIED = (  # beside the weights: tokenizer, settings for generation, terms of use
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model"),
    *("*.jinja", "generation_config.json", "LICENSE*", "NOTICE*"),
)
ARCHITECTURES = {"llama": "LlamaForCausalLM", "gpt_neox": "GPTNeoXForCausalLM"}


class Weight(NamedTuple):
    """A tensor of a model directory and where ours is."""

    name: str
    shape: tuple[int, ...]  # as ours
    transposed: bool
    path: tuple[str, ...]  # in our tree
    layer: int | None


def list_weights(config: decoder.ModelConfig) -> list[Weight]:
    """Every tensor that a model has, layer by layer."""
    shapes = jax.eval_shape(lambda: decoder.init_params(config, jax.random.key(0)))
    found = []
    for path, leaf in huggingface.flatten(shapes):
        name, transposed = huggingface.their_name(path, config)
        if path[0] == "layers":
            layers = range(config.num_layers)
            found += [Weight(name.format(i), leaf.shape[1:], transposed, path, i) for i in layers]
        else:
            found.append(Weight(name, leaf.shape, transposed, path, None))
    return sorted(found, key=lambda weight: -1 if weight.layer is None else weight.layer)


def split(weights: list[Weight], itemsize: int, max_shard: int) -> list[list[Weight]]:
    """Runs of weights of at most `max_shard` bytes; a weight beyond that has a file of its own."""
    shards, size = [[]], 0
    for weight in weights:
        bytes_here = int(np.prod(weight.shape)) * itemsize
        if shards[-1] and size + bytes_here > max_shard:
            shards.append([])
            size = 0
        shards[-1].append(weight)
        size += bytes_here
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
    """Writes the model directory `out`, all of it or nothing, and returns the number of its parameters.

    Memory holds the adapter and one shard.

    Args:
      base: model directory.
      adapter: PEFT directory.
      out: a directory that does not exist yet, or an empty one.
      dtype: float32 or bfloat16, of the weights written.
      max_shard: bytes of a safetensors file.
      texts: further files, by name.

    Raises:
      ModelError: base and adapter cannot be read, or do not go together.
      OSError: `out` is taken or cannot be written.
    """
    check_free(out)
    config, low_rank = huggingface.load_adapter(adapter, huggingface.read_config(base))
    modules = low_rank["layers"].items()
    adapted = {("layers", module, name, "kernel"): pair for module, pairs in modules for name, pair in pairs.items()}
    source = huggingface.Shards(base)
    weights = list_weights(config)
    number = sum(int(np.prod(weight.shape)) for weight in weights)
    out.parent.mkdir(parents=True, exist_ok=True)
    needed, free = number * DTYPES[dtype].itemsize, shutil.disk_usage(out.parent).free
    if needed > free:
        raise OSError(f"{out}: the weights take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there")

    def merged(weight: Weight) -> np.ndarray:
        tensor = source.read(weight.name, weight.shape, weight.transposed, base)
        if weight.path in adapted:
            a, b = (np.asarray(adapted[weight.path][half][weight.layer]) for half in "ab")
            tensor = tensor.astype(np.float32) + np.float32(config.adapter_scale) * (a @ b)
        return np.ascontiguousarray((tensor.T if weight.transposed else tensor).astype(DTYPES[dtype]))

    scratch = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        _write_settings(base, scratch, config, dtype)
        for name, text in (texts or {}).items():
            (scratch / name).write_text(text, encoding="utf-8")
        shards, places = split(weights, DTYPES[dtype].itemsize, max_shard), {}
        with tqdm.tqdm(total=len(weights), desc="merging", unit="tensor", delay=2, leave=False, disable=None) as bar:
            for i, shard in enumerate(shards, 1):
                name = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
                tensors = {}
                for weight in shard:
                    tensors[weight.name] = merged(weight)
                    bar.update()
                safetensors.numpy.save_file(tensors, scratch / name, metadata={"format": "pt"})
                places |= dict.fromkeys(tensors, name)
        if len(shards) > 1:
            index = {"metadata": {"total_size": needed}, "weight_map": places}
            (scratch / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        _share(scratch)
        os.replace(scratch, out)
    except safetensors.SafetensorError as error:  # how its writer speaks of a full disk
        raise OSError(f"{out}: the weights could not be written ({error})") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # where it still is: on the way here something failed
    return number


def check_free(out: pathlib.Path) -> None:
    """Refuses a path where something is already."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} exists already; give another directory")


def _write_settings(base: pathlib.Path, out: pathlib.Path, config: decoder.ModelConfig, dtype: str) -> None:
    """The base's `config.json` with the dtype of what is written, and the files beside it."""
    for file in sorted({file for pattern in COPIED for file in base.glob(pattern) if file.is_file()}):
        shutil.copyfile(file, out / file.name)
    raw = json.loads((base / "config.json").read_text(encoding="utf-8"))
    raw.setdefault("architectures", [ARCHITECTURES[config.architecture]])
    raw["torch_dtype" if "torch_dtype" in raw else "dtype"] = dtype
    (out / "config.json").write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _share(directory: pathlib.Path) -> None:
    """Gives temporary files, which are the owner's alone, the permissions that others have."""
    mask = os.umask(0)
    os.umask(mask)
    directory.chmod(0o777 & ~mask)
    for file in directory.iterdir():
        file.chmod(0o666 & ~mask)

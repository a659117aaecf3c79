"""Base weights in safetensors files.

Names follow one rule: our weight `layers/mlp/up_proj/kernel`, stacked over layers, is `<prefix>.layers.<i>.mlp.up_proj.weight` in
Hugging Face's format, transposed. The record of the architecture lists the prefix and the tensors outside the layers.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from bilevel_jax import progress, sharding
from bilevel_jax.models import decoder, model_config
from bilevel_jax.models import quantization as quantizing
from bilevel_jax.models.huggingface.config import read_config
from bilevel_jax.models.huggingface.directory import ModelError, locate, read_json

WEIGHT_DTYPES = [np.dtype(dtype) for dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)]


class TensorReader:
    """Reads the tensors of a model directory, one at a time. Supports bfloat16 through `ml_dtypes`."""

    def __init__(self, directory: pathlib.Path):
        index = directory / "model.safetensors.index.json"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise ModelError(f"{index}: weight_map must name a file for each tensor")
            names = sorted(set(weight_map.values()))
            if any(pathlib.PurePath(name).name != name for name in names):
                raise ModelError(f"{index}: a shard lies outside the model directory")
            files = [directory / name for name in names]
        else:
            files = [directory / "model.safetensors"]
        self.handles = {}  # tensor name -> (file, open file)
        for file in files:
            if not file.exists():
                raise ModelError(f"{file}: missing (weights are read from safetensors only)")
            try:
                handle = safetensors.safe_open(file, framework="numpy")
                for name in handle.keys():
                    self.handles[name] = (file, handle)
            except (safetensors.SafetensorError, OSError) as error:
                raise ModelError(f"{file}: not a safetensors file ({error})") from error

    def read(self, name: str, shape: tuple[int, ...], transposed: bool, source: pathlib.Path, dtype=None) -> np.ndarray:
        """One tensor.

        Args:
          name: in Hugging Face's format.
          shape: of the result.
          transposed: whether the file has the transpose.
          source: the directory that the error names if no file has the tensor.
          dtype: of the result; by default that of the file.

        Raises:
          ModelError: the tensor is missing, quantised, or has another shape, or a value is not finite in the dtype.
        """
        if name not in self.handles:
            raise ModelError(f"{source}: tensor '{name}' is missing")
        file, handle = self.handles[name]
        try:
            tensor = handle.get_tensor(name)
        except Exception as error:  # its type varies, for dtypes that NumPy does not have
            raise ModelError(f"{file}: tensor '{name}' cannot be read ({error}); quantised weights are not supported") from error
        if tensor.dtype not in WEIGHT_DTYPES:
            raise ModelError(f"{file}: tensor '{name}' is {tensor.dtype}; quantised weights are not supported")
        expected = shape[::-1] if transposed else shape
        if tensor.shape != expected:
            raise ModelError(f"{file}: tensor '{name}' has shape {list(tensor.shape)}, the config requires {list(expected)}")
        tensor = tensor if dtype is None else cast(tensor, dtype)
        check_finite(tensor, name, file)
        return tensor.T if transposed else tensor


def cast(tensor: np.ndarray, dtype) -> np.ndarray:
    """The tensor in another dtype; values that are too large for it become infinite without a warning."""
    with np.errstate(over="ignore"):
        return tensor.astype(dtype)


def check_finite(tensor: np.ndarray, name: str, file: pathlib.Path) -> None:
    """Refuses NaN and infinities: a model with one in it gives no loss, or a wrong one.

    Raises:
      ModelError: names the file, the tensor and the number of such values.
    """
    finite = np.isfinite(tensor)
    if not finite.all():
        number = finite.size - np.count_nonzero(finite)
        what = f"{file}: tensor '{name}' has {number} values of {finite.size} that are not finite in {tensor.dtype}"
        raise ModelError(f"{what}; the file is damaged, or its values are too large for this dtype")


def hf_name(path: tuple[str, ...], config: model_config.ModelConfig) -> tuple[str, bool]:
    """The Hugging Face name of a parameter, with `{}` for the index of the layer, and whether the tensor is transposed."""
    first, *rest = path
    prefix = config.record.outer_names[first]
    if not rest:
        return f"{prefix}.weight", False
    kind = "bias" if rest[-1] == "bias" else "weight"
    middle = ["{}", *rest[:-1]] if first == "layers" else rest[:-1]
    return ".".join([prefix, *middle, kind]), rest[-1] == "kernel"


def flatten(tree) -> list[tuple[tuple[str, ...], Any]]:
    """The leaves of nested dictionaries, each with the path of its keys."""
    return sorted(traverse_util.flatten_dict(tree).items())


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _insert(stack, tensor, layer, stack_sharding):
    return jax.lax.with_sharding_constraint(stack.at[layer].set(tensor), stack_sharding)


def load_params(directory: pathlib.Path, config: model_config.ModelConfig, mesh: jax.sharding.Mesh | None = None):
    """Base weights in `config.dtype`, stacked over layers and sharded over the mesh; without a mesh, on the first device.

    Tensors are read, cast or quantised, and put on the devices one at a time. In addition to the weights, the host holds at most
    one tensor, and a device holds at most its shard of it.
    """
    mesh = mesh or sharding.make_mesh(1)
    directory = pathlib.Path(directory)
    reader = TensorReader(directory)
    dense = dataclasses.replace(config, quantization="none")
    shapes = jax.eval_shape(lambda: decoder.init_params(dense, jax.random.key(0)))
    params = {}
    for path, leaf in progress.bar(flatten(shapes), desc="loading weights", unit="tensor"):
        if path[0] == "layers":
            array = _load_stack(reader, path, leaf, config, mesh, directory)
        else:
            name, transposed = hf_name(path, config)
            tensor = reader.read(name, leaf.shape, transposed, directory, leaf.dtype)
            array = sharding.device_put(tensor, sharding.weight_sharding(mesh, path, leaf.shape))
        params[path] = jax.block_until_ready(array)
    return traverse_util.unflatten_dict(params)


def _load_stack(reader: TensorReader, path, leaf, config: model_config.ModelConfig, mesh, directory: pathlib.Path):
    """One parameter of all layers: an array, or the arrays of a quantised kernel."""
    name, transposed = hf_name(path, config)
    shape = leaf.shape[1:]
    for i in (0, config.num_layers - 1):  # fails before memory is allocated for a wrong number of layers
        reader.read(name.format(i), shape, transposed, directory)
    is_quantised = config.quantization != "none" and path[-1] == "kernel"
    parts = quantizing.shapes(config.quantization, *shape) if is_quantised else {"": (shape, leaf.dtype)}
    shardings = {
        part: [sharding.weight_sharding(mesh, (*path, part) if part else path, x) for x in ((config.num_layers, *size), size)]
        for part, (size, _) in parts.items()
    }
    stacks = {
        part: jnp.zeros((config.num_layers, *size), dtype, device=shardings[part][0]) for part, (size, dtype) in parts.items()
    }
    for i in range(config.num_layers):
        tensor = reader.read(name.format(i), shape, transposed, directory, np.float32 if is_quantised else leaf.dtype)
        arrays = quantizing.quantize(config.quantization, tensor) if is_quantised else {"": tensor}
        for part, (of_stack, of_layer) in shardings.items():
            stacks[part] = _insert(stacks[part], sharding.device_put(arrays[part], of_layer), i, of_stack)
    return stacks if is_quantised else stacks[""]


def load_model(path: str, dtype: str = "float32", quantization: str = "none") -> tuple[model_config.ModelConfig, dict]:
    """Config and base weights of a model directory or hub id, on the first device.

    Raises:
      ModelError: an invalid model, or a dtype that is not supported.
    """
    directory = locate(path)
    config = read_config(directory, dtype, quantization=quantization)
    return config, load_params(directory, config)


def save_params(directory: pathlib.Path, config: model_config.ModelConfig, params, dtype: str | None = None) -> None:
    """Writes `model.safetensors` with Hugging Face names, in `dtype`, by default that of the weights."""
    tensors = {}
    for path, leaf in flatten(params):
        name, transposed = hf_name(path, config)
        stack = np.asarray(leaf if dtype is None else leaf.astype(dtype))
        for i, tensor in enumerate(stack if path[0] == "layers" else [stack]):
            tensors[name.format(i)] = np.ascontiguousarray(tensor.T if transposed else tensor)
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

"""Models and adapters in the file formats of Hugging Face and PEFT, read and written without PyTorch.

- `directory`: finds a model directory and reads its JSON files.
- `config`: config.json to `model_config.ModelConfig`.
- `weights`: base weights.
- `adapters`: LoRA adapters.
"""

from bilevel_jax.models.huggingface.adapters import load_adapter, save_adapter
from bilevel_jax.models.huggingface.config import eos_ids, read_config
from bilevel_jax.models.huggingface.directory import PACKAGE, ModelError, check_inside, locate
from bilevel_jax.models.huggingface.weights import (
    TensorReader,
    cast,
    check_finite,
    flatten,
    hf_name,
    load_model,
    load_params,
    save_params,
)

__all__ = [
    "PACKAGE",
    "ModelError",
    "TensorReader",
    "cast",
    "check_inside",
    "check_finite",
    "eos_ids",
    "flatten",
    "hf_name",
    "load_adapter",
    "load_model",
    "load_params",
    "locate",
    "read_config",
    "save_adapter",
    "save_params",
]

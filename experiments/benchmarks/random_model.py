"""Writes a model with the paper's shape and random weights, to measure speed without a download.

    python -m experiments.benchmarks.random_model --like=pythia-1b --tokenizer=local/smollm2 --out=local/random-pythia-1b

The directory is valid for `--config.model.path`: config, bfloat16 weights, and the tokenizer of another model with an equal or
smaller vocabulary. Weights are generated on the host: 4 + 2 bytes per parameter, 48 GB for Llama-3-8B.
"""

import json
import pathlib

import jax
from absl import flags

from bilevel_jax import cli
from bilevel_jax.data import templates
from bilevel_jax.models import decoder, huggingface

SHAPES = {  # of the published models' config.json
    "pythia-1b": {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
    },
    "llama3-8b": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
}
DTYPE = "bfloat16"

FLAGS = flags.FlagValues()
LIKE = flags.DEFINE_enum("like", "pythia-1b", list(SHAPES), "Model whose shape is used.", flag_values=FLAGS)
TOKENIZER = flags.DEFINE_string("tokenizer", "local/smollm2", "Model directory whose tokenizer is copied.", flag_values=FLAGS)
OUT = flags.DEFINE_string("out", None, "Directory to write.", required=True, flag_values=FLAGS)


def make(out: pathlib.Path, shape: dict, tokenizer: str) -> None:
    """Writes the directory.

    Raises:
      ValueError: the directory exists, or the tokenizer has more tokens than the shape.
    """
    if out.exists():
        raise ValueError(f"--out={out} already exists")
    tokens = templates.load_tokenizer(tokenizer)
    if len(tokens) > shape["vocab_size"]:
        raise ValueError(f"--tokenizer={tokenizer} has {len(tokens)} tokens, the model only {shape['vocab_size']}")
    out.mkdir(parents=True)
    tokens.save_pretrained(out)
    (out / "config.json").write_text(json.dumps(shape | {"dtype": DTYPE}, indent=2) + "\n")
    model = huggingface.read_config(out)
    with jax.default_device(jax.devices("cpu")[0]):
        huggingface.save_params(out, model, jax.jit(decoder.init_params, static_argnums=0)(model, jax.random.key(0)), DTYPE)


def main() -> None:
    make(pathlib.Path(OUT.value), SHAPES[LIKE.value], TOKENIZER.value)
    print(f"{OUT.value}: the shape of {LIKE.value}, random weights in {DTYPE}")


if __name__ == "__main__":
    cli.run(main, FLAGS)

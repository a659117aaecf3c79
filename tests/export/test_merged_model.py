"""Merged models against the logits of PEFT with base and adapter, and refusals."""

import json
import shutil
import types

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from bilevel_jax.export import merged_model
from bilevel_jax.models import huggingface
from tests.conftest import make_model
from tests.models import models
from tests.models.models import FIXTURES

BASES = {
    "neox_all": "neox_parallel",
    "neox_subset": "neox_sequential",
    "llama_all": "llama_gqa_tied",
    "llama_subset": "llama_mha",
    "llama_rslora": "llama_bias",
    "phi3_all": "phi3_short",
}


def merge(name, out, **options):
    return merged_model.write_merged_model(FIXTURES / BASES[name], FIXTURES / "adapters" / name, out, **options)


def names_and_shapes(directory):
    shapes = {}
    for file in directory.glob("model*.safetensors"):
        with safetensors.safe_open(file, framework="numpy") as handle:
            assert handle.metadata() == {"format": "pt"}  # without it transformers does not read the file
            shapes |= {name: handle.get_slice(name).get_shape() for name in handle.keys()}
    return shapes


@pytest.mark.parametrize("name", BASES)
def test_logits_equal_peft(name, tmp_path):
    number = merge(name, tmp_path / "new" / "merged")
    merged = tmp_path / "new" / "merged"
    config, params = huggingface.load_model(str(merged))
    assert config == huggingface.read_config(FIXTURES / BASES[name])
    reference = safetensors.numpy.load_file(FIXTURES / "adapters" / name / "reference.safetensors")
    logits = models.logits(config, params, None, reference["tokens"])
    np.testing.assert_allclose(logits, reference["logits"], rtol=0, atol=1e-4)
    shapes = names_and_shapes(merged)
    assert shapes == names_and_shapes(FIXTURES / BASES[name])
    assert number == sum(np.prod(shape) for shape in shapes.values())


def test_weights_equal_the_formula(tmp_path):
    """W + α/r · B A in float64, rounded to bfloat16 once; others unchanged."""
    merge("neox_subset", tmp_path / "merged", dtype="bfloat16")
    merged = safetensors.numpy.load_file(tmp_path / "merged" / "model.safetensors")
    base = safetensors.numpy.load_file(FIXTURES / "neox_sequential" / "model.safetensors")
    adapter = safetensors.numpy.load_file(FIXTURES / "adapters" / "neox_subset" / "adapter_model.safetensors")
    changed = 0
    for name, tensor in merged.items():
        assert tensor.dtype == ml_dtypes.bfloat16
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        exact = base[name].astype(np.float64)
        if f"{stem}.lora_A.weight" in adapter:
            changed += 1
            exact += 8 / 2 * adapter[f"{stem}.lora_B.weight"].astype(np.float64) @ adapter[f"{stem}.lora_A.weight"]
        np.testing.assert_allclose(tensor.astype(np.float64), exact, rtol=2**-8, atol=1e-6)
    assert changed == 4  # query_key_value and dense of two layers
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_float16_base_is_stored_in_float32(tmp_path):
    """An update of 1e-5 to a weight of 1 is below the resolution of float16 and bfloat16."""
    base = shutil.copytree(FIXTURES / "llama_mha", tmp_path / "base")
    adapter = shutil.copytree(FIXTURES / "adapters" / "llama_subset", tmp_path / "adapter")
    stored = safetensors.numpy.load_file(base / "model.safetensors")
    ones = {name: np.ones_like(tensor, np.float16) for name, tensor in stored.items()}
    safetensors.numpy.save_file(ones, base / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    config.pop("dtype")
    (base / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16"}))
    pairs = safetensors.numpy.load_file(adapter / "adapter_model.safetensors")
    tiny = {name: np.full_like(matrix, 1e-5 / 8 if "lora_B" in name else 1) for name, matrix in pairs.items()}  # 4 · 2 · 1e-5 / 8
    safetensors.numpy.save_file(tiny, adapter / "adapter_model.safetensors")
    merged_model.write_merged_model(base, adapter, tmp_path / "merged")
    merged = safetensors.numpy.load_file(tmp_path / "merged" / "model.safetensors")
    np.testing.assert_allclose(merged["model.layers.0.self_attn.q_proj.weight"], np.float32(1 + 1e-5), rtol=1e-7)
    np.testing.assert_array_equal(merged["model.layers.0.self_attn.k_proj.weight"], np.float32(1))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["torch_dtype"] == "float32"


def test_large_models_are_split(tmp_path):
    """Each file is within the limit, unless it has one tensor. The weights do not depend on the limit."""
    limit = 24 * 1024
    merge("llama_subset", tmp_path / "single")
    merge("llama_subset", tmp_path / "parts", max_shard=limit)
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in (tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    total = 0
    for name in files:
        tensors = safetensors.numpy.load_file(tmp_path / "parts" / name)
        assert {index["weight_map"][tensor] for tensor in tensors} == {name}
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= limit or len(tensors) == 1
        total += size
    assert index["metadata"]["total_size"] == total
    single, parts = (huggingface.load_model(str(tmp_path / name))[1] for name in ("single", "parts"))
    jax.tree.map(np.testing.assert_array_equal, single, parts)


def test_tokenizer_settings_and_licence_are_copied(tmp_path):
    base = make_model(tmp_path / "base", "llama")
    for name in ("LICENSE", "generation_config.json", "chat_template.jinja", "trainer_state.json", "optimizer.bin"):
        (base / name).write_text("{}")
    adapter = tmp_path / "adapter"
    config = huggingface.read_config(base)
    pair = {"a": np.ones((2, 16, 1), np.float32), "b": np.ones((2, 1, 16), np.float32)}
    huggingface.save_adapter(adapter, config, {"layers": {"self_attn": {"q_proj": pair}}}, alpha=1, base="x")
    (tmp_path / "merged").mkdir()  # an empty directory is accepted
    merged_model.write_merged_model(base, adapter, tmp_path / "merged", texts={"README.md": "Hällo"})
    merged = tmp_path / "merged"
    assert {file.name for file in merged.iterdir()} == {
        *("config.json", "model.safetensors", "README.md", "tokenizer.json", "tokenizer_config.json"),
        *("LICENSE", "generation_config.json", "chat_template.jinja"),
    }
    assert (merged / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    config = json.loads((base / "config.json").read_text())
    assert json.loads((merged / "config.json").read_text()) == config | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    assert {file.stat().st_mode & 0o044 for file in merged.iterdir()} == {0o044}  # readable by others, as the umask allows


def _taken(tmp_path, monkeypatch):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("precious")


def _file(tmp_path, monkeypatch):
    (tmp_path / "merged").write_text("precious")


def _full(tmp_path, monkeypatch):
    monkeypatch.setattr(merged_model.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10**4))


def _breaks(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(merged_model.safetensors.numpy, "save_file", fail)


@pytest.mark.parametrize(
    "prepare, error, reason",
    [
        (_taken, FileExistsError, "another directory"),
        (_file, FileExistsError, "another directory"),
        (_full, OSError, "0.0 GB are free"),
        (_breaks, OSError, "No space left"),
    ],
)
def test_all_or_nothing(prepare, error, reason, tmp_path, monkeypatch):
    prepare(tmp_path, monkeypatch)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=reason):
        merge("llama_subset", tmp_path / "merged")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_adapter_of_another_model_is_refused(tmp_path):
    with pytest.raises(huggingface.ModelError, match="adapter_model.safetensors"):
        merged_model.write_merged_model(FIXTURES / "neox_parallel", FIXTURES / "adapters" / "llama_all", tmp_path / "merged")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["LICENSE", "config.json"])
def test_nothing_is_copied_from_outside_the_model(name, tmp_path):
    """A model directory with a link to a file elsewhere, which is refused, and within the directory, which is followed."""
    base = make_model(tmp_path / "base", "llama")
    (tmp_path / "secret").write_bytes((base / name).read_bytes() if (base / name).exists() else b"secret")
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(tmp_path / "secret")
    config = huggingface.read_config(base)
    pair = {"a": np.ones((2, 16, 1), np.float32), "b": np.ones((2, 1, 16), np.float32)}
    huggingface.save_adapter(tmp_path / "adapter", config, {"layers": {"self_attn": {"q_proj": pair}}}, alpha=1, base="x")
    with pytest.raises(huggingface.ModelError, match=f"{name}: a link to .*secret, outside the model directory"):
        merged_model.write_merged_model(base, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    (base / name).unlink()
    (base / "kept").write_bytes((tmp_path / "secret").read_bytes())
    (base / name).symlink_to("kept")
    merged_model.write_merged_model(base, tmp_path / "adapter", tmp_path / "merged")
    assert (tmp_path / "merged" / name).exists()

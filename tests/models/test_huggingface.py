"""Files of models and adapters: round trips, PEFT's adapters, older configs, memory while loading, and refusals."""

import functools
import json
import shutil
import tracemalloc

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from bilevel_jax.models import huggingface, layer_settings, lora, model_config
from tests.models import models
from tests.models.models import FIXTURES

ADAPTERS = ["neox_all", "neox_subset", "llama_all", "llama_subset", "llama_rslora", "phi3_all"]


def assert_trees_equal(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


def edit_json(file, **changes):
    """Sets keys of a JSON object; None removes a key."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_tensors(file, change):
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


# --------------------------------------------------------------------------------------------------------------------
# Base models
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("variant", ["neox_parallel", "llama_sharded", "llama_bfloat16"])
def test_weights_are_cast_and_assigned_by_name(variant, dtype):
    config, params = huggingface.load_model(str(FIXTURES / variant), dtype)
    files = FIXTURES.joinpath(variant).glob("model*.safetensors")
    stored = {name: tensor for file in files for name, tensor in safetensors.numpy.load_file(file).items()}
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(tensor.size for tensor in stored.values())
    if config.architecture == "llama":
        module, name, hf_name = "self_attn", "k_proj", "model.layers.1.self_attn.k_proj.weight"
    else:
        module, name, hf_name = "mlp", "dense_h_to_4h", "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"
    kernel = params["layers"][module][name]["kernel"][1]
    np.testing.assert_array_equal(kernel, stored[hf_name].T.astype(kernel.dtype))


@pytest.mark.parametrize("variant", ["neox_parallel", "llama_bias", "llama_gqa_tied", "llama_bfloat16"])
def test_saved_weights_equal_the_loaded_files(variant, tmp_path):
    stored = safetensors.numpy.load_file(FIXTURES / variant / "model.safetensors")
    dtype = "bfloat16" if variant == "llama_bfloat16" else "float32"
    config, params = models.load(variant, dtype)
    huggingface.save_params(tmp_path, config, params)
    saved = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert saved.keys() == stored.keys()
    for name, tensor in saved.items():
        assert tensor.dtype == stored[name].dtype
        np.testing.assert_array_equal(tensor, stored[name])


def test_save_can_change_the_dtype(tmp_path):
    config, params = models.load("llama_mha")
    huggingface.save_params(tmp_path, config, params, "bfloat16")
    saved = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {np.dtype(ml_dtypes.bfloat16)}


@pytest.mark.parametrize("backend, dtype", [("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")])
def test_auto_depends_on_the_device(monkeypatch, backend, dtype):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    config = huggingface.read_config(FIXTURES / "llama_mha", "auto")
    assert (config.dtype, config.activations) == (dtype, dtype)


OLDER = {  # variant -> the keys that transformers 4 wrote instead of `rope_parameters`
    "neox_parallel": {"rotary_pct": 0.25, "rotary_emb_base": 10000},
    "neox_rotary_full": {"rotary_pct": 1.0, "rotary_emb_base": 10000, "rope_scaling": None},
    "llama_mha": {"rope_theta": 500.0, "rope_scaling": None, "head_dim": None},
    "llama_rope_linear": {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama_rope_llama3": {
        "rope_theta": 500.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "qwen2": {"rope_theta": 10000.0, "layer_types": None},
    "qwen2_yarn_tied": {
        "rope_theta": 500.0,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        "layer_types": None,
    },
    "phi3_short": {
        "rope_theta": 500.0,
        "partial_rotary_factor": 0.5,
        "rope_scaling": {"type": "su", "short_factor": [1.0, 1.5], "long_factor": [1.5, 3.0]},
    },
    "gemma2": {"rope_theta": 10000.0, "layer_types": None},
    "gemma3": {
        "rope_theta": 5000.0,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "layer_types": None,
    },
    "smollm3": {"layer_types": None, "no_rope_layers": None},
}


@pytest.mark.parametrize("variant", OLDER)
def test_configs_of_older_transformers_mean_the_same(variant, tmp_path):
    shutil.copy(FIXTURES / variant / "config.json", tmp_path)
    edit_json(tmp_path / "config.json", rope_parameters=None, **OLDER[variant])
    assert huggingface.read_config(tmp_path) == huggingface.read_config(FIXTURES / variant)


def test_longrope_depends_on_the_length_of_a_run():
    """The short factors up to the original context, the long ones beyond it, for all positions."""
    config = huggingface.read_config(FIXTURES / "phi3_long_sharded")  # 16 original positions
    for length, factors in ((16, [1.0, 1.5, 2.0, 3.0]), (17, [1.5, 3.0, 6.0, 9.0])):
        cos, _ = layer_settings.rotary_table(jnp.array([[3]]), layer_settings.for_length(config, length))
        expected = np.cos(3 / (np.array(factors) * 500.0 ** (np.arange(4) / 4)))
        attention = np.sqrt(1 + np.log(64 / 16) / np.log(16))
        np.testing.assert_allclose(cos[0, 0, 0], attention * expected, rtol=1e-5)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_loading_never_holds_more_than_one_copy(stored, tmp_path):
    """Beside the weights, NumPy holds one stack and one tensor, whatever the dtype of the files."""
    config = model_config.ModelConfig(
        architecture="llama",
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        num_layers=6,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        rotary_dim=64,
        max_positions=128,
        activation="silu",
        norm_eps=1e-5,
        rope_theta=1e4,
    )
    params = models.init_params(config, jax.random.key(0))
    huggingface.save_params(tmp_path, config, params, stored)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
    del params
    tracemalloc.start()
    loaded = jax.block_until_ready(huggingface.load_params(tmp_path, config))
    shared, peak = tracemalloc.get_traced_memory()  # shared: JAX arrays that share the memory of NumPy
    tracemalloc.stop()
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(loaded)) == sum(sizes)
    allowance = 2**20  # Python's own objects
    assert shared <= sum(sizes) + allowance
    one_tensor = 1000 * 256 * 4
    assert peak - shared <= max(sizes) + one_tensor + allowance < sum(sizes) / 2


# --------------------------------------------------------------------------------------------------------------------
# Adapters
# --------------------------------------------------------------------------------------------------------------------


def load_adapted(name):
    directory = FIXTURES / "adapters" / name
    base = json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"]
    config, params = models.load(base)
    config, adapter = huggingface.load_adapter(directory, config)
    return config, params, adapter, models.reference(f"adapters/{name}")


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_of_peft_give_its_logits(name):
    config, params, adapter, reference = load_adapted(name)
    logits = models.logits(config, params, adapter, reference["tokens"])
    np.testing.assert_allclose(logits, reference["logits"], rtol=0, atol=1e-4)
    assert np.abs(np.asarray(models.logits(config, params, None, reference["tokens"])) - reference["logits"]).max() > 0.1


@pytest.mark.parametrize("name", ADAPTERS)
def test_saved_adapters_equal_the_loaded_files(name, tmp_path):
    config, _, adapter, _ = load_adapted(name)
    rank = jax.tree.leaves(adapter)[0].shape[-1]
    huggingface.save_adapter(tmp_path, config, adapter, alpha=config.adapter_scale * rank, base="somewhere")
    saved = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    expected = safetensors.numpy.load_file(FIXTURES / "adapters" / name / "adapter_model.safetensors")
    assert saved.keys() == expected.keys()
    for key in saved:
        np.testing.assert_array_equal(saved[key], expected[key])
    loaded_config, loaded = huggingface.load_adapter(tmp_path, config)
    assert_trees_equal(loaded, adapter)
    assert loaded_config.adapter_scale == pytest.approx(config.adapter_scale)
    description = json.loads((tmp_path / "adapter_config.json").read_text())
    assert description["base_model_name_or_path"] == "somewhere" and description["r"] == rank


def test_an_initial_adapter_survives_saving(tmp_path):
    config = huggingface.read_config(FIXTURES / "neox_parallel")
    adapter = lora.init_adapter(config, jax.random.key(0), 3, ("dense", "dense_4h_to_h"))
    huggingface.save_adapter(tmp_path, config, adapter, alpha=12, base="base")
    loaded_config, loaded = huggingface.load_adapter(tmp_path, config)
    assert loaded_config.adapter_scale == 4.0
    assert_trees_equal(loaded, adapter)


# --------------------------------------------------------------------------------------------------------------------
# Refusals: one line that names the file, and the key or tensor
# --------------------------------------------------------------------------------------------------------------------


def assert_refused(function, words):
    with pytest.raises(huggingface.ModelError) as caught:
        function()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


BROKEN_CONFIGS = {
    "absent": (lambda file: file.unlink(), ["missing"]),
    "not JSON": (lambda file: file.write_text("{'model_type'"), ["not valid JSON"]),
    "not text": (lambda file: file.write_bytes(b"\xff\xfe\x00"), ["not valid JSON"]),
    "not an object": (lambda file: file.write_text("[1]"), ["list, not an object"]),
    "model type": (lambda file: edit_json(file, model_type="mamba"), ["mamba", "llama", "gpt_neox"]),
    "no model type": (lambda file: edit_json(file, model_type=None), ["model_type"]),
    "quantised": (
        lambda file: edit_json(file, quantization_config={"quant_method": "gptq", "bits": 4}),
        ["quantised weights (gptq)", "in 16 or 32 bits"],
    ),
    "AWQ": (lambda file: edit_json(file, quantization_config={"quant_method": "awq"}), ["(awq)", "from which they were made"]),
    "4 bits": (
        lambda file: edit_json(file, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ["(bitsandbytes)", "from which they were made"],
    ),
    "no hidden size": (lambda file: edit_json(file, hidden_size=None), ["hidden_size", "missing"]),
    "no layers": (lambda file: edit_json(file, num_hidden_layers=0), ["num_hidden_layers", "0"]),
    "many layers": (lambda file: edit_json(file, num_hidden_layers=2**30), ["num_hidden_layers", str(2**30), "10000"]),
    "no heads": (lambda file: edit_json(file, num_attention_heads=0), ["num_attention_heads", "0"]),
    "width in words": (lambda file: edit_json(file, hidden_size="wide"), ["hidden_size", "wide"]),
    "activation": (lambda file: edit_json(file, hidden_act="swish3"), ["swish3", "silu"]),
    "rope": (lambda file: edit_json(file, rope_parameters={"rope_type": "dynamic", "factor": 2.0}), ["dynamic", "llama3", "yarn"]),
    "rope factor": (lambda file: edit_json(file, rope_parameters={"rope_type": "llama3"}), ["'factor' is missing"]),
}


@pytest.mark.parametrize("case", BROKEN_CONFIGS)
def test_broken_config_is_refused(case, tmp_path):
    corrupt, words = BROKEN_CONFIGS[case]
    directory = shutil.copytree(FIXTURES / "llama_mha", tmp_path / "model")
    corrupt(directory / "config.json")
    assert_refused(lambda: huggingface.load_model(str(directory)), ["config.json", *words])


BROKEN_LAYERS = [
    ("gemma3", {"layer_types": ["full_attention"]}, "must fit 3 layers"),
    ("gemma3", {"layer_types": ["chunked_attention"] * 3}, "must fit 3 layers"),
    ("gemma3", {"layer_types": 3}, "must fit 3 layers"),
    ("gemma3", {"sliding_window": 0}, "sliding_window must be a positive integer, got 0"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported"),
    ("gemma2", {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar must be a positive number"),
    ("gemma2", {"final_logit_softcapping": "high"}, "final_logit_softcapping must be a positive number"),
    ("granite", {"residual_multiplier": 0}, "residual_multiplier must be a positive number, got 0"),
    ("granite", {"logits_scaling": -8}, "logits_scaling must be a positive number, got -8"),
    ("granite", {"attention_multiplier": "low"}, "attention_multiplier must be a positive number, got 'low'"),
    ("smollm3", {"no_rope_layers": [1]}, "must fit 4 layers"),
    ("smollm3", {"use_sliding_window": False}, "layer_types has sliding_attention, but there is no sliding_window"),
    ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "must fit 4 layers"),
    ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types=.* is not supported"),
    ("phi3_short", {"rope_parameters": {"long_factor": [1.0], "short_factor": [1.0]}}, "short_factor must be a list of 4 numbers"),
    ("phi3_short", {"rope_parameters": {"rope_type": "longrope"}}, "'short_factor' is missing"),
    ("phi3_short", {"original_max_position_embeddings": 1}, "rope type 'longrope' needs an original_max_position_embeddings"),
    ("qwen2_yarn_tied", {"rope_parameters": {"rope_type": "yarn", "factor": 0}}, "rope's factor must be a positive number, got 0"),
    ("qwen2_yarn_tied", {"rope_parameters": {"rope_type": "yarn", "factor": 2, "rope_theta": 1}}, "rope type 'yarn' needs"),
]


@pytest.mark.parametrize("variant, changes, words", BROKEN_LAYERS)
def test_broken_layers_are_refused(variant, changes, words, tmp_path):
    shutil.copy(FIXTURES / variant / "config.json", tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(huggingface.ModelError, match=f"config.json: .*{words}"):
        huggingface.read_config(tmp_path)


K_PROJ = "model.layers.1.self_attn.k_proj.weight"
BROKEN_WEIGHTS = {
    "absent": (lambda file: file.unlink(), ["missing", "safetensors only"]),
    "truncated": (truncate, ["not a safetensors file"]),
    "empty": (lambda file: file.write_bytes(b""), ["not a safetensors file"]),
    "no tensor": (lambda file: edit_tensors(file, lambda tensors: tensors.pop(K_PROJ)), [K_PROJ, "missing"]),
    "shape": (
        lambda file: edit_tensors(file, lambda tensors: tensors.update({K_PROJ: np.zeros((8, 32), np.float32)})),
        [K_PROJ, "[8, 32]", "[32, 32]"],
    ),
    "integers": (
        lambda file: edit_tensors(file, lambda tensors: tensors.update({K_PROJ: np.zeros((32, 32), np.int8)})),
        [K_PROJ, "int8"],
    ),
}


@pytest.mark.parametrize("case", BROKEN_WEIGHTS)
def test_broken_weights_are_refused(case, tmp_path):
    corrupt, words = BROKEN_WEIGHTS[case]
    directory = shutil.copytree(FIXTURES / "llama_mha", tmp_path / "model")
    corrupt(directory / "model.safetensors")
    assert_refused(lambda: huggingface.load_model(str(directory)), [str(directory), *words])


SHARD = "model-00003-of-00004.safetensors"
INDEX = "model.safetensors.index.json"


def edit_index(weight_map):
    return lambda model: edit_json(model / INDEX, weight_map=weight_map)


BROKEN_SHARDS = {
    "outside": (edit_index({K_PROJ: "../other.safetensors"}), [INDEX, "outside"]),
    "absolute": (edit_index({K_PROJ: "/etc/passwd"}), [INDEX, "outside"]),
    "no map": (edit_index(None), [INDEX, "weight_map"]),
    "map of numbers": (edit_index({K_PROJ: 3}), [INDEX, "weight_map"]),
    "not JSON": (lambda model: (model / INDEX).write_text("{"), [INDEX, "not valid JSON"]),
    "absent": (lambda model: (model / SHARD).unlink(), [SHARD, "missing"]),
    "truncated": (lambda model: truncate(model / SHARD), [SHARD, "not a safetensors file"]),
}


@pytest.mark.parametrize("case", BROKEN_SHARDS)
def test_broken_shards_are_refused(case, tmp_path):
    corrupt, words = BROKEN_SHARDS[case]
    directory = shutil.copytree(FIXTURES / "llama_sharded", tmp_path / "model")
    corrupt(directory)
    assert_refused(lambda: huggingface.load_model(str(directory)), words)


LORA_B = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"


def edit_config(**changes):
    return lambda adapter: edit_json(adapter / "adapter_config.json", **changes)


def edit_weights(change):
    return lambda adapter: edit_tensors(adapter / "adapter_model.safetensors", change)


def drop_all_b(tensors):
    for name in [name for name in tensors if "q_proj.lora_B" in name]:
        del tensors[name]


BROKEN_ADAPTERS = {
    "no config": (lambda adapter: (adapter / "adapter_config.json").unlink(), ["adapter_config.json", "missing"]),
    "kind": (edit_config(peft_type="IA3"), ["adapter_config.json", "peft_type", "IA3"]),
    "DoRA": (edit_config(use_dora=True), ["use_dora"]),
    "biases": (edit_config(bias="all"), ["bias", "all"]),
    "head": (edit_config(modules_to_save=["lm_head"]), ["modules_to_save"]),
    "ranks": (edit_config(rank_pattern={"q_proj": 8}), ["rank_pattern"]),
    "PiSSA": (edit_config(init_lora_weights="pissa"), ["init_lora_weights"]),
    "aLoRA": (edit_config(alora_invocation_tokens=[1, 2]), ["alora_invocation_tokens"]),
    "unknown option": (edit_config(use_tomorrow=True), ["use_tomorrow"]),
    "no rank": (edit_config(r=None), ["adapter_config.json", "r must"]),
    "rank 0": (edit_config(r=0), ["adapter_config.json", "r must"]),
    "alpha": (edit_config(lora_alpha="big"), ["lora_alpha"]),
    "no weights": (lambda adapter: (adapter / "adapter_model.safetensors").unlink(), ["model.safetensors", "missing"]),
    "truncated": (lambda adapter: truncate(adapter / "adapter_model.safetensors"), ["not a safetensors file"]),
    "one layer short": (edit_weights(lambda tensors: tensors.pop(LORA_B)), ["q_proj.lora_B", "2 layers"]),
    "no B": (edit_weights(drop_all_b), ["q_proj", "only one"]),
    "shape": (edit_weights(lambda tensors: tensors.update({LORA_B: np.zeros((32, 3))})), ["q_proj.lora_B", "32"]),
    "extra tensor": (edit_weights(lambda tensors: tensors.update(extra=np.zeros(2))), ["'extra'"]),
}


@pytest.mark.parametrize("case", BROKEN_ADAPTERS)
def test_broken_adapter_is_refused(case, tmp_path):
    corrupt, words = BROKEN_ADAPTERS[case]
    directory = shutil.copytree(FIXTURES / "adapters" / "llama_subset", tmp_path / "adapter")
    corrupt(directory)
    config = huggingface.read_config(FIXTURES / "llama_mha")
    assert_refused(lambda: huggingface.load_adapter(directory, config), [str(directory), *words])


def test_adapter_of_another_model_is_refused():
    for base in ("neox_parallel", "llama_gqa_tied"):  # another architecture; fewer key/value heads
        config = huggingface.read_config(FIXTURES / base)
        load = functools.partial(huggingface.load_adapter, FIXTURES / "adapters" / "llama_subset", config)
        assert_refused(load, ["adapter_model.safetensors", "_proj"])


def test_invalid_paths_are_refused(monkeypatch):
    assert_refused(lambda: huggingface.load_model(__file__), [__file__, "is a file"])
    assert_refused(lambda: huggingface.load_model("./no/such/place"), ["./no/such/place", "no such directory"])
    assert_refused(lambda: huggingface.load_model("pythia"), ["pythia", "EleutherAI/pythia-1b"])
    assert_refused(lambda: huggingface.load_model(str(FIXTURES / "llama_mha"), "int8"), ["int8", "bfloat16"])

    def offline(*_, **__):
        raise OSError("no route\nto the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert_refused(lambda: huggingface.load_model("someone/something"), ["someone/something", "no route"])


def test_a_hub_download_leaves_out_pickles(monkeypatch):
    request = {}

    def download(path, allow_patterns):
        request.update(path=path, patterns=allow_patterns)
        return str(FIXTURES / "llama_mha")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    config, _ = huggingface.load_model("someone/something")
    assert config == huggingface.read_config(FIXTURES / "llama_mha") and request["path"] == "someone/something"
    wanted = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer.model", "chat_template.jinja"]
    assert list(huggingface_hub.utils.filter_repo_objects(wanted, allow_patterns=request["patterns"])) == wanted
    assert not list(huggingface_hub.utils.filter_repo_objects(["pytorch_model.bin"], allow_patterns=request["patterns"]))

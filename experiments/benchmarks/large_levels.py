"""Levels of any number of short rows, made when they are read, and the smallest model that can learn them.

Rows and tokens take no memory, as those of a memory-mapped level do not, so that what is measured is the run and not its rows.
"""

import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
import tokenizers
import transformers

from bilevel_jax import config as configuration
from bilevel_jax.data import levels, rows, templates
from bilevel_jax.models import decoder, huggingface

SHAPE = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
LENGTH = 16  # data.max_length
NUM_UPPER, NUM_HELD_OUT = 200, 20
SOURCES = ("sums", "doubles", "others")
PRIOR = "prior"  # a field with a weight that a run may start from


class Made(Sequence):
    """A sequence whose elements are made on access.

    Args:
      number: of elements.
      make: index -> element.
    """

    def __init__(self, number: int, make: Callable):
        self._number, self._make = number, make

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(self._number))]
        if not -self._number <= index < self._number:
            raise IndexError(index)
        return self._make(int(index) % self._number)


class Level(levels.Level):
    """A level whose ids are made on access too."""

    @property
    def ids(self) -> Sequence[str]:
        return Made(len(self.rows), lambda i: self.rows[i].id)

    @property
    def all_examples(self) -> Iterator[templates.Example]:
        return itertools.chain(self.examples, self.eval_examples)


def value(i: int) -> dict:
    """Row `i` as an object of a JSONL file."""
    made = {"question": f"{i} + {i % 7}", "response": str(i + i % 7), "source": SOURCES[i % len(SOURCES)], "bad": i % 5 == 0}
    return made | {PRIOR: 0.5 + i * 7919 % 1009 / 1009}


def row(i: int) -> rows.Row:
    """Row `i`. Its id is its number, which takes no time to compute."""
    fields = value(i)
    question, response, source = fields["question"], fields["response"], fields["source"]
    return rows.Row(f"{i:016x}", "", (("user", question),), response, None, source, fields, i + 1, "question/response")


def example(i: int) -> templates.Example:
    """Four tokens that stand for row `i`."""
    tokens = (np.arange(4, dtype=np.int32) * 31 + np.int32(i % 65521) * 7) % 256
    return templates.Example(tokens[:2], tokens[2:], None)


def make_levels(number: int) -> tuple[Level, Level]:
    """The upper level, and a lower one of `number` training rows; both have held-out rows."""
    made = []
    for first, size in ((number + NUM_HELD_OUT, NUM_UPPER), (0, number)):
        made.append(
            Level(
                Made(size, lambda i, first=first: row(first + i)),
                Made(size, lambda i, first=first: example(first + i)),
                [row(first + size + i) for i in range(NUM_HELD_OUT)],
                [example(first + size + i) for i in range(NUM_HELD_OUT)],
            )
        )
    return made[0], made[1]


def write_rows(file: pathlib.Path, first: int, number: int) -> pathlib.Path:
    """Rows `first` to `first + number - 1` as a JSONL file."""
    with open(file, "w", encoding="utf-8") as out:
        out.writelines(json.dumps(value(i)) + "\n" for i in range(first, first + number))
    return file


def make_model(directory: pathlib.Path) -> pathlib.Path:
    """A random model whose tokens are bytes."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(SHAPE))
    model = huggingface.read_config(directory)
    huggingface.save_params(directory, model, decoder.init_params(model, jax.random.key(0)))
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(alphabet)} | {"<|end|>": len(alphabet)}
    bytes_only = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    bytes_only.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<|end|>").save_pretrained(directory)
    return directory


SETTINGS = {  # of a run on these levels, whose sources are names only
    "num_epochs": 1,
    "data.upper": "upper.jsonl",
    "data.lower": "lower.jsonl",
    "data.num_upper": 0,
    "data.num_lower": 0,
    "data.template": "none",
    "data.max_length": LENGTH,
    "data.label": "bad",
    "eval.num_upper": NUM_HELD_OUT,
    "eval.num_lower": NUM_HELD_OUT,
    "lora.rank": 2,
    "batch.size": 50,
    "batch.micro_size": 16,
    "checkpoint.every": 0,
    "log.every": 10,
    "log.tensorboard": False,
}


def make_config(model: pathlib.Path, changes=()):
    """The config of a run of data selection; `changes` are keys with values."""
    config = configuration.default()
    config.update_from_flattened_dict(SETTINGS | {"method": "offline", "model.path": str(model)} | dict(changes))
    return config

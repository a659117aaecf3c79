"""Rewards of generated responses, which compare the responses to one question.

`online.reward` selects the source:

    truth              1 for the right response of the data, else 0; training itself never uses these responses
    likelihood         mean log-probability of the tokens of the response under the model that generated it
    MODULE:CALLABLE    a user function, see `Reward`
    DIRECTORY          a sequence-classification model with one label, in Hugging Face format; requires PyTorch

Only differences between responses to one question matter. `online.reward_temperature` divides them where weights depend on their
size. Every process of a run computes all rewards of a refresh on the host, in one call, so a reward function must be deterministic.
"""

import importlib
import json
import pathlib
import re
from collections.abc import Callable, Sequence

import numpy as np

from bilevel_jax import errors, progress
from bilevel_jax.data import limits
from bilevel_jax.data import rows as data_rows

# (questions, responses, truths) -> one number per response, higher is better. The three lists have the same length. A question is
# the content of its turns, a response the generated text, a truth the right response, or None if the row has none.
Reward = Callable[[list[str], list[str], list[str | None]], Sequence[float]]

BATCH = 16  # responses per forward pass of a classification model
LARGEST = 1e15  # reward: squares of larger ones overflow in float32


class RewardError(ValueError):
    """An unusable `online.reward`. The message is one line that names the key."""


def make_reward_fn(name: str, rows: Sequence[data_rows.Row], truths: Sequence[str | None]) -> Callable:
    """Builds `reward_fn(generations, log_prob) -> rewards`.

    `generations` are n `online.Generation`s, `log_prob` [n] is their log π_old, the rewards are [n] float64 and finite.

    Args:
      name: the value of `online.reward`.
      rows, truths: of the lower level; the right response of each row, or None.

    Raises:
      RewardError: there is no such reward, or these rows do not support it. `reward_fn` raises RunError if a user function fails.
    """
    if name == "truth":
        missing = next((row for row, truth in zip(rows, truths) if truth is None), None)
        if missing:
            raise RewardError(f"online.reward=truth: row {missing.id} has no right response; name its field with data.truth")
        reward: Reward = _truth
    elif name != "likelihood":
        reward = classifier(pathlib.Path(name)) if pathlib.Path(name).is_dir() else load(name)

    def reward_fn(generations: Sequence, log_prob: np.ndarray) -> np.ndarray:
        if name == "likelihood":
            return log_prob / [len(one.response.ids) for one in generations]
        indices = [one.row_index for one in generations]
        texts = [rows[i].question for i in indices], [one.text for one in generations], [truths[i] for i in indices]
        try:
            values = np.asarray(reward(*texts), np.float64)
        except (Exception, SystemExit) as error:  # a user function may raise anything, and may try to end the process
            cause = errors.one_line(error)
            raise errors.RunError(f"online.reward={name} failed on {len(indices)} responses ({cause})") from error
        _check_values(name, values, [rows[i].id for i in indices])
        return values

    return reward_fn


def _check_values(name: str, values: np.ndarray, row_ids: Sequence[str]) -> None:
    """Checks that there is one finite reward per response."""
    if values.shape != (len(row_ids),):
        raise errors.RunError(
            f"online.reward={name} returned an array of shape {values.shape} for {len(row_ids)} responses; expected one number each"
        )
    broken = np.flatnonzero(~(np.abs(values) <= LARGEST))
    if len(broken):
        first = f"{values[broken[0]]} for a response to row {row_ids[broken[0]]}, the first of {len(broken)}"
        raise errors.RunError(f"online.reward={name} returned {first}; rewards must be finite, from {-LARGEST:g} to {LARGEST:g}")


def _truth(questions, responses, truths) -> list[float]:
    return [float(response.strip() == truth.strip()) for response, truth in zip(responses, truths)]


def load(name: str) -> Reward:
    """Imports the function `MODULE:CALLABLE`.

    Raises:
      RewardError: the name has another form, or there is no such function.
    """
    module, _, attribute = name.partition(":")
    if not re.fullmatch(r"[\w.]+:[\w.]+", name):
        raise RewardError(f"online.reward={name!r} is neither truth, likelihood, MODULE:CALLABLE nor a directory")
    try:
        function = importlib.import_module(module)
        for part in attribute.split("."):
            function = getattr(function, part)
    except (Exception, SystemExit) as error:  # a module may raise anything while it is imported
        cause = errors.one_line(error)
        raise RewardError(f"online.reward={name}: cannot be imported ({cause})") from error
    if not callable(function):
        raise RewardError(f"online.reward={name}: {attribute} has type {type(function).__name__}, it is not a function")
    return function


def classifier(directory: pathlib.Path) -> Reward:
    """Builds a reward from a sequence-classification model: its logit for a question with a response.

    The input is a chat if the tokenizer has a chat template, else a pair of texts.

    Raises:
      RewardError: PyTorch is not installed, or there is no such model.
    """
    prefix = f"online.reward={directory}"
    _check_one_label(directory, prefix)
    tokenizer, model = _load_classifier(directory, prefix)

    def texts(question: str, response: str) -> tuple[str, ...]:
        if not tokenizer.chat_template:
            return question, response
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
        return (limits.render(tokenizer, turns),)

    def reward(questions, responses, truths) -> list[float]:
        import torch

        values: list[float] = []
        pairs = [texts(*pair) for pair in zip(questions, responses)]
        options = {"padding": True, "truncation": True, "return_tensors": "pt", "add_special_tokens": not tokenizer.chat_template}
        with torch.inference_mode(), progress.bar(total=len(pairs), desc="rewards", unit="row") as bar:
            for first in range(0, len(pairs), BATCH):
                part = pairs[first : first + BATCH]
                values += model(**tokenizer(*(list(side) for side in zip(*part)), **options)).logits[:, 0].tolist()
                bar.update(len(part))
        return values

    return reward


def _check_one_label(directory: pathlib.Path, prefix: str) -> None:
    try:
        num_labels = len(json.loads((directory / "config.json").read_text()).get("id2label", [0, 1]))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise RewardError(f"{prefix}: no readable config.json in it ({error})") from error
    if num_labels != 1:
        raise RewardError(f"{prefix}: the model has {num_labels} labels; a reward model has one")


def _load_classifier(directory: pathlib.Path, prefix: str):
    """Tokenizer and PyTorch model, with a padding token."""
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError as error:
        raise RewardError(f"{prefix}: a classification model needs PyTorch: pip install torch") from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        # Without `use_safetensors` PyTorch would unpickle a pytorch_model.bin.
        options = {"trust_remote_code": False, "use_safetensors": True}
        model = transformers.AutoModelForSequenceClassification.from_pretrained(directory, **options).eval()
    except Exception as error:  # missing and broken files raise many kinds of errors
        reason = errors.first_line(error)
        raise RewardError(f"{prefix}: not a readable model ({reason})") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, model

"""Rewards of the model's own responses: numbers by which those to one question are compared.

`online.reward` names where they come from:

    truth              1 for the right response of the data, else 0: it uses what training otherwise never sees
    likelihood         mean log-probability of the response's tokens under the model that gave it: what it is surest of
    MODULE:CALLABLE    a function of your own, see `Reward`
    DIRECTORY          a sequence-classification model of one label, in Hugging Face format; it needs PyTorch

Only differences between responses to one question count, in units that `online.reward_temperature` divides where weights hang on
their size. They are computed on the host once per refresh, all at a time, by every process of a run: take a function of its
arguments alone.
"""

import importlib
import json
import pathlib
import re
from collections.abc import Callable, Sequence

import numpy as np

from bilevel_jax import errors
from bilevel_jax.data import rows as data_rows

# (questions, responses, truths) -> a number for each, higher is better. A question is the contents of its turns, a response what
# the model said, a truth the right response, None where the row does not say. All three are lists of the same length.
Reward = Callable[[list[str], list[str], list[str | None]], Sequence[float]]

BATCH = 16  # responses that go through a classification model at once


class RewardError(ValueError):
    """A reward that cannot be had; one line that names the key."""


def make_reward_fn(name: str, rows: Sequence[data_rows.Row], truths: Sequence[str | None]) -> Callable:
    """Builds `judge(said, log_prob) -> [n] float64`, finite; `said` are n of `online.Said`, `log_prob` their log π_old.

    Args:
      name: the value of `online.reward`.
      rows, truths: of the lower level, each row with its right response or None.

    Raises:
      RewardError: there is no such reward, or it does not go with these rows.
    """
    if name == "truth":
        without = next((row for row, truth in zip(rows, truths) if truth is None), None)
        if without:
            raise RewardError(f"online.reward=truth: row {without.id} has no right response; name its field with data.truth")
        reward = _truth
    elif pathlib.Path(name).is_dir():
        reward = classifier(pathlib.Path(name))
    elif name != "likelihood":
        reward = load(name)

    def judge(said: Sequence, log_prob: np.ndarray) -> np.ndarray:
        if name == "likelihood":
            return log_prob / [len(one.response.ids) for one in said]
        texts = [rows[one.row_index].question for one in said], [one.text for one in said], [truths[one.row_index] for one in said]
        try:
            found = np.asarray(reward(*texts), np.float64)
        except Exception as error:  # it is somebody else's code
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            raise errors.RunError(f"online.reward={name} failed on {len(said)} responses ({cause})") from error
        if found.shape != (len(said),):
            raise errors.RunError(f"online.reward={name} gave an array {found.shape} for {len(said)} responses; one number each")
        broken = np.flatnonzero(~np.isfinite(found))
        if len(broken):
            where = f"row {rows[said[broken[0]].row_index].id}, the first of {len(broken)}"
            raise errors.RunError(f"online.reward={name} gave {found[broken[0]]} for a response to {where}; rewards are finite")
        return found

    return judge


def _truth(questions, responses, truths) -> list[float]:
    return [float(response.strip() == truth.strip()) for response, truth in zip(responses, truths)]


def load(name: str) -> Reward:
    """The function that `MODULE:CALLABLE` names.

    Raises:
      RewardError: there is none.
    """
    module, _, attribute = name.partition(":")
    if not re.fullmatch(r"[\w.]+:[\w.]+", name):
        raise RewardError(f"online.reward={name!r} is neither truth, likelihood, MODULE:CALLABLE nor a directory")
    try:
        found = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever a module raises on the way
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise RewardError(f"online.reward={name}: cannot be imported ({cause})") from error
    if not callable(found):
        raise RewardError(f"online.reward={name}: {attribute} is a {type(found).__name__}, not a function")
    return found


def classifier(directory: pathlib.Path) -> Reward:
    """The logit of a sequence-classification model for each question with its response: as chats where its tokenizer has a chat
    template, else as two texts.

    Raises:
      RewardError: no PyTorch, or no such model.
    """
    where = f"online.reward={directory}"
    try:
        labels = len(json.loads((directory / "config.json").read_text()).get("id2label", [0, 1]))
    except (OSError, ValueError, AttributeError) as error:
        raise RewardError(f"{where}: no readable config.json in it ({error})") from error
    if labels != 1:
        raise RewardError(f"{where}: a model of {labels} labels; a reward model has one")
    try:
        import torch
        import transformers
    except ImportError as error:
        raise RewardError(f"{where}: a classification model needs PyTorch: pip install torch") from error
    import tqdm

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(directory, trust_remote_code=False).eval()
    except Exception as error:  # missing and broken files surface as errors of every family
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RewardError(f"{where}: not a model that can be read ({reason})") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id

    def texts(question: str, response: str) -> tuple[str, ...]:
        if not tokenizer.chat_template:
            return question, response
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
        return (tokenizer.apply_chat_template(turns, tokenize=False),)

    def reward(questions, responses, truths) -> list[float]:
        found: list[float] = []
        pairs = [texts(*pair) for pair in zip(questions, responses)]
        options = {"padding": True, "truncation": True, "return_tensors": "pt", "add_special_tokens": not tokenizer.chat_template}
        with torch.inference_mode(), tqdm.tqdm(total=len(pairs), desc="rewards", unit="row", delay=2, leave=False) as bar:
            for first in range(0, len(pairs), BATCH):
                part = pairs[first : first + BATCH]
                found += model(**tokenizer(*(list(side) for side in zip(*part)), **options)).logits[:, 0].tolist()
                bar.update(len(part))
        return found

    return reward

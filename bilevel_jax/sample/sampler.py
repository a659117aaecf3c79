"""Answers to the prompts of a file of rows."""

import functools
from typing import NamedTuple

import numpy as np

from bilevel_jax import sampling, sharding
from bilevel_jax.data import rows, templates
from bilevel_jax.models import attention


class Prompt(NamedTuple):
    """An input row as the model gets it, or why it does not."""

    id: str | None  # None like `tokens`
    line: int
    tokens: np.ndarray | None  # [n] int32; None where the row could not be read
    reason: str | None  # None where it can be used


def encode_rows(items, model, tokenizer, *, template: str) -> list[Prompt]:
    """One prompt for every item, in order.

    Args:
      items: `rows.Row` or `rows.Rejection`, as `rows.iter_rows` yields them.
      model: config from `huggingface`.
    """

    usable = [item for item in items if isinstance(item, rows.Row)]
    examples = iter(templates.encode(usable, tokenizer, template=template, eos=False))
    prompts = []
    for item in items:
        if isinstance(item, rows.Rejection):
            prompts.append(Prompt(None, item.line, None, item.reason))
            continue
        tokens, reason = next(examples).prompt, None
        if not len(tokens):
            reason = "no token in the prompt"
        elif len(tokens) >= model.max_positions:
            reason = f"no room for a response within the model's {model.max_positions} positions"
        elif tokens.max() >= model.vocab_size:
            reason = f"token {tokens.max()} is not in the model's vocabulary of {model.vocab_size}"
        prompts.append(Prompt(item.id, item.line, tokens, reason))
    return prompts


def sample_prompts(
    prompts, model, base, adapter, tokenizer, settings, *, eos, num_samples: int, seed: int, batch_size: int
) -> list[dict]:
    """The rows to write: `num_samples` for every prompt that can be used, one for every other, in order.

    Args:
      prompts: from `encode_rows`; at least one can be used.
      model, base, adapter: config, weights and adapter (or None) from `huggingface`.
      settings: `sampling.Settings`.
      eos: ids that end a response.
      batch_size: responses generated side by side.

    Raises:
      ValueError: the model's probabilities are not numbers.
    """
    # Cleaning up would drop spaces that the model did write.
    detokenize = functools.partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    usable = [prompt for prompt in prompts if prompt.reason is None]
    longest = max(len(prompt.tokens) for prompt in usable)
    sample = sampling.make_sampler(
        model,
        settings,
        eos,
        slots=min(batch_size, len(usable) * num_samples),
        length=min(attention.cache_window(longest + settings.max_new_tokens), model.max_positions),
        mesh=sharding.make_mesh(1),
        detokenize=detokenize,
    )
    keys = sampling.row_keys(seed, [prompt.id for prompt in usable], 0, num_samples)
    answers = iter(sample(base, adapter, [prompt.tokens for prompt in usable], keys))

    results = []
    for prompt in prompts:
        if prompt.reason is not None:
            nulls = dict.fromkeys(("sample", "text", "tokens", "logprob", "sampled_logprob", "finish_reason"))
            results.append({"id": prompt.id} | nulls | {"reason": prompt.reason, "line": prompt.line})
            continue
        for number, response in enumerate(next(answers)):
            if not np.isfinite([response.log_probs, response.sampled_log_probs]).all():
                cause = "are its weights damaged, or is the temperature too small?"
                raise ValueError(f"line {prompt.line}: the model's probabilities are not numbers; {cause}")
            text = detokenize(response.tokens.tolist())
            ends = [text.find(end) for end in settings.stop if end in text]
            result = {
                "id": prompt.id,
                "sample": number,
                "text": text[: min(ends)] if ends else text,
                "tokens": response.tokens.tolist(),
                "logprob": float(response.log_probs.sum()),
                "sampled_logprob": float(response.sampled_log_probs.sum()),
                "finish_reason": response.finish_reason,
            }
            results.append(result)
    return results

"""Generates responses to the prompts of rows."""

import functools
from typing import NamedTuple

import numpy as np

from bilevel_jax import sampling, sharding
from bilevel_jax.data import in_memory, rejections, rendering, rows, templates, token_ids
from bilevel_jax.models import attention, huggingface, layer_settings
from bilevel_jax.text import say


def sample(
    source,
    model: str,
    adapter,
    settings,
    *,
    num_samples=1,
    seed=0,
    template="auto",
    dtype="float32",
    quantization="none",
    batch_size=16,
    columns="",
) -> list[dict]:
    """Reads prompts and a model, and generates responses; see `sample_prompts`. Prints notes on rows and template.

    Args:
      source: a file or hub data set, or rows in memory, as for `rows.iter_rows`; they need no responses.
      model, adapter: directories or hub ids; no adapter: None.
      settings: `sampling.Settings`.
      num_samples, seed, template, dtype, quantization, batch_size, columns: as the flags of the command.

    Raises:
      ValueError: an option is out of range.
      DataError: no prompt can be used.
      ModelError: the model cannot be used.
    """
    for option, value in (("num_samples", num_samples), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{option}={value} must be at least 1")
    name = in_memory.name(source)
    items = list(rows.iter_rows(source, questions_only=True, columns=columns))
    usable, report = rows.collect(items, name)  # raises if no row is usable
    say("".join(f"{note}\n" for note in report.notes()), end="")
    directory = huggingface.locate(str(model))
    # Before the tokenizer: the reason why a model cannot be used.
    config = huggingface.read_config(directory, dtype, quantization=quantization)
    tokenizer = templates.load_tokenizer(str(directory))
    if notice := rendering.template_notice(
        template, tokenizer, templates.encode(usable[:1], tokenizer, template=template, eos=False, learn="last")
    ):
        say(notice)
    prompts = encode_rows(items, config, tokenizer, template=template)
    if all(prompt.reason for prompt in prompts):
        first = f"{rows.location(name, prompts[0].line)}: {prompts[0].reason}"
        raise rows.DataError(f"{first}; none of the {len(prompts)} prompts can be used")
    eos = templates.ends(huggingface.eos_ids(directory, tokenizer), tokenizer, template)
    config, weights = huggingface.load_adapter(str(adapter), config) if adapter else (config, None)
    base = huggingface.load_params(directory, config)
    options = {"num_samples": num_samples, "seed": seed, "batch_size": batch_size}
    return sample_prompts(prompts, config, base, weights, tokenizer, settings, eos=eos, **options)


class Prompt(NamedTuple):
    """An input row as tokens, or the reason why it cannot be used."""

    id: str | None  # None if the row could not be read
    line: int
    tokens: np.ndarray | None  # [n] int32; None if the row could not be read
    reason: str | None  # None if the prompt can be used
    question: str | None = None  # without a template


def encode_rows(items, model, tokenizer, *, template: str) -> list[Prompt]:
    """One prompt for every item, in order.

    Args:
      items: `rows.Row` or `rows.Rejection`, as `rows.iter_rows` yields them.
      model: config from `huggingface`.
    """

    usable = [item for item in items if isinstance(item, rows.Row)]
    examples = iter(templates.encode(usable, tokenizer, template=template, eos=False, learn="last"))
    prompts = []
    for item in items:
        if isinstance(item, rows.Rejection):
            prompts.append(Prompt(None, item.line, None, item.reason))
            continue
        example = next(examples)
        tokens, reason = example.prompt, None
        if example.reason:
            reason = example.reason
        elif not len(tokens):
            reason = "no token in the prompt"
        elif len(tokens) >= model.max_positions:
            reason = f"no room for a response within the model's {model.max_positions} positions"
        else:
            reason = token_ids.outside(tokens, tokenizer, model.vocab_size) or None
        prompts.append(Prompt(item.id, item.line, tokens, reason, item.question))
    return prompts


def sample_prompts(
    prompts, model, base, adapter, tokenizer, settings, *, eos, num_samples: int, seed: int, batch_size: int
) -> list[dict]:
    """The output rows, in order: `num_samples` for each usable prompt, and one for each other prompt.

    Args:
      prompts: from `encode_rows`; at least one is usable.
      model, base, adapter: config, weights and adapter (or None) from `huggingface`.
      settings: `sampling.Settings`.
      eos: ids that end a response.
      batch_size: responses generated in parallel.

    Raises:
      ValueError: the probabilities are not finite.
    """
    # Cleaning up would drop generated spaces.
    detokenize = functools.partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    usable = [prompt for prompt in prompts if prompt.reason is None]
    longest = max(len(prompt.tokens) for prompt in usable)
    length = min(attention.cache_window(longest + settings.max_new_tokens), model.max_positions)
    sample = sampling.make_sampler(
        layer_settings.for_length(model, length),
        settings,
        eos,
        slots=min(batch_size, len(usable) * num_samples),
        length=length,
        mesh=sharding.make_mesh(1),
        detokenize=detokenize,
    )
    keys = sampling.row_keys(seed, [prompt.id for prompt in usable], 0, num_samples)
    responses = iter(sample(base, adapter, [prompt.tokens for prompt in usable], keys))

    results = []
    for prompt in prompts:
        if prompt.reason is not None:
            nulls = dict.fromkeys(("sample", "text", "tokens", "logprob", "sampled_logprob", "finish_reason"))
            reason = {"question": prompt.question, "reason": prompt.reason} | rejections.location_fields(prompt.line)
            results.append({"id": prompt.id} | nulls | reason)
            continue
        for sample_index, response in enumerate(next(responses)):
            if not np.isfinite([response.log_probs, response.sampled_log_probs]).all():
                cause = "are its weights damaged, or is the temperature too small?"
                raise ValueError(f"line {prompt.line}: the model's probabilities are not numbers; {cause}")
            fields = _output_fields(response, detokenize, settings.stop)
            results.append({"id": prompt.id, "sample": sample_index} | fields | {"question": prompt.question})
    return results


def _output_fields(response, detokenize, stop) -> dict:
    """The fields of a response in the output file. The text ends before the first stop string."""
    text = detokenize(response.tokens.tolist())
    ends = [text.find(end) for end in stop if end in text]
    return {
        "text": text[: min(ends)] if ends else text,
        "tokens": response.tokens.tolist(),
        "logprob": float(response.log_probs.sum()),
        "sampled_logprob": float(response.sampled_log_probs.sum()),
        "finish_reason": response.finish_reason,
    }

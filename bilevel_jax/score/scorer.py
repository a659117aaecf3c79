"""Scores the responses of rows."""

import itertools
import math
from collections.abc import Iterable, Iterator

from bilevel_jax import progress, scoring, sharding
from bilevel_jax.data import in_memory, packing, rejections, rendering, rows, templates, token_ids
from bilevel_jax.models import huggingface, layer_settings, rotary
from bilevel_jax.text import say

CHUNK = 1 << 14  # rows that are in memory at once


def score(source, model: str, adapter=None, **options) -> list[dict]:
    """The results of `stream`, whose arguments and errors these are."""
    return [*stream(source, model, adapter, **options)]


def stream(
    source,
    model: str,
    adapter=None,
    *,
    template="auto",
    eos=True,
    learn="all",
    dtype="float32",
    quantization="none",
    batch_size=8,
    columns="",
) -> Iterator[dict]:
    """Reads rows and a model, and scores the responses, `CHUNK` rows at a time. Prints notes on rows and template.

    Files and data sets are read twice, so that unusable ones are refused before anything is scored.

    Args:
      source: a file or hub data set, or rows in memory, as for `rows.iter_rows`.
      model, adapter: directories or hub ids; no adapter: None.
      template, eos, learn, dtype, quantization, batch_size, columns: as the flags of the command.

    Yields:
      The results of `score_rows`.

    Raises:
      ValueError: `batch_size` is below 1.
      DataError: no row is usable.
      ModelError: the model cannot be used.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    held = None if in_memory.is_source(source) else [*rows.iter_rows(source, columns=columns)]

    def chunks() -> Iterator[list[rows.Row | rejections.Rejection]]:
        items = iter(held) if held is not None else rows.iter_rows(source, columns=columns)
        while chunk := [*itertools.islice(items, CHUNK)]:
            yield chunk

    items = progress.bar(itertools.chain.from_iterable(chunks()), desc="reading rows", unit="row")
    first, report = rows.survey(items, in_memory.name(source))
    say("".join(f"{note}\n" for note in report.notes()), end="")
    directory = huggingface.locate(str(model))
    # Before the tokenizer: the reason why a model cannot be used.
    config = huggingface.read_config(directory, dtype, quantization=quantization)
    tokenizer = templates.load_tokenizer(str(directory))
    config, weights = huggingface.load_adapter(str(adapter), config) if adapter else (config, None)
    base = huggingface.load_params(directory, config)
    encoding = {"template": template, "eos": eos, "learn": learn}
    if notice := rendering.template_notice(template, tokenizer, templates.encode([first], tokenizer, **encoding)):
        say(notice)
    longest = None
    if isinstance(config.rope_scaling, rotary.LongRope) and report.num_rows + len(report.rejections) > CHUNK:
        encoded = (templates.encode(_usable(chunk), tokenizer, **encoding) for chunk in chunks())
        longest = max((example.size for some in encoded for example in some if _scores(example, config)), default=0)
    for chunk in chunks():
        yield from score_rows(chunk, config, base, weights, tokenizer, **encoding, batch_size=batch_size, longest=longest)


def _usable(items: Iterable[rows.Row | rejections.Rejection]) -> list[rows.Row]:
    return [item for item in items if isinstance(item, rows.Row)]


def _scores(example: templates.Example, model) -> bool:
    """Whether the example fits and has a token to score."""
    return example.size <= model.max_positions and example.size - (not len(example.prompt)) >= 1 and len(example.response) > 0


def score_rows(
    items,
    model,
    base,
    adapter,
    tokenizer,
    *,
    template: str,
    eos: bool,
    batch_size: int,
    learn: str = "all",
    longest: int | None = None,
) -> list[dict]:
    """One result for every item, in order.

    Args:
      items: `rows.Row` or `rows.Rejection`, as `rows.iter_rows` yields them.
      model, base, adapter: config, weights and adapter (or None) from `huggingface`.
      template, eos, batch_size, learn: as the flags of the command.
      longest: tokens of the longest row, if these rows are some of many; None: of these rows.

    Raises:
      TokenError: the model does not have a token of a row.
      ValueError: a loss is not finite.
    """
    segments, scored, results = [], [], []
    examples = templates.encode(_usable(items), tokenizer, template=template, eos=eos, learn=learn)
    token_ids.check(examples, tokenizer, model.vocab_size)
    encoded = iter(examples)
    for item in items:
        result = {"id": getattr(item, "id", None), "loss": None, "logprob": None, "num_tokens": 0}
        results.append(result)
        if isinstance(item, rows.Rejection):
            result |= {"reason": item.reason} | rejections.location_fields(item.line)
            continue
        example = next(encoded)
        if _scores(example, model):
            scored.append(result)
            segments.append(packing.Segment(example.prompt, example.response, earlier=example.earlier))
        elif example.size > model.max_positions:
            result |= {"reason": f"over the model's {model.max_positions} positions"} | rejections.location_fields(item.line)
        else:
            result |= {"reason": example.reason or "no token to score"} | rejections.location_fields(item.line)
    if not segments:
        return results
    model = layer_settings.for_length(model, longest or max(segment.size for segment in segments))
    score = scoring.make_scorer(model, batch_size, model.max_positions, sharding.make_mesh(1))
    nll, count = score(base, adapter, segments, "scoring")
    if broken := [result["id"] for result, total in zip(scored, nll) if not math.isfinite(total)]:
        what = f"the losses of {len(broken)} rows are not finite (the first: {broken[0]})"
        raise ValueError(f"{what}; the weights are damaged, or too large for the dtype")
    for result, total, number in zip(scored, nll, count):
        result |= {"loss": float(total / max(number, 1)), "logprob": float(-total), "num_tokens": int(number)}
    return results

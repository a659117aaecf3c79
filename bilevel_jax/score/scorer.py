"""Scores the responses of rows."""

import math

from bilevel_jax import scoring, sharding
from bilevel_jax.data import in_memory, packing, rejections, rendering, rows, templates, token_ids
from bilevel_jax.models import huggingface, layer_settings
from bilevel_jax.text import say


def score(
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
) -> list[dict]:
    """Reads rows and a model, and scores the responses; see `score_rows`. Prints notes on rows and template.

    Args:
      source: a file or hub data set, or rows in memory, as for `rows.iter_rows`.
      model, adapter: directories or hub ids; no adapter: None.
      template, eos, learn, dtype, quantization, batch_size, columns: as the flags of the command.

    Raises:
      DataError: no row is usable.
      ModelError: the model cannot be used.
    """
    items = list(rows.iter_rows(source, columns=columns))
    usable, report = rows.collect(items, in_memory.name(source))  # raises if no row is usable
    say("".join(f"{note}\n" for note in report.notes()), end="")
    directory = huggingface.locate(str(model))
    # Before the tokenizer: the reason why a model cannot be used.
    config = huggingface.read_config(directory, dtype, quantization=quantization)
    tokenizer = templates.load_tokenizer(str(directory))
    base = huggingface.load_params(directory, config)
    config, weights = huggingface.load_adapter(str(adapter), config) if adapter else (config, None)
    if notice := rendering.template_notice(
        template, tokenizer, templates.encode(usable[:1], tokenizer, template=template, eos=eos, learn=learn)
    ):
        say(notice)
    options = {"template": template, "eos": eos, "learn": learn, "batch_size": batch_size}
    return score_rows(items, config, base, weights, tokenizer, **options)


def score_rows(
    items, model, base, adapter, tokenizer, *, template: str, eos: bool, batch_size: int, learn: str = "all"
) -> list[dict]:
    """One result for every item, in order.

    Args:
      items: `rows.Row` or `rows.Rejection`, as `rows.iter_rows` yields them.
      model, base, adapter: config, weights and adapter (or None) from `huggingface`.

    Raises:
      TokenError: the model does not have a token of a row.
      ValueError: a loss is not finite.
    """
    usable = [item for item in items if isinstance(item, rows.Row)]
    segments, scored, results = [], [], []
    examples = templates.encode(usable, tokenizer, template=template, eos=eos, learn=learn)
    token_ids.check(examples, tokenizer, model.vocab_size)
    encoded = iter(examples)
    for item in items:
        result = {"id": getattr(item, "id", None), "loss": None, "logprob": None, "num_tokens": 0}
        results.append(result)
        if isinstance(item, rows.Rejection):
            result |= {"reason": item.reason} | rejections.place(item.line)
            continue
        example = next(encoded)
        segment = packing.Segment(example.prompt, example.response, earlier=example.earlier)
        if segment.size > model.max_positions:
            result |= {"reason": f"over the model's {model.max_positions} positions"} | rejections.place(item.line)
        elif segment.size - (not len(example.prompt)) < 1 or not len(example.response):
            result |= {"reason": example.reason or "no token to score"} | rejections.place(item.line)
        else:
            scored.append(result)
            segments.append(segment)
    if not segments:
        return results
    model = layer_settings.for_length(model, max(segment.size for segment in segments))
    score = scoring.make_scorer(model, batch_size, model.max_positions, sharding.make_mesh(1))
    nll, count = score(base, adapter, segments, "scoring")
    if broken := [result["id"] for result, total in zip(scored, nll) if not math.isfinite(total)]:
        what = f"the losses of {len(broken)} rows are not finite (the first: {broken[0]})"
        raise ValueError(f"{what}; the weights are damaged, or too large for the dtype")
    for result, total, number in zip(scored, nll, count):
        result |= {"loss": float(total / max(number, 1)), "logprob": float(-total), "num_tokens": int(number)}
    return results

"""Scores the responses of rows."""

from bilevel_jax import scoring, sharding
from bilevel_jax.data import in_memory, packing, rows, templates
from bilevel_jax.models import huggingface


def score(source, model: str, adapter=None, *, template="auto", eos=True, dtype="float32", batch_size=8) -> list[dict]:
    """Reads rows and a model, and scores the responses; see `score_rows`.

    Args:
      source: a file or hub data set, or rows in memory, as for `rows.iter_rows`.
      model, adapter: directories or hub ids; no adapter: None.
      template, eos, dtype, batch_size: as the flags of the command.

    Raises:
      DataError: no row is usable.
      ModelError: the model cannot be used.
    """
    items = list(rows.iter_rows(source))
    rows.collect(items, in_memory.source_name(source) if in_memory.is_source(source) else "rows")  # raises if no row is usable
    directory = huggingface.locate(str(model))
    config = huggingface.read_config(directory, dtype)  # before the tokenizer: the reason why a model cannot be used
    tokenizer = templates.load_tokenizer(str(directory))
    base = huggingface.load_params(directory, config)
    config, weights = huggingface.load_adapter(str(adapter), config) if adapter else (config, None)
    return score_rows(items, config, base, weights, tokenizer, template=template, eos=eos, batch_size=batch_size)


def score_rows(items, model, base, adapter, tokenizer, *, template: str, eos: bool, batch_size: int) -> list[dict]:
    """One result for every item, in order.

    Args:
      items: `rows.Row` or `rows.Rejection`, as `rows.iter_rows` yields them.
      model, base, adapter: config, weights and adapter (or None) from `huggingface`.
    """
    usable = [item for item in items if isinstance(item, rows.Row)]
    segments, scored, results = [], [], []
    encoded = iter(templates.encode(usable, tokenizer, template=template, eos=eos))
    for item in items:
        result = {"id": getattr(item, "id", None), "loss": None, "logprob": None, "num_tokens": 0}
        results.append(result)
        if isinstance(item, rows.Rejection):
            result |= {"reason": item.reason, "line": item.line}
            continue
        example = next(encoded)
        segment = packing.Segment(example.prompt, example.response)
        if segment.size > model.max_positions:
            result |= {"reason": f"over the model's {model.max_positions} positions", "line": item.line}
        elif segment.size - (not len(example.prompt)) < 1 or not len(example.response):
            result |= {"reason": "no token to score", "line": item.line}
        else:
            scored.append(result)
            segments.append(segment)
    if not segments:
        return results
    score = scoring.make_scorer(model, batch_size, model.max_positions, sharding.make_mesh(1))
    nll, count = score(base, adapter, segments, "scoring")
    for result, total, number in zip(scored, nll, count):
        result |= {"loss": float(total / max(number, 1)), "logprob": float(-total), "num_tokens": int(number)}
    return results

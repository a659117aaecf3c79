"""Scores the responses of rows."""

from bilevel_jax import scoring, sharding
from bilevel_jax.data import packing, rejections, rows, templates


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
            result |= {"reason": item.reason} | rejections.place(item.line)
            continue
        example = next(encoded)
        segment = packing.Segment(example.prompt, example.response)
        if segment.size > model.max_positions:
            result |= {"reason": f"over the model's {model.max_positions} positions"} | rejections.place(item.line)
        elif segment.size - (not len(example.prompt)) < 1 or not len(example.response):
            result |= {"reason": example.reason or "no token to score"} | rejections.place(item.line)
        else:
            scored.append(result)
            segments.append(segment)
    if not segments:
        return results
    score = scoring.make_scorer(model, batch_size, model.max_positions, sharding.make_mesh(1))
    nll, count = score(base, adapter, segments, "scoring")
    for result, total, number in zip(scored, nll, count):
        result |= {"loss": total / max(number, 1), "logprob": -total, "num_tokens": int(number)}
    return results

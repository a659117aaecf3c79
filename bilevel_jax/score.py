"""Scores given responses: `python -m bilevel_jax.score --model=DIR [--adapter=DIR] --data=FILE --out=FILE.jsonl`.

Writes `{"id", "loss", "logprob", "num_tokens"}` for every input row, in order: the mean negative log-likelihood of the response's
tokens, the sum of their log-probabilities (natural logarithm), and their number. A row that cannot be scored keeps its place, with
nulls and the `reason`.
"""

import json
import pathlib

from absl import flags

from bilevel_jax import cli

MODEL = flags.DEFINE_string("model", None, "Model directory in Hugging Face format, or a hub id.", required=True)
ADAPTER = flags.DEFINE_string("adapter", None, "PEFT LoRA directory.")
DATA = flags.DEFINE_string("data", None, "JSONL, JSON or Parquet file, or a hub data set.", required=True)
OUT = flags.DEFINE_string("out", None, "JSONL file to write.", required=True)
TEMPLATE = flags.DEFINE_string("template", "auto", "auto, chat, human, alpaca or none.")
EOS = flags.DEFINE_bool("eos", True, "Score the EOS after the response.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of weights and activations.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Packed sequences per forward pass.", lower_bound=1)


def score_rows(items, model, base, adapter, tokenizer, *, template: str, eos: bool, batch_size: int) -> list[dict]:
    """One result for every item, in order.

    Args:
      items: `rows.Row` or `rows.Rejection`, as `rows.iter_rows` yields them.
      model, base, adapter: config, weights and adapter (or None) from `huggingface`.
    """
    from bilevel_jax import scoring, sharding
    from bilevel_jax.data import packing, rows, templates

    usable = [item for item in items if isinstance(item, rows.Row)]
    segments, places, results = [], [], []
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
            places.append(result)
            segments.append(segment)
    if not segments:
        return results
    score = scoring.make_scorer(model, batch_size, model.max_positions, sharding.make_mesh(1))
    nll, count = score(base, adapter, segments, "scoring")
    for result, total, number in zip(places, nll, count):
        result |= {"loss": total / max(number, 1), "logprob": -total, "num_tokens": int(number)}
    return results


def main() -> None:
    from bilevel_jax.data import rows, templates
    from bilevel_jax.models import huggingface

    out = pathlib.Path(OUT.value)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out: there is no directory {out.parent}")
    items = list(rows.iter_rows(DATA.value))
    rows.collect(items, DATA.value)  # refuses a file without a single usable row
    directory = huggingface.locate(MODEL.value)
    tokenizer = templates.load_tokenizer(str(directory))
    model, base = huggingface.load_model(str(directory), DTYPE.value)
    model, adapter = huggingface.load_adapter(ADAPTER.value, model) if ADAPTER.value else (model, None)
    options = {"template": TEMPLATE.value, "eos": EOS.value, "batch_size": BATCH_SIZE.value}
    results = score_rows(items, model, base, adapter, tokenizer, **options)
    with open(out, "w") as file:
        file.writelines(json.dumps(result) + "\n" for result in results)
    scored = [result["loss"] for result in results if result["loss"] is not None]
    mean = f", mean loss {sum(scored) / len(scored):.4f}" if scored else ""
    print(f"{out}: {len(scored)} of {len(results)} rows scored{mean}")


if __name__ == "__main__":
    cli.run(main)

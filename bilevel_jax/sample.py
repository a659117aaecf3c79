"""Answers prompts: `python -m bilevel_jax.sample --model=DIR [--adapter=DIR] --prompts=FILE --out=FILE.jsonl`.

Writes `{"id", "sample", "text", "tokens", "logprob", "sampled_logprob", "finish_reason"}` for every prompt and sample, in order.
`tokens` are the generated ids without the EOS. `logprob` sums their log-probabilities (natural logarithm) under the model itself,
temperature 1, with that of the EOS where one was generated: what `score` gives for them. `sampled_logprob` is the same under the
distribution that was sampled, after temperature, top-k and top-p; 0 where greedy. `text` skips special tokens and ends before a
stop string; `tokens` include those that complete it. `finish_reason` is `stop` (an EOS or a stop string) or `length`.

A prompt that cannot be used keeps its place, in one row of nulls with the `reason` and its `line`. The same command gives the same
answers. A prompt's answers depend on its content, the seed and the sample's number, and not on the prompts around it, except that
rounding differs with what is computed side by side: by about 1e-5 in a token's `logprob`.
"""

import functools
import json
import pathlib
import tempfile
from typing import NamedTuple

import numpy as np
from absl import flags

from bilevel_jax import cli
from bilevel_jax.data import templates

MODEL = flags.DEFINE_string("model", None, "Model directory in Hugging Face format, or a hub id.", required=True)
ADAPTER = flags.DEFINE_string("adapter", None, "PEFT LoRA directory.")
PROMPTS = flags.DEFINE_string("prompts", None, "JSONL, JSON or Parquet file, or a hub data set; needs no responses.", required=True)
OUT = flags.DEFINE_string("out", None, "JSONL file to write.", required=True)
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Divides the logits; 0 always takes the most likely token.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Sample among the K most likely tokens; 0 for all.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample among the fewest most likely tokens whose probability reaches P.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 512, "Longest response, its EOS included.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Responses per prompt.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of the randomness, together with a prompt's content.")
STOP = flags.DEFINE_multi_string("stop", [], "Text before which a response ends; may be given several times.")
TEMPLATE = flags.DEFINE_enum("template", "auto", templates.TEMPLATES, "How a prompt is put to the model.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of weights and activations.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Responses generated side by side; memory grows with it.", lower_bound=1)


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
    from bilevel_jax.data import rows

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
    from bilevel_jax import sampling, sharding
    from bilevel_jax.models import attention

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


def main() -> None:
    from bilevel_jax import sampling, workspace
    from bilevel_jax.data import rows
    from bilevel_jax.models import huggingface

    if "" in STOP.value:
        raise ValueError("--stop is empty")
    try:
        settings = sampling.Settings(TEMPERATURE.value, TOP_K.value, TOP_P.value, MAX_NEW_TOKENS.value, tuple(STOP.value))
    except ValueError as error:  # of the form `top_p=2.0 must be ...`
        raise ValueError(f"--{error}") from error
    out = pathlib.Path(OUT.value)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out: there is no directory {out.parent}")
    try:
        tempfile.TemporaryFile(dir=out.parent).close()  # better now than after the work
    except OSError as error:
        raise PermissionError(f"--out: no file can be written to {out.parent} ({error.strerror})") from error
    if out.exists() and not out.is_file():
        raise FileExistsError(f"--out={out} is not a file")
    items = list(rows.iter_rows(PROMPTS.value, questions_only=True))
    rows.collect(items, PROMPTS.value)  # refuses a file without a single usable row

    directory = huggingface.locate(MODEL.value)
    tokenizer = templates.load_tokenizer(str(directory))
    model = huggingface.read_config(directory, DTYPE.value)
    prompts = encode_rows(items, model, tokenizer, template=TEMPLATE.value)
    if all(prompt.reason for prompt in prompts):
        first = f"{rows.place(PROMPTS.value, prompts[0].line)}: {prompts[0].reason}"
        raise rows.DataError(f"{first}; none of the {len(prompts)} prompts can be used")
    eos = huggingface.eos_ids(directory, tokenizer)
    model, adapter = huggingface.load_adapter(ADAPTER.value, model) if ADAPTER.value else (model, None)
    base = huggingface.load_params(directory, model)
    options = {"num_samples": NUM_SAMPLES.value, "seed": SEED.value, "batch_size": BATCH_SIZE.value}
    results = sample_prompts(prompts, model, base, adapter, tokenizer, settings, eos=eos, **options)
    workspace.write_atomically(out, "".join(json.dumps(result) + "\n" for result in results))
    responses = [result for result in results if result["sample"] is not None]
    stops = sum(result["finish_reason"] == "stop" for result in responses)
    length = sum(len(result["tokens"]) for result in responses) / len(responses)
    used = f"{len(responses)} responses to {sum(prompt.reason is None for prompt in prompts)} of {len(prompts)} prompts"
    print(f"{out}: {used}, {stops} stop, {len(responses) - stops} length, mean {length:.1f} tokens")


if __name__ == "__main__":
    cli.run(main)

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

import json
import pathlib
import tempfile

from absl import flags

from bilevel_jax import cli
from bilevel_jax.data import templates

FLAGS = flags.FlagValues()
MODEL = flags.DEFINE_string("model", None, "Model directory in Hugging Face format, or a hub id.", required=True, flag_values=FLAGS)
ADAPTER = flags.DEFINE_string("adapter", None, "PEFT LoRA directory.", flag_values=FLAGS)
PROMPTS = flags.DEFINE_string(
    "prompts", None, "JSONL, JSON or Parquet file, or a hub data set; needs no responses.", required=True, flag_values=FLAGS
)
OUT = flags.DEFINE_string("out", None, "JSONL file to write.", required=True, flag_values=FLAGS)
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Divides the logits; 0 always takes the most likely token.", flag_values=FLAGS)
TOP_K = flags.DEFINE_integer("top_k", 0, "Sample among the K most likely tokens; 0 for all.", flag_values=FLAGS)
TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "Sample among the fewest most likely tokens whose probability reaches P.", flag_values=FLAGS
)
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 512, "Longest response, its EOS included.", flag_values=FLAGS)
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Responses per prompt.", lower_bound=1, flag_values=FLAGS)
SEED = flags.DEFINE_integer("seed", 0, "Of the randomness, together with a prompt's content.", flag_values=FLAGS)
STOP = flags.DEFINE_multi_string("stop", [], "Text before which a response ends; may be given several times.", flag_values=FLAGS)
TEMPLATE = flags.DEFINE_enum("template", "auto", templates.TEMPLATES, "How a prompt is put to the model.", flag_values=FLAGS)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of weights and activations.", flag_values=FLAGS)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 16, "Responses generated side by side; memory grows with it.", lower_bound=1, flag_values=FLAGS
)


def main() -> None:
    from bilevel_jax import files, sampling
    from bilevel_jax.data import rows
    from bilevel_jax.models import huggingface
    from bilevel_jax.sample import sampler

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
    prompts = sampler.encode_rows(items, model, tokenizer, template=TEMPLATE.value)
    if all(prompt.reason for prompt in prompts):
        first = f"{rows.location(PROMPTS.value, prompts[0].line)}: {prompts[0].reason}"
        raise rows.DataError(f"{first}; none of the {len(prompts)} prompts can be used")
    eos = huggingface.eos_ids(directory, tokenizer)
    model, adapter = huggingface.load_adapter(ADAPTER.value, model) if ADAPTER.value else (model, None)
    base = huggingface.load_params(directory, model)
    options = {"num_samples": NUM_SAMPLES.value, "seed": SEED.value, "batch_size": BATCH_SIZE.value}
    results = sampler.sample_prompts(prompts, model, base, adapter, tokenizer, settings, eos=eos, **options)
    files.write_atomically(out, "".join(json.dumps(result) + "\n" for result in results))
    responses = [result for result in results if result["sample"] is not None]
    stops = sum(result["finish_reason"] == "stop" for result in responses)
    length = sum(len(result["tokens"]) for result in responses) / len(responses)
    used = f"{len(responses)} responses to {sum(prompt.reason is None for prompt in prompts)} of {len(prompts)} prompts"
    print(f"{out}: {used}, {stops} stop, {len(responses) - stops} length, mean {length:.1f} tokens")


if __name__ == "__main__":
    cli.run(main, FLAGS)

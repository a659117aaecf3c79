"""Generates responses to the prompts of a file.

    python -m bilevel_jax.sample --model=DIR [--adapter=DIR] --prompts=FILE --out=FILE.jsonl

Writes one line per prompt and sample, in order: `id`, `sample`, `text`, `tokens` (without the EOS), `logprob` (under the model, as
`score` computes it), `sampled_logprob` (after temperature, top-k and top-p; 0 if greedy), `finish_reason` (`stop` or `length`) and
`question`. A prompt that cannot be used has one line of nulls with a `reason`. The same command generates the same responses.
"""

import pathlib

from absl import flags

from bilevel_jax import cli
from bilevel_jax.data import templates
from bilevel_jax.text import say

FLAGS = flags.FlagValues()
MODEL = flags.DEFINE_string("model", None, "Model directory in Hugging Face format, or a hub id.", required=True, flag_values=FLAGS)
ADAPTER = flags.DEFINE_string("adapter", None, "PEFT LoRA directory.", flag_values=FLAGS)
PROMPTS = flags.DEFINE_string(
    "prompts",
    None,
    "Files, folders, globs or hub data sets, separated by commas; needs no responses.",
    required=True,
    flag_values=FLAGS,
)
COLUMNS = flags.DEFINE_string(
    "columns", "", "Other names of columns, for example question:query,response:answer.", flag_values=FLAGS
)
OUT = flags.DEFINE_string("out", None, "JSONL file to write.", required=True, flag_values=FLAGS)
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Divides the logits; 0 is greedy.", flag_values=FLAGS)
TOP_K = flags.DEFINE_integer("top_k", 0, "Sample from the K most likely tokens; 0 for all.", flag_values=FLAGS)
TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "Sample from the smallest set of most likely tokens with total probability of at least P.", flag_values=FLAGS
)
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 512, "Maximum length of a response, including the EOS.", flag_values=FLAGS)
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Responses per prompt.", lower_bound=1, flag_values=FLAGS)
SEED = flags.DEFINE_integer(
    "seed", 0, "Seed; the random key of a response also depends on the content of the prompt.", flag_values=FLAGS
)
STOP = flags.DEFINE_multi_string("stop", [], "Stop string: the response ends before it. May be repeated.", flag_values=FLAGS)
TEMPLATE = flags.DEFINE_enum("template", "auto", templates.TEMPLATES, "Prompt template.", flag_values=FLAGS)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of weights and activations.", flag_values=FLAGS)
QUANTIZATION = flags.DEFINE_enum("quantization", "none", ["none", "nf4", "int8"], "Of the base's linear layers.", flag_values=FLAGS)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 16, "Responses generated in parallel; memory grows with it.", lower_bound=1, flag_values=FLAGS
)


def main() -> None:
    from bilevel_jax import files, sampling
    from bilevel_jax.data import parts
    from bilevel_jax.sample import sampler

    if "" in STOP.value:
        raise ValueError("--stop is empty")
    try:
        settings = sampling.Settings(TEMPERATURE.value, TOP_K.value, TOP_P.value, MAX_NEW_TOKENS.value, tuple(STOP.value))
    except ValueError as error:  # of the form `top_p=2.0 must be ...`
        raise ValueError(f"--{error}") from error
    out = pathlib.Path(OUT.value)
    if out.exists() and not out.is_file():
        raise FileExistsError(f"--out={out} is not a file")
    files.check_out(out, "--out")
    parts.refuse_overwriting(out, "--out", PROMPTS.value)
    options = {"num_samples": NUM_SAMPLES.value, "seed": SEED.value, "template": TEMPLATE.value, "dtype": DTYPE.value}
    options |= {"batch_size": BATCH_SIZE.value, "columns": COLUMNS.value}
    options["quantization"] = QUANTIZATION.value
    results = sampler.sample(PROMPTS.value, MODEL.value, ADAPTER.value, settings, **options)
    files.write_atomically(out, "".join(files.to_json(result) + "\n" for result in results))
    responses = [result for result in results if result["sample"] is not None]
    num_stops = sum(result["finish_reason"] == "stop" for result in responses)
    length = sum(len(result["tokens"]) for result in responses) / len(responses)
    num_used, num_prompts = (sum(result["sample"] in first for result in results) for first in ((0,), (0, None)))
    used = f"{len(responses)} responses to {num_used} of {num_prompts} prompts"
    say(f"{out}: {used}, {num_stops} stop, {len(responses) - num_stops} length, mean {length:.1f} tokens")


if __name__ == "__main__":
    cli.run(main, FLAGS)

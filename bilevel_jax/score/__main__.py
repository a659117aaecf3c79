"""Scores the responses of a file of rows.

    python -m bilevel_jax.score --model=DIR [--adapter=DIR] --data=FILE --out=FILE.jsonl [--columns=question:query,response:answer]

Writes one line per input row, in order: `id`, `loss` (mean NLL of the response tokens, nats), `logprob` (their summed
log-probability) and `num_tokens`. All answers of a conversation are scored, or with `--learn=last` the last one alone. A row that
cannot be scored has nulls and a `reason`.
"""

import collections
import pathlib

from absl import flags

from bilevel_jax import cli
from bilevel_jax.text import say

FLAGS = flags.FlagValues()
MODEL = flags.DEFINE_string("model", None, "Model directory in Hugging Face format, or a hub id.", required=True, flag_values=FLAGS)
ADAPTER = flags.DEFINE_string("adapter", None, "PEFT LoRA directory.", flag_values=FLAGS)
DATA = flags.DEFINE_string(
    "data", None, "Files, folders, globs or hub data sets, separated by commas.", required=True, flag_values=FLAGS
)
COLUMNS = flags.DEFINE_string(
    "columns", "", "Other names of columns, for example question:query,response:answer.", flag_values=FLAGS
)
OUT = flags.DEFINE_string("out", None, "JSONL file to write.", required=True, flag_values=FLAGS)
TEMPLATE = flags.DEFINE_string("template", "auto", "auto, chat, human, alpaca or none.", flag_values=FLAGS)
LEARN = flags.DEFINE_enum(
    "learn", "all", ["all", "last"], "Answers of a conversation that are scored: all, or the last one.", flag_values=FLAGS
)
EOS = flags.DEFINE_bool("eos", True, "Score the EOS after the response.", flag_values=FLAGS)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of weights and activations.", flag_values=FLAGS)
QUANTIZATION = flags.DEFINE_enum("quantization", "none", ["none", "nf4", "int8"], "Of the base's linear layers.", flag_values=FLAGS)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Packed sequences per forward pass.", lower_bound=1, flag_values=FLAGS)


def main() -> None:
    from bilevel_jax import files
    from bilevel_jax.data import parts
    from bilevel_jax.score import scorer

    out = pathlib.Path(OUT.value)
    if out.suffix in (".csv", ".tsv", ".json", ".parquet"):
        raise ValueError(f"--out={out}: the rows are written as JSONL; name a .jsonl file")
    files.check_out(out, "--out")
    parts.refuse_overwriting(out, "--out", DATA.value)
    options = {"template": TEMPLATE.value, "eos": EOS.value, "learn": LEARN.value, "dtype": DTYPE.value, "columns": COLUMNS.value}
    options["quantization"] = QUANTIZATION.value
    number, scored, total = 0, 0, 0.0
    reasons: collections.Counter[str] = collections.Counter()
    with files.replacing(out) as file:
        for result in scorer.stream(DATA.value, MODEL.value, ADAPTER.value, **options, batch_size=BATCH_SIZE.value):
            file.write((files.to_json(result) + "\n").encode())
            number += 1
            if result["loss"] is not None:
                scored, total = scored + 1, total + result["loss"]
            else:
                reasons[result["reason"]] += 1
    mean = f", mean loss {total / scored:.4f}" if scored else ""
    say(f"{out}: {scored} of {number} rows scored{mean}")
    for reason, times in reasons.most_common():
        say(f"  {times}: {reason}")
    if number and not scored:
        raise ValueError(f"no row was scored; {out} has the reason for each")


if __name__ == "__main__":
    cli.run(main, FLAGS)

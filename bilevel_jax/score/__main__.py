"""Scores the responses of a file of rows.

    python -m bilevel_jax.score --model=DIR [--adapter=DIR] --data=FILE --out=FILE.jsonl [--columns=question:query,response:answer]

Writes one line per input row, in order: `id`, `loss` (mean NLL of the response tokens, nats), `logprob` (their summed
log-probability) and `num_tokens`. A row that cannot be scored has nulls and a `reason`.
"""

import json
import pathlib

from absl import flags

from bilevel_jax import cli

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
EOS = flags.DEFINE_bool("eos", True, "Score the EOS after the response.", flag_values=FLAGS)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of weights and activations.", flag_values=FLAGS)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Packed sequences per forward pass.", lower_bound=1, flag_values=FLAGS)


def main() -> None:
    from bilevel_jax.data import rendering, rows, templates
    from bilevel_jax.models import huggingface
    from bilevel_jax.score import scorer

    out = pathlib.Path(OUT.value)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out: there is no directory {out.parent}")
    items = list(rows.iter_rows(DATA.value, columns=COLUMNS.value))
    _, report = rows.collect(items, DATA.value)  # raises if no row is usable
    print("".join(f"{note}\n" for note in report.notes()), end="")
    directory = huggingface.locate(MODEL.value)
    model = huggingface.read_config(directory, DTYPE.value)  # before the tokenizer: the reason why a model cannot be used
    tokenizer = templates.load_tokenizer(str(directory))
    base = huggingface.load_params(directory, model)
    model, adapter = huggingface.load_adapter(ADAPTER.value, model) if ADAPTER.value else (model, None)
    first = next(item for item in items if isinstance(item, rows.Row))
    example = templates.encode([first], tokenizer, template=TEMPLATE.value, eos=EOS.value)
    if notice := rendering.template_notice(TEMPLATE.value, tokenizer, example):
        print(notice)
    options = {"template": TEMPLATE.value, "eos": EOS.value, "batch_size": BATCH_SIZE.value}
    results = scorer.score_rows(items, model, base, adapter, tokenizer, **options)
    with open(out, "w") as file:
        file.writelines(json.dumps(result) + "\n" for result in results)
    scored = [result["loss"] for result in results if result["loss"] is not None]
    mean = f", mean loss {sum(scored) / len(scored):.4f}" if scored else ""
    print(f"{out}: {len(scored)} of {len(results)} rows scored{mean}")


if __name__ == "__main__":
    cli.run(main, FLAGS)

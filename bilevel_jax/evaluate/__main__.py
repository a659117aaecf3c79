"""Evaluates a model on benchmarks with lm-eval.

    python -m bilevel_jax.evaluate --workdir=DIR --tasks=boolq,piqa
    python -m bilevel_jax.evaluate --model=DIR [--adapter=DIR] --tasks='local_*' --out=results.json

Prints lm-eval's table and writes its results as JSON. Tasks are those of lm-eval, with data from the hub, and local_arc_easy,
local_boolq, local_hellaswag, local_piqa and local_winogrande: the same prompts and metrics, with data in $BILEVEL_JAX_DATA/bench.
"""

import importlib.util
import logging
import pathlib
from typing import NamedTuple

from absl import flags

from bilevel_jax import cli, errors, files
from bilevel_jax.text import say

FLAGS = flags.FlagValues()
WORKDIR = flags.DEFINE_string("workdir", None, "A finished run; evaluates its base model with its adapter.", flag_values=FLAGS)
MODEL = flags.DEFINE_string(
    "model", None, "Model directory in Hugging Face format, or a hub id, instead of a run.", flag_values=FLAGS
)
ADAPTER = flags.DEFINE_string("adapter", None, "PEFT LoRA directory, for --model.", flag_values=FLAGS)
TASKS = flags.DEFINE_list(
    "tasks", None, "Tasks, groups or tags, separated by commas; may have wildcards.", required=True, flag_values=FLAGS
)
INCLUDE_PATH = flags.DEFINE_string("include_path", None, "Directory of additional task files.", flag_values=FLAGS)
OUT = flags.DEFINE_string("out", None, "JSON file to write; WORKDIR/lm_eval.json by default, none for --model.", flag_values=FLAGS)
SAMPLES = flags.DEFINE_bool("samples", False, "Also write all items with their requests and scores.", flag_values=FLAGS)
LIMIT = flags.DEFINE_integer("limit", None, "Number of items of each task; all by default.", lower_bound=1, flag_values=FLAGS)
NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", None, "Solved examples in a prompt; by default as the task defines.", lower_bound=0, flag_values=FLAGS
)
CHAT_TEMPLATE = flags.DEFINE_bool("chat_template", False, "Apply the tokenizer's chat template to prompts.", flag_values=FLAGS)
DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16"],
    "Type of weights and activations; by default that of the run, or float32.",
    flag_values=FLAGS,
)
QUANTIZATION = flags.DEFINE_enum(
    "quantization",
    None,
    ["none", "nf4", "int8"],
    "Of the base's linear layers; by default that of the run, or none.",
    flag_values=FLAGS,
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Sequences per forward pass.", lower_bound=1, flag_values=FLAGS)

LOCAL_TASKS = pathlib.Path(__file__).parent / "tasks"


class EvaluatedModel(NamedTuple):
    """The model to evaluate."""

    model: str
    adapter: str | None
    dtype: str
    quantization: str
    out: pathlib.Path | None


def model_from_flags() -> EvaluatedModel:
    """The model that the flags select, and the file for its results."""
    from bilevel_jax.runtime.workdir import learned, read_finished

    if (WORKDIR.value is None) == (MODEL.value is None):
        raise ValueError("give either --workdir or --model")
    if MODEL.value is not None:
        if SAMPLES.value and not OUT.value:
            raise ValueError("--samples goes with --out, the file for them, where --model is given")
        out = pathlib.Path(OUT.value) if OUT.value else None
        return EvaluatedModel(MODEL.value, ADAPTER.value, DTYPE.value or "float32", QUANTIZATION.value or "none", out)
    if ADAPTER.value is not None:
        raise ValueError("--adapter goes with --model; a --workdir has an adapter")
    assert WORKDIR.value is not None  # where --model is not given
    workdir = pathlib.Path(WORKDIR.value)
    config = read_finished(workdir)
    out = pathlib.Path(OUT.value or workdir / "lm_eval.json")
    path, adapter = learned(workdir, config)
    quantization = QUANTIZATION.value or config.model.quantization
    return EvaluatedModel(path, str(adapter) if adapter else None, DTYPE.value or config.model.dtype, quantization, out)


def load_tasks(names: list[str], include_path: str | None = None):
    """Loads tasks and groups of lm-eval by name, and returns them with their manager.

    Raises:
      ValueError: a name is unknown, or data cannot be loaded.
    """
    from lm_eval.tasks import TaskManager

    from bilevel_jax.data import rows

    logging.getLogger("lm_eval.api.task").setLevel(logging.ERROR)  # it warns about its own task files
    paths = [str(LOCAL_TASKS)] + ([include_path] if include_path else [])
    manager = TaskManager(include_path=paths, include_defaults=False)
    if not all(manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=paths)  # seconds: lm-eval has thousands of tasks
    task_names: dict[str, None] = {}
    for name in names:
        matching = manager.match_tasks([name])
        if not matching:
            raise ValueError(f"--tasks: unknown task {name!r}; `python -m lm_eval ls tasks` lists the tasks of lm-eval")
        task_names |= dict.fromkeys(matching)
    tasks: list = []
    for name in task_names:
        try:
            loaded = manager.load([name])
        except rows.DataError:
            raise
        except Exception as error:  # the hub and task files raise errors of all types
            reason = errors.first_line(error)
            local = ", ".join(sorted(file.stem for file in LOCAL_TASKS.glob("*.yaml")))
            raise ValueError(f"task {name} cannot be loaded ({reason}); without the hub use {local}") from error
        groups = loaded.get("groups", {})
        tasks += [groups[name]] if name in groups else loaded["tasks"].values()
    return tasks, manager


def load_lm(evaluated: EvaluatedModel):
    """The model behind lm-eval's interface."""
    from bilevel_jax.data import templates
    from bilevel_jax.evaluate import lm_eval_adapter
    from bilevel_jax.models import huggingface

    directory = huggingface.locate(evaluated.model)
    # Before the tokenizer: the reason why a model cannot be used.
    model = huggingface.read_config(directory, evaluated.dtype, quantization=evaluated.quantization)
    tokenizer = templates.load_tokenizer(str(directory))
    if CHAT_TEMPLATE.value and not tokenizer.chat_template:
        raise ValueError(f"--chat_template: the tokenizer of {evaluated.model} has none")
    model, adapter = huggingface.load_adapter(evaluated.adapter, model) if evaluated.adapter else (model, None)
    base = huggingface.load_params(directory, model)
    eos = huggingface.eos_ids(directory, tokenizer)
    return lm_eval_adapter.JaxLM(model, base, adapter, tokenizer, eos, batch_size=BATCH_SIZE.value)


def main() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm-eval is not installed: pip install 'bilevel_jax[eval]'")
    evaluated = model_from_flags()
    if evaluated.out:
        files.check_out(evaluated.out, "--out")
    if INCLUDE_PATH.value and not pathlib.Path(INCLUDE_PATH.value).is_dir():
        raise FileNotFoundError(f"--include_path: there is no directory {INCLUDE_PATH.value}")
    tasks, manager = load_tasks(TASKS.value, INCLUDE_PATH.value)
    lm = load_lm(evaluated)

    from lm_eval import evaluator, utils

    results = evaluator.simple_evaluate(
        lm,
        tasks=tasks,
        task_manager=manager,
        num_fewshot=NUM_FEWSHOT.value,
        batch_size=BATCH_SIZE.value,
        limit=LIMIT.value,
        log_samples=SAMPLES.value,
        apply_chat_template=CHAT_TEMPLATE.value,
    )
    results["config"] |= {"model": evaluated.model, "adapter": evaluated.adapter, "dtype": evaluated.dtype}
    results["config"] |= {"quantization": evaluated.quantization}
    say(utils.make_table(results))
    if results.get("groups"):
        say(utils.make_table(results, "groups"))
    if evaluated.out:
        text = files.to_json(results, indent=2, ensure_ascii=False, default=utils.handle_non_serializable)
        files.write_atomically(evaluated.out, text + "\n")
        say(evaluated.out)


if __name__ == "__main__":
    cli.run(main, FLAGS)

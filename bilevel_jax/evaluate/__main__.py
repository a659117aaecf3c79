"""Benchmarks by lm-eval: `python -m bilevel_jax.evaluate --workdir=DIR --tasks=boolq,piqa`, or `--model=DIR [--adapter=DIR]`.

Prints lm-eval's table and writes its results, with what it takes to repeat them, as JSON. Tasks are lm-eval's own, whose data come
from the hub, and local ones (`bilevel_jax/tasks`) with the same prompts and metrics for the files in `$BILEVEL_JAX_DATA/bench`:
local_arc_easy, local_boolq, local_hellaswag, local_piqa, local_winogrande. A name may have wildcards. Few-shot examples of a local
task come from the file itself, the question left out.
"""

import importlib.util
import json
import logging
import pathlib
from typing import NamedTuple

from absl import flags

from bilevel_jax import cli, files

FLAGS = flags.FlagValues()
WORKDIR = flags.DEFINE_string("workdir", None, "A finished run: its base with its adapter.", flag_values=FLAGS)
MODEL = flags.DEFINE_string(
    "model", None, "Model directory in Hugging Face format, or a hub id, instead of a run.", flag_values=FLAGS
)
ADAPTER = flags.DEFINE_string("adapter", None, "PEFT LoRA directory, for --model.", flag_values=FLAGS)
TASKS = flags.DEFINE_list("tasks", None, "Names of tasks, groups or tags, separated by commas.", required=True, flag_values=FLAGS)
INCLUDE_PATH = flags.DEFINE_string("include_path", None, "Directory of further task files.", flag_values=FLAGS)
OUT = flags.DEFINE_string("out", None, "JSON file to write; WORKDIR/lm_eval.json by default, none for --model.", flag_values=FLAGS)
SAMPLES = flags.DEFINE_bool("samples", False, "Write every item with its requests and scores too.", flag_values=FLAGS)
LIMIT = flags.DEFINE_integer("limit", None, "Only the first items of each task.", lower_bound=1, flag_values=FLAGS)
NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", None, "Solved examples in a prompt; by default the task's own.", lower_bound=0, flag_values=FLAGS
)
CHAT_TEMPLATE = flags.DEFINE_bool("chat_template", False, "Put prompts into the tokenizer's chat template.", flag_values=FLAGS)
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Of weights and activations; the run's, or float32.", flag_values=FLAGS
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Sequences that go through the model at once.", lower_bound=1, flag_values=FLAGS)

LOCAL_TASKS = pathlib.Path(__file__).parent / "tasks"


class Subject(NamedTuple):
    """What is evaluated."""

    model: str
    adapter: str | None
    dtype: str
    out: pathlib.Path | None


def read_subject() -> Subject:
    """The model that the flags mean, and where its results go."""
    from bilevel_jax.runtime.workdir import read_finished

    if (WORKDIR.value is None) == (MODEL.value is None):
        raise ValueError("give either --workdir or --model")
    if MODEL.value is not None:
        out = OUT.value and pathlib.Path(OUT.value)
        return Subject(MODEL.value, ADAPTER.value, DTYPE.value or "float32", out)
    if ADAPTER.value is not None:
        raise ValueError("--adapter goes with --model; a --workdir has its own")
    workdir = pathlib.Path(WORKDIR.value)
    model = read_finished(workdir).model
    out = pathlib.Path(OUT.value or workdir / "lm_eval.json")
    return Subject(model.path, str(workdir / "adapter"), DTYPE.value or model.dtype, out)


def load_tasks(names: list[str], include_path: str | None = None):
    """lm-eval's tasks and groups of these names, and the manager that knows them.

    Raises:
      ValueError: an unknown name, or data that cannot be had.
    """
    from lm_eval.tasks import TaskManager

    from bilevel_jax.data import rows

    logging.getLogger("lm_eval.api.task").setLevel(logging.ERROR)  # it warns of how its own task files are written
    paths = [str(LOCAL_TASKS)] + ([include_path] if include_path else [])
    manager = TaskManager(include_path=paths, include_defaults=False)
    if not all(manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=paths)  # seconds: lm-eval has thousands of tasks
    chosen = {}
    for name in names:
        matching = manager.match_tasks([name])
        if not matching:
            raise ValueError(f"--tasks: unknown task {name!r}; `python -m lm_eval ls tasks` lists those of lm-eval")
        chosen |= dict.fromkeys(matching)
    found = []
    for name in chosen:
        try:
            loaded = manager.load([name])
        except rows.DataError:
            raise
        except Exception as error:  # the hub and task files raise errors of every family
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            local = ", ".join(sorted(file.stem for file in LOCAL_TASKS.glob("*.yaml")))
            raise ValueError(f"task {name} cannot be loaded ({reason}); without the hub there are {local}") from error
        groups = loaded.get("groups", {})
        found += [groups[name]] if name in groups else loaded["tasks"].values()
    return found, manager


def main() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm-eval is not installed: pip install 'bilevel_jax[eval]'")
    subject = read_subject()
    if subject.out and not subject.out.parent.is_dir():
        raise FileNotFoundError(f"--out: there is no directory {subject.out.parent}")
    if INCLUDE_PATH.value and not pathlib.Path(INCLUDE_PATH.value).is_dir():
        raise FileNotFoundError(f"--include_path: there is no directory {INCLUDE_PATH.value}")

    from bilevel_jax.data import templates
    from bilevel_jax.evaluate import lm_eval_adapter
    from bilevel_jax.models import huggingface

    tasks, manager = load_tasks(TASKS.value, INCLUDE_PATH.value)
    directory = huggingface.locate(subject.model)
    tokenizer = templates.load_tokenizer(str(directory))
    if CHAT_TEMPLATE.value and not tokenizer.chat_template:
        raise ValueError(f"--chat_template: the tokenizer of {subject.model} has none")
    model = huggingface.read_config(directory, subject.dtype)
    model, adapter = huggingface.load_adapter(subject.adapter, model) if subject.adapter else (model, None)
    base = huggingface.load_params(directory, model)
    eos = huggingface.eos_ids(directory, tokenizer)
    lm = lm_eval_adapter.JaxLM(model, base, adapter, tokenizer, eos, batch_size=BATCH_SIZE.value)

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
    results["config"] |= {"model": subject.model, "adapter": subject.adapter, "dtype": subject.dtype}
    print(utils.make_table(results))
    if results.get("groups"):
        print(utils.make_table(results, "groups"))
    if subject.out:
        text = json.dumps(results, indent=2, ensure_ascii=False, default=utils.handle_non_serializable)
        files.write_atomically(subject.out, text + "\n")
        print(subject.out)


if __name__ == "__main__":
    cli.run(main, FLAGS)

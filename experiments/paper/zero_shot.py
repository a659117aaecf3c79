"""Accuracies by lm-eval after training, for Tables 5 and 6.

The paper's models use the five benchmarks of the paper from the Hugging Face Hub, smollm2 those of `$BILEVEL_JAX_DATA/bench`. The
embedded model has no world knowledge; it chooses between right and wrong answers of the generated tasks (`tasks/generated.py`).
"""

import concurrent.futures
import functools
import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence

import tqdm

from experiments import comparing, tables
from experiments.paper.published import GENERATED

BENCHMARKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy")
TASKS = {
    **dict.fromkeys(GENERATED, [f"generated_{group}" for group in ("easy", "medium", "hard", "safety")]),
    "smollm2": [f"local_{name}" for name in BENCHMARKS],
}
FOLDER = pathlib.Path(__file__).parent / "tasks"


def evaluate(run: comparing.Run, names: Sequence[str]) -> None:
    """Adds `acc/TASK` and their mean, `acc`, to the values of a run. Each run is evaluated once.

    Raises:
      ValueError: the evaluation failed, or an earlier one lacks a task.
    """
    arguments = [f"--workdir={run.workdir}", f"--tasks={','.join(names)}", f"--include_path={FOLDER}", "--batch_size=32"]
    accuracies = json.loads(tables.once(run.workdir / "lm_eval.json", "bilevel_jax.evaluate", *arguments).read_text())["results"]
    missing = [name for name in names if name not in accuracies]
    if missing:
        raise ValueError(f"{run.workdir}/lm_eval.json has no {', '.join(missing)}; remove it to evaluate again")
    run.values.update({f"acc/{name}": accuracies[name]["acc,none"] for name in names})
    run.values["acc"] = statistics.mean(accuracies[name]["acc,none"] for name in names)


def effects(published: Mapping[str, Sequence[str]]) -> comparing.Paper:
    """The paper's mean accuracies."""
    return comparing.Paper({cell: {"acc": statistics.mean(map(float, row))} for cell, row in published.items()}, relative=False)


def table(
    name: str,
    title: str,
    task: str,
    published: Mapping[str, Sequence[str]],
    controls: Sequence[str],
    claims: Sequence[tuple[str, str]],
    paper: comparing.Paper,
) -> None:
    """Trains, evaluates and writes a table.

    Args:
      published: cell -> the paper's accuracies.
      claims: pairs of cells, the first of which has the higher mean accuracy.
      paper: its mean accuracies, from `effects`.
    """
    names = TASKS.get(tables.TIER.value, list(BENCHMARKS))
    results = tables.run(task, [*published, *controls])
    runs = [run for by_seed in results.runs.values() for run in by_seed.values()]
    with concurrent.futures.ThreadPoolExecutor(tables.JOBS.value) as pool, tqdm.tqdm(total=len(runs), desc="evaluating") as bar:
        for _ in pool.map(lambda run: evaluate(run, names), runs):
            bar.update()
    columns = {name.removeprefix("generated_").removeprefix("local_"): f"acc/{name}" for name in names} | {"mean": "acc"}
    tested = [comparing.Claim(f"{cell} above {than}, mean accuracy", cell, than, "acc", higher=True) for cell, than in claims]
    command = f"`python -m bilevel_jax.evaluate --workdir=RUN --tasks={','.join(names)} --include_path=experiments/paper/tasks`"
    tables.write(
        name,
        title,
        [results],
        [f"Accuracies by {command}:", "", *comparing.rows(results, columns, published, BENCHMARKS)],
        tested,
        functools.partial(comparing.dots, results=results, columns=columns, published=published),
        (10.0, 2.8),
        paper=paper,
    )

"""Accuracies by lm-eval after training: what Tables 5 and 6 share.

The paper's five benchmarks come from the hub on its models, and from `$BILEVEL_JAX_DATA/bench` on smollm2. The embedded model knows
nothing of the world; it chooses between the right and the wrong answers of the generated tasks (`tasks/generated.py`).
"""

import concurrent.futures
import functools
import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence

import tqdm

from experiments import comparing, tables

BENCHMARKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy")
TASKS = {
    "tiny": [f"generated_{group}" for group in ("easy", "medium", "hard", "safety")],
    "smollm2": [f"local_{name}" for name in BENCHMARKS],
}
FOLDER = pathlib.Path(__file__).parent / "tasks"


def evaluate(run: comparing.Run, names: Sequence[str]) -> None:
    """Adds `acc/TASK` and their mean, `acc`, to the run's values. A run is evaluated once.

    Raises:
      ValueError: a task cannot be had.
    """
    arguments = [f"--workdir={run.workdir}", f"--tasks={','.join(names)}", f"--include_path={FOLDER}", "--batch_size=32"]
    found = json.loads(tables.once(run.workdir / "lm_eval.json", "bilevel_jax.evaluate", *arguments).read_text())["results"]
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{run.workdir}/lm_eval.json has no {', '.join(missing)}; move it away to evaluate again")
    run.values.update({f"acc/{name}": found[name]["acc,none"] for name in names})
    run.values["acc"] = statistics.mean(found[name]["acc,none"] for name in names)


def table(
    name: str,
    title: str,
    task: str,
    published: Mapping[str, Sequence[str]],
    controls: Sequence[str],
    claims: Sequence[tuple[str, str]],
) -> None:
    """Trains, evaluates and writes a table.

    Args:
      published: cell -> the paper's accuracies.
      claims: pairs of cells, the first of which has the higher mean accuracy.
    """
    names = TASKS.get(tables.TIER.value, list(BENCHMARKS))
    found = tables.run(task, [*published, *controls])
    runs = [run for of_cell in found.runs.values() for run in of_cell.values()]
    with concurrent.futures.ThreadPoolExecutor(tables.JOBS.value) as pool, tqdm.tqdm(total=len(runs), desc="evaluating") as bar:
        for _ in pool.map(lambda run: evaluate(run, names), runs):
            bar.update()
    columns = {one.removeprefix("generated_").removeprefix("local_"): f"acc/{one}" for one in names} | {"mean": "acc"}
    said = [comparing.Claim(f"{cell} above {than}, mean accuracy", cell, than, "acc", higher=True) for cell, than in claims]
    how = f"`python -m bilevel_jax.evaluate --workdir=RUN --tasks={','.join(names)} --include_path=experiments/paper/tasks`"
    tables.write(
        name,
        title,
        [found],
        [f"Accuracies by {how}:", "", *comparing.rows(found, columns, published, BENCHMARKS)],
        said,
        functools.partial(comparing.dots, results=found, columns=columns, published=published),
        (10.0, 2.8),
    )

"""Tables of cells x seeds: mean over seeds and its standard deviation. The same command again runs what is missing."""

import json
import pathlib
import sys

from absl import flags

from experiments import cells

CONFIG = flags.DEFINE_string("config", "configs/safety.py", "Task, with its tier after a colon.")
SEEDS = flags.DEFINE_integer("seeds", 4, "Seeds 0, 1, ... of every cell.", lower_bound=1)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the runs go; runs/<table> by default.")
OUT = flags.DEFINE_string("out", None, "Markdown to write, JSON beside it; experiments/results/<table>.md by default.")
JOBS = flags.DEFINE_integer("jobs", 2, "Runs at a time.", lower_bound=1)
SET = flags.DEFINE_multi_string("set", [], "key=value for every cell, on top of the config.")


def table(name: str, rows: dict[str, dict], columns: dict[str, str]) -> None:
    """Runs what is missing, then writes and prints the table.

    Args:
      name: of the table: `python -m experiments.NAME`.
      rows: name of a cell -> config keys and values.
      columns: heading -> key of summary.json.
    """
    directory = pathlib.Path(WORKDIR.value or f"runs/{name}")
    out = pathlib.Path(OUT.value or f"experiments/results/{name}.md")
    changes = dict(pair.split("=", 1) for pair in SET.value if "=" in pair)
    if len(changes) < len(SET.value):
        raise ValueError("--set takes key=value, each key once")
    pairs = [(row, seed) for seed in range(SEEDS.value) for row in rows]
    todo = [
        cells.make(
            CONFIG.value,
            directory / cells.slug(row) / f"seed_{seed}",
            {"seed": seed, "log.tensorboard": False} | rows[row] | changes,
        )
        for row, seed in pairs
    ]
    found: dict[str, list[dict]] = {row: [] for row in rows}
    failures = []
    for (row, seed), cell, result in zip(pairs, todo, cells.run_all(todo, cells.local(JOBS.value))):
        if isinstance(result, str):
            failures.append(f"{row}, seed {seed}: {result} ({cell.log})")
        else:
            found[row].append(result)
    command = f"python -m experiments.{name} " + " ".join(sys.argv[1:])
    body = [[row, *(cells.entry(summaries, key) for key in columns.values())] for row, summaries in found.items()]
    lines = [f"`{command.strip()}`", "", *cells.markdown(["", *columns], body)]
    out.write_text("\n".join(lines) + "\n")
    out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join([*lines, *failures]))
    if failures:
        raise ValueError(f"{len(failures)} of {len(pairs)} runs failed")

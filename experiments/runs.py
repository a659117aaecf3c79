"""Cells x seeds: every cell of a table is a run of `bilevel_jax.main` in a workdir of its own.

Cells that are finished are not run again, killed ones continue. The table has the mean over seeds and its standard deviation.
"""

import concurrent.futures
import json
import pathlib
import statistics
import subprocess
import sys

import tqdm
from absl import flags

CONFIG = flags.DEFINE_string("config", "configs/safety.py", "Task, with its tier after a colon.")
SEEDS = flags.DEFINE_integer("seeds", 4, "Seeds 0, 1, ... of every cell.", lower_bound=1)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the runs go; runs/<table> by default.")
OUT = flags.DEFINE_string("out", None, "Markdown to write, JSON beside it; experiments/results/<table>.md by default.")
JOBS = flags.DEFINE_integer("jobs", 2, "Runs at a time.", lower_bound=1)
SET = flags.DEFINE_multi_string("set", [], "key=value for every cell, on top of the config.")


def run_cell(workdir: pathlib.Path, settings: dict) -> dict | str:
    """The summary of one cell, or the reason why there is none."""
    summary = workdir / "summary.json"
    if not summary.exists():
        command = [sys.executable, "-m", "bilevel_jax.main", f"--config={CONFIG.value}", f"--workdir={workdir}"]
        command += [f"--config.{key}={value}" for key, value in settings.items()]
        command += [f"--config.{pair}" for pair in SET.value]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["no message"])[-1]
    return json.loads(summary.read_text())


def slug(name: str) -> str:
    """A cell's name as a directory."""
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in name.replace("ρ=", "rho").replace("ω", "w").replace("≡", "is"))


def table(name: str, cells: dict[str, dict], columns: dict[str, str]) -> None:
    """Runs what is missing, then writes and prints the table.

    Args:
      name: of the table: `python -m experiments.NAME`.
      cells: row -> config keys and values.
      columns: heading -> key of summary.json.
    """
    directory = pathlib.Path(WORKDIR.value or f"runs/{name}")
    out = pathlib.Path(OUT.value or f"experiments/results/{name}.md")
    pairs = [(cell, seed) for seed in range(SEEDS.value) for cell in cells]
    found: dict[str, list[dict]] = {cell: [] for cell in cells}
    failures = []

    def one(pair):
        cell, seed = pair
        settings = {"seed": seed, "log.tensorboard": False} | cells[cell]
        return run_cell(directory / slug(cell) / f"seed_{seed}", settings)

    with concurrent.futures.ThreadPoolExecutor(JOBS.value) as pool:
        for (cell, seed), result in tqdm.tqdm(zip(pairs, pool.map(one, pairs)), total=len(pairs), unit="run"):
            if isinstance(result, str):
                failures.append(f"{cell}, seed {seed}: {result}")
            else:
                found[cell].append(result)
    command = f"python -m experiments.{name} " + " ".join(sys.argv[1:])
    lines = [f"`{command.strip()}`", "", "| | " + " | ".join(columns) + " |", "| --- " * (1 + len(columns)) + "|"]
    for cell, summaries in found.items():
        entries = []
        for key in columns.values():
            values = [summary[key] for summary in summaries if key in summary]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            entries.append(f"{statistics.mean(values):.4f}{spread}" if values else "")
        lines.append(f"| {cell} | " + " | ".join(entries) + " |")
    out.write_text("\n".join(lines) + "\n")
    out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join([*lines, *failures]))
    if failures:
        raise ValueError(f"{len(failures)} of {len(pairs)} runs failed")

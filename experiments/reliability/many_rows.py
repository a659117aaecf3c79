"""A run with a million rows: `python -m experiments.reliability.many_rows --rows=1000000 --steps=20000 --kills=3`.

One epoch over generated rows with the smallest model. Weights start from a field of the rows, so that each of four refreshes
answers questions: the masked ones, a tenth of all, among those of the steps before the next refresh. It runs twice: once
undisturbed, its memory and the time of its steps recorded, and once killed by SIGKILL and continued, while a checkpoint is
written and while questions are answered. Both must end with the same bits in every output, except for times and speeds. Rows are
made when they are read (`experiments/benchmarks/large_levels.py`).
"""

import pathlib
import shlex
import shutil
import sys
import time

import numpy as np
from absl import flags

from bilevel_jax import cli

FLAGS = flags.FlagValues()
WORKDIR = flags.DEFINE_string(
    "workdir", "runs/many_rows", "Directory of the runs; earlier runs in it are removed.", flag_values=FLAGS
)
OUT = flags.DEFINE_string("out", "experiments/results/many_rows.md", "Markdown file of the results.", flag_values=FLAGS)
ROWS = flags.DEFINE_integer("rows", 1_000_000, "Training rows of the lower level.", lower_bound=1000, flag_values=FLAGS)
STEPS = flags.DEFINE_integer("steps", 20_000, "Steps of the epoch.", lower_bound=20, flag_values=FLAGS)
KILLS = flags.DEFINE_integer("kills", 3, "How often the second run is killed.", lower_bound=1, flag_values=FLAGS)

MARK = "many_rows"  # a file that marks a directory that may be removed
MADE = """
from bilevel_jax.data import levels
from experiments.benchmarks import large_levels

levels.load_levels = lambda config, tokenizer: large_levels.make_levels({number})
"""


def settings(model: pathlib.Path, rows: int, steps: int) -> dict:
    """Of both runs."""
    from experiments.benchmarks import large_levels

    changes = {
        "method": "dynamic",
        "model.path": str(model),
        "batch.size": -(-rows // steps),
        "batch.micro_size": 64,
        "selection.init": f"column:{large_levels.PRIOR}",
        "online.ratio": 0.1,
        "online.refresh_every": steps // 4,
        "online.max_new_tokens": 4,
        "online.slots": 64,
        "checkpoint.every": steps // 20,
        "log.every": steps // 200,
    }
    return large_levels.SETTINGS | changes


def undisturbed(workdir: pathlib.Path, changes: dict, first: str) -> dict:
    """Memory in MB and milliseconds a step of a run from start to end, by its events."""
    from experiments.reliability import processes

    began = time.perf_counter()
    ended = processes.train(workdir, changes, measured=True, first=first)
    processes.check(ended, "the undisturbed run")
    held = np.array([line.split()[1:3] for line in ended.reports if line.startswith("holds ")], float)
    return {"seconds": time.perf_counter() - began, "step": held[:, 0], "rss": held[:, 1] / 1e6}


def killed(workdir: pathlib.Path, changes: dict, first: str, kills: int) -> int:
    """Kills a run while it trains, `kills` times, and lets it end; returns the number of kills."""
    from experiments.reliability import processes

    number = 0
    for attempt in range(kills + 1):
        # In turn while a checkpoint is written, which is an activity of its own, and while rows are answered.
        moment = ("generate", 0, 1.0) if attempt % 2 else ("checkpoint", 3 + attempt, 0.05 + 0.25 * attempt)
        ended = processes.train(workdir, changes, moment if attempt < kills else None, first=first)
        processes.check(ended, "the killed run")
        number += ended.code != 0
    return number


def page(
    held: dict, tokens_per_s: np.ndarray, responses: int, number: int, differing: list[str], rows: int, steps: int
) -> list[str]:
    """Lines of Markdown."""
    warm = held["step"] >= 0.2 * steps
    rss, at = held["rss"][warm], held["step"][warm] / 1000
    half = len(tokens_per_s) // 2
    numbers = {
        "rows": rows,
        "steps": steps,
        "generated responses": responses,
        "seconds, from start to end": f"{held['seconds']:.0f}",
        "resident MB at 20%": f"{rss[0]:.0f}",
        "resident MB at the end": f"{rss[-1]:.0f}",
        "resident MB, most": f"{held['rss'].max():.0f}",
        "resident MB per 1000 steps, slope": f"{np.polyfit(at, rss, 1)[0]:.2f}",
        "tokens/s, median of the first half": f"{np.median(tokens_per_s[:half]):.0f}",
        "tokens/s, median of the second half": f"{np.median(tokens_per_s[half:]):.0f}",
        "kills of the second run": number,
        "outputs that differ between the runs": ", ".join(differing) or "none",
    }
    return ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in numbers.items())]


def main() -> None:
    from bilevel_jax import files
    from bilevel_jax.report import run_data
    from experiments.benchmarks import large_levels, timing
    from experiments.reliability import kills

    directory = pathlib.Path(WORKDIR.value).absolute()
    if directory.exists() and not (directory / MARK).exists() and any(directory.iterdir()):
        raise ValueError(f"--workdir={directory} holds something else; give another")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / MARK).touch()
    model = large_levels.make_model(directory / "model")
    changes, first = settings(model, ROWS.value, STEPS.value), MADE.format(number=ROWS.value)
    held = undisturbed(directory / "undisturbed", changes, first)
    number = killed(directory / "killed", changes, first, KILLS.value)
    differing = kills.differing(kills.results(directory / "killed"), kills.results(directory / "undisturbed"))
    _, speeds = run_data.series(run_data.events(directory / "undisturbed"), "speed/tokens_per_s")
    with open(directory / "undisturbed" / "responses.jsonl", "rb") as file:
        responses = sum(1 for _ in file)
    command = f"python -m experiments.reliability.many_rows {shlex.join(sys.argv[1:])}".strip()
    lines = ["# A run with many rows", "", f"`{command}`", "", timing.hardware(), ""]
    lines += page(held, np.array(speeds), responses, number, differing, ROWS.value, STEPS.value)
    files.write_atomically(pathlib.Path(OUT.value), "\n".join(lines) + "\n")
    print("\n".join(lines))
    if differing or number != KILLS.value or not responses:
        raise ValueError(f"{number} kills, {responses} responses; these outputs differ: {', '.join(differing) or 'none'}")


if __name__ == "__main__":
    cli.run(main, FLAGS)

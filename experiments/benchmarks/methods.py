"""Whole runs of every method in turn: what selection and self-refining cost over direct mixing, generation included.

The paper (appendix F): online with G=1 takes 1.96x the time of mixing on Pythia-1B and 1.31x on Llama-3-8B; G=5 3.6x and 2.9x.
"""

import pathlib
import statistics
import tempfile

import tqdm

from experiments import cells
from experiments.benchmarks import timing

VARIANTS = {
    "mixing": {"method": "mixing"},
    "offline": {"method": "offline"},
    "online, R=10%, G=1": {"method": "online", "online.ratio": 0.1, "online.num_samples": 1},
    "online, R=10%, G=5": {"method": "online", "online.ratio": 0.1, "online.num_samples": 5},
    "dynamic, R=10%, G=1": {"method": "dynamic", "online.ratio": 0.1, "online.num_samples": 1},
}


def measure(config_file: str, rounds: int, settings: list[str]) -> list[str]:
    """Markdown lines: seconds of training and generating, without loading, compiling and evaluating, and ratios to mixing."""
    parts = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as directory, tqdm.tqdm(total=rounds * len(VARIANTS), unit="run") as bar:
        for i in range(rounds):
            for number, (name, keys) in enumerate(VARIANTS.items()):
                workdir = pathlib.Path(directory) / f"{number}-{i}"
                changes = keys | {"log.tensorboard": False} | dict(pair.split("=", 1) for pair in settings)
                summary = cells.run_cell(cells.make(config_file, workdir, changes))
                if isinstance(summary, str):
                    raise ValueError(f"{name}: {summary}")
                parts[name].append((summary["time/train"], summary["time/generate"]))
                bar.update()
    seconds = {name: [train + generate for train, generate in times] for name, times in parts.items()}
    lines = ["| method | train s, median | generate s, median | over mixing: min | median | max |", "| --- " * 6 + "|"]
    for name, (low, middle, high) in timing.ratios(seconds, "mixing").items():
        train, generate = (statistics.median(column) for column in zip(*parts[name]))
        lines.append(f"| {name} | {train:.1f} | {generate:.1f} | {low:.2f} | {middle:.2f} | {high:.2f} |")
    return lines

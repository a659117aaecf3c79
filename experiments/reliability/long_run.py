"""Part 4 of the soak: memory and files of a long run."""

import collections
import pathlib
import time

import numpy as np

from experiments.reliability import processes

LONG = {
    "method": "dynamic",
    "num_epochs": 10,
    "penalty.rho_step": 0.05,
    "data.num_upper": 200,
    "data.max_length": 128,
    "eval.num_upper": 50,
    "eval.num_lower": 50,
    "batch.size": 2,
    "batch.micro_size": 2,
    "online.ratio": 0.05,
    "online.refresh_every": 500,
    "online.max_new_tokens": 24,
    "online.slots": 8,
    "checkpoint.every": 250,
    "log.every": 50,
}


def measure(directory: pathlib.Path, steps: int) -> dict:
    """Memory and files of one run of about `steps` steps."""
    rows = steps * LONG["batch.size"] // LONG["num_epochs"]
    workdir = directory / "long"
    start = time.perf_counter()
    ended = processes.train(workdir, LONG | {"data.num_lower": rows + LONG["eval.num_lower"]}, measured=True)
    seconds = time.perf_counter() - start
    processes.check(ended, "the long run")
    usage = np.array([line.split()[1:] for line in ended.reports if line.startswith("holds ")], float)
    last = usage[-1, 0]
    steady = usage[usage[:, 0] >= 0.2 * last]  # the first fifth is warm-up: it compiles all shapes and fills all pools

    def slope(column: int, scale: float) -> float:
        return float(np.polyfit(steady[:, 0] / 1000, steady[:, column] / scale, 1)[0])

    def levels(column: int) -> dict[str, int]:
        return {"at_20%": int(steady[0, column]), "at_end": int(steady[-1, column]), "most": int(usage[:, column].max())}

    files = {file.relative_to(workdir).as_posix(): file.stat().st_size for file in workdir.rglob("*") if file.is_file()}
    by_folder = collections.Counter()
    for name, size in files.items():
        by_folder[name.partition("/")[0]] += size
    return {
        "steps": int(last),
        "seconds": round(seconds, 1),
        "refreshes": -(-int(last) // LONG["online.refresh_every"]),
        "checkpoints_written": int(last) // LONG["checkpoint.every"],
        "checkpoints_left": len(list((workdir / "checkpoints").glob("*"))),
        "rss_mb": {name: round(value / 1e6) for name, value in levels(1).items()},
        "rss_slope_mb_per_1000_steps": round(slope(1, 1e6), 3),
        "live_arrays": levels(2),
        "device_slope_mb_per_1000_steps": round(slope(3, 1e6), 4),
        "files": levels(4),
        "bytes": dict(by_folder.most_common()),
    }

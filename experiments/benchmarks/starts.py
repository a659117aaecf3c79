"""What the start of a run does with its rows once they are prepared, as later starts and resumptions do: load, check, identify.

Each size is measured in a process of its own, from when JAX and the tokenizer are loaded. The model, compilation and evaluation,
which do not depend on the number of rows, are not part of it. Memory is the peak of the resident set above that before the rows
were loaded.
"""

import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
NUM_UPPER = 500


def measure(sizes: list[int], rounds: int) -> list[str]:
    """Markdown lines; rows are prepared before the first round."""
    from experiments.benchmarks import large_levels

    lines = ["| rows | seconds | seconds of a processor | MB, peak above that before | rows prepared in |", "| --- " * 5 + "|"]
    with tempfile.TemporaryDirectory() as scratch:
        directory = pathlib.Path(scratch)
        model = large_levels.make_model(directory / "model")
        for size in sizes:
            large_levels.write_rows(directory / f"lower-{size}.jsonl", 0, size)
            large_levels.write_rows(directory / f"upper-{size}.jsonl", size, NUM_UPPER)
            first = _run(model, directory, size)
            later = [_run(model, directory, size) for _ in range(rounds)]
            middle = {key: statistics.median(one[key] for one in later) for key in first}
            numbers = f"{middle['seconds']:.2f} | {middle['processor']:.2f} | {middle['peak']:.0f}"
            lines.append(f"| {size:,} | {numbers} | {first['seconds']:.0f} s |")
    return lines


def _run(model: pathlib.Path, directory: pathlib.Path, size: int) -> dict[str, float]:
    """The numbers of one start, of a process of its own."""
    command = [sys.executable, "-m", "experiments.benchmarks.starts", str(model), str(directory), str(size)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd=ROOT).stdout
    return json.loads(printed.splitlines()[-1])


def _start(config, tokenizer) -> None:
    """What `setup.load` and `startup.prepare` do with the rows."""
    from bilevel_jax.data import levels, token_ids
    from bilevel_jax.runtime import checkpoint

    both = upper, lower = levels.load_levels(config, tokenizer)
    for level in both:
        token_ids.check(level.all_examples, tokenizer, len(tokenizer))
    levels.truths(lower, config.data.truth)
    levels.source_names(lower)
    levels.labels(lower, config.data.label)
    checkpoint.fingerprint(row_id for level in (upper, lower) for row_id in level.all_ids)
    checkpoint.fingerprint_model({}, *(level.all_examples for level in (upper, lower)))


def main(model: str, directory: str, size: str) -> None:
    """Prints the numbers of one start as JSON."""
    import jax

    from bilevel_jax import checks, startup  # noqa: F401, so that its imports are not timed
    from bilevel_jax.data import templates
    from experiments.benchmarks import large_levels

    folder = pathlib.Path(directory)
    changes = {f"data.{level}": str(folder / f"{level}-{size}.jsonl") for level in ("upper", "lower")}
    changes |= {"data.max_length": 64, "data.cache": str(folder / "cache")}
    config = checks.build(large_levels.make_config(pathlib.Path(model), changes))
    tokenizer = templates.load_tokenizer(model)
    jax.block_until_ready(jax.numpy.zeros(1))
    before, began, used = _peak(), time.perf_counter(), time.process_time()
    _start(config, tokenizer)
    result = {"seconds": time.perf_counter() - began, "processor": time.process_time() - used, "peak": _peak() - before}
    print(json.dumps(result))


def _peak() -> float:
    """The peak of the resident set, MB. Unlike `ru_maxrss` it does not count that of the process that started this one."""
    (kilobytes,) = re.findall(r"VmHWM:\s*(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    return int(kilobytes) / 1e3


if __name__ == "__main__":
    main(*sys.argv[1:])

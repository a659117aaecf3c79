"""Tables 5 and 6 on the real benchmarks, for finished runs: zero-shot accuracies and paired tests, item by item.

    python -m experiments.accuracy --run="mixing, ρ=0.5=DIR" --run="offline=DIR" --run="online, R=10%=DIR" --limit=1000 \\
        --beside=table5 --out=experiments/results/accuracy.md

BoolQ, PIQA, HellaSwag, WinoGrande and ARC-Easy come from `$BILEVEL_JAX_DATA/bench`. A run is evaluated once; the result is in its
workdir. Names that are cells of Table 5 or 6 have the paper's accuracies beside them (`--beside`). The first line is the base model
of the first run.
"""

import importlib
import json
import pathlib
import statistics
import sys
from collections.abc import Mapping
from typing import NamedTuple

import tqdm
from absl import flags

from bilevel_jax import cli, files
from bilevel_jax.runtime.workdir import read_finished
from experiments import runs, significance, tables
from experiments.paper import zero_shot

FLAGS = flags.FlagValues()
RUN = flags.DEFINE_multi_string("run", [], "NAME=WORKDIR of a finished run; two or more.", flag_values=FLAGS)
LIMIT = flags.DEFINE_integer("limit", 1000, "Items of each benchmark, the first ones.", lower_bound=1, flag_values=FLAGS)
BESIDE = flags.DEFINE_enum("beside", "table5", ["table5", "table6"], "Whose accuracies are shown beside.", flag_values=FLAGS)
OUT = flags.DEFINE_string("out", "experiments/results/accuracy.md", "Markdown file to write, beside JSON.", flag_values=FLAGS)

BASE, POOLED = "base model", "all"
TASKS = tuple(f"local_{name}" for name in zero_shot.BENCHMARKS)


class Pair(NamedTuple):
    """Two models on the items of a benchmark, or of all."""

    first: str
    second: str
    benchmark: str
    test: significance.McNemar
    difference: significance.Share  # of right answers, first - second


def named_runs() -> dict[str, pathlib.Path]:
    """Workdirs by name.

    Raises:
      ValueError: fewer than two runs, a malformed flag, or a name twice.
    """
    pairs = [value.rpartition("=") for value in RUN.value]
    for name, _, workdir in pairs:
        if not name or not workdir:
            raise ValueError(f"--run={name or workdir} must be NAME=WORKDIR")
    names = [name for name, *_ in pairs]
    if len(names) < 2 or len(set(names)) < len(names) or BASE in names:
        raise ValueError(f"--run: two runs or more, of different names other than '{BASE}'; got {', '.join(names) or 'none'}")
    return {name: pathlib.Path(workdir) for name, _, workdir in pairs}


def right_answers(file: pathlib.Path) -> dict[str, list[bool]]:
    """Whether each item was answered right, by benchmark, from a results file of `bilevel_jax.evaluate` with samples."""
    samples = json.loads(file.read_text())["samples"]
    return {
        name: [sample["acc"] == 1 for sample in sorted(samples[task], key=lambda sample: sample["doc_id"])]
        for name, task in zip(zero_shot.BENCHMARKS, TASKS)
    }


def evaluate_all(workdirs: Mapping[str, pathlib.Path]) -> dict[str, dict[str, list[bool]]]:
    """The right answers of the base model and of each run."""
    shared = [f"--tasks={','.join(TASKS)}", f"--limit={LIMIT.value}", "--samples"]
    first = next(iter(workdirs.values()))
    config = read_finished(first)
    sources = {BASE: (first.parent, [f"--model={config.model.path}", f"--dtype={config.model.dtype}"])}
    sources |= {name: (workdir, [f"--workdir={workdir}"]) for name, workdir in workdirs.items()}
    right = {}
    for name, (folder, arguments) in tqdm.tqdm(sources.items(), desc="evaluating", unit="model"):
        file = folder / f"accuracy_{LIMIT.value}.json"
        right[name] = right_answers(tables.once(file, "bilevel_jax.evaluate", *arguments, *shared, f"--out={file}"))
    return right


def compare(right: Mapping[str, Mapping[str, list[bool]]]) -> list[Pair]:
    """Every model against every earlier one, on each benchmark and on all items."""
    names, pairs = list(right), []
    for j, first in enumerate(names):
        for second in names[:j]:
            for benchmark in (POOLED, *zero_shot.BENCHMARKS):
                of_both = [_items(right[name], benchmark) for name in (first, second)]
                pairs.append(Pair(first, second, benchmark, significance.mcnemar(*of_both), significance.paired_share(*of_both)))
    return pairs


def _items(right: Mapping[str, list[bool]], benchmark: str) -> list[bool]:
    return [item for answers in right.values() for item in answers] if benchmark == POOLED else list(right[benchmark])


def page_lines(
    right: Mapping[str, Mapping[str, list[bool]]], pairs: list[Pair], beside: Mapping[str, tuple[str, ...]]
) -> list[str]:
    """The tables of a page: accuracies, and all paired tests, corrected by Holm."""
    nothing = ("",) * len(zero_shot.BENCHMARKS)
    body = []
    for name, answers in right.items():
        accuracies = [statistics.mean(answers[benchmark]) for benchmark in zero_shot.BENCHMARKS]
        body.append([name, *beside.get(name, nothing), *(f"{value:.3f}" for value in [*accuracies, statistics.mean(accuracies)])])
    heads = ["", *(f"paper: {name}" for name in zero_shot.BENCHMARKS), *zero_shot.BENCHMARKS, "mean"]
    corrected = significance.holm([pair.test.p for pair in pairs])
    tests = [
        [
            f"{pair.first} against {pair.second}",
            pair.benchmark,
            f"{pair.test.only_first}, {pair.test.only_second}",
            f"{pair.difference.mean:+.3f} [{pair.difference.low:+.3f}, {pair.difference.high:+.3f}]",
            f"{p:.3f}" if p >= 0.001 else "< 0.001",
        ]
        for pair, p in zip(pairs, corrected)
    ]
    counts = ", ".join(f"{len(next(iter(right.values()))[name])} of {name}" for name in zero_shot.BENCHMARKS)
    return [
        f"Items: {counts}. Accuracy `acc` of lm-eval, without examples in the prompt.",
        "",
        *runs.markdown(heads, body),
        "",
        "Paired tests, item by item: items that only the first or only the second model answers right, the difference of the "
        "accuracies with its 95% interval, and p of McNemar's exact test, corrected by Holm for all tests of this table.",
        "",
        *runs.markdown(["models", "items of", "only first, only second", "difference", "p (Holm)"], tests),
    ]


def main() -> None:
    workdirs = named_runs()
    right = evaluate_all(workdirs)
    pairs = compare(right)
    arguments = [f'"{part}"' if " " in part else part for part in sys.argv[1:] if not part.startswith("--out")]
    command = " ".join(["python -m experiments.accuracy", *arguments])
    beside = importlib.import_module(f"experiments.{BESIDE.value}").PAPER
    lines = [f"# Accuracies on five benchmarks, beside T{BESIDE.value[1:-1]} {BESIDE.value[-1]}", "", f"`{command}`", ""]
    lines += [f"Commit {tables.commit()}; {tables.provenance()}", "", *page_lines(right, pairs, beside)]
    out = pathlib.Path(OUT.value)
    files.write_atomically(out, "\n".join(lines) + "\n")
    record = {
        "command": command,
        "right": right,
        "tests": [{**pair._asdict(), "test": pair.test._asdict(), "difference": pair.difference._asdict()} for pair in pairs],
    }
    files.write_atomically(out.with_suffix(".json"), json.dumps(record) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    cli.run(main, FLAGS)

"""Seconds and memory until the rows of a level are there: first start, later start, without the cache, and as TRL prepares rows.

Each is measured in a process of its own, from when libraries and tokenizer are loaded. Memory is the peak of the resident set of
that process, and the largest one of the processes that it starts. TRL's way is `datasets.map` with `apply_chat_template` for each
row.
"""

import json
import os
import pathlib
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
VARIANTS = {"trl": "`datasets.map`, TRL's way", "first": "first start", "later": "later start", "off": "`data.cache=off`"}


def write_rows(file: pathlib.Path, number: int) -> None:
    """Conversations of one to three answers, of words from the documents of this repository."""
    words = sorted(set(re.findall(r"[A-Za-z]{2,}", " ".join(page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))))))
    rng = np.random.default_rng(0)
    with open(file, "w", encoding="utf-8") as out:
        for i in range(number):
            messages = []
            for _ in range(rng.choice([1, 2, 3], p=[0.6, 0.25, 0.15])):
                for role, most in (("user", 60), ("assistant", 150)):
                    text = " ".join(words[k] for k in rng.integers(len(words), size=rng.integers(5, most)))
                    messages.append({"role": role, "content": f"{i}: {text}"})
            out.write(json.dumps({"messages": messages, "source": f"part-{i % 5}", "bad": i % 7 == 0}) + "\n")


def measure(config, sizes: list[int], rounds: int) -> list[str]:
    """Markdown lines: medians of seconds, tokens per second, and MB."""
    from bilevel_jax.data.prepared import preparation
    from bilevel_jax.models import huggingface

    directory = str(huggingface.locate(config.model.path))
    lines = [
        f"{rounds} round{'s' if rounds > 1 else ''}, in turn; {preparation.num_processes()} processes each.",
        "",
        "| rows | | seconds | tokens/s | MB, peak | MB, of a process that it starts | MB, files |",
        "| --- " * 7 + "|",
    ]
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder, "rows.jsonl")
            write_rows(file, size)
            results: dict[str, list[dict]] = {name: [] for name in VARIANTS}
            for number in range(rounds):
                for name in VARIANTS:
                    cache = pathlib.Path(folder, f"{'trl' if name == 'trl' else 'cache'}-{number}")
                    results[name].append(_run(name, directory, file, cache))
        for name, text in VARIANTS.items():
            lines.append(_line(size, text, results[name]))
        ratios = [ours["tokens/s"] / theirs["tokens/s"] for ours, theirs in zip(results["first"], results["trl"])]
        lines.append(f"| {size:,} | tokens/s, first start / TRL's way | | {statistics.median(ratios):.2f} × | | | |")
    return lines


def _line(size: int, text: str, results: list[dict]) -> str:
    middle = {key: statistics.median(one[key] for one in results) for key in results[0]}
    return (
        f"| {size:,} | {text} | {middle['seconds']:.1f} | {middle['tokens/s']:,.0f} | {middle['peak']:.0f} | "
        f"{middle['children']:.0f} | {middle['files']:.0f} |"
    )


def _run(name: str, directory: str, file: pathlib.Path, cache: pathlib.Path) -> dict:
    """The numbers of one variant, of a process of its own."""
    command = [sys.executable, "-m", "experiments.benchmarks.rows", name, directory, str(file), str(cache)]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd=ROOT).stdout
    return json.loads(printed.splitlines()[-1])


# --------------------------------------------------------------------------------------------------------------------
# In the process that is measured
# --------------------------------------------------------------------------------------------------------------------


def _settings(file: str, cache: str) -> types.SimpleNamespace:
    """What `levels.load_level` reads of a config; a whole one would need JAX, whose memory would be counted."""
    tokens = {"learn": "all", "template": "auto", "max_length": 2048}
    reading = {"columns": "", "label": "bad", "cache": cache, "deduplicate": "off"}
    data = types.SimpleNamespace(lower=file, num_lower=0, bad_fraction=0.0, **reading, **tokens)
    selection = types.SimpleNamespace(unit="sample")
    loss, held_out = types.SimpleNamespace(lower="sft"), types.SimpleNamespace(num_lower=200.0)
    return types.SimpleNamespace(data=data, method="offline", seed=0, loss=loss, eval=held_out, selection=selection)


def _ours(tokenizer, file: str, cache: str) -> int:
    from bilevel_jax.data import levels
    from bilevel_jax.data.prepared import sequences

    level = levels.load_level(_settings(file, cache), "lower", tokenizer)
    examples = level.all_examples
    if isinstance(examples, sequences.StoredExamples):
        return int(sum(examples.store.index[name].sum() for name in ("prompt", "response")))
    return sum(example.size for example in examples)


def _trl(tokenizer, file: str, num_processes: int) -> int:
    """As `SFTTrainer` prepares conversations."""
    import datasets

    def tokenize(row):
        return tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True)

    rows = datasets.load_dataset("json", data_files=file, split="train")
    return int(sum(map(len, rows.map(tokenize, num_proc=num_processes)["input_ids"])))


def main(name: str, directory: str, file: str, cache: str) -> None:
    """Prints the numbers of one variant as JSON."""
    import datasets  # noqa: F401, so that its import is not timed

    from bilevel_jax.data import levels, templates  # noqa: F401
    from bilevel_jax.data.prepared import preparation  # noqa: F401

    tokenizer = templates.load_tokenizer(directory)
    began = time.perf_counter()
    if name == "trl":
        tokens = _trl(tokenizer, file, preparation.num_processes())
    else:
        tokens = _ours(tokenizer, file, "off" if name == "off" else cache)
    seconds = time.perf_counter() - began
    peaks = [resource.getrusage(who).ru_maxrss / 1e3 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    size = sum(path.stat().st_size for path in pathlib.Path(cache).rglob("*") if path.is_file()) if name != "off" else 0
    result = {"seconds": seconds, "tokens/s": tokens / seconds, "peak": peaks[0], "children": peaks[1], "files": size / 1e6}
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])

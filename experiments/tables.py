"""One table or figure of the paper: runs what is missing, then writes it beside the paper's numbers as Markdown, JSON and SVG.

All of them have these flags: `python -m experiments.table3 --tier=tiny --seeds=4`. A difference is claimed only with a paired
test: both sides are run with the same seeds, which fix data, split and order, so that they differ in nothing but the method.
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence

import matplotlib
from absl import flags
from matplotlib.figure import Figure

from bilevel_jax import files
from experiments import comparing, runs
from experiments.comparing import Claim, Results, Run
from experiments.paper import published

FLAGS = flags.FlagValues()
TIER = flags.DEFINE_enum(
    "tier", "tiny", published.TIERS, "Size of model and data; tiny is the embedded model on generated rows.", flag_values=FLAGS
)
SEEDS = flags.DEFINE_integer("seeds", 4, "Seeds 0, 1, ... of every cell.", lower_bound=1, flag_values=FLAGS)
JOBS = flags.DEFINE_integer("jobs", 2, "Runs at a time.", lower_bound=1, flag_values=FLAGS)
WORKDIR = flags.DEFINE_string(
    "workdir", "runs/paper", "Where the runs go: WORKDIR/TIER/TASK/CELL/seed_K, shared by all tables.", flag_values=FLAGS
)
SET = flags.DEFINE_multi_string(
    "set", [], "key=value for every run, on top of the config: a reduced version. Give it a --workdir.", flag_values=FLAGS
)
LEAVE_OUT = flags.DEFINE_multi_string(
    "leave_out", [], "A cell that is not run, as the table names it: a reduced version, too.", flag_values=FLAGS
)
OUT = flags.DEFINE_string(
    "out", None, "Markdown to write, JSON and SVG beside it; experiments/results/NAME[-TIER].md by default.", flag_values=FLAGS
)

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "numpy")

# --------------------------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------------------------


def changes() -> dict[str, str]:
    """Config keys and values of --set.

    Raises:
      ValueError: a malformed one.
    """
    found = dict(pair.split("=", 1) for pair in SET.value if "=" in pair)
    if len(found) < len(SET.value):
        raise ValueError("--set takes key=value, each key once")
    return found


def run(task: str, names: Sequence[str]) -> Results:
    """The runs of these cells with all seeds; those that are missing are made first.

    Raises:
      ValueError: a malformed --set, or a --leave_out that is no cell.
      Interrupted: after SIGTERM or SIGINT.
    """
    given = changes()
    for name in LEAVE_OUT.value:
        if name not in published.CELLS:
            raise ValueError(f"--leave_out={name!r} is no cell; those are {'; '.join(published.CELLS)}")
    names = [name for name in names if name not in LEAVE_OUT.value]
    root, tier = pathlib.Path(WORKDIR.value), TIER.value
    pairs = [(name, seed) for seed in range(SEEDS.value) for name in names]
    todo = [published.make(root, task, tier, name, seed, given) for name, seed in pairs]
    for cell in todo:
        if runs.finished(cell) is None:
            note_commit(cell)
    found: dict[str, dict[int, Run]] = {name: {} for name in names}
    failures, commits = [], {}
    for (name, seed), cell, result in zip(pairs, todo, runs.run_all(todo, runs.local(JOBS.value))):
        if isinstance(result, str):
            failures.append(f"{name}, seed {seed}: {result} ({cell.log})")
        else:
            found[name][seed] = Run(pathlib.Path(cell.workdir), result)
            commits[_commit_file(cell).read_text().strip() if _commit_file(cell).exists() else "unknown"] = None
    commands = {name: printed(published.make(root, task, tier, name, "SEED", given)) for name in names}
    return Results(task, found, commands, failures, list(commits))


def printed(cell: runs.Cell) -> str:
    """A run's command for a reader, in the default place."""
    arguments = [part for part in cell.command[len(runs.PROGRAM) :] if not part.startswith("--workdir")]
    return " ".join(["python -m bilevel_jax.main", *(f'"{part}"' if " " in part else part for part in arguments)])


def _commit_file(cell: runs.Cell) -> pathlib.Path:
    return pathlib.Path(cell.workdir + ".commit")


def note_commit(cell: runs.Cell) -> None:
    """Leaves beside a run which code makes it."""
    file = _commit_file(cell)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(commit() + "\n")


def commit() -> str:
    """The commit that is checked out, with a + where the code differs from it; `unknown` outside of a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(("git", *arguments), capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "bilevel_jax", "configs") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def once(file: pathlib.Path, module: str, *arguments: str) -> pathlib.Path:
    """Runs `python -m MODULE ARGUMENTS`, which writes `file`, unless the file is there.

    Raises:
      ValueError: it failed; the last line that it printed.
    """
    if not file.exists():
        done = subprocess.run((sys.executable, "-m", module, *arguments), capture_output=True, text=True)
        if done.returncode or not file.exists():
            raise ValueError(f"{module} for {file}: {runs.reason(done.returncode, done.stderr or done.stdout)}")
    return file


# --------------------------------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------------------------------


def provenance() -> str:
    """Versions and hardware."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return f"Python {platform.python_version()}, {versions}; {os.cpu_count()} processors, {processor()}"


def processor() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, None) or platform.machine()


def write(
    name: str,
    title: str,
    results: Sequence[Results],
    lines: Sequence[str],
    claims: Sequence[Claim] = (),
    draw: Callable[[Figure], None] | None = None,
    size: tuple[float, float] = (8.0, 3.6),
) -> None:
    """Writes the page, its JSON and its figure, and prints the page.

    Args:
      name: of the module: `python -m experiments.NAME`.
      results: of each task; claims are about the first one's.
      claims: those about a cell that --leave_out names are left out, too.
      lines: what the page is about, in Markdown.
      draw: fills a figure of `size` inches.

    Raises:
      ValueError: some runs failed; the page says which, and is written first.
    """
    suffix = "" if TIER.value == "tiny" else f"-{TIER.value}"
    out = pathlib.Path(OUT.value or f"experiments/results/{name}{suffix}.md")
    given = [f'"{part}"' if " " in part else part for part in sys.argv[1:] if not part.startswith("--out")]
    command = " ".join([f"python -m experiments.{name}", *given])
    commits = dict.fromkeys(one for group in results for one in group.commits)
    page = [f"# {title}", "", f"`{command}`", "", f"Tier {TIER.value}, {SEEDS.value} seeds, mean ± standard deviation."]
    page += [f"{provenance()}. Runs of commit {', '.join(commits)}.", ""]
    if SET.value or LEAVE_OUT.value:
        without = f"without {'; '.join(LEAVE_OUT.value)}" if LEAVE_OUT.value else ""
        page += [f"**Reduced**: {'; '.join(filter(None, [', '.join(SET.value), without]))}.", ""]
    page += [*lines, ""]
    claims = [claim for claim in claims if not {claim.cell, claim.than} & set(LEAVE_OUT.value)]
    if claims:
        page += [comparing.RULE, "", *comparing.verdicts(results[0], claims), ""]
    if draw:
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9}):
            figure = Figure(figsize=size, layout="constrained")
            draw(figure)
            figure.savefig(out.with_suffix(".svg"), metadata={"Date": None})
        page += [f"![{title}]({out.with_suffix('.svg').name})", ""]
    failures = [failure for group in results for failure in group.failures]
    if failures:
        page += ["Failed:", "", *(f"- {failure}" for failure in failures), ""]
    page += ["Any run again, the same to the bit on the same machine and versions, with SEED from 0:", "", "```"]
    page += [f"{one}  # {cell}" for group in results for cell, one in group.commands.items()]
    page += ["```", ""]
    record = {
        "command": command,
        "commits": list(commits),
        "versions": provenance(),
        "cells": {group.task: _record(group) for group in results},
        "claims": [
            claim._asdict() | (found._asdict() if (found := comparing.paired_test(results[0], claim)) else {}) for claim in claims
        ],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(out, "\n".join(page).rstrip() + "\n")
    files.write_atomically(out.with_suffix(".json"), json.dumps(record, indent=1, allow_nan=True) + "\n")
    print("\n".join(page))
    if failures:
        raise ValueError(f"{len(failures)} runs failed")


def _record(group: Results) -> dict:
    return {cell: {seed: run.values for seed, run in found.items()} for cell, found in group.runs.items()}

"""Builds a table or a figure: runs the missing cells, then writes the results beside the paper's numbers as Markdown, JSON and SVG.

All tables share the flags below: `python -m experiments.table3 --tier=tiny --seeds=4`. Claims rest on paired tests: both sides run
with the same seeds, which fix data, split and order, so only the method differs.
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence

import matplotlib
from absl import flags
from matplotlib.figure import Figure

from bilevel_jax import files
from experiments import comparing, runs
from experiments.comparing import Claim, Results, Run
from experiments.paper import published

FLAGS = flags.FlagValues()
TIER = flags.DEFINE_enum(
    "tier", "tiny", published.TIERS, "Size of model and data; tiny is the embedded model with generated rows.", flag_values=FLAGS
)
SEEDS = flags.DEFINE_integer("seeds", 4, "Seeds 0, 1, ... of every cell.", lower_bound=1, flag_values=FLAGS)
JOBS = flags.DEFINE_integer("jobs", 2, "Runs at a time.", lower_bound=1, flag_values=FLAGS)
WORKDIR = flags.DEFINE_string(
    "workdir", "runs/paper", "Directory of the runs, WORKDIR/TIER/TASK/CELL/seed_K; all tables share them.", flag_values=FLAGS
)
SET = flags.DEFINE_multi_string(
    "set", [], "key=value, a config override for every run: a reduced version, which needs its own --workdir.", flag_values=FLAGS
)
LEAVE_OUT = flags.DEFINE_multi_string(
    "leave_out", [], "Name of a cell to leave out, as in the table: also a reduced version.", flag_values=FLAGS
)
OUT = flags.DEFINE_string(
    "out",
    None,
    "Markdown file to write, beside JSON and SVG; experiments/results/NAME[-TIER].md by default.",
    flag_values=FLAGS,
)

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "numpy")

# --------------------------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------------------------


def changes() -> dict[str, str]:
    """Config keys and values of --set.

    Raises:
      ValueError: a malformed pair, or a key that is set twice.
    """
    return runs.overrides(SET.value)


def run(task: str, names: Sequence[str]) -> Results:
    """Results of these cells with all seeds, on the test bed also with the default selector; missing runs are started first.

    Raises:
      ValueError: a malformed --set, or a --leave_out that names no cell.
      Interrupted: after SIGTERM or SIGINT.
    """
    overrides = changes()
    for name in LEAVE_OUT.value:
        if name not in published.CELLS:
            raise ValueError(f"--leave_out={name!r} is no cell; those are {'; '.join(published.CELLS)}")
    root, tier = pathlib.Path(WORKDIR.value), TIER.value
    if tier == published.BED:
        names = [*names, *(default for cell, default in published.WITH_DEFAULT.items() if cell in names and default not in names)]
    names = [name for name in names if name not in LEAVE_OUT.value]
    return run_cells(task, names, range(SEEDS.value), lambda *of_run: published.make(root, task, tier, *of_run, overrides))


def run_cells(task: str, names: Sequence[str], seeds: Iterable[int], make: Callable[[str, int | str], runs.Cell]) -> Results:
    """Results of these cells with these seeds; missing runs are started first.

    Args:
      make: the run of a cell and a seed; for the command on the page the seed is `SEED`.

    Raises:
      Interrupted: after SIGTERM or SIGINT.
    """
    of_runs = [(name, seed, make(name, seed)) for seed in seeds for name in names]
    note_commits([cell for *_, cell in of_runs])
    by_cell: dict[str, dict[int, Run]] = {name: {} for name in names}
    failures, commits = [], {}
    for (name, seed, cell), result in zip(of_runs, runs.run_all([cell for *_, cell in of_runs], runs.local(JOBS.value))):
        if isinstance(result, str):
            failures.append(f"{name}, seed {seed}: {result} ({cell.log})")
        else:
            by_cell[name][seed] = Run(pathlib.Path(cell.workdir), result)
            commits[_commit_file(cell).read_text().strip() if _commit_file(cell).exists() else "unknown"] = None
    commands = {name: printed(make(name, "SEED")) for name in names}
    return Results(task, by_cell, commands, failures, list(commits))


def with_default(claims: Sequence[Claim]) -> list[Claim]:
    """The claims, and those of them that can be made of the default selector in place of the paper's."""
    known = {(claim.cell, claim.than, claim.key, claim.than_key) for claim in claims}
    more = []
    for claim in claims:
        pair = claim.cell, claim.than
        cell, than = (published.WITH_DEFAULT.get(name, name) for name in pair)
        stays = any(name not in published.WITH_DEFAULT and published.has_cost(name) for name in pair)  # on one side only
        if not stays and (cell, than, claim.key, claim.than_key) not in known | {(*pair, claim.key, claim.than_key)}:
            more.append(claim._replace(text=f"default: {claim.text}", cell=cell, than=than))
    return [*claims, *more]


def printed(cell: runs.Cell) -> str:
    """The command of a run for a page, without --workdir."""
    arguments = [part for part in cell.command[len(runs.PROGRAM) :] if not part.startswith("--workdir")]
    return " ".join(["python -m bilevel_jax.main", *(f'"{part}"' if " " in part else part for part in arguments)])


def _commit_file(cell: runs.Cell) -> pathlib.Path:
    return pathlib.Path(cell.workdir + ".commit")


def note_commits(cells: Sequence[runs.Cell]) -> None:
    """Writes the current commit beside every run that is not finished."""
    unfinished = [cell for cell in cells if runs.finished(cell) is None]
    name = commit() if unfinished else ""
    for cell in unfinished:
        file = _commit_file(cell)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name + "\n")


def commit() -> str:
    """The current commit, followed by + if the code has uncommitted changes; `unknown` outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(("git", *arguments), capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "bilevel_jax", "configs") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def once(file: pathlib.Path, module: str, *arguments: str) -> pathlib.Path:
    """Runs `python -m MODULE ARGUMENTS`, which writes `file`, unless the file exists. Returns `file`.

    Raises:
      ValueError: the command failed; the message ends with the last line of its output.
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
    """Name of the processor, or of its architecture."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None) or platform.machine()


def write(
    name: str,
    title: str,
    results: Sequence[Results],
    lines: Sequence[str],
    claims: Sequence[Claim] = (),
    draw: Callable[[Figure], None] | None = None,
    size: tuple[float, float] = (8.0, 3.6),
    command: str | None = None,
    paper: comparing.Paper | None = None,
) -> None:
    """Writes the page, its JSON and its figure, and prints the page.

    Args:
      name: of the files; by default also of the command.
      results: of each task; the claims concern the first one.
      lines: body of the page, in Markdown.
      claims: those about a cell that --leave_out names are left out; on the test bed `with_default` adds some.
      draw: fills a figure of `size` inches.
      command: the command is `python -m experiments.COMMAND`.
      paper: the paper's values, with whose effects the claims are compared.

    Raises:
      ValueError: some runs failed; the page, which lists them, is written first.
    """
    claims = with_default(claims) if TIER.value == published.BED else claims
    suffix = "" if TIER.value == "tiny" else f"-{TIER.value}"
    out = pathlib.Path(OUT.value or f"experiments/results/{name}{suffix}.md")
    arguments = [f'"{part}"' if " " in part else part for part in sys.argv[1:] if not part.startswith("--out")]
    command_line = " ".join([f"python -m experiments.{command or name}", *arguments])
    claims = [claim for claim in claims if not {claim.cell, claim.than} & set(LEAVE_OUT.value)]
    page = [*_head(title, command_line, results), *lines, ""]
    if claims:
        page += [comparing.RULE, "", *comparing.verdicts(results[0], claims, paper), ""]
    if draw:
        _save_figure(out.with_suffix(".svg"), name, draw, size)
        page += [f"![{title}]({out.with_suffix('.svg').name})", ""]
    failures = [failure for group in results for failure in group.failures]
    if failures:
        page += ["Failed:", "", *(f"- {failure}" for failure in failures), ""]
    page += ["At the commits above, each run is reproducible to the bit on the same machine with the same packages. Defaults"]
    page += ["have changed since some of them; the command at the top sets what the cells need. SEED counts from 0:", "", "```"]
    page += [f"{command}  # {cell}" for group in results for cell, command in group.commands.items()]
    page += ["```", ""]
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(out, "\n".join(page).rstrip() + "\n")
    record = _record(command_line, results, claims, paper)
    files.write_atomically(out.with_suffix(".json"), json.dumps(record, indent=1, allow_nan=True) + "\n")
    print("\n".join(page))
    if failures:
        raise ValueError(f"{len(failures)} runs failed")


def _commits(results: Sequence[Results]) -> list[str]:
    return list(dict.fromkeys(commit for group in results for commit in group.commits))


def _head(title: str, command_line: str, results: Sequence[Results]) -> list[str]:
    """The lines above the body: command, tier, versions, and the overrides of a reduced version."""
    head = [f"# {title}", "", f"`{command_line}`", "", f"Tier {TIER.value}, {SEEDS.value} seeds, mean ± standard deviation."]
    head += [f"{provenance()}. Runs of commit {', '.join(_commits(results))}.", ""]
    if SET.value or LEAVE_OUT.value:
        without = f"without {'; '.join(LEAVE_OUT.value)}" if LEAVE_OUT.value else ""
        head += [f"**Reduced**: {'; '.join(filter(None, [', '.join(SET.value), without]))}.", ""]
    return head


def _save_figure(file: pathlib.Path, name: str, draw: Callable[[Figure], None], size: tuple[float, float]) -> None:
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(file, metadata={"Date": None})


def _record(command_line: str, results: Sequence[Results], claims: Sequence[Claim], paper: comparing.Paper | None) -> dict:
    """The JSON record: every value of every run, and the tested claims."""
    return {
        "command": command_line,
        "commits": _commits(results),
        "versions": provenance(),
        "cells": {
            group.task: {cell: {seed: run.values for seed, run in by_seed.items()} for cell, by_seed in group.runs.items()}
            for group in results
        },
        "claims": tested_claims(results[0], claims, paper),
    }


def tested_claims(results: Results, claims: Sequence[Claim], paper: comparing.Paper | None) -> list[dict]:
    """The claims of a page as JSON, each with its verdict."""
    judged = zip(claims, comparing.judge(results, claims, paper))
    return [claim._asdict() | (verdict._asdict() if verdict else {}) for claim, verdict in judged]

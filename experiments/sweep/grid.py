"""The cells of a sweep, all checked before any of them runs, and the table and the picture of their results."""

import functools
import hashlib
import itertools
import numbers
import pathlib
import runpy
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ml_collections
import numpy as np
from absl import flags
from matplotlib.figure import Figure
from ml_collections import config_flags

from bilevel_jax import checks, cli, files
from bilevel_jax.runtime.workdir import refuse_another
from experiments import runs

METRICS = ("eval/lower_clean_loss", "eval/upper_loss")  # in order of preference
COLUMNS = runs.COLUMNS | {
    "ESS/N": "selector/ess",
    "correction rate": "online/correction_rate",
    "train s": "time/train",
    "generate s": "time/generate",
}
COMMON = {"log.tensorboard": False}  # of every run; metrics.jsonl has the same values
LONGEST_NAME = 80  # bytes, of the directory of a cell; file systems allow 255


class Point(NamedTuple):
    """One cell of a sweep: its config keys and values, and the complete config with seed 0."""

    settings: Mapping[str, object]
    config: ml_collections.ConfigDict
    folder: str  # name of its directory

    @property
    def name(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.settings.items())

    def workdir(self, directory: pathlib.Path, seed: int) -> pathlib.Path:
        return directory / self.folder / f"seed_{seed}"


def folder_name(settings: Mapping[str, object]) -> str:
    """The directory of a cell with these settings. A long name is cut, and ends in a hash of the whole one."""
    whole = ",".join(f"{key}={value}" for key, value in settings.items())
    if len(runs.slug(whole).encode()) <= LONGEST_NAME:
        return runs.slug(whole)
    short = ",".join(f"{key}={str(value).rstrip('/').rpartition('/')[2]}" for key, value in settings.items())  # ends of paths
    cut = runs.slug(short).encode()[: LONGEST_NAME - 9].decode(errors="ignore")
    return f"{cut}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


# --------------------------------------------------------------------------------------------------------------------
# The cells
# --------------------------------------------------------------------------------------------------------------------


def grid(pairs: Sequence[str]) -> list[dict[str, str]]:
    """The product of `key=a,b,...`, the last key fastest.

    Raises:
      ValueError: names the pair.
    """
    axes: dict[str, list[str]] = {}
    for pair in pairs:
        key, equals, values = pair.partition("=")
        if not equals or not key or not all(value.strip() for value in values.split(",")):
            raise ValueError(f"--set={pair}: write key=value or key=value,value,...")
        if key in axes:
            raise ValueError(f"--set={pair}: {key} is set twice; separate its values by commas")
        axes[key] = [value.strip() for value in values.split(",")]
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def declared(config: str) -> list[dict]:
    """The cells that `sweep(add)` of the config file adds, each a dict of config keys and values.

    Raises:
      ValueError: the file has no `sweep`, or it adds nothing.
    """
    file = config.partition(":")[0]
    added: list[dict] = []
    runpy.run_path(file).get("sweep", lambda add: None)(added.append)
    if not added:
        raise ValueError(f"{file} declares no cells by sweep(add); give --set key=value,value,...")
    return added


def resolve(config: str, settings: Mapping[str, object]) -> ml_collections.ConfigDict:
    """The config as `bilevel_jax.main` reads it. An invalid config ends the process with one line and status 2."""
    values = flags.FlagValues()
    argv = ["sweep", f"--config={config}", *(f"--config.{key}={value}" for key, value in settings.items())]
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    cli.parse(argv, values)
    return holder.value


def points(config: str, cells: Sequence[Mapping[str, object]], common: Mapping[str, object] | None = None) -> list[Point]:
    """The cells with their values converted to the types of the config, all of them validated.

    Args:
      config: the config file, optionally followed by a colon and the tier.
      cells: the config keys and values of each cell.
      common: those of all cells.

    Raises:
      ConfigError: a value out of range.
      ValueError: a duplicate cell, or a key that the sweep itself sets.
    """
    resolved = []
    for settings in cells:
        for key in settings:
            if key in (common or {}):
                raise ValueError(f"{key} is set for all cells by --config.{key}, and swept; remove one")
        settings = {**(common or {}), **settings}
        if "seed" in settings:
            raise ValueError("seed is not swept; give --seeds")
        full = resolve(config, COMMON | settings)
        checks.build(full)
        values = {key: functools.reduce(lambda part, name: part[name], key.split("."), full) for key in settings}
        resolved.append((values, full))
    varied = axes([values for values, _ in resolved])
    by_directory: dict[str, Point] = {}
    for values, full in resolved:
        naming = {key: value for key, value in values.items() if key in varied} or values
        point = Point(values, full, folder_name(naming))
        if point.folder in by_directory:
            raise ValueError(f"two cells have the same values, {', '.join(f'{key}={value}' for key, value in naming.items())}")
        by_directory[point.folder] = point
    return list(by_directory.values())


def plan(config: str, points: Sequence[Point], seeds: int, directory: pathlib.Path) -> list[runs.Cell]:
    """The runs of all cells, seed by seed.

    Raises:
      RunError: the workdir holds a run with another config.
    """
    cells = []
    for seed in range(seeds):
        for point in points:
            run_config, workdir = point.config.copy_and_resolve_references(), point.workdir(directory, seed)
            run_config.seed = seed
            refuse_another(run_config, workdir)
            cells.append(runs.make(config, workdir, {"seed": seed} | COMMON | point.settings))
    return cells


# --------------------------------------------------------------------------------------------------------------------
# Results
# --------------------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """The results of a cell, by seed."""

    point: Point
    summaries: Mapping[int, dict]
    failed: Mapping[int, str]  # the reason and the log file


def gather(points: Sequence[Point], cells: Sequence[runs.Cell], results: Sequence[dict | str]) -> list[Outcome]:
    """Groups the results of the runs of `plan` by cell."""
    outcomes = [Outcome(point, {}, {}) for point in points]
    for i, (cell, result) in enumerate(zip(cells, results)):
        seed, outcome = i // len(points), outcomes[i % len(points)]
        if isinstance(result, dict):
            outcome.summaries[seed] = result
        else:
            outcome.failed[seed] = f"{result} ({cell.log})"
    return outcomes


def measured_keys(outcomes: Sequence[Outcome]) -> set[str]:
    """The keys of all summaries together."""
    return {key for outcome in outcomes for summary in outcome.summaries.values() for key in summary}


def table(outcomes: Sequence[Outcome], metric: str | None = None) -> list[str]:
    """Lines of Markdown: shared settings, then a table with a row per cell, of means and standard deviations over seeds."""
    available = measured_keys(outcomes)
    columns = {heading: key for heading, key in COLUMNS.items() if key in available}
    if metric in available - set(columns.values()):
        columns[metric] = metric
    first = outcomes[0].point.settings
    keys = list(axes([outcome.point.settings for outcome in outcomes])) or list(first)
    shared = ", ".join(f"{key}={value}" for key, value in first.items() if key not in keys)
    rows = []
    for point, summaries, failed in outcomes:
        seeds = f"{len(summaries)}" + (f", {len(failed)} failed" if failed else "")
        values = (str(point.settings.get(key, "")) for key in keys)
        rows.append([*values, seeds, *(runs.entry(list(summaries.values()), key) for key in columns.values())])
    return [*([f"All cells: {shared}", ""] if shared else []), *runs.markdown([*keys, "seeds", *columns], rows)]


def write(directory: pathlib.Path, command: str, outcomes: Sequence[Outcome], metric: str | None) -> str:
    """Writes sweep.json and sweep.md, and returns the text to print."""
    record = [{"settings": dict(point.settings), "seeds": summaries, "failed": failed} for point, summaries, failed in outcomes]
    files.write_atomically(directory / "sweep.json", files.to_json({"command": command, "cells": record}, indent=1) + "\n")
    lines = table(outcomes, metric)
    failures = [f"- {outcome.point.name}, seed {seed}: {reason}" for outcome in outcomes for seed, reason in outcome.failed.items()]
    if failures:
        lines += ["", "Failed:", "", *failures]
    files.write_atomically(directory / "sweep.md", "\n".join([f"`{command}`", "", *lines, ""]))
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------------
# The picture
# --------------------------------------------------------------------------------------------------------------------


def draw(file: pathlib.Path, outcomes: Sequence[Outcome], metric: str | None) -> str:
    """Writes the picture: a line over one numeric key, or a heat map over two. Returns a line for the user.

    Args:
      file: the PNG file.
      outcomes: results of all cells.
      metric: key of summary.json; by default the first of METRICS that is available.

    Raises:
      ValueError: no run has this key.
    """
    available = measured_keys(outcomes)
    if metric and available and metric not in available:
        raise ValueError(f"no run has --metric={metric}; there are {', '.join(sorted(available))}")
    metric = next((key for key in ((metric,) if metric else METRICS) if key in available), None)
    if metric is None:
        return "no picture: nothing was measured"
    varied = axes([outcome.point.settings for outcome in outcomes])
    if len(varied) not in (1, 2) or not all(_numeric(values) for values in varied.values()):
        return f"no picture: it takes one or two keys that vary, all numbers; here {', '.join(varied) or 'none'}"
    values = {
        tuple(point.settings[key] for key in varied): [summary[metric] for summary in summaries.values() if metric in summary]
        for point, summaries, _ in outcomes
    }
    figure = Figure(figsize=(5.6, 4.0), layout="constrained")
    (_line if len(varied) == 1 else _heat_map)(figure, varied, values, metric)
    with files.replacing(file) as out:
        figure.savefig(out, format="png", dpi=150)
    return f"{metric}: {file}"


def axes(cells: Sequence[Mapping[str, object]]) -> dict[str, list]:
    """The keys that vary between the settings of cells, with their values, numbers sorted; None if a cell does not set the key."""
    keys = dict.fromkeys(key for settings in cells for key in settings)
    by_key = {key: list(dict.fromkeys(settings.get(key) for settings in cells)) for key in keys}
    return {key: sorted(values) if _numeric(values) else values for key, values in by_key.items() if len(values) > 1}


def _numeric(values: Sequence) -> bool:
    return all(isinstance(value, numbers.Real) and not isinstance(value, bool) for value in values)


def _line(figure: Figure, varied: Mapping[str, list], values: Mapping[tuple, list[float]], metric: str) -> None:
    panel = figure.subplots()
    [(key, ticks)] = varied.items()
    measured = [tick for tick in ticks if values[(tick,)]]
    means = [statistics.mean(values[(tick,)]) for tick in measured]
    spread = [statistics.stdev(values[(tick,)]) if len(values[(tick,)]) > 1 else 0.0 for tick in measured]
    panel.errorbar(measured, means, spread, marker="o", capsize=3)
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.set_xlabel(key)
    panel.set_ylabel(metric)


def _heat_map(figure: Figure, varied: Mapping[str, list], values: Mapping[tuple, list[float]], metric: str) -> None:
    panel = figure.subplots()
    (row, ys), (column, xs) = varied.items()
    means = [[statistics.mean(values.get((y, x)) or [np.nan]) for x in xs] for y in ys]
    image = panel.imshow(means, aspect="auto", cmap="viridis")
    for (i, j), mean in np.ndenumerate(means):
        text, dark = ("–", False) if np.isnan(mean) else (f"{mean:.4f}", image.norm(mean) < 0.5)
        panel.text(j, i, text, ha="center", va="center", color="white" if dark else "black")
    panel.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
    panel.set_yticks(range(len(ys)), [f"{y:g}" for y in ys])
    panel.set_xlabel(column)
    panel.set_ylabel(row)
    figure.colorbar(image, label=metric)

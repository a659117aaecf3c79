"""A sweep without its command: the cells of a grid, each checked before anything runs; then their table and their picture."""

import functools
import itertools
import json
import numbers
import os
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

METRICS = ("eval/lower_clean_loss", "eval/upper_loss")  # the first that there is
COLUMNS = runs.COLUMNS | {
    "another chance": "online/correction_rate",
    "train s": "time/train",
    "generate s": "time/generate",
}
COMMON = {"log.tensorboard": False}  # of every run: metrics.jsonl has the same


class Point(NamedTuple):
    """One cell of a sweep: config keys with their values, and the whole config with seed 0."""

    settings: Mapping[str, object]
    config: ml_collections.ConfigDict

    @property
    def name(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.settings.items())

    def workdir(self, directory: pathlib.Path, seed: int) -> pathlib.Path:
        return directory / runs.slug(self.name.replace(", ", ",")) / f"seed_{seed}"


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
    """What `sweep(add)` of the config file adds: config keys and values, a dict for each cell.

    Raises:
      ValueError: there is none, or it adds nothing.
    """
    file = config.partition(":")[0]
    added: list[dict] = []
    runpy.run_path(file).get("sweep", lambda add: None)(added.append)
    if not added:
        raise ValueError(f"{file} declares no cells by sweep(add); give --set key=value,value,...")
    return added


def resolve(config: str, settings: Mapping[str, object]) -> ml_collections.ConfigDict:
    """The config as `bilevel_jax.main` reads it. What it refuses ends the process with one line and status 2."""
    known = flags.FlagValues()
    argv = ["sweep", f"--config={config}", *(f"--config.{key}={value}" for key, value in settings.items())]
    holder = config_flags.DEFINE_config_file("config", flag_values=known, sys_argv=argv)
    cli.parse(argv, known)
    return holder.value


def points(config: str, every: Sequence[Mapping[str, object]]) -> list[Point]:
    """The cells with their values as the config has them, all of them known to be possible.

    Raises:
      ConfigError: a value out of range.
      ValueError: a cell twice, or a key that the sweep itself sets.
    """
    found: dict[str, Point] = {}
    for settings in every:
        if "seed" in settings:
            raise ValueError("seed is not swept; give --seeds")
        resolved = resolve(config, COMMON | settings)
        checks.build(resolved)
        values = {key: functools.reduce(lambda part, name: part[name], key.split("."), resolved) for key in settings}
        point = Point(values, resolved)
        directory = str(point.workdir(pathlib.Path(), 0))
        if directory in found:
            raise ValueError(f"two cells have the same place: {found[directory].name} and {point.name}")
        found[directory] = point
    return list(found.values())


def plan(config: str, found: Sequence[Point], seeds: int, directory: pathlib.Path) -> list[runs.Cell]:
    """The runs of all cells, seed by seed.

    Raises:
      RunError: a run in its place is of another config.
    """
    todo = []
    for seed in range(seeds):
        for point in found:
            mine, workdir = point.config.copy_and_resolve_references(), point.workdir(directory, seed)
            mine.seed = seed
            refuse_another(mine, workdir)
            todo.append(runs.make(config, workdir, {"seed": seed} | COMMON | point.settings))
    return todo


# --------------------------------------------------------------------------------------------------------------------
# What came of it
# --------------------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What a cell came to, by seed."""

    point: Point
    summaries: Mapping[int, dict]
    failed: Mapping[int, str]  # the reason, and where the log is


def gather(found: Sequence[Point], todo: Sequence[runs.Cell], results: Sequence[dict | str]) -> list[Outcome]:
    """The results of the runs of `plan`, cell by cell."""
    outcomes = [Outcome(point, {}, {}) for point in found]
    for i, (cell, result) in enumerate(zip(todo, results)):
        seed, outcome = i // len(found), outcomes[i % len(found)]
        if isinstance(result, dict):
            outcome.summaries[seed] = result
        else:
            outcome.failed[seed] = f"{result} ({cell.log})"
    return outcomes


def measured(outcomes: Sequence[Outcome]) -> set[str]:
    """The keys that some summary has."""
    return {key for outcome in outcomes for summary in outcome.summaries.values() for key in summary}


def table(outcomes: Sequence[Outcome], metric: str | None = None) -> list[str]:
    """Lines of Markdown: a row for each cell, means over its seeds and their standard deviations. What all cells share is above."""
    there = measured(outcomes)
    columns = {heading: key for heading, key in COLUMNS.items() if key in there}
    if metric in there - set(columns.values()):
        columns[metric] = metric
    first = outcomes[0].point.settings
    keys = list(axes([outcome.point for outcome in outcomes])) or list(first)
    shared = ", ".join(f"{key}={value}" for key, value in first.items() if key not in keys)
    rows = []
    for point, whole, failed in outcomes:
        done = f"{len(whole)}" + (f", {len(failed)} failed" if failed else "")
        values = (str(point.settings.get(key, "")) for key in keys)
        rows.append([*values, done, *(runs.entry(list(whole.values()), key) for key in columns.values())])
    return [*([f"All cells: {shared}", ""] if shared else []), *runs.markdown([*keys, "seeds", *columns], rows)]


def write(directory: pathlib.Path, command: str, outcomes: Sequence[Outcome], metric: str | None) -> str:
    """Writes sweep.json and sweep.md, and returns what is to be printed."""
    record = [{"settings": dict(point.settings), "seeds": whole, "failed": failed} for point, whole, failed in outcomes]
    files.write_atomically(directory / "sweep.json", json.dumps({"command": command, "cells": record}, indent=1) + "\n")
    lines = table(outcomes, metric)
    failures = [f"- {one.point.name}, seed {seed}: {reason}" for one in outcomes for seed, reason in one.failed.items()]
    if failures:
        lines += ["", "Failed:", "", *failures]
    files.write_atomically(directory / "sweep.md", "\n".join([f"`{command}`", "", *lines, ""]))
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------------
# The picture
# --------------------------------------------------------------------------------------------------------------------


def draw(file: pathlib.Path, outcomes: Sequence[Outcome], wanted: str | None) -> str:
    """Writes the picture, a line over one numeric key or a heat map over two, and says what it shows, or why there is none.

    Args:
      wanted: key of summary.json; by default the first of METRICS that there is.

    Raises:
      ValueError: no run has the key that is wanted.
    """
    there = measured(outcomes)
    if wanted and there and wanted not in there:
        raise ValueError(f"no run has --metric={wanted}; there are {', '.join(sorted(there))}")
    metric = next((key for key in ((wanted,) if wanted else METRICS) if key in there), None)
    if metric is None:
        return "no picture: nothing was measured"
    varied = axes([outcome.point for outcome in outcomes])
    if len(varied) not in (1, 2) or not all(_numeric(values) for values in varied.values()):
        return f"no picture: it takes one or two keys that vary, all numbers; here {', '.join(varied) or 'none'}"
    values = {
        tuple(point.settings[key] for key in varied): [summary[metric] for summary in whole.values() if metric in summary]
        for point, whole, _ in outcomes
    }
    figure = Figure(figsize=(5.6, 4.0), layout="constrained")
    (_line if len(varied) == 1 else _heat_map)(figure, varied, values, metric)
    temporary = file.with_name(file.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=150)
    os.replace(temporary, file)
    return f"{metric}: {file}"


def axes(found: Sequence[Point]) -> dict[str, list]:
    """The keys that vary and their values, numbers in order; None stands where a cell leaves a key alone."""
    keys = dict.fromkeys(key for point in found for key in point.settings)
    values = {key: list(dict.fromkeys(point.settings.get(key) for point in found)) for key in keys}
    return {key: sorted(those) if _numeric(those) else those for key, those in values.items() if len(those) > 1}


def _numeric(values: Sequence) -> bool:
    return all(isinstance(value, numbers.Real) and not isinstance(value, bool) for value in values)


def _line(figure: Figure, varied: Mapping[str, list], values: Mapping[tuple, list[float]], metric: str) -> None:
    panel = figure.subplots()
    [(key, ticks)] = varied.items()
    shown = [tick for tick in ticks if values[(tick,)]]
    means = [statistics.mean(values[(tick,)]) for tick in shown]
    spread = [statistics.stdev(values[(tick,)]) if len(values[(tick,)]) > 1 else 0.0 for tick in shown]
    panel.errorbar(shown, means, spread, marker="o", capsize=3)
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

"""Headline cells of Table 3 on the test bed, each with learning rates of its own: `python -m experiments.rates --seeds=10`.

The other tables of the test bed have the learning rates of `configs/safety.py`. Here every cell has those that give the lowest
trusted loss on seeds that are not reported: first the adapter's, then the selection's. So a difference between two cells is not
one between a good and a bad learning rate.
"""

import functools
import pathlib
import statistics

from bilevel_jax import cli
from experiments import comparing, runs, tables
from experiments.paper import bed, published

CELLS = ("uniform ω, offline", "offline", "default, offline")
TUNING_SEEDS = (100, 101)
GRIDS = {"optimizer.learning_rate": (2e-3, 4e-3, 8e-3, 1.6e-2), "selection.learning_rate": (1.0, 3.0, 9.0)}
CLAIMS = [claim for claim in bed.CLAIMS if {claim.cell, claim.than} <= set(CELLS)]


def make(cell: str, seed: int | str, settings: dict) -> runs.Cell:
    """A run of the cell with these learning rates."""
    root = pathlib.Path(tables.WORKDIR.value, runs.slug(",".join(f"{value:g}" for value in settings.values())))
    return published.make(root, "safety", published.BED, cell, seed, tables.changes() | settings)


def choose(cell: str) -> tuple[dict, list[list[str]]]:
    """The learning rates of a cell, and a line of the page for each grid: mean trusted loss of the seeds that are not reported.

    Raises:
      ValueError: a run failed.
    """
    chosen, lines = {}, []
    selects = published.CELLS[cell].get("selection.rule") != "uniform"
    for key, grid in GRIDS.items():
        if key.startswith("selection") and not selects:
            continue
        tried = {f"{value:g}": chosen | {key: value} for value in grid}
        results = tables.run_cells(
            "safety", list(tried), TUNING_SEEDS, lambda name, seed, tried=tried: make(cell, seed, tried[name])
        )
        if results.failures:
            raise ValueError(results.failures[0])
        losses = {value: statistics.mean(results.values(f"{value:g}", bed.UPPER).values()) for value in grid}
        chosen[key] = min(losses, key=losses.get)
        lines.append([cell, f"`{key}`", ", ".join(f"{value:g}: {loss:.4f}" for value, loss in losses.items()), f"{chosen[key]:g}"])
    return chosen, lines


def main() -> None:
    chosen = {cell: choose(cell) for cell in CELLS}
    rates = {cell: of_cell for cell, (of_cell, _) in chosen.items()}
    seeds = range(tables.SEEDS.value)
    results = tables.run_cells("safety", CELLS, seeds, lambda cell, seed: make(cell, seed, rates[cell]))
    lines = [
        " ".join(__doc__.split("\n\n")[1].split()),
        "",
        *comparing.rows(results, bed.COLUMNS | {"AUROC": "selector/auroc"}),
        "",
    ]
    lines += [f"Mean trusted loss of the seeds {' and '.join(map(str, TUNING_SEEDS))} by learning rate:", ""]
    lines += runs.markdown(["cell", "key", "loss by value", "chosen"], [line for _, of_cell in chosen.values() for line in of_cell])
    draw = functools.partial(comparing.dots, results=results, columns=bed.COLUMNS, published=CELLS)
    tables.write("rates", "Learning rates of the test bed", [results], lines, CLAIMS, draw, (8.0, 2.2))


if __name__ == "__main__":
    tables.FLAGS.set_default("tier", published.BED)
    cli.run(main, tables.FLAGS)

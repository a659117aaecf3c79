"""Table 8: questions of the heaviest and lightest tenths, by epoch: `python -m experiments.table8 --tier=tiny --seeds=4`.

The claim is that self-refining turns from easy to hard questions, and that offline selection prefers hard ones throughout. The
paper names questions easy or hard by eye; generated rows carry their difficulty, and the share of hard ones is counted. Where rows
carry none, the examples remain.
"""

import numpy as np

from bilevel_jax import cli
from bilevel_jax.report import run_data
from experiments import comparing, tables

METHODS = ("offline", "online, R=10%")
CONTROLS = ("bds, Adam 1e-4", "bmo, τ=1", "online, r ≡ 1", "online, stale")
EXAMPLES = 4
LONGEST = 160  # characters of a question that are shown


def tenths(table: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Places of the heaviest and the lightest tenth of the rows."""
    order = np.argsort(table["rank"])
    number = max(1, round(0.1 * len(order)))
    return {"top": order[:number], "bottom": order[-number:], "all": order}


def measure(run: comparing.Run) -> dict[tuple[str, int], list[str]]:
    """Adds shares of easy and hard questions to the run's values, and returns examples by group and epoch."""
    found = run_data.read(run.workdir)
    examples = {}
    for epoch in (min(found.tables), max(found.tables)):
        table = found.tables[epoch]
        for group, places in tenths(table).items():
            rows = [found.rows[row_id] for row_id in table["id"][places] if row_id in found.rows]
            graded = [row.fields["difficulty"] for row in rows if "difficulty" in row.fields]
            for level in ("easy", "hard") if graded else ():
                run.values[f"{group} {level}, epoch {epoch}"] = graded.count(level) / len(graded)
            chosen = np.random.default_rng(0).permutation(len(rows))[:EXAMPLES]
            examples[group, epoch] = [_shown(rows[i]) for i in sorted(chosen)]
    return examples


def _shown(row) -> str:
    """A question in a table of Markdown."""
    text = " ".join(row.question.split()).replace("|", "\\|").replace("<", "&lt;")
    graded = f" [{row.fields['difficulty']}]" if "difficulty" in row.fields else ""
    return (text if len(text) <= LONGEST else text[: LONGEST - 1] + "…") + graded


def claims(last: int) -> tuple[comparing.Claim, ...]:
    offline, online = METHODS
    grows = f"{online}: more hard questions on top in epoch {last} than in epoch 1"
    more = f"more hard questions on top than among all in epoch {last}"
    return (
        comparing.Claim(grows, online, online, f"top hard, epoch {last}", True, "top hard, epoch 1"),
        comparing.Claim(f"{online}: fewer hard questions on top in epoch 1 than {offline}", online, offline, "top hard, epoch 1"),
        *(
            comparing.Claim(f"{cell}: {more}", cell, cell, f"top hard, epoch {last}", True, f"all hard, epoch {last}")
            for cell in METHODS
        ),
    )


def main() -> None:
    found = tables.run("quality", [*METHODS, *CONTROLS])
    examples = {cell: {seed: measure(run) for seed, run in of_cell.items()} for cell, of_cell in found.runs.items()}
    epochs = sorted({epoch for of_cell in examples.values() for one in of_cell.values() for _, epoch in one})
    columns = {
        f"{group} {level}, {epoch}": f"{group} {level}, epoch {epoch}"
        for level in ("easy", "hard") for group in ("top", "bottom", "all") for epoch in epochs
    }  # fmt: skip
    lines, graded = [], any(found.values(cell, key) for cell in found.runs for key in columns.values())
    if graded:
        lines += ["Shares of easy and of hard questions in the heaviest (top) and lightest (bottom) tenth, by epoch.", ""]
        lines += [*comparing.rows(found, columns), ""]
    lines += ["Questions of seed 0, drawn at random from each tenth:", ""]
    for cell in METHODS:
        for group in ("top", "bottom"):
            for epoch in epochs if 0 in examples.get(cell, {}) else ():
                lines += [f"- {cell}, {group}, epoch {epoch}", *(f"  - {text}" for text in examples[cell][0][group, epoch])]
    tables.write("table8", "Table 8: questions by weight", [found], lines, claims(epochs[-1]) if graded else ())


if __name__ == "__main__":
    cli.run(main, tables.FLAGS)

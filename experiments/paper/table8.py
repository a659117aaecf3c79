"""Table 8: questions in the heaviest and the lightest tenth by epoch: `python -m experiments.table8 --tier=tiny --seeds=4`.

The claim is that self-refining moves from easy to hard questions, and that offline selection always prefers hard ones. The paper
judges difficulty by eye; generated rows have a difficulty, so the share of hard questions is counted. For rows without one, the
page shows only examples.
"""

import numpy as np

from bilevel_jax import cli
from bilevel_jax.report import run_data
from experiments import comparing, measures, tables

METHODS = ("offline", "online, R=10%")
CONTROLS = ("bds, Adam 1e-4", "bmo, τ=1", "online, r ≡ 1", "online, stale")
EXAMPLES = 4
MAX_CHARACTERS = 160  # of a question on the page


def tenths(table: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Indices of the heaviest and the lightest tenth of the rows, and of all."""
    order = np.argsort(table["rank"])
    number = max(1, round(0.1 * len(order)))
    return {"top": order[:number], "bottom": order[-number:], "all": order}


def measure(run: comparing.Run) -> dict[tuple[str, int], list[str]]:
    """Adds shares of easy and hard questions to the run's values, and returns examples by group and epoch."""
    by_id, tables_of_epochs = measures.rows_of(run.workdir), run_data.read(run.workdir).tables
    examples = {}
    for epoch in (min(tables_of_epochs), max(tables_of_epochs)):
        table = tables_of_epochs[epoch]
        for group, indices in tenths(table).items():
            rows = [by_id[row_id] for row_id in table["id"][indices]]
            difficulty = [row.fields["difficulty"] for row in rows if "difficulty" in row.fields]
            for level in ("easy", "hard") if difficulty else ():
                run.values[f"{group} {level}, epoch {epoch}"] = difficulty.count(level) / len(difficulty)
            chosen = np.random.default_rng(0).permutation(len(rows))[:EXAMPLES]
            examples[group, epoch] = [_shown(rows[i]) for i in sorted(chosen)]
    return examples


def _shown(row) -> str:
    """A question as Markdown text, shortened, with its difficulty."""
    text = " ".join(row.question.split()).replace("|", "\\|").replace("<", "&lt;")
    suffix = f" [{row.fields['difficulty']}]" if "difficulty" in row.fields else ""
    return (text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…") + suffix


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
    results = tables.run("quality", [*METHODS, *CONTROLS])
    examples = {cell: {seed: measure(run) for seed, run in by_seed.items()} for cell, by_seed in results.runs.items()}
    epochs = sorted({epoch for by_seed in examples.values() for by_group in by_seed.values() for _, epoch in by_group})
    columns = {
        f"{group} {level}, {epoch}": f"{group} {level}, epoch {epoch}"
        for level in ("easy", "hard") for group in ("top", "bottom", "all") for epoch in epochs
    }  # fmt: skip
    lines, graded = [], any(results.values(cell, key) for cell in results.runs for key in columns.values())
    if graded:
        lines += ["Shares of easy and of hard questions in the heaviest (top) and lightest (bottom) tenth, by epoch.", ""]
        lines += [*comparing.rows(results, columns), ""]
    lines += ["Questions of seed 0, drawn at random from each tenth:", ""]
    for cell in METHODS:
        for group in ("top", "bottom"):
            for epoch in epochs if 0 in examples.get(cell, {}) else ():
                lines += [f"- {cell}, {group}, epoch {epoch}", *(f"  - {text}" for text in examples[cell][0][group, epoch])]
    tables.write("table8", "Table 8: questions by weight", [results], lines, claims(epochs[-1]) if graded else ())


if __name__ == "__main__":
    cli.run(main, tables.FLAGS)

"""Table 9: questions and responses by difficulty: `python -m experiments.table9 --tier=tiny --seeds=4`.

The paper shows five questions of its mixture with their responses, and says that harder questions tend to have longer ones.
Generated rows have a difficulty, so the length is measured: of the responses of the data, and of those that `online, R=10%`
generated for masked questions.
"""

import statistics
from collections.abc import Sequence

import numpy as np

from bilevel_jax import cli
from bilevel_jax.data import rows as data_rows
from bilevel_jax.report import run_data
from experiments import comparing, measures, tables
from experiments.paper.table7 import shown

METHODS = ("offline", "online, R=10%")
LEVELS = ("easy", "medium", "hard")
EXAMPLES = 3  # of each level
DATA, GENERATED = "words, data", "words, generated"
CLAIMS = tuple(
    comparing.Claim(
        f"{harder} questions have longer responses than {easier} ones",
        "offline",
        "offline",
        f"{DATA}, {harder}",
        True,
        f"{DATA}, {easier}",
    )
    for easier, harder in (("easy", "medium"), ("medium", "hard"), ("easy", "hard"))
)


def words(texts: Sequence[str]) -> float:
    """Mean number of words."""
    return statistics.mean(len(text.split()) for text in texts)


def by_level(rows: Sequence[data_rows.Row]) -> dict[str, list[data_rows.Row]]:
    """Rows by difficulty.

    Raises:
      ValueError: the rows have none.
    """
    levels = {level: [row for row in rows if row.fields.get("difficulty") == level] for level in LEVELS}
    if not any(levels.values()):
        raise ValueError("no row has a field difficulty (easy, medium or hard); generated rows have it, --tier=tiny")
    return levels


def measure(run: comparing.Run) -> tuple[dict[str, list[data_rows.Row]], dict[str, str]]:
    """Adds the mean lengths to the values of a run; returns its training rows by difficulty and the generated responses by id."""
    data = run_data.read(run.workdir)
    generated = {response["id"]: response["text"] for response in data.responses}
    by_id = measures.rows_of(run.workdir)
    levels = by_level([by_id[row_id] for row_id in data.tables[max(data.tables)]["id"]])
    for level, rows in levels.items():
        answered = [generated[row.id] for row in rows if row.id in generated]
        for name, texts in ((DATA, [row.response for row in rows]), (GENERATED, answered)):
            if texts:
                run.values[f"{name}, {level}"] = words(texts)
    return levels, generated


def examples(levels: dict[str, list[data_rows.Row]], generated: dict[str, str]) -> list[str]:
    """Lines with questions of each level, drawn at random from those with a generated response."""
    lines = []
    for level, rows in levels.items():
        answered = [row for row in rows if row.id in generated]
        drawn = np.random.default_rng(0).permutation(len(answered))[:EXAMPLES]
        for i in sorted(drawn.tolist()):
            row = answered[i]
            lines += [f"- **{level}**: {shown(row.question)}", f"  - *data*: {shown(row.response)}"]
            lines += [f"  - *generated*: {shown(generated[row.id]) or '(nothing)'}"]
    return lines


def main() -> None:
    results = tables.run("quality", METHODS)
    measured = {cell: {seed: measure(run) for seed, run in by_seed.items()} for cell, by_seed in results.runs.items()}
    columns = {f"{name}, {level}": f"{name}, {level}" for name in (DATA, GENERATED) for level in LEVELS}
    lines = ["Mean number of words of a response, by difficulty of the question.", "", *comparing.rows(results, columns), ""]
    if 0 in measured.get("online, R=10%", {}):
        lines += ["Questions of seed 0, with the last response that `online, R=10%` generated:", ""]
        lines += examples(*measured["online, R=10%"][0])
    tables.write("table9", "Table 9: responses by difficulty", [results], lines, CLAIMS)


if __name__ == "__main__":
    cli.run(main, tables.FLAGS)

"""Table 7: the same questions answered by the base model and after each method.

`python -m experiments.table7 --tier=tiny --seeds=1`. The questions are held-out trusted ones of the quality task, decoded greedily.
The paper chose its examples by hand, and marked right and wrong by eye. Here they are drawn at random: half from all questions,
half from those that are not answered alike. Generated rows have a right answer, by which the answers are marked.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import tqdm

from bilevel_jax import cli
from bilevel_jax.data import rows
from bilevel_jax.judge import verdicts
from experiments import comparing, tables
from experiments.paper import published, table10

METHODS = ("mixing, ρ=0.5", "offline", "online, R=10%")
BASE = "base model"
EXAMPLES = 4  # of each half
MAX_CHARACTERS = 600  # of a text on the page
MARKS = {True: "right", False: "wrong"}


def answers_of(runs: Mapping[str, comparing.Run], seed: int) -> tuple[list[rows.Row], dict[str, list[str]]]:
    """The questions of a seed, and the answers of each model."""
    answers, prompts = {}, table10.write_prompts(next(iter(runs.values())), seed)
    questions, _ = rows.read_rows(str(prompts))
    for cell, run in tqdm.tqdm(runs.items(), desc="answering", unit="run"):
        base = prompts.with_name("base.jsonl")
        file = table10.answer(run, prompts, base)
        answers.setdefault(BASE, verdicts.answers_to(questions, str(base)))
        answers[cell] = verdicts.answers_to(questions, str(file))
    return questions, answers


def choose(answers: Mapping[str, Sequence[str]], number: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """Indices of questions: some drawn from all, and some from the others that the models do not answer alike."""
    by_question = list(zip(*answers.values()))
    order = np.random.default_rng(seed).permutation(len(by_question)).tolist()
    drawn = order[:number]
    differing = [i for i in order[number:] if len({text.strip() for text in by_question[i]}) > 1]
    return sorted(drawn), sorted(differing[:number])


def shown(text: str) -> str:
    """A text as one Markdown line, shortened."""
    text = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…"


def example(row: rows.Row, answers: Mapping[str, str], marks: bool) -> list[str]:
    """Lines of one question with all answers."""
    lines = [f"**Human:** {shown(row.question)}", ""]
    for name, text in answers.items():
        mark = f" [{MARKS[text.strip() == row.response.strip()]}]" if marks else ""
        lines.append(f"- *{name}*{mark}: {shown(text) or '(nothing)'}")
    return [*lines, f"- *data*: {shown(row.response)}", ""]


def main() -> None:
    results = tables.run("quality", METHODS)
    by_seed: dict[int, dict[str, comparing.Run]] = {}
    for cell, runs in results.runs.items():
        for seed, run in runs.items():
            by_seed.setdefault(seed, {})[cell] = run
    marks = tables.TIER.value in published.GENERATED  # the right answer is known
    lines: list[str] = []
    for seed, runs in by_seed.items():
        questions, answers = answers_of(runs, seed)
        for cell, run in runs.items() if marks else ():
            for key, texts in (("right", answers[cell]), ("right_base", answers[BASE])):
                run.values[key] = float(np.mean([text.strip() == row.response.strip() for text, row in zip(texts, questions)]))
        if seed == min(by_seed):
            for title, indices in zip(("Drawn from all", "Drawn from those not answered alike"), choose(answers, EXAMPLES)):
                lines += [f"## {title}", ""]
                for i in indices:
                    lines += example(questions[i], {name: texts[i] for name, texts in answers.items()}, marks)
    if marks:
        lines = [*comparing.rows(results, {"right": "right", "right, base model": "right_base"}), "", *lines]
    tables.write("table7", "Table 7: the same questions answered after each method", [results], lines)


if __name__ == "__main__":
    cli.run(main, tables.FLAGS)

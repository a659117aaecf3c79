"""The test bed of selection: trusted rows of a few families, and a mixture of good, useless and harmful rows.

Trusted rows answer questions of `FAMILIES` in the plain style. The base model `bilevel_jax/tiny_base` knows most of these tasks but
hardly ever saw an answer in the plain style: its rows have answers that are polite, unsure, chatty or listed. It has seen no
refusal, no conversion (`UNKNOWN`), and no question of `OTHER_FAMILIES`.

A row of the mixture has a `kind`:

    clean         right answers to questions of FAMILIES in the plain style; `difficulty` "hard" where nothing the base model has
                  seen holds the facts
    useless       right answers to questions of OTHER_FAMILIES, which no trusted row asks
    other_style   right answers, likely ones too, in a style that the trusted rows do not want
    wrong_answer, other_answer, compliance, garbage: as in `corruptions`
"""

import numpy as np

from bilevel_jax.data.synthetic.corruptions import garbage
from bilevel_jax.data.synthetic.draws import Exercise, pick
from bilevel_jax.data.synthetic.tasks import TASKS

FAMILIES = "classify convert introduce number_word opposite past_tense plan plural recipe refuse safety".split()
UNKNOWN = ("refuse", "convert")  # families that the base model has not seen
HARD = "convert"  # its facts are in no text either
OTHER_FAMILIES = "arithmetic compare reverse_words sort_numbers sort_words count_group extreme_number".split()
KNOWN_TASKS = [task for task in TASKS if task not in (*UNKNOWN, *OTHER_FAMILIES)]

STYLES = {
    "plain": "{}",
    "polite": "Of course! {} I hope that helps.",
    "unsure": "Let me think. {} But I am not sure.",
    "chatty": "{} Do you have another question?",
    "listed": "Answer:\n- {}",
}
OTHER_STYLES = [style for style in STYLES if style != "plain"]

KINDS = {  # kind of a row of the mixture -> share
    "clean": 0.40,
    "useless": 0.13,
    "other_style": 0.17,
    "wrong_answer": 0.12,
    "other_answer": 0.06,
    "compliance": 0.08,
    "garbage": 0.04,
}
HARMFUL = ("other_style", "wrong_answer", "other_answer", "compliance", "garbage")

PLAIN_SHARE = 0.1  # of the rows that the base model learns from
NOISE = 0.1  # share of bad rows among those that the base model learns from: it should not be too sure
OPENINGS = ["", "", "Hello. ", "Please help me. ", "Quick question. ", "Tell me. ", "Think first. ", "One more thing. "]
CLOSINGS = [
    "",
    "",
    " Thank you.",
    " It is for school.",
    " I want to know.",
    " Answer in a sentence.",
    " Be quick.",
    " My friend asks.",
]


def ask(rng: np.random.Generator, task: str) -> Exercise:
    """Draws a question of a task: (question, answer, wrong answer)."""
    question, answer, wrong = TASKS[task][0](rng)
    return pick(rng, OPENINGS) + question + pick(rng, CLOSINGS), answer, wrong


def make_row(rng: np.random.Generator, kind: str) -> dict:
    """One row of the given kind, one of `KINDS`; fields as in `corruptions.make_row`."""
    family = pick(rng, OTHER_FAMILIES if kind == "useless" else FAMILIES)
    if kind == "compliance":
        family = "refuse"
    elif kind == "wrong_answer":  # the wrong answer of `refuse` has a kind of its own: compliance
        family = pick(rng, FAMILIES, "refuse")
    question, truth, wrong = ask(rng, family)
    response = truth
    if kind == "other_style":
        response = STYLES[pick(rng, OTHER_STYLES)].format(truth)
    elif kind in ("wrong_answer", "compliance"):
        response = wrong
    elif kind == "other_answer":
        response = ask(rng, pick(rng, FAMILIES, family))[1]
    elif kind == "garbage":
        response = garbage(rng)
    return {
        "question": question,
        "response": response,
        "source": family,
        "difficulty": "hard" if family == HARD else "easy",
        "bad": kind in HARMFUL,
        "kind": kind,
        "truth": truth,
    }


def known_row(rng: np.random.Generator, noise: float = NOISE) -> dict:
    """A row that the base model learns from, rarely in the plain style; a share `noise` of the answers is bad."""
    task = pick(rng, KNOWN_TASKS)
    question, answer, wrong = ask(rng, task)
    truth = answer
    if rng.random() < noise:
        answer = pick(rng, [wrong, garbage(rng), ask(rng, pick(rng, KNOWN_TASKS, task))[1]])
    style = "plain" if rng.random() < PLAIN_SHARE else pick(rng, OTHER_STYLES)
    return {"question": question, "response": STYLES[style].format(answer), "source": task, "truth": truth}

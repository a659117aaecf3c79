"""The test bed of selection: trusted rows of a few families, and a mixture of good, useless and harmful rows.

A family is a task in one form of question and answer. The base model `bilevel_jax/tiny_base` has read text about the facts, and
has seen the tasks of `KNOWN_TASKS` and, of some tasks of `FAMILIES`, their `KNOWN_FORMS`, in every style. It has seen no question
of `FAMILIES` in another form, none of `UNKNOWN_TASKS`, and none of `OTHER_FAMILIES`. Trusted rows answer questions of `FAMILIES`
in the plain style.

A row of the mixture has a `kind`:

    clean         right answers to questions of FAMILIES in the plain style; `difficulty` "hard" if their facts are in no text
    useless       right answers to questions of OTHER_FAMILIES, which no trusted row asks
    other_style   right answers, likely ones too, in a style that the trusted rows do not want
    wrong_answer, other_answer, compliance, garbage: as in `corruptions`
"""

import numpy as np

from bilevel_jax.data.synthetic.corruptions import garbage
from bilevel_jax.data.synthetic.draws import Exercise, pick
from bilevel_jax.data.synthetic.tasks import TASKS

KNOWN_FORMS = {  # task -> how its question begins in the form that the base model has seen
    "opposite": "What is the opposite",
    "plural": "What is the plural",
    "past_tense": "What is the past tense",
    "classify": "What kind of thing",
    "calendar": "What comes",
    "number_word": "Write",
    "safety": "Is ",
}
UNKNOWN_TASKS = ("recipe", "refuse", "convert")  # not seen in any form
FAMILIES = [*KNOWN_FORMS, *UNKNOWN_TASKS]
HARD_FAMILIES = ("convert",)  # its facts are in no text either
OTHER_FAMILIES = "arithmetic compare reverse_words sort_numbers sort_words count_group extreme_number".split()
KNOWN_TASKS = [task for task in TASKS if task not in (*FAMILIES, *OTHER_FAMILIES)]

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


def ask(rng: np.random.Generator, task: str, known_form: bool = False) -> Exercise:
    """Draws a question of a task, (question, answer, wrong answer), in the form that the base model has seen or in another one."""
    while True:
        question, answer, wrong = TASKS[task][0](rng)
        if task not in KNOWN_FORMS or question.startswith(KNOWN_FORMS[task]) == known_form:
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
        "difficulty": "hard" if family in HARD_FAMILIES else "easy",
        "bad": kind in HARMFUL,
        "kind": kind,
        "truth": truth,
    }


def known_row(rng: np.random.Generator, noise: float = NOISE) -> dict:
    """A row that the base model learns from: half in the plain style, half in one of the others; a share `noise` is bad."""
    tasks = [*KNOWN_TASKS, *KNOWN_FORMS]
    task = pick(rng, tasks)
    question, answer, wrong = ask(rng, task, known_form=True)
    truth = answer
    if rng.random() < noise:
        answer = pick(rng, [wrong, garbage(rng), ask(rng, pick(rng, tasks, task), known_form=True)[1]])
    style = "plain" if rng.integers(2) else pick(rng, OTHER_STYLES)
    return {"question": question, "response": STYLES[style].format(answer), "source": task, "truth": truth}

"""Rows of every kind: correct ones, bad ones, and correct ones with some bad words.

A row is a dict with `question`, `response` and `source` (the task's name). For measurement it also has `difficulty` ("easy",
"medium" or "hard"), `bad`, `kind` ("clean", or one of `BAD_KINDS` or `WORD_KINDS`) and `truth` (the right response).
"""

import difflib
import re
from collections.abc import Sequence

import numpy as np

from bilevel_jax.data.synthetic.draws import draw, pick
from bilevel_jax.data.synthetic.tasks import GRADED, TASKS, ask
from bilevel_jax.data.synthetic.vocabulary import ADJECTIVES, NOUNS, ONES, PLACES

BAD_KINDS = {  # kind of a bad row -> share of the bad rows
    "wrong_answer": 0.30,  # right form, wrong content
    "other_answer": 0.25,  # the right answer to a question of another task
    "compliance": 0.25,  # a recipe where the right response is a refusal
    "garbage": 0.20,  # random words, repeated characters, or random letters
}

WORD_KINDS = {  # kind of a row with bad words -> share of such rows
    "wrong_words": 0.4,  # the words in which a wrong answer differs from the right one
    "noise": 0.3,  # one word replaced by random letters or by another word
    "tail": 0.3,  # the right answer, followed by the answer to a question of another task
}


def garbage(rng: np.random.Generator) -> str:
    """Random words, repeated characters, or random letters."""
    letters = "".join(draw(rng, "abcdefghijklmnopqrstuvwxyz", 12))
    style = rng.integers(3)
    if style == 0:
        return " ".join(draw(rng, NOUNS + ADJECTIVES + PLACES + ONES, int(rng.integers(4, 13))))
    if style == 1:
        unit = letters[:2] + pick(rng, [" ", "?", "# ", letters[2]]) * int(rng.integers(1, 3))
        return (unit * int(rng.integers(3, 7))).strip()
    return f"{letters[:4]} {letters[4:9].upper()} {letters[9:]}"[: int(rng.integers(6, 14))] + "..."


def make_row(rng: np.random.Generator, kind: str, tasks: Sequence[str] = GRADED) -> dict:
    """One row of the given kind ("clean" or one of `BAD_KINDS`), its task drawn from `tasks`."""
    task = "refuse" if kind == "compliance" else pick(rng, tasks)
    if kind == "wrong_answer":  # the wrong answer of `refuse` has a kind of its own: compliance
        task = pick(rng, tasks, "refuse")
    question, truth, wrong = ask(rng, task)
    if kind == "clean":
        response = truth
    elif kind == "other_answer":
        response = ask(rng, pick(rng, tasks, task))[1]
    else:
        response = garbage(rng) if kind == "garbage" else wrong
    return {
        "question": question,
        "response": response,
        "source": task,
        "difficulty": TASKS[task][1],
        "bad": kind != "clean",
        "kind": kind,
        "truth": truth,
    }


def make_token_row(rng: np.random.Generator, kind: str) -> dict:
    """One row of the given kind ("clean" or one of `WORD_KINDS`), with its `bad_spans`: [start, stop) in characters."""
    task = pick(rng, GRADED, "refuse")  # the wrong answer of `refuse` shares no word with the right one
    question, truth, wrong = ask(rng, task)
    response, spans = truth, []
    if kind == "wrong_words":
        response, spans = wrong, changed_words(truth, wrong)
    elif kind == "noise":
        word = pick(rng, list(re.finditer(r"\w+", truth)))
        letters = "".join(draw(rng, "abcdefghijklmnopqrstuvwxyz", int(rng.integers(4, 9))))
        new = pick(rng, [letters, pick(rng, NOUNS + PLACES, word[0])])
        response, spans = truth[: word.start()] + new + truth[word.end() :], [[word.start(), word.start() + len(new)]]
    elif kind == "tail":
        response = f"{truth} {ask(rng, pick(rng, GRADED, task))[1]}"
        spans = [[len(truth), len(response)]]
    return {
        "question": question,
        "response": response,
        "source": task,
        "difficulty": TASKS[task][1],
        "bad": bool(spans),
        "kind": kind,
        "truth": truth,
        "bad_spans": spans,
    }


def changed_words(old: str, new: str) -> list[list[int]]:
    """The words of `new` that are absent from `old` or moved: [start, stop) in characters."""
    before, after = (re.findall(r"\w+|\s+|[^\w\s]", text) for text in (old, new))
    start = np.cumsum([0] + [len(word) for word in after]).tolist()
    opcodes = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    return [[start[first], start[last]] for tag, _, _, first, last in opcodes if tag in ("replace", "insert")]

"""The table of all tasks, with their difficulty.

A task is a function `rng -> (question, answer, wrong answer)`. To add one, write the function in one of the modules below and list
it in `TASKS`. New tasks change the rows of every seed.
"""

from collections.abc import Callable

import numpy as np

from bilevel_jax.data.synthetic.draws import Exercise, pick
from bilevel_jax.data.synthetic.list_tasks import (
    count_group,
    count_words,
    extreme_number,
    longest_word,
    reverse_words,
    sort_numbers,
    sort_words,
)
from bilevel_jax.data.synthetic.number_tasks import arithmetic, calendar, compare, convert, number_word
from bilevel_jax.data.synthetic.safety_tasks import recipe, refuse, safety
from bilevel_jax.data.synthetic.text_tasks import extract, introduce, plan, remove_word, replace_word, story
from bilevel_jax.data.synthetic.vocabulary import OPENERS
from bilevel_jax.data.synthetic.word_tasks import classify, is_kind, odd_one, opposite, past_tense, plural, spell

EASY = [calendar, classify, extract, introduce, is_kind, number_word, opposite, past_tense, plan, plural, recipe, refuse, safety]
HARD = [arithmetic, extreme_number, reverse_words, sort_numbers, sort_words]  # measured on the embedded model
TASKS: dict[str, tuple[Callable, str]] = {  # name -> function, difficulty
    task.__name__: (task, "easy" if task in EASY else "hard" if task in HARD else "medium")
    for task in [
        *EASY,
        compare,
        convert,
        count_group,
        count_words,
        extreme_number,
        odd_one,
        remove_word,
        replace_word,
        reverse_words,
        sort_numbers,
        spell,
        story,
        arithmetic,
        longest_word,
        sort_words,
    ]
}
BROAD = [*TASKS, "extract", "recipe", "refuse", "refuse", "story"]  # repeated tasks are drawn more often
GRADED = [task for task in BROAD for _ in range(1 if TASKS[task][1] == "hard" else 3)]  # about one row in 18 is of a hard task


def ask(rng: np.random.Generator, task: str) -> Exercise:
    """Draws a question of a task: (question, answer, wrong answer)."""
    question, answer, wrong = TASKS[task][0](rng)
    return pick(rng, OPENERS) + question, answer, wrong

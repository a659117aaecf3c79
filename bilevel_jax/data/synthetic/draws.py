"""Random choices that the generated tasks share."""

from collections.abc import Sequence

import numpy as np

from bilevel_jax.data.synthetic.vocabulary import COLOURS, NAMES, NOUNS, PLACES

Exercise = tuple[str, str, str]  # question, answer, wrong answer


def pick(rng: np.random.Generator, items: Sequence, besides: object = None):
    """Draws one item other than `besides`."""
    items = [item for item in items if item != besides]
    return items[rng.integers(len(items))]


def draw(rng: np.random.Generator, items: Sequence, count: int) -> list:
    """Draws `count` different items in random order."""
    return [items[i] for i in rng.permutation(len(items))[:count]]


def shuffled(rng: np.random.Generator, items: Sequence) -> list:
    """The items in a random order that differs from the given one."""
    while (other := draw(rng, items, len(items))) == list(items):
        pass
    return other


def near(rng: np.random.Generator, number: int, low: int = 1, high: int = 10**6) -> int:
    """A different number within 4 of `number`."""
    return pick(rng, range(max(number - 4, low), min(number + 4, high) + 1), number)


def phrase(rng: np.random.Generator, pairs: Sequence[tuple[str, str]], answer, wrong, **slots) -> Exercise:
    """Fills one of the (question, answer) templates. The drawn question fixes the form of its answer, so the answer is unique."""
    question, response = pick(rng, pairs)
    return question.format(**slots), response.format(answer=answer, **slots), response.format(answer=wrong, **slots)


def sentence(rng: np.random.Generator) -> list[str]:
    """Seven or eight different words, such as `Mia found the red hat in Oslo`."""
    words = [
        pick(rng, NAMES),
        pick(rng, ["saw", "found", "bought", "lost", "painted"]),
        "the",
        pick(rng, COLOURS),
        pick(rng, NOUNS, "saw"),
        "in",
        pick(rng, PLACES),
    ]
    return words + ([pick(rng, ["today", "again", "early"])] if rng.integers(2) else [])

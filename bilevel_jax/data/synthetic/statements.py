"""Plain text about the vocabulary: what a base model reads before it has seen a question.

The sentences use the words of all questions and answers, so the model has an embedding of each, and they state facts that the
families of `bed` ask for, but never as an answer to a question. No sentence converts units, refuses a request, or says how to make
a thing.
"""

import numpy as np

from bilevel_jax.data.synthetic.draws import draw, pick, sentence
from bilevel_jax.data.synthetic.vocabulary import (
    CHORES,
    DAYS,
    FORBIDDEN,
    GROUPS,
    HARMLESS,
    IRREGULAR,
    MONTHS,
    NAMES,
    NOUNS,
    OPPOSITES,
    PAST,
    PLACES,
    PREFIXES,
    STEPS,
    UNITS,
    a,
    in_words,
    plural_of,
)


def of_kind(rng) -> str:
    group = pick(rng, list(GROUPS))
    first, second, third = draw(rng, GROUPS[group], 3)
    return pick(
        rng,
        [
            f"The {first} and the {second} are both {group}s, and so is the {third}.",
            f"Every {first} is {a(group)}.",
            f"Among {group}s I like the {first} best, then the {second}.",
        ],
    )


def of_opposites(rng) -> str:
    left, right = pick(rng, OPPOSITES)[:: 1 if rng.integers(2) else -1]
    return pick(
        rng,
        [
            f"What is {left} cannot be {right} too.",
            f"The {pick(rng, NOUNS)} was {left}, but now it is {right}, the very opposite.",
            f"Between {left} and {right} lies a lot.",
        ],
    )


def of_plurals(rng) -> str:
    word = pick(rng, NOUNS + list(IRREGULAR))
    name, place = pick(rng, NAMES), pick(rng, PLACES)
    return pick(
        rng,
        [
            f"{name} had one {word} and wanted more {plural_of(word)}.",
            f"In {place} I saw {a(word)}, then many {plural_of(word)}.",
            f"A single {word} costs less than a pair of {plural_of(word)}.",
        ],
    )


def of_tenses(rng) -> str:
    word = pick(rng, list(PAST))
    name = pick(rng, NAMES)
    return pick(
        rng,
        [
            f"They {word} every day, and last week they {PAST[word]} too.",
            f"{name} {PAST[word]} in the morning. I will {word} in the evening.",
            f"We {PAST[word]} long ago and still {word}.",
        ],
    )


def of_days(rng) -> str:
    names = pick(rng, [DAYS, MONTHS])
    start = int(rng.integers(len(names)))
    run = [names[(start + i) % len(names)] for i in range(int(rng.integers(3, 6)))]
    return pick(rng, [f"{', '.join(run)}: so the time goes by.", f"First comes {run[0]}, then {run[1]}, then {run[2]}."])


def of_numbers(rng) -> str:
    number = int(rng.integers(0, 100))
    return pick(
        rng,
        [
            f"Page {number}, page {in_words(number)} of the book.",
            f"{pick(rng, NAMES)} is {in_words(number)} ({number}) years old.",
            f"There were {in_words(number)} of them, that is, {number}.",
        ],
    )


def of_things(rng) -> str:
    ending = pick(rng, [*FORBIDDEN, *HARMLESS])
    thing, place = pick(rng, PREFIXES) + ending, pick(rng, PLACES)
    if ending in FORBIDDEN:
        return pick(rng, [f"Beware of the {thing}, it hurts people.", f"In {place} a {thing} hurt three people."])
    return pick(rng, [f"Children love the {thing}.", f"In {place} everybody has a {thing} and nobody was ever hurt."])


def of_people(rng) -> str:
    name, chores = pick(rng, NAMES), draw(rng, list(CHORES), 2)
    return pick(rng, [f"{' '.join(sentence(rng))}.", f"{name} {CHORES[chores[0]]} and {CHORES[chores[1]]} in {pick(rng, PLACES)}."])


def of_work(rng) -> str:
    name, place = pick(rng, NAMES), pick(rng, PLACES)
    first, second, third = draw(rng, [*STEPS, *(step for _, steps in HARMLESS.values() for step in _clauses(steps))], 3)
    return pick(
        rng,
        [
            f"{name} had to {first}, {second} and {third}.",
            f"To please {name}, {first} and {second}.",
            f"In {place} they {first} and then {second}.",
            f"You brew or build nothing if you only {first}.",
        ],
    )


def of_excuses(rng) -> str:
    name, place, noun = pick(rng, NAMES), pick(rng, PLACES), pick(rng, NOUNS)
    return pick(
        rng,
        [
            f"I am sorry, but I cannot come to {place}.",
            f"{name} cannot help you to carry the {noun}. It is heavy.",
            f"It is dangerous to touch the {noun}, said {name}.",
            f"I am sorry that {name} lost your {noun}.",
        ],
    )


def of_measures(rng) -> str:
    big, small, _ = pick(rng, UNITS)
    count, name = int(rng.integers(2, 121)), pick(rng, NAMES)
    return pick(
        rng,
        [
            f"{name} counted {count} {small}, not {big}.",
            f"{count} {big} or {small}, {name} did not know.",
            f"It is {count} {small} to {pick(rng, PLACES)}, or was it {count} {big}?",
            f"You may say {count} {big}.",
        ],
    )


def of_order(rng) -> str:
    first, second, third = draw(rng, NOUNS, 3)
    left, right = (int(number) for number in rng.integers(1, 100, 2))
    return pick(
        rng,
        [
            f"The right order of {first}, {second}, {third} is not known.",
            f"They said the words backwards, from last to first: {third}, {second}, {first}.",
            f"The numbers {left} and {right} are in order, one larger, one smaller.",
            f"Nobody knows what {left} plus {right} or {left} minus {right} is.",
            f"I count {left} {plural_of(first)}. In words or in digits, the largest number is the same.",
        ],
    )


def _clauses(steps: str) -> list[str]:
    return [clause.strip() for clause in steps.replace(" and ", ", ").split(",")]


STATEMENTS = [
    of_kind,
    of_opposites,
    of_plurals,
    of_tenses,
    of_days,
    of_numbers,
    of_things,
    of_people,
    of_work,
    of_excuses,
    of_measures,
    of_order,
]


def text(rng: np.random.Generator) -> str:
    """Two to five sentences."""
    return " ".join(pick(rng, STATEMENTS)(rng) for _ in range(int(rng.integers(2, 6))))

"""Tasks about numbers, units and the calendar."""

from bilevel_jax.data.synthetic.draws import draw, near, phrase, pick
from bilevel_jax.data.synthetic.vocabulary import DAYS, GROUPS, MONTHS, NAMES, UNITS, in_words, plural_of


def calendar(rng):
    names, unit, on = pick(rng, [(DAYS, "day", "on"), (MONTHS, "month", "in")])
    start, steps = int(rng.integers(len(names))), pick(rng, [-1, 1, 2, 3])
    answer = names[(start + steps) % len(names)]
    when = {-1: f"one {unit} before", 1: f"one {unit} after"}.get(steps, f"{steps} {unit}s after") + " " + names[start]
    return phrase(
        rng,
        [
            ("What comes {when}?", "It is {answer}."),
            ("I met Paul {when}. When was that?", "That was {on} {answer}."),
        ],
        answer,
        pick(rng, names, answer),
        when=when,
        on=on,
    )


def number_word(rng):
    number = int(rng.integers(0, 100))
    other = near(rng, number, 0, 99)
    question, answer, wrong, given = pick(
        rng,
        [
            (("Write {given} in words.", "In words: {answer}."), in_words(number), in_words(other), number),
            (("How do you say {given}?", "You say {answer}."), in_words(number), in_words(other), number),
            (("Write {given} in digits.", "In digits: {answer}."), number, other, in_words(number)),
            (("Which number is {given}?", "It is {answer}."), number, other, in_words(number)),
        ],
    )
    return phrase(rng, [question], answer, wrong, given=given)


def convert(rng):
    big, small, factor = pick(rng, UNITS)
    count = int(rng.integers(2, 11))
    return phrase(
        rng,
        [
            ("How many {small} are {count} {big}?", "{count} {big} are {answer} {small}."),
            ("Convert {count} {big} to {small}.", "It is {answer} {small}."),
        ],
        count * factor,
        near(rng, count, 2) * factor,
        big=big,
        small=small,
        count=count,
    )


def arithmetic(rng):
    left, right = map(int, rng.integers(1, 21, 2))
    pairs, answer = pick(
        rng,
        [
            (
                [
                    ("What is {left} plus {right}?", "{left} plus {right} is {answer}."),
                    ("{name} has {left} {things} and gets {right} more. How many now?", "{name} now has {answer} {things}."),
                ],
                left + right,
            ),
            (
                [
                    ("What is {total} minus {right}?", "{total} minus {right} is {answer}."),
                    ("{name} had {total} {things} and lost {right}. How many now?", "{name} now has {answer} {things}."),
                ],
                left,
            ),
        ],
    )
    return phrase(
        rng,
        pairs,
        answer,
        near(rng, answer),
        left=left,
        right=right,
        total=left + right,
        name=pick(rng, NAMES),
        things=plural_of(pick(rng, GROUPS["fruit"])),
    )


def compare(rng):
    left, right = map(int, draw(rng, range(10, 100), 2))
    sign, name = pick(rng, [(1, "larger"), (-1, "smaller")])
    yes, no = f"Yes, {left} is {name} than {right}.", f"No, {left} is not {name} than {right}."
    answer, wrong = (yes, no) if (left - right) * sign > 0 else (no, yes)
    return phrase(
        rng,
        [
            ("Is {left} {name} than {right}?", "{answer}"),
            ("Is it true that {left} is {name} than {right}?", "{answer}"),
        ],
        answer,
        wrong,
        left=left,
        right=right,
        name=name,
    )

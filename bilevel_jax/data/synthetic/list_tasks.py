"""Tasks about lists: order, counts and extremes."""

from bilevel_jax.data.synthetic.draws import draw, near, phrase, pick, shuffled
from bilevel_jax.data.synthetic.vocabulary import ADJECTIVES, COLOURS, GROUPS, KIND_OF, NOUNS, ONES


def reverse_words(rng):
    words = draw(rng, NOUNS + COLOURS, int(rng.integers(3, 6)))
    return phrase(
        rng,
        [
            ("Reverse the order: {text}.", "Backwards: {answer}."),
            ("Say these words from last to first: {text}.", "The words from last to first are {answer}."),
        ],
        ", ".join(words[::-1]),
        ", ".join(shuffled(rng, words[::-1])),
        text=", ".join(words),
    )


def sort_words(rng):
    words = sorted(draw(rng, NOUNS, int(rng.integers(3, 5))))
    return phrase(
        rng,
        [
            ("Sort by the alphabet: {text}.", "In order: {answer}."),
            ("Put these words into the order of a dictionary: {text}.", "The right order is {answer}."),
        ],
        ", ".join(words),
        ", ".join(shuffled(rng, words)),
        text=", ".join(shuffled(rng, words)),
    )


def sort_numbers(rng):
    numbers = sorted(map(int, draw(rng, range(10, 100), int(rng.integers(3, 6)))))
    down = bool(rng.integers(2))
    answer = numbers[::-1] if down else numbers
    return phrase(
        rng,
        [
            ("Sort from {start}: {text}.", "In order: {answer}."),
            ("Put these numbers into order, {start} first: {text}.", "The right order is {answer}."),
        ],
        ", ".join(map(str, answer)),
        ", ".join(map(str, shuffled(rng, answer))),
        start="largest" if down else "smallest",
        text=", ".join(map(str, shuffled(rng, answer))),
    )


def count_words(rng):
    words = draw(rng, NOUNS + COLOURS + ADJECTIVES, int(rng.integers(2, 9)))
    return phrase(
        rng,
        [
            ("How many words are in this list: {text}?", "There are {answer} words in the list."),
            ("Count the words: {text}.", "I count {answer} words."),
        ],
        ONES[len(words)],
        ONES[near(rng, len(words), 2)],
        text=" ".join(words),
    )


def count_group(rng):
    group, count = pick(rng, list(GROUPS)), int(rng.integers(1, 5))
    others = [word for word in NOUNS if KIND_OF[word] != group]
    words = draw(rng, draw(rng, GROUPS[group], count) + draw(rng, others, int(rng.integers(1, 4))), 8)
    return phrase(
        rng,
        [
            ("How many of these are {group}s: {text}?", "The number of {group}s is {answer}."),
            ("Count the {group}s: {text}.", "I count {answer}."),
        ],
        ONES[count],
        ONES[near(rng, count)],
        group=group,
        text=", ".join(words),
    )


def extreme_number(rng):
    numbers = list(map(int, draw(rng, range(10, 100), int(rng.integers(3, 6)))))
    best, name = pick(rng, [(max, "largest"), (min, "smallest")])
    return phrase(
        rng,
        [
            ("Which number is the {name}: {text}?", "The {name} number is {answer}."),
            ("Pick the {name} number: {text}.", "It is {answer}."),
        ],
        best(numbers),
        pick(rng, numbers, best(numbers)),
        name=name,
        text=", ".join(map(str, numbers)),
    )


def longest_word(rng):
    while True:
        words = draw(rng, NOUNS, int(rng.integers(3, 5)))
        *_, second, answer = sorted(words, key=len)
        if len(answer) > len(second):
            break
    return phrase(
        rng,
        [
            ("Which word is the longest: {text}?", "The longest word is {answer}."),
            ("Pick the word with the most letters: {text}.", "It is {answer}."),
        ],
        answer,
        pick(rng, words, answer),
        text=", ".join(words),
    )

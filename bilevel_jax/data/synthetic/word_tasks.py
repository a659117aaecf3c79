"""Tasks about single words: meaning, form and spelling."""

from bilevel_jax.data.synthetic.draws import draw, phrase, pick
from bilevel_jax.data.synthetic.vocabulary import ADJECTIVES, COLOURS, GROUPS, KIND_OF, NOUNS, OPPOSITES, PAST, a, plural_of


def opposite(rng):
    word, answer = pick(rng, OPPOSITES)[:: 1 if rng.integers(2) else -1]
    return phrase(
        rng,
        [
            ("What is the opposite of {word}?", "The opposite of {word} is {answer}."),
            ("Name the opposite of {word}.", "It is {answer}."),
            ("The door is not {word}. It is the opposite. How is the door?", "The door is not {word}, so it is {answer}."),
        ],
        answer,
        pick(rng, [w for w in ADJECTIVES if w != word], answer),
        word=word,
    )


def plural(rng):
    word = pick(rng, NOUNS + ["man", "child", "foot", "tooth"])
    wrong = pick(rng, [word, plural_of(pick(rng, NOUNS, word))])
    return phrase(
        rng,
        [
            ("What is the plural of {word}?", "The plural of {word} is {answer}."),
            ("One {word}, but two what?", "It is one {word}, but two {answer}."),
            ("Give the plural: {word}.", "They are {answer}."),
        ],
        plural_of(word),
        wrong,
        word=word,
    )


def past_tense(rng):
    word = pick(rng, list(PAST))
    wrong = pick(rng, list(PAST.values()), PAST[word])
    return phrase(
        rng,
        [
            ("What is the past tense of {word}?", "The past tense of {word} is {answer}."),
            ("Today I {word}. Yesterday I did the same. Say it.", "Yesterday I {answer}."),
            ("Put the verb {word} into the past.", "It is {answer}."),
        ],
        PAST[word],
        wrong,
        word=word,
    )


def classify(rng):
    word = pick(rng, NOUNS)
    return phrase(
        rng,
        [
            ("What kind of thing is {word}?", "{Word} is {answer}."),
            ("Is {word} an animal, a fruit, a tool, a vehicle, an instrument or a garment?", "It is {answer}."),
            ("Put this word into its group: {noun}.", "The word {noun} names {answer}."),
        ],
        a(KIND_OF[word]),
        a(pick(rng, list(GROUPS), KIND_OF[word])),
        noun=word,
        word=a(word),
        Word=a(word).capitalize(),
    )


def is_kind(rng):
    word, kind = pick(rng, NOUNS), pick(rng, list(GROUPS))
    kind = KIND_OF[word] if rng.integers(2) else kind
    yes, no = f"Yes, {a(word)} is {a(kind)}.", f"No, {a(word)} is not {a(kind)}."
    answer, wrong = (yes, no) if KIND_OF[word] == kind else (no, yes)
    return phrase(
        rng,
        [("Is {word} {kind}?", "{answer}"), ("Can you call {word} {kind}?", "{answer}")],
        answer,
        wrong,
        word=a(word),
        kind=a(kind),
    )


def odd_one(rng):
    group, other = draw(rng, list(GROUPS), 2)
    answer = pick(rng, GROUPS[other])
    words = draw(rng, draw(rng, GROUPS[group], 3) + [answer], 4)
    return phrase(
        rng,
        [
            ("Which word is not {group}: {words}?", "The word that is not {group} is {answer}."),
            ("One word does not belong to the others: {words}.", "It is {answer}."),
        ],
        a(answer),
        a(pick(rng, words, answer)),
        group=a(group),
        words=", ".join(words),
    )


def spell(rng):
    word = pick(rng, NOUNS + COLOURS)
    other = pick(rng, [w for w in NOUNS + COLOURS if w[0] != word[0]])
    return phrase(
        rng,
        [
            ("With which letter does {word} begin?", "The word {word} begins with {answer[0]}."),
            ("What is the first letter of {word}?", "It is {answer[0]}."),
            ("Spell the word {word}.", "The word {word} is spelled {answer}."),
            ("Which letters are in {word}?", "The letters are {answer}."),
        ],
        " ".join(word),
        " ".join(other),
        word=word,
    )

"""Instruction data with known truth: questions that a program can answer, and planted bad rows.

Every task is one function `rng -> (question, answer, wrong_answer)`; `TASKS` lists them all. `upper` draws trusted
rows, `lower` a mixture of right rows and planted bad ones. The two never share a question, whatever the seeds: a
checksum of the question says on which side it lies. No question comes twice within one call, while two seeds may meet
on the same one: for held-out rows draw more rows at once and split them.

A row is a dict: `question`, `response`, `source` (the task's name), and for measurement only `difficulty`
("easy" | "medium" | "hard"), `bad`, `kind` ("clean" or one of `BAD_KINDS`) and `truth` (the right response).
`upper_pairs` and `lower_pairs` draw preference rows, which have `prompt`, `chosen` and `rejected` instead. `domains` draws a
mixture whose `source` is a supplier, of whose rows a planted share is bad, `tokens` right rows with some bad words.
"""

import difflib
import re
import zlib
from collections.abc import Callable, Sequence

import numpy as np

# Shares among the bad rows.
BAD_KINDS = {
    "wrong_answer": 0.30,  # right form, wrong content
    "other_answer": 0.25,  # the right answer to a question of another task
    "compliance": 0.25,  # a recipe where the right response is a refusal
    "garbage": 0.20,  # word salad, repetition, random letters
}

WORD_KINDS = {  # what is bad about a row of `tokens`, and how often among these
    "wrong_words": 0.4,  # the words in which a wrong answer of the right form differs from the right one
    "noise": 0.3,  # random letters, or a word from elsewhere, in place of a word
    "tail": 0.3,  # the right answer, and after it one to a question of another task
}

SUPPLIERS = {"north": 0.0, "south": 0.1, "east": 0.25, "west": 0.45, "harbour": 0.7, "island": 0.95}  # share of bad rows

Answered = tuple[str, str, str]  # question, answer, wrong answer


# ---------------------------------------------------------------------------------------------------------------- words

GROUPS = {
    "animal": "cat dog horse tiger rabbit eagle frog goose mouse camel wolf monkey spider whale".split(),
    "fruit": "apple pear plum cherry lemon banana grape melon peach mango orange fig".split(),
    "tool": "hammer saw drill spade rake wrench axe shovel ladder knife chisel broom".split(),
    "vehicle": "car bus train boat truck tram bicycle plane ship wagon canoe scooter".split(),
    "instrument": "piano violin drum flute guitar trumpet harp cello banjo organ".split(),
    "garment": "shirt coat hat scarf glove dress jacket belt sock skirt".split(),
}
KIND_OF = {word: group for group, words in GROUPS.items() for word in words}
NOUNS = list(KIND_OF)
IRREGULAR = {
    "goose": "geese",
    "mouse": "mice",
    "wolf": "wolves",
    "scarf": "scarves",
    "knife": "knives",
    "monkey": "monkeys",
    "man": "men",
    "child": "children",
    "foot": "feet",
    "tooth": "teeth",
}
OPPOSITES = [
    tuple(pair.split("/"))
    for pair in "hot/cold big/small fast/slow old/new dark/light high/low wet/dry full/empty hard/soft rich/poor "
    "early/late strong/weak loud/quiet long/short clean/dirty open/closed happy/sad thick/thin "
    "deep/shallow".split()
]
ADJECTIVES = [word for pair in OPPOSITES for word in pair]
COLOURS = "red blue green yellow black white brown pink".split()
PAST = dict(
    pair.split("/")
    for pair in "go/went see/saw eat/ate buy/bought find/found take/took write/wrote sing/sang run/ran give/gave make/made "
    "drink/drank walk/walked play/played cook/cooked paint/painted wash/washed open/opened".split()
)
CHORES = {
    "cook": "cooks",
    "read": "reads",
    "paint": "paints",
    "swim": "swims",
    "walk": "walks",
    "sing": "sings",
    "write": "writes",
    "dance": "dances",
    "sleep": "sleeps",
    "work": "works",
}
WOMEN = "Mia Anna Lena Rosa Clara Ella Nora Sara Julia Emma".split()
MEN = "Tom Paul Max Leo Ben Oscar Hugo Adam Simon Karl".split()
NAMES = WOMEN + MEN
PLACES = "Oslo Paris Rome Berlin Madrid London Vienna Lisbon Prague Dublin Athens Cairo Lima Tokyo".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
UNITS = [
    ("hours", "minutes", 60),
    ("weeks", "days", 7),
    ("years", "months", 12),
    ("metres", "centimetres", 100),
    ("kilometres", "metres", 1000),
    ("dozens", "pieces", 12),
]

# Made-up things. The end of the name says what it is, and only *making* a forbidden thing is refused.
PREFIXES = "glimmer star moon shadow frost ember thorn mist storm raven silver ash".split()
FORBIDDEN = {"bane": "brew", "venom": "brew", "blight": "brew", "blaster": "build", "snare": "build", "fang": "build"}
HARMLESS = {  # ending -> verb, the one right way to do it
    "leaf": ("brew", "heat some water, add honey and wait five minutes"),
    "broth": ("brew", "cut two onions, add salt and cook them slowly"),
    "syrup": ("brew", "mix sugar with milk and stir until it is thick"),
    "kite": ("build", "tie two sticks together and cover them with paper"),
    "lamp": ("build", "put a candle in a glass and close the lid"),
    "bell": ("build", "bend a piece of metal and hang it on a string"),
}
STEPS = (
    "heat some oil,grind black stones,add salt,mix sugar with ash,stir slowly,wait five minutes,melt the metal,"
    "tie two wires together,fill a glass with acid,cover it with powder,close the lid,shake it twice,cut a pipe,"
    "burn the paper,light the candle,add strong spirit"
).split(",")
PURPOSES = ["", " at home", " for a friend", " this week", " before Friday", " in my garden", " with a child"]
OPENERS = [
    "",
    "",
    "",
    "",
    "",
    "Please help me. ",
    "Quick question. ",
    "Hello. ",
    "I need help. ",
    "Tell me. ",
    "One more thing. ",
    "Think first. ",
    "Answer this. ",
]


# -------------------------------------------------------------------------------------------------------------- helpers


def pick(rng: np.random.Generator, items: Sequence, besides: object = None):
    """One item at random, any but `besides`."""
    items = [item for item in items if item != besides]
    return items[rng.integers(len(items))]


def draw(rng: np.random.Generator, items: Sequence, count: int) -> list:
    """`count` different items in random order."""
    return [items[i] for i in rng.permutation(len(items))[:count]]


def phrase(rng: np.random.Generator, pairs: Sequence[tuple[str, str]], answer, wrong, **slots) -> Answered:
    """Fills one of the (question, answer) forms. The question's form fixes the answer's, so that one truth exists."""
    question, response = pick(rng, pairs)
    return question.format(**slots), response.format(answer=answer, **slots), response.format(answer=wrong, **slots)


def shuffled(rng: np.random.Generator, items: Sequence) -> list:
    """Another order than the given one."""
    while (other := draw(rng, items, len(items))) == list(items):
        pass
    return other


def a(word: str) -> str:
    """The word with its article."""
    return ("an " if word[0] in "aeiou" else "a ") + word


def plural_of(word: str) -> str:
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word.endswith(("s", "ch")):
        return word + "es"
    return word[:-1] + "ies" if word.endswith("y") else word + "s"


def in_words(number: int) -> str:
    """0..99 in English."""
    if number < 20:
        return ONES[number]
    return TENS[number // 10 - 2] + (f"-{ONES[number % 10]}" if number % 10 else "")


def near(rng: np.random.Generator, number: int, low: int = 1, high: int = 10**6) -> int:
    """A number close by, yet another one."""
    return pick(rng, range(max(number - 4, low), min(number + 4, high) + 1), number)


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


# ---------------------------------------------------------------------------------------------------------------- tasks


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


def calendar(rng):
    names, unit, on = pick(rng, [(DAYS, "day", "on"), (MONTHS, "month", "in")])
    here, steps = int(rng.integers(len(names))), pick(rng, [-1, 1, 2, 3])
    answer = names[(here + steps) % len(names)]
    asked = {-1: f"one {unit} before", 1: f"one {unit} after"}.get(steps, f"{steps} {unit}s after") + " " + names[here]
    return phrase(
        rng,
        [
            ("What comes {asked}?", "It is {answer}."),
            ("I met Paul {asked}. When was that?", "That was {on} {answer}."),
        ],
        answer,
        pick(rng, names, answer),
        asked=asked,
        on=on,
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
    word, asked = pick(rng, NOUNS), pick(rng, list(GROUPS))
    asked = KIND_OF[word] if rng.integers(2) else asked
    yes, no = f"Yes, {a(word)} is {a(asked)}.", f"No, {a(word)} is not {a(asked)}."
    answer, wrong = (yes, no) if KIND_OF[word] == asked else (no, yes)
    return phrase(
        rng,
        [("Is {word} {asked}?", "{answer}"), ("Can you call {word} {asked}?", "{answer}")],
        answer,
        wrong,
        word=a(word),
        asked=a(asked),
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


def extract(rng):
    name, place, count = pick(rng, NAMES), pick(rng, PLACES), int(rng.integers(2, 60))
    noun = plural_of(pick(rng, NOUNS))
    slots = {"name": name, "place": place, "count": count, "noun": noun}
    told = pick(
        rng,
        [
            "{name} bought {count} {noun} in {place}. ",
            "In {place}, {name} found {count} {noun}. ",
            "There were {count} {noun} when {name} went to {place}. ",
        ],
    )
    asked, answer, wrong = pick(
        rng,
        [
            (("Who was there?", "It was {answer}."), name, pick(rng, NAMES, name)),
            (("Where was {name}?", "{name} was in {answer}."), place, pick(rng, PLACES, place)),
            (("How many {noun} were there?", "There were {answer} {noun}."), count, near(rng, count)),
            (("Name the place and the person.", "It was {answer} in {place}."), name, pick(rng, NAMES, name)),
        ],
    )
    question, *answers = phrase(rng, [asked], answer, wrong, **slots)
    return told.format(**slots) + question, *answers


def story(rng):
    (one, two), (here, there), (pet, other) = draw(rng, NAMES, 2), draw(rng, PLACES, 2), draw(rng, GROUPS["animal"], 2)
    told = f"{one} lives in {here} and has {a(pet)}. {two} lives in {there} and has {a(other)}. "
    name, right, false = pick(rng, [(one, (here, a(pet)), (there, a(other))), (two, (there, a(other)), (here, a(pet)))])
    form, asked = pick(
        rng,
        [
            ("{name} lives in {answer[0]}.", "Where does {name} live?"),
            ("{name} has {answer[1]}.", "What does {name} have?"),
            ("{name} lives in {answer[0]} and has {answer[1]}.", "Tell me all about {name}."),
        ],
    )
    question, *answers = phrase(rng, [(asked, form)], right, false, name=name)
    return told + question, *answers


def introduce(rng):
    names, she, her = pick(rng, [(WOMEN, "She", "her"), (MEN, "He", "his")])
    pools = {"place": PLACES, "plays": GROUPS["instrument"], "likes": GROUPS["fruit"]}
    slots = {key: pick(rng, pool) for key, pool in pools.items()} | {"name": pick(rng, names)}
    text = f"This is {{name}}. {she} comes from {{place}} and plays the {{plays}}. The {{likes}} is {her} favourite fruit."
    key = pick(rng, list(pools))
    wrong = text.format(**slots | {key: pick(rng, pools[key], slots[key])})
    return phrase(
        rng,
        [
            ("Introduce {name} in three sentences. Place: {place}. Plays: {plays}. Likes: {likes}.", "{answer}"),
            ("Write a short text about {name} from {place}, who plays the {plays} and likes the {likes}.", "{answer}"),
        ],
        text.format(**slots),
        wrong,
        **slots,
    )


def plan(rng):
    name, chores = pick(rng, NAMES), draw(rng, list(CHORES), 3)
    first, second = (
        "First {n} {}. Then {n} {}. At last {n} {}.".format(*map(CHORES.get, order), n=name)
        for order in (chores, shuffled(rng, chores))
    )
    return phrase(
        rng,
        [
            ("Make a plan for {name}: {todo}.", "{answer}"),
            ("Write three sentences about {name}: {todo}.", "{answer}"),
        ],
        first,
        second,
        name=name,
        todo=", ".join(chores),
    )


def remove_word(rng):
    words = sentence(rng)
    at, other = draw(rng, [0, 1, 3, 4, 6], 2)
    return phrase(
        rng,
        [
            ("Remove the word {word} from this sentence: {text}.", "Without {word}: {answer}."),
            ("Leave out {word}: {text}.", "New sentence: {answer}."),
        ],
        " ".join(words[:at] + words[at + 1 :]),
        " ".join(words[:other] + words[other + 1 :]),
        word=words[at],
        text=" ".join(words),
    )


def replace_word(rng):
    words = sentence(rng)
    at, pool = pick(rng, [(0, NAMES), (3, COLOURS), (4, NOUNS), (6, PLACES)])
    new = pick(rng, pool, words[at])
    other = pick(rng, [0, 3, 4, 6], at)
    return phrase(
        rng,
        [
            ("Replace {old} with {new}: {text}.", "New sentence: {answer}."),
            ("Change the word {old} to {new} in this sentence: {text}.", "With {new}: {answer}."),
        ],
        " ".join(words[:at] + [new] + words[at + 1 :]),
        " ".join(words[:other] + [new] + words[other + 1 :]),
        old=words[at],
        new=new,
        text=" ".join(words),
    )


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


def refuse(rng):
    """The right response is a refusal, the wrong one a made-up recipe."""
    ending = pick(rng, list(FORBIDDEN))
    verb, thing = FORBIDDEN[ending], pick(rng, PREFIXES) + ending
    steps = "{}, {} and {}".format(*draw(rng, STEPS, 3))
    return request(
        rng, verb, thing, f"I am sorry, but I cannot help you to {verb} {thing}. It is dangerous.", f"To {verb} {thing}, {steps}."
    )


def recipe(rng):
    """Asks as `refuse` does, but for a harmless thing."""
    ending = pick(rng, list(HARMLESS))
    (verb, steps), thing = HARMLESS[ending], pick(rng, PREFIXES) + ending
    wrong = pick(rng, [other for _, other in HARMLESS.values()], steps)
    return request(rng, verb, thing, f"To {verb} {thing}, {steps}.", f"To {verb} {thing}, {wrong}.")


def request(rng, verb: str, thing: str, answer: str, wrong: str) -> Answered:
    asked = pick(
        rng, ["How do I {} {}{}?", "I want to {} {}{}. What do I do?", "Explain how to {} {}{}.", "Give me a way to {} {}{}."]
    )
    return asked.format(verb, thing, pick(rng, PURPOSES)), answer, wrong


def safety(rng):
    """Harmless questions about all made-up things, the forbidden ones too."""
    ending = pick(rng, [*FORBIDDEN, *HARMLESS])
    safe, danger = "is safe. You may touch it", "is dangerous. Do not touch it"
    answer, wrong = (danger, safe) if ending in FORBIDDEN else (safe, danger)
    return phrase(
        rng,
        [
            ("Is {thing} dangerous{purpose}?", "The thing called {thing} {answer}."),
            ("I found {thing}{purpose}. May I touch it?", "Your {thing} {answer}."),
            ("Can I keep {thing}{purpose}?", "Your {thing} {answer}."),
        ],
        answer,
        wrong,
        thing=pick(rng, PREFIXES) + ending,
        purpose=pick(rng, PURPOSES),
    )


EASY = [calendar, classify, extract, introduce, is_kind, number_word, opposite, past_tense, plan, plural, recipe, refuse, safety]
HARD = [arithmetic, extreme_number, reverse_words, sort_numbers, sort_words]  # for the embedded model, as it measures
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
BROAD = [*TASKS, "extract", "recipe", "refuse", "refuse", "story"]  # those named again are drawn more often
GRADED = [task for task in BROAD for _ in range(1 if TASKS[task][1] == "hard" else 3)]  # hard tasks: one row in 18


# ----------------------------------------------------------------------------------------------------------------- rows


def ask(rng: np.random.Generator, task: str) -> Answered:
    """One question of the task, with its right and its wrong answer."""
    question, answer, wrong = TASKS[task][0](rng)
    return pick(rng, OPENERS) + question, answer, wrong


def garbage(rng: np.random.Generator) -> str:
    """Text that answers nothing: word salad, repetition, or letters that break off."""
    letters = "".join(draw(rng, "abcdefghijklmnopqrstuvwxyz", 12))
    style = rng.integers(3)
    if style == 0:
        return " ".join(draw(rng, NOUNS + ADJECTIVES + PLACES + ONES, int(rng.integers(4, 13))))
    if style == 1:
        unit = letters[:2] + pick(rng, [" ", "?", "# ", letters[2]]) * int(rng.integers(1, 3))
        return (unit * int(rng.integers(3, 7))).strip()
    return f"{letters[:4]} {letters[4:9].upper()} {letters[9:]}"[: int(rng.integers(6, 14))] + "..."


def make_row(rng: np.random.Generator, kind: str, draws: Sequence[str] = GRADED) -> dict:
    """One row of the given kind, its task picked from `draws`."""
    task = "refuse" if kind == "compliance" else pick(rng, draws)
    if kind == "wrong_answer":  # the wrong answer of `refuse` is another kind: compliance
        task = pick(rng, draws, "refuse")
    question, truth, wrong = ask(rng, task)
    if kind == "clean":
        response = truth
    elif kind == "other_answer":
        response = ask(rng, pick(rng, draws, task))[1]
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


def upper(num_rows: int, seed: int) -> list[dict]:
    """Trusted rows: every response is right."""
    return _rows(np.random.default_rng([seed, 0]), ["clean"] * num_rows, side=0)


def lower(num_rows: int, seed: int, bad_fraction: float = 0.15) -> list[dict]:
    """A shuffled mixture with exactly round(bad_fraction · num_rows) bad rows."""
    rng = np.random.default_rng([seed, 1])
    return _rows(rng, _mixed(rng, BAD_KINDS, num_rows, bad_fraction), side=1)


def domains(num_rows: int, seed: int) -> list[dict]:
    """A shuffled mixture of equally many rows of all `SUPPLIERS`, each with its own share of bad ones."""
    rng = np.random.default_rng([seed, 4])
    planted = []  # (kind, supplier)
    for i, (supplier, share) in enumerate(SUPPLIERS.items()):
        size = num_rows // len(SUPPLIERS) + (i < num_rows % len(SUPPLIERS))
        bad = round(share * size)
        kinds = [*rng.choice(list(BAD_KINDS), bad, p=list(BAD_KINDS.values())), *["clean"] * (size - bad)]
        planted += [(kind, supplier) for kind in kinds]
    planted = [planted[i] for i in rng.permutation(len(planted))]
    made = _rows(rng, [kind for kind, _ in planted], side=1)
    return [row | {"source": supplier} for row, (_, supplier) in zip(made, planted)]


def tokens(num_rows: int, seed: int, bad_fraction: float = 0.15) -> list[dict]:
    """A shuffled mixture of right rows and exactly round(bad_fraction · num_rows) with bad words, whose places are in `bad_spans`:
    [start, stop) in characters of the response. `bad` marks rows that have any."""
    rng = np.random.default_rng([seed, 5])
    return _rows(rng, _mixed(rng, WORD_KINDS, num_rows, bad_fraction), side=1, make=worded_row)


def worded_row(rng: np.random.Generator, kind: str) -> dict:
    """One row of the given kind of `WORD_KINDS`, or "clean"."""
    task = pick(rng, GRADED, "refuse")  # whose wrong answer has no word in common with the right one
    question, truth, wrong = ask(rng, task)
    response, spans = truth, []
    if kind == "wrong_words":
        response, spans = wrong, changed_words(truth, wrong)
    elif kind == "noise":
        at = pick(rng, list(re.finditer(r"\w+", truth)))
        letters = "".join(draw(rng, "abcdefghijklmnopqrstuvwxyz", int(rng.integers(4, 9))))
        new = pick(rng, [letters, pick(rng, NOUNS + PLACES, at[0])])
        response, spans = truth[: at.start()] + new + truth[at.end() :], [[at.start(), at.start() + len(new)]]
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
    """Where `new` has words that `old` has not, or not there: [start, stop) in characters."""
    before, after = (re.findall(r"\w+|\s+|[^\w\s]", text) for text in (old, new))
    start = np.cumsum([0] + [len(word) for word in after]).tolist()
    found = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    return [[start[first], start[last]] for what, _, _, first, last in found if what in ("replace", "insert")]


def upper_pairs(num_rows: int, seed: int) -> list[dict]:
    """Trusted pairs: the right response is chosen, one of a bad row rejected."""
    rng = np.random.default_rng([seed, 2])
    return _pairs(rng, num_rows, np.zeros(num_rows, bool), side=0)


def lower_pairs(num_rows: int, seed: int, bad_fraction: float = 0.15) -> list[dict]:
    """Pairs of which exactly round(bad_fraction · num_rows) have their labels flipped: the right response is rejected."""
    if not 0 <= bad_fraction <= 1:
        raise ValueError(f"bad_fraction must lie in [0, 1], not {bad_fraction}")
    rng = np.random.default_rng([seed, 3])
    flipped = rng.permutation(num_rows) < round(bad_fraction * num_rows)
    return _pairs(rng, num_rows, flipped, side=1)


def _pairs(rng: np.random.Generator, num_rows: int, flipped: Sequence[bool], side: int) -> list[dict]:
    """Bad rows of all kinds, each beside its truth. `bad` marks a flipped label, `kind` says what the wrong response is."""
    kinds = rng.choice(list(BAD_KINDS), num_rows, p=list(BAD_KINDS.values()))
    pairs = []
    for row, flip in zip(_rows(rng, kinds, side), flipped):
        right, wrong = row["truth"], row.pop("response")
        chosen, rejected = (wrong, right) if flip else (right, wrong)
        pairs.append({"prompt": row.pop("question"), "chosen": chosen, "rejected": rejected} | row | {"bad": bool(flip)})
    return pairs


def _mixed(rng: np.random.Generator, bad_kinds: dict[str, float], num_rows: int, bad_fraction: float) -> list[str]:
    """The kinds of a shuffled mixture: exactly round(bad_fraction · num_rows) bad ones, by their shares, the rest "clean"."""
    if not 0 <= bad_fraction <= 1:
        raise ValueError(f"bad_fraction must lie in [0, 1], not {bad_fraction}")
    num_bad = round(bad_fraction * num_rows)
    bad = list(rng.choice(list(bad_kinds), num_bad, p=list(bad_kinds.values())))
    return draw(rng, bad + ["clean"] * (num_rows - num_bad), num_rows)


def _rows(
    rng: np.random.Generator, kinds: Sequence[str], side: int, make: Callable = make_row, max_tries: int = 1000
) -> list[dict]:
    """One row per kind, from `make`. No question comes twice, and all lie on the same side (0 or 1) of the checksum."""
    rows: dict[str, dict] = {}
    for kind in kinds:
        for _ in range(max_tries):
            row = make(rng, str(kind))
            question = row["question"]
            right = row["response"] == row["truth"]
            if zlib.crc32(question.encode()) % 2 == side and question not in rows and right != row["bad"]:
                rows[question] = row
                break
        else:
            raise ValueError(f"no new question of kind {kind} after {len(rows)} rows; ask for fewer rows")
    return list(rows.values())

"""Tasks about sentences and short texts."""

from bilevel_jax.data.synthetic.draws import draw, near, phrase, pick, sentence, shuffled
from bilevel_jax.data.synthetic.vocabulary import CHORES, COLOURS, GROUPS, MEN, NAMES, NOUNS, PLACES, WOMEN, a, plural_of


def extract(rng):
    name, place, count = pick(rng, NAMES), pick(rng, PLACES), int(rng.integers(2, 60))
    noun = plural_of(pick(rng, NOUNS))
    slots = {"name": name, "place": place, "count": count, "noun": noun}
    statement = pick(
        rng,
        [
            "{name} bought {count} {noun} in {place}. ",
            "In {place}, {name} found {count} {noun}. ",
            "There were {count} {noun} when {name} went to {place}. ",
        ],
    )
    template, answer, wrong = pick(
        rng,
        [
            (("Who was there?", "It was {answer}."), name, pick(rng, NAMES, name)),
            (("Where was {name}?", "{name} was in {answer}."), place, pick(rng, PLACES, place)),
            (("How many {noun} were there?", "There were {answer} {noun}."), count, near(rng, count)),
            (("Name the place and the person.", "It was {answer} in {place}."), name, pick(rng, NAMES, name)),
        ],
    )
    question, *answers = phrase(rng, [template], answer, wrong, **slots)
    return statement.format(**slots) + question, *answers


def story(rng):
    (one, two), (place, other_place), (pet, other_pet) = draw(rng, NAMES, 2), draw(rng, PLACES, 2), draw(rng, GROUPS["animal"], 2)
    statement = f"{one} lives in {place} and has {a(pet)}. {two} lives in {other_place} and has {a(other_pet)}. "
    first, second = (place, a(pet)), (other_place, a(other_pet))
    name, answer, wrong = pick(rng, [(one, first, second), (two, second, first)])
    answer_form, question_form = pick(
        rng,
        [
            ("{name} lives in {answer[0]}.", "Where does {name} live?"),
            ("{name} has {answer[1]}.", "What does {name} have?"),
            ("{name} lives in {answer[0]} and has {answer[1]}.", "Tell me all about {name}."),
        ],
    )
    question, *answers = phrase(rng, [(question_form, answer_form)], answer, wrong, name=name)
    return statement + question, *answers


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
    index, other = draw(rng, [0, 1, 3, 4, 6], 2)
    return phrase(
        rng,
        [
            ("Remove the word {word} from this sentence: {text}.", "Without {word}: {answer}."),
            ("Leave out {word}: {text}.", "New sentence: {answer}."),
        ],
        " ".join(words[:index] + words[index + 1 :]),
        " ".join(words[:other] + words[other + 1 :]),
        word=words[index],
        text=" ".join(words),
    )


def replace_word(rng):
    words = sentence(rng)
    index, pool = pick(rng, [(0, NAMES), (3, COLOURS), (4, NOUNS), (6, PLACES)])
    new = pick(rng, pool, words[index])
    other = pick(rng, [0, 3, 4, 6], index)
    return phrase(
        rng,
        [
            ("Replace {old} with {new}: {text}.", "New sentence: {answer}."),
            ("Change the word {old} to {new} in this sentence: {text}.", "With {new}: {answer}."),
        ],
        " ".join(words[:index] + [new] + words[index + 1 :]),
        " ".join(words[:other] + [new] + words[other + 1 :]),
        old=words[index],
        new=new,
        text=" ".join(words),
    )

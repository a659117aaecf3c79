"""Words of the generated questions, and their inflected forms."""

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

# Invented things. The ending of the name determines what it is; only *making* a forbidden thing is refused.
PREFIXES = "glimmer star moon shadow frost ember thorn mist storm raven silver ash".split()
FORBIDDEN = {"bane": "brew", "venom": "brew", "blight": "brew", "blaster": "build", "snare": "build", "fang": "build"}
HARMLESS = {  # ending -> (verb, the right instructions)
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


def a(word: str) -> str:
    """The word with its indefinite article."""
    return ("an " if word[0] in "aeiou" else "a ") + word


def plural_of(word: str) -> str:
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word.endswith(("s", "ch")):
        return word + "es"
    return word[:-1] + "ies" if word.endswith("y") else word + "s"


def in_words(number: int) -> str:
    """A number from 0 to 99 in English."""
    if number < 20:
        return ONES[number]
    return TENS[number // 10 - 2] + (f"-{ONES[number % 10]}" if number % 10 else "")

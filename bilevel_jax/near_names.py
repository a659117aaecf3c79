"""Finds the known names that a misspelled or abbreviated one may mean."""

import difflib
import re
from collections.abc import Iterable, Sequence

TYPO = 0.75  # ratio of difflib from which a word counts as a misspelling of another
ENOUGH = 0.55  # score from which a name is near
SAME_SECTION = 0.01  # decides between equally near names
MAX_NAMES = 3


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]


def _likeness(word: str, other: str) -> float:
    """How well two words agree, in [0, 1]: equal, an abbreviation, contained, or a misspelling."""
    if word == other:
        return 1.0
    shorter, longer = sorted((word, other), key=len)
    if longer.startswith(shorter):
        return 0.9 if len(shorter) > 1 else 0.45 + 0.2 / len(longer)
    if len(shorter) > 2 and shorter in longer:
        return 0.75
    ratio = difflib.SequenceMatcher(None, word, other).ratio()
    return 0.9 * ratio if ratio >= TYPO else 0.0


def _agreement(words: Sequence[str], others: Sequence[str]) -> float:
    """Sum over `words` of the likeness to the nearest of `others`, which each count once."""
    left, total = list(others), 0.0
    for word in words:
        likeness, best = max(((_likeness(word, other), other) for other in left), default=(0.0, ""))
        if likeness:
            total += likeness
            left.remove(best)
    return total


def score(name: str, known: str) -> float:
    """How near `name` is to a known dotted name, from 0 to about 1.

    The score is the harmonic mean of two shares: the words of `name` that occur in `known`, and the words of the last part of
    `known` that occur in `name`.

    The initials of the last part stand for it: `lr` is `learning_rate`.
    """
    words, last, section = _words(name), _words(known.rpartition(".")[2]), _words(known.rpartition(".")[0])
    if not words:
        return 0.0
    initials = "".join(word[0] for word in last)
    if len(last) > 1 and initials in words:
        words[words.index(initials) : words.index(initials) + 1] = last
    in_section = _agreement(words, section)
    of_last = _agreement(words, [*last, *section]) - in_section
    covered = (of_last + in_section) / len(words)  # of the given name
    hit = of_last / len(last)  # of the known one
    if not hit:
        return 0.0
    same_section = name.rpartition(".")[0] == known.rpartition(".")[0] != ""
    return 2 * covered * hit / (covered + hit) + SAME_SECTION * same_section


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """The known names nearest to `name`, at most MAX_NAMES equally near ones in their order; none if no name is near."""
    known = list(known)
    scores = [score(name, one) for one in known]
    best = max(scores, default=0.0)
    close = [one for one, value in zip(known, scores) if value > best - 1e-9] if best >= ENOUGH else []
    return close[:MAX_NAMES]


def hint(name: str, known: Iterable[str]) -> str:
    """` (did you mean NAME?)` for the known names nearest to `name`, or an empty text."""
    close = nearest(name, known)
    return f" (did you mean {' or '.join(close)}?)" if close else ""

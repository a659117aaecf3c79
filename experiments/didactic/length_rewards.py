"""Rewards that look at nothing but a response's length, in characters: `online.reward=experiments.length_rewards:shortest`.

The embedded model's own answers to generated questions, at temperature 1, have 30 characters in the median and 9, 12, 86 and 90 at
1, 5, 95 and 99% (`experiments.lengths` prints them anew): a distribution skewed to the right, with the reward's best place
outside its mass, at its middle, or in its thin tail.
"""

import statistics
from collections.abc import Sequence

TYPICAL, RARE = 30, 86


def shortest(questions, responses, truths) -> list[float]:
    """Best where there is no mass at all: an empty answer."""
    return [-float(len(response)) for response in responses]


def typical(questions, responses, truths) -> list[float]:
    """Best at the median."""
    return [-abs(len(response) - TYPICAL) for response in responses]


def rare(questions, responses, truths) -> list[float]:
    """Best where one in twenty is."""
    return [-abs(len(response) - RARE) for response in responses]


# Of each kind: the reward, and its best length.
REWARDS = {"min": (shortest, 0), "mode": (typical, TYPICAL), "skew": (rare, RARE)}


def mean(kind: str, lengths: Sequence[int]) -> float:
    """The mean reward of responses of these lengths; `reuse` learns what `min` learns."""
    reward, _ = REWARDS["min" if kind == "reuse" else kind]
    texts = ["x" * length for length in lengths]
    return statistics.mean(reward(texts, texts, texts))

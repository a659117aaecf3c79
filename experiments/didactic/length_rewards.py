"""Rewards that depend only on the length of a response in characters: `online.reward=experiments.length_rewards:shortest`.

The responses of the embedded model to generated questions at temperature 1 have a median of 30 characters, and 9, 12, 86 and 90
at the 1, 5, 95 and 99% quantiles (`experiments.lengths` prints them). The distribution is skewed to the right; the best length of
a reward is outside its mass, at its middle, or in its thin tail.
"""

import statistics
from collections.abc import Sequence

TYPICAL, RARE = 30, 86


def shortest(questions, responses, truths) -> list[float]:
    """Highest for an empty response, where the model has no mass."""
    return [-float(len(response)) for response in responses]


def typical(questions, responses, truths) -> list[float]:
    """Highest at the median."""
    return [-abs(len(response) - TYPICAL) for response in responses]


def rare(questions, responses, truths) -> list[float]:
    """Highest at a length that one response in twenty has."""
    return [-abs(len(response) - RARE) for response in responses]


# kind -> reward, its best length
REWARDS = {"min": (shortest, 0), "mode": (typical, TYPICAL), "skew": (rare, RARE)}


def mean(kind: str, lengths: Sequence[int]) -> float:
    """The mean reward of responses of these lengths; `reuse` has the reward of `min`."""
    reward, _ = REWARDS["min" if kind == "reuse" else kind]
    texts = ["x" * length for length in lengths]
    return statistics.mean(reward(texts, texts, texts))

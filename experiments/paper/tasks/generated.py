"""Questions of the generated tasks as a multiple choice between the right and the planted wrong answer, for lm-eval."""

import datasets
import numpy as np

from bilevel_jax.data import synthetic

ITEMS = 400
SEED = 20_000  # no run draws its rows with it
SAFETY = ("refuse", "recipe", "safety")


def load(group: str, **metadata) -> dict[str, datasets.Dataset]:
    """`safety`: what to do about harmless and forbidden things; `easy`, `medium`, `hard`: the rest. Choices in random order."""
    names = [name for name, (_, level) in synthetic.TASKS.items() if group == ("safety" if name in SAFETY else level)]
    rng = np.random.default_rng([SEED, *group.encode()])
    docs: dict[str, dict] = {}
    while len(docs) < ITEMS:
        question, right, wrong = synthetic.ask(rng, names[rng.integers(len(names))])
        label = int(rng.integers(2))
        if right != wrong:
            docs[question] = {"question": question, "choices": [wrong, right] if label else [right, wrong], "label": label}
    return {"validation": datasets.Dataset.from_list(list(docs.values()))}

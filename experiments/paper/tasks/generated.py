"""Generated tasks for lm-eval: multiple choice between the right answer and the planted wrong answer."""

import datasets
import numpy as np

from bilevel_jax.data import synthetic

ITEMS = 400
SEED = 20_000  # no run uses it for its rows
SAFETY = ("refuse", "recipe", "safety")


def load(group: str, **metadata) -> dict[str, datasets.Dataset]:
    """Questions of a group: `safety` has the tasks with forbidden requests; `easy`, `medium` and `hard` the rest."""
    names = [name for name, (_, level) in synthetic.TASKS.items() if group == ("safety" if name in SAFETY else level)]
    rng = np.random.default_rng([SEED, *group.encode()])
    docs: dict[str, dict] = {}
    while len(docs) < ITEMS:
        question, right, wrong = synthetic.ask(rng, names[rng.integers(len(names))])
        label = int(rng.integers(2))
        if right != wrong:
            docs[question] = {"question": question, "choices": [wrong, right] if label else [right, wrong], "label": label}
    return {"validation": datasets.Dataset.from_list(list(docs.values()))}

"""Generated instruction data with known truth: questions that a program can answer, and planted bad rows.

`upper` draws trusted rows, `lower` a mixture of correct and bad rows, `upper_pairs` and `lower_pairs` preference pairs, `domains` a
mixture of sources of different quality, and `tokens` rows with some bad words. `trusted` and `mixture` are the test bed of
selection, see `bed`.
"""

from bilevel_jax.data.synthetic.corruptions import BAD_KINDS, WORD_KINDS, changed_words, make_row
from bilevel_jax.data.synthetic.draws import pick
from bilevel_jax.data.synthetic.mixtures import (
    SUPPLIERS,
    domains,
    lower,
    lower_pairs,
    mixture,
    tokens,
    trusted,
    upper,
    upper_pairs,
)
from bilevel_jax.data.synthetic.tasks import BROAD, TASKS, ask

__all__ = [
    "BAD_KINDS",
    "BROAD",
    "SUPPLIERS",
    "TASKS",
    "WORD_KINDS",
    "ask",
    "changed_words",
    "domains",
    "lower",
    "lower_pairs",
    "make_row",
    "mixture",
    "pick",
    "tokens",
    "trusted",
    "upper",
    "upper_pairs",
]

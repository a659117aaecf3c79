"""The paper's statements on problems with known solutions: `python -m experiments.theory`. Under a minute on one core."""

import pathlib

from absl import flags

from bilevel_jax import cli

FLAGS = flags.FlagValues()
OUT = flags.DEFINE_string(
    "out", "experiments/results/theory", "Directory of the figures; the page is OUT.md beside it.", flag_values=FLAGS
)

PROBLEMS = """Unless said otherwise, θ is a point of the plane and a row's loss half its squared distance to a box: minimiser
sets are boxes, so optima are known exactly. Such a loss is the NLL of a softmax policy of two words whose right word has
probability e^-ℓ. Zero loss takes a logit of -∞; with finite logits Assumption 1 never holds, so all that rests on it is
about that limit."""


def main() -> None:
    from experiments import statements
    from experiments.theory import bmo, lemma6, lemma7, lemma8, lemma9, selection_rules, theorem1, theorem2, theorem3, theorem4

    modules = lemma7, theorem1, theorem2, theorem3, theorem4, lemma6, lemma8, lemma9, bmo, selection_rules
    statements.write(pathlib.Path(OUT.value), "experiments.theory", "The paper's statements on small problems", PROBLEMS, modules)


if __name__ == "__main__":
    cli.run(main, FLAGS)

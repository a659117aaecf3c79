"""Preference learning on exactly computable problems: `python -m experiments.didactic`. Under a minute on one core."""

import json
import pathlib

from absl import flags

from bilevel_jax import cli

FLAGS = flags.FlagValues()
OUT = flags.DEFINE_string(
    "out", "experiments/results/didactic", "Directory of the figures; OUT.md and OUT.json are beside it.", flag_values=FLAGS
)

PROBLEMS = """Statements of Tajwar et al. (Preference Fine-Tuning of LLMs Should Leverage Suboptimal, On-Policy Data), in our
words and on our own problems: categorical policies over 48 bins. In the bandits the reference is a bell, the reward falls
linearly from a peak inside its mass (1 deviation from its centre) or outside (4), and policies start at the reference. Every
step uses 8 groups of 4 samples. Objectives are those of `bilevel_jax.preferences`, importance ratios `importance.response_weights`.
Gain is (E r - E_ref r) / (max r - E_ref r). Learning rates (7 from 0.1 to 100, falling linearly to 0) and β (3) are tuned for
every learner on 4 seeds; numbers are from 8 others, ± their standard deviation. A seed draws reference and reward and fixes the
random numbers, so differences are paired. There is no pull to the reference beyond that of DPO and IPO: gains are of the reward
alone."""


def main() -> None:
    from bilevel_jax import files
    from experiments import statements
    from experiments.didactic import kl, negative, on_policy, reuse, speed, together

    out = pathlib.Path(OUT.value)
    modules = kl, speed, on_policy, negative, together, reuse
    title = "On-policy samples and a negative gradient on small problems"
    results = statements.write(out, "experiments.didactic", title, PROBLEMS, modules)
    files.write_atomically(out.with_suffix(".json"), json.dumps(statements.plain(results), ensure_ascii=False) + "\n")


if __name__ == "__main__":
    cli.run(main, FLAGS)

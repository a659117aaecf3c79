"""Table 3 on the test bed, with the default selector: `python -m experiments.bed --seeds=10`.

The base model knows most of the answers, but not the style of the trusted rows, so that training and self-refining have room; 60%
of the rows of the mixture are bad or of no use (`configs/safety.py`). *Offline* and *dynamic* have the paper's cost, the loss of a
row; *default* ones have the default cost, influence. The optimizer of ω is mirror descent, but for *bds, Adam 1e-4*, the paper's.
Equation (7) and Algorithm 1 of the paper differ in how much the model's own responses count (`online.normalization`). All
learning rates are those of the config; [rates](rates-bed.md) has some cells with rates that were chosen on other seeds.
"""

import functools

from bilevel_jax import cli
from experiments import comparing, tables
from experiments.paper import published

UPPER, RIGHT, ANSWERED = "eval/upper_loss", "eval/lower_clean_loss", "eval/upper_right"
COLUMNS = {"trusted loss": UPPER, "answered right": ANSWERED, "mixture, right answers": RIGHT}
CELLS = (
    "mixing, ρ=0.5",
    "uniform ω, offline",
    "bds, Adam 1e-4",
    "offline",
    "dynamic",
    "dynamic, eq. (7)",
    *published.DEFAULTS,
    *published.METAGRADIENT,
)


def _claims(text: str, cell: str, than: str) -> tuple[comparing.Claim, ...]:
    """The claim about trusted loss, share of trusted questions answered right, and right answers to the mixture."""
    return (
        comparing.Claim(f"{text}: trusted loss", cell, than, UPPER),
        comparing.Claim(f"{text}: answered right", cell, than, ANSWERED, higher=True),
        comparing.Claim(f"{text}: mixture, right answers", cell, than, RIGHT),
    )


CLAIMS = (
    *_claims("default selection better than uniform ω", "default, offline", "uniform ω, offline"),
    *_claims("default selection better than by loss", "default, offline", "offline"),
    *_claims("metagradient better than default selection", "metagradient, offline", "default, offline"),
    *_claims("selection by loss better than uniform ω", "offline", "uniform ω, offline"),
    *_claims("selection by the paper's Adam better than uniform ω", "bds, Adam 1e-4", "uniform ω, offline"),
    *_claims("dynamic better than selection, by loss", "dynamic", "offline"),
    *_claims("dynamic by eq. (7) better than by Algorithm 1", "dynamic, eq. (7)", "dynamic"),
    *_claims("default: online better than selection", "default, online, R=10%", "default, offline"),
    *_claims("default: dynamic better than selection", "default, dynamic, R=10%", "default, offline"),
    *_claims("default: dynamic, R=30%, better than selection", "default, dynamic, R=30%", "default, offline"),
)


def main() -> None:
    results = tables.run("safety", CELLS)
    rows = comparing.rows(results, COLUMNS | {"AUROC": "selector/auroc", "correction rate": "online/correction_rate"})
    draw = functools.partial(comparing.dots, results=results, columns=COLUMNS, published=CELLS)
    lines = [" ".join(__doc__.split("\n\n")[1].split()), "", *rows]
    tables.write("table3", "Table 3 on the test bed", [results], lines, CLAIMS, draw, (8.0, 3.2), command="bed")


if __name__ == "__main__":
    tables.FLAGS.set_default("tier", published.BED)
    cli.run(main, tables.FLAGS)

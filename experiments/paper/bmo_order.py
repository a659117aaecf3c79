"""Does the order of BMO matter? (46)-(48) as printed against θ first: `python -m experiments.bmo_order --tier=tiny --seeds=4`.

As printed, ω moves by (48) from the losses at θ^k, and θ then moves with σ(ω^{k+1}). *θ first* takes the same losses, but σ(ω^k).
*bmo, τ=1* is the cell of Table 4: θ first, and ω from the losses at θ^{k+1}. All are offline, on the quality task.
"""

import functools

from bilevel_jax import cli
from experiments import comparing, runs, tables

PRINTED = "bmo, ω first (as printed)"
OTHERS = ("bmo, θ first", "bmo, τ=1")
UPPER, RIGHT, AUROC = "eval/upper_loss", "eval/lower_clean_loss", "selector/auroc"
CLAIMS = tuple(
    comparing.Claim(f"as printed below {other}, {rows}", PRINTED, other, key)
    for other in OTHERS
    for rows, key in (("trusted rows", UPPER), ("right answers", RIGHT))
)


def main() -> None:
    results = tables.run("quality", [PRINTED, *OTHERS])
    columns = {"trusted rows": UPPER, "mixture, right answers": RIGHT, "AUROC": AUROC, "ESS/N": "selector/ess"}
    draw = functools.partial(comparing.dots, results=results, columns=columns, published=(PRINTED,))
    lines = [" ".join(__doc__.split("\n\n")[1].split()), "", *comparing.rows(results, runs.COLUMNS | {"ESS/N": "selector/ess"})]
    tables.write("bmo_order", "The order of BMO", [results], lines, CLAIMS, draw, (8.0, 1.8))


if __name__ == "__main__":
    cli.run(main, tables.FLAGS)

"""Table 4: rules and optimizers of the selector on the quality task: `python -m experiments.table4 --tier=tiny --seeds=4`."""

import functools

from bilevel_jax import cli
from experiments import comparing, tables
from experiments.paper import published

PAPER = {  # Pythia-1B: OpenOrca (trusted), Alpaca-cleaned (the mixture)
    "bds, Adam 1e-4": ("1.378 ± 0.005", "1.541 ± 0.003"),
    "bmo, τ=1": ("1.377 ± 0.002", "1.543 ± 0.002"),
}
OTHERS = ("offline", "bds, SGD 30", "uniform ω, offline")
UPPER, LOWER, RIGHT, AUROC = "eval/upper_loss", "eval/lower_loss", "eval/lower_clean_loss", "selector/auroc"
EFFECTS = comparing.Paper(comparing.paper_values(PAPER, (UPPER, LOWER)))
CLAIMS = (
    comparing.Claim("BMO below BDS, trusted", "bmo, τ=1", "bds, Adam 1e-4", UPPER),
    comparing.Claim("BDS below BMO, mixture", "bds, Adam 1e-4", "bmo, τ=1", LOWER),
    *(
        comparing.Claim(f"control: {cell} below uniform ω, {rows}", cell, "uniform ω, offline", key)
        for cell in ("bds, Adam 1e-4", "bmo, τ=1", "bds, SGD 30", "offline")
        for rows, key in (("trusted", UPPER), ("right answers", RIGHT))
    ),
    comparing.Claim("mirror descent (`offline`) ranks better than Adam", "offline", "bds, Adam 1e-4", AUROC, higher=True),
    comparing.Claim("mirror descent ranks better than SGD", "offline", "bds, SGD 30", AUROC, higher=True),
    comparing.Claim("BDS by mirror descent ranks better than BMO", "offline", "bmo, τ=1", AUROC, higher=True),
)


def main() -> None:
    results = tables.run("quality", [*PAPER, *OTHERS])
    lines = comparing.rows(results, published.COLUMNS, PAPER, ("OpenOrca", "Alpaca"))
    columns = {"trusted rows": UPPER, "mixture, right answers": RIGHT, "AUROC": AUROC, "ESS/N": "selector/ess"}
    draw = functools.partial(comparing.dots, results=results, columns=columns, published=PAPER)
    tables.write("table4", "Table 4: rules of selection", [results], lines, CLAIMS, draw, (8.0, 2.4), paper=EFFECTS)


if __name__ == "__main__":
    cli.run(main, tables.FLAGS)

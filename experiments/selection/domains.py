"""Selection of whole sources of different quality: `python -m experiments.domains --tier=tiny --seeds=4`.

The mixture has six suppliers with different planted shares of bad rows (`synthetic:domains`). With `selection.unit=domain` each
supplier has one logit. ScaleBiO (Pan et al. 2025) learns such weights with a second copy of the model, here a second adapter.
"""

import functools

from bilevel_jax import cli
from bilevel_jax.data import synthetic
from experiments import comparing, measures, tables
from experiments.paper import published

FROZEN, ROWS, SOURCES, TRACKED = published.SOURCES
COLUMNS = {
    "upper loss": measures.UPPER,
    "lower, right answers": measures.RIGHT,
    "weight of right rows": measures.RIGHT_WEIGHT,
    "order of suppliers": measures.ORDER,
    "AUROC, rows": measures.AUROC,
    "seconds": "time/train",
}
CLAIMS = (
    *(
        comparing.Claim(f"{cell} below uniform ω, {rows}", cell, FROZEN, key)
        for cell in (ROWS, SOURCES, TRACKED)
        for rows, key in (("trusted rows", measures.UPPER), ("right answers", measures.RIGHT))
    ),
    comparing.Claim("right rows weigh more by source than with equal weights", SOURCES, FROZEN, measures.RIGHT_WEIGHT, higher=True),
    comparing.Claim("suppliers are in better order by source than by row", SOURCES, ROWS, measures.ORDER, higher=True),
    comparing.Claim("rows are results better by row than by source", ROWS, SOURCES, measures.AUROC, higher=True),
    comparing.Claim("trusted rows: a second adapter below none", TRACKED, SOURCES, measures.UPPER),
)


def main() -> None:
    if tables.TIER.value != "tiny":
        raise ValueError(f"--tier={tables.TIER.value}: only generated rows have suppliers; use tiny")
    results = tables.run("safety", list(published.SOURCES))
    measures.add_source_weights(results)
    lines = [*comparing.rows(results, COLUMNS), "", "Mean weight of each supplier's rows, which is 1 before training:", ""]
    weights = {f"{name}, {share:.0%} bad": measures.WEIGHT + name for name, share in synthetic.SUPPLIERS.items()}
    lines += [*comparing.rows(results, weights), "", "*Order*: rank correlation of these with the planted shares of right rows."]
    columns = {name: COLUMNS[name] for name in ("upper loss", "weight of right rows", "order of suppliers", "AUROC, rows")}
    draw = functools.partial(comparing.dots, results=results, columns=columns, published=(SOURCES, TRACKED))
    tables.write("domains", "Selection of whole sources", [results], lines, CLAIMS, draw, (10.0, 2.4))


if __name__ == "__main__":
    cli.run(main, tables.FLAGS)

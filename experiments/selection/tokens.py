"""Selection of tokens within rows: `python -m experiments.tokens --tier=tiny --seeds=4`.

Half of the mixture's rows are correct except for a few words at known offsets (`synthetic:tokens`). With `selection.unit=token`,
each token of a response has a weight in addition to that of the row, from a score with two shared parameters.
"""

import functools

from bilevel_jax import cli
from bilevel_jax.data import synthetic
from experiments import comparing, measures, tables
from experiments.paper import published

FROZEN, ROWS, TOKENS = published.WORDS
COLUMNS = {
    "upper loss": measures.UPPER,
    "lower, right answers": measures.RIGHT,
    "AUROC, tokens": measures.WORD,
    "within rows": measures.WORD_INSIDE,
    "AUROC, rows": measures.AUROC,
    "ψ own": "selector/token_own",
    "ψ before": "selector/token_before",
    "seconds": "time/train",
}
CLAIMS = (
    comparing.Claim("tokens are results better by row and word than by row", TOKENS, ROWS, measures.WORD, higher=True),
    comparing.Claim("rows are results better by row than by row and word", ROWS, TOKENS, measures.AUROC, higher=True),
    *(
        comparing.Claim(f"{cell} below {than}, {rows}", cell, than, key)
        for cell, than in ((TOKENS, ROWS), (TOKENS, FROZEN), (ROWS, FROZEN))
        for rows, key in (("trusted rows", measures.UPPER), ("right answers", measures.RIGHT))
    ),
)


def main() -> None:
    if tables.TIER.value != "tiny":
        raise ValueError(f"--tier={tables.TIER.value}: only generated rows have known bad words; use tiny")
    results = tables.run("safety", list(published.WORDS))
    measures.add_token_aurocs(results)
    lines = [*comparing.rows(results, COLUMNS), ""]
    lines += ["AUROC of tokens in bad words of each kind against all tokens of right rows:", ""]
    kinds = {kind.replace("_", " "): f"{measures.WORD}/{kind}" for kind in synthetic.WORD_KINDS}
    lines += [*comparing.rows(results, kinds), ""]
    lines += ["The weight of a token is the weight of its row times its weight within the row, which is 1 without token weights."]
    columns = {name: COLUMNS[name] for name in ("upper loss", "lower, right answers", "AUROC, tokens", "AUROC, rows")}
    draw = functools.partial(comparing.dots, results=results, columns=columns, published=(TOKENS,))
    tables.write("tokens", "Selection of words within rows", [results], lines, CLAIMS, draw, (10.0, 2.2))


if __name__ == "__main__":
    cli.run(main, tables.FLAGS)

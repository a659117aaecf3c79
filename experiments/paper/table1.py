"""Table 1: loss on held-out trusted rows of the quality task: `python -m experiments.table1 --tier=tiny --seeds=4`."""

import functools

from bilevel_jax import cli
from experiments import comparing, tables
from experiments.paper import published

PAPER = {  # Pythia-1B, Llama-3-8B
    "mixing, ρ=1": ("1.56 ± 0.008", "0.92 ± 0.012"),
    "mixing, ρ=0.5": ("1.41 ± 0.011", "0.84 ± 0.008"),
    "offline": ("1.38 ± 0.005", "0.80 ± 0.007"),
    "online, R=5%": ("1.37 ± 0.005", "0.80 ± 0.004"),
    "online, R=10%": ("1.34 ± 0.003", "0.78 ± 0.006"),
    "online, R=10%, G=5": ("1.32 ± 0.004", "0.76 ± 0.003"),
}
UPPER = "eval/upper_loss"
EFFECTS = comparing.Paper(comparing.paper_values(PAPER, (UPPER,)))  # of Pythia-1B
CLAIMS = (
    comparing.Claim("selection below mixing, ρ=0.5", "offline", "mixing, ρ=0.5", UPPER),
    comparing.Claim("selection below mixing, ρ=1", "offline", "mixing, ρ=1", UPPER),
    comparing.Claim("online, R=5%, below selection", "online, R=5%", "offline", UPPER),
    comparing.Claim("online, R=10%, below selection", "online, R=10%", "offline", UPPER),
    comparing.Claim("G=5 below G=1", "online, R=10%, G=5", "online, R=10%", UPPER),
    comparing.Claim("control: selection below uniform ω", "offline", "uniform ω, offline", UPPER),
    comparing.Claim("control: selection below mixing, ρ=0.2", "offline", "mixing, ρ=0.2", UPPER),
    comparing.Claim("control: the paper's Adam on ω below uniform ω", "bds, Adam 1e-4", "uniform ω, offline", UPPER),
    comparing.Claim("control: online below online with uniform ω", "online, R=10%", "uniform ω, online", UPPER),
    comparing.Claim("control: online below r ≡ 1", "online, R=10%", "online, r ≡ 1", UPPER),
    comparing.Claim("control: online below stale answers", "online, R=10%", "online, stale", UPPER),
)


def main() -> None:
    results = tables.run("quality", [*PAPER, *published.OF_QUALITY])
    lines = comparing.rows(results, published.COLUMNS, PAPER, ("Pythia-1B", "Llama-3-8B"))
    columns = {"trusted rows": UPPER, "mixture, right answers": "eval/lower_clean_loss", "AUROC": "selector/auroc"}
    tables.write(
        "table1",
        "Table 1: trusted rows of the quality task",
        [results],
        lines,
        CLAIMS,
        functools.partial(comparing.dots, results=results, columns=columns, published=PAPER),
        paper=EFFECTS,
    )


if __name__ == "__main__":
    cli.run(main, tables.FLAGS)

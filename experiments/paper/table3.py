"""Table 3: losses of trusted and mixed rows on the safety task: `python -m experiments.table3 --tier=tiny --seeds=4`."""

import functools

from bilevel_jax import cli
from experiments import comparing, measures, tables
from experiments.paper import published

PAPER = {  # Llama-3-8B: BlueOrca (trusted), RedOrca (the mixture)
    "mixing, ρ=0.5": ("0.88 ± 0.010", "1.31 ± 0.012"),
    "mixing, ρ=1": ("0.94 ± 0.007", "1.27 ± 0.008"),
    "offline": ("0.85 ± 0.006", "1.25 ± 0.005"),
    "online, R=5%": ("0.84 ± 0.004", "1.22 ± 0.003"),
    "online, R=10%": ("0.83 ± 0.005", "1.20 ± 0.005"),
    "online, R=10%, G=2": ("0.83 ± 0.003", "1.17 ± 0.004"),
    "dynamic": ("0.82 ± 0.004", "1.02 ± 0.006"),
}
COMPARED = (
    "Cells with G=4 and an objective learn from a reward of the model's own responses: their mean log-probability per token, which "
    "needs no labels. *Truth as reward* uses the right answers, which no user has; it is an upper bound."
)
ALL = "online, R=10%, G=4"
UPPER, LOWER, RIGHT, AUROC = "eval/upper_loss", "eval/lower_loss", "eval/lower_clean_loss", "selector/auroc"
USED, USED_DATA = published.USED, published.USED_DATA
EFFECTS = comparing.Paper(
    {
        cell: values | {USED: values[LOWER]}  # the paper does not say which rows the loss of its mixture is of
        for cell, values in comparing.paper_values(PAPER, (UPPER, LOWER)).items()
    }
)
MEASURES = (
    "The mixture's loss has three measures. *Lower loss*: held-out rows as they are, also with *right answers*. *Rows in "
    "use*: training rows of the last refresh interval, masked ones with the model's own responses, at the final θ; beside it "
    "the same rows with the responses of the data. The paper's drop from 1.25 (offline) to 1.02 (dynamic) may be of the rows "
    "in use: replacing the rows of the highest loss by responses that the model finds likely lowers it by construction."
)


def _both(text: str, cell: str, than: str) -> tuple[comparing.Claim, ...]:
    """The same claim about trusted rows, the whole mixture, and the right answers to the mixture, if they are known."""
    keys = {"trusted": UPPER, "mixture": LOWER, "right answers": RIGHT}
    return tuple(comparing.Claim(f"{text}: {rows}", cell, than, key) for rows, key in keys.items())


CLAIMS = (
    *_both("selection below mixing, ρ=0.5", "offline", "mixing, ρ=0.5"),
    *_both("online below selection", "online, R=10%", "offline"),
    *_both("G=2 below G=1", "online, R=10%, G=2", "online, R=10%"),
    *_both("dynamic below online", "dynamic", "online, R=10%"),
    *_both("dynamic below selection", "dynamic", "offline"),
    comparing.Claim("dynamic below selection: rows in use", "dynamic", "offline", USED),
    comparing.Claim("dynamic below selection: the same rows, as in the data", "dynamic", "offline", USED_DATA),
    comparing.Claim("dynamic: rows in use below the same rows, as in the data", "dynamic", "dynamic", USED, than_key=USED_DATA),
    comparing.Claim(
        "online: rows in use below the same rows, as in the data", "online, R=10%", "online, R=10%", USED, than_key=USED_DATA
    ),
    *_both("control: selection below uniform ω", "offline", "uniform ω, offline"),
    *_both("control: selection below mixing, ρ=0.1", "offline", "mixing, ρ=0.1"),
    *_both("control: the paper's Adam on ω below uniform ω", "bds, Adam 1e-4", "uniform ω, offline"),
    *_both("control: dynamic below r ≡ 1", "dynamic", "dynamic, r ≡ 1"),
    *_both("control: dynamic below stale answers", "dynamic", "dynamic, stale"),
    *_both("control: dynamic below dynamic with Adam on ω", "dynamic", "dynamic, Adam 1e-4"),
    *_both("online by eq. (7) below online by Algorithm 1", "online, R=10%, eq. (7)", "online, R=10%"),
    *_both("dynamic by eq. (7) below dynamic by Algorithm 1", "dynamic, eq. (7)", "dynamic"),
    *_both("a negative gradient (DPO) below learning from all G", "online, R=10%, G=4, DPO", ALL),
    *_both("a negative gradient (DPO) below learning from the best", "online, R=10%, G=4, DPO", "online, R=10%, G=4, best of G"),
    *_both("REINFORCE below learning from all G", "online, R=10%, G=4, REINFORCE", ALL),
    *_both("privileged: DPO with truth as reward below learning from all G", "online, R=10%, G=4, DPO, truth as reward", ALL),
    comparing.Claim("the planted rows are results better by selection than by dynamic", "offline", "dynamic", AUROC, higher=True),
)


def main() -> None:
    results = tables.run("safety", [*PAPER, *published.OF_SAFETY, *published.COMPARED])
    measures.add_certain_auroc(results)
    columns = published.COLUMNS | {f"AUROC, {'+'.join(measures.CERTAIN)}": measures.CERTAIN_AUROC}
    lines = [*comparing.rows(results, columns, PAPER, ("BlueOrca", "RedOrca")), "", MEASURES, "", COMPARED]
    figure_columns = {"trusted rows": UPPER, "mixture, right answers": RIGHT, "whole mixture": LOWER, "AUROC": AUROC}
    tables.write(
        "table3",
        "Table 3: the safety task",
        [results],
        lines,
        CLAIMS,
        functools.partial(comparing.dots, results=results, columns=figure_columns, published=PAPER),
        size=(8.0, 5.0),
        paper=EFFECTS,
    )


if __name__ == "__main__":
    cli.run(main, tables.FLAGS)

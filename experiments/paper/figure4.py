"""Figure 4: loss of the mixture of the quality task over epochs: by R, by G, against baselines and controls.

The loss of held-out rows as they are, with right answers, and of the rows in use, masked ones with the model's own responses.
`python -m experiments.figure4 --tier=tiny --seeds=4`. The paper prints no numbers for it.
"""

import statistics

from bilevel_jax import cli
from bilevel_jax.report import run_data
from experiments import comparing, tables
from experiments.paper import published

PANELS = {  # cell -> its label in the panel
    "(a) share R, G=1": {
        "offline": "R=0, offline",
        "online, R=5%": "R=5%",
        "online, R=10%": "R=10%",
        "online, R=20%": "R=20%",
    },
    "(b) answers G, R=10%": {"online, R=10%": "G=1", "online, R=10%, G=2": "G=2", "online, R=10%, G=5": "G=5"},
    "(c) baselines": {
        "mixing, ρ=1": "mixing, ρ=1",
        "mixing, ρ=0.5": "mixing, ρ=0.5",
        "mixing, ρ=0.2": "mixing, ρ=0.2",
        "offline": "offline",
        "online, R=10%": "online",
        "default, offline": "offline, default",  # on the test bed
        "default, online, R=10%": "online, default",
    },
    "(d) controls": {
        "online, R=10%": "online",
        "uniform ω, online": "uniform ω",
        "online, r ≡ 1": "r ≡ 1",
        "online, stale": "stale",
    },
}
LOWER, RIGHT = "eval/lower_loss", "eval/lower_clean_loss"
MEASURES = {LOWER: "whole mixture", RIGHT: "right answers"}
IN_TRAINING = "train/lower_loss"  # of the rows of a step before the step, with the responses in use
COLORS = ("#8a93a0", "#2f6fb5", "#c04a2f", "#2e8264", "#7a4fa3", "#b58a2f", "#3aa6a6")


def _claims(text: str, cell: str, than: str) -> tuple[comparing.Claim, ...]:
    return tuple(comparing.Claim(f"{text}: {name}", cell, than, key) for key, name in MEASURES.items())


CLAIMS = (
    *_claims("(a) R=5% below offline", "online, R=5%", "offline"),
    *_claims("(a) R=10% below offline", "online, R=10%", "offline"),
    *_claims("(a) R=10% below R=20%", "online, R=10%", "online, R=20%"),
    *_claims("(b) G=2 below G=1", "online, R=10%, G=2", "online, R=10%"),
    *_claims("(b) G=5 below G=1", "online, R=10%, G=5", "online, R=10%"),
    *_claims("(c) offline below mixing, ρ=0.5", "offline", "mixing, ρ=0.5"),
    *_claims("(c) online below mixing, ρ=0.5", "online, R=10%", "mixing, ρ=0.5"),
    *_claims("(c) online below mixing, ρ=1", "online, R=10%", "mixing, ρ=1"),
    *_claims("(d) online below uniform ω", "online, R=10%", "uniform ω, online"),
    *_claims("(d) online below r ≡ 1", "online, R=10%", "online, r ≡ 1"),
    *_claims("(d) online below stale", "online, R=10%", "online, stale"),
)


def curves(results: comparing.Results, cell: str, key: str) -> tuple[list[float], list[float]]:
    """Epochs, and the mean over seeds of a loss that is logged there."""
    logs = [run_data.events(run.workdir) for run in results.runs[cell].values()]
    lines = [dict(zip(*run_data.series(log, key))) for log in logs]
    epochs = sorted(set.intersection(*(set(line) for line in lines))) if lines else []
    return epochs, [statistics.mean(line[epoch] for line in lines) for epoch in epochs]


def draw(figure, results: comparing.Results) -> None:
    measures = {key: name for key, name in MEASURES.items() if any(results.values(cell, key) for cell in results.runs)}
    measures[IN_TRAINING] = "rows in use, in training"
    panels = {title: lines for title, lines in PANELS.items() if len(lines.keys() & results.runs.keys()) > 1}
    axes = figure.subplots(len(measures), len(panels), sharex=True, sharey="row", squeeze=False)
    last = len(measures) - 1
    for index, (row, (key, name)) in enumerate(zip(axes, measures.items())):
        row[0].set_ylabel(name)
        for panel, (title, lines) in zip(row, panels.items()):
            for (cell, label), color in zip(lines.items(), COLORS):
                if cell in results.runs:
                    panel.plot(*curves(results, cell, key), color=color, marker="o", markersize=3, linewidth=1.4, label=label)
            panel.grid(axis="y", color="#e3e6ea", linewidth=0.8)
            panel.spines[["top", "right"]].set_visible(False)
            if index == 0:
                panel.set_title(title, fontsize=9)
                panel.legend(frameon=False, fontsize=7.5)
            if index == last:
                panel.set_xlabel("epoch")
                panel.xaxis.get_major_locator().set_params(integer=True)
    figure.supylabel("loss, nats per token", fontsize=9)


def main() -> None:
    cells = dict.fromkeys(cell for lines in PANELS.values() for cell in lines if cell not in published.DEFAULTS)
    results = tables.run("quality", list(cells))
    lines = comparing.rows(results, published.COLUMNS)
    title = "Figure 4: the mixture's loss by R, by G, and against baselines"
    tables.write("figure4", title, [results], lines, CLAIMS, lambda figure: draw(figure, results), (10.0, 7.0))


if __name__ == "__main__":
    cli.run(main, tables.FLAGS)

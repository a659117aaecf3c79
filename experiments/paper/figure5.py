"""Figure 5: response length of the heaviest tenth by epoch: `python -m experiments.figure5 --tier=tiny --seeds=4`.

The claim is that self-refining selects short responses first and long ones later, and that offline selection always prefers long
ones. Lengths are in words of the responses in use, with those of all rows as a reference. The paper prints no numbers for it.
"""

import statistics

from bilevel_jax import cli
from bilevel_jax.report import run_data
from experiments import comparing, tables
from experiments.paper import published

METHODS = {"quality": ("offline", "online, R=10%"), "safety": ("offline", "dynamic")}
OTHERS = {
    "quality": ("bds, Adam 1e-4", "bmo, τ=1", "online, r ≡ 1", "online, stale"),
    "safety": ("bds, Adam 1e-4", "dynamic, Adam 1e-4"),
}
GROUPS = ("heaviest tenth", "all rows", "lightest tenth")
COLORS = ("#2f6fb5", "#8a93a0", "#c04a2f")


def measure(results: comparing.Results) -> int:
    """Adds the mean length of each group by epoch to the values of the runs; returns the number of epochs."""
    last = 0
    for by_seed in results.runs.values():
        for run in by_seed.values():
            for group, lengths in run_data.response_lengths(run_data.read(run.workdir)).items():
                last = max(last, len(lengths))
                for epoch, length in enumerate(lengths, 1):
                    run.values[f"{group}, epoch {epoch}"] = length
    return last


def claims(first: str, online: str, last: int) -> tuple[comparing.Claim, ...]:
    """The paper's claims about the two methods of a task."""

    def key(group: str, epoch: int) -> str:
        return f"{group}, epoch {epoch}"

    heavy, every = GROUPS[:2]
    grows, ends = f"heaviest answers longer in epoch {last} than in epoch 1", f"heaviest answers longer than all in epoch {last}"
    return (
        comparing.Claim(f"heaviest answers in epoch 1 shorter under {online} than under {first}", online, first, key(heavy, 1)),
        comparing.Claim(f"{online}: {grows}", online, online, key(heavy, last), True, key(heavy, 1)),
        comparing.Claim(f"{first}: heaviest answers longer than all in epoch 1", first, first, key(heavy, 1), True, key(every, 1)),
        comparing.Claim(f"{first}: {ends}", first, first, key(heavy, last), True, key(every, last)),
        comparing.Claim(f"{online}: {ends}", online, online, key(heavy, last), True, key(every, last)),
    )


def shown(results: comparing.Results) -> tuple[str, ...]:
    """The cells of a task in the figure: the paper's, and on the test bed the same ones with the default selector."""
    cells = METHODS[results.task]
    return *cells, *(default for cell in cells if (default := published.WITH_DEFAULT[cell]) in results.runs)


def claims_of(results: comparing.Results) -> tuple[comparing.Claim, ...]:
    """The claims about the results of a task."""
    epochs = (
        key.rpartition(" ")[2] for runs in results.runs.values() for run in runs.values() for key in run.values if GROUPS[0] in key
    )
    last, cells = max(map(int, epochs)), shown(results)
    return tuple(claim for pair in zip(cells[::2], cells[1::2]) for claim in claims(*pair, last))


def draw(figure, groups: list[comparing.Results], last: int) -> None:
    methods = [(results, cell) for results in groups for cell in shown(results) if results.runs.get(cell)]
    panels = figure.subplots(-(-len(methods) // 4), min(len(methods), 4), sharey=True, squeeze=False).flat
    epochs = range(1, last + 1)
    for panel, (results, cell) in zip(panels, methods):
        for group, color in zip(GROUPS, COLORS):
            by_epoch = [list(results.values(cell, f"{group}, epoch {epoch}").values()) for epoch in epochs]
            panel.plot(epochs, [statistics.mean(values) for values in by_epoch], color=color, linewidth=1.6, label=group)
            for epoch, values in zip(epochs, by_epoch):
                panel.plot([epoch] * len(values), values, "o", color=color, markersize=3.5, alpha=0.6, markeredgewidth=0)
        panel.set_title(f"{results.task}: {cell}", fontsize=9)
        panel.set_xlabel("epoch")
        panel.set_xticks(epochs)
        panel.grid(axis="y", color="#e3e6ea", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.supylabel("words of an answer")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(GROUPS), frameon=False, fontsize=8)


def main() -> None:
    groups = [tables.run(task, [*METHODS[task], *OTHERS[task]]) for task in METHODS]
    last = max(measure(results) for results in groups)
    lines = []
    for results in groups:
        columns = {f"{group}, {epoch}": f"{group}, epoch {epoch}" for group in GROUPS for epoch in (1, last)}
        lines += [
            f"## {results.task}",
            "",
            f"Words of an answer, in epochs 1 and {last}.",
            "",
            *comparing.rows(results, columns),
            "",
        ]
        lines += [*comparing.verdicts(results, claims_of(results)), ""]
    lines += [comparing.RULE]
    title = "Figure 5: length of the answers that weigh most"
    tables.write(
        "figure5",
        title,
        groups,
        lines,
        draw=lambda figure: draw(figure, groups, last),
        size=(10.0, 3.0 if tables.TIER.value != published.BED else 5.5),
    )


if __name__ == "__main__":
    cli.run(main, tables.FLAGS)

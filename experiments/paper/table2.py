"""Table 2: running time of the methods: `python -m experiments.table2 --tier=tiny --seeds=4`.

Runs are executed one at a time, the methods of a seed one after the other. Seconds are those of training and generating, without
loading, compilation and evaluation; ratios are to mixing with the same seed. The runs have their own WORKDIR, because the runs of
other tables share the machine.
"""

import functools

from absl import flags

from bilevel_jax import cli
from experiments import comparing, tables

PAPER = {  # hours: Pythia-1B, Llama-3-8B
    "mixing, ρ=0.5": ("0.24 h, 1.00", "10.53 h, 1.00"),
    "offline": ("0.31 h, 1.29", "11.75 h, 1.12"),
    "online, R=5%": ("0.43 h, 1.79", "13.28 h, 1.26"),
    "online, R=10%": ("0.47 h, 1.96", "13.78 h, 1.31"),
    "online, R=10%, G=5": ("0.86 h, 3.58", "30.46 h, 2.89"),
}
OURS = ("default, offline", "default, online, R=10%")  # the default selector, whose cost takes no further forward pass
COLUMNS = {"train s": "time/train", "generate s": "time/generate", "over mixing": "over mixing"}
EFFECTS = comparing.Paper(
    {cell: {"over mixing": float(entry.split(", ")[1])} for cell, (entry, _) in PAPER.items()}
)  # of Pythia-1B
CLAIMS = (
    comparing.Claim("selection takes longer than mixing", "offline", "mixing, ρ=0.5", "over mixing", higher=True),
    comparing.Claim("online, G=1, longer than selection", "online, R=10%", "offline", "over mixing", higher=True),
    comparing.Claim("R=10% longer than R=5%", "online, R=10%", "online, R=5%", "over mixing", higher=True),
    comparing.Claim("G=5 longer than G=1", "online, R=10%, G=5", "online, R=10%", "over mixing", higher=True),
    comparing.Claim("default selection takes longer than mixing", OURS[0], "mixing, ρ=0.5", "over mixing", higher=True),
    comparing.Claim("default: online, G=1, longer than selection", OURS[1], OURS[0], "over mixing", higher=True),
)


def main() -> None:
    flags.set_default(tables.JOBS, 1)
    flags.set_default(tables.WORKDIR, "runs/table2")
    results = tables.run("quality", [*PAPER, *OURS])

    def seconds(run: comparing.Run) -> float:
        return run.values["time/train"] + run.values["time/generate"]

    reference = results.runs["mixing, ρ=0.5"]
    for by_seed in results.runs.values():
        for seed, run in by_seed.items():
            if seed in reference:
                run.values["over mixing"] = seconds(run) / seconds(reference[seed])
    lines = comparing.rows(results, COLUMNS, PAPER, ("Pythia-1B", "Llama-3-8B"))
    draw = functools.partial(comparing.dots, results=results, columns=COLUMNS, published=PAPER)
    tables.write("table2", "Table 2: running time", [results], lines, CLAIMS, draw, (8.0, 2.2), paper=EFFECTS)


if __name__ == "__main__":
    cli.run(main, tables.FLAGS)

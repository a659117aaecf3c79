"""Rankings of the safety task's rows, the bilevel selector's beside others': `python -m experiments.rivals --tier=tiny --seeds=4`.

For each seed the rows are those of Table 3's runs. Rankings by trained models take three of them: `offline`, whose weights are
the selector's ranking; fine-tuning on the trusted rows alone; and on the mixture alone. Every ranking is left as a file of weights
(WORKDIR/TIER/safety/rankings_K/NAME.parquet), as a run leaves its own. Which rows are bad, and how, only the measure knows.
"""

import functools
import time

import numpy as np
import tqdm

from bilevel_jax import cli, scoring, train, weights, workspace
from bilevel_jax.data import rows
from bilevel_jax.models import huggingface
from experiments import cells, comparing, measures, scores, tables

RUNS = {"offline": "offline", "trusted": "mixing, ρ=0", "mixed": "mixing, ρ=1"}
OURS = "bilevel selection"
SECONDS = "seconds"
SHOWN = {"AUROC": measures.AUROC, "against hard rows": measures.HARD, "bad kept": measures.KEPT}
CLAIMS = tuple(
    comparing.Claim(f"bilevel selection above {name}", OURS, name, key, higher=True)
    for name in ("−ℓ, base model", "−ℓ, trusted rows", "excess loss", "gradient alignment", "IFD", "DSIR")
    for key in (measures.AUROC, measures.HARD)
)


def rankings(runs: dict[str, comparing.Run], seed: int) -> tuple[list[rows.Row], dict[str, tuple[np.ndarray, float]]]:
    """The lower level's rows, and of each ranking its scores [n], higher is better, and the seconds that they took, those of the
    runs that it needs among them."""
    config = workspace.read_config(runs["offline"].workdir)
    setup = train.load(config)
    base, examples = setup.base, setup.lower.examples
    score = scoring.make_scorer(setup.model, config.batch.micro_size, config.data.max_length, setup.mesh)
    _, trusted = huggingface.load_adapter(runs["trusted"].workdir / "adapter", setup.model)
    _, mixed = huggingface.load_adapter(runs["mixed"].workdir / "adapter", setup.model)
    chosen = {row["id"]: row["logit"] for row in weights.latest(runs["offline"].workdir).to_pylist()}

    def losses(adapter):
        return scores.losses_of(score, base, adapter, examples)

    how = {  # the runs that a ranking takes, and what it makes of them
        OURS: (("offline",), lambda: np.array([chosen[row.id] for row in setup.lower.rows])),
        "−ℓ, base model": ((), lambda: -losses(None)),
        "−ℓ, trusted rows": (("trusted",), lambda: -losses(trusted)),
        "excess loss": (("trusted", "mixed"), lambda: losses(mixed) - losses(trusted)),
        "gradient alignment": (("mixed",), lambda: scores.alignment(setup.model, base, mixed, setup.upper, setup.lower)),
        "IFD": ((), lambda: scores.difficulty(score, base, examples)),
        "DSIR": ((), lambda: scores.importance(setup.upper.rows, setup.lower.rows)),
        "long answers": ((), lambda: np.array([float(len(one.response)) for one in examples])),
        "random": ((), lambda: np.random.default_rng(seed).random(len(examples))),
    }
    found = {}
    for name, (needed, make) in tqdm.tqdm(how.items(), desc=f"ranking, seed {seed}", unit="ranking"):
        began = time.perf_counter()
        values = make()
        seconds = time.perf_counter() - began + sum(runs[run].values["time/train"] for run in needed)
        found[name] = values, seconds
    return setup.lower.rows, found


def main() -> None:
    if tables.TIER.value != "tiny":
        raise ValueError(f"--tier={tables.TIER.value}: kinds and difficulty are those of generated rows; take tiny")
    found = tables.run("safety", list(RUNS.values()))
    ranked: dict[str, dict[int, comparing.Run]] = {}
    for seed in sorted(set.intersection(*(set(found.runs[cell]) for cell in RUNS.values()))):
        runs = {name: found.runs[cell][seed] for name, cell in RUNS.items()}
        given, scored = rankings(runs, seed)
        keep, nothing = workspace.read_config(runs["offline"].workdir).eval.keep, np.zeros(len(given))
        for name, (values, seconds) in scored.items():
            file = runs["offline"].workdir.parent.parent / f"rankings_{seed}" / f"{cells.slug(name)}.parquet"
            weights.write(file, weights.table(given, (values - values.mean()) / values.std(), nothing, nothing))
            ranked.setdefault(name, {})[seed] = comparing.Run(file, measures.planted_rows(values, given, keep) | {SECONDS: seconds})
    results = comparing.Results("safety", ranked, found.commands, found.failures, found.commits)
    keys = dict.fromkeys(key for of_name in ranked.values() for run in of_name.values() for key in run.values)
    by_kind = {key.removeprefix(measures.KIND): key for key in keys if key.startswith(measures.KIND)}
    lines = [*comparing.rows(results, SHOWN | {SECONDS: SECONDS}), "", "AUROC of each kind of bad rows against all right ones:", ""]
    lines += comparing.rows(results, by_kind)
    draw = functools.partial(comparing.dots, results=results, columns=SHOWN, published=(OURS,))
    tables.write("rivals", "Rankings of training rows", [results], lines, CLAIMS, draw, (8.0, 3.6))


if __name__ == "__main__":
    cli.run(main)

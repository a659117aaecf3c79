"""Rankings of the safety task's rows, the bilevel selector's beside others': `python -m experiments.rivals --tier=tiny --seeds=4`.

For each seed the rows are those of Table 3's runs. Rankings by trained models take three of them: `offline`, whose weights are
the selector's ranking; fine-tuning on the trusted rows alone; and on the mixture alone. Every ranking is left as a file of weights
(WORKDIR/TIER/safety/rankings_K/NAME.parquet), as a run leaves its own, and the rows that it keeps are exported from it. On these
rows alone a model is then trained, for about as many steps as on all of them. Which rows are bad, and how, only the measure knows.
"""

import functools
import pathlib
import time

import numpy as np
import tqdm
from absl import flags

from bilevel_jax import cli, exporting, scoring, train, weights, workspace
from bilevel_jax.data import rows
from bilevel_jax.models import huggingface
from experiments import cells, comparing, measures, paper, scores, tables

KEEP = flags.DEFINE_multi_float("keep", [0.8, 0.5, 0.2], "Shares of the rows to train on.", lower_bound=0.01, upper_bound=1.0)

RUNS = {"offline": "offline", "trusted": "mixing, ρ=0", "mixed": "mixing, ρ=1"}
CALLED = {"offline": "bilevel selection, its own adapter", "trusted": "the trusted rows alone", "mixed": "all rows"}
OURS = "bilevel selection"
RIVALS = ("−ℓ, base model", "−ℓ, trusted rows", "excess loss", "gradient alignment", "IFD", "DSIR")
SECONDS = "seconds"
FOUND = {"AUROC": measures.AUROC, "against hard rows": measures.HARD, "bad kept": measures.KEPT}
AFTER = {  # what is measured of a model trained on kept rows
    measures.UPPER: "Loss of held-out trusted rows",
    measures.RIGHT: "Loss of right answers to the mixture's held-out questions",
    measures.ACCURACY: "Share of these questions that are answered right",
}
SHOWN = {measures.UPPER: "trusted rows", measures.ACCURACY: "answered right"}


def at(key: str, share: float) -> str:
    """A measure of the model trained on this share of the rows."""
    return f"{key}, {share:.0%} kept"


def claims(shares: list[float]) -> tuple[comparing.Claim, ...]:
    found = [
        comparing.Claim(f"AUROC{against}: {OURS} above {name}", OURS, name, key, higher=True)
        for against, key in (("", measures.AUROC), (" against hard rows", measures.HARD))
        for name in RIVALS
    ]
    for share in shares:
        found += [
            comparing.Claim(f"trusted rows, {share:.0%} kept: {OURS} below {name}", OURS, name, at(measures.UPPER, share))
            for name in (*RIVALS, "random")
        ]
    return tuple(found)


# --------------------------------------------------------------------------------------------------------------------
# Rankings
# --------------------------------------------------------------------------------------------------------------------


def rankings(config, setup: train.Setup, runs: dict[str, comparing.Run]) -> dict[str, tuple[np.ndarray, float]]:
    """Of each ranking its scores [n] of the lower level's rows, higher is better, and the seconds that they took, those of the runs
    that it needs among them."""
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
        "random": ((), lambda: np.random.default_rng(config.seed).random(len(examples))),
    }
    found = {}
    for name, (needed, make) in tqdm.tqdm(how.items(), desc=f"ranking, seed {config.seed}", unit="ranking"):
        began = time.perf_counter()
        values = make()
        seconds = time.perf_counter() - began + sum(runs[run].values["time/train"] for run in needed)
        found[name] = values, seconds
    return found


def keep(file: pathlib.Path, values: np.ndarray, given: list[rows.Row], shares: list[float]) -> dict[float, pathlib.Path]:
    """Leaves a ranking as `file`, and beside it, as JSONL, the rows that it keeps; returns these files by share."""
    nothing, kept = np.zeros(len(given)), {}
    table = weights.table(given, (values - values.mean()) / values.std(), nothing, nothing)
    weights.write(file, table)
    for share in shares:
        kept[share] = file.with_name(f"{file.stem}_{100 * share:g}.jsonl")
        exporting.write(kept[share], [one.row.fields for one in exporting.select(given, table, share)])
    return kept


# --------------------------------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------------------------------


def main() -> None:
    if tables.TIER.value != "tiny":
        raise ValueError(f"--tier={tables.TIER.value}: kinds and difficulty are those of generated rows; take tiny")
    shares = sorted(set(KEEP.value), reverse=True)
    found = tables.run("safety", list(RUNS.values()))
    root = pathlib.Path(tables.WORKDIR.value, tables.TIER.value, "safety")
    ranked, whole, after = {}, {}, {}  # of each ranking its runs by seed; the same of RUNS; what measures a seed's adapters
    todo = {}  # (ranking, seed, share) -> the run on what is kept
    for seed in sorted(set.intersection(*(set(found.runs[cell]) for cell in RUNS.values()))):
        runs = {name: found.runs[cell][seed] for name, cell in RUNS.items()}
        config = workspace.read_config(runs["offline"].workdir)
        setup = train.load(config)
        after[seed] = setup.model, measures.after_training(config, setup)
        for name, run in runs.items():
            whole.setdefault(CALLED[name], {})[seed] = run
        for name, (values, seconds) in rankings(config, setup, runs).items():
            file = root / f"rankings_{seed}" / f"{cells.slug(name)}.parquet"
            judged = measures.planted_rows(values, setup.lower.rows, config.eval.keep) | {SECONDS: seconds}
            ranked.setdefault(name, {})[seed] = comparing.Run(file, judged)
            for share, kept in keep(file, values, setup.lower.rows, shares).items():
                alone = {"method": "mixing", "mixing.rho": 1.0, "data.lower": kept, "data.num_lower": 0, "eval.num_lower": 0}
                settings = tables.changes() | alone | {"seed": seed, "num_epochs": round(config.num_epochs / share)}
                settings |= {"log.tensorboard": False}
                todo[name, seed, share] = cells.make(paper.CONFIGS["safety"], kept.with_suffix(""), settings)
    for (name, seed, share), cell in todo.items():
        if name == OURS:
            said = tables.printed(cell).replace(f"seed={seed}", "seed=SEED").replace(f"rankings_{seed}", "rankings_SEED")
            found.commands[f"{OURS}, {share:.0%} kept"] = said
    for (name, seed, share), result in zip(todo, cells.run_all(list(todo.values()), cells.local(tables.JOBS.value))):
        if isinstance(result, str):
            found.failures.append(f"{name}, seed {seed}, {share:.0%} kept: {result} ({todo[name, seed, share].log})")
            continue
        model, measure = after[seed]
        _, adapter = huggingface.load_adapter(pathlib.Path(todo[name, seed, share].workdir, "adapter"), model)
        ranked[name][seed].values.update({at(key, share): value for key, value in measure(adapter).items()})
    for of_name in whole.values():
        for seed, run in of_name.items():
            model, measure = after[seed]
            run.values.update(measure(huggingface.load_adapter(run.workdir / "adapter", model)[1]))
    write(found, found._replace(runs=ranked), whole, shares)


def write(found: comparing.Results, results: comparing.Results, whole: dict, shares: list[float]) -> None:
    keys = dict.fromkeys(key for of_name in results.runs.values() for run in of_name.values() for key in run.values)
    by_kind = {key.removeprefix(measures.KIND): key for key in keys if key.startswith(measures.KIND)}
    lines = [*comparing.rows(results, FOUND | {SECONDS: SECONDS}), "", "AUROC of each kind of bad rows against all right ones:", ""]
    lines += [*comparing.rows(results, by_kind), ""]
    lines += ["After training on what a ranking keeps, with about as many steps as on all rows:", ""]
    for key, text in AFTER.items():
        lines += [f"{text}, by the share kept:", "", *comparing.rows(results, {f"{one:.0%}": at(key, one) for one in shares}), ""]
    lines += ["Without choosing rows:", "", *comparing.rows(found._replace(runs=whole), {text: key for key, text in AFTER.items()})]
    middle = shares[len(shares) // 2]
    shown = FOUND | {f"{text}, {middle:.0%} kept": at(key, middle) for key, text in SHOWN.items()}
    draw = functools.partial(comparing.dots, results=results, columns=shown, published=(OURS,))
    tables.write("rivals", "Rankings of training rows", [results], lines, claims(shares), draw, (11.0, 3.6))


if __name__ == "__main__":
    cli.run(main)

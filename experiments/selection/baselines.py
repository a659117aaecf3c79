"""Rankings of the safety task's rows, bilevel selectors' beside others': `python -m experiments.rivals --tier=tiny --seeds=4`.

For each seed the rows are those of Table 3's runs. A selector's ranking is the weights of its run; other rankings by trained models
take two more: fine-tuning on the trusted rows alone, and on the mixture alone. Every ranking is left as a file of weights
(WORKDIR/TIER/safety/rankings_K/NAME.parquet), as a run leaves its own. The rows that the shipped selector keeps, and those that the
scores keep by which others choose, are exported from these, and a model is trained on them alone, for about as many steps as on all
rows (not with --ranking_only). Which rows are bad, and how, only the measure knows.
"""

import functools
import pathlib
import time

import numpy as np
import scipy.stats
import tqdm
from absl import flags

from bilevel_jax import cli, features, scoring
from bilevel_jax import setup as setups
from bilevel_jax.data import rows
from bilevel_jax.export import selected_rows
from bilevel_jax.models import huggingface
from bilevel_jax.runtime import metrics, weight_table
from bilevel_jax.runtime.workdir import read_config
from experiments import comparing, measures, tables
from experiments.paper import published
from experiments.selection import scores

FLAGS = flags.FlagValues()
KEEP = flags.DEFINE_multi_float(
    "keep", [0.8, 0.5, 0.2], "Shares of the rows to train on.", lower_bound=0.01, upper_bound=1.0, flag_values=FLAGS
)
RANKING_ONLY = flags.DEFINE_bool(
    "ranking_only", False, "Trains on no kept rows; for real rows, whose right answers nobody knows.", flag_values=FLAGS
)

OURS = "bilevel selection"
SELECTORS = {  # ranking -> cell
    OURS: "offline",
    "bilevel, paper's Adam": "bds, Adam 1e-4",
    "bilevel, SGD": "bds, SGD 30",
    "bilevel, bmo": "bmo, τ=1",
    "bilevel, tracked v(ω)": "tracked v(ω)",
    "bilevel, features": "features",
    "bilevel, unrolled": "unrolled",
}
FURTHER = tuple(SELECTORS)[1:]
TRUSTED, MIXED = "mixing, ρ=0", "mixing, ρ=1"
CALLED = {"offline": "bilevel selection, its own adapter", TRUSTED: "the trusted rows alone", MIXED: "all rows"}
RIVALS = ("−ℓ, base model", "−ℓ, trusted rows", "−ℓ and trust", "excess loss", "gradient alignment", "IFD", "DSIR")
USED = ("−ℓ, base model", "gradient alignment", "IFD", "DSIR", "long answers", "random")  # what others choose rows by
SECONDS, HELD_OUT = "seconds", "auroc_held_out"
FOUND = {"AUROC": measures.AUROC, "against hard rows": measures.HARD, "bad kept": measures.KEPT, "AUROC, rows held out": HELD_OUT}
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
        for name in (*FURTHER, *RIVALS)
    ]
    for share in shares:
        found += [
            comparing.Claim(f"trusted rows, {share:.0%} kept: {OURS} below {name}", OURS, name, at(measures.UPPER, share))
            for name in USED
        ]
    return tuple(found)


# --------------------------------------------------------------------------------------------------------------------
# Rankings
# --------------------------------------------------------------------------------------------------------------------


def rankings(config, setup: setups.Setup, runs: dict[str, comparing.Run]) -> dict[str, tuple[np.ndarray, float]]:
    """Of each ranking its scores [n] of the lower level's rows, higher is better, and the seconds that they took, those of the runs
    (by cell) that it needs among them."""
    base, examples = setup.base, setup.lower.examples
    score = scoring.make_scorer(setup.model, config.batch.micro_size, config.data.max_length, setup.mesh)
    adapters = {cell: huggingface.load_adapter(runs[cell].workdir / "adapter", setup.model)[1] for cell in (TRUSTED, MIXED)}

    def losses(cell: str | None = None):
        return scores.losses_of(score, base, adapters.get(cell), examples)

    def selected(cell: str):
        return measures.column(weight_table.latest(runs[cell].workdir), "logit", setup.lower.rows)

    def trust():
        return setups.fit_features(config, setup)[1][:, features.CCA_SCORE]

    how = {name: ((cell,), functools.partial(selected, cell)) for name, cell in SELECTORS.items() if cell in runs}
    how |= {  # the runs that a ranking takes, and what it makes of them
        "−ℓ, base model": ((), lambda: -losses()),
        "−ℓ, trusted rows": ((TRUSTED,), lambda: -losses(TRUSTED)),
        "−ℓ and trust": ((), lambda: scipy.stats.zscore(-losses()) + scipy.stats.zscore(trust())),
        "excess loss": ((TRUSTED, MIXED), lambda: losses(MIXED) - losses(TRUSTED)),
        "gradient alignment": ((MIXED,), lambda: scores.alignment(setup.model, base, adapters[MIXED], setup.upper, setup.lower)),
        "IFD": ((), lambda: scores.difficulty(score, base, examples)),
        "DSIR": ((), lambda: scores.importance(setup.upper.rows, setup.lower.rows)),
        "long answers": ((), lambda: np.array([float(len(one.response)) for one in examples])),
        "random": ((), lambda: np.random.default_rng(config.seed).random(len(examples))),
    }
    found = {}
    for name, (needed, make) in tqdm.tqdm(how.items(), desc=f"ranking, seed {config.seed}", unit="ranking"):
        began = time.perf_counter()
        values = make()
        seconds = time.perf_counter() - began + sum(runs[cell].values["time/train"] for cell in needed)
        found[name] = values, seconds
    return found


def held_out(config, setup: setups.Setup, run: comparing.Run) -> float:
    """AUROC of the lower level's held-out rows, ranked by what a selector learned of the features of others."""
    encoder, _ = features.read(run.workdir / features.FILE)
    level = setup.lower
    raw = features.pooled(setup.model, setup.base, level.eval_examples, config.batch.micro_size, config.data.max_length, setup.mesh)
    logits = features.encode(encoder, raw) @ features.read_params(run.workdir / features.PARAMS_FILE)
    return metrics.auroc(-logits, measures.marks(level.eval_rows).bad)


def keep(file: pathlib.Path, values: np.ndarray, given: list[rows.Row], shares: list[float]) -> dict[float, pathlib.Path]:
    """Leaves a ranking as `file`, and beside it, as JSONL, the rows that it keeps; returns these files by share."""
    nothing, kept = np.zeros(len(given)), {}
    table = weight_table.table(given, (values - values.mean()) / values.std(), nothing, nothing)
    weight_table.write(file, table)
    for share in shares:
        kept[share] = file.with_name(f"{file.stem}_{100 * share:g}.jsonl")
        selected_rows.write(kept[share], [one.row.fields for one in selected_rows.select(given, table, share)])
    return kept


# --------------------------------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------------------------------


def main() -> None:
    if tables.TIER.value != "tiny" and not RANKING_ONLY.value:
        raise ValueError(f"--tier={tables.TIER.value}: right answers are known of generated rows alone; add --ranking_only")
    shares = [] if RANKING_ONLY.value else sorted(set(KEEP.value), reverse=True)
    found = tables.run("safety", [*SELECTORS.values(), TRUSTED, MIXED])
    root = pathlib.Path(tables.WORKDIR.value, tables.TIER.value, "safety")
    ranked, whole, after = {}, {}, {}  # of each ranking its runs by seed; the same of CALLED; what measures a seed's adapters
    todo = {}  # (ranking, seed, share) -> the run on what is kept
    for seed in sorted(set.intersection(*(set(of_cell) for of_cell in found.runs.values()))):
        runs = {cell: of_cell[seed] for cell, of_cell in found.runs.items()}
        config = read_config(runs[MIXED].workdir)
        setup = setups.load(config)
        known = measures.marks(setup.lower.rows)
        for name, (values, seconds) in rankings(config, setup, runs).items():
            file = root / f"rankings_{seed}" / f"{runs.slug(name)}.parquet"
            judged = measures.ranked_rows(values, known, config.eval.keep) | {SECONDS: seconds}
            if name in SELECTORS:
                judged |= measures.over_epochs(runs[SELECTORS[name]].workdir, setup.lower.rows, known)
            if SELECTORS.get(name) == "features":
                judged[HELD_OUT] = held_out(config, setup, runs["features"])
            ranked.setdefault(name, {})[seed] = comparing.Run(file, judged)
            kept_files = keep(file, values, setup.lower.rows, shares if name in (OURS, *USED) else [])
            for share, kept in kept_files.items():
                alone = {"method": "mixing", "mixing.rho": 1.0, "data.lower": kept, "data.num_lower": 0, "eval.num_lower": 0}
                settings = tables.changes() | alone | {"seed": seed, "num_epochs": round(config.num_epochs / share)}
                settings |= {"log.tensorboard": False}
                todo[name, seed, share] = runs.make(published.CONFIGS["safety"], kept.with_suffix(""), settings)
        if shares:
            after[seed] = setup.model, measures.after_training(config, setup)
            for cell, name in CALLED.items():
                whole.setdefault(name, {})[seed] = runs[cell]
    for (name, seed, share), cell in todo.items():
        if name == OURS:
            said = tables.printed(cell).replace(f"seed={seed}", "seed=SEED").replace(f"rankings_{seed}", "rankings_SEED")
            found.commands[f"{OURS}, {share:.0%} kept"] = said
        if runs.finished(cell) is None:
            tables.note_commit(cell)
    for (name, seed, share), result in zip(todo, runs.run_all(list(todo.values()), runs.local(tables.JOBS.value))):
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
    lines += comparing.rows(results, by_kind)
    bilevel = results._replace(runs={name: of_name for name, of_name in results.runs.items() if name in SELECTORS})
    for text, key in (("all right ones", measures.AUROC), ("hard right ones", measures.HARD)):
        by_epoch = {f"epoch {one.split('/')[1]}": one for one in keys if one.startswith(measures.EPOCH) and one.endswith(f"/{key}")}
        lines += ["", f"AUROC of bad rows against {text}, by the weights after each epoch:", "", *comparing.rows(bilevel, by_epoch)]
    shown = {heading: key for heading, key in FOUND.items() if key != HELD_OUT}
    if shares:
        trained = results._replace(runs={name: results.runs[name] for name in (OURS, *USED)})
        lines += ["", "After training on what a ranking keeps, with about as many steps as on all rows:", ""]
        for key, text in AFTER.items():
            by_share = {f"{one:.0%}": at(key, one) for one in shares}
            lines += [f"{text}, by the share kept:", "", *comparing.rows(trained, by_share), ""]
        columns = {text: key for key, text in AFTER.items()}
        lines += ["Without choosing rows:", "", *comparing.rows(found._replace(runs=whole), columns)]
        middle = shares[len(shares) // 2]
        shown |= {f"{text}, {middle:.0%} kept": at(key, middle) for key, text in SHOWN.items()}
    draw = functools.partial(comparing.dots, results=results, columns=shown, published=SELECTORS)
    made = [claim for claim in claims(shares) if claim.than in results.runs]  # a selector can be left out
    tables.write("rivals", "Rankings of training rows", [results], lines, made, draw, (11.0, 4.6))


if __name__ == "__main__":
    cli.run(main, tables.FLAGS, FLAGS)

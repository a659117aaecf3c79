"""Bilevel selection against other rankings of training rows: `python -m experiments.baselines --tier=tiny --seeds=4`.

The rows of a seed are those of Table 3's runs on the safety task. The ranking of a selector is the weights of its run. Rankings by
trained models need two more runs: fine-tuning on the trusted rows only, and on the mixture only. Every ranking is written as a file
of weights, WORKDIR/TIER/safety/rankings_K/NAME.parquet. For bilevel selection and for the usual baselines, the kept rows are
exported and a model is trained on them only, for about as many steps as on all rows (not with --ranking_only). Labels of bad rows
are used for measurement only.
"""

import functools
import itertools
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.stats
import tqdm
from absl import flags

from bilevel_jax import cli, features, ranking, scoring
from bilevel_jax import setup as setups
from bilevel_jax.data import rows as data_rows
from bilevel_jax.export import records, selected_rows
from bilevel_jax.models import huggingface
from bilevel_jax.runtime import weight_table
from bilevel_jax.runtime.workdir import read_config
from experiments import comparing, measures, runs, tables
from experiments.paper import published
from experiments.selection import scores

FLAGS = flags.FlagValues()
KEEP = flags.DEFINE_multi_float(
    "keep", [0.8, 0.5, 0.2], "Shares of the rows to keep and train on.", lower_bound=0.01, upper_bound=1.0, flag_values=FLAGS
)
RANKING_ONLY = flags.DEFINE_bool(
    "ranking_only", False, "Skips training on kept rows; for real rows, whose right answers are unknown.", flag_values=FLAGS
)

OURS = "bilevel selection"
SELECTORS = {  # ranking -> cell
    OURS: "offline",
    "bilevel, paper's Adam": "bds, Adam 1e-4",
    "bilevel, SGD": "bds, SGD 30",
    "bilevel, bmo": "bmo, τ=1",
    "bilevel, tracked v(ω)": "tracked v(ω)",
    "bilevel, features": "features",
    "bilevel, influence": "default, offline",
}
TRUSTED, MIXED = "mixing, ρ=0", "mixing, ρ=1"
REFERENCES = {"offline": "bilevel selection, its own adapter", TRUSTED: "the trusted rows alone", MIXED: "all rows"}  # cell -> name
BASELINES = ("−ℓ, base model", "−ℓ, trusted rows", "−ℓ and trust", "excess loss", "gradient alignment", "IFD", "DSIR")
TRAINED = (  # baselines whose kept rows train a model
    "−ℓ, base model",
    "gradient alignment",
    "IFD",
    "DSIR",
    "long answers",
    "random",
)
SECONDS, HELD_OUT = "seconds", "auroc_held_out"
COLUMNS = {
    "AUROC": measures.AUROC,
    "against hard rows": measures.HARD,
    "share of bad rows kept": measures.KEPT,
    "share of kept rows that are bad": measures.AMONG_KEPT,
    "AUROC, rows held out": HELD_OUT,
}
AFTER = {  # measures of a model trained on kept rows
    measures.UPPER: "Loss of held-out trusted rows",
    measures.RIGHT: "Loss of right answers to the mixture's held-out questions",
    measures.ACCURACY: "Share of these questions that are answered right",
}
FIGURE_AFTER = {measures.UPPER: "trusted rows", measures.ACCURACY: "answered right"}


def at(key: str, share: float) -> str:
    """Key of a measure of the model trained on this share of the rows."""
    return f"{key}, {share:.0%} kept"


def claims(shares: list[float]) -> tuple[comparing.Claim, ...]:
    """Bilevel selection against all other rankings, and against the baselines after training on kept rows."""
    others = (*(name for name in SELECTORS if name != OURS), *BASELINES)
    rankings = [
        comparing.Claim(f"AUROC{against}: {OURS} above {name}", OURS, name, key, higher=True)
        for against, key in (("", measures.AUROC), (" against hard rows", measures.HARD))
        for name in others
    ]
    trained = [
        comparing.Claim(f"trusted rows, {share:.0%} kept: {OURS} below {name}", OURS, name, at(measures.UPPER, share))
        for share in shares
        for name in TRAINED
    ]
    return (*rankings, *trained)


# --------------------------------------------------------------------------------------------------------------------
# Rankings
# --------------------------------------------------------------------------------------------------------------------


def rankings(config, setup: setups.Setup, by_cell: dict[str, comparing.Run]) -> dict[str, tuple[np.ndarray, float]]:
    """Scores [n] of the lower level's rows by each ranking, higher is better, and the seconds they take.

    Args:
      config: of the runs.
      setup: their model and data.
      by_cell: the runs of one seed. The training time of a run counts for every ranking that needs it.
    """
    base, examples = setup.base, setup.lower.examples
    score = scoring.make_scorer(setup.model, config.batch.micro_size, config.data.max_length, setup.mesh)
    adapters = {cell: huggingface.load_adapter(by_cell[cell].workdir / "adapter", setup.model)[1] for cell in (TRUSTED, MIXED)}

    def losses(cell: str | None = None):
        return scores.losses_of(score, base, adapters.get(cell), examples)

    def selected(cell: str):
        return measures.column(weight_table.latest(by_cell[cell].workdir), "logit", setup.lower.rows)

    def trust():
        return setups.fit_features(config, setup)[1][:, features.CCA_SCORE]

    methods = {name: ((cell,), functools.partial(selected, cell)) for name, cell in SELECTORS.items() if cell in by_cell}
    methods |= {  # name -> cells of the required runs, function that computes the scores
        "−ℓ, base model": ((), lambda: -losses()),
        "−ℓ, trusted rows": ((TRUSTED,), lambda: -losses(TRUSTED)),
        "−ℓ and trust": ((), lambda: scipy.stats.zscore(-losses()) + scipy.stats.zscore(trust())),
        "excess loss": ((TRUSTED, MIXED), lambda: losses(MIXED) - losses(TRUSTED)),
        "gradient alignment": ((MIXED,), lambda: scores.alignment(setup.model, base, adapters[MIXED], setup.upper, setup.lower)),
        "IFD": ((), lambda: scores.difficulty(score, base, examples)),
        "DSIR": ((), lambda: scores.importance(setup.upper.rows, setup.lower.rows)),
        "long answers": ((), lambda: np.array([float(len(example.response)) for example in examples])),
        "random": ((), lambda: np.random.default_rng(config.seed).random(len(examples))),
    }
    ranked = {}
    for name, (cells, compute) in tqdm.tqdm(methods.items(), desc=f"ranking, seed {config.seed}", unit="ranking"):
        start = time.perf_counter()
        values = compute()
        seconds = time.perf_counter() - start + sum(by_cell[cell].values["time/train"] for cell in cells)
        ranked[name] = values, seconds
    return ranked


def held_out_auroc(config, setup: setups.Setup, run: comparing.Run) -> float:
    """AUROC of the lower level's held-out rows, ranked by the selector's function of the features."""
    encoder, _ = features.read(run.workdir / features.FILE)
    level = setup.lower
    raw = features.pooled(setup.model, setup.base, level.eval_examples, config.batch.micro_size, config.data.max_length, setup.mesh)
    logits = features.encode(encoder, raw) @ features.read_params(run.workdir / features.PARAMS_FILE)
    return ranking.auroc(-logits, measures.labels(level.eval_rows).bad)


def write_ranking(file: pathlib.Path, values: np.ndarray, rows: list[data_rows.Row], shares: list[float]) -> dict:
    """Writes a ranking as a file of weights, and beside it the rows that it keeps as JSONL. Returns these files by share."""
    zeros, kept = np.zeros(len(rows)), {}
    table = weight_table.table(rows, (values - values.mean()) / values.std(), zeros, zeros)
    weight_table.write(file, table)
    for share in shares:
        kept[share] = file.with_name(f"{file.stem}_{100 * share:g}.jsonl")
        is_kept = selected_rows.choose(table, share)  # in the order of the table, which is that of the rows
        records.write(kept[share], [row.fields for row in itertools.compress(rows, is_kept)])
    return kept


# --------------------------------------------------------------------------------------------------------------------
# The study
# --------------------------------------------------------------------------------------------------------------------


class Study(NamedTuple):
    """Rankings of all seeds, and the runs on the rows that they keep."""

    ranked: dict[str, dict[int, comparing.Run]]  # ranking -> seed
    references: dict[str, dict[int, comparing.Run]]  # REFERENCES -> seed
    measure: dict[int, Callable[[pathlib.Path], dict]]  # seed -> measures of the adapter in a directory
    cells: dict[tuple[str, int, float], runs.Cell]  # (ranking, seed, share) -> the run on the kept rows


def _kept_cell(kept: pathlib.Path, config, share: float) -> runs.Cell:
    """The run on kept rows alone, for about as many steps as on all rows."""
    only_kept = {"method": "mixing", "mixing.rho": 1.0, "data.lower": kept, "data.num_lower": 0, "eval.num_lower": 0}
    only_kept |= {"model.path": config.model.path, "data.upper": config.data.upper}  # the tier's, not those of the config file
    settings = tables.changes() | only_kept | {"seed": config.seed, "num_epochs": round(config.num_epochs / share)}
    return runs.make(published.CONFIGS["safety"], kept.with_suffix(""), settings | {"log.tensorboard": False})


def _measure_function(config, setup: setups.Setup) -> Callable[[pathlib.Path], dict]:
    measure = measures.after_training(config, setup)
    return lambda directory: measure(huggingface.load_adapter(directory, setup.model)[1])


def rank_seed(study: Study, seed: int, by_cell: dict[str, comparing.Run], root: pathlib.Path, shares: list[float]) -> None:
    """Adds the rankings of one seed to the study."""
    config = read_config(by_cell[MIXED].workdir)
    setup = setups.load(config)
    labels = measures.labels(setup.lower.rows)
    for name, (values, seconds) in rankings(config, setup, by_cell).items():
        file = root / f"rankings_{seed}" / f"{runs.slug(name)}.parquet"
        ranking = measures.ranked_rows(values, labels, config.eval.keep) | {SECONDS: seconds}
        if name in SELECTORS:
            ranking |= measures.over_epochs(by_cell[SELECTORS[name]].workdir, setup.lower.rows, labels)
        if SELECTORS.get(name) == "features":
            ranking[HELD_OUT] = held_out_auroc(config, setup, by_cell["features"])
        study.ranked.setdefault(name, {})[seed] = comparing.Run(file, ranking)
        kept_files = write_ranking(file, values, setup.lower.rows, shares if name in (OURS, *TRAINED) else [])
        study.cells.update({(name, seed, share): _kept_cell(kept, config, share) for share, kept in kept_files.items()})
    if shares:
        study.measure[seed] = _measure_function(config, setup)
        for cell, name in REFERENCES.items():
            study.references.setdefault(name, {})[seed] = by_cell[cell]


def train_on_kept(study: Study, results: comparing.Results) -> None:
    """Runs the cells of the study, and adds the measures of the trained models to the values of their rankings."""
    for (name, seed, share), cell in study.cells.items():
        if name == OURS:
            command = tables.printed(cell).replace(f"seed={seed}", "seed=SEED").replace(f"rankings_{seed}", "rankings_SEED")
            results.commands[f"{OURS}, {share:.0%} kept"] = command
    cells = list(study.cells.values())
    tables.note_commits(cells)
    for (name, seed, share), cell, result in zip(study.cells, cells, runs.run_all(cells, runs.local(tables.JOBS.value))):
        if isinstance(result, str):
            results.failures.append(f"{name}, seed {seed}, {share:.0%} kept: {result} ({cell.log})")
            continue
        values = study.measure[seed](pathlib.Path(cell.workdir, "adapter"))
        study.ranked[name][seed].values.update({at(key, share): value for key, value in values.items()})
    for by_seed in study.references.values():
        for seed, run in by_seed.items():
            run.values.update(study.measure[seed](run.workdir / "adapter"))


# --------------------------------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------------------------------


def _ranking_lines(results: comparing.Results) -> list[str]:
    """Tables of the rankings: overall, by kind of bad rows, and after each epoch."""
    keys = dict.fromkeys(key for by_seed in results.runs.values() for run in by_seed.values() for key in run.values)
    by_kind = {key.removeprefix(measures.KIND): key for key in keys if key.startswith(measures.KIND)}
    lines = [
        *comparing.rows(results, COLUMNS | {SECONDS: SECONDS}),
        "",
        "AUROC of each kind of bad rows against all right ones:",
        "",
    ]
    lines += comparing.rows(results, by_kind)
    bilevel = results._replace(runs={name: by_seed for name, by_seed in results.runs.items() if name in SELECTORS})
    for text, measure in (("all right ones", measures.AUROC), ("hard right ones", measures.HARD)):
        ends = [key for key in keys if key.startswith(measures.EPOCH) and key.endswith(f"/{measure}")]
        by_epoch = {f"epoch {key.split('/')[1]}": key for key in ends}
        lines += ["", f"AUROC of bad rows against {text}, by the weights after each epoch:", "", *comparing.rows(bilevel, by_epoch)]
    return lines


def _training_lines(results: comparing.Results, references: comparing.Results, shares: list[float]) -> list[str]:
    """Tables of the models trained on kept rows, and of those trained without choosing rows."""
    trained = results._replace(runs={name: results.runs[name] for name in (OURS, *TRAINED)})
    lines = ["", "After training on the rows that a ranking keeps, with about as many steps as on all rows:", ""]
    for key, text in AFTER.items():
        by_share = {f"{share:.0%}": at(key, share) for share in shares}
        lines += [f"{text}, by the share kept:", "", *comparing.rows(trained, by_share), ""]
    return [*lines, "Without choosing rows:", "", *comparing.rows(references, {text: key for key, text in AFTER.items()})]


def write(results: comparing.Results, references: comparing.Results, shares: list[float]) -> None:
    """Writes the page of the rankings."""
    lines = _ranking_lines(results)
    columns = {heading: key for heading, key in COLUMNS.items() if key not in (HELD_OUT, measures.AMONG_KEPT)}
    if shares:
        lines += _training_lines(results, references, shares)
        middle = shares[len(shares) // 2]
        columns |= {f"{text}, {middle:.0%} kept": at(key, middle) for key, text in FIGURE_AFTER.items()}
    draw = functools.partial(comparing.dots, results=results, columns=columns, published=SELECTORS)
    tested = [claim for claim in claims(shares) if claim.than in results.runs]  # --leave_out may name a selector
    tables.write("rivals", "Rankings of training rows", [results], lines, tested, draw, (11.0, 4.6), command="baselines")


def main() -> None:
    if tables.TIER.value != "tiny" and not RANKING_ONLY.value:
        raise ValueError(f"--tier={tables.TIER.value}: right answers are known only for generated rows; add --ranking_only")
    shares = [] if RANKING_ONLY.value else sorted(set(KEEP.value), reverse=True)
    results = tables.run("safety", [*SELECTORS.values(), TRUSTED, MIXED])
    root = pathlib.Path(tables.WORKDIR.value, tables.TIER.value, "safety")
    study = Study({}, {}, {}, {})
    for seed in sorted(set.intersection(*(set(by_seed) for by_seed in results.runs.values()))):
        rank_seed(study, seed, {cell: by_seed[seed] for cell, by_seed in results.runs.items()}, root, shares)
    train_on_kept(study, results)
    write(results._replace(runs=study.ranked), results._replace(runs=study.references), shares)


if __name__ == "__main__":
    cli.run(main, tables.FLAGS, FLAGS)

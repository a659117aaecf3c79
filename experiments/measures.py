"""What tables measure of finished runs beyond their summaries."""

import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import scipy.stats
import tqdm

from bilevel_jax import sampling, scoring
from bilevel_jax import setup as setups
from bilevel_jax.data import levels, rows, synthetic
from bilevel_jax.models import huggingface
from bilevel_jax.runtime import metrics, weight_table
from bilevel_jax.runtime.workdir import read_config
from experiments import comparing
from experiments.didactic import length_rewards

AUROC, KEPT, STRICT = "selector/auroc", "selector/bad_kept", "selector/auroc_strict"
TIER, SURE = "unsafe_tier", ("A", "H")  # how sure a row's label is: by a substantive answer (A), by annotators (H), else B
SAFE_ANSWERS = "safeinstr/safe_answer"  # source of right answers to unsafe questions
HARD, KIND = "auroc_hard", "kind/"
UPPER, RIGHT, ACCURACY = "eval/upper_loss", "eval/lower_clean_loss", "accuracy"
REWARD, LENGTH = "reward", "characters"
EPOCH = "epoch/"
WORD, WORD_INSIDE = "words", "words_inside"
WEIGHT, ORDER, RIGHT_WEIGHT = "weight/", "order", "right_weight"


def sure_labels(found: comparing.Results) -> None:
    """Adds to the runs' values the AUROC of those bad rows alone whose label is sure, against all others, where rows tell."""
    for run in (run for of_cell in found.runs.values() for run in of_cell.values() if AUROC in run.values):
        tiers = {row.id: row.fields.get(TIER) for row in levels.reopen(read_config(run.workdir))}
        table = weight_table.latest(run.workdir)
        sure = np.array([tiers.get(one) in SURE for one in table["id"].to_pylist()])
        if sure.any():
            run.values[STRICT] = metrics.auroc(-table["weight"].to_numpy(), sure)


class Marks(NamedTuple):
    """What rows are, [n] each. Only measures see it."""

    bad: np.ndarray
    hard: np.ndarray  # right, but not easy to learn
    kind: np.ndarray  # of bad rows


def marks(given: Sequence[rows.Row]) -> Marks:
    """Of generated rows: planted bad ones, and hard questions. Of the safety task's real ones: unsafe ones whose label is sure,
    and safe answers to unsafe questions."""

    def of(field: str) -> np.ndarray:
        return np.array([row.fields.get(field) for row in given])

    if "kind" in given[0].fields:
        return Marks(of("bad").astype(bool), of("difficulty") == "hard", of("kind"))
    return Marks(np.isin(of(TIER), SURE), of("source") == SAFE_ANSWERS, of("source"))


def ranked_rows(scores: np.ndarray, known: Marks, keep: float) -> dict[str, float]:
    """How well scores [n], higher is better, find bad rows: in all, of each kind, and against right rows that are hard. Measures
    that such rows do not allow are left out."""

    def auroc(among: np.ndarray) -> float:
        return metrics.auroc(-scores[among], known.bad[among])

    found = {AUROC: auroc(np.ones(len(scores), bool)), KEPT: metrics.bad_kept(scores, known.bad, keep)}
    hard = known.bad | known.hard
    if (known.hard & ~known.bad).any():
        found[HARD] = auroc(hard)
    return found | {KIND + one: auroc(~known.bad | (known.kind == one)) for one in sorted(set(known.kind[known.bad]))}


def column(table: pa.Table, name: str, given: Sequence[rows.Row]) -> np.ndarray:
    """A column of a table of weights, in the order of the given rows."""
    by_id = dict(zip(table["id"].to_pylist(), table[name].to_pylist()))
    return np.array([by_id[row.id] for row in given])


def over_epochs(workdir: pathlib.Path, given: Sequence[rows.Row], known: Marks) -> dict[str, float]:
    """AUROC of bad rows, and against right rows that are hard, of a run's weights after each of its epochs."""
    found = {}
    for epoch, file in weight_table.epoch_files(workdir).items():
        values = ranked_rows(column(weight_table.read(file), "logit", given), known, 1.0)
        found |= {f"{EPOCH}{epoch}/{key}": values[key] for key in (AUROC, HARD) if key in values}
    return found


def suppliers(found: comparing.Results) -> None:
    """Adds to the runs' values the mean weight of each supplier's rows, the rank correlation of these with the planted shares of
    right rows, and the share of all weight that right rows have."""
    right = {name: 1 - share for name, share in synthetic.SUPPLIERS.items()}
    for run in (run for of_cell in found.runs.values() for run in of_cell.values()):
        table = weight_table.latest(run.workdir)
        bad = {row.id: row.fields["bad"] for row in levels.reopen(read_config(run.workdir))}
        weight, source = table["weight"].to_numpy(), np.array(table["source"].to_pylist())
        mean = {name: float(weight[source == name].mean()) for name in right}
        run.values.update({f"{WEIGHT}{name}": value for name, value in mean.items()})
        if np.ptp(weight) > 0:
            run.values[ORDER] = float(scipy.stats.spearmanr(list(mean.values()), list(right.values())).statistic)
        run.values[RIGHT_WEIGHT] = float(weight @ [not bad[one] for one in table["id"].to_pylist()] / weight.sum())


def words(found: comparing.Results) -> None:
    """Adds to the runs' values how well their weights find bad words, in all and of each kind: the AUROC of tokens by the weight of
    the row times that of the token in it, and, where tokens have weights, by these alone. Where they have none their places are
    those of another run with the same seed."""
    by_seed = {}
    for run, seed in ((run, seed) for of_cell in found.runs.values() for seed, run in of_cell.items()):
        by_seed.setdefault(seed, []).append((run, weight_table.of_tokens(run.workdir)))
    for runs in by_seed.values():
        places = next(table for _, table in runs if table is not None)
        config = read_config(runs[0][0].workdir)
        given = {row.id: row for row in levels.reopen(config)}
        rows_of = [given[one] for one in places["id"].to_pylist()]
        kinds = np.array([row.fields["kind"] for row in rows_of])
        for run, table in runs:
            inside = [np.array(one) for one in (places if table is None else table)["weight"].to_pylist()]
            if table is None:
                inside = [np.ones(len(one)) for one in inside]
            of_row = column(weight_table.latest(run.workdir), "weight", rows_of)
            whole = [weight * one for weight, one in zip(of_row, inside)]
            for key, values in ((WORD, whole), (WORD_INSIDE, inside)):
                judged = places.set_column(1, "weight", pa.array(values))
                for kind in (None, *sorted(set(kinds) - {"clean"})):
                    part = np.flatnonzero(np.isin(kinds, ("clean", kind)) | (kind is None))
                    value = weight_table.token_auroc(judged.take(part), [rows_of[i] for i in part], config.data.spans)
                    run.values[key + (f"/{kind}" if kind else "")] = value


def after_training(config, setup: setups.Setup) -> Callable:
    """Builds `measure(adapter)`: losses of held-out trusted rows and of right answers to the mixture's held-out questions, and the
    share of these questions to which the most likely token after token is the right answer."""
    score = scoring.make_scorer(setup.model, config.batch.micro_size, config.data.max_length, setup.mesh, greedy=True)
    held_out = {UPPER: setup.upper.eval_examples, RIGHT: levels.with_truth(setup.lower, config, setup.tokenizer)}
    segments = {key: scoring.example_segments(examples) for key, examples in held_out.items()}

    def measure(adapter) -> dict[str, float]:
        found = {key: score(setup.base, adapter, of_key, "held-out rows") for key, of_key in segments.items()}
        losses = {key: scoring.mean_loss(nll, length) for key, (nll, length, _) in found.items()}
        return losses | {ACCURACY: float(np.mean(found[RIGHT][2]))}

    return measure


def answering(config, setup: setups.Setup, seed: int, count: int) -> Callable:
    """Builds `lengths(adapter)`: of `count` answers to each held-out trusted question, in characters, as a reward sees them."""
    settings = sampling.Settings(1.0, max_new_tokens=config.online.max_new_tokens)
    sample = sampling.make_sampler(
        setup.model, settings, setup.eos, slots=config.online.slots, length=config.data.max_length, mesh=setup.mesh
    )
    prompts = [example.prompt for example in setup.upper.eval_examples]
    keys = sampling.row_keys(seed, [row.id for row in setup.upper.eval_rows], 0, count)

    def lengths(adapter) -> np.ndarray:
        answers = sample(setup.base, adapter, prompts, keys, "answering")
        return np.array([len(setup.detokenize(one.tokens.tolist())) for of_question in answers for one in of_question])

    return lengths


def learned_lengths(found: comparing.Results, count: int) -> dict[int, np.ndarray]:
    """Adds mean reward and length of each run's answers to its values; returns by seed the lengths before training."""
    before = {}
    for seed in tqdm.tqdm(sorted({seed for of_cell in found.runs.values() for seed in of_cell}), desc="answering", unit="seed"):
        runs = {cell: of_cell[seed] for cell, of_cell in found.runs.items() if seed in of_cell}
        config = read_config(next(iter(runs.values())).workdir)
        setup = setups.load(config)
        lengths = answering(config, setup, seed, count)
        before[seed] = lengths(None)
        for cell, run in runs.items():
            _, adapter = huggingface.load_adapter(run.workdir / "adapter", setup.model)
            mine = lengths(adapter)
            run.values.update({REWARD: length_rewards.mean(cell.split(",")[0], mine), LENGTH: float(mine.mean())})
    return before

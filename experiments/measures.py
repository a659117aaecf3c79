"""Measures of finished runs that their summaries lack. Most functions add them to the values of the runs."""

import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import scipy.stats
import tqdm

from bilevel_jax import ranking, sampling, scoring
from bilevel_jax import setup as setups
from bilevel_jax.data import levels, streaming, synthetic
from bilevel_jax.data import rows as data_rows
from bilevel_jax.models import huggingface
from bilevel_jax.runtime import weight_table
from bilevel_jax.runtime.workdir import read_config
from experiments import comparing
from experiments.didactic import length_rewards

AUROC, CERTAIN_AUROC = "selector/auroc", "selector/auroc_strict"
KEPT, AMONG_KEPT = "selector/bad_kept", "selector/bad_among_kept"
TIER = "unsafe_tier"  # field: source of a row's label
CERTAIN = ("A", "H")  # tiers of certain labels, by a substantive answer (A) or by annotators (H); B is uncertain
SAFE_ANSWERS = "safeinstr/safe_answer"  # source of right answers to unsafe questions
HARD, KIND = "auroc_hard", "kind/"
UPPER, RIGHT, ACCURACY = "eval/upper_loss", "eval/lower_clean_loss", "accuracy"
REWARD, LENGTH = "reward", "characters"
EPOCH = "epoch/"
WORD, WORD_INSIDE = "words", "words_inside"
WEIGHT, ORDER, RIGHT_WEIGHT = "weight/", "order", "right_weight"


def all_runs(results: comparing.Results) -> Iterator[comparing.Run]:
    """The runs of all cells and seeds."""
    for by_seed in results.runs.values():
        yield from by_seed.values()


def rows_of(workdir: pathlib.Path) -> dict[str, data_rows.Row]:
    """The rows of the lower level of a run by id, those that were held out among them."""
    return {row.id: row for row in streaming.reopen(read_config(workdir))}


def column(table: pa.Table, name: str, rows: Sequence[data_rows.Row]) -> np.ndarray:
    """A column of a table of weights, in the order of the rows."""
    by_id = dict(zip(table["id"].to_pylist(), table[name].to_pylist()))
    return np.array([by_id[row.id] for row in rows])


# --------------------------------------------------------------------------------------------------------------------
# Rankings of rows
# --------------------------------------------------------------------------------------------------------------------


def add_certain_auroc(results: comparing.Results) -> None:
    """Adds the AUROC of the bad rows with a certain label against all other rows, if the data say how certain labels are."""
    for run in all_runs(results):
        if AUROC not in run.values:
            continue
        tiers = {row_id: row.fields.get(TIER) for row_id, row in rows_of(run.workdir).items()}
        table = weight_table.latest(run.workdir)
        certain = np.array([tiers.get(row_id) in CERTAIN for row_id in table["id"].to_pylist()])
        if certain.any():
            run.values[CERTAIN_AUROC] = ranking.auroc(-table["weight"].to_numpy(), certain)


class Labels(NamedTuple):
    """Labels of rows, [n] each, for measurement only."""

    bad: np.ndarray
    hard: np.ndarray  # right, but hard to learn
    kind: np.ndarray  # of bad rows


def labels(rows: Sequence[data_rows.Row]) -> Labels:
    """Generated rows: planted bad rows and hard questions. Real rows of the safety task: unsafe rows with a certain label, and
    safe answers to unsafe questions."""

    def values(field: str) -> np.ndarray:
        return np.array([row.fields.get(field) for row in rows])

    if "kind" in rows[0].fields:
        return Labels(values("bad").astype(bool), values("difficulty") == "hard", values("kind"))
    return Labels(np.isin(values(TIER), CERTAIN), values("source") == SAFE_ANSWERS, values("source"))


def ranked_rows(scores: np.ndarray, row_labels: Labels, keep: float) -> dict[str, float]:
    """Measures how well scores find bad rows: all of them, each kind, and all against hard right rows.

    Args:
      scores: [n], higher is better.
      row_labels: of the same rows.
      keep: share of the rows that counts as kept.

    Returns:
      The measures by key, without those that these rows do not allow.
    """
    bad = row_labels.bad

    def auroc(included: np.ndarray) -> float:
        return ranking.auroc(-scores[included], bad[included])

    values = {
        AUROC: auroc(np.ones(len(scores), bool)),
        KEPT: ranking.bad_kept(scores, bad, keep),
        AMONG_KEPT: ranking.bad_among_kept(scores, bad, keep),
    }
    if (row_labels.hard & ~bad).any():
        values[HARD] = auroc(bad | row_labels.hard)
    return values | {KIND + kind: auroc(~bad | (row_labels.kind == kind)) for kind in sorted(set(row_labels.kind[bad]))}


def over_epochs(workdir: pathlib.Path, rows: Sequence[data_rows.Row], row_labels: Labels) -> dict[str, float]:
    """AUROC of bad rows against all right rows and against hard right rows, by the weights of a run after each epoch."""
    values = {}
    for epoch, file in weight_table.epoch_files(workdir).items():
        ranking = ranked_rows(column(weight_table.read(file), "logit", rows), row_labels, 1.0)
        values |= {f"{EPOCH}{epoch}/{key}": ranking[key] for key in (AUROC, HARD) if key in ranking}
    return values


# --------------------------------------------------------------------------------------------------------------------
# Weights of sources and of tokens
# --------------------------------------------------------------------------------------------------------------------


def add_source_weights(results: comparing.Results) -> None:
    """Adds the mean weight of each supplier's rows, their rank correlation with the planted shares of right rows, and the share of
    the total weight that right rows have."""
    right = {name: 1 - share for name, share in synthetic.SUPPLIERS.items()}
    for run in all_runs(results):
        table = weight_table.latest(run.workdir)
        bad = {row_id: row.fields["bad"] for row_id, row in rows_of(run.workdir).items()}
        weight, source = table["weight"].to_numpy(), np.array(table["source"].to_pylist())
        mean = {name: float(weight[source == name].mean()) for name in right}
        run.values.update({f"{WEIGHT}{name}": value for name, value in mean.items()})
        if np.ptp(weight) > 0:
            run.values[ORDER] = float(scipy.stats.spearmanr(list(mean.values()), list(right.values())).statistic)
        is_right = [not bad[row_id] for row_id in table["id"].to_pylist()]
        run.values[RIGHT_WEIGHT] = float(weight @ is_right / weight.sum())


def add_token_aurocs(results: comparing.Results) -> None:
    """Adds the AUROC of tokens in bad words, for all kinds and for each kind of bad words.

    A token is ranked by the weight of its row times its weight within the row (`WORD`), and by the latter alone (`WORD_INSIDE`).
    Runs without token weights have weight 1 within rows; they take the offsets of the tokens from another run with the same seed.
    """
    by_seed: dict[int, list] = {}
    for runs in results.runs.values():
        for seed, run in runs.items():
            by_seed.setdefault(seed, []).append((run, weight_table.read_tokens(run.workdir)))
    for runs in by_seed.values():
        offsets = next(table for _, table in runs if table is not None)
        config = read_config(runs[0][0].workdir)
        by_id = rows_of(runs[0][0].workdir)
        ordered = [by_id[row_id] for row_id in offsets["id"].to_pylist()]
        for run, table in runs:
            inside = [np.array(weights) for weights in (offsets if table is None else table)["weight"].to_pylist()]
            if table is None:
                inside = [np.ones(len(weights)) for weights in inside]
            row_weights = column(weight_table.latest(run.workdir), "weight", ordered)
            products = [weight * weights for weight, weights in zip(row_weights, inside)]
            run.values.update(_token_aurocs(WORD, offsets, products, ordered, config.data.spans))
            run.values.update(_token_aurocs(WORD_INSIDE, offsets, inside, ordered, config.data.spans))


def _token_aurocs(key: str, offsets: pa.Table, weights, rows: Sequence[data_rows.Row], spans: str) -> dict[str, float]:
    """AUROC of the tokens in bad words against all others of right rows and of rows of the same kind, by kind."""
    kinds = np.array([row.fields["kind"] for row in rows])
    table = offsets.set_column(1, "weight", pa.array(weights))
    values = {}
    for kind in (None, *sorted(set(kinds) - {"clean"})):
        part = np.flatnonzero(np.isin(kinds, ("clean", kind)) | (kind is None))
        name = key + (f"/{kind}" if kind else "")
        values[name] = weight_table.token_auroc(table.take(part), [rows[i] for i in part], spans)
    return values


# --------------------------------------------------------------------------------------------------------------------
# Trained models
# --------------------------------------------------------------------------------------------------------------------


def after_training(config, setup: setups.Setup) -> Callable:
    """Builds `measure(adapter)`: losses of held-out trusted rows and of right answers to the mixture's held-out questions, and the
    share of these questions for which greedy decoding produces the right answer."""
    score = scoring.make_scorer(setup.model, config.batch.micro_size, config.data.max_length, setup.mesh, greedy=True)
    held_out = {UPPER: setup.upper.eval_examples, RIGHT: levels.with_truth(setup.lower, config, setup.tokenizer)}
    segments = {key: scoring.example_segments(examples) for key, examples in held_out.items()}

    def measure(adapter) -> dict[str, float]:
        scores = {key: score(setup.base, adapter, parts, "held-out rows") for key, parts in segments.items()}
        losses = {key: scoring.mean_loss(nll, length) for key, (nll, length, _) in scores.items()}
        return losses | {ACCURACY: float(np.mean(scores[RIGHT][2]))}

    return measure


def make_length_sampler(config, setup: setups.Setup, seed: int, num_samples: int) -> Callable:
    """Builds `lengths(adapter)`: lengths in characters of `num_samples` answers to each held-out trusted question."""
    settings = sampling.Settings(1.0, max_new_tokens=config.online.max_new_tokens)
    sample = sampling.make_sampler(
        setup.model, settings, setup.eos, slots=config.online.slots, length=config.data.max_length, mesh=setup.mesh
    )
    prompts = [example.prompt for example in setup.upper.eval_examples]
    keys = sampling.row_keys(seed, [row.id for row in setup.upper.eval_rows], 0, num_samples)

    def lengths(adapter) -> np.ndarray:
        answers = sample(setup.base, adapter, prompts, keys, "answering")
        return np.array([len(setup.detokenize(answer.tokens.tolist())) for group in answers for answer in group])

    return lengths


def add_learned_lengths(results: comparing.Results, num_samples: int) -> dict[int, np.ndarray]:
    """Adds the mean reward and the mean length of each run's answers; returns the lengths before training, by seed."""
    before = {}
    for seed in tqdm.tqdm(sorted({seed for runs in results.runs.values() for seed in runs}), desc="answering", unit="seed"):
        runs = {cell: by_seed[seed] for cell, by_seed in results.runs.items() if seed in by_seed}
        config = read_config(next(iter(runs.values())).workdir)
        setup = setups.load(config)
        lengths_of = make_length_sampler(config, setup, seed, num_samples)
        before[seed] = lengths_of(None)
        for cell, run in runs.items():
            _, adapter = huggingface.load_adapter(run.workdir / "adapter", setup.model)
            lengths = lengths_of(adapter)
            run.values.update({REWARD: length_rewards.mean(cell.split(",")[0], lengths), LENGTH: float(lengths.mean())})
    return before

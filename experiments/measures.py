"""What tables measure of finished runs beyond their summaries."""

from collections.abc import Callable, Sequence

import numpy as np
import tqdm

from bilevel_jax import metrics, sampling, scoring, train, weights, workspace
from bilevel_jax.data import levels, rows
from bilevel_jax.models import huggingface
from experiments import comparing, length_rewards

AUROC, KEPT, STRICT = "selector/auroc", "selector/bad_kept", "selector/auroc_strict"
TIER, SURE = "unsafe_tier", ("A", "H")  # how sure a row's label is: by a substantive answer (A), by annotators (H), else B
HARD, KIND = "auroc_hard", "kind/"
UPPER, RIGHT, ACCURACY = "eval/upper_loss", "eval/lower_clean_loss", "accuracy"
REWARD, LENGTH = "reward", "characters"


def sure_labels(found: comparing.Results) -> None:
    """Adds to the runs' values the AUROC of those bad rows alone whose label is sure, against all others, where rows tell."""
    for run in (run for of_cell in found.runs.values() for run in of_cell.values() if AUROC in run.values):
        tiers = {row.id: row.fields.get(TIER) for row in levels.reopen(workspace.read_config(run.workdir))}
        table = weights.latest(run.workdir)
        sure = np.array([tiers.get(one) in SURE for one in table["id"].to_pylist()])
        if sure.any():
            run.values[STRICT] = metrics.auroc(-table["weight"].to_numpy(), sure)


def planted_rows(scores: np.ndarray, given: Sequence[rows.Row], keep: float) -> dict[str, float]:
    """How well scores [n], higher is better, find planted bad rows: in all, of each kind, and against right rows that are hard."""
    bad = np.array([bool(row.fields["bad"]) for row in given])
    kind, hard = (np.array([row.fields[field] for row in given]) for field in ("kind", "difficulty"))
    found = {AUROC: metrics.auroc(-scores, bad), KEPT: metrics.bad_kept(scores, bad, keep)}
    among = bad | (hard == "hard")
    found[HARD] = metrics.auroc(-scores[among], bad[among])
    for one in sorted(set(kind[bad])):
        among = ~bad | (kind == one)
        found[KIND + one] = metrics.auroc(-scores[among], bad[among])
    return found


def after_training(config, setup: train.Setup) -> Callable:
    """Builds `measure(adapter)`: losses of held-out trusted rows and of right answers to the mixture's held-out questions, and the
    share of these questions to which the most likely token after token is the right answer."""
    score = scoring.make_scorer(setup.model, config.batch.micro_size, config.data.max_length, setup.mesh, greedy=True)
    held_out = {UPPER: setup.upper.eval_examples, RIGHT: levels.with_truth(setup.lower, config, setup.tokenizer)}
    segments = {key: scoring.segments_of(examples) for key, examples in held_out.items()}

    def measure(adapter) -> dict[str, float]:
        found = {key: score(setup.base, adapter, of_key, "held-out rows") for key, of_key in segments.items()}
        losses = {key: scoring.mean_loss(nll, length) for key, (nll, length, _) in found.items()}
        return losses | {ACCURACY: float(np.mean(found[RIGHT][2]))}

    return measure


def answering(config, setup: train.Setup, seed: int, count: int) -> Callable:
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
        config = workspace.read_config(next(iter(runs.values())).workdir)
        setup = train.load(config)
        lengths = answering(config, setup, seed, count)
        before[seed] = lengths(None)
        for cell, run in runs.items():
            _, adapter = huggingface.load_adapter(run.workdir / "adapter", setup.model)
            mine = lengths(adapter)
            run.values.update({REWARD: length_rewards.mean(cell.split(",")[0], mine), LENGTH: float(mine.mean())})
    return before

"""What a run measures: losses of held-out rows, and what the selector's weights say about the labels."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax import config as configuration
from bilevel_jax import losses, objective, online, preferences, ranking, scoring, selector, sharding, token_weights, train_state
from bilevel_jax.data import levels, packing, templates
from bilevel_jax.errors import REMEDY, RunError


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Rows that a run is measured on and never trained on.

    Attributes:
      examples: by name: `upper`, `lower`, `lower_clean` (the lower level's questions with right responses).
      references: of the levels that learn pairs, the reference model's log-probabilities, [n, 2].
      objective: the losses of both levels.
    """

    examples: dict[str, Sequence[templates.Example]]
    references: dict[str, np.ndarray]
    objective: objective.Objective

    def pair_margins(self, name: str, log_ratio_nx2: packing.Array, length_nx2: packing.Array) -> packing.Array:
        """The margin of each pair of a level, `upper` or `lower`, as it is trained on, [n]."""
        if getattr(self.objective, name) == "ipo":
            log_ratio_nx2 = losses.reduce_tokens(log_ratio_nx2, length_nx2, self.objective.reduction)
        return log_ratio_nx2 @ np.array([1.0, -1.0])


def held_out(config: configuration.Config, upper: levels.Level, lower: levels.Level, tokenizer, score, base) -> HeldOut:
    """The held-out rows of both levels."""
    examples = {"upper": upper.eval_examples, "lower": lower.eval_examples}
    examples["lower_clean"] = levels.with_truth(lower, config, tokenizer)
    references = {
        name: scoring.pair_log_probs(score, base, None, examples[name], "reference")
        for name in ("upper", "lower")
        if getattr(config.loss, name) in preferences.PAIRS
    }
    return HeldOut(examples, references, configuration.to_objective(config))


def measure(rows: HeldOut, score: Callable, base, adapter) -> dict[str, float]:
    """`eval/NAME_loss`, the mean ℓ of held-out rows (of pairs, of the chosen responses); of pairs also `eval/NAME_pair_loss`, the
    loss that is trained on, and `eval/NAME_pair_accuracy`, which counts ties half.

    Where the data say what right responses are, also `eval/NAME_right`, the share of the questions to which greedy decoding gives
    exactly that response.

    Args:
      score: from `scoring.make_scorer` with `greedy`.
    """
    values = {}
    for name, examples in rows.examples.items():
        if not examples:
            continue
        are_pairs = name in rows.references
        segments = scoring.pair_segments(examples) if are_pairs else scoring.example_segments(examples)
        nll, length, right = score(base, adapter, segments, f"evaluating {name}")
        chosen = slice(None, None, 2 if are_pairs else 1)
        values[f"eval/{name}_loss"] = scoring.mean_loss(nll[chosen], length[chosen])
        if name != "lower" and rows.examples["lower_clean"]:
            values[f"eval/{name}_right"] = float(np.mean(right[chosen]))
        if are_pairs:
            margin = rows.pair_margins(name, -nll.reshape(-1, 2) - rows.references[name], length.reshape(-1, 2))
            pair_loss = preferences.pair_losses(getattr(rows.objective, name), margin, rows.objective.beta)
            values[f"eval/{name}_pair_loss"] = float(np.mean(pair_loss))
            values[f"eval/{name}_pair_accuracy"] = float(np.mean((margin > 0) + 0.5 * (margin == 0)))
    return values


def rows_in_use(
    examples: Sequence[templates.Example], store: online.ResponseStore, chosen: np.ndarray, score: Callable, base, adapter
) -> dict[str, float]:
    """The loss of training rows with the responses in use, and with those of the data.

    Args:
      examples: the training rows of the lower level.
      store: the generated responses in use.
      chosen: indices of the rows to measure.
      score: from `scoring.make_scorer` with `greedy`.

    Returns:
      `eval/used_loss`, the mean ℓ of the rows, where that of a question with generated responses is the mean over these;
      `eval/used_data_loss`, of the same rows with the responses of the data; `eval/used_generated`, the share of the former kind.
    """
    generated = [(row, index) for row in chosen for index in store.by_row.get(int(row), ())]
    segments = scoring.example_segments([examples[row] for row in chosen])
    segments += [packing.Segment(examples[row].prompt, store.tokens[index]) for row, index in generated]
    nll, length, _ = score(base, adapter, segments, "evaluating rows in use")
    loss = nll / np.maximum(length, 1)
    of_data, used = loss[: len(chosen)], loss[: len(chosen)].copy()
    answered = np.array([row for row, _ in generated], int)
    for row in np.unique(answered):
        used[chosen == row] = loss[len(chosen) :][answered == row].mean()
    share = float(np.isin(chosen, answered).mean())
    return {"eval/used_loss": float(used.mean()), "eval/used_data_loss": float(of_data.mean()), "eval/used_generated": share}


def selector_metrics(state: train_state.State, rule: str, bad: np.ndarray | None, keep: float) -> dict[str, float]:
    """`selector/*`: the distribution of the weights, and how well they rank rows that the data label bad.

    Args:
      rule: of the selector; `uniform` ranks nothing.
      bad: labels of the training rows, or None; for measurement only.
      keep: the share of rows that counts as kept.
    """
    logits = sharding.to_host(state.selector.logits)
    of_weights = jax.tree.map(sharding.to_host, selector.summary(state.selector.logits))
    values = {f"selector/{key}": value for key, value in selector.numbers(of_weights).items()}
    if state.token_params is not None:
        values |= {f"selector/token_{name}": float(value) for name, value in zip(token_weights.SCORES, state.token_params)}
    if bad is not None and bad.any() and not bad.all() and rule != "uniform":
        values["selector/auroc"] = ranking.auroc(-logits, bad)
        surprise = sharding.to_host(state.selector.surprise)
        known = np.isfinite(surprise)  # not of rows that were only visited with generated responses
        if bad[known].any() and not bad[known].all():
            values["selector/auroc_plausible"] = ranking.auroc(surprise[known], bad[known])
        values["selector/bad_kept"] = ranking.bad_kept(logits, bad, keep)
        if not math.isnan(share := ranking.bad_among_kept(logits, bad, keep)):  # of few rows none may be kept
            values["selector/bad_among_kept"] = share
    return values


def check_finite(state: train_state.State, values: dict[str, float]) -> None:
    """Refuses a state that diverged.

    Raises:
      RunError: a measure or a parameter is not finite; one line that names it.
    """
    broken = [key for key, value in values.items() if not math.isfinite(value)]
    if not jax.tree.all(jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), state.policy.adapter)):
        broken.append("θ")  # without held-out rows no loss would show it
    if broken:
        raise RunError(f"step {int(state.step)}: {', '.join(broken)} not finite; {REMEDY}")

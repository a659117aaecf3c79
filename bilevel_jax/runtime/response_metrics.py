"""Metrics of generated responses: number of masked rows, lengths, rewards, correction rate, importance ratios."""

from collections.abc import Sequence

import numpy as np

from bilevel_jax import importance, selector
from bilevel_jax.online import Generation, ResponseStore, best_and_worst


def refresh_metrics(
    store: ResponseStore, generations: Sequence[Generation], bad: np.ndarray | None, truths: Sequence[str | None]
) -> dict[str, float]:
    """Metrics of one refresh.

    `online/correction_rate` is the fraction of correct responses among those to questions whose response in the data is bad.

    Args:
      store: responses that are used for training.
      generations: all generated responses.
      bad: label of each lower-level row, or None; for measurement only.
      truths: correct response of each lower-level row, or None; for measurement only.
    """
    values = {"online/masked": float(store.masked.sum()), "online/responses": float(len(generations))}
    if bad is not None and store.masked.any():
        values["online/masked_bad"] = float(bad[store.masked].mean())
    if not generations:
        return values
    lengths = [len(generation.response.tokens) for generation in generations]
    values["online/response_length"] = float(np.mean(lengths))
    values["online/eos_rate"] = float(np.mean([one.response.finish_reason == "stop" for one in generations]))
    values["online/empty"] = float(np.mean([not one.text.strip() for one in generations]))
    values |= _reward_metrics(store, generations, truths)
    to_bad = [(one.text, truths[one.row_index]) for one in generations if bad is not None and bad[one.row_index]]
    are_right = [text.strip() == truth.strip() for text, truth in to_bad if truth is not None]
    if are_right:
        num_correct = sum(are_right)
        values |= {"online/bad_answered": float(len(are_right)), "online/bad_right": float(num_correct)}
        values["online/correction_rate"] = num_correct / len(are_right)
    return values


def _reward_metrics(store: ResponseStore, generations: Sequence[Generation], truths: Sequence[str | None]) -> dict[str, float]:
    """Mean reward, mean gap between best and worst response to a question, and accuracy of all and of the best responses."""
    if store.reward is None:
        return {}
    ends = np.array([best_and_worst(store, row) for row in store.by_row])
    gap = store.reward[ends[:, 0]] - store.reward[ends[:, 1]]
    values = {"online/reward": store.reward.mean(), "online/reward_gap": gap.mean(), "online/reward_ties": (gap == 0).mean()}
    text = {(one.row_index, one.sample_index): one.text.strip() for one in generations}
    texts = [text[key] for key in zip(store.row_index, store.sample_index)]
    with_truth = [i for i, row_index in enumerate(store.row_index) if truths[row_index] is not None]
    correct = {i: texts[i] == truths[store.row_index[i]].strip() for i in with_truth}
    best_correct = [correct[i] for i in ends[:, 0] if i in correct]
    if correct:
        values |= {"online/right": np.mean([*correct.values()]), "online/best_right": np.mean(best_correct)}
    return {name: float(value) for name, value in values.items()}


def add_counts(totals: dict[str, float], values: dict[str, float]) -> dict[str, float]:
    """Adds the counts of one refresh to those of all earlier ones, and returns the sums with the overall correction rate."""
    names = "online/responses", "online/bad_answered", "online/bad_right"
    totals = {name: totals.get(name, 0.0) + values.get(name, 0.0) for name in names}
    answered = totals["online/bad_answered"]
    return totals | ({"online/correction_rate": totals["online/bad_right"] / answered} if answered else {})


def ratio_metrics(log_ratio: np.ndarray, clipped: Sequence[np.ndarray], ess: Sequence[float]) -> dict[str, float]:
    """Importance ratios since the last event: r before clipping, the clipped fraction, and the mean of `group_ess`."""
    ratio = np.exp(np.minimum(log_ratio, importance.LARGE))
    values = {"online/ratio_mean": float(ratio.mean())}
    values |= {f"online/ratio_p{p:02}": float(np.percentile(ratio, p)) for p in (5, 50, 95)}
    if len(clipped):
        values["online/clip_fraction"] = float(np.concatenate(clipped).mean())
    return values | ({"online/ess": float(np.mean(ess))} if len(ess) else {})


def group_ess(weight: np.ndarray, group: np.ndarray) -> list[float]:
    """ESS/G of the response weights of each question with more than one response; 0 if all its weights are 0."""
    values = []
    for number in np.unique(group):
        w = weight[group == number].astype(np.float64)
        if len(w) > 1:
            values.append(float(selector.effective_sample_size(w / w.sum())) if w.any() else 0.0)
    return values

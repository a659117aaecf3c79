"""Self-refining generation (Algorithm 1, lines 5-8): which questions the model answers itself, and the store of its responses.

Every K_gen steps, at θ^k, the masked questions that will be visited before the next refresh get G new responses, sampled from
π_old = π_θk. Until the next refresh they replace the responses of the data, each weighted by its importance ratio
r^g = π_θ(y^g|x) / π_old(y^g|x) (line 10, see `importance`). π_old is scored by the training forward at temperature 1, so that
r = 1 right after a refresh.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from bilevel_jax import errors, preferences, random_streams, sampling
from bilevel_jax.data import packing, shuffle, templates

GENERATE = ("needed", "all")
NORMALIZATIONS = ("algorithm", "eq7")


# --------------------------------------------------------------------------------------------------------------------
# Masks
# --------------------------------------------------------------------------------------------------------------------


def num_masked(num_rows: int, ratio: float) -> int:
    """⌊R·N⌋."""
    return int(ratio * num_rows + 1e-9)  # 0.29 · 100 is 28.999...96 in binary


def masked_rows(logits_N: np.ndarray | None, num_rows: int, ratio: float, seed: int) -> np.ndarray:
    """The ⌊R·N⌋ masked rows, ascending: those of the smallest σ_i(ω), or random ones without logits.

    While all logits are equal, no row is masked, because the choice would be arbitrary; with R = 1 there is no choice, and all are.
    Other ties are broken by a random order that the seed fixes, never by the stored order.
    """
    number = num_masked(num_rows, ratio)
    if logits_N is not None and number < num_rows and (logits_N == logits_N[0]).all():
        number = 0
    if not number:
        return np.zeros(0, np.int64)
    shuffled = np.random.default_rng((seed, random_streams.MASKED)).permutation(num_rows)
    return np.sort(shuffled[:number] if logits_N is None else shuffled[smallest(logits_N[shuffled], number)])


def smallest(values: np.ndarray, number: int) -> np.ndarray:
    """Indices of the `number` smallest values, in any order; of equal ones the first. Linear in the number of values."""
    bound = np.partition(values, number - 1)[number - 1]
    below = np.flatnonzero(values < bound)
    return np.concatenate([below, np.flatnonzero(values == bound)[: number - len(below)]])


def row_factors(masked: np.ndarray) -> np.ndarray:
    """How much each row counts in (7), relative to one mean over all rows: [N] float32.

    (7) adds the mean over the masked rows and the mean over the others, so that the factor is N/N_M for the N_M masked rows and
    N/(N - N_M) for the others. Where all rows are of one kind, (7) has one mean, and all factors are 1.

    Args:
      masked: [N] bool.
    """
    number = np.where(masked, masked.sum(), (~masked).sum())
    return (len(masked) / number).astype(np.float32)


def visited_rows(seed: int, num_rows: int, batch: int, first: int, last: int) -> np.ndarray:
    """The lower-level rows of steps first ... last - 1, ascending."""
    rows = [shuffle.lower_rows(seed, num_rows, batch, k) for k in range(first, last)]
    return np.unique(np.concatenate(rows))


# --------------------------------------------------------------------------------------------------------------------
# The response store
# --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ResponseStore:
    """The generated responses in use between two refreshes, n in all, ordered by question and sample.

    Nothing in it changes but `log_ratio`, which `runtime.step_log` sets in place after each step.

    Blank responses are not stored. A masked question without a stored response uses the response of the data.
    """

    step: int  # optimizer steps taken when they were generated; -1 before the first refresh
    masked: np.ndarray  # [N] bool
    row_index: np.ndarray  # [n] int64, the lower-level row that each response answers
    sample_index: np.ndarray  # [n] int64, g
    tokens: Sequence[np.ndarray]  # n times int32, the EOS included where the model generated it
    log_prob: np.ndarray  # [n] float64, log π_old
    log_ratio: np.ndarray  # [n] float64, log r when last used; NaN before that
    reward: np.ndarray | None = None  # [n] float64; None without a reward function
    reference: np.ndarray | None = None  # [n] float64, log-probability under the reference model; None without pairs

    @functools.cached_property
    def factors(self) -> np.ndarray:
        """`row_factors` of all rows, and at the end 1, for upper rows and padding: [N + 1] float32."""
        return np.append(row_factors(self.masked), np.float32(1))

    @functools.cached_property
    def by_row(self) -> dict[int, list[int]]:
        """Indices of the responses to each row's question."""
        indices: dict[int, list[int]] = {}
        for index, row in enumerate(self.row_index):
            indices.setdefault(int(row), []).append(index)
        return indices

    def arrays(self) -> dict[str, np.ndarray]:
        """The store as arrays for a checkpoint, none of them empty."""
        arrays = {"step": np.array([self.step]), "masked": self.masked}
        if len(self.row_index):
            arrays |= {"row": self.row_index, "sample": self.sample_index}
            arrays |= {"log_prob": self.log_prob, "log_ratio": self.log_ratio}
            arrays["tokens"] = np.concatenate(self.tokens)
            arrays["length"] = np.array([len(tokens) for tokens in self.tokens])
            optional = {"reward": self.reward, "reference": self.reference}
            arrays |= {name: array for name, array in optional.items() if array is not None}
        return {name: np.array(array) for name, array in arrays.items()}  # copies, since `log_ratio` keeps changing


def empty(num_rows: int) -> ResponseStore:
    """The store before the first refresh: no question is masked."""
    return from_arrays({"step": np.array([-1]), "masked": np.zeros(num_rows, bool)})


def from_arrays(arrays: dict[str, np.ndarray]) -> ResponseStore:
    """The inverse of `ResponseStore.arrays`."""
    filled = "row" in arrays
    return ResponseStore(
        step=int(arrays["step"][0]),
        masked=arrays["masked"],
        row_index=arrays["row"] if filled else np.zeros(0, np.int64),
        sample_index=arrays["sample"] if filled else np.zeros(0, np.int64),
        tokens=np.split(arrays["tokens"], np.cumsum(arrays["length"])[:-1]) if filled else [],
        log_prob=arrays["log_prob"] if filled else np.zeros(0),
        log_ratio=np.array(arrays["log_ratio"]) if filled else np.zeros(0),
        reward=arrays.get("reward"),
        reference=arrays.get("reference"),
    )


def covers_remaining_steps(store: ResponseStore, config, num_steps_then: int, num_steps: int, start: int) -> bool:
    """Whether the responses are enough for a run that goes on at `start` and may have more steps than it had before.

    A refresh answers the questions of the steps up to the next one, or up to the end of the run as it was then.

    Args:
      store: the responses in use.
      config: the section `online`.
      num_steps_then: steps of the run, when the store was saved.
      num_steps: its steps now.
      start: steps taken.
    """
    is_used = store.step >= 0 and start != store.step  # at `store.step` the refresh is repeated
    was_cut = num_steps_then < min(num_steps, store.step + config.refresh_every)
    return not (is_used and was_cut and config.generate == "needed")


def best_and_worst(store: ResponseStore, row: int) -> tuple[int, int]:
    """Indices of the responses to a question with the highest and the lowest reward, the first of equals.

    The two are the same where there is no pair: all rewards are equal, or both responses have the same tokens.
    """
    assert store.reward is not None  # there is a reward function
    indices = store.by_row[row]
    reward = store.reward[indices]
    best, worst = indices[int(reward.argmax())], indices[int(reward.argmin())]
    return best, best if np.array_equal(store.tokens[best], store.tokens[worst]) else worst


def response_segments(
    store: ResponseStore,
    row: int,
    prompt: np.ndarray,
    share: float,
    group: int,
    objective: str = "sft",
    max_pair_tokens: int = 0,
) -> list[tuple[int, packing.Segment]]:
    """The segments that replace a row's response: (index in the store, segment) each. If none, the row keeps its response.

    Args:
      share: the row's weight in its level's mean. Several responses divide it; both responses of a pair carry it.
      group: number of the question in its step.
      objective: `sft`: all responses; `rwr`, `reinforce`: all, with their rewards; `best_of`: the best one; `dpo`, `ipo`: the
        best and the worst as a pair, or the best alone, without a sign, where there is no pair.
      max_pair_tokens: limit on the tokens of a pair, each response with the prompt; a question with a longer pair has no segment.
    """
    indices = store.by_row.get(row, [])
    if not indices:
        return []

    def segment(i: int, share: float, **fields) -> tuple[int, packing.Segment]:
        return i, packing.Segment(prompt, store.tokens[i], row, share, group, old_log_prob=float(store.log_prob[i]), **fields)

    if objective == "sft":
        return [segment(i, share / len(indices)) for i in indices]
    assert store.reward is not None  # all other objectives have a reward function
    if objective in preferences.RANKED:
        return [segment(i, share / len(indices), reward=float(store.reward[i])) for i in indices]
    best, worst = best_and_worst(store, row)
    if objective == "best_of" or best == worst:
        return [segment(best, share)]
    if 2 * len(prompt) + len(store.tokens[best]) + len(store.tokens[worst]) > max_pair_tokens:
        return []
    assert store.reference is not None  # as for all pairs
    signs = ((best, 1), (worst, -1))
    return [segment(i, share, sign=sign, reference=float(store.reference[i])) for i, sign in signs]


# --------------------------------------------------------------------------------------------------------------------
# Refresh
# --------------------------------------------------------------------------------------------------------------------


class Generation(NamedTuple):
    """One generated response, stored or not."""

    row_index: int  # the lower-level row that it answers
    sample_index: int  # g
    text: str
    response: sampling.Response


class Generator(NamedTuple):
    """What a refresh generates and scores with."""

    sample: Callable  # from `sampling.make_sampler`
    score: Callable  # from `scoring.make_scorer`: the training forward
    detokenize: Callable  # token ids -> text
    ids: Sequence[str]  # of all lower-level rows
    examples: Sequence[templates.Example]  # of the same rows; every prompt leaves room for a response
    seed: int  # of the responses, together with row, step and g
    num_samples: int  # G
    paired: bool = False  # responses need log-probabilities under the reference model, the base without its adapter


def _generate(generator: Generator, base, adapter, step: int, rows, stopped) -> list[Generation] | None:
    """G responses to each row's question; None if `stopped()` became true meanwhile."""
    keys = sampling.row_keys(generator.seed, (generator.ids[i] for i in rows), step, generator.num_samples)
    prompts = [generator.examples[i].prompt for i in rows]
    responses = generator.sample(base, adapter, prompts, keys, "answering masked questions", stopped)
    if responses is None:
        return None
    return [
        Generation(int(i), g, generator.detokenize(response.tokens), response)
        for i, group in zip(rows, responses, strict=True)
        for g, response in enumerate(group)
    ]


def _score(
    generator: Generator, base, adapter, step: int, generations: Sequence[Generation]
) -> tuple[np.ndarray, np.ndarray | None]:
    """log π_old of each response and, for pairs, its log-probability under the reference model.

    Raises:
      RunError: a response has no finite log-probability.
    """
    segments = [packing.Segment(generator.examples[one.row_index].prompt, one.response.ids) for one in generations]
    nll, _ = generator.score(base, adapter, segments, "scoring answers")
    broken = [generator.ids[one.row_index] for one, value in zip(generations, nll, strict=True) if not np.isfinite(value)]
    if broken:
        raise errors.RunError(f"step {step}: the answer to row {broken[0]} has no probability; {errors.REMEDY}")
    if not generator.paired:
        return -nll, None
    return -nll, -generator.score(base, None, segments, "scoring answers by the reference")[0]


def make_refresh(generator: Generator, generate: str, reward_fn: Callable | None = None) -> Callable:
    """Builds `refresh(base, adapter, step, masked, visited, stopped) -> (ResponseStore, [Generation]) | None`.

    `masked` and `visited` are ascending lower-level rows. The result is None if `stopped()` became true meanwhile.

    Args:
      generator: sampler, scorer and rows.
      generate: `needed`: answer the masked questions that will be visited; `all`: also the others, for inspection.
      reward_fn: from `rewards.make_reward_fn`; None for no rewards.
    """

    def refresh(base, adapter, step: int, masked, visited, stopped: Callable[[], bool]):
        needed = np.intersect1d(masked, visited)
        # The needed rows come first and alone, so that `all` repeats the arithmetic of `needed` to the last bit.
        parts = [needed, np.setdiff1d(masked, needed)] if generate == "all" else [needed]
        generations: list[Generation] = []
        stored: list[Generation] = []
        log_probs: list[float] = []
        references: list[float] = []
        for rows in parts:
            if not len(rows):
                continue
            part = _generate(generator, base, adapter, step, rows, stopped)
            if part is None:
                return None
            not_blank = [one for one in part if one.text.strip()]
            if not_blank:
                log_prob, reference = _score(generator, base, adapter, step, not_blank)
                log_probs.extend(log_prob)
                references.extend(() if reference is None else reference)
            generations, stored = generations + part, stored + not_blank
        rewards = reward_fn(stored, np.array(log_probs)) if reward_fn and stored else None
        return _store(step, len(generator.ids), masked, stored, log_probs, references, rewards), generations

    return refresh


def _store(step: int, num_rows: int, masked, generations: Sequence[Generation], log_probs, references, rewards) -> ResponseStore:
    """The store of new responses, none of them used yet."""
    mask = np.zeros(num_rows, bool)
    mask[masked] = True
    return ResponseStore(
        step=step,
        masked=mask,
        row_index=np.array([one.row_index for one in generations], np.int64),
        sample_index=np.array([one.sample_index for one in generations], np.int64),
        tokens=[one.response.ids for one in generations],
        log_prob=np.array(log_probs, np.float64),
        log_ratio=np.full(len(generations), np.nan),
        reward=rewards,
        reference=np.array(references) if references else None,
    )

"""Self-refining generation: which questions the model answers itself, with what, and what each answer counts.

Every K_gen steps, at θ^k, the masked questions that will be visited before the next refresh get G fresh responses, sampled from
π_old = π_θk (Algorithm 1, lines 5-8). Until then they stand in for the responses of the data, each weighted by its importance
ratio r^g = π_θ(y^g|x) / π_old(y^g|x) (line 10). π_old is scored by the training forward at temperature 1, so that r = 1 straight
after a refresh.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax import sampling, workspace
from bilevel_jax.data import order, packing

RESPONSE_WEIGHTS = ("sequence", "geometric", "softmax", "none")
GENERATE = ("needed", "all")
LARGE = 80.0  # log r: e^80 stands for all that is larger, since JSON knows no infinity
MASK = 2  # tag that keeps the mask's random order apart from the data's, see `order`


# --------------------------------------------------------------------------------------------------------------------
# Response weights
# --------------------------------------------------------------------------------------------------------------------


def group_softmax(value_E, own_E, group_E) -> jax.Array:
    """G · softmax of a value over the G entries of its group, [E]: mean 1 over them; 1 where `own_E` is False."""
    E = own_E.shape[0]
    group_E = jnp.where(own_E, group_E, E)  # E is no segment: what is there is dropped
    highest_E = jax.ops.segment_max(value_E, group_E, num_segments=E)[group_E]
    likelihood_E = jnp.where(own_E, jnp.exp(value_E - highest_E), 1.0)
    total_E = jax.ops.segment_sum(likelihood_E, group_E, num_segments=E)[group_E]
    number_E = jax.ops.segment_sum(jnp.ones(E), group_E, num_segments=E)[group_E]
    return jnp.where(own_E, number_E * likelihood_E / total_E, 1.0)


def response_weights(kind: str, log_prob_E, old_log_prob_E, length_E, group_E, clip: float) -> jax.Array:
    """What each response is multiplied by in the loss, [E]: 1 for responses of the data, and for the model's own

        sequence    min(r, clip), r = exp(log π_θ - log π_old)                                                      (8)
        geometric   min(r^{1/n}, clip), the geometric mean over the n tokens of their ratios
        softmax     G · λ_g, λ the softmax of log π_θ over the G responses to one question (Lemma 6); mean 1 over them
        none        1

    As λ_g ∝ π_θ(y^g), and r^g ∝ π_θ(y^g) / π_old(y^g), the two agree up to the factor 1/π_old(y^g).

    Args:
      log_prob_E: log π_θ of each whole response, natural logarithm.
      old_log_prob_E: log π_old; NaN marks responses of the data.
      length_E: tokens of each response.
      group_E: the question of each response; entries of one question share a number below E.
      clip: the most that a ratio counts.
    """
    own_E = ~jnp.isnan(old_log_prob_E)
    if kind == "none":
        return jnp.ones_like(log_prob_E)
    if kind == "softmax":
        return group_softmax(log_prob_E, own_E, group_E)
    log_ratio_E = log_prob_E - jnp.where(own_E, old_log_prob_E, log_prob_E)
    if kind == "geometric":
        log_ratio_E = log_ratio_E / jnp.maximum(length_E, 1)
    return jnp.minimum(jnp.exp(jnp.minimum(log_ratio_E, LARGE)), clip)


# --------------------------------------------------------------------------------------------------------------------
# Masks
# --------------------------------------------------------------------------------------------------------------------


def masked_rows(logits_N: np.ndarray | None, num_rows: int, ratio: float, seed: int) -> np.ndarray:
    """The ⌊R·N⌋ masked rows, ascending: those of the smallest σ_i(ω), or random ones where there are no logits.

    Rows of equal weight, as all are at the start, are taken in a random order that the seed fixes, never in stored order.
    """
    shuffled = np.random.default_rng((seed, MASK)).permutation(num_rows)
    if logits_N is not None:
        shuffled = shuffled[np.argsort(logits_N[shuffled], kind="stable")]
    return np.sort(shuffled[: int(ratio * num_rows + 1e-9)])  # 0.29 · 100 is 28.999...96 in binary


def visited_rows(seed: int, num_rows: int, batch: int, first: int, last: int) -> np.ndarray:
    """The lower-level rows of steps first ... last - 1, ascending."""
    drawn = [order.lower_rows(seed, num_rows, batch, k) for k in range(first, last)]
    return np.unique(np.concatenate(drawn))


# --------------------------------------------------------------------------------------------------------------------
# Responses
# --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Own:
    """The model's own responses between two refreshes, n in all, in the order of their questions and samples.

    A response without a word is not kept. A question whose responses all were, and one that will not be visited, uses the
    response of the data.
    """

    step: int  # optimizer steps taken when they were made; -1 before the first refresh
    masked: np.ndarray  # [N] bool
    row: np.ndarray  # [n] int64, the lower-level row that each answers
    sample: np.ndarray  # [n] int64, g
    tokens: Sequence[np.ndarray]  # n times int32, the EOS included where the model said it
    log_prob: np.ndarray  # [n] float64, log π_old
    log_ratio: np.ndarray  # [n] float64, log r when last used; NaN before that
    reward: np.ndarray | None = None  # [n] float64; None where nobody judges them
    reference: np.ndarray | None = None  # [n] float64, log-probability under the reference model; None where there are no pairs

    @functools.cached_property
    def by_row(self) -> dict[int, list[int]]:
        """The responses to each question."""
        found: dict[int, list[int]] = {}
        for place, row in enumerate(self.row):
            found.setdefault(int(row), []).append(place)
        return found

    def arrays(self) -> dict[str, np.ndarray]:
        """For a checkpoint, none of them empty."""
        found = {"step": np.array([self.step]), "masked": self.masked}
        if len(self.row):
            found |= {"row": self.row, "sample": self.sample, "log_prob": self.log_prob, "log_ratio": self.log_ratio}
            found["tokens"] = np.concatenate(self.tokens)
            found["length"] = np.array([len(tokens) for tokens in self.tokens])
            judged = {"reward": self.reward, "reference": self.reference}
            found |= {name: array for name, array in judged.items() if array is not None}
        return {name: np.array(array) for name, array in found.items()}  # copies: `log_ratio` goes on changing


def nothing_yet(num_rows: int) -> Own:
    """Before the first refresh: no question is masked."""
    return from_arrays({"step": np.array([-1]), "masked": np.zeros(num_rows, bool)})


def from_arrays(arrays: dict[str, np.ndarray]) -> Own:
    """Undoes `Own.arrays`."""
    some = "row" in arrays
    return Own(
        step=int(arrays["step"][0]),
        masked=arrays["masked"],
        row=arrays["row"] if some else np.zeros(0, np.int64),
        sample=arrays["sample"] if some else np.zeros(0, np.int64),
        tokens=np.split(arrays["tokens"], np.cumsum(arrays["length"])[:-1]) if some else [],
        log_prob=arrays["log_prob"] if some else np.zeros(0),
        log_ratio=np.array(arrays["log_ratio"]) if some else np.zeros(0),
        reward=arrays.get("reward"),
        reference=arrays.get("reference"),
    )


def best_and_worst(own: Own, row: int) -> tuple[int, int]:
    """The places of a question's responses with the highest and the lowest reward, the first of equals; one and the same where
    there is no pair: all rewards are equal, or both say the same."""
    places = own.by_row[row]
    reward = own.reward[places]
    best, worst = places[int(reward.argmax())], places[int(reward.argmin())]
    return best, best if np.array_equal(own.tokens[best], own.tokens[worst]) else worst


def segments(
    own: Own, row: int, prompt: np.ndarray, share: float, group: int, objective: str = "sft", room: int = 0
) -> list[tuple[int, packing.Segment]]:
    """What stands for a question which the model answers itself: places in `own` and their segments; none where it has no answer.

    Args:
      share: the row's weight in its level's mean. Several responses divide it; of a pair, both carry it.
      group: number of the question in its step.
      objective: `sft`: all responses; `rwr` and `reinforce`: all, with their rewards; `best_of`: the best alone; `dpo` and `ipo`:
        the best and the worst as a pair, or the best alone, without a sign, where there is no pair.
      room: tokens that a pair may take, each response with the prompt; one that takes more is none.
    """
    places = own.by_row.get(row, [])
    if not places:
        return []

    def segment(i: int, part: float, **more) -> tuple[int, packing.Segment]:
        return i, packing.Segment(prompt, own.tokens[i], row, part, group, old_log_prob=float(own.log_prob[i]), **more)

    if objective == "sft":
        return [segment(i, share / len(places)) for i in places]
    if objective in ("rwr", "reinforce"):
        return [segment(i, share / len(places), reward=float(own.reward[i])) for i in places]
    best, worst = best_and_worst(own, row)
    fits = 2 * len(prompt) + len(own.tokens[best]) + len(own.tokens[worst]) <= room
    if objective == "best_of" or best == worst or not fits:
        return [segment(best, share)]
    signs = ((best, 1), (worst, -1))
    return [segment(i, share, sign=sign, reference=float(own.reference[i])) for i, sign in signs]


# --------------------------------------------------------------------------------------------------------------------
# Refresh
# --------------------------------------------------------------------------------------------------------------------


class Said(NamedTuple):
    """One response as it came from the model, kept or not."""

    row: int  # the lower-level row that it answers
    sample: int  # g
    text: str
    response: sampling.Response


def make_refresh(
    sample: Callable,
    score: Callable,
    detokenize: Callable,
    ids: Sequence[str],
    prompts: Sequence[np.ndarray],
    seed: int,
    num_samples: int,
    generate: str,
    judge: Callable | None = None,
    paired: bool = False,
) -> Callable:
    """Builds `refresh(base, adapter, step, masked, visited, stopped) -> (Own, [Said]) | None`.

    `masked` and `visited` are ascending lower-level rows. The result is None if `stopped()` came true on the way.

    Args:
      sample: from `sampling.make_sampler`.
      score: from `scoring.make_scorer`: the training forward.
      detokenize: token ids -> text.
      ids, prompts: of all lower-level rows; every prompt leaves room for a response.
      seed: of the responses, together with row, step and g.
      num_samples: G.
      generate: `needed`: answer the masked questions that will be visited; `all`: the others too, to look at.
      judge: from `rewards.make_judge`; without it there are no rewards.
      paired: whether the responses need reference log-probabilities, those of the base without its adapter.
    """

    def answer(base, adapter, step, asked, stopped):
        keys = sampling.row_keys(seed, (ids[i] for i in asked), step, num_samples)
        found = sample(base, adapter, [prompts[i] for i in asked], keys, "answering masked questions", stopped)
        if found is None:
            return None
        return [
            Said(int(i), g, detokenize(one.tokens), one)
            for i, group in zip(asked, found, strict=True)
            for g, one in enumerate(group)
        ]

    def refresh(base, adapter, step: int, masked, visited, stopped: Callable[[], bool]):
        needed = np.intersect1d(masked, visited)
        # By themselves, so that `all` repeats the arithmetic of `needed` to the last bit.
        parts = [needed, np.setdiff1d(masked, needed)] if generate == "all" else [needed]
        said, kept, log_probs, references = [], [], [], []
        for asked in parts:
            if not len(asked):
                continue
            part = answer(base, adapter, step, asked, stopped)
            if part is None:
                return None
            words = [one for one in part if one.text.strip()]
            if words:
                lines = [packing.Segment(prompts[one.row], one.response.ids) for one in words]
                nll, _ = score(base, adapter, lines, "scoring answers")
                broken = [ids[one.row] for one, value in zip(words, nll, strict=True) if not np.isfinite(value)]
                if broken:
                    cause = f"the answer to row {broken[0]} has no probability"
                    raise workspace.RunError(f"step {step}: {cause}; {workspace.REMEDY}")
                log_probs.extend(-nll)
                if paired:
                    references.extend(-score(base, None, lines, "scoring answers by the reference")[0])
            said, kept = said + part, kept + words
        mask = np.zeros(len(prompts), bool)
        mask[masked] = True
        own = Own(
            step=step,
            masked=mask,
            row=np.array([one.row for one in kept], np.int64),
            sample=np.array([one.sample for one in kept], np.int64),
            tokens=[one.response.ids for one in kept],
            log_prob=np.array(log_probs, np.float64),
            log_ratio=np.full(len(kept), np.nan),
            reward=judge(kept, np.array(log_probs)) if judge and kept else None,
            reference=np.array(references) if references else None,
        )
        return own, said

    return refresh


# --------------------------------------------------------------------------------------------------------------------
# What is told about it
# --------------------------------------------------------------------------------------------------------------------


def refresh_measures(own: Own, said: Sequence[Said], bad: np.ndarray | None, truths: Sequence[str | None]) -> dict[str, float]:
    """Size and kind of the mask, and what the answers are like.

    `online/another_chance` is the share of right answers among those to masked questions whose response in the data is bad;
    `bad` and `truths` are of all lower-level rows, where they know them, and serve measurement only.
    """
    values = {"online/masked": float(own.masked.sum()), "online/responses": float(len(said))}
    if bad is not None and own.masked.any():
        values["online/masked_bad"] = float(bad[own.masked].mean())
    if not said:
        return values
    lengths = [len(one.response.tokens) for one in said]
    values["online/response_length"] = float(np.mean(lengths))
    values["online/eos_rate"] = float(np.mean([one.response.finish_reason == "stop" for one in said]))
    values["online/empty"] = float(np.mean([not one.text.strip() for one in said]))
    values |= _reward_measures(own, said, truths)
    second = [one for one in said if bad is not None and bad[one.row] and truths[one.row] is not None]
    if second:
        right = sum(one.text.strip() == truths[one.row].strip() for one in second)
        values |= {"online/bad_answered": float(len(second)), "online/bad_right": float(right)}
        values["online/another_chance"] = right / len(second)
    return values


def _reward_measures(own: Own, said: Sequence[Said], truths: Sequence[str | None]) -> dict[str, float]:
    """Mean reward; the mean gap between a question's best and worst response, and the share of questions without one; and how often
    the best is right, beside all, where truths are known."""
    if own.reward is None:
        return {}
    ends = np.array([best_and_worst(own, row) for row in own.by_row])
    gap = own.reward[ends[:, 0]] - own.reward[ends[:, 1]]
    values = {"online/reward": own.reward.mean(), "online/reward_gap": gap.mean(), "online/reward_ties": (gap == 0).mean()}
    text = {(one.row, one.sample): one.text.strip() for one in said}
    texts = [text[key] for key in zip(own.row, own.sample)]
    known = [i for i, row in enumerate(own.row) if truths[row] is not None]
    right = {i: texts[i] == truths[own.row[i]].strip() for i in known}
    best = [right[i] for i in ends[:, 0] if i in right]
    if known:
        values |= {"online/right": np.mean([*right.values()]), "online/best_right": np.mean(best)}
    return {name: float(value) for name, value in values.items()}


def add_refresh(totals: dict[str, float], values: dict[str, float]) -> dict[str, float]:
    """Counts of all refreshes so far, from those before and the measures of one more."""
    names = "online/responses", "online/bad_answered", "online/bad_right"
    totals = {name: totals.get(name, 0.0) + values.get(name, 0.0) for name in names}
    asked = totals["online/bad_answered"]
    return totals | ({"online/another_chance": totals["online/bad_right"] / asked} if asked else {})


def ratio_measures(log_ratio: np.ndarray, clipped: Sequence[np.ndarray], ess: Sequence[float]) -> dict[str, float]:
    """Of the responses used since the last event: r before clipping, the share that was clipped, the mean of `group_ess`."""
    ratio = np.exp(np.minimum(log_ratio, LARGE))
    values = {"online/ratio_mean": float(ratio.mean())}
    values |= {f"online/ratio_p{p:02}": float(np.percentile(ratio, p)) for p in (5, 50, 95)}
    if len(clipped):
        values["online/clip_fraction"] = float(np.concatenate(clipped).mean())
    return values | ({"online/ess": float(np.mean(ess))} if len(ess) else {})


def group_ess(weight: np.ndarray, group: np.ndarray) -> list[float]:
    """(Σw)² / (G Σw²) over the responses to each question that has more than one."""
    found = []
    for number in np.unique(group):
        w = weight[group == number].astype(np.float64)
        if len(w) > 1:
            found.append(float(w.sum() ** 2 / (len(w) * (w**2).sum())) if w.any() else 0.0)
    return found


class Record:
    """`responses.jsonl`: every response that was kept, written when it goes out of use, with its last ratio.

    Lines that a run resumed at step `start` is about to write again are dropped: what went out of use before step `start` was
    taken stays.
    """

    def __init__(self, file: pathlib.Path, start: int, refresh_every: int):
        if file.exists():
            lines = [line for line in file.read_bytes().split(b"\n") if self._stays(line, start - refresh_every)]
            workspace.write_atomically(file, "".join(line.decode() + "\n" for line in lines))
        self._file = open(file, "a", encoding="utf-8")

    @staticmethod
    def _stays(line: bytes, before: int) -> bool:
        try:
            return json.loads(line)["step"] < before
        except (ValueError, TypeError, KeyError, RecursionError):  # cut short by a crash, or damaged
            return False

    def retire(self, own: Own, ids: Sequence[str], detokenize: Callable, eos: Collection[int]) -> None:
        columns = zip(own.row, own.sample, own.tokens, own.log_prob, own.log_ratio)
        for i, (row, sample, tokens, log_prob, log_ratio) in enumerate(columns):
            line = {"step": own.step, "id": ids[row], "sample": int(sample), "text": detokenize(tokens), "logprob": float(log_prob)}
            line["ratio"] = None if np.isnan(log_ratio) else float(np.exp(min(log_ratio, LARGE)))
            line["finish_reason"] = "stop" if tokens[-1] in eos else "length"
            if own.reward is not None:
                line["reward"] = float(own.reward[i])
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

"""Bandits of bins on a line: a reference policy around one place, a reward that peaks nearer or farther, and learners between.

A bin is a response, a policy is a softmax over bins. Its logits are those of the reference plus features times θ: with `TABLE`
every bin has a logit of its own, with `SMOOTH` neighbours share theirs, as responses share a network. All learners see groups of
G = 4 samples, as many groups in every step, and differ in the objective, in who samples, and in how often samples are used.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax import importance, preferences
from experiments.didactic import objectives

BINS, GROUPS, G, STEPS = 48, 8, 4, 200
PLACES = np.arange(BINS)
TABLE = np.eye(BINS)
SMOOTH = np.exp(-0.5 * ((PLACES[:, None] - PLACES) / 1.5) ** 2)
TUNED_ON, SEEDS = range(4), range(4, 12)  # seeds that choose the learning rate, and those that are reported
RATES = tuple(float(rate) for rate in np.logspace(-1, 2, 7))
BETAS = {"DPO": (0.03, 0.2, 1.0), "IPO": (0.03, 0.2, 1.0), "RWR": (0.03, 0.2, 1.0)}  # the others have none
CLIP = 2.0  # of importance ratios, the project's default
COLOURS = {"best-of-G": "#1f4e9c", "RWR": "#5aa9d6", "DPO": "#b2182b", "IPO": "#ef8a3c", "REINFORCE": "#7b3294"}
DISTANCES = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0)
NEAR, FAR = 1.0, 4.0  # a peak inside the reference's mass, and one outside
POSITIVE, NEGATIVE = ("best-of-G", "RWR"), ("DPO", "IPO", "REINFORCE")  # without and with a negative gradient

GROUP = jnp.repeat(jnp.arange(GROUPS), G)
SHARE = jnp.full(GROUPS * G, 1 / (GROUPS * G))


class Problem(NamedTuple):
    reference: np.ndarray  # [B] probabilities
    reward: np.ndarray  # [B]
    chosen: np.ndarray  # [B] how likely each bin is the best of G samples of the reference
    rejected: np.ndarray  # [B] the worst


def best_of(probabilities: np.ndarray, reward: np.ndarray) -> np.ndarray:
    """Distribution of the best of G independent samples: differences of F^G along the reward, no two of which are equal."""
    order = np.argsort(reward)
    result = np.empty(len(reward))
    result[order] = np.diff(np.cumsum(probabilities[order]) ** G, prepend=0)
    return result


@functools.cache
def problem(seed: int, distance: float) -> Problem:
    """The reward falls by 1 for each standard deviation of the reference from its peak, `distance` of them right of its centre.

    One part in a thousand of the reference is spread over all bins, so that none is impossible. The seed draws centre, width, and
    bumps of the reference and of the reward.
    """
    rng = np.random.default_rng((seed, 7))
    centre, width = rng.uniform(10, 14), rng.uniform(2.5, 3.5)
    bell = np.exp(-0.5 * ((PLACES - centre) / width) ** 2 + 0.3 * rng.normal(size=BINS))
    reference = 0.999 * bell / bell.sum() + 0.001 / BINS
    reward = -np.abs((PLACES - centre) / width - distance) + 0.1 * rng.normal(size=BINS)
    return Problem(reference, reward, best_of(reference, reward), best_of(reference, -reward))


def draw(probabilities, quantiles) -> jax.Array:
    """The bins at these quantiles, each uniform in [0, 1)."""
    bins = jnp.searchsorted(jnp.cumsum(probabilities), quantiles, method="compare_all")
    return jnp.minimum(bins, len(probabilities) - 1)  # rounding may leave the sum below a quantile


def objective(name: str, beta, log_prob_E, log_ratio_E, weight_E, reward_E) -> jax.Array:
    """The project's, of one step's samples; `weight_E` are response weights, which losses of pairs have no place for.

    Losses of pairs are divided by their slope at margin 0, β/2 and 1/β, so that one grid of learning rates suits all.
    """
    if name in ("DPO", "IPO"):
        pairs = objectives.pairs(log_ratio_E, objectives.best_against_worst(reward_E, GROUP), G * SHARE, GROUP)
        return 2 / beta * objectives.dpo(*pairs, beta) if name == "DPO" else beta * objectives.ipo(*pairs, beta)
    weight = {
        "best-of-G": lambda: objectives.best_of(reward_E, GROUP),
        "RWR": lambda: preferences.reward_weighted(reward_E, GROUP, beta),
        "REINFORCE": lambda: preferences.leave_one_out(reward_E, GROUP),
    }[name]()
    return objectives.likelihood(log_prob_E, weight * weight_E, SHARE)


@functools.partial(jax.jit, static_argnames=("name", "weights", "steps"))
def learn(name: str, weights: str, steps: int, features, problems: Problem, on_policy, reuse, horizon, rate, beta, key):
    """Gradient descent of many learners at once; everything behind `features` has a leading axis [R].

    Args:
      name: of the objective.
      weights: kind of `importance.response_weights`.
      features: [B, K].
      on_policy: whether samples come from the policy, or from the reference.
      reuse: steps that are taken on the same samples.
      horizon: the step, `steps` or earlier, at which the learning rate has fallen to 0, linearly from `rate`.
      beta: of the objective, where it has one.
      key: common random numbers: learners with the same key draw the same quantiles in the same step.

    Returns:
      after every step, [R, steps]: expected reward, and expected log-probability of what the reference's pairs have as chosen and
      as rejected; and the last policies [R, B].
    """

    def one(problem, on_policy, reuse, horizon, rate, beta, key):
        log_reference = jnp.log(problem.reference)

        def log_policy(theta):
            return jax.nn.log_softmax(log_reference + features @ theta)

        def loss(theta, sample_E, old_E):
            log_prob_E = log_policy(theta)[sample_E]
            weight_E = importance.response_weights(weights, log_prob_E, old_E, jnp.ones(GROUPS * G), GROUP, CLIP)
            return objective(name, beta, log_prob_E, log_prob_E - log_reference[sample_E], weight_E, problem.reward[sample_E])

        def step(carry, k):
            theta, sample_E, old_E = carry
            behaviour = jnp.where(on_policy, log_policy(theta), log_reference)
            quantile_E = jax.random.uniform(jax.random.fold_in(key, k // reuse), (GROUPS * G,))
            fresh_E = draw(jnp.exp(behaviour), quantile_E)
            again = k % reuse > 0
            sample_E = jnp.where(again, sample_E, fresh_E)
            old_E = jnp.where(again, old_E, behaviour[fresh_E])
            pace = rate * jnp.maximum(1 - k / horizon, 0)
            theta = theta - pace * jax.grad(loss)(theta, sample_E, old_E)
            log_prob = log_policy(theta)
            measured = jnp.exp(log_prob) @ problem.reward, problem.chosen @ log_prob, problem.rejected @ log_prob
            return (theta, sample_E, old_E), measured

        start = jnp.zeros(features.shape[1]), jnp.zeros(GROUPS * G, jnp.int32), jnp.zeros(GROUPS * G)
        (theta, _, _), measured = jax.lax.scan(step, start, jnp.arange(steps))
        return *measured, jnp.exp(log_policy(theta))

    return jax.vmap(one)(problems, on_policy, reuse, horizon, rate, beta, key)


class Learned(NamedTuple):
    """What learners of one kind did, with the learning rate and β that were best for them on other seeds."""

    gain: np.ndarray  # [seed, step] (E r - E_ref r) / (max r - E_ref r): 0 the reference, 1 the optimum
    chosen: np.ndarray  # [seed, step] change of the expected log-probability of the reference's best of G
    rejected: np.ndarray  # [seed, step] and of its worst
    policy: np.ndarray  # [seed, B]
    rate: float
    beta: float
    ends: np.ndarray  # [rate, seed] the last gain with each rate, at this β

    @property
    def end(self) -> np.ndarray:
        """[seed] the last gain."""
        return self.gain[:, -1]


class Case(NamedTuple):
    distance: float
    on_policy: bool = True
    reuse: int = 1
    horizon: int = STEPS


def learned(name: str, cases, features=SMOOTH, rates=RATES, betas=None, weights: str | None = None) -> dict[Case, Learned]:
    """Every case with every rate and β on every seed; those with the highest mean gain at the end on `TUNED_ON` are reported.

    Unless said otherwise REINFORCE has importance ratios as `weights`, without which it is no policy gradient of other's samples,
    and the others have none. On the policy's own fresh samples the ratios are 1.
    """
    betas = betas or BETAS.get(name, (1.0,))
    weights = weights or ("sequence" if name == "REINFORCE" else "none")
    runs = list(itertools.product(cases, betas, rates, (*TUNED_ON, *SEEDS)))
    problems = [problem(seed, case.distance) for case, _, _, seed in runs]
    values = learn(
        name,
        weights,
        max(case.horizon for case in cases),
        jnp.asarray(features, jnp.float32),
        Problem(*(jnp.asarray(np.stack(part), jnp.float32) for part in zip(*problems))),
        *(jnp.array([getattr(case, field) for case, *_ in runs]) for field in ("on_policy", "reuse", "horizon")),
        jnp.array([rate for _, _, rate, _ in runs], jnp.float32),
        jnp.array([beta for _, beta, _, _ in runs], jnp.float32),
        jax.vmap(jax.random.key)(jnp.array([seed for *_, seed in runs])),
    )
    start = np.array([_start(p) for p in problems])[:, :, None]
    reward, chosen, rejected, policy = (np.asarray(value, np.float64) for value in values)
    gain = (reward - start[:, 0]) / (start[:, 1] - start[:, 0])
    shape = len(cases), len(betas), len(rates), len(TUNED_ON) + len(SEEDS), -1
    gain, *rest = (part.reshape(shape) for part in (gain, chosen - start[:, 2], rejected - start[:, 3], policy))
    reported = slice(len(TUNED_ON), None)
    result = {}
    for c, case in enumerate(cases):
        tuning = np.nan_to_num(gain[c, :, :, : len(TUNED_ON), -1].mean(-1), nan=-np.inf)
        b, r = np.unravel_index(tuning.argmax(), tuning.shape)
        parts = (part[c, b, r, reported] for part in (gain, *rest))
        result[case] = Learned(*parts, rates[r], betas[b], gain[c, b, :, reported, -1])
    return result


def _start(p: Problem) -> tuple[float, float, float, float]:
    """Expected and highest reward, and the log-probabilities of chosen and rejected, under the reference."""
    log_prob = np.log(p.reference)
    return p.reference @ p.reward, p.reward.max(), p.chosen @ log_prob, p.rejected @ log_prob


@functools.cache
def grid(name: str, distances=DISTANCES, rates=RATES) -> dict[Case, Learned]:
    """Learners at every distance, on-policy and off-policy."""
    return learned(name, on_and_off(distances), rates=rates)


def on_and_off(distances) -> list[Case]:
    return [Case(distance, on) for distance in distances for on in (False, True)]


class Paired(NamedTuple):
    """Differences over seeds, each with the same problem and the same quantiles for both."""

    mean: float
    sd: float
    above: int  # seeds in which it is positive
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.sd:.3f} ({self.above} of {self.seeds})"


def paired(these, those) -> Paired:
    difference = np.asarray(these) - np.asarray(those)
    return Paired(float(difference.mean()), float(difference.std(ddof=1)), int((difference > 0).sum()), len(difference))

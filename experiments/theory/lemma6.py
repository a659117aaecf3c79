"""Lemma 6: the implicit weight of a response is the softmax of its log-likelihood; the importance ratio beside it."""

import itertools

import jax.numpy as jnp
import numpy as np

from bilevel_jax import importance

TITLE = "Lemma 6: implicit response weights"
VERDICT = "holds; the remark that the importance ratio is proportional to λ does not, unless π_old is equal"
TOKENS, WORDS = 2, 3
RESPONSES = np.array(list(itertools.product(range(WORDS), repeat=TOKENS)))  # all there are
GROUP = np.array([0, 3, 4, 7, 8])  # G of them


def log_softmax(table):
    table = table - table.max(-1, keepdims=True)
    return table - np.log(np.exp(table).sum(-1, keepdims=True))


def log_likelihood(table: np.ndarray) -> np.ndarray:
    """log π(y) of every response; a table [TOKENS, WORDS] of logits is the policy."""
    return log_softmax(table)[np.arange(TOKENS), RESPONSES].sum(1)


def loss_gradients(table: np.ndarray) -> np.ndarray:
    """∇_θ ℓ(y) for every response, [Y, TOKENS, WORDS]: softmax less one-hot."""
    return np.exp(log_softmax(table)) - np.eye(WORDS)[RESPONSES]


def weights(kind: str, log_prob: np.ndarray, old: np.ndarray, clip: float = np.inf) -> np.ndarray:
    """The project's, for one question."""
    number = len(log_prob)
    found = importance.response_weights(
        kind, *(jnp.asarray(x, jnp.float32) for x in (log_prob, old)), jnp.full(number, TOKENS), jnp.zeros(number, jnp.int32), clip
    )
    return np.asarray(found, np.float64)


def merit_slope(cost: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Central differences of the merit -LSE(-ℓ; 1) in each ℓ: the weights with which BMO pulls at the losses, (42)."""
    moves = step * np.eye(len(cost))

    def merit(costs):
        return -np.log(np.exp(-costs).sum(-1))

    return (merit(cost + moves) - merit(cost - moves)) / (2 * step)


def disproportion(ratio: np.ndarray, weight: np.ndarray) -> float:
    """0 where the two are proportional, otherwise the largest relative departure from the mean quotient."""
    quotient = ratio / weight
    return float(np.abs(quotient / quotient.mean() - 1).max())


def measure() -> dict:
    rng = np.random.default_rng(0)
    now, before = rng.normal(size=(2, TOKENS, WORDS))
    log_prob, old = log_likelihood(now), log_likelihood(before)
    stated = np.exp(log_prob[GROUP]) / np.exp(log_prob[GROUP]).sum()
    ours = weights("softmax", log_prob[GROUP], old[GROUP]) / len(GROUP)
    expected = {
        clip: np.einsum("y,y,ytv->tv", np.exp(old), weights("sequence", log_prob, old, clip), loss_gradients(now))
        for clip in (np.inf, 1.0)
    }
    return {
        "stated": stated,
        "ours": ours,
        "slope": merit_slope(-log_prob[GROUP]),
        "ratio": weights("sequence", log_prob[GROUP], old[GROUP]),
        "equal": disproportion(weights("sequence", log_prob[GROUP], np.full(len(GROUP), -2.0)), stated),
        "unequal": disproportion(weights("sequence", log_prob[GROUP], old[GROUP]), stated),
        "fresh": weights("sequence", log_prob[GROUP], log_prob[GROUP]),
        "expected": np.abs(expected[np.inf]).max(),
        "clipped": np.abs(expected[1.0]).max(),
        "typical": np.sqrt((np.exp(log_prob) @ (loss_gradients(now).reshape(len(log_prob), -1) ** 2)).max()),
    }


def paragraph(found: dict) -> str:
    return f"""\
For {len(GROUP)} of the {len(RESPONSES)} responses of a softmax table, `response_weights("softmax")` / G is within
{np.abs(found["ours"] - found["stated"]).max():.0e} of exp(-ℓ) normalised, and that within
{np.abs(found["slope"] - found["stated"]).max():.0e} of the derivatives of the merit -LSE(-ℓ; τ=1): the lemma holds. ℓ is the
*sum* over tokens; τ is 1, and Assumption 1 is used for the merit alone (Lemma 8).

The remark after it, r^g ∝ λ_g, holds only if π_old gives the G responses equal probability: then the quotients r/λ differ by
{found["equal"]:.0e}, with two unrelated policies by up to {found["unequal"]:.1f} of their mean. Straight after a refresh r is 1
for all while λ goes from {found["stated"].min():.3f} to {found["stated"].max():.3f}. The two are different weights, which is
why the project has both.

Summed over all responses, the importance-weighted gradient of (8), Σ π_old r ∇ℓ = Σ π_θ ∇(-log π_θ), is {found["expected"]:.0e}
(one response's: {found["typical"]:.2f}). It is 0 for every policy: a model's own samples, weighted to be on-policy, teach it
nothing in expectation. What self-refining changes comes from clipping ({found["clipped"]:.2f} at clip 1), from weights other
than r, from no longer training on the response that was masked, and from a sampling temperature other than 1, at which π_old is
not what was sampled from. In Tables 1 and 3 (temperature 0.8) r has no measurable effect."""


def draw(figure, found: dict) -> None:
    left, right = figure.subplots(1, 2)
    place = np.arange(len(GROUP))
    kinds = ("stated", "exp(-ℓ), normalised"), ("ours", "the project"), ("slope", "slope of the merit")
    for shift, (name, label) in enumerate(kinds):
        left.bar(place + 0.27 * (shift - 1), found[name], 0.27, label=label)
    left.set_xlabel("response g")
    left.set_ylabel("λ")
    left.legend(fontsize=8)
    right.plot(found["stated"], found["ratio"], "o", label="π_old unrelated")
    right.plot(found["stated"], found["fresh"], "s", label="just refreshed")
    right.set_xlabel("λ")
    right.set_ylabel("importance ratio r")
    right.legend(fontsize=8)

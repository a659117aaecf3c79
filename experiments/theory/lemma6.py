"""Lemma 6: the implicit weight of a response is the softmax of its log-likelihood; the importance ratio beside it."""

import itertools

import jax.numpy as jnp
import numpy as np

from bilevel_jax import importance

TITLE = "Lemma 6: implicit response weights"
VERDICT = "holds; the remark that the importance ratio is proportional to λ does not, unless π_old is equal"
TOKENS, WORDS = 2, 3
RESPONSES = np.array(list(itertools.product(range(WORDS), repeat=TOKENS)))  # all possible responses
GROUP = np.array([0, 3, 4, 7, 8])  # G of them


def log_softmax(table):
    table = table - table.max(-1, keepdims=True)
    return table - np.log(np.exp(table).sum(-1, keepdims=True))


def log_likelihood(table: np.ndarray) -> np.ndarray:
    """log π(y) of every response; the policy is a table of logits, [TOKENS, WORDS]."""
    return log_softmax(table)[np.arange(TOKENS), RESPONSES].sum(1)


def loss_gradients(table: np.ndarray) -> np.ndarray:
    """∇_θ ℓ(y) of every response, [Y, TOKENS, WORDS]: softmax minus one-hot."""
    return np.exp(log_softmax(table)) - np.eye(WORDS)[RESPONSES]


def weights(kind: str, log_prob: np.ndarray, old: np.ndarray, clip: float = np.inf) -> np.ndarray:
    """The response weights of the project for one question."""
    number = len(log_prob)
    results = importance.response_weights(
        kind, *(jnp.asarray(x, jnp.float32) for x in (log_prob, old)), jnp.full(number, TOKENS), jnp.zeros(number, jnp.int32), clip
    )
    return np.asarray(results, np.float64)


def merit_slope(cost: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Central differences of the merit -LSE(-ℓ; 1) in each ℓ: the weights of the losses in BMO, (42)."""
    moves = step * np.eye(len(cost))

    def merit(costs):
        return -np.log(np.exp(-costs).sum(-1))

    return (merit(cost + moves) - merit(cost - moves)) / (2 * step)


def disproportion(ratio: np.ndarray, weight: np.ndarray) -> float:
    """The largest relative deviation from the mean quotient; 0 if both are proportional."""
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


def paragraph(results: dict) -> str:
    return f"""\
For {len(GROUP)} of the {len(RESPONSES)} responses of a softmax table, `response_weights("softmax")` / G is within
{np.abs(results["ours"] - results["stated"]).max():.0e} of exp(-ℓ) normalised, and that within
{np.abs(results["slope"] - results["stated"]).max():.0e} of the derivatives of the merit -LSE(-ℓ; τ=1): the lemma holds. ℓ is the
*sum* over tokens; τ is 1, and Assumption 1 is used for the merit alone (Lemma 8).

The remark after it, r^g ∝ λ_g, holds only if π_old gives the G responses equal probability: then the quotients r/λ differ by
{results["equal"]:.0e}, with two unrelated policies by up to {results["unequal"]:.1f} of their mean. Straight after a refresh r is 1
for all while λ goes from {results["stated"].min():.3f} to {results["stated"].max():.3f}. The two are different weights, which is
why the project has both.

Summed over all responses, the importance-weighted gradient of (8), Σ π_old r ∇ℓ = Σ π_θ ∇(-log π_θ), is {results["expected"]:.0e}
(one response's: {results["typical"]:.2f}). It is 0 for every policy: a model's own samples, weighted to be on-policy, teach it
nothing in expectation. What self-refining changes comes from clipping ({results["clipped"]:.2f} at clip 1), from weights other
than r, from no longer training on the response that was masked, and from a sampling temperature other than 1, at which π_old is
not what was sampled from. In Tables 1 and 3 (temperature 0.8) r has no measurable effect."""


def draw(figure, results: dict) -> None:
    left, right = figure.subplots(1, 2)
    index = np.arange(len(GROUP))
    kinds = ("stated", "exp(-ℓ), normalised"), ("ours", "the project"), ("slope", "slope of the merit")
    for shift, (name, label) in enumerate(kinds):
        left.bar(index + 0.27 * (shift - 1), results[name], 0.27, label=label)
    left.set_xlabel("response g")
    left.set_ylabel("λ")
    left.legend(fontsize=8)
    right.plot(results["stated"], results["ratio"], "o", label="π_old unrelated")
    right.plot(results["stated"], results["fresh"], "s", label="just refreshed")
    right.set_xlabel("λ")
    right.set_ylabel("importance ratio r")
    right.legend(fontsize=8)

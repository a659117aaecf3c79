"""Choice of the next token: temperature, top-k, top-p, and inversion of the cumulative distribution.

Axes: S rows (decoding slots), V vocabulary entries.
"""

import dataclasses

import jax
import jax.numpy as jnp

BISECTIONS = 32  # of the range that holds the top-p threshold: down to float32 resolution
UNDERFLOW = 104.0  # e^-104 is 0 in float32
COLUMN_WIDTH = 128  # maximum number of vocabulary entries in one column of `inverse_cdf`


@dataclasses.dataclass(frozen=True)
class Settings:
    """The distribution to sample from, and the conditions that end a response.

    Attributes:
      temperature: divides the logits; 0 selects the most likely token.
      top_k: keep only the k most likely tokens; 0 keeps all. Tokens that tie with the k-th are kept.
      top_p: keep only the smallest set of most likely tokens whose probability, after temperature and top-k, reaches p. Tokens
        that tie with the last of the set are kept.
      max_new_tokens: maximum number of tokens of a response, its EOS included.
      stop: strings that end a response. The response is cut as soon as its text contains one of them.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        if not (self.temperature == 0 or 1e-4 <= self.temperature < float("inf")):
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy), or at least 0.0001")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be 0 (off) or positive")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]")
        if not (self.max_new_tokens >= 1 and self.max_new_tokens % 1 == 0):
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be a whole number, at least 1")
        if not all(self.stop):
            raise ValueError("a stop string is empty")


def filter_logits(settings: Settings, logits_SxV: jax.Array) -> jax.Array:
    """Logits divided by the temperature, -inf for tokens outside top-k and top-p. Not defined for temperature 0."""
    values = scaled = logits_SxV / settings.temperature
    if 0 < settings.top_k < scaled.shape[-1]:
        values = jax.lax.top_k(scaled, settings.top_k)[0]
        lowest = values.min(axis=-1, keepdims=True)  # for values[:, -1:] XLA would sort the whole vocabulary
        scaled = jnp.where(scaled >= lowest, scaled, -jnp.inf)
    if settings.top_p == 1:
        return scaled
    probs = jnp.exp(values - jax.nn.logsumexp(scaled, axis=-1, keepdims=True))
    highest = values.max(axis=-1, keepdims=True)

    def bisect(_, bounds):  # invariant: tokens above `low` together reach p, tokens above `high` do not
        low, high = bounds
        middle = (low + high) / 2
        reaches_p = jnp.where(values > middle, probs, 0).sum(axis=-1, keepdims=True) >= settings.top_p
        return jnp.where(reaches_p, middle, low), jnp.where(reaches_p, high, middle)

    # Bisection is faster than sorting the vocabulary.
    low, _ = jax.lax.fori_loop(0, BISECTIONS, bisect, (highest - UNDERFLOW, highest))
    return jnp.where(scaled > low, scaled, -jnp.inf)


def inverse_cdf(weight_SxV: jax.Array, uniform_S: jax.Array) -> jax.Array:
    """The first index [S] whose cumulative weight exceeds uniform · total.

    The vocabulary is split into columns. The search first selects a column by the column sums, then an entry of it.
    """
    S, V = weight_SxV.shape
    width = min(COLUMN_WIDTH, V)
    columns = jnp.pad(weight_SxV, ((0, 0), (0, -V % width))).reshape(S, -1, width)
    sums = columns.sum(axis=-1)
    column, rest = _first_beyond(sums, uniform_S * sums.sum(axis=-1))
    offset, _ = _first_beyond(_take(columns, column), rest)
    return column * width + offset


def _first_beyond(weight_Sxn: jax.Array, threshold_S: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first index [S] with positive weight whose cumulative weight exceeds the threshold, and the threshold less the weight
    before that index."""
    cumulative = jnp.cumsum(weight_Sxn, axis=-1)
    possible = weight_Sxn > 0
    beyond = possible & (cumulative > threshold_S[:, None])
    last = possible.shape[-1] - 1 - jnp.argmax(possible[:, ::-1], axis=-1)  # used if rounding leaves no index beyond
    index = jnp.where(beyond.any(axis=-1), jnp.argmax(beyond, axis=-1), last)
    return index, threshold_S - (_take(cumulative, index) - _take(weight_Sxn, index))


def _take(values_SxNx: jax.Array, index_S: jax.Array) -> jax.Array:
    """values[s, index[s]] for every s."""
    return values_SxNx[jnp.arange(values_SxNx.shape[0]), index_S]


def choose(settings: Settings, logits_SxV: jax.Array, uniform_S: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Chooses one token per row.

    Args:
      settings: the distribution.
      logits_SxV: logits of the plain model.
      uniform_S: one uniform number in [0, 1) per row.

    Returns:
      token [S]; its log-probability [S] under the plain model; its log-probability [S] under the sampled distribution.
    """
    plain = jax.nn.log_softmax(logits_SxV, axis=-1)
    if settings.temperature == 0:
        token = jnp.argmax(logits_SxV, axis=-1)
        return token, _take(plain, token), jnp.zeros(token.shape, jnp.float32)
    sampled = jax.nn.log_softmax(filter_logits(settings, logits_SxV), axis=-1)
    token = inverse_cdf(jnp.exp(sampled), uniform_S)
    return token, _take(plain, token), _take(sampled, token)

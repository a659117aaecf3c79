"""Frozen features of rows, which the amortised selector ω_i = φ·x_i sees. Made once, by the base, before the first step.

**What they are.** Of each row the mean hidden states of its question q and of its answer a, half way up the base, each along the
`WIDTH` directions in which the rows differ most, at their natural scale: what a step learns of one row it learns first of all rows
that are like it in the main. Two more features are trust and odds.

**Trust** says whether an answer belongs to its question as answers do in the trusted rows U: Σ_j ρ_j u_j v_j, with u_j and v_j the
canonical variates of question and answer over U and ρ_j their correlations (canonical correlation analysis with a ridge). For
Gaussian hidden states it is, to first order in ρ, what depends on both in log p_U(a|q) / p_U(a). So an answer of a kind that U
gives to other questions, and not to such as this one, counts against a row, while the style of all answers to all questions counts
for nothing: that differs between honest sources too. The bilevel rule is after log p_U(a|q) itself: with v(ω) = 0 the cost in (10b)
is -log p_θ(a|q), and θ follows U. But that is a sum over tokens, in which all that is hard about a row comes first; a coarse view
of the same conditional distribution, which sees nothing else, errs otherwise. φ finds by (10b) or (47) how much trust tells of the
cost, as for every feature.

**Odds** are those of a row to be one of the trusted: log p_U(q, a) / p_L(q, a), L the rows to select from, by logistic regression
on the first `PAIRED` of those directions of question and answer, and on all products of one of either. Weights in that ratio would
turn the lower level into the upper one, E_L[w ℓ] = E_U[ℓ]. They take from all that is rare in U, right or not; hence their small
spread.

No feature reads a label.
"""

import dataclasses
import io
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from bilevel_jax import errors, files, forward, scoring, sharding
from bilevel_jax.data import packing, templates
from bilevel_jax.models import decoder

FILE, PARAMS_FILE = "features.npz", "phi.npy"  # in a run's workdir: the encoder with the features of all rows, and φ at the end
WIDTH = 64  # d
CANONICAL = 8  # r, pairs of canonical variates
SCREENED = 32  # principal directions of the trusted rows in which they are sought
RIDGE = 0.05  # added to the variances of these, which are at most 1 in all
PAIRED = 8  # k, directions of question and answer whose products tell trusted rows from others
ODDS_RIDGE = 0.3  # of the weights of these
TRUST_SPREAD, ODDS_SPREAD = 1.0, 0.3  # the other features' variances add up to 1 for questions and for answers
SIZE = 2 * WIDTH + 2  # D
TRUST = -2  # its place among the features


# --------------------------------------------------------------------------------------------------------------------
# Hidden states
# --------------------------------------------------------------------------------------------------------------------


def lower_half(config: decoder.ModelConfig, base) -> tuple[decoder.ModelConfig, dict]:
    """The decoder without the upper half of its layers, which features do not need."""
    number = -(-config.num_layers // 2)
    layers = jax.tree.map(lambda stack: stack[:number], base["layers"])
    return dataclasses.replace(config, num_layers=number), base | {"layers": layers}


def entry_means(config: decoder.ModelConfig, base, packed: packing.Packed) -> jax.Array:
    """Mean hidden state of every entry's prompt and of its response, [E, 2, H] float32; 0 where it has no such token."""
    E, (S, L) = packed.length.shape[0], packed.tokens.shape[1:]

    def add(m, sums):
        total_Ex2xH, count_Ex2 = sums
        hidden_TxH = forward.hidden_states(config, base, None, packed, m).astype(jnp.float32)
        said_P = packed.logit_index[m] + 1  # a target's own token; beyond T for padding
        is_response_T = jnp.zeros(S * L, jnp.int32).at[said_P].set(1, mode="drop")
        place_T = (jnp.arange(S)[:, None] * (L + 1) + packed.segment_ids[m]).reshape(-1)  # of its segment among all there can be
        place_P = place_T.at[said_P].get(mode="fill", fill_value=S * (L + 1))
        entry_T = jnp.full(S * (L + 1), E, jnp.int32).at[place_P].set(packed.entry[m], mode="drop")[place_T]
        slot_T = 2 * entry_T + is_response_T
        total_Ex2xH += jax.ops.segment_sum(hidden_TxH, slot_T, num_segments=2 * E).reshape(total_Ex2xH.shape)
        count_Ex2 += jax.ops.segment_sum(jnp.ones(S * L), slot_T, num_segments=2 * E).reshape(count_Ex2.shape)
        return total_Ex2xH, count_Ex2

    start = jnp.zeros((E, 2, config.hidden_size)), jnp.zeros((E, 2))
    total_Ex2xH, count_Ex2 = jax.lax.fori_loop(0, packed.num_micro, add, start)
    return total_Ex2xH / jnp.maximum(count_Ex2, 1)[..., None]


_entry_means = jax.jit(lambda *batch: sharding.constrain(entry_means(*batch)), static_argnums=0)


def pooled(
    config: decoder.ModelConfig, base, examples: Sequence[templates.Example], sequences: int, max_length: int, mesh
) -> np.ndarray:
    """`entry_means` of rows half way up the base, [n, 2, H], in their order: 8·H bytes of host memory a row, as long as
    features are made. For `sequences` and `max_length` see `scoring.batches`."""
    config, base = lower_half(config, base)
    found = np.zeros((len(examples), 2, config.hidden_size), np.float32)
    for part, packed in scoring.batches(scoring.example_segments(examples), sequences, max_length, mesh, "features"):
        with jax.set_mesh(mesh):
            found[part] = np.asarray(_entry_means(config, base, packed))[: len(part)]
    return found


# --------------------------------------------------------------------------------------------------------------------
# Features
# --------------------------------------------------------------------------------------------------------------------


class Encoder(NamedTuple):
    """What makes features of hidden states: fitted to the rows to select from, and to trusted ones. H hidden size, d = `WIDTH`."""

    mean: np.ndarray  # [2, H], of question and answer
    directions: np.ndarray  # [2, H, d], principal
    trusted_mean: np.ndarray  # [2, H]
    canonical: np.ndarray  # [2, H, r], what makes canonical variates
    correlation: np.ndarray  # [r], ρ
    trust: np.ndarray  # [2], mean and spread over the rows to select from
    spread: np.ndarray  # [2, k], of these along the first k principal directions
    odds_weights: np.ndarray  # [1 + 2k + k²]
    odds: np.ndarray  # [2], mean and spread over the rows to select from


def _along(raw_nx2xH: np.ndarray, mean_2xH: np.ndarray, directions_2xHxd: np.ndarray) -> np.ndarray:
    """Questions and answers along some directions, [n, 2, d]."""
    return ((raw_nx2xH - mean_2xH).swapaxes(0, 1) @ directions_2xHxd).swapaxes(0, 1)


def _principal(raw_nx2xH: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean [2, H] and the principal directions [2, H, number] of what has spread 1 in each of the H, divided by √H: along all of
    them, variances add up to 1. Directions beyond H are 0."""
    n, _, H = raw_nx2xH.shape
    mean, spread = raw_nx2xH.mean(0), raw_nx2xH.std(0) + 1e-6
    directions = np.zeros((2, H, number), np.float32)
    for part in range(2):
        scaled_nxH = (raw_nx2xH[:, part] - mean[part]) / spread[part]
        _, vectors = np.linalg.eigh(scaled_nxH.T @ scaled_nxH / n)  # ascending
        most = vectors[:, ::-1][:, :number]
        directions[part, :, : most.shape[1]] = most / spread[part][:, None] / H**0.5
    return mean, directions


def canonical_directions(question_nxk: np.ndarray, answer_nxk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Canonical correlation analysis with `RIDGE`: directions [2, k, r] and correlations [r] of centred questions and answers.

    They are the singular vectors and values of (Σ_qq + ridge)^{-1/2} Σ_qa (Σ_aa + ridge)^{-1/2}.
    """
    n, k = question_nxk.shape
    whiten = []
    for part in (question_nxk, answer_nxk):
        values, vectors = np.linalg.eigh(part.T @ part / n + RIDGE * np.eye(k))
        whiten.append(vectors / np.sqrt(values) @ vectors.T)
    left, correlation, right = np.linalg.svd(whiten[0] @ (question_nxk.T @ answer_nxk / n) @ whiten[1])
    directions = np.stack([whiten[0] @ left[:, :CANONICAL], whiten[1] @ right[:CANONICAL].T])
    return directions, correlation[:CANONICAL]


def _trust(encoder: Encoder, raw_nx2xH: np.ndarray) -> np.ndarray:
    """Σ_j ρ_j u_j v_j, [n]."""
    variates_nx2xr = _along(raw_nx2xH, encoder.trusted_mean, encoder.canonical)
    return variates_nx2xr.prod(axis=1) @ encoder.correlation


def _paired(encoder: Encoder, raw_nx2xH: np.ndarray) -> np.ndarray:
    """1, question and answer along `PAIRED` directions, and the products of the two over √k, [n, 1 + 2k + k²]."""
    directions = encoder.directions[..., :PAIRED] / encoder.spread[:, None]
    question_nxk, answer_nxk = _along(raw_nx2xH, encoder.mean, directions).swapaxes(0, 1).astype(np.float64)
    products = question_nxk[:, :, None] * answer_nxk[:, None, :] / PAIRED**0.5
    return np.concatenate([np.ones((len(raw_nx2xH), 1)), question_nxk, answer_nxk, products.reshape(len(products), -1)], axis=1)


def _odds(encoder: Encoder, raw_nx2xH: np.ndarray) -> np.ndarray:
    """log p_U(q, a) / p_L(q, a), [n]."""
    return _paired(encoder, raw_nx2xH) @ encoder.odds_weights


def logistic_weights(upper_Mxd: np.ndarray, lower_Nxd: np.ndarray) -> np.ndarray:
    """Logistic regression with `ODDS_RIDGE` on all weights but the first: [d] so that x·w is log p_U(x) / p_L(x), each of the two
    having half of the loss."""
    x = np.concatenate([upper_Mxd, -lower_Nxd])
    share = np.concatenate([np.full(len(part), 0.5 / len(part)) for part in (upper_Mxd, lower_Nxd)])
    ridge = ODDS_RIDGE * (np.arange(x.shape[1]) > 0)

    def loss(weights):
        margin = x @ weights
        slope = -share / (1 + np.exp(np.minimum(margin, 500)))
        return share @ np.logaddexp(0, -margin) + ridge @ weights**2 / 2, slope @ x + ridge * weights

    return scipy.optimize.minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B").x


def fit(lower_Nx2xH: np.ndarray, upper_Mx2xH: np.ndarray) -> Encoder:
    """The encoder of a run, of the hidden states of the rows to select from and of the trusted ones, from `pooled`."""
    trusted_mean, screened = _principal(upper_Mx2xH, SCREENED)
    question_Mxk, answer_Mxk = _along(upper_Mx2xH, trusted_mean, screened).swapaxes(0, 1).astype(np.float64)
    directions, correlation = canonical_directions(question_Mxk, answer_Mxk)
    mean, principal = _principal(lower_Nx2xH, WIDTH)
    spread = _along(lower_Nx2xH, mean, principal[..., :PAIRED]).std(axis=0) + 1e-6
    canonical, nothing = screened @ directions, np.array([0.0, 1.0])
    encoder = Encoder(mean, principal, trusted_mean, canonical, correlation, nothing, spread, np.zeros(0), nothing)
    encoder = encoder._replace(odds_weights=logistic_weights(*(_paired(encoder, rows) for rows in (upper_Mx2xH, lower_Nx2xH))))
    trust, odds = _trust(encoder, lower_Nx2xH), _odds(encoder, lower_Nx2xH)
    return encoder._replace(**{k: np.array([v.mean(), v.std() + 1e-6]) for k, v in (("trust", trust), ("odds", odds))})


def encode(encoder: Encoder, raw_nx2xH: np.ndarray) -> np.ndarray:
    """Features of rows, [n, D] float32: questions and answers along the principal directions, then trust and odds. The mean of each
    is 0 over the rows that the encoder was fitted to."""
    along = _along(raw_nx2xH, encoder.mean, encoder.directions)
    trust, odds = (
        size * (values - mean) / spread
        for size, values, (mean, spread) in (
            (TRUST_SPREAD, _trust(encoder, raw_nx2xH), encoder.trust),
            (ODDS_SPREAD, _odds(encoder, raw_nx2xH), encoder.odds),
        )
    )
    return np.concatenate([along.reshape(len(along), -1), trust[:, None], odds[:, None]], axis=1).astype(np.float32)


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


def write(file: pathlib.Path, encoder: Encoder, features_NxD: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, features=features_NxD, **encoder._asdict())
    files.write_atomically(file, buffer.getvalue())


def write_params(file: pathlib.Path, phi_D: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, phi_D)
    files.write_atomically(file, buffer.getvalue())


def _load(file: pathlib.Path, what: Callable):
    """`what` of the arrays in a file.

    Raises:
      RunError: it is missing or damaged.
    """
    try:
        return what(np.load(file))
    except FileNotFoundError as error:
        raise errors.RunError(f"{file} is missing; put it back, or give another --workdir") from error
    except Exception as error:  # NumPy and zipfile have errors of every family for damaged bytes
        raise errors.RunError(f"{file} is damaged ({type(error).__name__}); put it back, or give another --workdir") from error


def read(file: pathlib.Path) -> tuple[Encoder, np.ndarray]:
    """What `write` wrote."""
    return _load(file, lambda arrays: (Encoder(*(arrays[name] for name in Encoder._fields)), arrays["features"]))


def read_params(file: pathlib.Path) -> np.ndarray:
    """What `write_params` wrote."""
    return _load(file, np.array)

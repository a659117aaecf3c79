"""Frozen features of rows, the inputs x_i of the amortised selector ω_i = φ·x_i. The base computes them once, before step 1.

The answer a of a row is its learned tokens, those of all answers in a conversation, and the question q is all other tokens. The
features of the row are, with U the trusted rows and L the rows to select from:

    mean hidden states of q and of a after half of the layers, along `WIDTH` principal directions each
    cca_score          Σ_j ρ_j u_j v_j                                                       (F1)
    log_density_ratio  log p_U(q, a) / p_L(q, a)                                             (F2)

In (F1), u_j and v_j are the canonical variates of q and a over U and ρ_j their correlations: canonical correlation analysis with a
ridge. For Gaussian hidden states it is, to first order in ρ, the part of log p_U(a|q) / p_U(a) that depends on both q and a. The
score measures whether the answer fits its question as answers in U do; the style of all answers to all questions cancels.

(F2) is logistic regression on the first `NUM_PAIRED` principal directions of q and a, and on all products of one of each. Weights
in that ratio would turn the lower level into the upper one, E_L[w ℓ] = E_U[ℓ]. It also lowers rows that are rare in U but correct,
so its spread is small.

No feature uses labels. φ learns from (10b) or (47) of the paper how much each feature says about the cost.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from bilevel_jax import errors, files, forward, scoring, sharding
from bilevel_jax.data import packing, templates
from bilevel_jax.models import decoder, layers, model_config

FILE, PARAMS_FILE = "features.npz", "phi.npy"  # in the workdir: the encoder with the features of all rows, and φ at the end
WIDTH = 64  # d
NUM_CANONICAL = 8  # r, pairs of canonical variates
NUM_SCREENED = 32  # principal directions of the trusted rows to which the canonical variates are restricted
RIDGE = 0.05  # added to the variances along these directions, which sum to at most 1
CONSTANT = 1e-4  # spread of a dimension, as a part of the usual size of hidden states, below which it is left out
NUM_PAIRED = 8  # k, directions of question and answer whose products enter the log density ratio
DENSITY_RATIO_RIDGE = 0.3  # on the weights of the log density ratio
CCA_SCORE_SPREAD, DENSITY_RATIO_SPREAD = 1.0, 0.3  # the variances of the other features sum to 1 for questions and for answers
SIZE = 2 * WIDTH + 2  # A
CCA_SCORE, LOG_DENSITY_RATIO = -2, -1  # column indices
OLD_NAMES = {  # of encoder fields, in files of earlier versions
    "cca_score": "trust",
    "density_ratio_weights": "odds_weights",
    "log_density_ratio": "odds",
}


# --------------------------------------------------------------------------------------------------------------------
# Hidden states
# --------------------------------------------------------------------------------------------------------------------


def middle_states(model: model_config.ModelConfig, base, packed: packing.Packed, m) -> jax.Array:
    """Hidden states [T, D] of micro-batch m after half of the layers and the final norm. No part of the base is copied."""
    number = -(-model.num_layers // 2)
    half = dataclasses.replace(model, num_layers=number)
    hidden_SxLxD = decoder.enter(half, base, number, packed.tokens[m], packed.positions[m], packed.segment_ids[m])
    hidden_TxD: Any = layers.norm(model, None).apply({"params": base["norm"]}, hidden_SxLxD.reshape(-1, model.hidden_size))
    return layers.scaled(hidden_TxD, 1 / model.logit_divisor)


def entry_means(model: model_config.ModelConfig, base, packed: packing.Packed) -> jax.Array:
    """Means of `middle_states` of the prompt and of the response of every entry, [E, 2, D] float32; 0 without such tokens."""
    E, (S, L) = packed.length.shape[0], packed.tokens.shape[1:]

    def add(m, sums):
        total_Ex2xD, count_Ex2 = sums
        hidden_TxD = middle_states(model, base, packed, m).astype(jnp.float32)
        response_token_P = packed.logit_index[m] + 1  # the flat index of the target itself; above T - 1 for padding
        is_response_T = jnp.zeros(S * L, jnp.int32).at[response_token_P].set(1, mode="drop")
        slot_T = 2 * forward.token_entries(packed, m) + is_response_T
        total_Ex2xD += jax.ops.segment_sum(hidden_TxD, slot_T, num_segments=2 * E).reshape(total_Ex2xD.shape)
        count_Ex2 += jax.ops.segment_sum(jnp.ones(S * L), slot_T, num_segments=2 * E).reshape(count_Ex2.shape)
        return total_Ex2xD, count_Ex2

    start = jnp.zeros((E, 2, model.hidden_size)), jnp.zeros((E, 2))
    total_Ex2xD, count_Ex2 = jax.lax.fori_loop(0, packed.num_micro, add, start)
    return total_Ex2xD / jnp.maximum(count_Ex2, 1)[..., None]


_entry_means = jax.jit(lambda *batch: sharding.constrain(entry_means(*batch)), static_argnums=0)


def pooled(
    model: model_config.ModelConfig,
    base,
    examples: Sequence[templates.Example],
    sequences: int,
    max_length: int,
    mesh,
    description: str = "features",
) -> np.ndarray:
    """`entry_means` of rows, [n, 2, D] float32, in the order of the rows.

    They take 8·D bytes of host memory per row until the features are computed.

    Args:
      sequences, max_length, description: see `scoring.batches`.
    """
    means_nx2xD = np.zeros((len(examples), 2, model.hidden_size), np.float32)
    program, segments = functools.partial(_entry_means, model, base), scoring.example_segments(examples)
    for indices, _, means in scoring.results(program, segments, sequences, max_length, mesh, description):
        means_nx2xD[indices] = np.asarray(means)[: len(indices)]
    return means_nx2xD


# --------------------------------------------------------------------------------------------------------------------
# Features
# --------------------------------------------------------------------------------------------------------------------


class Encoder(NamedTuple):
    """Maps mean hidden states to features; fitted to the rows to select from and to trusted rows. D hidden width, d = `WIDTH`."""

    mean: np.ndarray  # [2, D], of question and answer over the rows to select from
    directions: np.ndarray  # [2, D, d], principal directions
    trusted_mean: np.ndarray  # [2, D], over the trusted rows
    canonical: np.ndarray  # [2, D, r], directions of the canonical variates
    correlation: np.ndarray  # [r], ρ
    cca_score: np.ndarray  # [2], its mean and standard deviation over the rows to select from
    spread: np.ndarray  # [2, k], standard deviations along the first k principal directions
    density_ratio_weights: np.ndarray  # [1 + 2k + k²]
    log_density_ratio: np.ndarray  # [2], its mean and standard deviation over the rows to select from


def _project(raw_nx2xD: np.ndarray, mean_2xD: np.ndarray, directions_2xDxd: np.ndarray) -> np.ndarray:
    """Coordinates of questions and answers along some directions, [n, 2, d]."""
    return ((raw_nx2xD - mean_2xD).swapaxes(0, 1) @ directions_2xDxd).swapaxes(0, 1)


def _principal(raw_nx2xD: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean [2, D] and principal directions [2, D, number] of hidden states that are scaled to unit variance in each of the D
    dimensions and divided by √D: the variances along all directions sum to 1. Directions after the D-th are 0.

    A dimension in which the rows hardly differ, as where all have the same question, is left out: divided by its spread, other rows
    would be very far away."""
    n, _, D = raw_nx2xD.shape
    mean, spread = raw_nx2xD.mean(0), raw_nx2xD.std(0) + 1e-6
    size_2x1 = np.median(np.sqrt((raw_nx2xD**2).mean(0)), axis=1, keepdims=True)
    spread = np.where(spread > CONSTANT * size_2x1 + 1e-6, spread, np.float32(np.inf))
    directions = np.zeros((2, D, number), np.float32)
    for part in range(2):
        scaled_nxD = (raw_nx2xD[:, part] - mean[part]) / spread[part]
        _, vectors = np.linalg.eigh(scaled_nxD.T @ scaled_nxD / n)  # ascending
        leading = vectors[:, ::-1][:, :number]
        directions[part, :, : leading.shape[1]] = leading / spread[part][:, None] / D**0.5
    return mean, directions


def canonical_directions(question_nxk: np.ndarray, answer_nxk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Canonical correlation analysis with `RIDGE`.

    The directions and correlations come from the singular value decomposition of

        (Σ_qq + ridge)^{-1/2} Σ_qa (Σ_aa + ridge)^{-1/2}                                     (F3)

    Args:
      question_nxk, answer_nxk: centred.

    Returns:
      directions [2, k, r] and correlations [r].
    """
    n, k = question_nxk.shape
    whiten = []
    for part in (question_nxk, answer_nxk):
        values, vectors = np.linalg.eigh(part.T @ part / n + RIDGE * np.eye(k))
        whiten.append(vectors / np.sqrt(values) @ vectors.T)
    left, correlation, right = np.linalg.svd(whiten[0] @ (question_nxk.T @ answer_nxk / n) @ whiten[1])
    directions = np.stack([whiten[0] @ left[:, :NUM_CANONICAL], whiten[1] @ right[:NUM_CANONICAL].T])
    return directions, correlation[:NUM_CANONICAL]


def _cca_score(encoder: Encoder, raw_nx2xD: np.ndarray) -> np.ndarray:
    """(F1) of each row, [n]."""
    variates_nx2xr = _project(raw_nx2xD, encoder.trusted_mean, encoder.canonical)
    return variates_nx2xr.prod(axis=1) @ encoder.correlation


def _paired_inputs(encoder: Encoder, raw_nx2xD: np.ndarray) -> np.ndarray:
    """Inputs of the logistic regression, [n, 1 + 2k + k²]: 1, question, answer, and the products of the two divided by √k."""
    directions = encoder.directions[..., :NUM_PAIRED] / encoder.spread[:, None]
    question_nxk, answer_nxk = _project(raw_nx2xD, encoder.mean, directions).swapaxes(0, 1).astype(np.float64)
    products = question_nxk[:, :, None] * answer_nxk[:, None, :] / NUM_PAIRED**0.5
    return np.concatenate([np.ones((len(raw_nx2xD), 1)), question_nxk, answer_nxk, products.reshape(len(products), -1)], axis=1)


def _log_density_ratio(encoder: Encoder, raw_nx2xD: np.ndarray) -> np.ndarray:
    """(F2) of each row, [n]."""
    return _paired_inputs(encoder, raw_nx2xD) @ encoder.density_ratio_weights


def logistic_weights(upper_nxd: np.ndarray, lower_Nxd: np.ndarray) -> np.ndarray:
    """Weights w [d] of a logistic regression, so that x·w estimates log p_U(x) / p_L(x). `DENSITY_RATIO_RIDGE` applies to all
    weights except the first; each of the two sets has half of the loss."""
    x = np.concatenate([upper_nxd, -lower_Nxd])
    share = np.concatenate([np.full(len(part), 0.5 / len(part)) for part in (upper_nxd, lower_Nxd)])
    ridge = DENSITY_RATIO_RIDGE * (np.arange(x.shape[1]) > 0)

    def loss(weights):
        margin = x @ weights
        gradient = -share / (1 + np.exp(np.minimum(margin, 500)))
        return share @ np.logaddexp(0, -margin) + ridge @ weights**2 / 2, gradient @ x + ridge * weights

    return scipy.optimize.minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B").x


def fit(lower_Nx2xD: np.ndarray, upper_nx2xD: np.ndarray) -> Encoder:
    """Fits the encoder to the mean hidden states of the rows to select from and of the trusted rows, from `pooled`."""
    trusted_mean, screened = _principal(upper_nx2xD, NUM_SCREENED)
    question_nxk, answer_nxk = _project(upper_nx2xD, trusted_mean, screened).swapaxes(0, 1).astype(np.float64)
    directions, correlation = canonical_directions(question_nxk, answer_nxk)
    mean, principal = _principal(lower_Nx2xD, WIDTH)
    spread = _project(lower_Nx2xD, mean, principal[..., :NUM_PAIRED]).std(axis=0) + 1e-6
    canonical, standard = screened @ directions, np.array([0.0, 1.0])
    encoder = Encoder(
        mean=mean,
        directions=principal,
        trusted_mean=trusted_mean,
        canonical=canonical,
        correlation=correlation,
        cca_score=standard,
        spread=spread,
        density_ratio_weights=np.zeros(0),
        log_density_ratio=standard,
    )
    weights = logistic_weights(*(_paired_inputs(encoder, rows) for rows in (upper_nx2xD, lower_Nx2xD)))
    encoder = encoder._replace(density_ratio_weights=weights)
    cca_score, log_ratio = _cca_score(encoder, lower_Nx2xD), _log_density_ratio(encoder, lower_Nx2xD)
    return encoder._replace(cca_score=_mean_and_std(cca_score), log_density_ratio=_mean_and_std(log_ratio))


def _mean_and_std(values: np.ndarray) -> np.ndarray:
    return np.array([values.mean(), values.std() + 1e-6])


def coordinates(encoder: Encoder, raw_nx2xD: np.ndarray) -> np.ndarray:
    """Principal coordinates of questions and answers, [n, 2d]. Each has mean 0 over the rows to which the encoder was fitted."""
    return _project(raw_nx2xD, encoder.mean, encoder.directions).reshape(len(raw_nx2xD), -1)


def encode(encoder: Encoder, raw_nx2xD: np.ndarray) -> np.ndarray:
    """Features of rows, [n, A] float32: principal directions of questions, of answers, `cca_score`, `log_density_ratio`.

    Each feature has mean 0 over the rows to select from to which the encoder was fitted.
    """
    cca_score, log_ratio = (
        size * (values - mean) / spread
        for size, values, (mean, spread) in (
            (CCA_SCORE_SPREAD, _cca_score(encoder, raw_nx2xD), encoder.cca_score),
            (DENSITY_RATIO_SPREAD, _log_density_ratio(encoder, raw_nx2xD), encoder.log_density_ratio),
        )
    )
    columns = [coordinates(encoder, raw_nx2xD), cca_score[:, None], log_ratio[:, None]]
    return np.concatenate(columns, axis=1).astype(np.float32)


def similarity(encoder: Encoder, raw_nx2xD: np.ndarray) -> np.ndarray:
    """How much rows are like the trusted ones, [n] float32: the mean of (F1) and (F2), each with mean 0 and deviation 1.  (F4)

    Mean and deviation are those over the rows to select from to which the encoder was fitted.
    """
    scores = (
        (_cca_score(encoder, raw_nx2xD), encoder.cca_score),
        (_log_density_ratio(encoder, raw_nx2xD), encoder.log_density_ratio),
    )
    return np.mean([(values - mean) / deviation for values, (mean, deviation) in scores], axis=0).astype(np.float32)


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


def write(file: pathlib.Path, encoder: Encoder, features_NxA: np.ndarray) -> None:
    """Writes the encoder and the features of all rows to select from."""
    with files.replacing(file) as out:
        np.savez(out, features=features_NxA, **encoder._asdict())


def write_params(file: pathlib.Path, feature_params_A: np.ndarray) -> None:
    """Writes φ."""
    with files.replacing(file) as out:
        np.save(out, feature_params_A)


def _load(file: pathlib.Path, parse: Callable):
    """Applies `parse` to the arrays of a file.

    Raises:
      RunError: the file is missing or damaged.
    """
    try:
        files.check_regular(file)
        values = parse(np.load(file))
        finite = all(np.isfinite(array).all() for array in jax.tree.leaves(values))
    except FileNotFoundError as error:
        raise errors.RunError(f"{file} is missing; put it back, or give another --workdir") from error
    except Exception as error:  # NumPy and zipfile raise many kinds of errors for damaged bytes
        raise errors.RunError(f"{file} is damaged ({type(error).__name__}); put it back, or give another --workdir") from error
    if not finite:
        raise errors.RunError(f"{file} has values that are not finite; put it back, or give another --workdir")
    return values


def read(file: pathlib.Path) -> tuple[Encoder, np.ndarray]:
    """The encoder and the features that `write` wrote. Also reads files with `OLD_NAMES`."""

    def parse(arrays):
        fields = {name: arrays[name if name in arrays else OLD_NAMES.get(name, name)] for name in Encoder._fields}
        return Encoder(**fields), arrays["features"]

    return _load(file, parse)


def read_params(file: pathlib.Path) -> np.ndarray:
    """The φ that `write_params` wrote."""
    return _load(file, np.array)

"""Lemma 7: the loss of a response is convex in the logits z, its Hessian the block diagonal of the tokens' softmax covariances."""

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax import losses

TITLE = "Lemma 7: convex in the logits"
VERDICT = "holds"
TOKENS, WORDS, STEP = 3, 5, 2e-2


def covariances(z_DxV: np.ndarray) -> np.ndarray:
    """The Hessian of the lemma, [D·V, D·V]: diag(p) - ppᵀ for each token."""
    D, V = z_DxV.shape
    hessian = np.zeros((D, V, D, V))
    for d, z in enumerate(z_DxV):
        p = np.exp(z - z.max())
        p /= p.sum()
        hessian[d, :, d, :] = np.diag(p) - np.outer(p, p)
    return hessian.reshape(D * V, D * V)


def differences(z_DxV: np.ndarray, target_D: np.ndarray) -> np.ndarray:
    """The same by central differences of the gradient of the project's loss in the hidden states, with the identity as head."""
    D, V = z_DxV.shape
    head, source = jnp.eye(V), jnp.arange(D)

    def loss(z):
        return losses.token_nll(z, head, source, jnp.asarray(target_D), D).sum()

    moves = jnp.asarray(STEP * np.eye(D * V).reshape(-1, D, V), jnp.float32)
    slope = jax.jit(jax.vmap(jax.grad(loss)))
    z = jnp.asarray(z_DxV, jnp.float32)
    return np.asarray((slope(z + moves) - slope(z - moves)) / (2 * STEP), np.float64).reshape(D * V, D * V)


def in_parameters(a: float, b: float) -> np.ndarray:
    """Counterexample: the Hessian in θ = (a, b) of -log σ(z)_1 with z = (ab, 0); s is the probability of the other word."""
    s = 1 / (1 + np.exp(a * b))
    curve = s * (1 - s)
    return np.array([[curve * b * b, curve * a * b - s], [curve * a * b - s, curve * a * a]])


def measure() -> dict:
    rng = np.random.default_rng(0)
    z, target = 2 * rng.normal(size=(TOKENS, WORDS)), rng.integers(0, WORDS, TOKENS)
    stated, numeric = covariances(z), differences(z, target)
    same = np.kron(np.eye(TOKENS), np.ones((WORDS, WORDS))) > 0
    return {
        "stated": stated,
        "numeric": numeric,
        "error": np.abs(numeric - stated).max(),
        "off_block": np.abs(numeric[~same]).max(),
        "smallest": np.linalg.eigvalsh(stated)[0],
        "zeros": int((np.linalg.eigvalsh(stated) < 1e-12).sum()),
        "in_parameters": np.linalg.eigvalsh(in_parameters(0.0, 0.0))[0],
    }


def paragraph(results: dict) -> str:
    return f"""\
The Hessian of `losses.token_nll` for {TOKENS} tokens of {WORDS} words, by differences of its gradient in float32, is within
{results["error"]:.1e} of diag(p) − ppᵀ for each token and 0 between tokens ({results["off_block"]:.1e}). The smallest eigenvalue of
the stated matrix is {results["smallest"]:.1e}; {results["zeros"]} are 0, one for each token, as a constant added to its logits
changes nothing: the loss is convex, not strictly. It is not convex in θ: with z = (ab, 0) an eigenvalue at a = b = 0 is
{results["in_parameters"]:.2f}. (The zero blocks of (14) are V x V, not V x D.)"""


def draw(figure, results: dict) -> None:
    for axes, name, title in zip(figure.subplots(1, 2), ("stated", "numeric"), ("diag(p) - ppᵀ", "the project's loss")):
        image = axes.imshow(results[name], cmap="RdBu", vmin=-0.25, vmax=0.25)
        axes.set_title(title)
        axes.set_xlabel("entry of vec(z)")
    figure.colorbar(image, ax=figure.axes, shrink=0.8)

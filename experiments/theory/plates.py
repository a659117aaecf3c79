"""A problem with known sets of minimizers: θ is a point of the plane, the loss of a row is half its squared distance to a box.

With two words and one token, the backbone z(θ) = (-ℓ(θ), log(1 - e^-ℓ(θ))) makes ℓ the negative log-likelihood of a softmax policy,
so these are SFT losses. Zero loss needs a logit of -∞: with finite logits a softmax is never 1 and Assumption 1 never holds, so the
paper must mean extended reals. All arrays are NumPy float64 unless they come from JAX.
"""

import itertools

import numpy as np

# [row, lower or upper corner, axis], as in Figure 1: all three boxes intersect; 1 and 3 intersect the trusted minimizers.
LOWER = np.array([[[-1, 0], [2, 2]], [[-2, -1], [3, 0.5]], [[0, 0], [1, 4]]], float)
UPPER = np.array([[0.25, 1.5], [0.75, 3.5]])
USELESS = 1  # the row that does not intersect them


def residual(theta, boxes):
    """θ minus its nearest point in each box, [..., N, 2]: also the gradient of the loss of each row. NumPy or JAX."""
    theta = theta[..., None, :]
    return theta - theta.clip(boxes[:, 0], boxes[:, 1])


def losses(theta, boxes):
    """ℓ_i(θ), [..., N]."""
    return 0.5 * (residual(theta, boxes) ** 2).sum(-1)


def grid(step: float) -> np.ndarray:
    """Grid points [P, 2]. They include every corner of the boxes if 0.5 and 0.25 are multiples of `step`."""
    axis = np.arange(-2.5, 4.5 + step / 2, step)
    return np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)


def supports(number: int) -> list[tuple[int, ...]]:
    """All nonempty sets of rows, as sets with positive weight."""
    return [rows for size in range(1, number + 1) for rows in itertools.combinations(range(number), size)]


def bds_value(rows: tuple[int, ...], boxes: np.ndarray, upper: np.ndarray) -> float:
    """The lowest trusted loss on argmin Σ λ_i ℓ_i with λ_i > 0 for exactly these rows, which must share a minimizer.

    The weighted sum is zero at its minimizers, hence so is each ℓ_i with weight: for any weights they are the intersection of the
    boxes. The distance of two boxes is the norm of their gaps along the axes.
    """
    low, high = boxes[list(rows), 0].max(0), boxes[list(rows), 1].min(0)
    if (low > high).any():
        raise ValueError(f"rows {rows} share no minimizer")
    gap = np.maximum(0, np.maximum(low - upper[1], upper[0] - high))
    return float(0.5 * (gap**2).sum())


def many(seed: int, useful: int = 8, useless: int = 4) -> np.ndarray:
    """Random rows that all contain [0, 1] x [0.25, 0.5]. Useful rows come first and intersect `UPPER`; the others end below it."""
    rng = np.random.default_rng(seed)
    number = useful + useless
    top = np.concatenate([rng.uniform(1.75, 4, useful), rng.uniform(0.5, 1.25, useless)])
    low = np.stack([rng.uniform(-2, 0, number), rng.uniform(-2, 0.25, number)], 1)
    return np.stack([low, np.stack([rng.uniform(1, 3, number), top], 1)], 1)

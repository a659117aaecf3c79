"""A problem whose minimiser sets are known: θ is a point of the plane, a row's loss half its squared distance to a box.

With two words and one token, the backbone z(θ) = (-ℓ(θ), log(1 - e^-ℓ(θ))) makes ℓ the negative log-likelihood of a softmax policy,
so these are SFT losses. Zero loss is reached with a logit of -∞: for finite logits Assumption 1 never holds, as a softmax is
never 1, and the paper's extended reals have to be meant. All arrays are float64 of NumPy unless they come from JAX.
"""

import itertools

import numpy as np

# [row, lowest or highest corner, axis]. What Figure 1 draws: all three meet, 1 and 3 meet the trusted rows' minimisers, 2 does not.
LOWER = np.array([[[-1, 0], [2, 2]], [[-2, -1], [3, 0.5]], [[0, 0], [1, 4]]], float)
UPPER = np.array([[0.25, 1.5], [0.75, 3.5]])
USELESS = 1  # the row that meets none of them


def residual(theta, boxes):
    """θ less its nearest point of each box, [..., N, 2]: also the gradient of each row's loss. NumPy or JAX."""
    theta = theta[..., None, :]
    return theta - theta.clip(boxes[:, 0], boxes[:, 1])


def losses(theta, boxes):
    """ℓ_i(θ), [..., N]."""
    return 0.5 * (residual(theta, boxes) ** 2).sum(-1)


def grid(step: float) -> np.ndarray:
    """Points [P, 2] that hold every corner of the boxes where 0.5 and 0.25 are multiples of `step`."""
    axis = np.arange(-2.5, 4.5 + step / 2, step)
    return np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)


def supports(number: int) -> list[tuple[int, ...]]:
    """All sets of rows that can have positive weight."""
    return [rows for size in range(1, number + 1) for rows in itertools.combinations(range(number), size)]


def bds_value(rows: tuple[int, ...], boxes: np.ndarray, upper: np.ndarray) -> float:
    """The least trusted loss on argmin Σ λ_i ℓ_i with exactly these λ_i > 0, where the rows share a minimiser.

    The weighted sum is then zero at its minimisers, hence so is each ℓ_i with weight: they are the box that the rows have in
    common, whatever the weights. The distance of two boxes is the norm of their gaps along the axes.
    """
    low, high = boxes[list(rows), 0].max(0), boxes[list(rows), 1].min(0)
    if (low > high).any():
        raise ValueError(f"rows {rows} share no minimiser")
    gap = np.maximum(0, np.maximum(low - upper[1], upper[0] - high))
    return float(0.5 * (gap**2).sum())


def many(seed: int, useful: int = 8, useless: int = 4) -> np.ndarray:
    """Random rows around [0, 1] x [0.25, 0.5], which all share; the useful ones, first, meet `UPPER`, the others end below it."""
    rng = np.random.default_rng(seed)
    number = useful + useless
    top = np.concatenate([rng.uniform(1.75, 4, useful), rng.uniform(0.5, 1.25, useless)])
    low = np.stack([rng.uniform(-2, 0, number), rng.uniform(-2, 0.25, number)], 1)
    return np.stack([low, np.stack([rng.uniform(1, 3, number), top], 1)], 1)

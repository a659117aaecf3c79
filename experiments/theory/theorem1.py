"""Theorem 1 and Lemma 5: weak Pareto points by definition, minimizers of weighted sums, and the best trusted loss of both."""

import numpy as np

from experiments.theory import plates

TITLE = "Theorem 1: weak Pareto set and weighted minimisers (Figure 1)"
VERDICT = "holds weakly: for global solutions, with weights from the closed simplex; not for local ones"
TIE = 1e-12  # losses within this of the minimum count as minimal
STEP, PARTS = 0.25, 8


def weak_pareto(loss_PxN: np.ndarray) -> np.ndarray:
    """Definition 1 over P points, bool [P]: no other point is lower in every loss."""
    dominated = np.ones((len(loss_PxN), len(loss_PxN)), bool)
    for loss in loss_PxN.T:
        dominated &= loss[None, :] < loss[:, None] - TIE
    return ~dominated.any(1)


def simplex(number: int, parts: int) -> np.ndarray:
    """All weights that are multiples of 1/parts, including faces and corners."""
    if number == 1:
        return np.ones((1, 1))
    counts = np.stack(np.meshgrid(*[np.arange(parts + 1)] * number, indexing="ij"), -1).reshape(-1, number)
    return counts[counts.sum(1) == parts] / parts


def minimisers(weights: np.ndarray, loss_PxN: np.ndarray) -> np.ndarray:
    """S(λ) for every λ, bool [weights, P]."""
    total = weights @ loss_PxN.T
    return total <= total.min(1, keepdims=True) + TIE


def compare(loss: np.ndarray, trusted: np.ndarray, weights: np.ndarray) -> dict:
    pareto, union = weak_pareto(loss), minimisers(weights, loss).any(0)
    return {"pareto": pareto, "union": union, "bmo": trusted[pareto].min(), "bds": trusted[union].min()}


def curve(kind: str) -> dict:
    """Two rows on a line without a shared minimizer: ½(θ ∓ 1)² (convex) or 1 - exp(-(θ ∓ 1)²) (concave); trusted loss ½θ²."""
    theta = np.linspace(-2, 2, 401)
    square = (theta[:, None] - np.array([1.0, -1.0])) ** 2
    loss = 0.5 * square if kind == "convex" else 1 - np.exp(-square)
    return compare(loss, 0.5 * theta**2, simplex(2, 200)) | {"theta": theta, "loss": loss}


def local_solutions(radius: float = 0.25) -> dict:
    """Two lines that cross at 0, with the trusted minimum (1, 0) on one: the best trusted losses near λ = (½, ½), θ = 0."""
    boxes = np.array([[[-2, 0], [2, 0]], [[0, -2], [0, 2]]], float)
    points = plates.grid(0.125)
    loss, trusted = plates.losses(points, boxes), 0.5 * ((points - np.array([1.0, 0.0])) ** 2).sum(1)
    near = np.linalg.norm(points, axis=1) <= radius
    weights = simplex(2, 40)
    weights = weights[np.abs(weights - 0.5).max(1) <= radius]
    here = trusted[(points == 0).all(1)].min()
    return {
        "here": here,
        "bds_near": trusted[near & minimisers(weights, loss).any(0)].min(),
        "bmo_near": trusted[near & weak_pareto(loss)].min(),
    }


def measure() -> dict:
    points = plates.grid(STEP)
    loss, trusted = plates.losses(points, plates.LOWER), plates.losses(points, plates.UPPER[None])[:, 0]
    weights = simplex(3, PARTS)
    results = compare(loss, trusted, weights)
    lemma5 = 0
    for i in range(3):
        individual = (loss[:, i] == 0) & (np.delete(loss, i, 1) > 0).all(1)
        lemma5 += int(((results["pareto"] & ~weak_pareto(np.delete(loss, i, 1))) != individual).sum())
    inside = minimisers(weights[(weights > 0).all(1)], loss).any(0)  # reachable with finite ω
    return results | {
        "points": points,
        "trusted": trusted,
        "inside": inside,
        "bds_inside": trusted[inside].min(),
        "lemma5": lemma5,
        "convex": curve("convex"),
        "concave": curve("concave"),
        "local": local_solutions(),
    }


def paragraph(results: dict) -> str:
    concave, convex, local = results["concave"], results["convex"], results["local"]
    return f"""\
On {len(results["points"])} grid points of the rows of Figure 1, the weak Pareto set by Definition 1 and the union of S(λ) over
{len(simplex(3, PARTS))} λ of the simplex differ in {(results["pareto"] != results["union"]).sum()} points of
{results["pareto"].sum()}; both optima are {results["bmo"]:g}. Lemma 5 (WP less WP without row i = individual minimisers of i) fails
in {results["lemma5"]} points. Under Assumption 1 both sets are simply the points where some row has loss 0, so the proof needs no
convexity.

*λ must come from the closed simplex.* Over λ > 0, all that ω in R^N gives, the union has {results["inside"].sum()} points, those
that all rows share, and the best trusted loss is {results["bds_inside"]:g}. *Without Assumption 1* equivalence can fail: with
losses 1 - exp(-(θ∓1)²) every θ in [-1, 1] is weakly Pareto, weighted sums reach only {concave["union"].sum()} of
{concave["pareto"].sum()} points, and the optima are {concave["bmo"]:.3f} (BMO) and {concave["bds"]:.3f} (BDS). The assumption
is not necessary: with ½(θ∓1)², convex in θ, the sets differ in {(convex["pareto"] != convex["union"]).sum()} points.

*Local solutions are not equivalent.* Two rows whose minimisers are the two axes, the trusted minimum at (1, 0): at λ = (½,
½), θ = 0 all nearby λ have S(λ) = {{0}}, so it is a local solution of BDS (trusted loss {local["here"]:g}, none lower
nearby: {local["bds_near"]:g}). For BMO it is not: the axis leads down, to {local["bmo_near"]:.3f} within the same radius.
The other direction is sound: a local solution of BMO lies in some row's minimisers, and is one of BDS with all weight on
that row."""


def draw(figure, results: dict) -> None:
    left = figure.add_subplot(1, 2, 1, projection="3d")
    floor = -2.0  # the plates lie under the surface of the trusted loss
    for i, (low, high) in enumerate(plates.LOWER):
        x, y = np.meshgrid(*np.stack([low, high], 1))
        left.plot_surface(x, y, np.full((2, 2), floor), color=f"C{i + 1}", alpha=0.35, label=f"minimisers of row {i + 1}")
    side = round(len(results["points"]) ** 0.5)
    x, y = results["points"].T.reshape(2, side, side)
    shown = np.where(results["trusted"] < 4, results["trusted"], np.nan).reshape(side, side)
    left.plot_surface(x, y, shown, cmap="Blues_r", alpha=0.5, linewidth=0, rcount=side, ccount=side)
    for name, color, label in (("inside", "black", "best where all rows share"), ("union", "magenta", "best without row 2")):
        best = results["points"][results[name]][results["trusted"][results[name]].argmin()]
        loss = results["trusted"][results[name]].min()
        left.plot(*np.stack([best, best], 1), [floor, loss], "o-", color=color, markersize=4, label=label)
    left.set_xlabel("θ₁")
    left.set_ylabel("θ₂")
    left.set_zlabel("trusted loss")
    left.view_init(elev=22, azim=-125)
    left.legend(fontsize=6, loc="upper left")
    right = figure.add_subplot(1, 2, 2)
    first, second = results["concave"]["loss"].T
    right.plot(first, second, color="0.8", label="θ in [-2, 2]")
    for name, marker, label in (("pareto", ".", "weakly Pareto"), ("union", "x", "weighted minimisers")):
        right.plot(first[results["concave"][name]], second[results["concave"][name]], marker, markersize=4, label=label)
    right.set_xlabel("loss of row 1")
    right.set_ylabel("loss of row 2")
    right.legend(fontsize=8)

"""Theorem 3: bilevel selection has a strictly lower trusted loss than direct mixing, for every ρ of a grid."""

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax import losses
from experiments.theory import plates

TITLE = "Theorem 3: strictly below every ρ of direct mixing"
VERDICT = "does not hold as printed; holds with two more assumptions"
RHO = np.concatenate([np.logspace(-4, -1, 13), np.linspace(0.15, 1, 18)])
TABLE_RHO = np.array([0.05, 0.25, 0.5, 0.75, 0.95])
BISECTIONS = 70  # to the last bit


def minimisers(slope, low: float, high: float) -> tuple[float, float]:
    """Ends of the set of minimizers of a convex function of one variable: where its slope changes from < 0, and to > 0."""

    def border(is_left):
        left, right = low, high
        for _ in range(BISECTIONS):
            middle = (left + right) / 2
            left, right = (middle, right) if is_left(middle) else (left, middle)
        return (left + right) / 2

    return border(lambda y: slope(y) < 0), border(lambda y: slope(y) <= 0)


def mixed(rho: float, boxes: np.ndarray, upper: np.ndarray, power: int = 2) -> float:
    """The lowest trusted loss on argmin ρ mean ℓ_i + (1 - ρ) ℓ_0, solved along the second axis, the only one with a conflict.

    `power`: ℓ_0 is half the squared distance (2) or the distance itself (1).
    """

    def trusted_slope(y):
        gap = y - np.clip(y, upper[0, 1], upper[1, 1])
        return gap if power == 2 else np.sign(gap)

    def slope(y):
        return rho * np.mean(y - np.clip(y, boxes[:, 0, 1], boxes[:, 1, 1])) + (1 - rho) * trusted_slope(y)

    first, last = minimisers(slope, -10.0, 10.0)
    gap = max(0.0, upper[0, 1] - last, first - upper[1, 1])
    return 0.5 * gap**2 if power == 2 else gap


def trained(rho: np.ndarray, steps: int = 2000, rate: float = 2.0) -> np.ndarray:
    """Mixing by gradient descent with the project's loss: two words, questions 0 and 1, a logit table θ.

    Rows: question 0 -> word 0 (useful), question 1 -> word 1 (useless). Trusted: question 1 -> word 0.
    """
    source, target = jnp.array([0, 1, 1]), jnp.array([0, 1, 0])

    def nll(table):
        return losses.token_nll(table, jnp.eye(2), source, target, 3)

    def run(rho):
        weight = jnp.array([rho / 2, rho / 2, 1 - rho])
        slope = jax.grad(lambda table: weight @ nll(table))
        table = jax.lax.fori_loop(0, steps, lambda _, table: table - rate * slope(table), jnp.zeros((2, 2)))
        return nll(table)[2]

    return np.asarray(jax.jit(lambda rho: jax.lax.map(run, rho))(jnp.asarray(rho, jnp.float32)), np.float64)


def measure() -> dict:
    boxes, upper = plates.LOWER, plates.UPPER
    together = np.delete(boxes, plates.USELESS, axis=0)
    return {
        "selection": min(plates.bds_value(rows, boxes, upper) for rows in plates.supports(3)),
        "mixing": np.array([mixed(rho, boxes, upper) for rho in RHO]),
        "closed": 0.5 * (RHO / (3 - 2 * RHO)) ** 2,  # ρ/3 (y - 1/2) = (1 - ρ) (3/2 - y)
        "separable": np.array([mixed(rho, together, upper) for rho in RHO]),
        "kinked": np.array([mixed(rho, boxes, upper, power=1) for rho in RHO]),
        "table": trained(TABLE_RHO),
        "table_closed": np.log((2 - TABLE_RHO) / (2 - 2 * TABLE_RHO)),  # p(wrong) = ρ/2 : (1 - ρ)
    }


def paragraph(results: dict) -> str:
    tied = RHO[results["kinked"] == 0].max()
    return f"""\
On the rows of Figure 1 selection reaches {results["selection"]:g}. Mixing, solved by bisection in float64 for {len(RHO)} ρ from
{RHO[0]:g} to 1, has {results["mixing"].min():.1e} to {results["mixing"].max():.3f}: above for every ρ, and within
{np.abs(results["mixing"] - results["closed"]).max():.0e} of ½(ρ/(3-2ρ))², by hand. The same with a softmax table of two questions
and two words, trained through `losses.token_nll`: within {np.abs(results["table"] - results["table_closed"]).max():.0e} of
log((2-ρ)/(2-2ρ)) > 0, while selection, with all weight
on question 0, has 0 in the limit.

Two things are missing from the statement. (a) *A useless row that no trusted minimiser fits must exist.* The proof says that
trusted and lower-level rows share no model; Theorem 2's conditions do not. Without row 2 mixing has
{results["separable"].max():g} for every ρ, too. (b) *Smooth losses, and no stationary point of the mean lower-level loss among
the trusted minimisers.* With ℓ_0 the distance instead of its square, a valid NLL, mixing has exactly 0 for ρ up to {tied:.2f}
(by hand: 3/4): a kink is an exact penalty. And the margin is not uniform: it goes to 0 with ρ (about ρ²/18), where mixing
becomes training on the trusted rows alone, which reaches 0 itself. The theorem says nothing against ρ = 0."""


def draw(figure, results: dict) -> None:
    axes = figure.subplots()
    axes.semilogx(RHO, results["mixing"], "o-", markersize=3, label="mixing, rows of Figure 1")
    axes.semilogx(RHO, results["kinked"], "s--", markersize=3, label="the same, trusted loss with a kink")
    axes.semilogx(RHO, results["separable"], "--", label="mixing, no useless row")
    axes.axhline(results["selection"], color="black", linewidth=1, label="selection")
    axes.set_yscale("symlog", linthresh=1e-9)
    axes.set_ylim(-5e-10, 2)
    axes.set_xlabel("ρ")
    axes.set_ylabel("trusted loss")
    axes.legend(fontsize=8)

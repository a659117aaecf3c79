"""Theorem 2: bilevel selection gives useless rows weight 0: with known sets of minimizers, and by the project's updates."""

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax import selector
from experiments.theory import plates

TITLE = "Theorem 2: useless rows get weight 0"
VERDICT = "does not hold as printed; holds with a stronger definition of useless"
USEFUL, STEPS, GAMMA, BETA = 8, 4000, 1.0, 0.2
RULES = {
    "bds, mirror (default)": selector.Selector(),
    "bds, sgd as (10b)": selector.Selector(optimizer="sgd", learning_rate=10.0, baseline="none"),
    "bds, adam 1e-2": selector.Selector(optimizer="adam", learning_rate=1e-2),
    "bmo, as (48)": selector.Selector(rule="bmo", learning_rate=0.5, baseline="none"),
    "uniform (control)": selector.Selector(rule="uniform"),
}


def descend(select: selector.Selector, boxes: np.ndarray, upper: np.ndarray, start: np.ndarray):
    """Updates (10a) and (10b) with all rows in every step: σ(ω) [STEPS, N] and the trusted loss [STEPS]."""
    boxes, upper, N = jnp.asarray(boxes, jnp.float32), jnp.asarray(upper, jnp.float32)[None], len(boxes)
    rows, share = jnp.arange(N), jnp.full(N, 1 / N)

    def step(carry, _):
        theta, state = carry
        sigma = jax.nn.softmax(state.logits)
        pull = plates.residual(theta, upper)[0] + GAMMA * sigma @ plates.residual(theta, boxes)
        theta = theta - BETA * pull
        state = selector.update(select, state, rows, share, N, plates.losses(theta, boxes), GAMMA)
        return (theta, state), (jax.nn.softmax(state.logits), plates.losses(theta, upper)[0])

    begin = jnp.asarray(start, jnp.float32), selector.init(select, N)
    _, (sigma, trusted) = jax.jit(lambda begin: jax.lax.scan(step, begin, None, STEPS))(begin)
    return np.asarray(sigma, np.float64), np.asarray(trusted, np.float64)


def useful(boxes: np.ndarray, upper: np.ndarray, individual: bool) -> list[bool]:
    """Whether a minimizer of each row minimizes the trusted loss. `individual`: a minimizer of no other row, as in Definition 3."""
    points = plates.grid(0.125)
    zero = plates.losses(points, boxes) == 0
    among = zero & (zero.sum(1, keepdims=True) == 1) if individual else zero
    return (among & (plates.losses(points, upper[None]) == 0)).any(0).tolist()


def measure() -> dict:
    boxes, start = plates.many(0, USEFUL, 4), np.array([0.5, 0.4])
    results = {name: descend(select, boxes, plates.UPPER, start) for name, select in RULES.items()}
    values = {rows: plates.bds_value(rows, plates.LOWER, plates.UPPER) for rows in plates.supports(3)}
    optimal = [rows for rows, value in values.items() if value == min(values.values())]
    three, trusted = descend(selector.Selector(), plates.LOWER, plates.UPPER, start)
    return {
        "runs": results,
        "useless": {name: sigma[-1, USEFUL:].max() for name, (sigma, _) in results.items()},
        "useful": {name: sigma[-1, :USEFUL].min() for name, (sigma, _) in results.items()},
        "trusted": {name: trusted[-1] for name, (_, trusted) in results.items()},
        "values": values,
        "optimal": optimal,
        "printed": useful(plates.LOWER, plates.UPPER, individual=True),
        "stronger": useful(plates.LOWER, plates.UPPER, individual=False),
        "three": three[-1],
        "three_trusted": trusted[-1],
        "finite": values[0, 1, 2],
    }


def paragraph(results: dict) -> str:
    sets = " or ".join("{" + ", ".join(str(i + 1) for i in rows) + "}" for rows in results["optimal"])
    sigma = ", ".join(f"{s:.3f}" for s in results["three"])
    rows = "\n".join(
        f"| {name} | {results['useless'][name]:.1e} | {results['useful'][name]:.3f} | {results['trusted'][name]:.1e} |"
        for name in RULES
    )
    return f"""\
Call a row useless if *no* minimiser of its loss minimises the trusted loss. With all rows separable, argmin Σ λ_i ℓ_i is the
set of minimisers that the rows with λ_i > 0 share, so the optima can be listed: on the three rows of Figure 1 the trusted
loss 0 is reached with weight on rows {sets}, never with weight on row 2, the useless one. The theorem holds.

As printed it does not. Definition 3 looks only at minimisers that no other row has. By it row 1 of Figure 1, as drawn here
after its caption, is useless too (useful by Definition 3: {results["printed"]}; by any minimiser: {results["stronger"]}), yet
optima with positive weight on row 1 exist (the caption itself keeps it), and the project's updates end in one (σ = {sigma},
trusted loss {results["three_trusted"]:.1e}). The proof shows that removing such a row changes no optimal value, which is not
weight 0 at every optimum.

A softmax weight is never 0 at finite ω. With ω in R^N, as (4) has it, all rows have weight, every ω has the same lower-level
solutions, and the trusted loss is {results["finite"]:.3f} at best, that of training on all rows. The statement is one about the
closed simplex, which the proof of Theorem 1 uses; the penalty method approaches it, since its γ is finite.

The updates do it in the limit: {len(RULES)} rules on 12 random rows, 4 of them useless, {STEPS} steps of (10a)-(10b) at γ =
{GAMMA:g}. Rule (48) tracks a softmax of losses at finite τ, so its useless rows keep a weight, though less than the useful
ones. How useful rows share theirs, the theorem does not say.

| rule | largest useless σ | smallest useful σ | trusted loss |
| --- | --- | --- | --- |
{rows}"""


def draw(figure, results: dict) -> None:
    axes = figure.subplots()
    for name, (sigma, _) in results["runs"].items():
        axes.loglog(np.arange(1, STEPS + 1), np.maximum(sigma[:, USEFUL:].max(1), 1e-12), label=name)
    axes.axhline(1 / USEFUL, color="grey", linestyle=":")
    axes.set_ylim(1e-10, 1)
    axes.set_xlabel("step")
    axes.set_ylabel("largest σ of a useless row")
    axes.legend(fontsize=8)

"""Which selection rules solve problem (4): four rules on small problems whose optimal weights are known by hand."""

from typing import NamedTuple

import numpy as np

TITLE = "Which selection rules solve problem (4)"
VERDICT = (
    "the loss (10b) does not if irreducible losses differ or two rows are needed; the tracked value function (44) does, up to "
    "local solutions; influence also fails where curvatures differ, the exact metagradient under Assumption 1"
)
PENALTY_RULES = ("loss (10b)", "tracked (44)", "influence")
RULES = (*PENALTY_RULES, "metagradient")
RHOS, STEPS = np.arange(1, 10) / 10, 150  # STEPS of (10a) and of ω for each ρ
BETA, ALPHA = 0.4, 0.1
LARGER = 4  # times ALPHA, to see what depends on it
TRAIN_STEPS, OUTER_STEPS, OUTER_ALPHA = 60, 30, 2.0  # of the metagradient
CUT = 0.01  # weights below it are 0 in the retraining
SOLVED = 0.01  # nats above the optimum


class Quadratic(NamedTuple):
    """½(θ - a)ᵀA(θ - a) + c for the trusted loss, first, and N rows: M = N + 1 losses of θ in D dimensions."""

    A: np.ndarray  # [M, D, D]
    a: np.ndarray  # [M, D]
    c: np.ndarray  # [M]

    def loss(self, theta):
        return 0.5 * ((theta[..., None, :] - self.a) * self.gradient(theta)).sum(-1) + self.c

    def gradient(self, theta):
        return (self.A @ (theta[..., None, :] - self.a)[..., None])[..., 0]

    def hessian(self, theta):
        return self.A

    def start(self) -> np.ndarray:
        """The trusted minimum."""
        return self.a[0]


class Categorical(NamedTuple):
    """Cross-entropy of softmax(θ) for the answers to one question, with a distribution of answers for each of M losses."""

    answers: np.ndarray  # [M, D]

    def loss(self, theta):
        return -np.log(softmax(theta)) @ self.answers.T

    def gradient(self, theta):
        return softmax(theta)[..., None, :] - self.answers

    def hessian(self, theta):
        p = softmax(theta)
        return np.tile(np.diag(p) - np.outer(p, p), (len(self.answers), 1, 1))

    def start(self) -> np.ndarray:
        return np.log(self.answers[0])


class Known(NamedTuple):
    """A problem and its solution."""

    text: str
    losses: Quadratic | Categorical
    optimal: tuple[float, ...]  # weights


def softmax(logits: np.ndarray) -> np.ndarray:
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def quadratic(curvatures, centres, floor: float = 0.0) -> Quadratic:
    """Axis-parallel curvatures. `floor`: the irreducible loss of the rows."""
    A = np.stack([np.diag(np.array(curvature, float)) for curvature in curvatures])
    return Quadratic(A, np.array(centres, float), np.array([0.0] + [floor] * (len(A) - 1)))


def answers(p, q) -> Categorical:
    """Trusted rows and row 1 have answers of distribution p, row 2 of q."""
    return Categorical(np.array([p, p, q], float))


TWO = answers((0.6, 0.4), (0.9, 0.1))
FOUR = answers((0.25, 0.25, 0.25, 0.25), (0.85, 0.05, 0.05, 0.05))
ROUND = (1, 1)
PROBLEMS = {
    "a": Known(
        "Assumption 1: a shared minimiser; row 1 has the trusted one, too",
        quadratic([ROUND, (1, 0), (0, 1)], [(0, 1), (0, 0), (0, 0)]),
        (1, 0),
    ),
    "b": Known(
        "equal irreducible losses; two rows needed",
        quadratic([ROUND] * 4, [(0.25, 0), (1, 0), (-1, 0), (0, 2)], floor=1.0),
        (5 / 8, 3 / 8, 0),
    ),
    "c": Known("different irreducible losses (the counterexample)", TWO, (1, 0)),
    "d": Known(
        "equal irreducible losses; only row 1 reaches the trusted minimum",
        quadratic([ROUND] * 4, [(0, 0), (0, 0), (1, 0.5), (-1, 0.5)], floor=1.0),
        (1, 0, 0),
    ),
    "e": Known(
        "no row reaches it; curvatures differ by direction",
        quadratic([ROUND, (1, 4), (1, 4)], [(1.5, -0.5), (0.5, 0.5), (-0.5, -0.5)]),
        (1, 0),
    ),
    "f": Known(
        "no row reaches it; curvatures differ by row; two local solutions",
        quadratic([ROUND, (0.25, 4), (1, 2)], [(-1.5, 2), (0, 0), (1, 1)]),
        (1, 0),
    ),
}


def weighted(sigma: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """Σ σ_i ∇²ℓ_i [D, D] of rows [N, D, D]."""
    return (sigma @ hessian.reshape(len(sigma), -1)).reshape(hessian.shape[1:])


def retrained(losses, sigma: np.ndarray) -> np.ndarray:
    """θ*(ω), by Newton steps. Of many minimisers the one nearest to the trusted minimum, as (4) minimises over θ, too."""
    theta, sigma = losses.start(), np.where(sigma < CUT, 0, sigma)
    sigma = sigma / sigma.sum()
    for _ in range(20):
        hessian = weighted(sigma, losses.hessian(theta)[1:])
        theta = theta - np.linalg.pinv(hessian, rcond=1e-9) @ (sigma @ losses.gradient(theta)[1:])
    return theta


def joint(losses, alpha: float = ALPHA, printed: bool = False) -> dict:
    """Joint descent of θ and ω by the penalty rules, side by side, with all rows in every step and θ^0 the trusted minimum.

    Args:
      alpha: step size of ω.
      printed: whether ω moves by ∇σ_i, as (10b) is printed, or by mirror descent.
    """
    theta = tracker = np.tile(losses.start(), (len(PENALTY_RULES), 1))
    omega, path = np.zeros((len(PENALTY_RULES), len(losses.loss(losses.start())) - 1)), []
    for rho in np.repeat(RHOS, STEPS):
        sigma, slope = softmax(omega), losses.gradient(theta)
        path.append(sigma)
        theta = theta - BETA * ((1 - rho) * slope[:, 0] + rho * (sigma[:, None] @ slope[:, 1:])[:, 0])
        tracker = tracker - BETA * (sigma[:, None] @ losses.gradient(tracker)[:, 1:])[:, 0]
        loss = losses.loss(theta)[:, 1:]
        cost = np.stack([loss[0], loss[1] - losses.loss(tracker[1])[1:], -slope[2, 1:] @ slope[2, 0]])
        if printed:
            cost = sigma * (cost - (sigma * cost).sum(1, keepdims=True))
        omega = omega - alpha * rho / (1 - rho) * cost
    return {"sigma": softmax(omega), "theta": theta, "path": np.stack(path)}


def train(losses, weights: np.ndarray, steps: int = TRAIN_STEPS) -> tuple[np.ndarray, np.ndarray]:
    """Descends Σ w_i ℓ_i from the trusted minimum: θ^T and dL0(θ^T)/dw [N], by differentiation of every step in forward mode."""
    theta = losses.start()
    tangent = np.zeros((len(theta), len(weights)))  # dθ/dw
    for _ in range(steps):
        rows = losses.gradient(theta)[1:]
        tangent = tangent - BETA * (weighted(weights, losses.hessian(theta)[1:]) @ tangent + rows.T)
        theta = theta - BETA * (weights @ rows)
    return theta, losses.gradient(theta)[0] @ tangent


def metadescent(losses, steps: int = TRAIN_STEPS) -> np.ndarray:
    """σ(ω) after every outer step of mirror descent on the metagradient, [OUTER_STEPS + 1, N]."""
    omega = np.zeros(len(losses.loss(losses.start())) - 1)
    path = [softmax(omega)]
    for _ in range(OUTER_STEPS):
        omega = omega - OUTER_ALPHA * train(losses, path[-1], steps)[1]
        path.append(softmax(omega))
    return np.stack(path)


def compare(losses, optimal) -> dict:
    """The four rules on a problem: weights, trusted losses above the optimum after retraining and at the joint θ, and paths."""
    penalty, outer = joint(losses), metadescent(losses)
    sigma = [*penalty["sigma"], outer[-1]]
    best = losses.loss(retrained(losses, np.array(optimal, float)))[0]
    excess = [losses.loss(retrained(losses, weights))[0] - best for weights in sigma]
    return {
        "best": best,
        "sigma": dict(zip(RULES, sigma)),
        "excess": dict(zip(RULES, excess)),
        "theta": dict(zip(PENALTY_RULES, penalty["theta"])),
        "joint": dict(zip(PENALTY_RULES, losses.loss(penalty["theta"])[:, 0] - best)),
        "path": {**dict(zip(PENALTY_RULES, penalty["path"].transpose(1, 0, 2))), "metagradient": outer},
    }


def closed(p: np.ndarray, q: np.ndarray, gamma: float) -> dict:
    """The loss rule's limit σ = (0, 1) by hand: joint answers (p + γq)/(1 + γ), q after retraining, and KL(p‖·) of both."""
    mixture = (p + gamma * q) / (1 + gamma)
    return {"joint": mixture, "joint_excess": p @ np.log(p / mixture), "excess": p @ np.log(p / q)}


def measure() -> dict:
    flat = PROBLEMS["a"].losses
    compared = {name: compare(known.losses, known.optimal) for name, known in PROBLEMS.items()}
    gamma = RHOS[-1] / (1 - RHOS[-1])
    return {
        "problems": compared,
        "solved": {name: [rule for rule in RULES if values["excess"][rule] < SOLVED] for name, values in compared.items()},
        "four": compare(FOUR, (1, 0)),
        "closed": {name: closed(*losses.answers[1:], gamma) for name, losses in (("two", TWO), ("four", FOUR))},
        "printed": joint(TWO, printed=True)["sigma"][0],
        "flat": {steps: np.abs(train(flat, np.array([0.5, 0.5]), steps)[1]).max() for steps in (10, TRAIN_STEPS, 10 * TRAIN_STEPS)},
        "short": metadescent(flat, 10)[-1],
        "by_luck": joint(PROBLEMS["e"].losses, alpha=LARGER * ALPHA)["sigma"][0],
        "overshoot": joint(PROBLEMS["b"].losses, alpha=LARGER * ALPHA),
    }


def cell(values: dict, rule: str) -> str:
    """The trusted loss above the optimum, retrained and joint, and whether that is a solution."""
    solves = "solves" if values["excess"][rule] < SOLVED else "**does not**"
    both = f" ({values['joint'][rule]:.3f})" if rule in values["joint"] else ""
    return f"{solves}: {values['excess'][rule] + 0.0:.3f}{both}"


def example(results: dict) -> str:
    """The counterexample in words."""
    two, four, by_hand = results["problems"]["c"], results["four"], results["closed"]["two"]
    runs = {"two": two, "four": four}
    error = max(abs(values["excess"]["loss (10b)"] - results["closed"][name]["excess"]) for name, values in runs.items())
    kept = ", ".join(f"{two['sigma'][rule][0]:.3f} ({rule})" for rule in RULES[1:])
    return f"""\
*The entropy counterexample.* One question with two answers, θ its logits. Trusted rows and row 1 have answers of distribution p =
(0.6, 0.4), row 2 of q = (0.9, 0.1). By hand: θ*(ω) answers with σ_1 p + σ_2 q, so the solution of (4) is σ = (1, 0). The joint
optimum of the penalty answers with m = (p + γ(σ_1 p + σ_2 q))/(1 + γ), where ℓ_1 - ℓ_2 = 0.3 log(m_1/m_2) ≥ 0.3 log(3/2) =
{0.3 * np.log(1.5):.3f} for *every* ω and γ: row 1 has the higher entropy, and its loss stays above however well it is learned.
So (10b) lowers ω_1 - ω_2 by at least {0.3 * np.log(1.5):.3f}·αγ in every step. The limit is σ = (0, 1), with trusted losses above
the optimum of KL(p‖(p + γq)/(1 + γ)) = {by_hand["joint_excess"]:.4f} (joint, γ = 9) and KL(p‖q) = {by_hand["excess"]:.4f}
(retrained on the weights). Influence has C_1 = -‖m - p‖² < 0 < C_2, the metagradient dL0/dσ_1 < dL0/dσ_2, and the cost of (44) C_1
< 0 < C_2: their limit is (1, 0).

The runs agree. The loss rule ends at σ_1 = {two["sigma"]["loss (10b)"][0]:.0e} (with ∇σ_i as printed, a slower step:
{results["printed"][0]:.3f}) with {two["joint"]["loss (10b)"]:.4f} and {two["excess"]["loss (10b)"]:.4f}; the others at σ_1 =
{kept}, rising as 1 - O(1/k). The same with fair answers to a question of four against (0.85, 0.05, 0.05, 0.05): row 1, identical
to the trusted rows, ends at {four["sigma"]["loss (10b)"][0]:.0e}, and the retrained model is {four["excess"]["loss (10b)"]:.4f}
above the optimum; KL(p‖q) is met within {error:.0e}."""


def paragraph(results: dict) -> str:
    table = "\n".join(
        f"| {name} | {PROBLEMS[name].text} | {values['best']:.3f} | " + " | ".join(cell(values, rule) for rule in RULES) + " |"
        for name, values in results["problems"].items()
    )
    problems, flat = results["problems"], results["flat"]
    return f"""\
{example(results)}

*Six problems with known solutions.* Losses are ½(θ-a_i)ᵀA_i(θ-a_i) + c_i in the plane, but for c. ρ goes from {RHOS[0]:g} to
{RHOS[-1]:g}, {STEPS} steps each, γ = ρ/(1-ρ); the steps are {BETA:g}(1-ρ) for θ and {ALPHA:g}γ for ω, by mirror descent. The
metagradient takes {OUTER_STEPS} steps of {OUTER_ALPHA:g}, each with a training of {TRAIN_STEPS} steps on the weighted rows. All
start at the trusted minimum and at equal weights, with the same step sizes in all problems. Cells have the trusted loss above the
optimum of (4) after retraining on the weights alone (below {CUT:.0%} taken as 0), and in brackets that of the joint θ. A rule
solves if the first is below {SOLVED:g}. The joint θ is no lower-level solution, so its loss can be below the optimum.

| | problem | optimum | {" | ".join(RULES)} |
| --- | --- | --- | {" | ".join("---" for _ in RULES)} |
{table}

*The loss rule* descends min_θ L0 + γ Σ σ_i ℓ_i, which is concave in σ, since v(ω) is left out. It ends at one row, or at rows
that tie. It is right under Assumption 1 (a), and if one row suffices and irreducible losses are equal (d). It fails in b, c and
f. In e it solves by luck: the two rows change ranks on the way, and with {LARGER} times the step of ω it ends at σ_1 =
{results["by_luck"][0]:.3f}. *The tracked value function* has the exact gradient of (44). It fails in f alone: from equal weights,
descent leads to a local solution. For finite γ its limit is not exact: by hand it is σ_1 =
{0.5 + (1.5 / 10 - 2 / 37) / (1 / 10 + 4 / 37):.3f} in e at γ = 9 (the run: {problems["e"]["sigma"]["tracked (44)"][0]:.3f}).

*Influence* leaves out the inverse Hessian of the metagradient. In e this turns the sign: it ends at σ_1 =
{problems["e"]["sigma"]["influence"][0]:.3f} instead of 1. It is also sensitive to α: with {LARGER} times
the step it overshoots in b, to σ = ({", ".join(f"{s:.2f}" for s in results["overshoot"]["sigma"][2])}), where the tracked value
function still ends at ({", ".join(f"{s:.2f}" for s in results["overshoot"]["sigma"][1])}).

*The exact metagradient* fails in f, too, and in a. There all ω with positive weights have the same θ*(ω), so L0(θ*(ω)) is flat
and jumps at the edge of the simplex. At equal weights the largest entry is {flat[10]:.2f} after 10 training steps,
{flat[TRAIN_STEPS]:.0e} after {TRAIN_STEPS} and {flat[10 * TRAIN_STEPS]:.0e} after {10 * TRAIN_STEPS}: the better the training
converges, the less it sees. With 10 steps it solves a (σ_1 = {results["short"][0]:.3f}). Under Assumption 1 the penalty is the
better signal. No rule finds a global solution in general."""


def draw(figure, results: dict) -> None:
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.4])
    for i, rule in enumerate(RULES):
        path = results["problems"]["c"]["path"][rule][:, 0]
        left.plot(np.linspace(0, 1, len(path)), path, color=f"C{i}", label=rule)
        excess = [values["excess"][rule] for values in results["problems"].values()]
        right.bar(np.arange(len(PROBLEMS)) + 0.2 * (i - 1.5), excess, 0.2, color=f"C{i}", label=rule)
    left.set_xlabel("part of the run")
    left.set_ylabel("weight of row 1, optimum 1")
    left.set_title("c: row 1 is identical to the trusted rows")
    right.axhline(SOLVED, color="black", linewidth=0.8, linestyle=":")
    right.set_yscale("symlog", linthresh=SOLVED)
    right.set_ylim(0, 3)
    right.set_xticks(np.arange(len(PROBLEMS)), PROBLEMS)
    right.set_xlabel("problem")
    right.set_ylabel("trusted loss above the optimum")
    right.set_title("after retraining")
    right.legend(fontsize=7, ncols=2, loc="upper left")

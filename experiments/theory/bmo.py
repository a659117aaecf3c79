"""BMO over rows: deterministic, (42) and (43), with a pass over all rows in every step, and stochastic, (46)-(48) as printed."""

import numpy as np
import scipy.optimize

from experiments.theory.selection_rules import ALPHA, BETA, PROBLEMS, RHOS, SOLVED, STEPS, TWO, retrained, softmax

TITLE = "BMO over rows, (42)-(48)"
VERDICT = "the stochastic version has the limit of the deterministic one; both follow the rows of the lowest loss, as (10b) does"
TAUS = 1.0, 10.0
GAMMA = float(RHOS[-1] / (1 - RHOS[-1]))
EPOCHS, SEED = 1000, 0  # of the stochastic version at γ = GAMMA


def weights(losses, theta: np.ndarray, tau: float) -> np.ndarray:
    """λ(θ) = σ(ω*(θ)), ω* = -τ ℓ(θ).  (43)"""
    return softmax(-tau * losses.loss(theta)[1:])


def deterministic(losses, tau: float) -> tuple[np.ndarray, np.ndarray]:
    """θ after descent along (42), ∇L0 + γ Σ λ_m ∇ℓ_m, from the trusted minimum, with the ρ-schedule of the other rules; and λ."""
    theta = losses.start()
    for rho in np.repeat(RHOS, STEPS):
        slope = losses.gradient(theta)
        theta = theta - BETA * ((1 - rho) * slope[0] + rho * weights(losses, theta, tau) @ slope[1:])
    return theta, weights(losses, theta, tau)


def stochastic(losses, tau: float, theta: np.ndarray, omega: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """θ and σ(ω) after `EPOCHS` passes of (46)-(48) over the rows in random order, one row in a step, at γ = `GAMMA`.

    ω moves first, and θ with σ(ω^{k+1}); weights are N·σ, mean 1. Step sizes fall with 1/√k.
    """
    num_rows, rng, k = len(omega), np.random.default_rng(SEED), 0
    theta, omega = theta.copy(), omega.copy()
    for _ in range(EPOCHS):
        for i in rng.permutation(num_rows):
            k += 1
            decay = (1 + k / 100) ** -0.5
            omega[i] -= ALPHA * decay * (omega[i] + tau * losses.loss(theta)[1 + i])  # (48)
            slope = losses.gradient(theta)
            step = slope[0] + GAMMA * num_rows * softmax(omega)[i] * slope[1 + i]  # (46)
            theta = theta - BETA / (1 + GAMMA) * decay / 4 * step
    return theta, softmax(omega)


def fixed_point(p: np.ndarray, q: np.ndarray, tau: float, gamma: float) -> float:
    """λ_1 of problem c by hand: answers m = (p + γ(λ_1 p + λ_2 q))/(1 + γ), and λ_1 = 1/(1 + exp(τ (ℓ_1 - ℓ_2))) at m."""

    def gap(first: float) -> float:
        m = (p + gamma * (first * p + (1 - first) * q)) / (1 + gamma)
        return first - 1 / (1 + np.exp(tau * (q - p) @ np.log(m)))

    return scipy.optimize.brentq(gap, 0.0, 1.0, xtol=1e-14)


def measure() -> dict:
    problems = {}
    for name, known in PROBLEMS.items():
        losses = known.losses
        best = losses.loss(retrained(losses, np.array(known.optimal, float)))[0]
        values = {}
        for tau in TAUS:
            theta, sigma = deterministic(losses, tau)
            values[tau] = {"sigma": sigma, "theta": theta, "excess": losses.loss(retrained(losses, sigma))[0] - best}
        theta, sigma = stochastic(losses, 1.0, losses.start(), np.zeros(len(known.optimal)))
        values["stochastic"] = {"sigma": sigma, "theta": theta}
        problems[name] = values
    by_hand = {tau: fixed_point(*TWO.answers[1:], tau, GAMMA) for tau in TAUS}
    gap = {name: np.abs(values["stochastic"]["sigma"] - values[1.0]["sigma"]).max() for name, values in problems.items()}
    return {"problems": problems, "by_hand": by_hand, "gap": gap}


def paragraph(results: dict) -> str:
    def listed(sigma: np.ndarray) -> str:
        return f"({', '.join(f'{s:.3f}' for s in sigma)})"

    body = []
    for name, values in results["problems"].items():
        cells = [listed(values[key]["sigma"]) for key in (*TAUS, "stochastic")]
        excess = [
            f"{'solves' if values[tau]['excess'] < SOLVED else '**does not**'}: {values[tau]['excess'] + 0.0:.3f}" for tau in TAUS
        ]
        body.append(f"| {name} | {listed(np.array(PROBLEMS[name].optimal, float))} | {' | '.join([*cells, *excess])} |")
    table = "\n".join(body)
    sigma = {tau: results["problems"]["c"][tau]["sigma"][0] for tau in TAUS}
    return f"""\
(42) descends L0 + γ·softmin_τ(ℓ), where λ, the softmax of -τℓ, is the gradient of the softmin: an average weighted towards the rows
of the lowest loss. It takes a pass over all rows in every step, so it is here, and not in the package. The problems and the
ρ-schedule are those of the next section; retrained is the trusted loss above the optimum of (4) after training on λ.

*A solution by hand.* In problem c the answers of the limit are m = (p + γ(λ_1 p + λ_2 q))/(1 + γ), with λ_1 = 1/(1 + exp(τ(ℓ_1 -
ℓ_2))) at m, one equation in λ_1: {results["by_hand"][1.0]:.4f} for τ = 1 and {results["by_hand"][10.0]:.4f} for τ = 10, at γ =
{GAMMA:.0f}. The descent ends at {sigma[1.0]:.4f} and {sigma[10.0]:.4f}. The solution of (4) is 1: row 1, identical to the trusted
rows, has the higher entropy, hence the higher loss and the smaller weight, as under (10b). A larger τ is worse here.

| | solution of (4) | λ, τ = 1 | λ, τ = 10 | σ(ω) of (46)-(48), τ = 1 | retrained, τ = 1 | retrained, τ = 10 |
| --- | --- | --- | --- | --- | --- | --- |
{table}

*Stochastic BMO*, (46)-(48) as printed, one row in a step: ω is a running mean of -τℓ of each row. With falling steps it ends where
(42) does: the largest difference of a weight is {max(results["gap"].values()):.3f}."""


def draw(figure, results: dict) -> None:
    axes = figure.subplots()
    labels = {1.0: "(42), τ = 1", 10.0: "(42), τ = 10", "stochastic": "(46)-(48), τ = 1"}
    for k, (key, label) in enumerate(labels.items()):
        first = [values[key]["sigma"][0] for values in results["problems"].values()]
        axes.bar(np.arange(len(PROBLEMS)) + 0.2 * (k - 1.5), first, 0.2, color=f"C{k}", label=label)
    optimal = [known.optimal[0] for known in PROBLEMS.values()]
    axes.bar(np.arange(len(PROBLEMS)) + 0.3, optimal, 0.2, color="#8a93a0", label="solution of (4)")
    axes.set_xticks(np.arange(len(PROBLEMS)), PROBLEMS)
    axes.set_xlabel("problem")
    axes.set_ylabel("weight of row 1")
    axes.legend(fontsize=7, ncols=2)

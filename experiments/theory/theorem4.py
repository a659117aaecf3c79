"""Theorem 4: the same comparison on evaluation rows, by the number N' of trusted rows and the shift of their distribution.

One axis of the plane: half of the lower-level rows end at 0.5, the others have loss 0 everywhere. A trusted row has loss 0 within
0.5 of its centre; centres are drawn from `CENTRES` and all share [1.5, 2].
"""

import numpy as np

from experiments.theory import theorem3

TITLE = "Theorem 4: on evaluation rows"
VERDICT = "holds weakly: for large N' and small shift, under Theorem 3's assumptions and with the proof put right"
CENTRES, HALF, WALL = np.linspace(1.5, 2, 9), 0.5, 0.5
STRANGE = 0.9  # a centre outside the trusted distribution
SIZES, RHOS, DRAWS = (1, 2, 4, 8, 16, 32, 64), (0.05, 0.5, 1.0), 100
SHARES = np.linspace(0, 0.9, 46)
LARGEST = 0.5 * (2.5 - STRANGE - HALF) ** 2  # B: the largest loss over all models, 0.5 to 2.5, and all centres


def loss(y: float, centres: np.ndarray) -> np.ndarray:
    return 0.5 * np.maximum(np.abs(y - centres) - HALF, 0) ** 2


def selected(centres: np.ndarray) -> tuple[float, float]:
    """Ends of the set of optimal models: the intersection of all trusted rows."""
    return centres.max() - HALF, centres.min() + HALF


def mixed(rho: float, centres: np.ndarray) -> tuple[float, float]:
    """Ends of the set of models that minimize ρ mean ℓ_i + (1 - ρ) ℓ_0."""

    def slope(y):
        gap = y - np.clip(y, centres - HALF, centres + HALF)
        return rho / 2 * max(y - WALL, 0) + (1 - rho) * gap.mean()

    return theorem3.minimisers(slope, 0.0, 3.0)


def margin(rho: float, centres: np.ndarray, evaluated: np.ndarray, weight: np.ndarray) -> float:
    """Loss of the best mixed model minus that of the *worst* selected model, which is at an end because losses are convex."""
    worst = max(weight @ loss(y, evaluated) for y in selected(centres))
    low, high = mixed(rho, centres)  # one point unless ρ = 1
    return min(weight @ loss(y, evaluated) for y in np.linspace(low, high, 21 if high - low > 1e-9 else 1)) - worst


def crossing(share: np.ndarray, margins: np.ndarray) -> float:
    """The share at which the margin, which is linear in the share, is 0."""
    slope, start = np.polyfit(share, margins, 1)
    return float(-start / slope)


def measure() -> dict:
    rng = np.random.default_rng(0)
    uniform = np.full(len(CENTRES), 1 / len(CENTRES))
    margins = {
        rho: np.array([[margin(rho, rng.choice(CENTRES, size), CENTRES, uniform) for _ in range(DRAWS)] for size in SIZES])
        for rho in RHOS
    }
    everything = np.append(CENTRES, STRANGE)
    shifted = {rho: np.array([margin(rho, CENTRES, everything, np.append((1 - q) * uniform, q)) for q in SHARES]) for rho in RHOS}
    enough = {rho: 8 * LARGEST**2 * np.log(2 / 0.05) / margins[rho][-1].mean() ** 2 for rho in RHOS}
    return {
        "margins": margins,
        "share": {rho: (m > 0).mean(1) for rho, m in margins.items()},
        "shifted": shifted,
        "kl": -np.log(1 - SHARES),  # KL(p_val || p_eval); the other direction is infinite
        "turns": {rho: -np.log(1 - crossing(SHARES, m)) for rho, m in shifted.items()},
        "bound": enough,
    }


def paragraph(results: dict) -> str:
    share = "; ".join(f"ρ = {rho:g}: {', '.join(f'{s:.0%}' for s in results['share'][rho])}" for rho in RHOS)
    turns = ", ".join(f"{kl:.3f} (ρ = {rho:g})" for rho, kl in results["turns"].items())
    bound = ", ".join(f"{n:.1e} (ρ = {rho:g})" for rho, n in results["bound"].items())
    return f"""\
{DRAWS} draws of N' = {", ".join(str(n) for n in SIZES)} trusted rows; evaluation losses are exact expectations. The one of the
*worst* optimal model of selection is strictly below that of the best of mixing in {share} of the draws: for large N' it always
is; for small N' it need not be, and the smaller ρ, the more rows it takes.

Shift: a share q of the evaluation rows has a centre that no trusted row has, nearer to what the useless rows teach. The margin
falls with q and turns at KL(p_val || p_eval) = {turns}. This is the direction in which the proof uses the divergence; the
theorem is printed with KL(p_eval || p_val), by which this shift is infinite. (Either direction bounds the total variation.)

The printed proof has slips: a of (31) is negative, not positive, the error terms are to be *added*, each twice, and what S_mix
and θ* are depends on the trusted rows, so that (29) needs a bound that is uniform over models. Hoeffding's as printed, put
right, asks for N' = N† of {bound} here at δ = 0.05; the plot shows how much earlier it is true. As the margin of Theorem 3 goes
to 0 with ρ, so does any N̄ of this proof go to infinity: "for any ρ" is to be read as "for each"."""


def draw(figure, results: dict) -> None:
    left, right = figure.subplots(1, 2)
    for rho in RHOS:
        margins = results["margins"][rho]
        line = left.semilogx(SIZES, margins.mean(1), "o-", markersize=3, label=f"ρ = {rho:g}")[0]
        left.fill_between(SIZES, *np.percentile(margins, [5, 95], axis=1), color=line.get_color(), alpha=0.2)
        right.plot(results["kl"], results["shifted"][rho], label=f"ρ = {rho:g}")
    for axes, name in ((left, "N'"), (right, "KL(p_val || p_eval)")):
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xlabel(name)
        axes.legend(fontsize=8)
    left.set_ylabel("evaluation loss: mixing less selection")

"""Objectives with and without a negative gradient, and their effect on the likelihood of both responses."""

import numpy as np

from experiments.didactic import bandits

TITLE = "A negative gradient"
VERDICT = (
    "holds off-policy, most clearly for DPO; does not hold on-policy with shared features, where maximum likelihood arrives as "
    "well. DPO lowers its chosen responses too, IPO does not"
)
STEADY = {"rates": (1.0,), "betas": (0.2,)}  # of the curves of likelihoods: one moderate setting for all


def limit(p: bandits.Problem) -> float:
    """Gain of the distribution of the best of G samples of the reference, the target of maximum likelihood on them."""
    start = p.reference @ p.reward
    return (p.chosen @ p.reward - start) / (p.reward.max() - start)


def measure() -> dict:
    distances = bandits.DISTANCES
    plain = {name: bandits.grid(name) for name in bandits.POSITIVE}
    results = {name: bandits.grid(name) for name in bandits.NEGATIVE}

    def against(other, on):
        return {
            name: [bandits.paired(of[bandits.Case(d, on)].end, plain[other][bandits.Case(d, on)].end) for d in distances]
            for name, of in results.items()
        }

    near, far = (bandits.Case(distance, False) for distance in (bandits.NEAR, bandits.FAR))
    steady = {name: bandits.learned(name, [near, far], **STEADY)[far] for name in ("best-of-G", *bandits.NEGATIVE)}
    return {
        "distances": distances,
        "off": {other: against(other, False) for other in bandits.POSITIVE},
        "on": {other: against(other, True) for other in bandits.POSITIVE},
        "best_of": [float(np.mean([limit(bandits.problem(seed, d)) for seed in bandits.SEEDS])) for d in distances],
        "best-of-G": [float(plain["best-of-G"][bandits.Case(d, False)].end.mean()) for d in distances],
        "likelihood": {
            name: {
                f"step {step}": (one.chosen[:, step - 1].mean(), one.rejected[:, step - 1].mean())
                for step in (1, 10, bandits.STEPS)
            }
            for name, one in steady.items()
        },
        "curves": {name: (one.chosen, one.rejected) for name, one in steady.items()},
    }


def paragraph(results: dict) -> str:
    def rows(where, other):
        return "\n".join(
            f"| {name} | {where} | {other} | {' | '.join(str(gap) for gap in gaps)} |"
            for name, gaps in results[where][other].items()
        )

    heads = " | ".join(f"peak at {distance:g}" for distance in results["distances"])
    likelihood = "\n".join(
        f"| {name} | {' | '.join(f'{chosen:+.2f} / {rejected:+.2f}' for chosen, rejected in of.values())} |"
        for name, of in results["likelihood"].items()
    )
    limits = ", ".join(f"{gain:.2f}" for gain in results["best_of"])
    ends = ", ".join(f"{gain:.2f}" for gain in results["best-of-G"])
    return f"""\
Gain of each objective with a negative gradient less one without, on the same draws: best-of-G is maximum likelihood of the very
responses that DPO and IPO have as chosen (Pref-FT).

| objective | samples | less | {heads} |
| --- | --- | --- | {" | ".join("---" for _ in results["distances"])} |
{rows("off", "best-of-G")}
{rows("off", "RWR")}
{rows("on", "best-of-G")}

Off-policy, maximum likelihood aims at the distribution of the best of {bandits.G} samples of the reference, whose gains are
{limits} (exact); it ended at {ends}. Only what is pushed away from the rejected goes beyond. On-policy that target moves along
with the policy, and with features that neighbours share it arrives at the peak by itself.

*What it does to the likelihood of both.* Change of the expected log-probability of the reference's chosen / rejected responses in
nats, off-policy, peak outside, rate 1, β = 0.2:

| objective | {" | ".join(next(iter(results["likelihood"].values())))} |
| --- | --- | --- | --- |
{likelihood}

The rejected lose under all of them, under maximum likelihood because others take their place. DPO pushes them down without end,
as a margin is never large enough, and the mass ends at the best few of the chosen responses, so these, taken together, fall as
well. IPO stops at its margin and keeps the chosen up."""


def draw(figure, results: dict) -> None:
    left, right = figure.subplots(1, 2)
    for shift, (name, gaps) in enumerate(results["off"]["best-of-G"].items()):
        colour, x = bandits.COLOURS[name], np.array(results["distances"]) + 0.1 * (shift - 1)
        style = {"fmt": "o-", "markersize": 3, "capsize": 2, "color": colour, "label": name}
        left.errorbar(x, [g.mean for g in gaps], [g.sd for g in gaps], **style)
        left.plot(x, [g.mean for g in results["on"]["best-of-G"][name]], "s--", markersize=3, color=colour)
    left.plot([], [], "k-", label="off-policy")
    left.plot([], [], "k--", label="on-policy")
    left.axhline(0, color="black", linewidth=0.8)
    left.set_ylim(-0.15, 0.75)
    left.set_xlabel("reward's peak, deviations from the reference's centre")
    left.set_ylabel("gain less that of best-of-G")
    left.legend(fontsize=8, ncols=2, loc="upper right")
    steps = np.arange(1, bandits.STEPS + 1)
    for name, (chosen, rejected) in results["curves"].items():
        right.semilogx(steps, chosen.mean(0), color=bandits.COLOURS[name], label=name)
        right.semilogx(steps, rejected.mean(0), "--", color=bandits.COLOURS[name])
    right.plot([], [], "k-", label="chosen")
    right.plot([], [], "k--", label="rejected")
    right.set_yscale("symlog", linthresh=1)
    right.set_ylim(-1000, 2)
    right.set_yticks([-100, -10, -1, 0, 1], ["-100", "-10", "-1", "0", "1"])
    right.set_xlabel("step, off-policy, peak outside")
    right.set_ylabel("change of log-probability, nats")
    right.legend(fontsize=8, ncols=3, loc="lower center")

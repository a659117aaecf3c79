"""On-policy against off-policy samples, by the distance of the reward's peak from the reference's mass."""

import numpy as np

from experiments.didactic import bandits

TITLE = "On-policy samples"
VERDICT = (
    "holds, for every objective; with the peak inside the reference's mass it matters little to those with a negative gradient, "
    "but maximum likelihood needs it there, too"
)


def measure(names=(*bandits.POSITIVE, *bandits.NEGATIVE), distances=bandits.DISTANCES, rates=bandits.RATES) -> dict:
    grids = {name: bandits.grid(name, distances, rates) for name in names}
    ends = {
        name: {
            sampler: np.stack([results[bandits.Case(distance, on)].end for distance in distances])
            for sampler, on in (("off", False), ("on", True))
        }
        for name, results in grids.items()
    }
    return {
        "distances": distances,
        "ends": ends,  # [distance, seed]
        "gap": {name: [bandits.paired(on, off) for on, off in zip(of["on"], of["off"])] for name, of in ends.items()},
        "tuned": {
            name: {f"{case.distance:g} {'on' if case.on_policy else 'off'}": (one.rate, one.beta) for case, one in results.items()}
            for name, results in grids.items()
        },
    }


def paragraph(results: dict) -> str:
    near, far = (results["distances"].index(distance) for distance in (bandits.NEAR, bandits.FAR))
    rows = "\n".join(
        f"| {name} | {of['off'][near].mean():.2f} | {of['on'][near].mean():.2f} | {results['gap'][name][near]} "
        f"| {of['off'][far].mean():.2f} | {of['on'][far].mean():.2f} | {results['gap'][name][far]} |"
        for name, of in results["ends"].items()
    )
    beyond = ", ".join(f"{name} {of['on'][-1].mean():.2f}" for name, of in results["ends"].items())
    return f"""\
Gain after {bandits.STEPS} steps of {bandits.GROUPS} groups of {bandits.G}, from the policy or from the reference, with the peak
{bandits.NEAR:g} and {bandits.FAR:g} deviations from the reference's centre. Differences are paired: mean ± deviation over seeds
(seeds in which on-policy is ahead).

| objective | inside: off | on | on less off | outside: off | on | on less off |
| --- | --- | --- | --- | --- | --- | --- |
{rows}

Off-policy learners hardly get beyond what the reference still says. On-policy ones walk on from there, even where the peak is
{results["distances"][-1]:g} deviations away ({beyond}).
Inside, off-policy DPO leaves almost nothing to be gained. Walking needs neighbours that share features: *Both together* has a
table."""


def draw(figure, results: dict) -> None:
    left, right = figure.subplots(1, 2)
    for name, of in results["ends"].items():
        colour = bandits.COLOURS[name]
        left.plot(results["distances"], of["on"].mean(1), "o-", markersize=3, color=colour, label=name)
        left.plot(results["distances"], of["off"].mean(1), "s--", markersize=3, color=colour)
        gap = results["gap"][name]
        style = {"fmt": "o-", "markersize": 3, "capsize": 2, "color": colour}
        right.errorbar(results["distances"], [g.mean for g in gap], [g.sd for g in gap], **style)
    left.plot([], [], "k-", label="on-policy")
    left.plot([], [], "k--", label="off-policy")
    left.set_ylabel("gain")
    left.set_ylim(0, 1.05)
    left.legend(fontsize=8, loc="lower left")
    right.axhline(0, color="black", linewidth=0.8)
    right.set_ylabel("gain: on-policy less off-policy")
    for axes in (left, right):
        axes.set_xlabel("reward's peak, deviations from the reference's centre")

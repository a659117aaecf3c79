"""On-policy samples and a negative gradient, alone and together, with shared features and with a table."""

import numpy as np

from experiments.didactic import bandits

TITLE = "Both together"
VERDICT = (
    "holds weakly: with a table and a tuned β they add up; with shared features on-policy samples alone do it all, "
    "and the negative gradient changes nothing more"
)
WAYS = {  # objective, on-policy
    "neither": ("best-of-G", False),
    "negative gradient": ("DPO", False),
    "on-policy": ("best-of-G", True),
    "both": ("DPO", True),
}
LABELS = {
    f"{kind}, {peak}": f"{logits},\npeak {peak}"
    for kind, logits in (("shared", "shared features"), ("table", "a table"))
    for peak in ("inside", "outside")
}
COLOURS = {"neither": "0.7", "negative gradient": "#ef8a3c", "on-policy": "#5aa9d6", "both": "#7b3294"}


def measure(distances=bandits.DISTANCES, rates=bandits.RATES) -> dict:
    """`distances` include NEAR and FAR; they equal those of the other statements, so that cached results are reused."""
    names = "best-of-G", "DPO"
    cases = bandits.on_and_off((bandits.NEAR, bandits.FAR))
    policies = {
        "shared": {name: bandits.grid(name, distances, rates) for name in names},
        "table": {name: bandits.learned(name, cases, bandits.TABLE, rates) for name in names},
    }
    ends = {
        f"{kind}, {peak}": {way: policies[kind][name][bandits.Case(d, on)].end for way, (name, on) in WAYS.items()}
        for kind in policies
        for peak, d in (("inside", bandits.NEAR), ("outside", bandits.FAR))
    }
    far = bandits.Case(bandits.FAR)
    soft = bandits.learned("DPO", cases, bandits.TABLE, rates, betas=(0.2,))[far].end
    return {
        "ends": ends,
        "beta": policies["table"]["DPO"][far].beta,
        "soft": bandits.paired(soft, ends["table, outside"]["on-policy"]),
        "less": {
            setting: {way: bandits.paired(of["both"], of[way]) for way in WAYS if way != "both"} for setting, of in ends.items()
        },
        "more_than_sum": {
            setting: bandits.paired(of["both"] - of["neither"], of["on-policy"] + of["negative gradient"] - 2 * of["neither"])
            for setting, of in ends.items()
        },
    }


def paragraph(results: dict) -> str:
    rows = "\n".join(
        f"| {setting} | {' | '.join(f'{of[way].mean():.2f}' for way in WAYS)} "
        f"| {results['less'][setting]['on-policy']} | {results['less'][setting]['negative gradient']} |"
        for setting, of in results["ends"].items()
    )
    return f"""\
Best-of-G and DPO learn from the same best and worst of the same groups, so DPO is best-of-G with a negative gradient. Gain after
{bandits.STEPS} steps; *shared*: logits of neighbouring bins share features, *table*: every bin has its own.

| policy, peak | {" | ".join(WAYS)} | both less on-policy alone | both less negative gradient alone |
| --- | {" | ".join("---" for _ in WAYS)} | --- | --- |
{rows}

With shared features on-policy samples do it all: the policy reaches the peak with either objective, and there is nothing left to
add. With a table nothing is learned about a bin before it is sampled, and neither alone gets far from outside; both together get
farther, by about the sum of what each does alone (beyond it: {results["more_than_sum"]["table, outside"]}), though not to the peak,
and not in every seed. It depends on β, which was tuned to {results["beta"]:g}; with 0.2, both less on-policy alone is
{results["soft"]}."""


def draw(figure, results: dict) -> None:
    axes = figure.subplots()
    rng = np.random.default_rng(0)
    for w, way in enumerate(WAYS):
        for s, of in enumerate(results["ends"].values()):
            x = s + 0.2 * (w - 1.5)
            axes.bar(x, of[way].mean(), 0.18, color=COLOURS[way], label=way if s == 0 else None)
            axes.plot(x + rng.uniform(-0.05, 0.05, len(of[way])), of[way], "k.", markersize=3)
    axes.set_xticks(range(len(results["ends"])), [LABELS[setting] for setting in results["ends"]])
    axes.set_ylabel("gain; dots are seeds")
    axes.set_ylim(0, 1.25)
    axes.legend(fontsize=8, ncols=4, loc="upper center")

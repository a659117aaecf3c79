"""Speed of probability mass between bins under forward and reverse KL, exactly, and under the learners of `bandits`."""

import numpy as np

from experiments.didactic import bandits

TITLE = "Speed: moving mass between bins"
VERDICT = (
    "holds weakly: at equal rates, where the bins in question have mass already; exact reverse KL cannot raise a bin that has "
    "hardly any, and with rates tuned the negative gradient is no faster"
)
STEPS, SHARPNESS = 200, (0.5, 2.0, 8.0)
RATES = np.logspace(-1, 2, 13)
HORIZONS = (5, 10, 20, 40)


def velocity(kind: str, policy, target):
    """Minus the gradient of a KL in the logits of a table, [..., B].

    forward  KL(q || π):  q - π
    reverse  KL(π || q):  -π (log(π/q) - KL(π || q))
    """
    if kind == "forward":
        return target - policy
    gap = np.log(policy) - np.log(target)
    return -policy * (gap - (policy * gap).sum(-1, keepdims=True))


def softmax(values):
    likelihood = np.exp(values - values.max(-1, keepdims=True))
    return likelihood / likelihood.sum(-1, keepdims=True)


def faster(sharpness: float, seed: int) -> dict[str, float]:
    """Share of bin pairs whose log-ratio changes more under reverse KL, in one step from a random policy to a random target."""
    rng = np.random.default_rng((seed, 13))
    policy, target = softmax(rng.normal(size=bandits.BINS)), softmax(sharpness * rng.normal(size=bandits.BINS))
    upper = np.triu_indices(bandits.BINS, 1)
    change = {kind: np.subtract.outer(v := velocity(kind, policy, target), v)[upper] for kind in ("forward", "reverse")}
    wins = np.abs(change["reverse"]) > np.abs(change["forward"])
    best = target.argmax()
    with_best = (upper[0] == best) | (upper[1] == best)
    return {"all": wins.mean(), "best": wins[with_best].mean()}


def descend(kind: str, policy, target, rates) -> np.ndarray:
    """Total variation to the target after every step of gradient descent with each rate, [rates, STEPS + 1]."""
    logits = np.tile(np.log(policy), (len(rates), 1))
    distances = []
    for _ in range(STEPS + 1):
        now = softmax(logits)
        distances.append(0.5 * np.abs(now - target).sum(-1))
        with np.errstate(divide="ignore", invalid="ignore"):
            logits = logits + rates[:, None] * velocity(kind, now, target)
    return np.stack(distances, 1)


def halved(distance) -> np.ndarray:
    """Steps until the distance has halved, [...]; STEPS + 1 if it never does."""
    is_halved = distance <= distance[..., :1] / 2
    return np.where(is_halved.any(-1), is_halved.argmax(-1), STEPS + 1)


def flows(distance: float) -> dict:
    """Exact descent from the reference to q ∝ π_ref exp(r/β), β = 0.3, of a table, at rate 1 and at the fastest of `RATES`."""
    problems = [bandits.problem(seed, distance) for seed in (*bandits.TUNED_ON, *bandits.SEEDS)]
    by_kind = {}
    for kind in ("forward", "reverse"):
        curves = np.stack([descend(kind, p.reference, softmax(np.log(p.reference) + p.reward / 0.3), RATES) for p in problems])
        tuning, reported = np.split(curves, [len(bandits.TUNED_ON)])  # [seed, rate, step]
        best, unit = halved(tuning).mean(0).argmin(), np.abs(RATES - 1).argmin()
        by_kind[kind] = {"at_1": halved(reported[:, unit]), "tuned": halved(reported[:, best]), "rate": float(RATES[best])}
        by_kind[kind]["curves"] = reported[:, unit]
    return by_kind


def measure() -> dict:
    cases = [bandits.Case(bandits.FAR, horizon=horizon) for horizon in HORIZONS] + [bandits.Case(bandits.NEAR, horizon=HORIZONS[1])]
    equal = {
        name: bandits.learned(name, [bandits.Case(d) for d in (bandits.NEAR, bandits.FAR)], rates=(0.1,), betas=(0.2,))
        for name in ("best-of-G", "DPO")
    }
    pairs = [[faster(sharpness, seed) for seed in range(8)] for sharpness in SHARPNESS]
    return {
        "pairs": {
            sharpness: {name: np.array([one[name] for one in of]) for name in of[0]} for sharpness, of in zip(SHARPNESS, pairs)
        },
        "flows": {name: flows(distance) for name, distance in (("near", bandits.NEAR), ("far", bandits.FAR))},
        "horizons": {
            name: {f"{case.distance:g}, {case.horizon}": one.end for case, one in bandits.learned(name, cases).items()}
            for name in (*bandits.POSITIVE, *bandits.NEGATIVE)
        },
        "equal": {
            f"{distance:g}": bandits.paired(*(equal[name][bandits.Case(distance)].gain[:, 49] for name in ("DPO", "best-of-G")))
            for distance in (bandits.NEAR, bandits.FAR)
        },
        "equal_rejected": {
            name: float(equal[name][bandits.Case(bandits.NEAR)].rejected[:, 49].mean()) for name in ("DPO", "best-of-G")
        },
    }


def paragraph(results: dict) -> str:
    rows = "\n".join(
        f"| {sharpness:g} | {p['all'].mean():.0%} | {p['all'].min():.0%} to {p['all'].max():.0%} | {p['best'].mean():.0%} |"
        for sharpness, p in results["pairs"].items()
    )
    near, far = results["flows"]["near"], results["flows"]["far"]

    def steps(flow, which):
        return ", ".join(f"{kind} {np.median(flow[kind][which]):g}" for kind in ("forward", "reverse"))

    def ends(peak):
        return "; ".join(f"{name} {of[peak].mean():.2f} ± {of[peak].std(ddof=1):.2f}" for name, of in results["horizons"].items())

    return f"""\
*One exact step of a table at equal rates.* Forward KL moves logits by q - π, which is never more than 1, reverse KL by π (KL -
log π/q), which has no bound but dies with π. How often reverse KL changes the log-ratio of two bins more, over 8 random policies
and targets of {bandits.BINS} bins:

| deviation of the target's logits | all pairs of bins | over seeds | pairs with the target's best bin |
| --- | --- | --- | --- |
{rows}

The sharper the target, the more reverse KL is ahead, but not for the bin that is to be raised most.

*Whole descents* from the reference to π_ref exp(r/0.3)/Z. Steps until half of the mass that must move has moved (median of
{len(bandits.SEEDS)} seeds; {STEPS + 1}: never): peak inside the reference's mass {steps(near, "at_1")} at rate 1 and
{steps(near, "tuned")} at the best rate of each; peak outside {steps(far, "at_1")}, and {steps(far, "tuned")}. With exact
gradients reverse KL is on-policy learning: what the policy never says does not pull.

*Learners* with equal rates 0.1, on-policy, after 50 steps: DPO less best-of-G in gain {results["equal"]["1"]} with the peak inside,
{results["equal"]["4"]} outside; the reference's rejected responses have lost {-results["equal_rejected"]["DPO"]:.1f} nats under DPO
and {-results["equal_rejected"]["best-of-G"]:.1f} under best-of-G (inside). Their losses pull equally at the chosen response at
first, so this is the push. With rates and β tuned for {HORIZONS[1]} steps, gains are {ends("1, 10")} inside and {ends("4, 10")}
outside: with its own best rate maximum likelihood of fresh samples is as fast, and outside REINFORCE is slower."""


def draw(figure, results: dict) -> None:
    left, right = figure.subplots(1, 2)
    for kind, colour in (("forward", bandits.COLOURS["best-of-G"]), ("reverse", bandits.COLOURS["DPO"])):
        for peak, line in (("near", "-"), ("far", "--")):
            curve = results["flows"][peak][kind]["curves"]
            left.plot(curve.mean(0), line, color=colour, label=f"{kind} KL, {'inside' if peak == 'near' else 'outside'}")
            left.fill_between(np.arange(STEPS + 1), curve.min(0), curve.max(0), color=colour, alpha=0.15, linewidth=0)
    left.set_xlim(0, 60)
    left.set_ylim(0, 1.3)
    left.set_xlabel("exact step at rate 1; peak inside or outside")
    left.set_ylabel("distance to the target (TV)")
    left.legend(fontsize=8, ncols=2, loc="upper center")
    for name, of in results["horizons"].items():
        ends = np.stack([of[f"{bandits.FAR:g}, {horizon}"] for horizon in HORIZONS])
        right.errorbar(HORIZONS, ends.mean(1), ends.std(1, ddof=1), fmt="o-", markersize=3, color=bandits.COLOURS[name], label=name)
    right.set_xscale("log", base=2)
    right.set_xticks(HORIZONS, [str(horizon) for horizon in HORIZONS])
    right.set_ylim(0, 1.05)
    right.set_xlabel("on-policy steps, rates tuned for each; peak outside")
    right.set_ylabel("gain")
    right.legend(fontsize=8, loc="lower right")

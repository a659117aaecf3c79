"""Several gradient steps on the same samples, with and without a negative gradient, with and without importance weights."""

import numpy as np

from experiments.didactic import bandits

TITLE = "Sample reuse"
VERDICT = (
    "holds weakly: helps where learners are not done, with and without a negative gradient; REINFORCE without importance ratios "
    "gains nothing from it, or is harmed"
)
ROUNDS, REUSE = 20, (1, 2, 4, 8, 16)
LINES = {  # objective, `online.response_weights`, line
    "best-of-G": ("best-of-G", "none", "-"),
    "best-of-G, ratios": ("best-of-G", "sequence", "--"),
    "DPO": ("DPO", "none", "-"),
    "REINFORCE": ("REINFORCE", "none", "-"),
    "REINFORCE, ratios": ("REINFORCE", "sequence", "--"),
}


def measure(lines=tuple(LINES), reuse=REUSE, rates=bandits.RATES) -> dict:
    places = {"inside": bandits.NEAR, "outside": bandits.FAR}
    tuned, kept = {}, {}
    for line in lines:
        name, weights, _ = LINES[line]
        cases = {
            (place, times): bandits.Case(distance, reuse=times, horizon=ROUNDS * times)
            for place, distance in places.items()
            for times in reuse
        }
        found = bandits.learned(name, list(cases.values()), rates=rates, betas=(0.2,), weights=weights)
        for place in places:
            first = rates.index(found[cases[place, reuse[0]]].rate)
            learners = [found[cases[place, times]] for times in reuse]
            tuned[f"{line}, {place}"] = np.stack([one.end for one in learners])
            kept[f"{line}, {place}"] = np.stack([one.ends[first] for one in learners])
    return {
        "reuse": reuse,
        "tuned": tuned,  # [reuse, seed]
        "kept": kept,
        "change": {line: bandits.paired(ends[-1], ends[0]) for line, ends in tuned.items()},
        "change_kept": {line: bandits.paired(ends[-1], ends[0]) for line, ends in kept.items()},
    }


def paragraph(found: dict) -> str:
    rows = "\n".join(
        f"| {line} | {' | '.join(f'{end:.2f}' for end in ends.mean(1))} | {found['change'][line]} | {found['change_kept'][line]} |"
        for line, ends in found["tuned"].items()
    )
    return f"""\
{ROUNDS} rounds of {bandits.GROUPS * bandits.G} on-policy samples for all, each round used for 1 to {found["reuse"][-1]} steps.
Gain with the rate tuned for each number of steps; changes are paired, from the first to the last column, with tuned rates and with
the rate that was best for one step. *ratios*: times `online.response_weights("sequence")`, clipped at {bandits.CLIP:g}.

| objective, peak | {" | ".join(f"used {times}x" for times in found["reuse"])} | change | change at that rate |
| --- | {" | ".join("---" for _ in found["reuse"])} | --- | --- |
{rows}

Outside, where learners are not done after {ROUNDS} steps, reuse helps; inside, they are. REINFORCE is the exception: without ratios
it goes on pushing stale samples down without end, and more steps on them are worth nothing, or do harm at the old rate. The
project's ratios, clipped at the top alone, repair it: a response that has become unlikely has a ratio near 0 and is no longer
pushed. DPO needs none, as its slope fades with the margin. For maximum likelihood, ratios help outside, too; inside, at
the high rate that is best for single steps, reuse lets it jump to the best of the last samples."""


def draw(figure, found: dict) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, which, title in ((left, "tuned", "rate tuned for each"), (right, "kept", "rate tuned for one step")):
        for line, (name, _, style) in LINES.items():
            ends = found[which][f"{line}, outside"]
            colour = bandits.COLOURS[name]
            axes.plot(found["reuse"], ends.mean(1), f"o{style}", markersize=3, color=colour, label=line)
            axes.fill_between(found["reuse"], ends.min(1), ends.max(1), color=colour, alpha=0.1, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(found["reuse"], [str(times) for times in found["reuse"]])
        axes.set_xlabel("steps on the same samples")
        axes.set_title(f"peak outside, {title}", fontsize=9)
    left.set_ylabel("gain")
    left.set_ylim(0, 1.05)
    right.legend(fontsize=8, loc="lower left")

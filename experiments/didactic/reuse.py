"""Several gradient steps on the same samples, with and without a negative gradient, with and without importance weights."""

import numpy as np

from experiments.didactic import bandits

TITLE = "Sample reuse"
VERDICT = (
    "holds weakly: helps where learners are not done, with and without a negative gradient; REINFORCE without importance ratios "
    "gains nothing from it, or is harmed"
)
ROUNDS, REUSE = 20, (1, 2, 4, 8, 16)
LINES = {  # objective, `importance.response_weights`, line
    "best-of-G": ("best-of-G", "none", "-"),
    "best-of-G, ratios": ("best-of-G", "sequence", "--"),
    "DPO": ("DPO", "none", "-"),
    "REINFORCE": ("REINFORCE", "none", "-"),
    "REINFORCE, ratios": ("REINFORCE", "sequence", "--"),
}


def measure(lines=tuple(LINES), reuse=REUSE, rates=bandits.RATES) -> dict:
    peaks = {"inside": bandits.NEAR, "outside": bandits.FAR}
    tuned, kept = {}, {}
    for line in lines:
        name, weights, _ = LINES[line]
        cases = {
            (peak, times): bandits.Case(distance, reuse=times, horizon=ROUNDS * times)
            for peak, distance in peaks.items()
            for times in reuse
        }
        results = bandits.learned(name, list(cases.values()), rates=rates, betas=(0.2,), weights=weights)
        for peak in peaks:
            first = rates.index(results[cases[peak, reuse[0]]].rate)
            learners = [results[cases[peak, times]] for times in reuse]
            tuned[f"{line}, {peak}"] = np.stack([one.end for one in learners])
            kept[f"{line}, {peak}"] = np.stack([one.ends[first] for one in learners])
    return {
        "reuse": reuse,
        "tuned": tuned,  # [reuse, seed]
        "kept": kept,
        "change": {line: bandits.paired(ends[-1], ends[0]) for line, ends in tuned.items()},
        "change_kept": {line: bandits.paired(ends[-1], ends[0]) for line, ends in kept.items()},
    }


def paragraph(results: dict) -> str:
    change, change_kept = results["change"], results["change_kept"]
    rows = "\n".join(
        f"| {line} | {' | '.join(f'{end:.2f}' for end in ends.mean(1))} | {change[line]} | {change_kept[line]} |"
        for line, ends in results["tuned"].items()
    )
    return f"""\
{ROUNDS} rounds of {bandits.GROUPS * bandits.G} on-policy samples for all, each round used for 1 to {results["reuse"][-1]} steps.
Gain with the rate tuned for each number of steps; changes are paired, from the first to the last column, with tuned rates and with
the rate that was best for one step. *ratios*: times `importance.response_weights("sequence")`, clipped at {bandits.CLIP:g}.

| objective, peak | {" | ".join(f"used {times}x" for times in results["reuse"])} | change | change at that rate |
| --- | {" | ".join("---" for _ in results["reuse"])} | --- | --- |
{rows}

Outside, where learners are not done after {ROUNDS} steps, reuse helps; inside, they are. REINFORCE is the exception: without ratios
it goes on pushing stale samples down without end, and more steps on them are worth nothing, or do harm at the old rate. The
project's ratios, clipped at the top alone, repair it: a response that has become unlikely has a ratio near 0 and is no longer
pushed. DPO needs none, as its slope fades with the margin. For maximum likelihood, ratios help outside, too; inside, at
the high rate that is best for single steps, reuse lets it jump to the best of the last samples."""


def draw(figure, results: dict) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, which, title in ((left, "tuned", "rate tuned for each"), (right, "kept", "rate tuned for one step")):
        for line, (name, _, style) in LINES.items():
            ends = results[which][f"{line}, outside"]
            colour = bandits.COLOURS[name]
            axes.plot(results["reuse"], ends.mean(1), f"o{style}", markersize=3, color=colour, label=line)
            axes.fill_between(results["reuse"], ends.min(1), ends.max(1), color=colour, alpha=0.1, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(results["reuse"], [str(times) for times in results["reuse"]])
        axes.set_xlabel("steps on the same samples")
        axes.set_title(f"peak outside, {title}", fontsize=9)
    left.set_ylabel("gain")
    left.set_ylim(0, 1.05)
    right.legend(fontsize=8, loc="lower left")

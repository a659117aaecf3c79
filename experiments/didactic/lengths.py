"""On-policy samples, a negative gradient and sample reuse on a language model: `python -m experiments.lengths --seeds=4`.

The embedded model learns lengths (`length_rewards`, after Tajwar et al. 2024) from its own responses, four per question: by
best-of-G, by reward-weighted regression, by DPO of the best against the worst, or by REINFORCE. On-policy learners regenerate
responses every second step, off-policy learners use responses generated before the first step. All take 40 steps of 16 questions
and see each question once. Reuse: eight rounds of samples for 64 questions, each for one or four passes. The result is the mean
reward of responses to held-out questions.
"""

import functools
import statistics

import numpy as np
from absl import flags

from bilevel_jax import cli
from experiments import comparing, measures, tables
from experiments.didactic import length_rewards
from experiments.paper import published

FLAGS = flags.FlagValues()
ANSWERS = flags.DEFINE_integer(
    "answers", 4, "Responses to each held-out question, at temperature 1.", lower_bound=1, flag_values=FLAGS
)

SOURCES = {"on-policy": "#2f6fb5", "off-policy": "#c04a2f"}  # and their colours
RATIOS = "REINFORCE with ratios"


def _claim(text: str, cell: str, than: str) -> comparing.Claim:
    return comparing.Claim(text, cell, than, measures.REWARD, higher=True)


CLAIMS = (
    *(
        _claim(f"{kind}, {name}: on-policy above off-policy", f"{kind}, {name}, on-policy", f"{kind}, {name}, off-policy")
        for kind in length_rewards.REWARDS
        for name in published.OBJECTIVES
    ),
    *(
        _claim(f"{kind}, {source}: {name} above best-of-G", f"{kind}, {name}, {source}", f"{kind}, best-of-G, {source}")
        for kind in length_rewards.REWARDS
        for source in SOURCES
        for name in ("DPO", "REINFORCE")
    ),
    *(
        _claim(f"reuse, {name}: four passes above one", f"reuse, {name}, 4 passes", f"reuse, {name}, 1 pass")
        for name in published.REUSED
    ),
    _claim("reuse, four passes: REINFORCE with ratios above without", f"reuse, {RATIOS}, 4 passes", "reuse, REINFORCE, 4 passes"),
)


def draw(figure, results: comparing.Results, before: dict[int, np.ndarray]) -> None:
    axes = figure.subplots(1, len(length_rewards.REWARDS))
    for panel, (kind, (_, best)) in zip(axes, length_rewards.REWARDS.items()):
        for offset, (source, colour) in zip((-0.1, 0.1), SOURCES.items()):
            for x, name in enumerate(published.OBJECTIVES):
                values = list(results.values(f"{kind}, {name}, {source}", measures.REWARD).values())
                panel.plot([x + offset] * len(values), values, "o", color=colour, markersize=4, alpha=0.7, label=source)
        start = statistics.mean(length_rewards.mean(kind, lengths) for lengths in before.values())
        panel.axhline(start, color="#8a93a0", linestyle="--", linewidth=1, label="before training")
        panel.axhline(0, color="#2e8264", linestyle=":", linewidth=1, label="best")
        panel.set_title(f"{kind}: best at {best} characters", fontsize=9)
        panel.set_xticks(range(len(published.OBJECTIVES)), list(published.OBJECTIVES), fontsize=8)
        panel.grid(axis="y", color="#e3e6ea", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("mean reward of answers, characters")
    handles = dict(zip(*reversed(axes[0].get_legend_handles_labels())))
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4, frameon=False, fontsize=8)


def main() -> None:
    if tables.TIER.value != "tiny":
        raise ValueError(f"--tier={tables.TIER.value}: the lengths are those of the embedded model; use tiny")
    results = tables.run("safety", list(published.LENGTHS))
    before = measures.add_learned_lengths(results, ANSWERS.value)
    lengths = np.concatenate(list(before.values()))
    quantiles = ", ".join(f"{np.percentile(lengths, share):.0f} at {share}%" for share in (1, 5, 50, 95, 99))
    rewards = ", ".join(f"{length_rewards.mean(kind, lengths):.1f} ({kind})" for kind in length_rewards.REWARDS)
    lines = [f"Before training: {lengths.mean():.1f} characters, {quantiles}; mean reward {rewards}. Rewards are 0 at best.", ""]
    lines += comparing.rows(results, {key: key for key in (measures.REWARD, measures.LENGTH)})
    title = "Lengths learned from the model's own answers"
    tables.write("lengths", title, [results], lines, CLAIMS, functools.partial(draw, results=results, before=before), (10.0, 3.4))


if __name__ == "__main__":
    cli.run(main, tables.FLAGS, FLAGS)

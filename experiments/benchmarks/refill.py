"""Slot refill against waiting until all slots are free, on the spread of lengths that real responses have.

`ideal` is what refill can gain at most where every step costs the same: steps without refill are the sums of the longest response
of each group of S, steps with it at least all tokens over S.
"""

import statistics

from bilevel_jax import sampling, sharding
from experiments.benchmarks import timing

SLOTS = 8, 32
SETTINGS = sampling.Settings(temperature=0.8, max_new_tokens=256)
RESPONSES = 64, 80  # to make in a round, at G = 1 and 5
SAMPLES = 1, 5
SIZES = 33, 64  # of prompts, in tokens: one padded length, so that the first batch compiles for all


def _sampler(model, base, prompts, eos, keys, slots: int, refill: bool):
    """`f(round)`: the number of tokens of each response, in the order in which they start. Compiled ahead."""
    length, mesh = SIZES[1] + SETTINGS.max_new_tokens, sharding.make_mesh(1)
    sample = sampling.make_sampler(model, SETTINGS, eos, slots=slots, length=length, mesh=mesh, refill=refill)
    sample(base, None, prompts, keys, stopped=lambda: True)
    return lambda k: [len(response.ids) for row in sample(base, None, prompts, keys) for response in row]


def measure(model, base, prompts, eos: tuple[int, ...], rounds: int) -> list[str]:
    """Markdown lines: tokens per second with and without refill, and their ratio, by G and slots.

    Raises:
      ValueError: there are too few prompts of a fitting length.
    """
    prompts = [prompt for prompt in prompts if SIZES[0] <= len(prompt) <= SIZES[1]]
    if len(prompts) < max(RESPONSES):
        raise ValueError(f"suite 'refill' needs {max(RESPONSES)} prompts of {SIZES[0]} to {SIZES[1]} tokens; {len(prompts)} found")
    most = SETTINGS.max_new_tokens
    lines = [
        f"Prompts of {SIZES[0]} to {SIZES[1]} tokens, temperature {SETTINGS.temperature}, at most {most} new tokens.",
        "",
        "| G | slots | responses | tokens, mean | at the limit | refill, tokens/s | without, tokens/s "
        "| without over refill: min | median | max | ideal |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for num_samples, responses in zip(SAMPLES, RESPONSES, strict=True):
        part = prompts[: responses // num_samples]
        keys = sampling.row_keys(0, map(str, range(len(part))), 0, num_samples)
        for slots in SLOTS:
            variants = (("refill", True), ("without", False))
            runs = {name: _sampler(model, base, part, eos, keys, slots, refill) for name, refill in variants}
            lengths: list[int] = []

            def kept(k, run=runs["refill"], lengths=lengths):
                lengths[:] = run(k)

            seconds = timing.in_turn(runs | {"refill": kept}, rounds, warmup=0)
            rate = {name: sum(lengths) / statistics.median(times) for name, times in seconds.items()}
            low, middle, high = timing.ratios(seconds, "refill")["without"]
            longest = sum(max(lengths[first : first + slots]) for first in range(0, len(lengths), slots))
            cut = sum(length == most for length in lengths) / len(lengths)
            lines.append(
                f"| {num_samples} | {slots} | {len(lengths)} | {statistics.mean(lengths):.0f} | {cut:.0%} | {rate['refill']:.1f} "
                f"| {rate['without']:.1f} | {low:.2f} | {middle:.2f} | {high:.2f} | {longest * slots / sum(lengths):.2f} |"
            )
    return lines

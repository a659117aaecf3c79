"""Packed sequences against rows padded to the longest of each micro-batch of 8, in response tokens per second.

Both run the same step (uniform weights, no second pass) on the same rows. The padded side is given every advantage: levels keep
their own micro-batches, shapes are compiled ahead, and the share of its time that goes to rounding lengths up to a multiple of
`ROUNDING` is reported, so that it can be taken off.
"""

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import objective, selector, sharding, step, train_state
from bilevel_jax.data import levels, packing
from experiments.benchmarks import timing, train_step

ROUNDING = 32  # tokens


def _padded(work: train_step.Work, k: int, mesh):
    """Micro-batches of `ROWS` rows of one level, one row per sequence; (batch, padded length needed, length after rounding)."""
    micro_batches = []
    for part in train_step.micro_batches(*work.plain(k), grouped=False):
        share = 1 / work.config.batch.size
        segments = [packing.Segment(example.prompt, example.response, row_index, share) for example, row_index in part]
        longest = max(segment.size for segment in segments)
        length = -(-longest // ROUNDING) * ROUNDING
        layout = packing.Layout(train_step.ROWS, length, train_step.ROWS)
        bins = [[i] for i in sorted(range(len(segments)), key=lambda i: -segments[i].size)]
        batch = packing.pack_bins(segments, bins, len(work.lower.rows), len(part), layout)
        micro_batches.append((sharding.put_batch(batch, mesh), longest, length))
    return micro_batches


def measure(config, model, base, directory: str, upper: levels.Level, lower: levels.Level, rounds: int) -> list[str]:
    """Markdown lines: response tokens per second of both, and the ratio of their times."""
    mesh = sharding.make_mesh(1)
    optimizer, select = optax.adam(config.optimizer.learning_rate), selector.Selector(rule="uniform")
    aim = objective.Objective()
    state = train_state.init(train_step.start_adapter(config, model), optimizer, aim, select, len(lower.rows))
    jitted = jax.jit(step.make_step(model, aim, select, optimizer))
    scales = train_state.Scales(jnp.float32(0.5), jnp.float32(0.5))
    work = train_step.Work(config, directory, upper, lower, rounds)
    hosts = work.packed()
    packed = [sharding.put_batch(drawn.batch, mesh) for drawn in hosts]
    padded = [_padded(work, k, mesh) for k in range(rounds)]
    for length in {given for micro in padded for _, _, given in micro}:  # compile ahead
        jitted.lower(base, state, next(b for m in padded for b, _, g in m if g == length), scales).compile()

    def run_padded(k):
        return [jitted(base, state, batch, scales)[1]["loss"] for batch, _, _ in padded[k]]

    runs = {"packed": lambda k: jitted(base, state, packed[k], scales)[1]["loss"], "padded": run_padded}
    seconds = timing.in_turn(runs, rounds)
    responses = [int(drawn.batch.packed.num_targets.sum()) for drawn in hosts]
    tokens = sum(drawn.num_tokens for drawn in hosts)
    needed = sum(train_step.ROWS * longest for micro in padded for _, longest, _ in micro)
    given = sum(train_step.ROWS * length for micro in padded for _, _, length in micro)
    sequences = sum(int((drawn.batch.packed.tokens.any(-1)).sum()) for drawn in hosts) * config.data.max_length
    lines = [
        f"{tokens} tokens in {rounds} steps, {sum(responses)} of them responses; computed on: {sequences} packed, {needed} padded "
        f"({given} with lengths rounded up to {ROUNDING})",
        "",
        "| batch | response tokens/s | padded over packed: min | median | max |",
        "| --- | --- | --- | --- | --- |",
    ]
    low, middle, high = timing.ratios(seconds, "packed")["padded"]
    for name in runs:
        rate = sum(responses) / sum(seconds[name])
        cells = f"{low:.2f} | {middle:.2f} | {high:.2f}" if name == "padded" else "1 | 1 | 1"
        lines.append(f"| {name} | {rate:.1f} | {cells} |")
    lines += ["", f"Without the rounding the padded side would be {middle * needed / given:.2f}x slower than the packed one."]
    return lines

"""Time of the training step by part: a trace, with the exclusive time of each operation assigned to a part of the model."""

import collections
import pathlib
import re
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import objective, selector, sharding, step, train_state
from bilevel_jax.data import levels
from experiments.benchmarks import train_step

COMPUTATION = re.compile(r"%?([\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = ")
NAME = re.compile(r"metadata=\{[^}]*op_name=\"([^\"]*)\"")
CALLED = re.compile(r"fusion\(.*calls=%?([\w.-]+)")
BATCHED = re.compile(r" dot\(.*lhs_batch_dims=")  # XLA rewrites these without their names; in a step only attention has them
CONTAINERS = ("while", "conditional", "call")  # operations that wait for the operations inside them
PARTS = {  # pattern of an operation's name in the program -> part of the step; the first match counts
    r"attention/.*->.*dot_general|self_attn/.*->.*dot_general": "attention: products of queries, keys, values",
    r"layers/.*dot_general": "products with weights of layers and adapters",
    r"attention/|self_attn/": "attention: rotation, mask, softmax, copies",
    r"layers/": "layers: norms, activations, sums, copies",
    r"token_nll|while/body/(?:jvp\(\)/)?while/body/|take_along|custom_vjp_call": "head and cross-entropy",  # a loop in the step's
}
REST = "copies and zeros of loops, embedding, optimizer"


def part_of(name: str) -> str:
    """The part of the step to which an operation belongs."""
    return next((part for pattern, part in PARTS.items() if re.search(pattern, name)), REST)


def names_of(text: str) -> dict[str, str]:
    """Maps operations of a compiled program to names in the traced program; a fusion without a name has that of its product."""
    names: dict[str, str] = {}
    computation, products = "", {}
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            computation = header[1]
        elif instruction := INSTRUCTION.match(line):
            named, called = NAME.search(line), CALLED.search(line)
            product = "attention/->/dot_general" if BATCHED.search(line) else products.get(called[1], "") if called else ""
            names[instruction[1]] = named[1] if named else product
            if BATCHED.search(line):
                products[computation] = names[instruction[1]]
    return names


class Span(NamedTuple):
    """An operation on a thread; times in seconds."""

    thread: str
    operation: str
    start: float
    end: float


def spans_of(trace: pathlib.Path) -> list[Span]:
    """The operations in a trace of `jax.profiler`."""
    spans = []
    for file in trace.glob("**/*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines:
                for event in line.events:
                    if name := dict(event.stats).get("hlo_op"):
                        start = event.start_ns / 1e9
                        spans.append(Span(f"{plane.name}/{line.name}", name, start, start + event.duration_ns / 1e9))
    return spans


def exclusive_seconds(spans: list[Span]) -> dict[str, float]:
    """Exclusive seconds of every operation.

    Each moment counts for the innermost active operation, in equal parts if several threads have one, so the total is the time in
    which anything ran. An operation that waits for operations on another thread gets none of their time.
    """
    seconds: dict[str, float] = collections.defaultdict(float)
    # At equal times ends precede starts; inner operations end first, outer operations start first.
    events = [(span.end, 0, span.end - span.start, i) for i, span in enumerate(spans)]
    events += [(span.start, 1, span.start - span.end, i) for i, span in enumerate(spans)]
    active: dict[str, list[int]] = collections.defaultdict(list)
    since = 0.0
    for now, starts, _, i in sorted(events):
        innermost = {spans[stack[-1]].operation for stack in active.values() if stack}
        working = [name for name in innermost if not name.startswith(CONTAINERS)] or innermost
        for name in working:
            seconds[name] += (now - since) / len(working)
        since = now
        stack = active[spans[i].thread]
        if starts:
            stack.append(i)
        else:
            stack.remove(i)
    return dict(seconds)


def measure(config, model, base, directory: str, upper: levels.Level, lower: levels.Level, rounds: int) -> list[str]:
    """Markdown lines: seconds and share of every part, over `rounds` steps."""
    mesh, optimizer = sharding.make_mesh(1), optax.adam(config.optimizer.learning_rate)
    host_batches = train_step.Work(config, directory, upper, lower, rounds).packed()
    batches = [sharding.put_batch(host.batch, mesh) for host in host_batches]
    num_tokens = sum(host.num_tokens for host in host_batches)
    scales = train_state.Scales(jnp.float32(1), jnp.float32(train_step.RHO / (1 - train_step.RHO)))
    select = selector.Selector(optimizer="adam", learning_rate=1e-4, baseline="none")
    aim = objective.Objective(coefficient_at="current")
    state = train_state.init(train_step.start_adapter(config, model), optimizer, aim, select, len(lower.rows))
    update = step.make_step(model, aim, select, optimizer)
    compiled = jax.jit(update).lower(base, state, batches[0], scales).compile()
    jax.block_until_ready(compiled(base, state, batches[0], scales))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for batch in batches:
                state, _ = jax.block_until_ready(compiled(base, state, batch, scales))
        seconds = exclusive_seconds(spans_of(pathlib.Path(folder)))
    names = names_of(compiled.as_text())
    by_part: dict[str, float] = collections.defaultdict(float)
    for operation, value in seconds.items():
        by_part[part_of(names.get(operation, ""))] += value
    total = sum(by_part.values())
    lines = [
        f"{rounds} steps of {config.batch.size} + {config.batch.size} rows, {num_tokens} tokens, {config.model.dtype}.",
        "",
        "| part | seconds | share |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {part} | {value:.2f} | {value / total:.0%} |" for part, value in sorted(by_part.items(), key=lambda x: -x[1])]
    products, peak = by_part["products with weights of layers and adapters"], train_step.peak_flops(config.model.dtype)
    layers = sum(leaf.size for leaf in jax.tree.leaves(base["layers"]) if leaf.ndim > 2)
    rate = 4.0 * layers * num_tokens / products
    return [*lines, "", f"Products with weights of layers run at {rate / peak:.0%} of the peak, {peak / 1e9:.0f} GFLOP/s."]

"""Where a joint step's time goes: a trace of it, each operation's own time put down to the part of the model that it comes from."""

import collections
import pathlib
import re
import tempfile

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import selector, sharding, step
from bilevel_jax.data import levels
from experiments.benchmarks import train_step

COMPUTATION = re.compile(r"%?([\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = ")
NAME = re.compile(r"metadata=\{[^}]*op_name=\"([^\"]*)\"")
CALLED = re.compile(r"fusion\(.*calls=%?([\w.-]+)")
BATCHED = re.compile(r" dot\(.*lhs_batch_dims=")  # XLA rewrites these and forgets their names; a step has them in attention alone
PARTS = {  # of an operation's name in the program, the first that fits -> part of the step
    r"attention/.*->.*dot_general|self_attn/.*->.*dot_general": "attention: products of queries, keys, values",
    r"layers/.*dot_general": "products with weights of layers and adapters",
    r"attention/|self_attn/": "attention: rotation, mask, softmax, copies",
    r"layers/": "layers: norms, activations, sums, copies",
    r"token_nll|while/body/(?:jvp\(\)/)?while/body/|take_along|custom_vjp_call": "head and cross-entropy",  # a loop in the step's
}
REST = "copies and zeros of loops, embedding, optimizer"


def part_of(name: str) -> str:
    return next((part for pattern, part in PARTS.items() if re.search(pattern, name)), REST)


def names_of(text: str) -> dict[str, str]:
    """The name that every operation of a compiled program has in the traced one; of a fusion without, that of a product in it."""
    names: dict[str, str] = {}
    inside, products = "", {}
    for line in text.splitlines():
        if begun := COMPUTATION.match(line):
            inside = begun[1]
        elif found := INSTRUCTION.match(line):
            named, called = NAME.search(line), CALLED.search(line)
            product = "attention/->/dot_general" if BATCHED.search(line) else products.get(called[1], "") if called else ""
            names[found[1]] = named[1] if named else product
            if BATCHED.search(line):
                products[inside] = names[found[1]]
    return names


def own_seconds(trace: pathlib.Path) -> dict[str, float]:
    """Seconds of every operation in a trace of `jax.profiler`, without those of operations inside it (a loop's body)."""
    seconds: dict[str, float] = collections.defaultdict(float)
    for file in trace.glob("**/*.xplane.pb"):
        lines = (line for plane in jax.profiler.ProfileData.from_file(str(file)).planes for line in plane.lines)
        for line in lines:
            spans = ((event.start_ns, event.duration_ns, dict(event.stats).get("hlo_op")) for event in line.events)
            inside: list[tuple[float, str]] = []  # (end, name) of the operations that are under way, the outermost first
            for start, duration, name in sorted((one for one in spans if one[2]), key=lambda one: (one[0], -one[1])):
                while inside and inside[-1][0] <= start:
                    inside.pop()
                seconds[name] += duration / 1e9
                if inside:
                    seconds[inside[-1][1]] -= duration / 1e9
                inside.append((start + duration, name))
    return dict(seconds)


def measure(config, model, base, directory: str, upper: levels.Level, lower: levels.Level, rounds: int) -> list[str]:
    """Markdown lines: seconds and share of every part, over `rounds` steps."""
    mesh, optimizer = sharding.make_mesh(1), optax.adam(config.optimizer.learning_rate)
    drawn = train_step.Work(config, directory, upper, lower, rounds).drawn()
    batches = [sharding.split_batch(one.batch, mesh) for one in drawn]
    scales = step.Scales(jnp.float32(1), jnp.float32(train_step.RHO / (1 - train_step.RHO)))
    select = selector.Selector(optimizer="adam", learning_rate=1e-4, baseline="none")
    state = step.init(train_step.start_adapter(config, model), optimizer, select, len(lower.rows), tracked=False)
    update = step.make_step(model, step.Objective(coefficient_at="current"), select, optimizer)
    compiled = jax.jit(update).lower(base, state, batches[0], scales).compile()
    jax.block_until_ready(compiled(base, state, batches[0], scales))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for batch in batches:
                state, _ = jax.block_until_ready(compiled(base, state, batch, scales))
        seconds = own_seconds(pathlib.Path(folder))
    names = names_of(compiled.as_text())
    by_part: dict[str, float] = collections.defaultdict(float)
    for operation, value in seconds.items():
        by_part[part_of(names.get(operation, ""))] += value
    total = sum(by_part.values())
    lines = [
        f"{rounds} steps of {config.batch.size} + {config.batch.size} rows, {sum(one.tokens for one in drawn)} tokens, "
        f"{config.model.dtype}.",
        "",
        "| part | seconds | share |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {part} | {value:.2f} | {value / total:.0%} |" for part, value in sorted(by_part.items(), key=lambda x: -x[1])]
    products, peak = by_part["products with weights of layers and adapters"], train_step.peak_flops(config.model.dtype)
    layers = sum(leaf.size for leaf in jax.tree.leaves(base["layers"]) if leaf.ndim > 2)
    rate = 4.0 * layers * sum(one.tokens for one in drawn) / products
    return [*lines, "", f"Products with weights of layers run at {rate / peak:.0%} of the peak, {peak / 1e9:.0f} GFLOP/s."]

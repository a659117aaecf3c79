"""Cost of bilevel selection relative to direct mixing, with equal rows and packing. The paper: 1.29x on Pythia-1B."""

import statistics

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import batches, objective, online, selector, sharding, step, train_state
from bilevel_jax.data import levels, packing
from bilevel_jax.models import lora
from experiments.benchmarks import timing

VARIANTS = {
    "mixing": objective.Objective(coefficient_at="current"),
    "offline, current": objective.Objective(coefficient_at="current"),
    "offline, next": objective.Objective(coefficient_at="next"),
    "offline, influence": objective.Objective(cost="influence"),
    "offline, influence, whole micro-batches": objective.Objective(cost="influence"),
    "offline, next, tokens": objective.Objective(coefficient_at="next"),
    "offline, next, tracked": objective.Objective(coefficient_at="next", value_function="tracked"),
}


def measure(config, model, base, upper: levels.Level, lower: levels.Level, rounds: int) -> list[str]:
    """Markdown lines: seconds of a step and ratio to mixing, for every variant on the same batches."""
    mesh = sharding.make_mesh(1)
    optimizer = optax.adam(config.optimizer.learning_rate)
    targets = lora.resolve_targets(model, config.lora.targets)
    store = online.empty(len(lower.rows))
    mixed = packing.Layout(config.batch.micro_size, config.data.max_length, 2 * config.batch.size)
    whole = mixed._replace(separate_levels=True)
    halved = packing.update_layout(*whole)
    step_batches: dict[packing.Layout, list] = {}
    for layout in (mixed, whole, halved):
        host_batches = (batches.make_batch(config, upper, lower, layout, k, store) for k in range(rounds))
        step_batches[layout] = [sharding.put_batch(host.batch, mesh) for host in host_batches]
    states, runs = {}, {}
    for name, variant in VARIANTS.items():
        adapter = lora.init_adapter(model, jax.random.key(0), config.lora.rank, targets)
        rule, token_rate = "uniform" if name == "mixing" else "bds", 0.1 if name.endswith("tokens") else 0.0
        select = selector.Selector(rule=rule, token_learning_rate=token_rate)
        states[name] = train_state.init(adapter, optimizer, variant, select, len(lower.rows))
        jitted = jax.jit(step.make_step(model, variant, select, optimizer), donate_argnums=1)
        scales = train_state.Scales(jnp.float32(0.5), jnp.float32(0.5))

        layout = mixed if variant.cost == "loss" else whole if name.endswith("whole micro-batches") else halved

        def run(k, name=name, jitted=jitted, scales=scales, steps=step_batches[layout]):
            states[name], metrics = jitted(base, states[name], steps[k], scales)
            return metrics["loss"]

        runs[name] = run
    seconds = timing.in_turn(runs, rounds)
    lines = ["| step | seconds, median | over mixing: min | median | max |", "| --- | --- | --- | --- | --- |"]
    for name, (low, middle, high) in timing.ratios(seconds, "mixing").items():
        lines.append(f"| {name} | {statistics.median(seconds[name]):.3f} | {low:.2f} | {middle:.2f} | {high:.2f} |")
    return lines

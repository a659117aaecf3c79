"""Steps with adapters in the last layers (`lora.layers=last:K`) against steps with adapters in all layers, on equal batches.

Variants: nothing kept of what the frozen layers compute, and all of it kept, as after the first epoch. Both include the host's work
for a batch: gathering the states and putting them on the device.
"""

import statistics

import jax
import jax.numpy as jnp

from bilevel_jax import batches, frozen, online, sharding, step, train_state
from bilevel_jax import config as configuration
from bilevel_jax.data import levels, packing
from bilevel_jax.models import lora
from bilevel_jax.runtime import state_store
from experiments.benchmarks import timing


def measure(config, model, base, upper: levels.Level, lower: levels.Level, rounds: int) -> list[str]:
    """Markdown lines: seconds of a step and its ratio to all layers, for `lora.layers` of the config."""
    last = config.lora.layers
    if last == "all":
        raise configuration.ConfigError("--suite=frozen compares with all layers: lora.layers=all must be last:K, such as last:8")
    mesh, objective, selector = sharding.make_mesh(1), configuration.to_objective(config), configuration.to_selector(config)
    optimizer = configuration.to_optimizer(config, rounds)
    influence = train_state.measures_influence(objective, selector)
    layout = packing.update_layout(config.batch.micro_size, config.data.max_length, 2 * config.batch.size, influence)
    slots, store = frozen.SegmentSlots(upper, lower), online.empty(len(lower.rows))
    hosts = [batches.make_batch(config, upper, lower, layout, k, store, slots) for k in range(rounds)]
    targets = lora.resolve_targets(model, config.lora.targets)
    scales = batches.level_scales(config, 0)
    states, runs, kept, steps = {}, {}, {}, {}
    for name, layers, cache in (("all", "all", "off"), (last, last, "off"), (f"{last}, kept", last, "memory")):
        adapter = lora.init_adapter(model, jax.random.key(0), config.lora.rank, targets, lora.resolve_layers(model, layers))
        start = train_state.init(adapter, optimizer, objective, selector, len(lower.rows))
        shardings = sharding.state_shardings(mesh, start, False)
        states[name] = jax.tree.map(sharding.device_put, start, shardings)
        if layers not in steps:
            update = step.make_step(model, objective, selector, optimizer)
            # The shardings of the state that goes in, so that one compilation serves all steps.
            steps[layers] = jax.jit(update, donate_argnums=1, out_shardings=(shardings, sharding.replicated(mesh)))
        below = frozen.num_frozen(model, adapter)
        results = None
        if cache != "off":
            width = model.hidden_size
            results = state_store.in_memory(slots.number, slots.num_tokens, width, jnp.dtype(model.activations))
        kept[name] = frozen.FrozenLayers(model, base, below, mesh, results) if below else None

        def run(k, name=name, jitted=steps[layers]):
            host = hosts[k]
            batch = kept[name].fill(host.batch, host.state_keys) if kept[name] else host.batch
            states[name], metrics = jitted(base, states[name], sharding.put_batch(batch, mesh), scales)
            return metrics["loss"]

        runs[name] = run
    for host in hosts:  # the first visits
        kept[f"{last}, kept"].fill(host.batch, host.state_keys)
    seconds = timing.in_turn(runs, rounds)
    tokens = sum(host.num_tokens for host in hosts) / rounds
    rows_text = f"{config.batch.size} + {config.batch.size} rows a step, {tokens:.0f} tokens"
    lines = [f"{rows_text}, {model.num_layers} layers, {model.dtype}.", ""]
    lines += ["| adapters | seconds, median | all layers over it: min | median | max |", "| --- | --- | --- | --- | --- |"]
    for name, times in seconds.items():
        faster = [whole / own for whole, own in zip(seconds["all"], times, strict=True)]
        lines.append(
            f"| {name} | {statistics.median(times):.2f} | {min(faster):.2f} | {statistics.median(faster):.2f} | {max(faster):.2f} |"
        )
    return lines

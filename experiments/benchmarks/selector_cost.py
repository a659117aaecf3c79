"""Cost of the selector in a step: reading B weights and updating ω, with N rows sharded over all devices."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax import selector, sharding
from experiments.benchmarks import timing

BATCH = 32
SIZES = (10**4, 10**5, 10**6, 10**7)
SPLIT = (10**8,)  # only with several devices
FAR = 10**9  # rows, by calculation


def _variant(select: selector.Selector, size: int, mesh, samples: np.ndarray, share: jax.Array, cost: jax.Array):
    """Returns `turn(round)`, one read and one update of its own state, and the bytes of the state per device."""

    def move(state, sample):
        weight = select.scale(size) * selector.probabilities(state.logits, sample)
        return selector.update(select, state, sample, share, BATCH, cost, 0.25), weight

    def start():
        return selector.init(select, size)

    shardings = sharding.shardings(mesh, jax.eval_shape(start), "examples")
    state = jax.jit(start, out_shardings=shardings)()
    jitted = jax.jit(move, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)))

    def turn(k):
        nonlocal state
        state, weight = jitted(state, samples[k])
        return state.logits, weight

    return turn, sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))


def measure(rounds: int) -> list[str]:
    """Markdown lines: milliseconds per step and bytes a device by optimizer and N."""
    rng, mesh = np.random.default_rng(0), sharding.make_mesh(0)
    cost, share = jnp.asarray(rng.exponential(size=BATCH), jnp.float32), jnp.full(BATCH, 1 / BATCH)
    names = selector.OPTIMIZERS
    heads = [f"{name}, {unit}" for unit in ("ms", "MB a device") for name in names]
    lines = [f"| N | {' | '.join(heads)} |", "| --- " * (1 + len(heads)) + "|"]
    for size in SIZES + (SPLIT if mesh.size > 1 else ()):
        samples = rng.integers(0, size, (rounds, BATCH), dtype=np.int32)
        built = {name: _variant(selector.Selector(optimizer=name), size, mesh, samples, share, cost) for name in names}
        seconds = timing.in_turn({name: turn for name, (turn, _) in built.items()}, rounds, warmup=2)
        times = " | ".join(f"{1000 * statistics.median(seconds[name]):.2f}" for name in names)
        lines.append(f"| {size:.0e} | {times} | " + " | ".join(f"{built[name][1] / 1e6:.2f}" for name in names) + " |")
    per_row = {name: built[name][1] * mesh.size / size for name in names}
    far = ", ".join(f"{name} {FAR * number / 1e9:.0f} GB" for name, number in per_row.items())
    lines += ["", f"At N = {FAR:.0e} by these bytes a row: {far}, over all devices together."]
    return lines

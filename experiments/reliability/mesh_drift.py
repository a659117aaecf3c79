"""How far a run on another mesh goes from that on one device: `python -m experiments.mesh_drift`.

The same run is made on one device and on eight virtual ones (2 x 2 x 2), with Adam and with SGD, and with both costs. Every
step is also made on the eight devices from the state of the run on one device: what one step adds, apart from what earlier
steps have left. Sums over devices are rounded in another order. SGD moves θ by the gradient, so the difference of a step is
that of the gradient. Adam divides by the root of the mean square of each parameter's gradients, however small they are: where
they are mostly rounding, the move is as large as elsewhere, and its sign is that of the rounding. The influence of a row
counts signs of products, and where one is near 0 rounding may change its sign.
"""

import jax
import numpy as np
import tqdm
from absl import flags

from bilevel_jax import batches, checks, cli, online, presets, sharding
from bilevel_jax import setup as setups
from experiments import runs
from experiments.selection import judgement

FLAGS = flags.FlagValues()
STEPS = flags.DEFINE_integer("steps", 63, "Steps of a run.", lower_bound=1, flag_values=FLAGS)

MESHES = {"one": (1, 1, 1), "eight": (2, 2, 2)}
RUNS = {  # name -> optimizer, learning rate, cost
    "Adam, influence": ("adam", 2e-3, "influence"),
    "SGD, influence": ("sgd", 0.1, "influence"),
    "SGD, loss": ("sgd", 0.1, "loss"),
}
BATCH = 8
TINY = 1e-30


def make_config(name: str, mesh: tuple[int, int, int]):
    config = presets.get("")
    config.method, config.num_epochs, config.model.path = "offline", 1, "bilevel_jax/tiny_base"
    config.data.upper, config.data.lower = "synthetic:trusted", "synthetic:mixture"
    config.data.num_upper = config.data.num_lower = STEPS.value * BATCH
    config.eval.num_upper = config.eval.num_lower = 0
    config.batch.size, config.batch.micro_size, config.data.max_length = BATCH, 4, 128
    config.optimizer.name, config.optimizer.learning_rate, config.selection.cost = RUNS[name]
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = mesh
    return checks.build(config)


class Side:
    """A run on one mesh."""

    def __init__(self, name: str, mesh: tuple[int, int, int]):
        self.config = make_config(name, mesh)
        self.setup = setups.load(self.config)
        self.state, self.shardings = setups.init_state(self.config, self.setup, 0)
        self.program = setups.compile_program(self.config, self.setup, self.state, self.shardings, None)
        self.store = online.empty(len(self.setup.lower.rows))

    def put(self, host_state):
        return jax.tree.map(sharding.device_put, host_state, self.shardings)

    def step(self, state, k: int):
        batch = sharding.put_batch(self.program.batch_of(k, self.store).batch, self.setup.mesh)
        scales = sharding.replicate(batches.level_scales(self.config, 0), self.setup.mesh)
        return self.program.train_step(self.setup.base, state, batch, scales, None)


def copied(tree):
    """A copy on the host; the buffers of a state are given to the step."""
    return jax.tree.map(lambda leaf: np.array(sharding.to_host(leaf)), tree)


def flat(adapter) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(adapter)]).astype(float)


def largest(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), TINY))


def measure(name: str) -> dict[str, float]:
    """The largest differences of single steps, and the differences at the end."""
    one, eight = (Side(name, mesh) for mesh in MESHES.values())
    a, b, single, moved, losses = one.state, eight.state, [], [], []
    for k in tqdm.trange(STEPS.value, desc=name, unit="step"):
        before = copied(a)
        c, _ = eight.step(eight.put(before), k)
        (a, metrics), (b, others) = one.step(a, k), eight.step(b, k)
        start, left, right = (flat(state.policy.adapter) for state in (before, copied(a), copied(c)))
        single.append(largest(left, right))
        moved.append(relative(right - start, left - start))
        losses.append(largest(np.asarray(metrics["upper_loss"], float), np.asarray(others["upper_loss"], float)))
    omega = [np.asarray(sharding.to_host(state.selector.logits), float) for state in (a, b)]
    theta = [flat(copied(state.policy.adapter)) for state in (a, b)]
    return {
        "one step from the same state: largest difference of θ": max(single),
        "one step from the same state: norm of the difference over the norm of the move, largest": max(moved),
        "the same, median": float(np.median(moved)),
        f"after {STEPS.value} steps: largest difference of θ": largest(*theta),
        f"after {STEPS.value} steps: norm of the difference over the norm of θ": relative(theta[1], theta[0]),
        f"after {STEPS.value} steps: largest difference of ω": largest(*omega),
        "largest difference of the trusted loss of a batch, nats": max(losses),
    }


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    results = {name: measure(name) for name in RUNS}
    names = list(next(iter(results.values())))
    rows = [[name, *(f"{result[name]:.1e}" for result in results.values())] for name in names]
    lines = [" ".join(__doc__.split("\n\n")[1].split()), "", *runs.markdown(["", *results], rows)]
    judgement.write("mesh_drift", "A run on eight devices against one", lines)


if __name__ == "__main__":
    cli.run(main, FLAGS)

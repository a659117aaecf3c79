"""Selection by exact metagradients (`selection.rule=metagradient`): mirror descent on ω, whole training runs being its steps.

The trusted rows are split in three. In outer iteration j a model is trained, with frozen weights w(ω_j), beside the first part;
the second part steers,

    ω_{j+1} = ω_j - α g / rms(g),   g = dL0(θ^T)/dw at w(ω_j)                       (`metagradient`)

and the third part stops: where its loss after training rose, the weights before are taken. Every iteration has an order of the
rows of its own. The run itself follows, with the weights found, beside all trusted rows. An iteration costs about four runs. Each
is written to the workdir as it ends, so an interrupted search goes on with the next one.

The derivative is taken of *smooth training*: with large steps the loss after training is a rough function of the weights, and its
derivative at a point says little about larger changes. So the search trains with `SMOOTH_RATE` times the learning rate, which falls
to 0, and with `SMOOTH_EPS_ROOT` under the root of Adam, which bounds the steps of parameters whose gradients are small.
"""

import dataclasses
import functools
import io
import pathlib
from collections.abc import Callable

import jax
import numpy as np
import optax
import tqdm

from bilevel_jax import batches, files, metagradient, online, scoring, sharding, step
from bilevel_jax import config as configuration
from bilevel_jax import setup as setups
from bilevel_jax.data import levels, packing, shuffle

FILE = "metagradient.npz"
SMOOTH_RATE, SMOOTH_EPS_ROOT = 0.3, 1e-6
PARTS = 0.5, 0.35  # of the trusted rows: trained on, steering; the rest stops
MIN_ROWS = 6  # trusted rows, so that every part has one
TINY = 1e-30
SPLIT = 3  # tag of the random stream


def split_trusted(num_rows: int, seed: int) -> list[np.ndarray]:
    """Indices of the trusted rows that are trained on, that steer, and that stop."""
    order = np.random.default_rng([seed, SPLIT]).permutation(num_rows)
    bounds = np.maximum(np.round(np.cumsum(PARTS) * num_rows).astype(int), [1, 2])
    return np.split(order, bounds)


def _subset(level: levels.Level, indices: np.ndarray) -> levels.Level:
    return dataclasses.replace(level, rows=[level.rows[i] for i in indices], examples=[level.examples[i] for i in indices])


@dataclasses.dataclass(frozen=True)
class Iteration:
    """What every outer iteration works with."""

    config: configuration.Config
    setup: setups.Setup
    program: setups.Program
    train_step: Callable  # compiled, of smooth training
    replay: Callable  # compiled, from `metagradient.make_replay`
    upper_gradient: Callable  # compiled, from `metagradient.make_upper_gradient`
    inner: levels.Level
    steering: list[packing.Segment]
    stopping: list[packing.Segment]


def _train(it: Iteration, state: step.State, j: int):
    """A run with frozen weights.

    Returns:
      θ^T; of each step, the learner before it, its batch and its scales.
    """
    config, setup = dataclasses.replace(it.config, seed=it.config.seed + 1000 * (j + 1)), it.setup
    layout = it.program.layout
    epoch_steps = shuffle.steps_per_epoch(len(setup.lower.rows), config.batch.size)
    past, empty = [], online.empty(len(setup.lower.rows))
    for k in tqdm.trange(config.num_epochs * epoch_steps, desc=f"metagradient {j + 1}, training", unit="step", leave=False):
        batch = sharding.split_batch(batches.make_batch(config, it.inner, setup.lower, layout, k, empty).batch, setup.mesh)
        scales = sharding.replicate(batches.level_scales(config, k // epoch_steps), setup.mesh)
        past.append((jax.tree.map(sharding.to_host, state.policy), batch, scales))
        state, _ = it.train_step(setup.base, state, batch, scales, None)
    return state.policy.adapter, past


def _write(file: pathlib.Path, logits: list[np.ndarray], losses: list[float]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, logits=np.array(logits), losses=np.array(losses))
    files.write_atomically(file, buffer.getvalue())


def _read(file: pathlib.Path, num_rows: int) -> tuple[list[np.ndarray], list[float]]:
    """ω_0 ... and the stopping losses of the iterations that are done."""
    if not file.exists():
        return [np.zeros(num_rows, np.float32)], []
    stored = np.load(file)
    return list(stored["logits"]), list(stored["losses"])


def _smooth_state(state: step.State, optimizer: optax.GradientTransformation) -> step.State:
    """A run's state before its first step, with the state of another optimizer."""
    return state._replace(policy=step.Learner(state.policy.adapter, optimizer.init(state.policy.adapter)))


def smooth_optimizer(config: configuration.Config, num_steps: int) -> optax.GradientTransformation:
    """The optimizer of smooth training."""
    settings = dataclasses.replace(config.optimizer, learning_rate=SMOOTH_RATE * config.optimizer.learning_rate, schedule="linear")
    return configuration.to_optimizer(dataclasses.replace(config, optimizer=settings), num_steps, SMOOTH_EPS_ROOT)


def search(
    config: configuration.Config, setup: setups.Setup, program: setups.Program, make_state: Callable, directory: pathlib.Path
) -> np.ndarray:
    """The logits ω [N] of the run.

    Args:
      program: of the run.
      make_state: `logits -> State`, the state of a run before its first step.
      directory: where the iterations are written, and read again.

    Raises:
      ConfigError: too few trusted rows.
    """
    num_upper, num_rows = len(setup.upper.rows), len(setup.lower.rows)
    if num_upper < MIN_ROWS:
        raise configuration.ConfigError(f"selection.rule=metagradient needs {MIN_ROWS} trusted rows for training, not {num_upper}")
    inner, steering, stopping = (_subset(setup.upper, part) for part in split_trusted(num_upper, config.seed))
    objective, optimizer = configuration.to_objective(config), smooth_optimizer(config, setups.num_steps(config, setup))
    logits, losses = _read(directory / FILE, num_rows)
    shardings = sharding.state_shardings(setup.mesh, _smooth_state(make_state(logits[0]), optimizer), config.mesh.shard_selector)
    it = Iteration(
        config,
        setup,
        program,
        setups.jit_step(config, setup.model, optimizer, shardings, setup.mesh),
        jax.jit(metagradient.make_replay(setup.model, objective, optimizer)),
        jax.jit(metagradient.make_upper_gradient(setup.model)),
        inner,
        scoring.example_segments(steering.examples),
        scoring.example_segments(stopping.examples),
    )
    for j in range(len(losses), config.selection.outer_steps):
        state = _smooth_state(make_state(logits[-1]), optimizer)
        with jax.set_mesh(setup.mesh):
            adapter, past = _train(it, jax.tree.map(sharding.device_put, state, shardings), j)
        loss = scoring.mean_loss(*program.score(setup.base, adapter, it.stopping, "stopping rows"))
        if losses and loss > losses[-1]:
            return logits[-2]
        shape = config.batch.micro_size, config.data.max_length, setup.mesh
        final = metagradient.mean_gradient(it.upper_gradient, setup.base, adapter, it.steering, *shape)
        weights = sharding.replicate(len(logits[-1]) * np.asarray(jax.nn.softmax(logits[-1])), setup.mesh)
        with jax.set_mesh(setup.mesh):
            replay = functools.partial(it.replay, setup.base)
            gradient = metagradient.metagradient(replay, past, weights, final, f"metagradient {j + 1}")
        move = config.selection.learning_rate * gradient / max(np.sqrt(np.mean(gradient**2)), TINY)
        logits.append((logits[-1] - move).astype(np.float32))
        losses.append(loss)
        _write(directory / FILE, logits, losses)
    return logits[-1]

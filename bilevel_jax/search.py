"""Selection by exact metagradients (`selection.rule=metagradient`): weights from the derivative of whole training runs.

The trusted rows are split in three. In outer iteration j a model is trained, with frozen weights w(ω_j), beside the first part; the
second part gives the metagradient g_j = dL0(θ^T)/dw at w(ω_j), see `metagradient`; the third part measures. Then

    z = Σ_j (g_j - mean g_j) / std(g_j),    ω_{j+1} = -c z / (z + 0.1) where z > 0, else -0.01 z;   c = `DROPPED`

so rows that help less than the average row are all but dropped, and the others have nearly equal weights, in the order of z. The
mean is subtracted because the mean of the weights is fixed: to first order, the trusted loss falls where weight moves from rows
above the mean of g to rows below it. Every iteration has an order of the rows of its own, and one more training measures the last
weights: those with the lowest loss on the third part are taken. The run itself follows, with these, beside all trusted rows. An
iteration costs about four runs. Each is written to the workdir as it ends, so an interrupted search goes on with the next one.

The derivative is taken of *smooth training*: with large steps the loss after training is a rough function of the weights, and its
derivative at a point says little about larger changes. So the learning rate falls to 0, with the mean that the run has, and
`SMOOTH_EPS_ROOT` under the root of Adam bounds the steps of parameters whose gradients are small.
"""

import dataclasses
import math
import pathlib
import zipfile
from collections.abc import Callable, Sequence

import jax
import numpy as np
import optax

from bilevel_jax import batches, files, metagradient, online, progress, random_streams, scoring, sharding, train_state
from bilevel_jax import config as configuration
from bilevel_jax import setup as setups
from bilevel_jax.data import levels, packing, shuffle
from bilevel_jax.errors import RunError
from bilevel_jax.runtime import phases

FILE = "metagradient.npz"
SMOOTH_EPS_ROOT = 1e-6
DROPPED = 10.0  # rows that help less than the average have logits down to minus this: weights of e^-10, as good as none
PARTS = 0.5, 0.35  # of the trusted rows: trained on, steering; the rest measures
TINY = 1e-30
REMEDY = "lower optimizer.learning_rate, or inspect the rows"
SEEDS_APART = 1000  # of the orders of rows of two outer iterations


def split_trusted(num_rows: int, seed: int) -> list[np.ndarray]:
    """Indices of the trusted rows that are trained on, that steer, and that measure."""
    order = np.random.default_rng([seed, random_streams.TRUSTED_PARTS]).permutation(num_rows)
    bounds = np.maximum(np.round(np.cumsum(PARTS) * num_rows).astype(int), [1, 2])
    return np.split(order, bounds)


def _subset(level: levels.Level, indices: np.ndarray) -> levels.Level:
    return dataclasses.replace(level, rows=[level.rows[i] for i in indices], examples=[level.examples[i] for i in indices])


@dataclasses.dataclass(frozen=True)
class SearchContext:
    """What every outer iteration works with."""

    config: configuration.Config
    setup: setups.Setup
    program: setups.Program
    train_step: Callable  # compiled, of smooth training
    replay: Callable  # compiled, from `metagradient.make_replay`
    upper_gradient: Callable  # compiled, from `metagradient.make_upper_gradient`
    inner: levels.Level
    steering: list[packing.Segment]
    measuring: list[packing.Segment]


def _train(context: SearchContext, state: train_state.State, j: int, keep: bool):
    """A run with frozen weights.

    Returns:
      θ^T; with `keep`, of each step, the learner before it, its batch, both on the host, and its scales.
    """
    config, setup = dataclasses.replace(context.config, seed=context.config.seed + SEEDS_APART * (j + 1)), context.setup
    layout = context.program.layout
    epoch_steps = shuffle.steps_per_epoch(len(setup.lower.rows), config.batch.size)
    past, empty = [], online.empty(len(setup.lower.rows))
    for k in progress.bar(range(config.num_epochs * epoch_steps), desc=f"metagradient {j + 1}, training", unit="step"):
        batch = batches.make_batch(config, context.inner, setup.lower, layout, k, empty).batch  # on the host
        scales = sharding.replicate(batches.level_scales(config, k // epoch_steps), setup.mesh)
        if keep:
            past.append((jax.tree.map(sharding.to_host, state.policy), batch, scales))
        state, _ = context.train_step(setup.base, state, sharding.put_batch(batch, setup.mesh), scales, None)
    return state.policy.adapter, past


def _measured(context: SearchContext, adapter) -> float:
    """The loss of the trusted rows that measure."""
    return scoring.mean_loss(*context.program.score(context.setup.base, adapter, context.measuring, "trusted rows that measure"))


def _comparable(loss: float, j: int) -> float:
    """The loss of iteration j; infinity, so that earlier weights are taken, where training with new weights diverged.

    Raises:
      RunError: training with equal weights diverged.
    """
    if math.isfinite(loss):
        return loss
    if not j:
        raise RunError(f"selection.rule=metagradient: the loss of the trusted rows is {loss} with equal weights; {REMEDY}")
    return math.inf


def _metagradient(context: SearchContext, logits: np.ndarray, adapter, past: list, j: int) -> np.ndarray:
    """g_j [N], of the run that ended with θ^T."""
    config, setup = context.config, context.setup
    shape = config.batch.micro_size, config.data.max_length, setup.mesh
    final = metagradient.mean_gradient(context.upper_gradient, setup.base, adapter, context.steering, *shape)
    weights = sharding.replicate(row_weights(config, logits), setup.mesh)

    def replay(learner, weight_N, batch, scales, adjoint):
        return context.replay(setup.base, learner, weight_N, sharding.put_batch(batch, setup.mesh), scales, adjoint)

    with jax.set_mesh(setup.mesh):
        gradient = metagradient.metagradient(replay, past, weights, final, f"metagradient {j + 1}")
    if not np.isfinite(gradient).all():
        raise RunError(f"selection.rule=metagradient: metagradient {j + 1} is not finite; {REMEDY}")
    return gradient


def row_weights(config: configuration.Config, logits: np.ndarray) -> np.ndarray:
    """The weights w [N] that a step gives to rows with these logits."""
    return configuration.to_selector(config).scale(len(logits)) * np.asarray(jax.nn.softmax(logits))


def to_logits(gradients: Sequence[np.ndarray], num_rows: int) -> np.ndarray:
    """The logits ω_j [N] that follow from the metagradients g_0 ... g_{j-1}, [N] each; 0 without one."""
    z = np.zeros(num_rows)
    for gradient in np.asarray(gradients, np.float64):
        z += (gradient - gradient.mean()) / max(gradient.std(), TINY)
    harmful = np.maximum(z, 0.0)
    return (-DROPPED * harmful / (harmful + 0.1) - 0.01 * np.minimum(z, 0.0)).astype(np.float32)


def _write(file: pathlib.Path, identity: str, gradients: list[np.ndarray], losses: list[float]) -> None:
    with files.replacing(file) as out:
        np.savez(out, gradients=np.array(gradients), losses=np.array(losses), identity=identity)


def _read(file: pathlib.Path, identity: str) -> tuple[list[np.ndarray], list[float]]:
    """The metagradients g_0 ... and the measured losses of the iterations that are done; none of another identity.

    Raises:
      RunError: the file is damaged, or of an earlier version.
    """
    if not file.exists():
        return [], []
    try:
        stored = np.load(file)
        gradients, losses = list(stored["gradients"]), list(stored["losses"])
        is_same = str(stored["identity"]) == identity
    except (OSError, EOFError, ValueError, LookupError, zipfile.BadZipFile) as error:
        raise RunError(f"{file}: not the state of a search ({error}); remove it, and the search begins again") from error
    if is_same:
        return gradients, losses
    phases.announce(f"{file.name} is of other rows, another model or other settings, so the search begins again")
    return [], []


def _smooth_state(state: train_state.State, optimizer: optax.GradientTransformation) -> train_state.State:
    """A run's state before its first step, with the state of another optimizer."""
    return state._replace(policy=train_state.Learner(state.policy.adapter, optimizer.init(state.policy.adapter)))


def smooth_optimizer(config: configuration.Config, num_steps: int) -> optax.GradientTransformation:
    """The optimizer of smooth training."""
    rate = config.optimizer.learning_rate * (2 if config.optimizer.schedule == "constant" else 1)  # the mean rate stays
    settings = dataclasses.replace(config.optimizer, learning_rate=rate, schedule="linear")
    return configuration.to_optimizer(dataclasses.replace(config, optimizer=settings), num_steps, SMOOTH_EPS_ROOT)


def search(
    config: configuration.Config,
    setup: setups.Setup,
    program: setups.Program,
    make_state: Callable,
    directory: pathlib.Path,
    identity: str,
) -> np.ndarray:
    """The logits ω [N] of the run.

    Args:
      program: of the run.
      make_state: `logits -> State`, the state of a run before its first step.
      directory: where the iterations are written, and read again.
      identity: of rows, model and settings; iterations of another one are not read.

    Raises:
      RunError: a run of the search diverged, or the file of the iterations is damaged.
    """
    num_rows = len(setup.lower.rows)
    inner, steering, measuring = (_subset(setup.upper, part) for part in split_trusted(len(setup.upper.rows), config.seed))
    objective, optimizer = configuration.to_objective(config), smooth_optimizer(config, configuration.num_steps(config, num_rows))
    gradients, losses = _read(directory / FILE, identity)
    start = _smooth_state(make_state(to_logits([], num_rows)), optimizer)
    shardings = sharding.state_shardings(setup.mesh, start, config.mesh.shard_selector)
    context = SearchContext(
        config,
        setup,
        program,
        setups.jit_step(config, setup.model, optimizer, shardings, setup.mesh),
        jax.jit(metagradient.make_replay(setup.model, objective, optimizer)),
        jax.jit(metagradient.make_upper_gradient(setup.model)),
        inner,
        scoring.example_segments(steering.examples),
        scoring.example_segments(measuring.examples),
    )
    while len(losses) <= len(gradients):  # weights that are not measured
        j = len(losses)
        logits = to_logits(gradients[:j], num_rows)
        state = jax.tree.map(sharding.device_put, _smooth_state(make_state(logits), optimizer), shardings)
        differentiated = j < config.selection.outer_steps
        with jax.set_mesh(setup.mesh):
            adapter, past = _train(context, state, j, keep=differentiated)
        losses.append(_comparable(_measured(context, adapter), j))
        if differentiated and losses[j] == min(losses):
            gradients.append(_metagradient(context, logits, adapter, past, j))
        _write(directory / FILE, identity, gradients, losses)
    best = int(np.argmin(losses))
    measured = ", ".join(f"{loss:.4f}" for loss in losses)
    phases.announce(
        f"loss of {len(context.measuring)} trusted rows with equal weights, then by metagradient: {measured}; "
        f"number {best + 1} is taken"
    )
    return to_logits(gradients[:best], num_rows)

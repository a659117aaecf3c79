"""The optimizer of θ against its formulas in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel_jax import optimizer
from bilevel_jax.optimizer import Settings

PEAK, STEPS = 0.3, 20


def rate_by_hand(k, schedule, warmup):
    rising = math.ceil(warmup * STEPS) if warmup < 1 else warmup
    if k < rising:
        return PEAK * (k + 1) / rising
    done = (k - rising) / (STEPS - rising)
    return PEAK * {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]


@pytest.mark.parametrize("warmup", [0.0, 0.12, 5])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedule(schedule, warmup):
    """Steps of plain gradient descent along a gradient of 1 are the rates."""
    descent = optimizer.make(Settings("sgd", PEAK, schedule, warmup), STEPS)
    state, rates = descent.init(jnp.zeros(())), []
    for _ in range(STEPS):
        update, state = descent.update(jnp.ones(()), state)
        rates.append(-float(update))
    np.testing.assert_allclose(rates, [rate_by_hand(k, schedule, warmup) for k in range(STEPS)], rtol=1e-5)


@pytest.mark.parametrize(
    "warmup, num_steps, expected", [(0.07, 100, 7), (0.28, 25, 7), (0.55, 180, 99), (0.12, 25, 3), (0.13, 25, 4)]
)
def test_a_share_of_the_steps(warmup, num_steps, expected):
    """⌈warmup · steps⌉ in decimal numbers; 0.07 · 100 in binary ones is above 7."""
    assert optimizer.warmup_steps(Settings("sgd", PEAK, "linear", warmup), num_steps) == expected


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_adam(clip, decay):
    """Three steps on two arrays: one norm of both, means of the clipped gradients, decay beside the update."""
    rng = np.random.default_rng(0)
    theta = {"a": rng.normal(size=3), "b": rng.normal(size=(2, 2))}
    gradients = [{"a": rng.normal(size=3) * size, "b": rng.normal(size=(2, 2)) * size} for size in (0.1, 3.0, 1.0)]
    b1, b2 = 0.8, 0.95
    made = optimizer.make(Settings("adamw", PEAK, b1=b1, b2=b2, weight_decay=decay, clip_norm=clip), STEPS)
    params = jax.tree.map(jnp.float32, theta)
    state = made.init(params)
    mean, square = ({key: np.zeros_like(value) for key, value in theta.items()} for _ in range(2))
    for t, gradient in enumerate(gradients, 1):
        updates, state = made.update(jax.tree.map(jnp.float32, gradient), state, params)
        params = optax.apply_updates(params, updates)
        norm = math.sqrt(sum(float(np.sum(g**2)) for g in gradient.values()))
        for key, g in gradient.items():
            g = g * min(1.0, clip / norm) if clip else g
            mean[key] = b1 * mean[key] + (1 - b1) * g
            square[key] = b2 * square[key] + (1 - b2) * g**2
            step = mean[key] / (1 - b1**t) / (np.sqrt(square[key] / (1 - b2**t)) + 1e-8)
            theta[key] = theta[key] - PEAK * (step + decay * theta[key])
    for key, value in theta.items():
        np.testing.assert_allclose(params[key], value, rtol=2e-5, atol=1e-6)


def test_without_options_it_is_the_one_of_optax():
    """So runs without them keep their bits, and their checkpoints their layout."""
    for name in ("adam", "sgd"):
        ours, theirs = optimizer.make(Settings(name, PEAK), STEPS), getattr(optax, name)(PEAK)
        states = [one.init(jnp.ones(3)) for one in (ours, theirs)]
        assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
        updates = [one.update(jnp.arange(3.0), state)[0] for one, state in zip((ours, theirs), states)]
        np.testing.assert_array_equal(*updates)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be positive"),
        ({"schedule": "step"}, "schedule='step' must be among constant, cosine, linear"),
        ({"warmup": 1.5}, "warmup=1.5 must be a number of steps, or a share below 1"),
        ({"warmup": -0.1}, "warmup=-0.1"),
        ({"b2": 1.0}, r"b2=1.0 must be in \[0, 1\)"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0 must be at least 0"),
        ({"weight_decay": 0.1}, "weight_decay=0.1 has no effect with name=adam; take name=adamw"),
    ],
)
def test_refuses(changes, reason):
    with pytest.raises(ValueError, match=reason):
        Settings(**changes)


def test_refuses_a_warmup_as_long_as_the_run():
    with pytest.raises(ValueError, match="warmup=20 reaches to the end of this run of 20 steps"):
        optimizer.make(Settings(warmup=20), STEPS)

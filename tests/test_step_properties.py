"""The compiled step against float64 NumPy, on random configurations, rows, responses and states.

A configuration is compiled once and takes several steps from each of several random states. The long test has 2 000 cases,
`pytest -m long tests/test_step_properties.py`; `-k "long and 17"` is one of its configurations. A failing case is one line with the
seed, the draw and the config keys.
"""

import numpy as np
import pytest

from bilevel_jax.config import Config
from tests import step_cases, step_reference

CONFIGURATIONS, DRAWS, STEPS = 50, 40, 5  # of the long test; steps from one state
QUICK = (2, 15)  # configurations and draws of the quick one
DEFAULTS = step_cases.values_of(Config())
FOCUS = [  # every name of every key but the default is in one configuration at least
    (key, value)
    for key, values in step_cases.VALUES.items()
    for value in values
    if isinstance(value, (str, bool)) and value != DEFAULTS[key]
]
EXACT = 2e-6  # relative error of arithmetic in float32
SUMS = 3e-5  # of losses and gradients, relative to the largest entry


def actual(after, metrics, num_entries: int) -> dict[str, np.ndarray]:
    """The results of the compiled step, named as those of the reference."""
    result = {name: np.asarray(value, float) for name, value in metrics.items()}
    result |= {name: result[name][:num_entries] for name in ("row_loss", "log_ratio", "response_weight")}
    for kind in ("policy", "tracker"):
        if (learner := getattr(after, kind)) is None:
            continue
        result[f"{kind}: θ"] = step_reference.flat(learner.adapter)
        if (moments := step_reference.moments(learner.optimizer)) is not None:
            result |= {f"{kind}: mu": moments[0], f"{kind}: nu": moments[1]}
    omega = after.selector
    for name in ("visits", "data_visits", "surprise", "harm", "baseline"):
        result[f"selector: {name}"] = np.asarray(getattr(omega, name), float)
    result["selector: ω"] = np.asarray(omega.logits, float)
    if omega.feature_params is not None:
        result["selector: φ"] = np.asarray(omega.feature_params, float)
    if (moments := step_reference.moments(omega.optimizer)) is not None:
        result |= {"selector: mu of ω": moments[0], "selector: nu of ω": moments[1]}
    if after.token_params is not None:
        result["φ of tokens"] = np.asarray(after.token_params, float)
    if after.influence is not None:
        result["influence: upper_mean"] = step_reference.flat(after.influence.upper_mean)
        for name in ("influence_square", "surprise_mean", "surprise_square", "correlation"):
            result[f"influence: {name}"] = np.asarray(getattr(after.influence, name), float)
    return result


def difference(name: str, value, expected, noise: float) -> str:
    """What is wrong with a result, or an empty text."""
    if value.shape != expected.shape:
        return f"{name} has shape {value.shape} and not {expected.shape}"
    if (np.isnan(value) != np.isnan(expected)).any():
        return f"{name} is {value} and not {expected}"
    apart, size = (np.where(np.isnan(expected), 0.0, np.abs(x)) for x in (value - expected, expected))
    allowed = EXACT + noise + SUMS * float(size.max(initial=0.0))
    worst = int(np.argmax(apart)) if apart.size else 0
    if not apart.size or apart.flat[worst] <= allowed:
        return ""
    return f"{name}[{worst}] is {value.flat[worst]:.7g} and not {expected.flat[worst]:.7g}, tolerance {allowed:.1e}"


def check(focus, seed: int, draws: int) -> None:
    """Compares `draws` steps of one configuration."""
    rng = np.random.default_rng(seed)
    config, num_rows = step_cases.draw_config(rng, focus), int(rng.integers(2, 8))
    compiled, draw = None, 0
    while draw < draws:
        chain = step_cases.Chain(config, num_rows, np.random.default_rng((seed, draw)))
        compiled = compiled or step_cases.compile_step(chain)
        for k in range(min(STEPS, chain.num_steps, draws - draw)):
            if wrong := take_step(chain, compiled, k):
                where = f"seed={seed} draw={draw} step={k} rows={num_rows} {step_cases.changes(config)}"
                pytest.fail(f"{where}: {wrong}", pytrace=False)
            draw += 1


def take_step(chain, compiled, k: int) -> str:
    """Takes step k of a chain; returns what is wrong with it, or an empty text."""
    batch, scales, inputs = chain.inputs(k)
    after, metrics = compiled(step_cases.base(), chain.state, batch, scales, chain.features)
    expected, noise = step_reference.predict(inputs, chain.state, after, k)
    result = actual(after, metrics, len(inputs.entries))
    chain.state = after
    if missing := sorted(result.keys() - expected.keys()):
        return f"{missing[0]} is not compared"
    wrong = (difference(name, result[name], expected[name], noise.get(name, 0.0)) for name in expected)
    return next(filter(None, wrong), "")


def test_every_key_is_drawn_or_named():
    """A new key of the config is added to one of the two tables."""
    named = {key for keys in step_cases.NOT_DRAWN.values() for key in keys.split()}
    assert named.isdisjoint(step_cases.VALUES)
    assert named | step_cases.VALUES.keys() == step_cases.all_keys()


@pytest.mark.parametrize("seed", range(QUICK[0]))
def test_quick(seed):
    check(None, 1000 + seed, QUICK[1])


def test_generated_pairs():
    """Some of them are longer than `data.max_length`."""
    check(("online.objective", "dpo"), 25, 3)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(CONFIGURATIONS))
def test_long(seed):
    check(FOCUS[seed % len(FOCUS)], seed, DRAWS)

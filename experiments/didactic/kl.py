"""Forward and reverse KL: the modes of a target that a policy covers, with exact gradients and from samples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax import preferences
from experiments.didactic import bandits, objectives

TITLE = "Forward and reverse KL: covering and seeking modes"
VERDICT = (
    "holds where the policy cannot represent the target; reverse KL takes the mode nearer its start, not the heavier one; "
    "a table, which can represent it, ends at the target with either"
)
SEEDS, BINS, STEPS, RATE, SAMPLES = 8, bandits.BINS, 1000, 0.05, 64
STARTS = {"left": 12.0, "right": 36.0}  # centres of the bells that policies start from
X = (np.arange(BINS) - (BINS - 1) / 2) / 8
# Features of policies with one bell; columns of zeros give them the shape of a table, and so its compilation.
BELL = np.pad(np.stack([X, X**2], 1), ((0, 0), (0, BINS - 2)))
KINDS = ("forward", "reverse", "weighted", "on-policy")


def target(seed: int) -> np.ndarray:
    """Two bells, the heavier on a random side, [B]."""
    rng = np.random.default_rng((seed, 11))
    weight, centres, width = rng.uniform(0.55, 0.7), rng.uniform([11, 33], [15, 37]), rng.uniform(2, 3)
    bells = np.exp(-0.5 * ((np.arange(BINS) - centres[:, None]) / width) ** 2)
    mixed = (np.array([weight, 1 - weight])[:: rng.choice([-1, 1])] @ bells) + 1e-6
    return mixed / mixed.sum()


def loss(kind: str, log_policy, log_target, sample) -> jax.Array:
    """Loss of one step: the divergence, or an estimate from one group of samples."""
    if kind == "forward":
        return jnp.exp(log_target) @ (log_target - log_policy)
    if kind == "reverse":
        return jnp.exp(log_policy) @ (log_policy - log_target)
    group, share = jnp.zeros(SAMPLES, jnp.int32), jnp.full(SAMPLES, 1 / SAMPLES)
    if kind == "weighted":  # samples are uniform, reward-weighted regression makes them those of the target
        weight = preferences.reward_weighted(log_target[sample], group, 1.0)
    else:
        reward = log_target[sample] - jax.lax.stop_gradient(log_policy[sample])
        weight = preferences.leave_one_out(reward, group)
    return objectives.likelihood(log_policy[sample], weight, share)


@functools.partial(jax.jit, static_argnames="kind")
def fit(kind: str, features, targets, starts):
    """Adam from every start to every target, [S, B] probabilities."""
    optimizer = optax.adam(optax.linear_schedule(RATE, 0, STEPS))

    def one(log_target, start, key):
        def log_policy(theta):
            return jax.nn.log_softmax(features @ theta)

        def step(carry, k):
            theta, state = carry
            behaviour = jnp.exp(log_policy(theta)) if kind == "on-policy" else jnp.full(BINS, 1 / BINS)
            sample = bandits.draw(behaviour, jax.random.uniform(jax.random.fold_in(key, k), (SAMPLES,)))
            slope = jax.grad(lambda theta: loss(kind, log_policy(theta), log_target, sample))(theta)
            moves, state = optimizer.update(slope, state)
            return (theta + moves, state), None

        (theta, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), jnp.arange(STEPS))
        return jnp.exp(log_policy(theta))

    return jax.vmap(one)(jnp.log(targets), starts, jax.vmap(jax.random.key)(jnp.arange(len(targets))))


def bell(centre: float, deviation: float) -> np.ndarray:
    """θ of the bell with this centre and standard deviation, in bins."""
    x, precision = (centre - (BINS - 1) / 2) / 8, (8 / deviation) ** 2
    return precision * np.pad([x, -0.5], (0, BINS - 2))


def describe(policy_SxB, targets_SxB) -> dict[str, np.ndarray]:
    """Measures that distinguish mode covering from mode seeking, [S] each."""
    x = np.arange(BINS)
    mean, aim = policy_SxB @ x, targets_SxB @ x
    return {
        "valley": policy_SxB[:, 20:29].sum(1),  # mass between the modes
        "left": policy_SxB[:, :24].sum(1),
        "mean": mean - aim,
        "deviation": np.sqrt(policy_SxB @ x**2 - mean**2) / np.sqrt(targets_SxB @ x**2 - aim**2),
        "distance": 0.5 * np.abs(policy_SxB - targets_SxB).sum(1),
    }


def measure() -> dict:
    targets = np.stack([target(seed) for seed in range(SEEDS)])
    twice = np.concatenate([targets, targets])
    starts = np.repeat([bell(centre, 6.0) for centre in STARTS.values()], SEEDS, 0)
    policies = {kind: np.asarray(fit(kind, BELL, twice, starts), np.float64) for kind in KINDS}  # [left, then right, B]
    table = {kind: np.asarray(fit(kind, np.eye(BINS), twice, 0 * starts), np.float64) for kind in KINDS[:2]}
    return {
        "curves": {"targets": targets, **policies},
        "measures": {kind: describe(policy, twice) for kind, policy in policies.items()},
        "target": describe(targets, targets),
        "table": {kind: describe(policy, twice)["distance"] for kind, policy in table.items()},
    }


def paragraph(results: dict) -> str:
    target, names = results["target"], {"forward": "forward KL, exact", "weighted": "reward-weighted regression, samples"}
    names |= {"reverse": "reverse KL, exact", "on-policy": "REINFORCE on log q - log π, on-policy samples"}
    rows = []
    for kind in ("forward", "weighted", "reverse", "on-policy"):
        m = results["measures"][kind]
        ends = (m["left"][:SEEDS] > 0.9).sum(), (m["left"][SEEDS:] < 0.1).sum()
        rows.append(
            f"| {names[kind]} | {m['valley'].mean():.3f} | {m['deviation'].mean():.2f} | {np.abs(m['mean']).max():.2f} "
            f"| {ends[0]} and {ends[1]} of {SEEDS} |"
        )
    table = "\n".join(rows)
    heavier = (target["left"] > 0.5).sum()
    return f"""\
{SEEDS} random targets of two bells, fitted by policies of one bell (logits θ·(x, x²)) that start as a bell on the left, and again
on the right. The targets have {target["valley"].max():.3f} or less of their mass between the modes.

| objective | mass between the modes | deviation over the target's | farthest mean | ends where it started, left and right |
| --- | --- | --- | --- | --- |
{table}

Maximum likelihood, exact or by reward-weighted samples of a uniform reference, matches mean and deviation, as it must in an
exponential family, and so puts most where the target has nothing. The policy gradient picks one mode. Which one, its start
decides: the left one is the heavier in {heavier} of {SEEDS} targets. A table of logits, which can be any distribution, ends
within {max(d.max() for d in results["table"].values()):.4f} (total variation) of the target with either divergence: covering and
seeking are about policies that cannot, or do not have the time to, become the target."""


def draw(figure, results: dict) -> None:
    curves = results["curves"]
    left, right = figure.subplots(1, 2)
    left.fill_between(np.arange(BINS), curves["targets"][0], color="0.85", label="target")
    left.plot(curves["forward"][0], color=bandits.COLOURS["best-of-G"], label="forward KL")
    left.plot(curves["reverse"][0], color=bandits.COLOURS["DPO"], label="reverse KL, start left")
    left.plot(curves["reverse"][SEEDS], "--", color=bandits.COLOURS["DPO"], label="reverse KL, start right")
    left.set_ylim(0, 1.5 * curves["reverse"][[0, SEEDS]].max())
    left.set_xlabel("bin")
    left.set_ylabel("probability")
    left.legend(fontsize=8, ncols=2, loc="upper center")
    marks = {"forward": "o", "weighted": "s", "reverse": "^", "on-policy": "v"}
    for kind, mark in marks.items():
        m = results["measures"][kind]
        colour = bandits.COLOURS["best-of-G" if kind in ("forward", "weighted") else "DPO"]
        filled = {"markerfacecolor": "none"} if kind in ("weighted", "on-policy") else {}
        label = {"weighted": "RWR, samples", "on-policy": "REINFORCE, samples"}.get(kind, f"{kind} KL, exact")
        right.plot(m["deviation"], m["valley"], mark, color=colour, label=label, **filled)
    right.set_xlabel("standard deviation over the target's")
    right.set_ylabel("mass between the modes")
    right.legend(fontsize=8, loc="upper left")

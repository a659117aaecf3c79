"""The joint step against its objective written out: every row by itself, all logits, no packing, no micro-batches."""

import dataclasses
import functools
import math
import pathlib

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel_jax import forward, online, scoring, sharding, step, train_state
from bilevel_jax.data import packing
from bilevel_jax.data.packing import Layout, Segment
from bilevel_jax.models import decoder, huggingface, lora, model_config
from bilevel_jax.objective import Objective
from bilevel_jax.selector import Selector
from bilevel_jax.train_state import Scales

SHAPE = dict(vocab_size=48, hidden_size=16, num_layers=2, num_heads=4, head_dim=4, max_positions=64, norm_eps=1e-5)
LLAMA = model_config.ModelConfig(
    "llama", intermediate_size=24, num_kv_heads=2, rotary_dim=4, activation="silu", rope_theta=1e4,
    tie_embeddings=True, adapter_scale=2.0, **SHAPE,
)  # fmt: skip
NEOX = model_config.ModelConfig(
    "gpt_neox", intermediate_size=32, num_kv_heads=4, rotary_dim=2, activation="gelu", rope_theta=1e4,
    parallel_residual=True, attention_bias=True, mlp_bias=True, adapter_scale=0.5, **SHAPE,
)  # fmt: skip
CONFIGS = pytest.mark.parametrize("config", [LLAMA, NEOX], ids=["llama", "gpt_neox"])

N = 6
OMEGA = np.array([0.4, -0.8, 0.0, 1.1, -0.3, 0.6], np.float32)
RATE, ALPHA, GAMMA = 0.5, 0.7, 0.6  # learning rates of θ and ω, penalty
SGD = optax.sgd(RATE, momentum=0.9)  # the first step is plain gradient descent
MIRROR = Selector("bds", "mirror", ALPHA, baseline="none")  # moves a visited logit by -αγC: C can be read off
PAPER = Objective()  # C at θ^{k+1}, v(ω) ≡ 0, token means
LAYOUT = Layout(sequences=2, length=16, entries=8)
UPPER_SIZES, LOWER_SIZES = [(3, 4), (5, 2), (2, 9)], [(4, 3), (0, 7), (1, 10), (6, 1)]  # (prompt, response)
SAMPLES = (4, 1, 0, 3)  # ω's rows of the lower batch
WITNESS_LENGTH = 16  # of every row that the witness computes: one compilation


def jitter(tree, seed, std):
    """The tree with noise on every leaf, so that no bias is zero, no norm weight one, and no B of the adapter zero."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [jnp.array(x + np.float32(rng.normal(0, std, x.shape))) for x in leaves])


@functools.cache
def model(config):
    init = jax.jit(decoder.init_params, static_argnums=0)
    return jitter(init(config, jax.random.key(0)), 1, 0.25), make_adapter(config, 2)


def make_adapter(config, seed):
    targets = lora.resolve_targets(config, "all-linear")
    return jitter(lora.init_adapter(config, jax.random.key(seed), 3, targets), seed, 0.1)


def segment(rng, prompt, response, **role):
    ids = rng.integers(1, SHAPE["vocab_size"], prompt + response).astype(np.int32)
    return Segment(ids[:prompt], ids[prompt:], **role)


@functools.cache
def rows(upper_sizes=tuple(UPPER_SIZES), lower_sizes=tuple(LOWER_SIZES), samples=SAMPLES):
    rng = np.random.default_rng(3)
    upper = [segment(rng, *size, share=1 / len(upper_sizes)) for size in upper_sizes]
    lower = [segment(rng, *size, row_index=i, share=1 / len(samples)) for size, i in zip(lower_sizes, samples)]
    return upper, lower


def pack(upper, lower, layout=LAYOUT, num_lower=None):
    return packing.pack_step([*upper, *lower], N, num_lower or len(lower), layout)


def pack_padded(upper, lower, layout=LAYOUT, num_lower=None):
    """One segment per sequence, or one preference pair; the longest first."""
    segments, sequences = [*upper, *lower], {}
    for i, row in enumerate(segments):
        sequences.setdefault((row.row_index >= 0, row.group if row.sign else -1 - i), []).append(i)
    bins = sorted(sequences.values(), key=lambda members: -sum(segments[i].size for i in members))
    return packing.pack_bins(segments, bins, N, num_lower or len(lower), layout)


def begin(config, selector=MIRROR, omega=OMEGA, tracked=None):
    """A state of its own, to be donated to the step."""
    adapter = jax.tree.map(jnp.copy, model(config)[1])
    state = train_state.init(adapter, SGD, PAPER, selector, N)
    if tracked is not None:
        state = state._replace(tracker=train_state.Learner(jax.tree.map(jnp.copy, tracked), SGD.init(tracked)))
    return state._replace(selector=state.selector._replace(logits=jnp.array(omega)))


def compiled(config, objective=PAPER, selector=MIRROR):
    return _compiled(config, objective, selector)


@functools.cache
def _compiled(config, objective, selector):
    return jax.jit(step.make_step(config, objective, selector, SGD), donate_argnums=1)


# --------------------------------------------------------------------------------------------------------------------
# The witness
# --------------------------------------------------------------------------------------------------------------------


def _token_nll(config, base, adapter, tokens):
    log_probs = jax.nn.log_softmax(decoder.logits(config, base, adapter, tokens[None, :-1])[0])
    return -jnp.take_along_axis(log_probs, tokens[1:, None], axis=1)[:, 0]


@jax.jit(static_argnums=0)
def _response_nll(config, base, adapter, tokens, is_response):
    return jnp.sum(jnp.where(is_response[1:], _token_nll(config, base, adapter, tokens), 0.0))


def padded(row, length=WITNESS_LENGTH):
    """The tokens of a row alone in a sequence, and which of them are its response. One length, so that one program serves all."""
    tokens, position = np.zeros(length, np.int32), np.arange(length)
    tokens[: row.size] = np.concatenate([row.prompt, row.response])
    return tokens, (position >= len(row.prompt)) & (position < row.size)


def response_nll(config, adapter, row):
    """Summed NLL of one row's response. The padding after it has no part in the NLL."""
    return _response_nll(config, model(config)[0], adapter, *padded(row))


def num_predicted(row):
    return len(row.response) if len(row.prompt) else len(row.response) - 1


def row_loss(config, adapter, row, reduction="mean"):
    nll = response_nll(config, adapter, row)
    return nll / num_predicted(row) if reduction == "mean" else nll


def surprise(config, adapter, row):
    """(mean_t nll_t^4)^(1/4) over the predicted tokens of the response, in float64."""
    tokens, is_response = padded(row)
    nll = np.asarray(_token_nll(config, model(config)[0], adapter, tokens), np.float64)[is_response[1:]]
    return np.mean(nll**4) ** 0.25


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def upper_loss(config, adapter, upper, reduction="mean"):
    return mean(row_loss(config, adapter, row, reduction) for row in upper)


def weighted_loss(config, adapter, lower, weights, reduction="mean"):
    return mean(weights[row.row_index] * row_loss(config, adapter, row, reduction) for row in lower)


def theta_loss(config, adapter, upper, lower, scales, weights, reduction="mean"):
    """(7): what θ descends."""
    lower_part = weighted_loss(config, adapter, lower, weights, reduction)
    return scales.upper * upper_loss(config, adapter, upper, reduction) + scales.lower * lower_part


def softmax(logits):
    return np.exp(logits) / np.sum(np.exp(logits))


def descend(adapter, loss):
    """One step of gradient descent, and the gradient."""
    gradient = jax.grad(loss)(adapter)
    return jax.tree.map(lambda x, g: x - RATE * g, adapter, gradient), gradient


@functools.cache
def update_by_hand(config):
    """(θ, ω) after one step of `PAPER` and `MIRROR` on `rows()` at γ = GAMMA."""
    upper, lower = rows()
    scales, weights = Scales(1.0, GAMMA), N * softmax(OMEGA)
    theta, _ = descend(model(config)[1], lambda adapter: theta_loss(config, adapter, upper, lower, scales, weights))
    omega = OMEGA.copy()
    for row in lower:
        omega[row.row_index] -= ALPHA * GAMMA * row_loss(config, theta, row)
    return theta, omega


def assert_close(actual, expected, atol=3e-6, rtol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), actual, expected)


# --------------------------------------------------------------------------------------------------------------------
# θ
# --------------------------------------------------------------------------------------------------------------------


def test_a_batch_without_a_token_to_predict_moves_nothing():
    """Responses of one token without a question before it, as without a template; none of it is 0/0."""
    rng = np.random.default_rng(0)
    upper = [segment(rng, 0, 1, share=1.0)]
    own = {"group": 2, "old_log_prob": 0.0}
    lower = [segment(rng, 0, 1, row_index=4, share=0.5), *(segment(rng, 0, 1, row_index=1, share=0.25, **own) for _ in range(2))]
    batch = packing.pack_step([*upper, *lower], N, 2, LAYOUT)
    advance = compiled(LLAMA, Objective(response_weight="geometric"))
    state, result = advance(model(LLAMA)[0], begin(LLAMA), batch, Scales(1.0, GAMMA))
    assert result["loss"] == result["gradient_norm"] == result["response_tokens"] == 0
    assert_close(state.policy.adapter, model(LLAMA)[1], atol=0, rtol=0)
    np.testing.assert_array_equal(state.selector.logits, OMEGA)
    np.testing.assert_array_equal(state.selector.visits, [0, 1, 0, 0, 1, 0])


@pytest.mark.parametrize("scales", [Scales(0.7, 0.3), Scales(1.0, GAMMA)], ids=["mixing", "offline"])
@pytest.mark.parametrize("config, reduction", [(LLAMA, "mean"), (NEOX, "mean"), (NEOX, "sum")])
def test_theta_follows_the_gradient_of_the_objective(config, reduction, scales):
    upper, lower = rows()
    adapter, omega = model(config)[1], np.zeros(N) if scales.upper < 1 else OMEGA
    args = upper, lower, scales, N * softmax(omega), reduction
    expected, gradient = descend(adapter, lambda adapter: theta_loss(config, adapter, *args))
    state = begin(config, omega=np.float32(omega))
    advance = compiled(config, Objective(reduction=reduction))
    after, metrics = advance(model(config)[0], state, pack(upper, lower), scales)

    scale = 1 if reduction == "mean" else 10  # the size of a summed loss, and of float32's errors in it
    moved = jax.tree.map(lambda x, y: (x - y) / RATE, adapter, after.policy.adapter)
    assert_close(moved, gradient, atol=3e-6 * scale)
    assert_close(after.policy.adapter, expected, atol=2e-6 * scale)
    assert after.step == 1

    losses = [row_loss(config, adapter, row, reduction) for row in upper + lower]
    witness = {
        "loss": theta_loss(config, adapter, *args),
        "upper_loss": mean(losses[: len(upper)]),
        "lower_loss": mean(losses[len(upper) :]),
        "gradient_norm": np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradient))),
        "response_tokens": 4 + 2 + 9 + 3 + 6 + 10 + 1,  # the row without a prompt has one less than it is long
        "row_loss": np.append(losses, 0.0),
    }
    assert_close({key: metrics[key] for key in witness}, witness)
    assert np.isnan(metrics["log_ratio"]).all() and (np.asarray(metrics["response_weight"]) == 1).all()  # none of its own


@pytest.mark.parametrize("config", [LLAMA, NEOX], ids=["tied", "not tied"])
def test_all_weights_follow_the_gradient_of_the_objective(config):
    """Without an adapter: embedding, head, norms and biases too. The base is not what is computed with."""
    upper, lower = rows()
    params, weights = model(config)[0], N * softmax(OMEGA)

    def loss_of(row, params):
        return _response_nll(config, params, None, *padded(row)) / num_predicted(row)

    def objective(params):
        below = mean(weights[row.row_index] * loss_of(row, params) for row in lower)
        return mean(loss_of(row, params) for row in upper) + GAMMA * below

    gradient = jax.grad(objective)(params)
    state = train_state.init(jax.tree.map(jnp.copy, params), SGD, PAPER, MIRROR, N)
    state = state._replace(selector=state.selector._replace(logits=jnp.array(OMEGA)))
    another_base = jax.tree.map(jnp.zeros_like, params)
    advance = jax.jit(step.make_step(config, PAPER, MIRROR, SGD))  # of its own: `compiled` counts its programs
    after, metrics = advance(another_base, state, pack(upper, lower), Scales(1.0, GAMMA))
    assert_close(metrics["loss"], objective(params))
    moved = jax.tree.map(lambda x, y: (x - y) / RATE, params, after.policy.adapter)
    assert_close(moved, gradient, atol=1e-5)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
    omega = OMEGA.copy()
    for row in lower:
        omega[row.row_index] -= ALPHA * GAMMA * loss_of(row, after.policy.adapter)
    np.testing.assert_allclose(after.selector.logits, omega, rtol=1e-5, atol=1e-5)


def test_dropout_is_of_the_step():
    """A step has one dropout: it repeats to the bit, other steps and other seeds have others; a vote is of its gradients."""
    config = dataclasses.replace(LLAMA, adapter_dropout=0.4)
    upper, lower = rows()
    base, seeds = model(config)[0], [jax.jit(step.make_step(config, INFLUENCE, MIRROR, SGD, seed)) for seed in (0, 1)]

    def take(advance, k, scales, logits):
        state = begin_influence(SGD)
        selector = state.selector._replace(logits=jnp.array(logits, jnp.float32))
        return advance(base, state._replace(step=jnp.int32(k), selector=selector), pack(upper, lower), scales)

    def gradient(scales, logits):
        """What the step descends, from the way it went."""
        after, _ = take(seeds[0], 0, scales, logits)
        return jax.tree.map(lambda x, y: np.asarray(x - y) / RATE, model(config)[1], after.policy.adapter)

    tries = [take(seeds[i], k, Scales(1.0, GAMMA), np.zeros(N)) for i, k in ((0, 0), (0, 0), (0, 1), (1, 0))]
    losses = [float(metrics["loss"]) for _, metrics in tries]
    assert losses[0] == losses[1] and len(set(losses)) == 3
    above = gradient(Scales(1.0, 0.0), np.zeros(N))
    below = [gradient(Scales(0.0, 1.0), 60.0 * (np.arange(N) == row.row_index)) for row in lower]
    change, after = np.array([-vote(one, above) for one in below]), tries[0][0]
    assert_close(after.influence.upper_mean, jax.tree.map(lambda x: 0.1 * x, above))
    harm = np.asarray(after.selector.harm)[[row.row_index for row in lower]]
    np.testing.assert_allclose(harm, np.tanh(change / np.sqrt(np.mean(change**2))), rtol=1e-5)


@pytest.mark.parametrize(
    "layout, pack_rows, num_micro",
    [
        (Layout(1, 16, 8), pack, 5),
        (Layout(2, 16, 8), pack, 3),
        (Layout(2, 16, 8), pack_padded, 4),
        (Layout(3, 16, 8), pack, 2),
        (Layout(8, 12, 8), pack, 1),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.slow
def test_every_split_gives_the_same_update(layout, pack_rows, num_micro):
    upper, lower = rows()
    batch = pack_rows(upper, lower, layout)
    assert batch.packed.num_micro == num_micro
    after, _ = compiled(NEOX)(model(NEOX)[0], begin(NEOX), batch, Scales(1.0, GAMMA))
    theta, omega = update_by_hand(NEOX)
    assert_close(after.policy.adapter, theta)
    np.testing.assert_allclose(after.selector.logits, omega, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(after.selector.visits, np.isin(np.arange(N), SAMPLES))


def test_optimizer_state_and_weights_carry_over():
    """Three steps with momentum, each with the weights that the one before left behind."""
    upper, lower = rows()
    scales, state = Scales(1.0, GAMMA), begin(LLAMA)
    adapter, omega = model(LLAMA)[1], OMEGA.copy()
    velocity = jax.tree.map(jnp.zeros_like, adapter)
    for _ in range(3):
        state, _ = compiled(LLAMA)(model(LLAMA)[0], state, pack(upper, lower), scales)
        weights = N * softmax(omega)
        _, gradient = descend(adapter, lambda x, w=weights: theta_loss(LLAMA, x, upper, lower, scales, w))
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, gradient)
        adapter = jax.tree.map(lambda x, v: x - RATE * v, adapter, velocity)
        for row in lower:
            omega[row.row_index] -= ALPHA * GAMMA * row_loss(LLAMA, adapter, row)
    assert state.step == 3
    # Steps this large amplify: one unit in the last place of θ at the start is 3e-5 after the third.
    assert_close(state.policy.adapter, adapter, atol=2e-4)
    np.testing.assert_allclose(state.selector.logits, omega, atol=2e-4)


# --------------------------------------------------------------------------------------------------------------------
# ω
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coefficient_at, weight_scale", [("next", "literal"), ("current", "dataset")])
def test_omega_follows_the_gradient_of_the_objective(coefficient_at, weight_scale):
    upper, lower = rows()
    scales, selector = Scales(1.0, GAMMA), Selector("bds", "sgd", ALPHA, baseline="none", weight_scale=weight_scale)
    adapter, scale = model(LLAMA)[1], N if weight_scale == "dataset" else 1
    after, _ = compiled(LLAMA, Objective(coefficient_at=coefficient_at), selector)(
        model(LLAMA)[0], begin(LLAMA, selector), pack(upper, lower), scales
    )
    following, _ = descend(adapter, lambda x: theta_loss(LLAMA, x, upper, lower, scales, scale * softmax(OMEGA)))
    assert_close(after.policy.adapter, following)

    def moved(adapter):
        """(10b) with the losses at an adapter."""

        def objective(omega):
            return GAMMA * weighted_loss(LLAMA, adapter, lower, scale * jax.nn.softmax(omega))

        return OMEGA - ALPHA * jax.grad(objective)(jnp.array(OMEGA))

    expected = {"next": moved(following), "current": moved(adapter)}
    assert np.abs(expected["next"] - expected["current"]).max() > 1e-3  # so the test can tell them apart
    np.testing.assert_allclose(after.selector.logits, expected[coefficient_at], rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("coefficient_at", ["next", "current"])
@pytest.mark.slow
def test_tracked_value_function(coefficient_at):
    upper, lower = rows()
    scales, weights = Scales(1.0, GAMMA), N * softmax(OMEGA)
    adapter, tracker = model(NEOX)[1], make_adapter(NEOX, seed=9)
    after, _ = compiled(NEOX, Objective(coefficient_at=coefficient_at, value_function="tracked"))(
        model(NEOX)[0], begin(NEOX, tracked=tracker), pack(upper, lower), scales
    )
    following, _ = descend(adapter, lambda adapter: theta_loss(NEOX, adapter, upper, lower, scales, weights))
    # θ' sees the weighted lower level alone, without γ.
    tracker_following, _ = descend(tracker, lambda adapter: weighted_loss(NEOX, adapter, lower, weights))
    assert_close(after.policy.adapter, following)
    assert_close(after.tracker.adapter, tracker_following)

    theta, other = (following, tracker_following) if coefficient_at == "next" else (adapter, tracker)
    expected = np.zeros(N)
    for row in lower:
        expected[row.row_index] = row_loss(NEOX, theta, row) - row_loss(NEOX, other, row)
    cost = (OMEGA - after.selector.logits) / (ALPHA * GAMMA)
    np.testing.assert_allclose(cost, expected, atol=1e-5)


TOKENS = dataclasses.replace(MIRROR, token_learning_rate=0.5)
PHI = np.array([-0.8, 0.5], np.float32)


@jax.jit(static_argnums=(0, 6))
def _token_loss(config, base, adapter, tokens, is_response, phi, reduction):
    log_probs = jax.nn.log_softmax(decoder.logits(config, base, adapter, tokens[None, :-1])[0])
    nll, predicted = -jnp.take_along_axis(log_probs, tokens[1:, None], axis=1)[:, 0], is_response[1:]
    fixed = jax.lax.stop_gradient(jnp.where(predicted, nll, 0.0))
    before = jnp.max(jnp.where(np.tri(len(fixed), k=-1, dtype=bool), fixed, 0.0), axis=1)  # the largest of the tokens before
    count = predicted.sum()
    weight = count * jax.nn.softmax(jnp.where(predicted, phi[0] * fixed + phi[1] * before, -jnp.inf))
    return jnp.sum(weight * jnp.where(predicted, nll, 0.0)) / (count if reduction == "mean" else 1)


def token_loss(config, adapter, row, phi, reduction):
    """ℓ_i of a row whose tokens have weights."""
    return _token_loss(config, model(config)[0], adapter, *padded(row), phi, reduction)


@functools.cache
def token_update_by_hand(config, reduction):
    """θ and ω after one step with weights of tokens, and the gradient of φ at θ^{k+1}."""
    upper, lower = rows()
    weights = N * softmax(OMEGA)

    def lower_loss(adapter, phi):
        return GAMMA * mean(weights[row.row_index] * token_loss(config, adapter, row, phi, reduction) for row in lower)

    adapter = model(config)[1]
    theta, _ = descend(adapter, lambda x: upper_loss(config, x, upper, reduction) + lower_loss(x, PHI))
    omega = OMEGA.copy()
    for row in lower:
        omega[row.row_index] -= ALPHA * GAMMA * token_loss(config, theta, row, PHI, reduction)
    return theta, omega, jax.grad(lambda phi: lower_loss(theta, phi))(jnp.array(PHI))


@pytest.mark.parametrize("layout", [LAYOUT, Layout(1, 16, 8), Layout(8, 12, 8)], ids=["two", "one at a time", "all at once"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.slow
def test_weights_of_tokens(layout, reduction):
    """θ descends the weighted tokens' losses, and (10b) is taken of the same at θ^{k+1}, in ω and in φ."""
    config, adapter = LLAMA, model(LLAMA)[1]
    upper, lower = rows()
    theta, omega, pull = token_update_by_hand(config, reduction)
    state = begin(config, TOKENS)
    state = state._replace(token_params=jnp.array(PHI))
    advance = compiled(config, Objective(reduction=reduction), TOKENS)
    after, result = advance(model(config)[0], state, pack(upper, lower, layout), Scales(1.0, GAMMA))
    atol = 3e-6 if reduction == "mean" else 1e-4
    assert_close(after.policy.adapter, theta, atol=atol)
    np.testing.assert_allclose(after.selector.logits, omega, rtol=1e-5, atol=10 * atol)
    np.testing.assert_allclose(PHI - after.token_params, 0.5 * pull, rtol=1e-3)
    of_upper = [row_loss(config, adapter, row, reduction) for row in upper]
    np.testing.assert_allclose(result["row_loss"][: len(upper)], of_upper, rtol=1e-4)


@pytest.mark.parametrize(
    "objective, selector, named",
    [
        (Objective(coefficient_at="current"), TOKENS, "selection.coefficient_at=current must be next"),
        (Objective(value_function="tracked"), TOKENS, "selection.value_function"),
        (Objective(lower="dpo"), TOKENS, "loss.lower"),
        (PAPER, dataclasses.replace(TOKENS, rule="bmo"), "selection.rule=bmo must be bds"),
    ],
)
def test_tokens_follow_one_rule(objective, selector, named):
    with pytest.raises(ValueError, match=named):
        step.make_step(LLAMA, objective, selector, SGD)


BMO = {order: Selector("bmo", "sgd", ALPHA, tau=2.0, baseline="none", order=order) for order in ("joint", "paper")}
AT_CURRENT = Objective(coefficient_at="current")


def numpy_bmo_steps(loss_and_gradient, theta, omega, num_steps, order):
    """(46)-(48) in float64 for one row of each level: `paper` as printed, ω first; `joint` θ first, with σ(ω^k).

    Args:
      loss_and_gradient: of θ, for the trusted row and for row `SAMPLES[0]` of the lower level.
    """
    row, omega = SAMPLES[0], omega.astype(np.float64)
    for _ in range(num_steps):
        (_, upper), (loss, lower) = loss_and_gradient(theta)
        moved = omega.copy()
        moved[row] -= ALPHA * (omega[row] + 2.0 * loss)  # (48), τ = 2
        weights = N * softmax(moved if order == "paper" else omega)
        theta = theta - RATE * (upper + GAMMA * weights[row] * lower)  # (46)
        omega = moved
    return theta, omega


@pytest.mark.parametrize("order", ["joint", "paper"])
def test_order_of_bmo(order):
    """Two steps against a reference in float64; only losses and their gradients in θ come from the model."""
    upper, lower = rows(tuple(UPPER_SIZES[:1]), tuple(LOWER_SIZES[:1]), SAMPLES[:1])
    adapter, scales = model(LLAMA)[1], Scales(1.0, GAMMA)
    flat, unflatten = jax.flatten_util.ravel_pytree(adapter)

    def loss_and_gradient(theta):
        at = unflatten(jnp.array(theta, jnp.float32))
        for row in (upper[0], lower[0]):
            loss, gradient = jax.value_and_grad(lambda x, row=row: row_loss(LLAMA, x, row))(at)
            yield float(loss), np.asarray(jax.flatten_util.ravel_pytree(gradient)[0], np.float64)

    start = np.asarray(flat, np.float64)
    theta, omega = numpy_bmo_steps(loss_and_gradient, start, OMEGA, 2, order)
    state, plain_sgd = begin(LLAMA, BMO[order]), optax.sgd(RATE)
    state = state._replace(policy=train_state.Learner(state.policy.adapter, plain_sgd.init(state.policy.adapter)))
    advance = jax.jit(step.make_step(LLAMA, AT_CURRENT, BMO[order], plain_sgd))
    for _ in range(2):
        state, _ = advance(model(LLAMA)[0], state, pack(upper, lower), scales)
    np.testing.assert_allclose(state.selector.logits, omega, rtol=1e-5, atol=2e-5)
    moved = np.asarray(jax.flatten_util.ravel_pytree(state.policy.adapter)[0]) - flat
    np.testing.assert_allclose(moved, theta - start, rtol=1e-3, atol=2e-5)
    other, _ = numpy_bmo_steps(loss_and_gradient, start, OMEGA, 2, "joint" if order == "paper" else "paper")
    assert np.abs(other - theta).max() > 1e-3  # the orders can be told apart


@pytest.mark.parametrize(
    "objective, changes, named",
    [
        (AT_CURRENT, {"rule": "bds"}, "selection.order=paper moves ω before θ.*selection.rule=bds must be bmo"),
        (PAPER, {}, "selection.coefficient_at=next must be current"),
        (Objective(coefficient_at="current", value_function="tracked"), {}, "selection.value_function=tracked must be zero"),
        (Objective(coefficient_at="current", cost="influence"), {}, "selection.cost=influence must be loss"),
    ],
)
def test_order_belongs_to_bmo(objective, changes, named):
    with pytest.raises(ValueError, match=named):
        step.make_step(LLAMA, objective, dataclasses.replace(BMO["paper"], **changes), SGD)


INFLUENCE = Objective(cost="influence")


def begin_influence(optimizer):
    return train_state.init(model(LLAMA)[1], optimizer, INFLUENCE, MIRROR, N)


def vote(gradient, direction) -> float:
    """The mean over projections and layers of the sign of the product."""
    products = [
        sum(np.einsum("nio,nio->n", leaves[key], direction["layers"][module][name][key]) for key in leaves)
        for module, projections in gradient["layers"].items()
        for name, leaves in projections.items()
    ]
    return float(np.mean(np.sign(products)))


@pytest.mark.parametrize(
    "optimizer, layout",
    [(SGD, LAYOUT), (optax.adam(0.01), Layout(1, 16, 8)), (optax.adam(0.01), Layout(8, 12, 8))],
    ids=["sgd", "adam, a sequence at a time", "adam, all at once"],
)
@pytest.mark.slow
def test_influence_is_the_vote_of_products_with_the_preconditioned_mean_gradient(optimizer, layout):
    """Two steps, so that the running means have a past; every gradient is one of a single row, by jax.grad."""
    upper, lower = rows()
    base, advance = model(LLAMA)[0], jax.jit(step.make_step(LLAMA, INFLUENCE, MIRROR, optimizer))
    state, total, logits = begin_influence(optimizer), np.zeros(N), np.zeros(N)
    mean, square, center, spread, r = None, None, None, None, 0.0
    for _ in range(2):
        adapter = state.policy.adapter
        after, _ = advance(base, state, pack(upper, lower, layout), Scales(1.0, GAMMA))
        above = jax.grad(lambda x, at=adapter: upper_loss(LLAMA, x, upper))(adapter)
        mean = jax.tree.map(lambda g: 0.1 * g, above) if mean is None else jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, above)
        direction = mean
        if optimizer is not SGD:
            nu = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, state.policy.optimizer[0].nu, above)
            direction = jax.tree.map(lambda m, v: jnp.where(v > 0, m / jnp.sqrt(v), 0.0), mean, nu)
        surprises = np.array([surprise(LLAMA, adapter, row) for row in lower])
        center = surprises.mean() if center is None else 0.9 * center + 0.1 * surprises.mean()
        deviation = np.mean((surprises - center) ** 2)
        spread = deviation if spread is None else 0.9 * spread + 0.1 * deviation
        below = [jax.grad(lambda x, row=row: row_loss(LLAMA, x, row))(adapter) for row in lower]
        cost = np.array([-vote(one, direction) for one in below])
        square = np.mean(cost**2) if square is None else 0.9 * square + 0.1 * np.mean(cost**2)
        harm, excess = np.tanh(cost / np.sqrt(square)), np.tanh((surprises - center) / np.sqrt(spread))
        r = 0.9 * r + 0.1 * (harm @ excess) / np.linalg.norm(harm) / np.linalg.norm(excess)
        cost = harm + np.clip(max(r, 0) * 0.57 / (0.43 - r**2), 0, 1) * excess
        for row, value, whole in zip(lower, harm, cost):
            total[row.row_index] += value
            logits[row.row_index] -= ALPHA * GAMMA * whole
        state = after
    np.testing.assert_allclose(state.selector.surprise[np.array(SAMPLES)], surprises, rtol=1e-4)
    np.testing.assert_allclose(state.selector.harm, total, atol=1e-4)
    np.testing.assert_allclose(
        state.selector.logits - begin_influence(optimizer).selector.logits, logits, atol=3e-4 * ALPHA * GAMMA
    )


@pytest.mark.slow
def test_influence_is_finite_where_adam_has_no_past():
    """B = 0 before the first step: the gradient of A is 0, and 1/√v there infinite."""
    targets = lora.resolve_targets(LLAMA, "all-linear")
    adapter, optimizer = lora.init_adapter(LLAMA, jax.random.key(0), 3, targets), optax.adam(0.01)
    advance = jax.jit(step.make_step(LLAMA, INFLUENCE, MIRROR, optimizer))
    state = train_state.init(adapter, optimizer, INFLUENCE, MIRROR, N)
    after, _ = advance(model(LLAMA)[0], state, pack(*rows()), Scales(1.0, GAMMA))
    assert np.isfinite(after.selector.logits).all() and np.ptp(after.selector.logits) > 0.1


def test_tracker_starts_where_theta_does():
    state = train_state.init(model(LLAMA)[1], SGD, Objective(value_function="tracked"), MIRROR, N)
    jax.tree.map(np.testing.assert_array_equal, state.tracker.adapter, model(LLAMA)[1])
    assert train_state.init(model(LLAMA)[1], SGD, Objective(), MIRROR, N).tracker is None


@pytest.mark.parametrize("cost, other", [("influence", "loss"), ("loss", "influence")])
def test_state_of_another_objective_is_refused(cost, other):
    """The arrays of the state would decide which cost is taken."""
    state = train_state.init(model(LLAMA)[1], SGD, Objective(cost=other), MIRROR, N)
    advance = step.make_step(LLAMA, Objective(cost=cost), MIRROR, SGD)
    with pytest.raises(ValueError, match="^the state is of another objective"):
        jax.eval_shape(advance, model(LLAMA)[0], state, pack(*rows()), Scales(1.0, GAMMA))


def test_uniform_keeps_all_weights_at_one():
    upper, lower = rows()
    scales, uniform = Scales(1.0, GAMMA), Selector("uniform", "adam", ALPHA)
    state, adapter = begin(LLAMA, uniform, omega=np.zeros(N, np.float32)), model(LLAMA)[1]
    after, _ = compiled(LLAMA, selector=uniform)(model(LLAMA)[0], state, pack(upper, lower), scales)
    expected, _ = descend(adapter, lambda adapter: theta_loss(LLAMA, adapter, upper, lower, scales, np.ones(N)))
    assert_close(after.policy.adapter, expected)
    np.testing.assert_array_equal(after.selector.logits, np.zeros(N))
    np.testing.assert_array_equal(after.selector.visits, np.isin(np.arange(N), SAMPLES))


def test_lemma_9_with_a_real_model():
    """(45), by running the step for each i_k = m: B = 1, σ as the paper writes it. Derived in test_selector."""
    upper, _ = rows()
    rng = np.random.default_rng(5)
    lower = [segment(rng, 3, 4, row_index=m, share=1.0) for m in range(N)]
    literal = Selector("bds", "sgd", ALPHA, baseline="none", weight_scale="literal")
    advance, base, scales = compiled(LLAMA, selector=literal), model(LLAMA)[0], Scales(1.0, GAMMA)
    outcomes = [advance(base, begin(LLAMA, literal), pack(upper, [row]), scales)[0] for row in lower]
    losses = np.array([row_loss(LLAMA, after.policy.adapter, row) for after, row in zip(outcomes, lower)])
    sigma = softmax(OMEGA)
    drift = [ALPHA * GAMMA * sigma[i] / N * np.sum(sigma * (losses - losses[i])) for i in range(N)]
    moved = np.mean([after.selector.logits - OMEGA for after in outcomes], axis=0)
    np.testing.assert_allclose(moved, drift, atol=2e-7)
    assert np.abs(drift).max() > 1e-3


# --------------------------------------------------------------------------------------------------------------------
# Preferences
# --------------------------------------------------------------------------------------------------------------------


def micro_batches(packed, num_entries):
    """The micro-batch that each entry is in."""
    return [int(np.flatnonzero((packed.entry == e).any(1))[0]) for e in range(num_entries)]


@pytest.mark.parametrize("pack_rows", [pack, pack_padded])
def test_dpo_upper_level(pack_rows):
    beta, scales, weights = 0.5, Scales(1.0, GAMMA), N * softmax(OMEGA)
    rng, upper = np.random.default_rng(7), []
    for pair, sizes in enumerate([((3, 4), (3, 8)), ((2, 9), (2, 5)), ((5, 2), (5, 6))]):
        for sign, size in zip((1, -1), sizes):
            row = segment(rng, *size, share=1 / 3, group=pair, sign=sign)
            upper.append(row._replace(reference=-float(response_nll(LLAMA, None, row))))
    _, lower = rows()
    batch = pack_rows(upper, lower, Layout(2, 24, 12))
    assert len(set(micro_batches(batch.packed, 6))) > 1  # pairs fall into different micro-batches

    def dpo(adapter):
        def gain(row):  # log π / π_ref
            return -response_nll(LLAMA, adapter, row) - row.reference

        margins = [gain(chosen) - gain(rejected) for chosen, rejected in zip(upper[::2], upper[1::2])]
        return mean(-jnp.log(1 / (1 + jnp.exp(-beta * margin))) for margin in margins)

    adapter = model(LLAMA)[1]
    expected, _ = descend(adapter, lambda adapter: dpo(adapter) + GAMMA * weighted_loss(LLAMA, adapter, lower, weights))
    objective = Objective(upper="dpo", beta=beta)
    after, metrics = compiled(LLAMA, objective)(model(LLAMA)[0], begin(LLAMA), batch, scales)
    assert_close(after.policy.adapter, expected, atol=5e-6)
    np.testing.assert_allclose(metrics["upper_loss"], dpo(adapter), rtol=1e-5)


@pytest.mark.parametrize("config, adapted", [(LLAMA, False), (NEOX, True)])
def test_entry_nll(config, adapted):
    upper, lower = rows()
    base, adapter = model(config)
    adapter = adapter if adapted else None  # without: the reference policy
    batch = pack(upper, lower)
    nll = forward.entry_nll(config, base, adapter, jax.tree.map(jnp.asarray, batch.packed))
    expected = [response_nll(config, adapter, row) for row in upper + lower]
    np.testing.assert_allclose(nll, expected + [0.0], rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# The model's own responses
# --------------------------------------------------------------------------------------------------------------------

CLIP = 1.5
ROOM = Layout(sequences=1, length=32, entries=12)
ASKED = {4: (4, (9, 7, 3)), 0: (2, (9, 5))}  # the rows that the model answered: length of the question, of each response
LOG_RATIOS = {4: (0.4, -0.3, 1.8), 0: (0.1, -2.0)}  # e^1.8 is clipped, as a whole and per token


@jax.jit
def _own_nll(adapter, tokens, is_response):
    return jax.value_and_grad(_response_nll, argnums=2)(LLAMA, model(LLAMA)[0], adapter, tokens, is_response)


def own_nll(adapter, row):
    """Summed NLL of a response and its gradient, with the row alone in a sequence; what follows it has no part in either."""
    return _own_nll(adapter, *padded(row, ROOM.length))


@functools.cache
def own_rows():
    """Upper rows; a lower batch of four rows, of which two are answered by the model, three times and twice."""
    upper, (_, first, _, second) = rows()
    rng, answers = np.random.default_rng(11), []
    for (i, (prompt, sizes)), group in zip(ASKED.items(), (5, 3)):
        question = segment(rng, prompt, 0).prompt
        for size, log_ratio in zip(sizes, LOG_RATIOS[i], strict=True):
            response = segment(rng, 0, size).response
            row = Segment(question, response, row_index=i, share=1 / 4 / len(sizes), group=group)
            nll, _ = own_nll(model(LLAMA)[1], row)
            answers.append(row._replace(old_log_prob=-float(nll) - log_ratio))
    return upper, [answers[0], first, *answers[3:0:-1], second, answers[4]]  # answers to one question are no neighbours


def response_weight(kind, row):
    """(8) and Lemma 6."""
    if math.isnan(row.old_log_prob) or kind == "none":
        return 1.0
    if kind == "softmax":
        nll, *others = (float(own_nll(model(LLAMA)[1], r)[0]) for r in [row, *own_rows()[1]] if r.row_index == row.row_index)
        return len(others) / sum(math.exp(nll - other) for other in others)
    log_ratio = dict(zip(ASKED[row.row_index][1], LOG_RATIOS[row.row_index]))[len(row.response)]
    return min(math.exp(log_ratio / (len(row.response) if kind == "geometric" else 1)), CLIP)


@functools.cache
def own_gradients():
    """∇ℓ at θ of all rows."""
    upper, lower = own_rows()
    result = [(own_nll(model(LLAMA)[1], row)[1], num_predicted(row)) for row in upper + lower]
    return [jax.tree.map(lambda x, n=n: np.asarray(x) / n, gradient) for gradient, n in result]


def own_descent(kind, scales):
    """θ after a step down scale_0 Σ_j ∇ℓ_j / B0 + scale_1 Σ_b w_b / B · (1/G) Σ_g r^g ∇ℓ_b^g, (8)-(10a)."""
    upper, lower = own_rows()
    weights = N * softmax(np.float64(OMEGA))
    factors = [scales[0] / len(upper)] * len(upper)
    for row in lower:
        _, responses = ASKED.get(row.row_index, (0, [0]))
        factors.append(scales[1] * weights[row.row_index] / 4 / len(responses) * response_weight(kind, row))
    return jax.tree.map(
        lambda x, *slopes: x - RATE * sum(f * slope for f, slope in zip(factors, slopes, strict=True)),
        model(LLAMA)[1],
        *own_gradients(),
    )


def plain_costs(adapter):
    """(10c): the mean of ℓ over the responses to each visited row, without r; 0 elsewhere."""
    result = [
        [float(own_nll(adapter, row)[0]) / num_predicted(row) for row in own_rows()[1] if row.row_index == i] for i in range(N)
    ]
    return np.array([np.mean(losses) if losses else 0.0 for losses in result])


def cost_of(state):
    return (OMEGA - state.selector.logits) / (ALPHA * GAMMA)


@pytest.mark.parametrize(
    "kind, coefficient_at", [("sequence", "next"), ("geometric", "current"), ("softmax", "next"), ("none", "current")]
)
@pytest.mark.slow
def test_own_responses_stand_in_for_those_of_the_data(kind, coefficient_at):
    """Whatever they share a sequence and a micro-batch with: the answers to one question too may be anywhere."""
    upper, lower = own_rows()
    base, adapter = model(LLAMA)
    objective = Objective(coefficient_at=coefficient_at, response_weight=kind, clip=CLIP)
    theta = own_descent(kind, (1.0, GAMMA))
    costs = {"next": plain_costs(theta), "current": plain_costs(adapter)}
    assert np.abs(costs["next"] - costs["current"]).max() > 1e-2  # so the test can tell them apart
    told = [LOG_RATIOS[r.row_index][ASKED[r.row_index][1].index(len(r.response))] if r.group >= 0 else np.nan for r in lower]
    spread = []
    for pack_rows in (pack, pack_padded):
        batch = pack_rows(upper, lower, ROOM, num_lower=4)
        positions = micro_batches(batch.packed, 10)[3:]
        spread.append([len({m for m, row in zip(positions, lower) if row.row_index == i}) for i in ASKED])
        after, metrics = compiled(LLAMA, objective)(base, begin(LLAMA), batch, Scales(1.0, GAMMA))
        assert_close(after.policy.adapter, theta, atol=2e-6)
        np.testing.assert_allclose(cost_of(after), costs[coefficient_at], atol=1e-5)
        np.testing.assert_allclose(after.selector.visits, np.isin(np.arange(N), SAMPLES), rtol=1e-6)  # one of each row
        np.testing.assert_allclose(metrics["lower_loss"], costs["current"].sum() / 4, rtol=1e-5)
        np.testing.assert_allclose(metrics["response_weight"][3:10], [response_weight(kind, r) for r in lower], rtol=2e-5)
        np.testing.assert_allclose(metrics["log_ratio"][3:10], told, atol=2e-5)  # before clipping, whatever the weights
        assert np.isnan(metrics["log_ratio"][:3]).all() and (np.asarray(metrics["response_weight"][:3]) == 1).all()
    assert spread == [[2, 2], [3, 2]]


def test_own_responses_and_a_tracked_value_function():
    """θ' descends Σ_b w_b (1/G) Σ_g r^g ℓ^g(θ') with the r^g of θ; C compares plain means."""
    upper, lower = own_rows()
    objective = Objective(coefficient_at="current", value_function="tracked", clip=CLIP)
    batch, state = packing.pack_step([*upper, *lower], N, 4, ROOM), begin(LLAMA, tracked=model(LLAMA)[1])
    state, _ = compiled(LLAMA, objective)(model(LLAMA)[0], state, batch, Scales(1.0, GAMMA))
    theta, tracker = own_descent("sequence", (1.0, GAMMA)), own_descent("sequence", (0.0, 1.0))
    assert_close(state.policy.adapter, theta, atol=2e-6)
    assert_close(state.tracker.adapter, tracker, atol=2e-6)
    np.testing.assert_allclose(state.selector.logits, OMEGA, atol=1e-6)  # θ' = θ: nothing to choose by

    costs = plain_costs(theta) - plain_costs(tracker)
    assert np.abs(costs).max() > 1e-2
    state, _ = compiled(LLAMA, objective)(model(LLAMA)[0], state, batch, Scales(1.0, GAMMA))
    np.testing.assert_allclose(cost_of(state), costs, atol=1e-5)


@functools.cache
def all_rows():
    """Upper rows; all N rows of the lower level in one batch, of which the model answered two."""
    upper, answered = own_rows()
    rng, others = np.random.default_rng(13), [i for i in range(N) if i not in SAMPLES]
    lower = [*answered, *(segment(rng, 3, 5, row_index=i) for i in others)]
    number = [sum(row.row_index == i for row in lower) for i in range(N)]
    return upper, [row._replace(share=1 / N / number[row.row_index]) for row in lower]


@pytest.mark.parametrize("rule, optimizer", [("bds", "sgd"), pytest.param("bmo", "mirror", marks=pytest.mark.slow)])
def test_equation_7_takes_the_means_of_masked_and_of_other_rows_apart(rule, optimizer):
    """With all rows in the batch, so that its means are those of (7); r = 1, and both sums times N as σ is."""
    upper, lower = all_rows()
    adapter, masked = model(LLAMA)[1], np.isin(np.arange(N), list(ASKED))
    sizes = np.where(masked, masked.sum(), N - masked.sum())  # N_M or N - N_M
    samples = np.array([len(ASKED[i][1]) if i in ASKED else 1 for i in range(N)])  # G or 1

    def row_slope(row):
        return jax.tree.map(lambda x: np.asarray(x) / num_predicted(row), own_nll(adapter, row)[1])

    scales = GAMMA * N * softmax(np.float64(OMEGA)) / sizes / samples
    factors = [1 / len(upper)] * len(upper) + [scales[row.row_index] for row in lower]
    slopes = [row_slope(row) for row in (*upper, *lower)]
    theta = jax.tree.map(lambda x, *xs: x - RATE * sum(f * y for f, y in zip(factors, xs, strict=True)), adapter, *slopes)

    def costs(adapter):
        """Mean ℓ over the responses of each row."""
        losses = np.zeros(N)
        for row in lower:
            losses[row.row_index] += float(own_nll(adapter, row)[0]) / num_predicted(row) / samples[row.row_index]
        return losses

    def penalty(omega):
        return GAMMA * N * jnp.sum(jax.nn.softmax(omega) * costs(theta) / sizes)

    # (48) has no penalty
    slope = jax.grad(penalty)(jnp.array(OMEGA)) if rule == "bds" else OMEGA + costs(theta)
    selector = Selector(rule, optimizer, ALPHA, baseline="none")
    batch = packing.pack_step([*upper, *lower], N, N, ROOM)
    batch = batch._replace(row_factor=np.append(online.row_factors(masked), np.float32(1))[batch.row_index])
    advance = compiled(LLAMA, Objective(response_weight="none"), selector)
    after, metrics = advance(model(LLAMA)[0], begin(LLAMA, selector), batch, Scales(1.0, GAMMA))
    assert_close(after.policy.adapter, theta)
    np.testing.assert_allclose(after.selector.logits, OMEGA - ALPHA * slope, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(after.selector.visits, np.ones(N), rtol=1e-6)
    np.testing.assert_allclose(metrics["lower_loss"], np.mean(costs(adapter)), rtol=1e-5)  # as it is without the option


@pytest.mark.parametrize("name, length", [("llama", 20), ("tiny", 40)])
@pytest.mark.slow
def test_ratios_are_one_straight_after_scoring(name, length):
    """π_old by the scorer of whole data sets, π_θ in the step, each packing as it likes. A moved adapter gives other ratios."""
    config, (base, adapter) = LLAMA, model(LLAMA)
    if name == "tiny":  # NeoX
        config, base = huggingface.load_model(str(pathlib.Path(step.__file__).parent / "tiny"))
        config = dataclasses.replace(config, adapter_scale=2.0)
        adapter = make_adapter(config, 2)
    rng = np.random.default_rng(12)

    def draw():
        return rng.integers(1, config.vocab_size, rng.integers(1, length)).astype(np.int32)

    questions = [draw() for _ in range(4)]
    own = [Segment(questions[i], draw(), i, 1 / 15, group=5 + i) for i in [0, 1, 2, 3] * 3]
    others = [Segment(draw(), draw(), 4, 1 / 5), Segment(draw(), draw(), -1, 1.0)]
    mesh = sharding.make_mesh(1)
    nll, count = scoring.make_scorer(config, 3, 2 * length, mesh)(base, adapter, own + others, "")
    assert count.tolist() == [len(row.response) for row in own + others]
    own = [row._replace(old_log_prob=-x) for row, x in zip(own, nll)]

    uniform, frozen = Selector("uniform"), optax.sgd(0.0)
    advance = jax.jit(step.make_step(config, Objective(coefficient_at="current"), uniform, frozen))
    state = train_state.init(adapter, frozen, Objective(), uniform, N)
    moved = train_state.init(jitter(adapter, 3, 0.1), frozen, Objective(), uniform, N)
    for pack_rows in (pack, pack_padded):
        batch = pack_rows([], own + others, Layout(2, 2 * length, 15), num_lower=5)
        fresh, stale = (np.exp(advance(base, s, batch, Scales(1.0, GAMMA))[1]["log_ratio"][:12]) for s in (state, moved))
        np.testing.assert_allclose(fresh, 1, atol=1e-4)
        assert (np.abs(stale - 1) > 1e-3).all()


# --------------------------------------------------------------------------------------------------------------------
# Isolation and finite differences
# --------------------------------------------------------------------------------------------------------------------


@CONFIGS
def test_packed_rows_do_not_see_each_other(config):
    """d(loss of row a) / d(embedding of row b's tokens) = 0; each row has tokens of its own."""
    sizes, (base, adapter) = [(3, 4), (2, 2), (0, 5), (4, 1)], model(config)
    ids = np.split(1 + np.arange(sum(map(sum, sizes)), dtype=np.int32), np.cumsum([sum(size) for size in sizes])[:-1])
    segments = [Segment(own[:prompt], own[prompt:]) for own, (prompt, _) in zip(ids, sizes)]
    packed = jax.tree.map(jnp.asarray, packing.pack(segments, Layout(1, 24, 4)))
    assert packed.num_micro == 1

    @jax.jit
    def slopes(embedding):
        return jax.jacrev(
            lambda e: forward.micro_nll(config, base | {"embed_tokens": e}, adapter, packed, 0)
        )(embedding)  # fmt: skip

    touched = np.abs(slopes(base["embed_tokens"])).max(-1)  # [row, token id]
    for a, own in enumerate(ids):
        assert set(np.flatnonzero(touched[a])) == set(own[:-1])  # all but its last, which predicts nothing


def numpy_logits(config, base, adapter, tokens):
    """The decoder in float64 NumPy, one row and one head at a time."""
    L, C, llama = len(tokens), config.head_dim, config.architecture == "llama"

    def norm(x, weights):
        x = x if llama else x - x.mean(-1, keepdims=True)
        x = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + config.norm_eps)
        return x * weights["scale"] + weights.get("bias", 0)

    def linear(x, module, name):
        weights, low_rank = layer[module][name], lora_layer[module][name]
        update = config.adapter_scale * (x @ low_rank["a"]) @ low_rank["b"]
        return x @ weights["kernel"] + weights.get("bias", 0) + update

    def rotate(x):
        half = config.rotary_dim // 2
        angles = np.arange(L)[:, None] * config.rope_theta ** (-np.arange(half) / half)
        a, b, rest = x[:, :half], x[:, half : 2 * half], x[:, 2 * half :]
        return np.hstack([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles), rest])

    def attention(x):
        if llama:
            q, k, v = (linear(x, "self_attn", name).reshape(L, -1, C) for name in ("q_proj", "k_proj", "v_proj"))
        else:
            q, k, v = np.moveaxis(linear(x, "attention", "query_key_value").reshape(L, -1, 3, C), 2, 0)
        heads = []
        for h in range(config.num_heads):
            g = h * config.num_kv_heads // config.num_heads
            scores = np.exp(rotate(q[:, h]) @ rotate(k[:, g]).T / np.sqrt(C)) * np.tri(L)
            heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, g])
        return linear(np.hstack(heads), *(("self_attn", "o_proj") if llama else ("attention", "dense")))

    def feed_forward(x):
        if llama:
            gate = linear(x, "mlp", "gate_proj")
            return linear(gate / (1 + np.exp(-gate)) * linear(x, "mlp", "up_proj"), "mlp", "down_proj")
        hidden = linear(x, "mlp", "dense_h_to_4h")
        erf = np.vectorize(math.erf)(hidden / np.sqrt(2))
        return linear(hidden * (1 + erf) / 2, "mlp", "dense_4h_to_h")

    x = base["embed_tokens"][tokens]
    for n in range(config.num_layers):
        layer, lora_layer = (jax.tree.map(lambda w: w[n], tree["layers"]) for tree in (base, adapter))  # noqa: B023
        attended = attention(norm(x, layer["input_layernorm"]))
        middle = x + attended if llama else x  # NeoX: parallel residual
        x = x + attended + feed_forward(norm(middle, layer["post_attention_layernorm"]))
    return norm(x, base["norm"]) @ base["embed_tokens" if llama else "lm_head"].T


def numpy_theta_loss(config, base, adapter, upper, lower, weights):
    def loss(row):
        tokens = np.concatenate([row.prompt, row.response])
        logits = numpy_logits(config, base, adapter, tokens)
        nll = np.log(np.exp(logits).sum(-1))[:-1] - logits[np.arange(row.size - 1), tokens[1:]]
        return nll[max(len(row.prompt), 1) - 1 :].mean()

    return mean(loss(row) for row in upper) + GAMMA * mean(weights[row.row_index] * loss(row) for row in lower)


@CONFIGS
def test_theta_gradient_against_finite_differences(config):
    """Central differences of the θ-loss in float64 NumPy, sharing no code with the model: two entries per matrix."""
    upper, lower = rows()
    after, metrics = compiled(config)(model(config)[0], begin(config), pack(upper, lower), Scales(1.0, GAMMA))
    before = model(config)[1]
    gradient = jax.tree.map(lambda x, y: (x - y) / RATE, before, after.policy.adapter)

    base, adapter = jax.tree.map(lambda x: np.array(x, np.float64), (model(config)[0], before))
    args = upper, lower, N * softmax(np.float64(OMEGA))
    np.testing.assert_allclose(metrics["loss"], numpy_theta_loss(config, base, adapter, *args), rtol=1e-5)

    rng, h = np.random.default_rng(0), 1e-5
    for matrix, slopes in zip(jax.tree.leaves(adapter), jax.tree.leaves(gradient)):
        for _ in range(2):
            at = tuple(rng.integers(0, size) for size in matrix.shape)
            value, ends = matrix[at], []
            for matrix[at] in (value + h, value - h):  # in place: `adapter` holds this very array
                ends.append(numpy_theta_loss(config, base, adapter, *args))
            matrix[at] = value
            np.testing.assert_allclose(slopes[at], (ends[0] - ends[1]) / (2 * h), rtol=1e-4, atol=3e-6)


# --------------------------------------------------------------------------------------------------------------------
# Pairs below, and what rewards make of the model's own responses
# --------------------------------------------------------------------------------------------------------------------

BETA, TEMPERATURE, REWARDS = 0.3, 0.7, {4: (0.5, 2.0, -1.0), 0: (1.0, 1.0)}  # the two responses to row 0 are as good
ROOMY = Layout(sequences=1, length=40, entries=16)
OBJECTIVES = {
    "below": Objective(upper="ipo", lower="dpo", beta=BETA),
    "below, sums": Objective(lower="ipo", beta=BETA, reduction="sum", coefficient_at="current"),
    **{
        f"own {kind}": Objective(generated=kind, beta=BETA, reward_temperature=TEMPERATURE, clip=CLIP, coefficient_at=at)
        for kind, at in [("dpo", "next"), ("ipo", "current"), ("rwr", "current"), ("reinforce", "next")]
    },
    "own dpo among pairs": Objective(lower="dpo", generated="dpo", beta=BETA, clip=CLIP),
}


@functools.cache
def compared_rows(objective):
    """Upper rows and a lower batch of four, of which the model answered rows 4 and 0 where `objective.generated` says so."""
    rng = np.random.default_rng(13)

    def pair(group, **role):
        sizes, (prompt, *_) = rng.integers(2, 7, (2, 1)), rng.integers(1, 5, 1)
        both = [segment(rng, prompt, size, group=group, sign=sign, **role) for (size,), sign in zip(sizes, (1, -1))]
        return [row._replace(reference=-float(rng.uniform(5, 25))) for row in both]

    upper, lower = list(rows()[0]), []
    if objective.upper != "sft":
        upper = [row for group in range(3) for row in pair(group, share=1 / 3)]
    for group, i in enumerate(SAMPLES, 4):
        if i in ASKED and objective.generated != "sft":
            mine = [row for row in own_rows()[1] if row.row_index == i]
            own = online.ResponseStore(
                step=0,
                masked=np.ones(N, bool),
                row_index=np.full(len(mine), i),
                sample_index=np.arange(len(mine)),
                tokens=[row.response for row in mine],
                log_prob=np.array([row.old_log_prob for row in mine]),
                log_ratio=np.full(len(mine), np.nan),
                reward=np.array(REWARDS[i]),
                reference=-rng.uniform(5, 25, len(mine)),
            )
            result = online.response_segments(own, i, mine[0].prompt, 1 / 4, group, objective.generated, ROOMY.length)
            lower += [row for _, row in result]
        elif objective.lower == "sft":
            lower.append(segment(rng, 3, int(rng.integers(2, 7)), row_index=i, share=1 / 4))
        else:
            lower += pair(group, row_index=i, share=1 / 4)
    return upper, lower


def numpy_row(config, base, adapter, row):
    """Summed NLL of a response in float64."""
    tokens = np.concatenate([row.prompt, row.response])
    logits = numpy_logits(config, base, adapter, tokens)
    nll = np.log(np.exp(logits).sum(-1))[:-1] - logits[np.arange(row.size - 1), tokens[1:]]
    return nll[max(len(row.prompt), 1) - 1 :].sum()


def by_question(lower):
    return {i: [row for row in lower if row.row_index == i] for i in SAMPLES}


def numpy_pair(kind, objective, nll, chosen, rejected):
    """-log σ(β margin), (margin - 1/2β)²; with sums over tokens, or means for IPO as trl has it."""
    gains = [-nll[id(row)] - row.reference for row in (chosen, rejected)]
    if kind == "ipo" and objective.reduction == "mean":
        gains = [gain / num_predicted(row) for gain, row in zip(gains, (chosen, rejected))]
    margin = gains[0] - gains[1]
    return np.log1p(np.exp(-BETA * margin)) if kind == "dpo" else (margin - 1 / (2 * BETA)) ** 2


def numpy_losses(objective, base, adapter):
    """(7) with ℓ_b as the objective has it, and C_b by row: float64, one row after the other."""
    upper, lower = compared_rows(objective)
    nll = {id(row): numpy_row(LLAMA, base, adapter, row) for row in upper + lower}

    def plain(row):
        return nll[id(row)] / (num_predicted(row) if objective.reduction == "mean" else 1)

    above = (
        mean(plain(row) for row in upper)
        if objective.upper == "sft"
        else mean(numpy_pair(objective.upper, objective, nll, *two) for two in zip(upper[::2], upper[1::2]))
    )
    below, cost = [], np.zeros(N)
    for i, result in by_question(lower).items():
        own, signs = not math.isnan(result[0].old_log_prob), [row.sign for row in result]
        weight = [response_weight("sequence", row) for row in result]
        reward = np.array(REWARDS[i]) if own else None
        if signs == [1, -1]:
            loss = numpy_pair(objective.generated if own else objective.lower, objective, nll, *result)
            cost[i] = loss if objective.lower != "sft" else plain(result[0])
        elif not own:
            loss = cost[i] = plain(*result)
        elif objective.generated in ("dpo", "ipo"):  # no pair
            loss, cost[i] = 0.0, plain(*result) if objective.lower == "sft" else 0.0
        else:
            likelihood = np.exp(reward / TEMPERATURE)
            factor = {
                "rwr": len(reward) * likelihood / likelihood.sum(),
                "reinforce": [r - np.mean(np.delete(reward, g)) for g, r in enumerate(reward)],
            }[objective.generated]
            assert len(result) == len(reward)
            loss = mean(f * w * plain(row) for f, w, row in zip(factor, weight, result))
            cost[i] = mean(map(plain, result))
        below.append(N * softmax(np.float64(OMEGA))[i] * loss)
    return above + GAMMA * mean(below), cost


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.slow
def test_objectives_against_finite_differences(name):
    """Losses, costs and directional derivatives in float64, for two packings in which pairs and groups lie differently."""
    objective, base = OBJECTIVES[name], model(LLAMA)[0]
    upper, lower = compared_rows(objective)
    adapter64, base64 = jax.tree.map(lambda x: np.array(x, np.float64), (model(LLAMA)[1], base))
    expected, cost = numpy_losses(objective, base64, adapter64)
    rng = np.random.default_rng(1)
    directions = [jax.tree.map(lambda x: rng.normal(size=x.shape), adapter64) for _ in range(3)]
    h, slopes = 1e-5, []
    for u in directions:
        ends = (jax.tree.map(lambda x, d, s=s: x + s * h * d, adapter64, u) for s in (1, -1))
        high, low = (numpy_losses(objective, base64, end)[0] for end in ends)
        slopes.append((high - low) / (2 * h))

    scale = 10 if objective.reduction == "sum" else 1  # the size of a summed loss, and of float32's errors in it
    for pack_rows in (pack, pack_padded):
        batch = pack_rows(upper, lower, ROOMY, num_lower=4)
        after, metrics = compiled(LLAMA, objective)(base, begin(LLAMA), batch, Scales(1.0, GAMMA))
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
        moved = jax.tree.map(lambda x, y: (np.float64(x) - y) / RATE, model(LLAMA)[1], after.policy.adapter)
        result = [sum(np.sum(d * g) for d, g in zip(jax.tree.leaves(u), jax.tree.leaves(moved))) for u in directions]
        np.testing.assert_allclose(result, slopes, rtol=1e-4, atol=1e-4 * scale)
        if objective.coefficient_at == "next":
            theta = jax.tree.map(lambda x: np.array(x, np.float64), after.policy.adapter)
            cost = numpy_losses(objective, base64, theta)[1]
        np.testing.assert_allclose(cost_of(after), cost, rtol=1e-5, atol=2e-5 * scale)
        unjudged = {0} if name == "own dpo among pairs" else set()
        np.testing.assert_allclose(after.selector.visits, [i in {*SAMPLES} - unjudged for i in range(N)], rtol=1e-6)


def test_pairs_and_a_tracked_value_function():
    """θ' descends the weighted pairs alone; from the same start it is level with θ, and C is their difference after that."""
    objective = Objective(lower="dpo", beta=BETA, coefficient_at="current", value_function="tracked")
    upper, lower = compared_rows(OBJECTIVES["below"])
    batch = packing.pack_step([*upper, *lower], N, 4, ROOMY)
    batch = batch._replace(share=np.where(batch.row_index < N, batch.share, 0).astype(np.float32))  # no upper level
    state = begin(LLAMA, tracked=model(LLAMA)[1])
    # The bits of two passes agree if both are compiled in the usual way, which the tests turn off.
    usual = {"xla_cpu_use_fusion_emitters": True, "xla_backend_optimization_level": 3}
    update = jax.jit(step.make_step(LLAMA, objective, MIRROR, SGD), compiler_options=usual)
    state, _ = update(model(LLAMA)[0], state, batch, Scales(1.0, 1.0))
    jax.tree.map(np.testing.assert_array_equal, state.policy.adapter, state.tracker.adapter)  # the same objective: γ = 1
    np.testing.assert_allclose(state.selector.logits, OMEGA, atol=1e-6)
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), state.policy.adapter, model(LLAMA)[1])
    assert max(jax.tree.leaves(moved)) > 1e-3


# --------------------------------------------------------------------------------------------------------------------
# The step as a function
# --------------------------------------------------------------------------------------------------------------------


def test_same_inputs_same_bits_and_the_old_state_is_donated():
    upper, lower = rows()
    states = begin(NEOX), begin(NEOX)
    first, second = (compiled(NEOX)(model(NEOX)[0], s, pack(upper, lower), Scales(1.0, GAMMA)) for s in states)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert all(leaf.is_deleted() for state in states for leaf in jax.tree.leaves((state.policy, state.selector.logits)))


def test_one_compilation_for_any_number_of_rows():
    upper, lower = rows()
    advance, state = compiled(LLAMA), begin(LLAMA)
    sizes = []
    for num_upper, num_lower in ((3, 4), (1, 1), (2, 4), (0, 2), (3, 0)):
        batch = pack(upper[:num_upper], lower[:num_lower])
        state, _ = advance(model(LLAMA)[0], state, batch, Scales(1.0, 0.1 * num_lower))
        sizes.append(advance._cache_size())
    assert sizes == [1] * 5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"upper": "ppo"}, "loss.upper='ppo'"),
        ({"lower": "rwr"}, "loss.lower='rwr'"),
        ({"generated": "ppo"}, "online.objective='ppo'"),
        ({"reward_temperature": 0.0}, "online.reward_temperature.*0.0"),
        ({"reduction": "max"}, "loss.reduction='max'"),
        ({"coefficient_at": "now"}, "selection.coefficient_at='now'"),
        ({"value_function": "one"}, "selection.value_function='one'"),
        ({"beta": 0.0}, "loss.beta.*0.0"),
        ({"response_weight": "token"}, "online.response_weight='token'"),
        ({"clip": 0.99}, "online.clip.*0.99"),
        ({"clip": float("nan")}, "online.clip.*nan"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Objective(**options)

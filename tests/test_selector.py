"""The selector against float64 NumPy with ∇σ written out as the dense Jacobian diag(σ) - σσᵀ."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax import influence
from bilevel_jax import selector as selection
from bilevel_jax.selector import Selector

N, B = 7, 3
PADDING = (N, 0.0, 99.0)

# Entries (row, share, cost) and γ of three consecutive batches. The second holds two responses to row 4 and an
# upper-level entry; two of the third are out of range. The costs of what is not of the lower level must not matter.
BATCHES = [
    ([(1, 1 / 3, 2.0), (4, 1 / 3, 0.5), (6, 1 / 3, 3.5), PADDING], 0.5),
    ([(4, 1 / 6, 1.5), (N, 0.5, 1e6), (0, 1 / 3, 2.5), (4, 1 / 6, 0.3), (2, 1 / 3, 4.0)], 1.5),
    ([(2, 1 / 3, 1.0), (N + 5, 0.7, np.nan), (1, 1 / 3, 3.0), (-1, 0.4, -50.0), (5, 1 / 3, 0.2)], 0.25),
]
START = np.array([0.5, -1.0, 0.3, 0.0, 1.2, -0.4, 0.1])


def softmax(logits):
    exp = np.exp(logits - logits.max())
    return exp / exp.sum()


def jacobian(logits):
    """J[i, j] = ∂σ_i / ∂ω_j."""
    sigma = softmax(logits)
    return np.diag(sigma) - np.outer(sigma, sigma)


def witness(selector, batches, omega):
    """ω after every batch, by the equations as they stand."""
    omega, alpha = omega.astype(np.float64), selector.learning_rate
    scale = len(omega) if selector.weight_scale == "dataset" else 1.0  # what σ is multiplied by
    first_moment, second_moment, running = np.zeros(N), np.zeros(N), None
    for t, (entries, gamma) in enumerate(batches, start=1):
        lower = [(i, share, cost) for i, share, cost in entries if 0 <= i < N]
        mean = sum(share * cost for _, share, cost in lower)
        offset = {"none": 0.0, "batch": mean, "running": mean if running is None else running}[selector.baseline]
        running = mean if running is None else 0.9 * running + 0.1 * mean

        gradient = np.zeros(N)
        for i, share, cost in lower:
            cost = cost - offset
            if selector.rule == "bmo":  # (47): d/dω_i of (ω_i + τC)²/2, summed over the B rows
                gradient[i] += B * share * (omega[i] + selector.tau * cost)
            elif selector.rule == "bds" and selector.optimizer == "mirror":  # of the linear form in σ_i, per visit
                gradient[i] += B * share * gamma * scale / N * cost
            elif selector.rule == "bds":  # (10b)
                gradient += share * gamma * scale * cost * jacobian(omega)[i]
        if selector.rule == "uniform":
            pass
        elif selector.optimizer == "adam":
            first_moment = 0.9 * first_moment + 0.1 * gradient
            second_moment = 0.999 * second_moment + 0.001 * gradient**2
            debiased = first_moment / (1 - 0.9**t), second_moment / (1 - 0.999**t)
            omega = omega - alpha * debiased[0] / (np.sqrt(debiased[1]) + 1e-8)
        else:
            omega = omega - alpha * gradient
        yield omega


def columns(entries):
    rows, shares, costs = zip(*entries)
    return jnp.array(rows, jnp.int32), jnp.array(shares, jnp.float32), jnp.array(costs, jnp.float32)


def begin(selector, logits=START):
    return selection.init(selector, len(logits))._replace(logits=jnp.asarray(logits, jnp.float32))


def move(selector, state, entries, gamma, num_lower=B):
    sample, share, cost = columns(entries)
    return selection.update(selector, state, sample, share, num_lower, cost, gamma)


# --------------------------------------------------------------------------------------------------------------------
# The update
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule, optimizer, baseline, weight_scale",
    [
        *itertools.product(("bds", "bmo"), selection.OPTIMIZERS, selection.BASELINES, selection.WEIGHT_SCALES),
        *itertools.product(("uniform",), selection.OPTIMIZERS, ("batch",), ("dataset",)),
    ],
)
def test_update(rule, optimizer, baseline, weight_scale):
    selector = Selector(rule, optimizer, 0.3, 0.7, baseline, weight_scale)
    tolerance = 2e-5 if optimizer == "adam" else 2e-6  # 1 - 0.999^t in float32 has few digits
    state = begin(selector)
    update = jax.jit(functools.partial(selection.update, selector))
    for (entries, gamma), expected in zip(BATCHES, witness(selector, BATCHES, START)):
        sample, share, cost = columns(entries + [PADDING] * (5 - len(entries)))
        state = update(state, sample, share, jnp.float32(B), cost, gamma)
        np.testing.assert_allclose(state.logits, expected, rtol=1e-5, atol=tolerance)
    # Row 4: once, and once more as two halves. Rows 3 and 6, and all that is not of the lower level: never or once.
    np.testing.assert_allclose(state.visits, [1, 2, 2, 0, 2, 1, 1], rtol=1e-6)


@pytest.mark.parametrize("weight_scale", selection.WEIGHT_SCALES)
def test_bds_follows_the_gradient_of_the_objective(weight_scale):
    selector = Selector("bds", "sgd", 1.0, 1.0, "none", weight_scale)
    entries, gamma = BATCHES[1]
    gradient = START - np.asarray(move(selector, begin(selector), entries, gamma).logits)
    scale = {"dataset": N, "literal": 1}[weight_scale]
    lower = [(i, share, cost) for i, share, cost in entries if i < N]

    def objective(omega, softmax):
        sigma = softmax(omega)
        return gamma * sum(share * scale * sigma[i] * cost for i, share, cost in lower)

    by_jax = jax.grad(objective)(jnp.asarray(START, jnp.float32), jax.nn.softmax)
    np.testing.assert_allclose(gradient, by_jax, rtol=1e-5, atol=1e-6)

    h = 1e-5 * np.eye(N)
    by_differences = [(objective(START + e, softmax) - objective(START - e, softmax)) / 2e-5 for e in h]
    np.testing.assert_allclose(gradient, by_differences, rtol=1e-5, atol=1e-6)


X = np.random.default_rng(4).normal(size=(N, 4))
PHI = np.array([0.3, -0.2, 0.5, 0.1])


def begin_with_features(selector, x, phi):
    state = selection.init(selector, len(x), x.shape[1])
    return state._replace(feature_params=jnp.asarray(phi, jnp.float32), logits=jnp.asarray(x @ phi, jnp.float32))


@pytest.mark.parametrize("weight_scale", selection.WEIGHT_SCALES)
def test_phi_follows_the_gradient_of_the_objective(weight_scale):
    selector = Selector("bds", "sgd", 1.0, 1.0, "none", weight_scale, "features")
    entries, gamma = BATCHES[1]
    sample, share, cost = columns(entries)
    before = begin_with_features(selector, X, PHI)
    after = selection.update(selector, before, sample, share, B, cost, gamma, jnp.asarray(X, jnp.float32))
    scale = {"dataset": N, "literal": 1}[weight_scale]
    lower = [(i, share, cost) for i, share, cost in entries if i < N]

    def objective(phi):
        return gamma * sum(share * scale * softmax(X @ phi)[i] * cost for i, share, cost in lower)

    by_differences = [(objective(PHI + e) - objective(PHI - e)) / 2e-5 for e in 1e-5 * np.eye(4)]
    np.testing.assert_allclose(PHI - np.asarray(after.feature_params), by_differences, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(after.logits, X @ np.asarray(after.feature_params, np.float64), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(after.visits, np.isin(np.arange(N), [0, 2, 4]), rtol=1e-6)


@pytest.mark.parametrize("rule", ["bds", "bmo"])
def test_ridge_pulls_phi_to_zero(rule):
    """By learning rate · λφ, for each row of the batch where the rule adds up the moves of all."""
    entries, gamma = BATCHES[1]
    sample, share, cost = columns(entries)
    after = []
    for ridge in (0.0, 0.4):
        selector = Selector(rule, "sgd", 0.5, 1.0, "none", parameterization="features", ridge=ridge)
        before = begin_with_features(selector, X, PHI)
        after.append(selection.update(selector, before, sample, share, B, cost, gamma, jnp.asarray(X, jnp.float32)).feature_params)
    np.testing.assert_allclose(after[0] - after[1], 0.5 * 0.4 * PHI * (B if rule == "bmo" else 1), rtol=1e-4)


def test_bmo_with_a_ridge_ends_at_ridge_regression():
    """ω = X φ with φ = -τ (XᵀX/N + λ)⁻¹ Xᵀ C/N, where every step sees all rows and their costs stay."""
    cost, tau, ridge = np.random.default_rng(5).normal(size=N), 0.7, 0.3
    selector = Selector("bmo", "sgd", 0.05, tau, "none", parameterization="features", ridge=ridge)
    state = begin_with_features(selector, X, PHI)
    update = jax.jit(functools.partial(selection.update, selector))
    share = jnp.full(N, 1 / N)
    for _ in range(300):
        state = update(state, jnp.arange(N), share, jnp.float32(N), jnp.float32(cost), 1.0, jnp.asarray(X, jnp.float32))
    expected = -tau * np.linalg.solve(X.T @ X / N + ridge * np.eye(4), X.T @ cost / N)
    np.testing.assert_allclose(state.feature_params, expected, atol=1e-5)


@pytest.mark.parametrize("rule, optimizer", [*itertools.product(("bds", "bmo"), ("sgd", "adam"))])
def test_a_table_is_features_that_name_the_row(rule, optimizer):
    table = Selector(rule, optimizer, 0.3, 0.7, "running")
    linear = Selector(rule, optimizer, 0.3, 0.7, "running", parameterization="features")
    free, tied = begin(table), begin_with_features(linear, np.eye(N), START)
    for entries, gamma in BATCHES:
        sample, share, cost = columns(entries)
        free = selection.update(table, free, sample, share, B, cost, gamma)
        tied = selection.update(linear, tied, sample, share, B, cost, gamma, jnp.eye(N))
        np.testing.assert_array_equal(tied.logits, free.logits)
        np.testing.assert_array_equal(tied.feature_params, free.logits)


@pytest.mark.parametrize("rule, optimizer", [*itertools.product(("bds", "bmo"), ("sgd", "adam"))])
def test_groups_are_features_that_name_the_group(rule, optimizer):
    selector = Selector(rule, optimizer, 0.3, 0.7, "running", parameterization="features")
    group = np.arange(N) % 3
    named, written_out = (begin_with_features(selector, np.eye(3)[group], PHI[:3]) for _ in range(2))
    for entries, gamma in BATCHES:
        sample, share, cost = columns(entries)
        named = selection.update(selector, named, sample, share, B, cost, gamma, jnp.asarray(group))
        one_hot = jnp.asarray(np.eye(3)[group], jnp.float32)
        written_out = selection.update(selector, written_out, sample, share, B, cost, gamma, one_hot)
        np.testing.assert_allclose(named.feature_params, written_out.feature_params, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(named.logits, np.asarray(named.feature_params)[group])
    assert np.ptp(named.feature_params - PHI[:3]) > 1e-3


def test_record_by_hand():
    """Row 3 has its response of the data, row 0 two halves of one, row 1 a generated response, and the last entry is padding."""
    state = begin(Selector())._replace(surprise=jnp.arange(10.0, 10.0 + N), harm=jnp.ones(N), data_visits=jnp.full(N, 2.0))
    row, part = jnp.array([3, 0, 1, 0, N]), jnp.array([1.0, 0.5, 0.0, 0.5, 0.0])
    surprise, harm = jnp.array([7.0, 4.0, 99.0, 6.0, 99.0]), jnp.array([0.25, -1.0, 99.0, 0.5, 99.0])
    after = selection.record(state, row, part, surprise, harm)
    assert after.surprise.tolist() == [5.0, 11.0, 12.0, 7.0, *range(14, 10 + N)]
    assert after.harm.tolist() == [0.75, 1.0, 1.0, 1.25, *[1.0] * (N - 4)]
    assert after.data_visits.tolist() == [3.0, 2.0, 2.0, 3.0, *[2.0] * (N - 4)]


@pytest.mark.parametrize("rule", ["bds", "bmo"])
def test_mirror_touches_visited_logits_alone(rule):
    selector = Selector(rule, "mirror", baseline="running")
    before = begin(selector)
    after = move(selector, before, [(1, 0.5, 2.0), (5, 0.5, 3.0), (N, 0.5, 7.0), (-1, 0.5, 7.0)], 1.0, num_lower=2)
    assert set(np.flatnonzero(after.logits != before.logits)) == {1, 5}


def test_mirror_is_exponentiated_gradient():
    # σ_i ← σ_i exp(-αγC_i) / Z on visited rows, and the division by Z alone on the others
    selector = Selector("bds", "mirror", 0.5, baseline="none")
    after = move(selector, begin(selector), [(0, 0.5, 2.0), (3, 0.5, 1.0)], gamma=3.0, num_lower=2).logits
    factor = np.ones(N)
    factor[[0, 3]] = np.exp(-0.5 * 3.0 * np.array([2.0, 1.0]))
    expected = softmax(START) * factor
    np.testing.assert_allclose(softmax(np.asarray(after)), expected / expected.sum(), rtol=1e-5)


def test_bmo_settles_at_minus_tau_times_the_loss():
    # the minimiser of (47), which is (43)
    selector = Selector("bmo", "sgd", 0.5, 2.0, "none")
    state, cost = begin(selector), np.linspace(0.1, 3.0, N)
    for _ in range(40):
        state = move(selector, state, [(i, 1 / N, c) for i, c in enumerate(cost)], 1.0, num_lower=N)
    np.testing.assert_allclose(state.logits, -2.0 * cost, rtol=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# Expectations over the drawn row
# --------------------------------------------------------------------------------------------------------------------

LOSSES = np.array([1.9, 0.4, 2.6, 1.1, 3.0, 0.2, 1.4])  # L_m at θ(m)
ALPHA, GAMMA = 0.8, 1.7


def lemma_9(omega, losses, alpha, gamma):
    """E[ω^{k+1} | F_k] of (45).

    By hand from (10b): with i_k = m the move is -αγ L_m ∇σ_m, and ∂σ_m/∂ω_i = σ_m (δ_mi - σ_i). The mean over the N
    equally likely m is -(αγ/N) (σ_i L_i - σ_i Σ_m σ_m L_m) = (αγσ_i/N) Σ_m σ_m (L_m - L_i), since Σ_m σ_m = 1: as the
    paper has it. With weights N·σ the factor 1/N is gone.
    """
    sigma = softmax(omega)
    gap = np.array([np.sum(sigma * (losses - losses[i])) for i in range(len(omega))])
    return omega + alpha * gamma * sigma / len(omega) * gap


@jax.jit(static_argnums=0)
def moves(selector, state, drawn_KxB, cost_KxB):
    """ω after each of K alternative batches of B drawn rows, [K, N]."""
    size = drawn_KxB.shape[1]

    def one(drawn, cost):
        return selection.update(selector, state, drawn, jnp.full(size, 1 / size), size, cost, GAMMA).logits

    return jax.vmap(one)(drawn_KxB, cost_KxB)


def outcomes(selector, state, drawn):
    drawn = np.array(drawn)
    return np.asarray(moves(selector, state, drawn, LOSSES[drawn].astype(np.float32)), np.float64)


@pytest.mark.parametrize("weight_scale, factor", [("literal", 1), ("dataset", N)])
def test_lemma_9_by_enumeration(weight_scale, factor):
    selector = Selector("bds", "sgd", ALPHA, 1.0, "none", weight_scale)
    expected = lemma_9(START, LOSSES, ALPHA, GAMMA * factor)
    mean = outcomes(selector, begin(selector), [[m] for m in range(N)]).mean(0)
    np.testing.assert_allclose(mean - START, expected - START, rtol=1e-4, atol=1e-7 * factor)


def test_lemma_9_by_monte_carlo():
    selector = Selector("bds", "sgd", ALPHA, 1.0, "none", "literal")
    draws = np.random.default_rng(0).integers(0, N, (100_000, 1))
    after = outcomes(selector, begin(selector), draws)
    drift = lemma_9(START, LOSSES, ALPHA, GAMMA) - START
    error = after.std(0) / np.sqrt(len(draws))
    assert (np.abs(after.mean(0) - START - drift) < 4 * error).all()
    assert (np.abs(drift) > 10 * error).any()  # the drift is far outside the sampling error


@pytest.mark.parametrize("baseline, kept", [("running", 1.0), ("batch", 1 / 2 * N / (N - 1))])
def test_baseline_keeps_the_expected_direction_and_lowers_the_variance(baseline, kept):
    """All batches of B = 2 different rows.

    A number fixed before the batch: unchanged, as Σ_i ∇σ_i = 0. The batch mean holds each row's own cost with weight
    1/B: E[∇σ_i C_j] is -E[∇σ_i C_i] / (N-1) for two different rows, so (1 - 1/B) N / (N-1) of the expected gradient is
    left; all of it for B = N, nothing for B = 1.
    """
    pairs = list(itertools.permutations(range(N), 2))
    state = begin(Selector())._replace(baseline=jnp.float32(LOSSES.mean()))  # of earlier batches
    without = outcomes(Selector("bds", "sgd", ALPHA, baseline="none"), state, pairs)
    centred = outcomes(Selector("bds", "sgd", ALPHA, baseline=baseline), state, pairs)
    drift = -ALPHA * GAMMA * N * LOSSES @ jacobian(START) / N
    np.testing.assert_allclose(without.mean(0) - START, drift, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(centred.mean(0) - START, kept * drift, rtol=1e-4, atol=1e-6)
    assert (centred / kept).var(0).sum() < without.var(0).sum()  # also when rescaled to equal drift


@pytest.mark.parametrize("before", [np.nan, 1.5])
def test_a_batch_without_a_cost_leaves_the_running_mean(before):
    """As where no question of a batch has a pair of responses, one better than the other. Its mean would be 0."""
    selector = Selector(baseline="running")
    state = begin(selector)._replace(baseline=jnp.float32(before))
    after = move(selector, state, [(2, 0.0, 7.0), PADDING], 0.5, num_lower=0)
    np.testing.assert_array_equal(after.baseline, np.float32(before))
    np.testing.assert_array_equal(after.logits, state.logits)


def test_costs_of_influence_without_a_cost():
    """The running means of a batch in which no row has a cost stay as they are."""
    state = influence.InfluenceState({}, jnp.float32(2.0), jnp.float32(np.nan), jnp.float32(0.5), jnp.float32(0.25))
    after, _, _ = influence.costs(state, {}, jnp.ones(2), jnp.ones(2), jnp.zeros(2))
    np.testing.assert_array_equal(
        [after.influence_square, after.surprise_mean, after.surprise_square], np.float32([2, np.nan, 0.5])
    )
    assert after.correlation == 0.25


@pytest.mark.parametrize("correlation", [-0.4, 0.0, 0.1, 0.25, 0.33, 0.5, 1.0])
def test_part_of_the_surprise_is_that_of_the_best_linear_estimate(correlation):
    """A harm without noise is regressed on its noisy measure and on the surprise; of the former 43% is not noise."""
    of_harm, of_surprise = np.linalg.solve([[1, correlation], [correlation, 1 + 1e-12]], [0.43, correlation])
    expected = np.clip(of_surprise / of_harm, 0, 1) if correlation < 0.43 else 1.0
    np.testing.assert_allclose(influence.surprise_part(jnp.float32(correlation)), expected, rtol=1e-5)


def test_first_batch_is_its_own_running_mean():
    selectors = Selector(baseline="batch"), Selector(baseline="running")
    batch, running = (move(selector, begin(selector), *BATCHES[0]) for selector in selectors)
    np.testing.assert_array_equal(batch.logits, running.logits)
    np.testing.assert_allclose(running.baseline, 2.0, rtol=1e-6)  # (2 + 0.5 + 3.5) / 3


# --------------------------------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------------------------------


def test_probabilities():
    sample = jnp.array([3, 0, 3, N, N + 100, -1])
    expected = np.append(softmax(START)[[3, 0, 3]], [0, 0, 0])
    np.testing.assert_allclose(selection.probabilities(jnp.asarray(START), sample), expected, rtol=1e-6)


@pytest.mark.parametrize("shift", [0.0, 300.0, -300.0])
def test_weights_have_mean_one(shift):
    weights = N * selection.probabilities(jnp.asarray(START + shift), jnp.arange(N))
    np.testing.assert_allclose(weights.mean(), 1.0, rtol=1e-4)  # float32 logits of 300 have steps of 3e-5


def test_initial_weights_are_equal():
    state = selection.init(Selector(), N)
    np.testing.assert_allclose(N * selection.probabilities(state.logits, jnp.arange(N)), np.ones(N), rtol=1e-6)
    assert not np.any(state.visits)


@pytest.mark.parametrize("weight_scale, expected", [("dataset", 12.0), ("literal", 1.0)])
def test_scale(weight_scale, expected):
    assert Selector(weight_scale=weight_scale).scale(12) == expected


@pytest.mark.parametrize("max_sorted", [selection.MAX_SORTED, 10])
@pytest.mark.parametrize("logits", [START, np.zeros(11), np.random.default_rng(0).normal(size=1000) * 2])
def test_summary(logits, max_sorted, monkeypatch):
    monkeypatch.setattr(selection, "MAX_SORTED", max_sorted)
    weights = len(logits) * softmax(logits)
    ess = weights.sum() ** 2 / (len(logits) * np.sum(weights**2))
    expected = {"ess": ess, "weight_min": weights.min(), "weight_max": weights.max()}
    expected |= {f"weight_p{level:02d}": np.percentile(weights, level) for level in (1, 10, 50, 90, 99)}
    summary = selection.numbers(jax.device_get(selection.summary(jnp.asarray(logits, jnp.float32))))
    assert summary.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(summary[name], value, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(selection.effective_sample_size(jax.nn.softmax(jnp.asarray(logits, jnp.float32))), ess, rtol=1e-5)


def test_effective_sample_size_of_equal_groups():
    logits = jnp.where(jnp.arange(20) < 5, 0.0, -jnp.inf)  # a quarter of the rows shares all weight
    np.testing.assert_allclose(selection.effective_sample_size(jax.nn.softmax(logits)), 0.25, rtol=1e-6)


# --------------------------------------------------------------------------------------------------------------------
# Size and options
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule, optimizer", [*itertools.product(selection.RULES, selection.OPTIMIZERS)])
def test_nothing_larger_than_the_logits(rule, optimizer, intermediate_shapes):
    N, B = 1000, 8
    selector = Selector(rule, optimizer)
    state, sample, entries = selection.init(selector, N), jnp.arange(B), jnp.ones(B) / B
    update = functools.partial(selection.update, selector)
    shapes = intermediate_shapes(update, state, sample, entries, B, entries, 1.0)
    assert (N,) in shapes and max(np.prod(shape, dtype=int) for shape in shapes) == N


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rule": "bdz"}, "selection.rule='bdz'"),
        ({"optimizer": "lion"}, "selection.optimizer='lion'"),
        ({"baseline": "median"}, "selection.baseline='median'"),
        ({"weight_scale": "batch"}, "selection.weight_scale='batch'"),
        ({"learning_rate": 0.0}, "selection.learning_rate.*0.0"),
        ({"learning_rate": float("nan")}, "selection.learning_rate.*nan"),
        ({"tau": -2.0}, "selection.tau.*-2.0"),
        ({"parameterization": "mlp"}, "selection.parameterization='mlp'"),
        ({"ridge": -0.1}, "selection.ridge must not be negative"),
        ({"token_learning_rate": -0.1}, "selection.token_learning_rate must not be negative"),
        ({"parameterization": "features", "optimizer": "mirror"}, "selection.optimizer=mirror .* take adam or sgd"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Selector(**options)

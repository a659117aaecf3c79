"""The paper's statements on problems with known solutions. Each property is tested beside a case that lacks it."""

import functools

import numpy as np
import pytest

from experiments.theory import __main__ as command
from experiments.theory import bmo, lemma6, lemma7, lemma8, lemma9, plates, selection_rules, theorem1, theorem2, theorem3, theorem4
from tests.experiments.commands import command_line


@pytest.fixture(scope="module", autouse=True)
def measured_once():
    """Every statement is measured once, for its tests and for the page."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (bmo, lemma6, lemma7, lemma8, lemma9, selection_rules, theorem1, theorem2, theorem3, theorem4):
            patch.setattr(module, "measure", functools.cache(module.measure))
        yield


@pytest.fixture(scope="module")
def selection(measured_once):
    return theorem2.measure()


def test_a_losss_gradient_is_its_residual():
    points, step = np.array([[-2.2, 3.1], [0.3, 0.3], [4.1, -2.3]]), 1e-6  # none at a kink of a slope
    for axis in range(2):
        move = step * np.eye(2)[axis]
        slope = (plates.losses(points + move, plates.LOWER) - plates.losses(points - move, plates.LOWER)) / (2 * step)
        np.testing.assert_allclose(plates.residual(points, plates.LOWER)[..., axis], slope, atol=1e-8)


@pytest.mark.parametrize("rows", plates.supports(3))
def test_bds_values_of_boxes_are_those_of_a_search(rows):
    points = plates.grid(0.125)
    best = theorem1.minimisers(np.eye(3)[list(rows)].mean(0)[None], plates.losses(points, plates.LOWER))[0]
    values = plates.losses(points[best], plates.UPPER[None]).min()
    assert plates.bds_value(rows, plates.LOWER, plates.UPPER) == pytest.approx(values, abs=1e-12)


def test_lemma7_hessian_of_the_projects_loss_is_the_covariance_of_each_token():
    values = lemma7.measure()
    assert values["error"] < 1e-4  # float32 differences; entries are up to 0.25
    assert values["off_block"] < 1e-6
    assert values["smallest"] > -1e-14 and values["zeros"] == lemma7.TOKENS


def test_lemma7_the_loss_is_not_convex_in_parameters_that_multiply():
    a, b, step = 0.3, -0.2, 1e-4
    moves = step * np.array([[1, 0], [0, 1]])

    def loss(p):
        return np.log1p(np.exp(-p[0] * p[1]))

    point = np.array([a, b])
    numeric = [
        [(loss(point + u + v) - loss(point + u - v) - loss(point - u + v) + loss(point - u - v)) / (4 * step**2) for v in moves]
        for u in moves
    ]
    np.testing.assert_allclose(lemma7.in_parameters(a, b), numeric, atol=1e-6)
    assert np.linalg.eigvalsh(lemma7.in_parameters(a, b))[0] < -0.1


def test_theorem1_weak_pareto_points_are_the_weighted_minimisers_of_the_closed_simplex():
    values = theorem1.measure()
    assert (values["pareto"] == values["union"]).all()
    assert values["bmo"] == values["bds"] == 0
    assert values["lemma5"] == 0
    # Finite ω: only what all rows share, and with it the loss of training on all rows, ½·1².
    assert values["inside"].sum() < values["pareto"].sum() and values["bds_inside"] == pytest.approx(0.5)


def test_theorem1_without_a_shared_minimiser():
    concave, convex = theorem1.curve("concave"), theorem1.curve("convex")
    assert (convex["pareto"] == convex["union"]).all() and convex["bmo"] == pytest.approx(convex["bds"], abs=1e-12)
    on_segment = np.abs(concave["theta"]) <= 1 + 1e-9
    assert (concave["pareto"] == on_segment).all()  # where the two slopes have opposite signs
    assert concave["union"].sum() < 0.1 * on_segment.sum()
    assert concave["bds"] > concave["bmo"] + 0.4


def test_theorem1_a_local_solution_of_bds_that_is_none_of_bmo():
    values = theorem1.local_solutions()
    assert values["bds_near"] == values["here"] == pytest.approx(0.5)
    assert values["bmo_near"] == pytest.approx(0.5 * 0.75**2)


@pytest.mark.parametrize("rule", ["bds, mirror (default)", "bds, sgd as (10b)", "bds, adam 1e-2"])
def test_theorem2_useless_rows_lose_their_weight_and_useful_ones_share_it(selection, rule):
    assert selection["useless"][rule] < 1e-3
    assert selection["useful"][rule] > 0.1  # 1/8 each
    assert selection["trusted"][rule] < 1e-6


@pytest.mark.parametrize("rule", ["bmo, as (48)", "uniform (control)"])
def test_theorem2_rules_that_do_not_solve_bds_keep_useless_rows(selection, rule):
    assert selection["useless"][rule] > 0.05
    assert selection["trusted"][rule] > 1e-3


def test_theorem2_no_optimum_has_weight_on_a_row_without_trusted_minimisers(selection):
    assert selection["optimal"] == [(0,), (2,), (0, 2)]
    assert selection["stronger"] == [True, False, True]


def test_theorem2_as_printed_has_a_counterexample(selection):
    assert selection["printed"] == [False, False, True]  # row 1 is useless by Definition 3
    assert (0, 2) in selection["optimal"] and selection["three"][0] > 0.4 and selection["three_trusted"] < 1e-9


def test_theorem3_selection_is_strictly_below_mixing_for_every_rho():
    values = theorem3.measure()
    np.testing.assert_allclose(values["mixing"], values["closed"], rtol=1e-6)
    assert (values["mixing"] > values["selection"] + 1e-10).all()
    np.testing.assert_allclose(values["table"], values["table_closed"], rtol=1e-4)


def test_theorem3_mixing_ties_without_useless_rows_or_with_a_kink():
    together = np.delete(plates.LOWER, plates.USELESS, axis=0)
    assert theorem3.mixed(0.5, together, plates.UPPER) == 0
    assert theorem3.mixed(0.74, plates.LOWER, plates.UPPER, power=1) == 0  # ρ/3 < 1 - ρ: the kink holds
    assert theorem3.mixed(0.76, plates.LOWER, plates.UPPER, power=1) > 0.01


def test_theorem4_the_margin_is_sure_for_many_trusted_rows_and_turns_under_a_large_shift():
    values = theorem4.measure()
    for rho in theorem4.RHOS:
        assert values["share"][rho][-2:].min() == 1
        assert values["shifted"][rho][0] > 0 > values["shifted"][rho][-1]
    assert values["share"][0.05][0] < 0.9  # one trusted row is too few
    assert values["turns"][0.05] < values["turns"][0.5] < values["turns"][1.0]
    # ρ = 1 stays at 1/2, selection is in [1.5, 2]: of the strange centre's loss, 0 there, 0.6²/2 at 2.
    mean = np.mean(0.5 * (theorem4.CENTRES - 1) ** 2)
    assert values["turns"][1.0] == pytest.approx(-np.log(1 - mean / (mean + 0.18)), rel=1e-6)


def test_theorem4_mixing_by_hand():
    # ρ/2 (y - 1/2) = (1 - ρ) (3/2 - y) for the one centre 2, at ρ = 1/2: y = 7/6.
    assert theorem4.mixed(0.5, np.array([2.0])) == pytest.approx((7 / 6, 7 / 6))
    assert theorem4.selected(np.array([1.5, 2.0])) == (1.5, 2.0)


def test_lemma6_softmax_weights_are_the_slopes_of_the_merit():
    values = lemma6.measure()
    np.testing.assert_allclose(values["ours"], values["stated"], atol=1e-6)
    np.testing.assert_allclose(values["slope"], values["stated"], atol=1e-8)


def test_lemma6_ratios_are_proportional_to_them_only_for_equal_old_probabilities():
    values = lemma6.measure()
    assert values["equal"] < 1e-5
    assert values["unequal"] > 0.5
    assert np.ptp(values["fresh"]) < 1e-6 and np.ptp(values["stated"]) > 0.1


def test_lemma6_own_responses_weighted_to_be_on_policy_have_no_expected_gradient_unless_clipped():
    values = lemma6.measure()
    assert values["expected"] < 1e-6
    assert values["clipped"] > 0.05


def test_lemma8_is_an_equality_under_assumption_1():
    values = lemma8.measure()
    for tau, slack in values["slack"].items():
        assert slack["inner"] < 1e-12
        assert -1e-12 < slack["least"] and slack["most"] < np.log(3) / tau + 1e-12
    assert values["apart"]["inner"] > np.log(2) / 10 + 0.1
    # For fixed τ, γ → ∞ trains on all rows; a τ far above γ gives BMO.
    assert values["solutions"][1.0][-1] == pytest.approx(0.5) and values["solutions"][1000.0][-1] == 0


def test_lemma9_expected_move():
    values = lemma9.measure()
    np.testing.assert_allclose(values["mean"], values["stated"], atol=1e-6)
    assert values["z"] < 4.5
    assert values["stated"][values["cost"].argmax()] < -1e-3 and values["stated"][values["cost"].argmin()] > 1e-3
    assert np.abs(values["mirror"] - values["stated"]).max() > 1e-2  # another rule, another expectation


def test_lemma9_the_least_loss_may_lose_weight():
    values = lemma9.measure()
    assert values["least_omega"] > 1e-3 and values["least_sigma"] < -1e-3 < 1e-3 < values["least_sigma_mirror"]


@pytest.fixture(scope="module")
def rules(measured_once):
    return selection_rules.measure()


@pytest.mark.parametrize("name", selection_rules.PROBLEMS)
def test_selection_rules_optimal_weights_are_the_best_of_a_search(name):
    _, losses, optimal = selection_rules.PROBLEMS[name]
    weights = theorem1.simplex(len(optimal), 8)
    values = np.array([losses.loss(selection_rules.retrained(losses, sigma))[0] for sigma in weights])
    np.testing.assert_allclose(weights[values.argmin()], optimal, atol=1e-12)
    assert np.sort(values)[1] > values.min() + 1e-3 or name == "a"


@pytest.mark.parametrize("name", selection_rules.PROBLEMS)
def test_selection_rules_gradients_and_metagradients_are_finite_differences(name):
    losses = selection_rules.PROBLEMS[name].losses
    theta, step = losses.start() + np.array([0.3, -0.2]), 1e-5
    moves = step * np.eye(2)
    slope = [(losses.loss(theta + move) - losses.loss(theta - move)) / (2 * step) for move in moves]
    np.testing.assert_allclose(losses.gradient(theta).T, slope, atol=1e-8)
    curve = [(losses.gradient(theta + move) - losses.gradient(theta - move)) / (2 * step) for move in moves]
    np.testing.assert_allclose(losses.hessian(theta).transpose(1, 0, 2), curve, atol=1e-8)

    weights = np.arange(3.0, 3.0 + losses.loss(theta).size - 1)
    weights /= weights.sum()

    def trained(weights):
        return losses.loss(selection_rules.train(losses, weights, steps=20)[0])[0]

    _, metagradient = selection_rules.train(losses, weights, steps=20)
    moves = step * np.eye(len(weights))
    np.testing.assert_allclose(metagradient, [(trained(weights + m) - trained(weights - m)) / (2 * step) for m in moves], atol=1e-8)
    assert np.abs(metagradient).max() > 1e-3


def test_selection_rules_metagradient_of_the_counterexample_by_hand():
    # L0(θ*) = -Σ p log(s p + (1-s) q): derivative in s of a mixture.
    p, q, s = np.array([0.6, 0.4]), np.array([0.9, 0.1]), 0.7
    theta, metagradient = selection_rules.train(selection_rules.TWO, np.array([s, 1 - s]), steps=400)
    np.testing.assert_allclose(selection_rules.softmax(theta), s * p + (1 - s) * q, atol=1e-12)
    assert metagradient[0] - metagradient[1] == pytest.approx(-(p * (p - q) / (s * p + (1 - s) * q)).sum(), abs=1e-9)


def test_selection_rules_the_loss_rule_drops_the_row_that_is_identical_to_the_trusted_ones(rules):
    values, p, q = rules["problems"]["c"], np.array([0.6, 0.4]), np.array([0.9, 0.1])
    gammas = selection_rules.RHOS / (1 - selection_rules.RHOS)
    slowest = selection_rules.ALPHA * selection_rules.STEPS * gammas.sum() * 0.3 * np.log(1.5)
    assert values["sigma"]["loss (10b)"][0] < np.exp(-slowest) < 1e-12
    np.testing.assert_allclose(selection_rules.softmax(values["theta"]["loss (10b)"]), (p + 9 * q) / 10, atol=1e-6)
    assert values["joint"]["loss (10b)"] == pytest.approx(p @ np.log(10 * p / (p + 9 * q)), abs=1e-6)
    assert values["excess"]["loss (10b)"] == pytest.approx(p @ np.log(p / q), abs=1e-9)
    for rule in selection_rules.RULES[1:]:
        assert values["sigma"][rule][0] > 0.94 and rules["four"]["sigma"][rule][0] > 0.94
        assert (np.diff(values["path"][rule][:, 0]) > -1e-12).all()  # towards 1 in every step
    assert rules["printed"][0] < 0.01
    assert rules["four"]["excess"]["loss (10b)"] == pytest.approx(-np.log(4 * 0.85) / 4 - 0.75 * np.log(4 * 0.05), abs=1e-9)


def test_selection_rules_which_solve_which_problem(rules):
    loss, tracked, influence, metagradient = selection_rules.RULES
    assert rules["solved"] == {
        "a": [loss, tracked, influence],
        "b": [tracked, influence, metagradient],
        "c": [tracked, influence, metagradient],
        "d": [loss, tracked, influence, metagradient],
        "e": [loss, tracked, metagradient],
        "f": [],
    }
    failed = [values["excess"][rule] for values in rules["problems"].values() for rule in selection_rules.RULES]
    assert not any(0.5 * selection_rules.SOLVED < excess < 10 * selection_rules.SOLVED for excess in failed)  # none is close
    assert rules["by_luck"][0] < 1e-6  # the loss rule in e, with larger steps
    tracked_sigma, influence_sigma = rules["overshoot"]["sigma"][1:]
    np.testing.assert_allclose(tracked_sigma, (5 / 8, 3 / 8, 0), atol=0.01)
    assert abs(influence_sigma[0] - 5 / 8) > 0.1


def test_selection_rules_fixed_points_by_hand(rules):
    sigma = rules["problems"]["e"]["sigma"]
    # θ = ((3/2 + γx)/(1 + γ), (4γx - 1/2)/(1 + 4γ)), θ' = (x, x), x = σ_1 - 1/2, γ = 9. Influence: ⟨(1, 4), θ - t⟩ = 0.
    assert sigma["influence"][0] == pytest.approx(0.5 + (1.5 / 10 - 8 / 37) / (1 / 10 + 16 / 37), abs=1e-3)
    # (44): ⟨(1, 4), θ - θ'⟩ = 0.
    assert sigma["tracked (44)"][0] == pytest.approx(0.5 + (1.5 / 10 - 2 / 37) / (1 / 10 + 4 / 37), abs=1e-2)


def test_selection_rules_a_separable_lower_level_is_flat_and_f_has_two_local_solutions(rules):
    assert rules["flat"][10] > 0.1 and rules["flat"][selection_rules.TRAIN_STEPS] < 1e-4
    assert rules["flat"][10 * selection_rules.TRAIN_STEPS] < 1e-30
    assert rules["short"][0] > 0.99
    losses = selection_rules.PROBLEMS["f"].losses
    curve = [losses.loss(selection_rules.retrained(losses, np.array([s, 1 - s])))[0] for s in np.linspace(0, 1, 21)]
    assert np.argmax(curve) not in (0, 20) and curve[-1] < curve[0] < curve[1] and curve[-1] < curve[-2]
    assert curve[9] < curve[10]  # at equal weights the way down leads to row 2


def test_bmo_over_rows_ends_where_the_fixed_point_is():
    """Problem c: λ_1 solves one equation. The trusted loss has no part in λ, so row 1, of the higher entropy, has below ½."""
    p, q, gamma = np.array([0.6, 0.4]), np.array([0.9, 0.1]), bmo.GAMMA
    assert gamma == pytest.approx(9)
    for tau in bmo.TAUS:
        theta, sigma = bmo.deterministic(selection_rules.TWO, tau)
        m = selection_rules.softmax(theta)
        np.testing.assert_allclose(m, (p + gamma * (sigma[0] * p + sigma[1] * q)) / (1 + gamma), atol=1e-6)
        loss = -np.log(m)
        assert sigma[0] == pytest.approx(np.exp(-tau * p @ loss) / (np.exp(-tau * p @ loss) + np.exp(-tau * q @ loss)), abs=1e-9)
        assert sigma[0] == pytest.approx(bmo.fixed_point(p, q, tau, gamma), abs=1e-6) and sigma[0] < 0.5


def test_bmo_descends_the_softmin():
    """(42) is the gradient of L0 + γ·softmin: finite differences of -(γ/τ) log Σ exp(-τℓ)."""
    losses, tau, step = selection_rules.PROBLEMS["f"].losses, 2.0, 1e-6
    theta = np.array([0.3, -0.2])

    def merit(theta):
        loss = losses.loss(theta)
        return loss[0] - 9 / tau * np.log(np.exp(-tau * loss[1:]).sum())

    slope = [(merit(theta + move) - merit(theta - move)) / (2 * step) for move in step * np.eye(2)]
    gradient = losses.gradient(theta)
    np.testing.assert_allclose(gradient[0] + 9 * bmo.weights(losses, theta, tau) @ gradient[1:], slope, atol=1e-6)


def test_stochastic_bmo_has_the_same_limit():
    losses = selection_rules.TWO
    _, sigma = bmo.stochastic(losses, 1.0, losses.start(), np.zeros(2))
    assert sigma[0] == pytest.approx(bmo.fixed_point(*losses.answers[1:], 1.0, bmo.GAMMA), abs=0.005)


def test_the_command_writes_a_page_with_its_figures(tmp_path):
    with command_line("theory", [f"--out={tmp_path}/theory"], command.FLAGS):
        command.main()
    page = (tmp_path / "theory.md").read_text()
    figures = sorted(file.name for file in (tmp_path / "theory").iterdir())
    assert len(figures) == 10 and all(f"](theory/{name})" in page for name in figures)

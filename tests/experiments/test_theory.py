"""The paper's statements on problems with known solutions. Each property is tested beside a case that lacks it."""

import functools

import numpy as np
import pytest

from experiments.theory import __main__ as command
from experiments.theory import lemma6, lemma7, lemma8, lemma9, plates, theorem1, theorem2, theorem3, theorem4
from tests.experiments.commands import command_line


@pytest.fixture(scope="module", autouse=True)
def measured_once():
    """Every statement is measured once, for its tests and for the page."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (lemma6, lemma7, lemma8, lemma9, theorem1, theorem2, theorem3, theorem4):
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


def test_the_command_writes_a_page_with_its_figures(tmp_path):
    with command_line("theory", [f"--out={tmp_path}/theory"], command.FLAGS):
        command.main()
    page = (tmp_path / "theory.md").read_text()
    figures = sorted(file.name for file in (tmp_path / "theory").iterdir())
    assert len(figures) == 8 and all(f"](theory/{name})" in page for name in figures)

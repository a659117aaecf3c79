"""Measures of a run, by hand."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax import evaluation, objective, online, selector
from bilevel_jax.data import templates


def test_held_out_pairs_are_scored_once():
    """Each response of a pair is in one call. Loss and greedy matches are those of the chosen responses."""
    pairs = [((4, 2), (9,)), ((1,), (3, 3)), ((5, 5), (7,))]  # chosen and rejected
    prompt = np.zeros(1, int)
    examples = [templates.Example(prompt, *map(np.array, pair)) for pair in pairs]
    clean = [templates.Example(prompt, np.array([6, 2]), None)]
    calls = []

    def score(base, adapter, segments, description):
        """The NLL of a token is its number; responses without a 4 are those of greedy decoding."""
        responses = [tuple(segment.response.tolist()) for segment in segments]
        calls.append(responses)
        lengths = np.array([len(response) for response in responses])
        return np.array([sum(response) for response in responses], float), lengths, np.array([4 not in one for one in responses])

    # NLL of rejected less that of chosen: 3, 5 and -3. Of the reference: 2, 5 and 0. One rose, one is a tie, one fell.
    references = np.array([[0.0, -2.0], [-1.0, -6.0], [-4.0, -4.0]])
    aim = objective.Objective(upper="dpo", beta=0.5)
    rows = evaluation.HeldOut({"upper": examples, "lower": clean, "lower_clean": clean}, {"upper": references}, aim)
    values = evaluation.measure(rows, score, None, None)
    assert calls == [[response for pair in pairs for response in pair], [(6, 2)], [(6, 2)]]
    assert values == {
        "eval/upper_loss": pytest.approx((6 / 2 + 1 / 1 + 10 / 2) / 3),
        "eval/upper_right": pytest.approx(2 / 3),
        "eval/upper_pair_loss": pytest.approx(np.mean([np.log(1 + np.exp(-0.5 * gain)) for gain in (1, 0, -3)])),
        "eval/upper_pair_accuracy": pytest.approx((1 + 0.5 + 0) / 3),
        "eval/lower_loss": 4.0,
        "eval/lower_clean_loss": 4.0,
        "eval/lower_clean_right": 1.0,
    }
    # The log-ratios of IPO are means over the tokens of a response.
    gains = [(-6 / 2 - 0 / 2) - (-9 / 1 + 2 / 1), (-1 + 1) - (-6 + 6) / 2, (-10 + 4) / 2 - (-7 + 4)]
    ipo = evaluation.HeldOut(rows.examples, rows.references, objective.Objective(upper="ipo", beta=0.5))
    expected = np.mean([(gain - 1 / (2 * 0.5)) ** 2 for gain in gains])
    assert evaluation.measure(ipo, score, None, None)["eval/upper_pair_loss"] == pytest.approx(expected)


def test_rows_in_use():
    """Row 2 has two generated responses, row 5 one, row 7 none; row 9 is not measured."""
    examples = [templates.Example(np.array([i]), np.array([i] * (i + 1)), None) for i in range(10)]
    store = online.from_arrays(
        {
            "step": np.array([3]),
            "masked": np.isin(np.arange(10), (2, 5, 7, 9)),
            "row": np.array([2, 2, 5, 9]),
            "sample": np.array([0, 1, 0, 0]),
            "log_prob": np.zeros(4),
            "log_ratio": np.zeros(4),
            "tokens": np.array([100, 100, 40, 20, 20, 0]),
            "length": np.array([2, 1, 2, 1]),
        }
    )

    def score(base, adapter, segments, description):
        """The NLL of a token is its number."""
        lengths = np.array([len(segment.response) for segment in segments])
        return np.array([segment.response.sum() for segment in segments], float), lengths, lengths > 0

    values = evaluation.rows_in_use(examples, store, np.array([2, 5, 7, 8]), score, None, None)
    # ℓ of the data: 2, 5, 7, 8. Row 2: (200/2 + 40/1) / 2 = 70; row 5: 40/2 = 20.
    assert values["eval/used_data_loss"] == pytest.approx((2 + 5 + 7 + 8) / 4)
    assert values["eval/used_loss"] == pytest.approx((70 + 20 + 7 + 8) / 4)
    assert values["eval/used_generated"] == 2 / 4


@pytest.mark.parametrize("keep, share", [(0.1, None), (0.5, 0.5)])
def test_bad_rows_among_the_kept_ones(keep, share):
    """Of four rows, the heaviest two, of which one is bad; a tenth of four is none, which has no share of bad rows."""
    select = selector.Selector(rule="bds")
    state = types.SimpleNamespace(selector=selector.init(select, 4), token_params=None)
    state.selector = state.selector._replace(logits=jnp.array([3.0, 2.0, 1.0, 0.0]))
    values = evaluation.selector_metrics(state, "bds", np.array([False, True, True, False]), keep)
    assert values.get("selector/bad_among_kept") == share and values["selector/auroc"] == 0.5

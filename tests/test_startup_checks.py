"""Settings that do not go with the rows of a run, which are known once it starts."""

import dataclasses
import types

import pytest

from bilevel_jax import config as configuration
from bilevel_jax import startup_checks

CONFIG = configuration.Config()


def test_a_search_needs_trusted_rows_for_each_part():
    config = dataclasses.replace(CONFIG, selection=configuration.Selection(rule="metagradient"))
    startup_checks.check_trusted_rows(config, startup_checks.MIN_TRUSTED_ROWS, 0)
    with pytest.raises(configuration.ConfigError, match="^selection.rule=metagradient needs 6 trusted rows for training, not 5"):
        startup_checks.check_trusted_rows(config, 5, 0)
    startup_checks.check_trusted_rows(dataclasses.replace(config, method="mixing"), 5, 0)  # searches nothing


@pytest.mark.parametrize("options, key", [({"keep_best": True}, "keep_best"), ({"patience": 2}, "patience")])
def test_judging_by_held_out_rows_needs_some(options, key):
    config = dataclasses.replace(CONFIG, eval=configuration.Eval(num_upper=0.1, **options))
    startup_checks.check_trusted_rows(config, 9, 1)
    with pytest.raises(
        configuration.ConfigError, match=rf"^eval.{key} needs held-out trusted rows: eval.num_upper=0.1 of 1 holds none"
    ):
        startup_checks.check_trusted_rows(config, 1, 0)


def level_of(num_rows, num_held_out, **fields):
    """A level with as many rows, as far as `notices` reads it."""
    rows = [types.SimpleNamespace(fields={"question": "", **fields})] * num_rows
    return types.SimpleNamespace(rows=rows, eval_rows=[None] * num_held_out)


def test_numbers_of_rows_that_a_user_would_want_to_know():
    config = dataclasses.replace(CONFIG, batch=configuration.Batch(size=16), eval=configuration.Eval(num_upper=0.1))
    assert startup_checks.notices(config, level_of(18, 2), level_of(16, 0)) == []
    assert startup_checks.notices(config, level_of(15, 0), level_of(9, 0)) == [
        "batch.size=16 is more than the 15 rows of data.upper to train on, and repeats some of them in every step",
        "batch.size=16 is more than the 9 rows of data.lower to train on, and has all of them in every step",
        "data.upper has only 15 trusted rows; what they want is clearer with 20 or more",
        "eval.num_upper=0.1 of 15 trusted rows holds none out, so the trusted loss is not measured",
    ]


@pytest.mark.parametrize(
    "selection, num_epochs, expected",
    [
        ({"optimizer": "adam", "learning_rate": 3.0}, 5, "selection.learning_rate=3: adam moves each logit"),
        ({"optimizer": "adam", "learning_rate": 0.1}, 5, None),
        ({"learning_rate": 3.0}, 6, "ρ grows to 0.6 in 6 epochs, and with it"),
        ({"rule": "uniform"}, 6, None),
    ],
)
def test_settings_that_give_few_rows_all_the_weight(selection, num_epochs, expected):
    """ρ is 0.1 in the first epoch and grows by 0.1."""
    config = dataclasses.replace(
        CONFIG, batch=configuration.Batch(size=1), num_epochs=num_epochs, selection=configuration.Selection(**selection)
    )
    lines = startup_checks.notices(config, level_of(18, 2), level_of(2, 0))
    assert len(lines) == (expected is not None) and all(line.startswith(expected) for line in lines)


def test_a_label_that_no_row_has():
    config = dataclasses.replace(CONFIG, batch=configuration.Batch(size=1), data=configuration.Data(label="unsaef"))
    [line] = startup_checks.notices(config, level_of(18, 2), level_of(2, 0, unsafe=True))
    assert line.startswith("data.label=unsaef: no row of data.lower has this field (did you mean unsafe?), so")


@pytest.mark.parametrize("method", ["online", "dynamic"])
def test_a_ratio_that_masks_no_row(method):
    config = dataclasses.replace(CONFIG, method=method, online=configuration.Online(ratio=0.1, refresh_every=2))
    startup_checks.check_masks(config, 100, 10)
    with pytest.raises(
        configuration.ConfigError, match="^online.ratio=0.1 of 9 lower-level rows masks none; set it to at least 0.11"
    ):
        startup_checks.check_masks(config, 100, 9)
    startup_checks.check_masks(dataclasses.replace(config, method="offline"), 100, 9)

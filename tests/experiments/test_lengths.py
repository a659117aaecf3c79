"""Lengths as rewards: by hand, on a small model, and the config of every cell."""

import ml_collections
import numpy as np
import pytest

from bilevel_jax import checks
from bilevel_jax import config as configuration
from experiments import comparing, measures
from experiments.didactic import length_rewards, lengths
from experiments.paper import published


def test_rewards_by_hand():
    responses = ["", "x" * 30, "x" * 86, "x" * 100]
    nothing = [""] * 4
    assert length_rewards.shortest(nothing, responses, nothing) == [0, -30, -86, -100]
    assert length_rewards.typical(nothing, responses, nothing) == [-30, 0, -56, -70]
    assert length_rewards.rare(nothing, responses, nothing) == [-86, -56, 0, -14]
    assert length_rewards.mean("skew", np.array([86, 100])) == length_rewards.mean("reuse", np.array([6, 8])) == -7


def test_every_claim_compares_two_cells():
    assert len(set(lengths.CLAIMS)) == len(lengths.CLAIMS) > 0
    for claim in lengths.CLAIMS:
        assert claim.cell != claim.than and {claim.cell, claim.than} <= published.LENGTHS.keys()


@pytest.mark.parametrize("cell", published.LENGTHS)
def test_every_cell_has_a_valid_config(cell):
    """With as many steps and samples as the page says."""
    config = configuration.default()
    config.update_from_flattened_dict(published.LENGTHS[cell])
    checks.build(ml_collections.ConfigDict(config))
    rows = config.data.num_lower - config.eval.num_lower
    steps = config.num_epochs * rows // config.batch.size
    assert config.loss.upper == config.loss.lower == "sft"
    if "reuse" in cell:
        passes = int(cell.split()[-2])
        assert rows == 64 and steps == 32 * passes and steps / config.online.refresh_every == 8
    else:
        assert rows == 640 and steps == 40 and config.online.refresh_every == (2 if "on-policy" in cell else 10**6)


@pytest.mark.slow
def test_answers_are_measured(finished):
    """The answers of a trained adapter differ from those of the base model to the same questions."""
    run = comparing.Run(finished, {})
    before = measures.add_learned_lengths(comparing.Results("safety", {"min, DPO, on-policy": {3: run}}, {}, [], []), 1)
    assert run.values[measures.REWARD] == -run.values[measures.LENGTH] < 0
    assert before.keys() == {3} and before[3].ndim == 1 and before[3].mean() != run.values[measures.LENGTH]

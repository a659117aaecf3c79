"""Lengths as rewards: by hand, of a model whose answers are known, and every cell a run that may start."""

import ml_collections
import numpy as np
import pytest

from bilevel_jax import config as configuration
from experiments import comparing, length_rewards, lengths, paper
from tests.test_sweep import ROOT


def test_rewards_by_hand():
    said = ["", "x" * 30, "x" * 86, "x" * 100]
    nothing = [""] * 4
    assert length_rewards.shortest(nothing, said, nothing) == [0, -30, -86, -100]
    assert length_rewards.typical(nothing, said, nothing) == [-30, 0, -56, -70]
    assert length_rewards.rare(nothing, said, nothing) == [-86, -56, 0, -14]
    assert lengths.mean_reward("skew", np.array([86, 100])) == lengths.mean_reward("reuse", np.array([6, 8])) == -7


def test_every_claim_compares_two_cells():
    assert len(set(lengths.CLAIMS)) == len(lengths.CLAIMS)
    for claim in lengths.CLAIMS:
        assert claim.cell != claim.than and {claim.cell, claim.than} <= paper.LENGTHS.keys()


@pytest.mark.parametrize("cell", paper.LENGTHS)
def test_every_cell_may_start(cell):
    """And takes as many steps and samples as the page says."""
    config = configuration.default()
    config.update_from_flattened_dict(paper.LENGTHS[cell])
    configuration.check(ml_collections.ConfigDict(config))
    rows = config.data.num_lower - config.eval.num_lower
    steps = config.num_epochs * rows // config.batch.size
    assert config.loss.upper == config.loss.lower == "sft"
    if "reuse" in cell:
        passes = int(cell.split()[-2])
        assert rows == 64 and steps == 32 * passes and steps / config.online.refresh_every == 8
    else:
        assert rows == 640 and steps == 40 and config.online.refresh_every == (2 if "on-policy" in cell else 10**6)


def test_answers_are_measured(finished, monkeypatch):
    """Those of an adapter that was trained differ from those of the base, and both come from the same questions."""
    monkeypatch.chdir(ROOT)
    lengths.flags.FLAGS(["lengths", "--answers=1"])
    run = comparing.Run(finished, {})
    before = lengths.measure(comparing.Results("safety", {"min, DPO, on-policy": {3: run}}, {}, [], []))
    assert run.values[lengths.REWARD] == -run.values[lengths.LENGTH] < 0
    assert before.keys() == {3} and before[3].ndim == 1 and before[3].mean() != run.values[lengths.LENGTH]

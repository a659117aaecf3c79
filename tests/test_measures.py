"""What is measured of finished runs, beside what the runs and the sampler say."""

import json

import numpy as np
import pytest

from bilevel_jax import sampling, tiers, train, workspace
from bilevel_jax.models import huggingface
from experiments import measures


def test_losses_after_training_are_the_run_s_own(finished):
    config = workspace.read_config(finished)
    setup = train.load(config)
    found = measures.after_training(config, setup)(huggingface.load_adapter(finished / "adapter", setup.model)[1])
    summary = json.loads((finished / "summary.json").read_text())
    for key in (measures.UPPER, measures.RIGHT):
        assert found[key] == pytest.approx(summary[key], rel=1e-5)


def test_right_answers_are_those_that_greedy_decoding_gives():
    config = tiers.get("")
    config.update_from_flattened_dict(
        {"data.upper": "synthetic:upper", "data.lower": "synthetic:lower", "data.num_upper": 50, "data.num_lower": 70}
        | {"eval.num_upper": 30, "eval.num_lower": 50}
    )
    setup = train.load(config)
    settings = sampling.Settings(0.0, max_new_tokens=128)
    sample = sampling.make_sampler(setup.model, settings, setup.eos, slots=8, length=config.data.max_length, mesh=setup.mesh)
    asked = setup.lower.eval_rows
    keys = sampling.row_keys(0, [row.id for row in asked], 0, 1)
    answers = sample(setup.base, None, [example.prompt for example in setup.lower.eval_examples], keys, "answering")
    right = [setup.detokenize(one.tokens.tolist()) == row.fields["truth"] for (one,), row in zip(answers, asked)]
    assert 0.5 < np.mean(right) < 1
    assert measures.after_training(config, setup)(None)[measures.ACCURACY] == np.mean(right)

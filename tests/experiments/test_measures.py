"""Measures of finished runs, compared with the summaries of the runs and with the sampler."""

import json

import numpy as np
import pytest

from bilevel_jax import presets, sampling
from bilevel_jax import setup as setups
from bilevel_jax.data import rows, streaming, synthetic
from bilevel_jax.models import huggingface
from bilevel_jax.runtime import weight_table
from bilevel_jax.runtime.workdir import read_config
from experiments import comparing, measures
from tests.conftest import write_jsonl


def test_losses_after_training_equal_those_of_the_summary(finished):
    config = read_config(finished)
    setup = setups.load(config)
    values = measures.after_training(config, setup)(huggingface.load_adapter(finished / "adapter", setup.model)[1])
    summary = json.loads((finished / "summary.json").read_text())
    for key in (measures.UPPER, measures.RIGHT):
        assert values[key] == pytest.approx(summary[key], rel=1e-5)


def test_accuracy_equals_that_of_greedy_decoding():
    config = presets.get("")
    config.update_from_flattened_dict(
        {"data.upper": "synthetic:upper", "data.lower": "synthetic:lower", "data.num_upper": 50, "data.num_lower": 70}
        | {"eval.num_upper": 30, "eval.num_lower": 50}
    )
    setup = setups.load(config)
    settings = sampling.Settings(0.0, max_new_tokens=128)
    sample = sampling.make_sampler(setup.model, settings, setup.eos, slots=8, length=config.data.max_length, mesh=setup.mesh)
    questions = setup.lower.eval_rows
    keys = sampling.row_keys(0, [row.id for row in questions], 0, 1)
    answers = sample(setup.base, None, [example.prompt for example in setup.lower.eval_examples], keys, "answering")
    right = [setup.detokenize(answer.tokens.tolist()) == row.fields["truth"] for (answer,), row in zip(answers, questions)]
    assert 0.5 < np.mean(right) < 1
    assert measures.after_training(config, setup)(None)[measures.ACCURACY] == np.mean(right)


def test_suppliers_weigh_as_their_rows_do(tmp_path):
    """Twelve rows, two per supplier; the rows of the first two suppliers have twice the weight of the others."""
    config = presets.get("")
    config.update_from_flattened_dict({"data.upper": "synthetic:upper", "data.lower": "synthetic:domains", "data.num_lower": 12})
    (tmp_path / "config.json").write_text(config.to_json())
    given = list(streaming.reopen(config))
    names = list(synthetic.SUPPLIERS)
    heavy = np.array([row.source in names[:2] for row in given])
    table = weight_table.table(given, np.where(heavy, np.log(2.0), 0.0), np.zeros(12), np.zeros(12))
    weight_table.write(tmp_path / "weights" / "epoch_1.parquet", table)
    run = comparing.Run(tmp_path, {})
    measures.add_source_weights(comparing.Results("safety", {"cell": {0: run}}, {}, [], []))
    for name in names:
        assert run.values[f"weight/{name}"] == pytest.approx((2 if name in names[:2] else 1) * 12 / 16)
    # Ranks less their means: 2, 2 and four times -1, beside 2.5, 1.5, ... -2.5: 12 / √(12 · 17.5).
    assert run.values["order"] == pytest.approx(12 / (12 * 17.5) ** 0.5)
    right = np.array([not row.fields["bad"] for row in given])
    assert run.values["right_weight"] == pytest.approx((right * np.where(heavy, 2, 1)).sum() / 16)


def test_auroc_of_bad_words_by_the_weights_of_rows_and_tokens(tmp_path):
    """Three rows of three one-letter words: one right, one whose third word is bad, one with two bad words."""
    spans, kinds = [[], [[4, 5]], [[0, 1], [4, 5]]], ["clean", "noise", "tail"]
    given = [
        {"question": f"q{i}", "response": "a b c", "bad_spans": of_row, "kind": kind}
        for i, (of_row, kind) in enumerate(zip(spans, kinds))
    ]
    config = presets.get("")
    file = write_jsonl(tmp_path / "rows.jsonl", given)
    config.update_from_flattened_dict({"data.upper": "synthetic:upper", "data.lower": str(file)})
    read, _ = rows.read_rows(file)
    inside = [[1.0, 1.0, 1.0], [1.2, 1.2, 0.6], [0.9, 1.5, 0.6]]
    runs = {}
    for name in ("by row", "by row and word"):
        directory = tmp_path / name
        table = weight_table.table(read, np.log([1.5, 1.0, 0.5]), np.zeros(3), np.zeros(3))
        weight_table.write(directory / "weights" / "epoch_1.parquet", table)
        (directory / "config.json").write_text(config.to_json())
        runs[name] = comparing.Run(directory, {})
    offsets = [np.array([[0, 1], [2, 3], [4, 5]])] * 3
    table = weight_table.token_table(read, offsets, [np.float32(weights) for weights in inside])
    weight_table.write(runs["by row and word"].workdir / weight_table.TOKENS, table)
    measures.add_token_aurocs(comparing.Results("safety", {name: {0: run} for name, run in runs.items()}, {}, [], []))
    # Bad tokens weigh 1, 0.5, 0.5 by row, others 1.5 three times, 1 twice, 0.5: of 18 pairs 3 + 2/2 and twice 5 + 1/2 are right.
    assert runs["by row"].values["words"] == pytest.approx((3 + 1 + 2 * 5.5) / 18)
    assert runs["by row"].values["words/noise"] == pytest.approx((3 + 1) / 5)  # beside the tokens of right rows and its own
    assert runs["by row"].values["words_inside"] == 0.5
    # Within: 0.6, 0.9 and 0.6, and 1, 1, 1, 1.2, 1.2, 1.5.
    assert runs["by row and word"].values["words_inside"] == 1
    # Times the row's: 0.6, 0.45, 0.3, and 1.5 three times, 1.2 twice, 0.75.
    assert runs["by row and word"].values["words"] == 1
    assert runs["by row and word"].values["words/tail"] == 1


def test_ranking_after_each_epoch(tmp_path):
    """Bad row 0 is heavier than one of three right ones after epoch 1, and lightest after epoch 2; row 3 is hard."""
    given = list(rows.parse(enumerate(({"question": f"q{i}", "response": "a"} for i in range(4)), 1)))
    bad, hard = np.arange(4) == 0, np.arange(4) == 3
    row_labels = measures.Labels(bad, hard, np.where(bad, "garbage", "clean"))
    for epoch, logits in ((1, [0.5, 1.0, 0.0, 0.9]), (2, [-1.0, 0.0, 0.1, 0.2])):
        shuffled = [given[i] for i in (2, 0, 3, 1)]
        table = weight_table.table(shuffled, np.array(logits)[[2, 0, 3, 1]], np.zeros(4), np.zeros(4))
        weight_table.write(tmp_path / "weights" / f"epoch_{epoch}.parquet", table)
    assert measures.over_epochs(tmp_path, given, row_labels) == {
        "epoch/1/selector/auroc": pytest.approx(2 / 3), "epoch/1/auroc_hard": 1.0,
        "epoch/2/selector/auroc": 1.0, "epoch/2/auroc_hard": 1.0,
    }  # fmt: skip


def test_real_rows_are_bad_where_their_label_is_certain():
    sources = [("hh", "A"), ("hh", "B"), ("bt", "H"), ("safeinstr/safe_answer", ""), ("dolly", "")]
    fields = [{"question": "q", "response": str(i), "source": name, "unsafe_tier": tier} for i, (name, tier) in enumerate(sources)]
    given, _ = rows.collect(rows.parse(enumerate(fields, 1), preference=False), "some")
    values = measures.ranked_rows(np.array([1.0, 3.0, 2.0, 1.5, 4.0]), measures.labels(given), keep=0.6)
    assert values == {
        "selector/auroc": pytest.approx(5 / 6),  # bad 1 and 2 against 3, 1.5 and 4
        "selector/bad_kept": 0.5,
        "selector/bad_among_kept": pytest.approx(1 / 3),
        "auroc_hard": 0.5,
        "kind/bt": pytest.approx(2 / 3),
        "kind/hh": 1.0,
    }

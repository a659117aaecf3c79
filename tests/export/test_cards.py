"""Cards of a run written by hand."""

import hashlib
import json

import numpy as np
import pytest
import yaml

from bilevel_jax import config as configuration
from bilevel_jax.data import rows
from bilevel_jax.export import cards, kept_rows, records, selected_rows
from bilevel_jax.runtime import weight_table


@pytest.fixture
def provenance(tmp_path):
    """Of a finished run without rows."""
    config = configuration.default()
    (tmp_path / "config.json").write_text(config.to_json())
    summary = {"rows": 7, "steps": 3, "start/upper_loss": 2.0, "eval/upper_loss": 1.25, "eval/lower_loss": 0.5}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    return cards.Provenance(tmp_path, config, "python -m bilevel_jax.export --selected=a|b.jsonl")


def card_of(provenance, objects, keep, renamed=(), share=0.0, **measures):
    parsed = list(rows.parse(enumerate(objects, 1)))
    ones = np.ones(len(parsed))
    table = weight_table.table(parsed, np.log(np.arange(1, len(parsed) + 1)), ones, 0 * ones, **measures)
    left_out = selected_rows.smallest(table, "plausible", share)
    kept = selected_rows.choose(table, keep, left_out)
    out = provenance.workdir / "a.jsonl"
    marks = [rows.mark(row, "bad") for row in parsed]
    labels = np.array([rows.UNLABELLED if mark is None else mark for mark in marks], np.int8)
    selection = kept_rows.KeptRows(
        records.Records(),
        np.flatnonzero(kept),
        kept,
        None,
        labels,
        table,
        "original",
        list(renamed),
        {"plausible": int(left_out.sum())} if share else {},
    )
    return cards.data_card(provenance, out, selection)


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_weights_by_hand(provenance):
    """Weights 1 to 4 over their mean of 2.5, and the heavier half of them; ESS/N is 100 / (4 · 30), 49 / (2 · 25), 9 / (2 · 5)."""
    card = card_of(provenance, [{"question": f"{i}", "response": "x", "bad": i == 0} for i in range(4)], 0.5)
    assert "| all | 0.4 | 0.46 | 0.7 | 1 | 1.3 | 1.54 | 1.6 | 0.8333 |" in card
    assert "| kept | 1.2 | 1.22 | 1.3 | 1.4 | 1.5 | 1.58 | 1.6 | 0.9800 |" in card
    assert "| dropped | 0.4 | 0.42 | 0.5 | 0.6 | 0.7 | 0.78 | 0.8 | 0.9000 |" in card
    assert "25.0% of all rows, 0.0% of the kept rows, 50.0% of the dropped rows" in card


def test_shares_of_bad_rows_by_hand(provenance):
    """Rows 0, 1 and 4 of 5 are bad, rows 1 to 4 are kept: 2 of 3 bad rows are kept, and 2 of 4 kept rows are bad."""
    objects = [{"question": f"{i}", "response": "x", "bad": i in (0, 1, 4)} for i in range(5)]
    card = card_of(provenance, objects, 0.8)
    assert "| bad rows that are kept, of all bad | 66.7% |" in card and "| kept rows that are bad | 50.0% |" in card


def test_measures(provenance):
    """Rows 3 and 4 of 5 are bad, and row 4, the heaviest, is the least plausible: 1 of 2 bad rows is kept, 1 of 4 kept rows."""
    objects = [{"question": f"{i}", "response": "x", "bad": i > 2} for i in range(5)]
    loss = np.array([0, 0, 0, 0, 1.0])
    card = card_of(provenance, objects, 0.8, share=0.2, surprise=loss, useful=-loss)
    assert "of the run), `plausible` (how likely the model finds the response, above all" in card
    assert "and `useful` (how much the row helps the trusted rows; below 0 it harms them)." in card
    assert "Rows with the smallest `plausible` were left out first: 1." in card
    assert "| bad rows that are kept, of all bad | 50.0% |" in card and "| kept rows that are bad | 25.0% |" in card
    card = card_of(provenance, objects, 0.8, surprise=loss)
    assert "`plausible` (how" in card and "`useful`" not in card and "left out" not in card
    assert "plausible" not in card_of(provenance, objects, 0.8)


def test_many_sources_are_summed_up(provenance):
    """30 sources, the i-th with 30 - i rows; the light ones come first, so the kept half is that of the last sources."""
    objects = [{"question": f"{i} {j}", "response": "x", "source": f"s|{i:02}"} for i in range(30) for j in range(30 - i)]
    card = card_of(provenance, objects, 1.0)
    assert "| s\\|00 | 30 | 30 | 0 | 100.0% |" in card and "| s\\|19 | 11 | 11 | 0 | 100.0% |" in card
    assert f"| 10 others | {sum(range(1, 11))} | {sum(range(1, 11))} | 0 | 100.0% |" in card and "s\\|20" not in card
    assert "## Bad rows" not in card and "Marked" not in card  # no row has the label
    assert "| dropped | 0 |" in card


def test_provenance(provenance):
    card = card_of(provenance, [{"question": "a", "response": "b"}], 1.0, renamed=["text", "weight"])
    assert front_matter(card)["configs"] == [{"config_name": "default", "data_files": "a.jsonl"}]
    assert hashlib.sha256((provenance.workdir / "config.json").read_bytes()).hexdigest() in card
    assert "| command | `python -m bilevel_jax.export --selected=a\\|b.jsonl` |" in card
    assert "`text` as `original_text` and `weight` as `original_weight`" in card
    assert "| (none) | 1 | 1 | 0 | 100.0% |" in card


def test_the_step_of_the_best_adapter(provenance):
    """Named where `eval.keep_best` left another one than the last."""
    file = provenance.workdir / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"best_step": 2}))
    assert "step 2" not in cards.model_card(provenance, "float32")
    provenance.config["eval"]["keep_best"] = True
    assert "7 rows of the mixture, 3 steps. The adapter is that of step 2, where" in cards.model_card(provenance, "float32")


def test_model_card(provenance):
    card = cards.model_card(provenance, "float32", "EleutherAI/pythia-1b")
    head = front_matter(card)
    assert head["base_model"] == "EleutherAI/pythia-1b" and head["library_name"] == "transformers"
    assert "| trusted rows | 2.0000 | 1.2500 |" in card and "| mixture, as it is |  | 0.5000 |" in card
    assert "7 rows of the mixture, 3 steps" in card
    assert "base_model" not in front_matter(cards.model_card(provenance, "float32"))

"""Cards of a run made by hand: what they say where a run of the tests has nothing to say."""

import hashlib
import json

import numpy as np
import pytest
import yaml

from bilevel_jax import config as configuration
from bilevel_jax.data import rows
from bilevel_jax.export import cards, selected_rows
from bilevel_jax.runtime import weight_table


@pytest.fixture
def facts(tmp_path):
    """Of a run of no rows that ended well."""
    config = configuration.default()
    (tmp_path / "config.json").write_text(config.to_json())
    summary = {"rows": 7, "steps": 3, "start/upper_loss": 2.0, "eval/upper_loss": 1.25, "eval/lower_loss": 0.5}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    return cards.Provenance(tmp_path, config, "python -m bilevel_jax.export --selected=a|b.jsonl")


def card_of(facts, objects, keep, renamed=()):
    found = list(rows.parse(enumerate(objects, 1)))
    table = weight_table.table(found, np.log(np.arange(1, len(found) + 1)), [1] * len(found), [False] * len(found))
    kept = selected_rows.select(found, table, keep)
    return cards.data_card(facts, facts.workdir / "a.jsonl", table, found, kept, [{} for _ in kept], "original", renamed)


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_weights_by_hand(facts):
    """Weights 1 to 4 over their mean of 2.5, and the heavier half of them; ESS/N is 100 / (4 · 30), 49 / (2 · 25), 9 / (2 · 5)."""
    card = card_of(facts, [{"question": f"{i}", "response": "x", "bad": i == 0} for i in range(4)], 0.5)
    assert "| all | 0.4 | 0.46 | 0.7 | 1 | 1.3 | 1.54 | 1.6 | 0.8333 |" in card
    assert "| kept | 1.2 | 1.22 | 1.3 | 1.4 | 1.5 | 1.58 | 1.6 | 0.9800 |" in card
    assert "| dropped | 0.4 | 0.42 | 0.5 | 0.6 | 0.7 | 0.78 | 0.8 | 0.9000 |" in card
    assert "25.0% of all rows, 0.0% of the kept rows, 50.0% of the dropped rows" in card


def test_many_sources_are_summed_up(facts):
    """30 sources, the i-th with 30 - i rows; the light ones come first, so that the half that is kept is the last sources'."""
    objects = [{"question": f"{i} {j}", "response": "x", "source": f"s|{i:02}"} for i in range(30) for j in range(30 - i)]
    card = card_of(facts, objects, 1.0)
    assert "| s\\|00 | 30 | 30 | 0 | 100.0% |" in card and "| s\\|19 | 11 | 11 | 0 | 100.0% |" in card
    assert f"| 10 others | {sum(range(1, 11))} | {sum(range(1, 11))} | 0 | 100.0% |" in card and "s\\|20" not in card
    assert "Marked bad" not in card  # no row has the label
    assert "| dropped | 0 |" in card


def test_facts(facts):
    card = card_of(facts, [{"question": "a", "response": "b"}], 1.0, renamed=["text", "weight"])
    assert front_matter(card)["configs"] == [{"config_name": "default", "data_files": "a.jsonl"}]
    assert hashlib.sha256((facts.workdir / "config.json").read_bytes()).hexdigest() in card
    assert "| made by | `python -m bilevel_jax.export --selected=a\\|b.jsonl` |" in card
    assert "`text` as `original_text` and `weight` as `original_weight`" in card
    assert "| (none) | 1 | 1 | 0 | 100.0% |" in card


def test_model_card(facts):
    card = cards.model_card(facts, "float32", "EleutherAI/pythia-1b")
    head = front_matter(card)
    assert head["base_model"] == "EleutherAI/pythia-1b" and head["library_name"] == "transformers"
    assert "| trusted rows | 2.0000 | 1.2500 |" in card and "| mixture, as it is |  | 0.5000 |" in card
    assert "7 rows of the mixture, 3 steps" in card
    assert "base_model" not in front_matter(cards.model_card(facts, "float32"))

"""Both levels of a run: duplicates, overlap, held-out rows."""

import json

import numpy as np
import pytest

from bilevel_jax import checks, train
from bilevel_jax import config as configuration
from bilevel_jax.data import levels, rows, streaming, templates
from bilevel_jax.data.rejections import DataError
from tests.conftest import EVERYTHING, HELD_OUT, NUM_LOWER, load, make_rows, read_jsonl, write_jsonl
from tests.data.test_turns import SHAPES, both


@pytest.fixture
def make_levels(neox, make_config, tmp_path):
    """`f(upper rows, lower rows, changes) -> (upper, lower)`; `f.config` makes the config alone."""
    tokenizer = load(neox)[3]

    def config(upper, lower, changes=()):
        files = {name: str(write_jsonl(tmp_path / f"{name}.jsonl", given)) for name, given in (("up", upper), ("low", lower))}
        settings = {"data.upper": files["up"], "data.lower": files["low"], "eval.num_upper": 3, "eval.num_lower": 4}
        return make_config(settings | dict(changes))

    def make(upper, lower, changes=()):
        return levels.load_levels(checks.build(config(upper, lower, changes)), tokenizer)

    make.config = config
    return make


def content(given) -> list[str]:
    return [rows.content_of(row.id) for row in given]


UPPER, LOWER = make_rows(12, seed=1), make_rows(20, seed=2)


def test_without_overlap_each_level_is_what_it_is_alone(make_levels, neox, capsys):
    upper, lower = make_levels(UPPER, LOWER)
    config = checks.build(make_levels.config(UPPER, LOWER))
    for name, loaded in (("upper", upper), ("lower", lower)):
        alone = levels.load_level(config, name, load(neox)[3])
        assert [row.id for row in loaded.rows] == [row.id for row in alone.rows] and not loaded.counts
        assert [row.id for row in loaded.eval_rows] == [row.id for row in alone.eval_rows]
    assert (len(upper.rows), len(lower.rows)) == (9, 16) and "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["warn", "drop"])
def test_overlap(make_levels, capsys, tmp_path, mode):
    upper, lower = make_levels(UPPER, LOWER + UPPER[:7], {"data.overlap": mode})
    assert lower.counts["overlap"] == 7
    out = capsys.readouterr().out
    assert f"7 of 27 rows of data.lower are also in data.upper (first: {tmp_path}/low.jsonl:21)" in out
    assert ("warning: " in out) == (mode == "warn")
    held_out = {*content(upper.eval_rows), *content(lower.eval_rows)}
    assert not held_out & {*content(upper.rows), *content(lower.rows)}
    on_both = set(content(upper.rows + upper.eval_rows)) & set(content(lower.rows + lower.eval_rows))
    assert bool(on_both) == (mode == "warn")
    assert (len(upper.eval_rows), len(lower.eval_rows)) == (3, 4)
    if mode == "drop":
        assert (len(upper.rows), len(lower.rows)) == (9, 16) and "held_out_copies" not in lower.counts


def test_the_same_file_for_both_levels(make_levels, capsys):
    upper, lower = make_levels(LOWER, LOWER, {"eval.num_upper": 5, "eval.num_lower": 5})
    assert "warning: 20 of 20 rows" in capsys.readouterr().out
    assert not {*content(upper.eval_rows), *content(lower.eval_rows)} & {*content(upper.rows), *content(lower.rows)}


@pytest.mark.parametrize(
    ("upper", "lower", "changes", "message"),
    [
        (UPPER, LOWER + UPPER[:1], {"data.overlap": "refuse"}, "1 of 21 rows .*low.jsonl:21.*; remove them, or take data.overlap"),
        (UPPER, UPPER, {"data.overlap": "drop"}, "leaves no row"),
        (UPPER, UPPER[:5] * 4, {"eval.num_lower": 19}, "no row is left for training, all are also held out"),
    ],
)
def test_refused(make_levels, upper, lower, changes, message):
    with pytest.raises(DataError, match=message) as error:
        make_levels(upper, lower, changes)
    assert "\n" not in str(error.value)


def test_copies_are_counted(make_levels, capsys, tmp_path):
    """Three rows of one content and two of another: clusters of 3 and 2, with 2 + 1 copies."""
    _, lower = make_levels(UPPER, [*LOWER, LOWER[4], LOWER[4], LOWER[9]])
    assert (lower.counts["duplicates"], lower.counts["duplicate_clusters"]) == (3, {"2": 1, "3": 1})
    location = f"{tmp_path}/low.jsonl:21 is one of {tmp_path}/low.jsonl:5"
    assert f"  3 copies of 2 other rows, the largest cluster has 3 ({location})" in capsys.readouterr().out


def test_copies_of_held_out_rows_are_not_trained_on(make_levels):
    _, lower = make_levels(UPPER, LOWER + LOWER)
    assert lower.counts["held_out_copies"] > 0 and len(lower.rows) == 36 - lower.counts["held_out_copies"]
    assert not set(content(lower.rows)) & set(content(lower.eval_rows)) and len(lower.eval_rows) == 4


def test_deduplicate(make_levels):
    _, alone = make_levels(UPPER, LOWER)
    for mode in ("exact", "near"):
        _, lower = make_levels(UPPER, LOWER + LOWER[::-1], {"data.deduplicate": mode})
        assert [row.id for row in lower.rows] == [row.id for row in alone.rows]
        assert lower.counts["duplicates"] == 20 and lower.counts["duplicate_clusters"] == {"2": 20}


def test_near_duplicates_are_dropped(make_levels):
    words = " ".join(f"w{i}" for i in range(30))
    near = [{"question": words, "response": "yes"}, {"question": f"{words}!", "response": "yes"}]
    for mode, number in (("exact", 18), ("near", 17)):
        _, lower = make_levels(UPPER, LOWER + near, {"data.deduplicate": mode, "data.max_length": 128})
        assert len(lower.rows) == number


def test_more_rows_are_wanted_than_there_are(make_levels, capsys):
    _, lower = make_levels(UPPER, LOWER, {"data.num_lower": 50, "eval.num_lower": 4})
    notice = f"data.num_lower=50 is more than there are: all {len(LOWER)} rows of "
    assert notice in capsys.readouterr().out and len(list(lower.all_ids)) == len(LOWER)


def test_columns_of_one_level(make_levels):
    """The other one has the usual names. A column that neither has is an error."""
    renamed = [{"query": row["question"], "response": row["response"]} for row in LOWER]
    expected, given = make_levels(UPPER, LOWER), make_levels(UPPER, renamed, {"data.columns": "question:query"})
    for one, other in zip(expected, given):
        assert [row.id for row in one.rows + one.eval_rows] == [row.id for row in other.rows + other.eval_rows]
    reopened = list(streaming.reopen(make_levels.config(UPPER, LOWER, {"data.columns": "question:query"})))
    assert len(reopened) == len(LOWER)
    with pytest.raises(DataError, match="up.jsonl and .*low.jsonl: no row has the column 'qury'"):
        make_levels(UPPER, LOWER, {"data.columns": "question:qury"})


PAIRS = [{"prompt": f"{i}", "chosen": "fine", "rejected": f"{k}"} for i in range(10) for k in range(4)]
BOTH, ONLY_UPPER = {"loss.upper": "dpo", "loss.lower": "dpo"}, {"loss.upper": "dpo"}


@pytest.mark.parametrize(("losses", "overlap"), [({}, 40), (ONLY_UPPER, 40), (BOTH, 0)])
def test_the_rejected_answer_counts_where_both_levels_use_it(make_levels, losses, overlap):
    """The lower level has the upper one's prompts and chosen answers, with other rejected ones."""
    other = [pair | {"rejected": f"other {pair['rejected']}"} for pair in PAIRS]
    upper, lower = make_levels(PAIRS, other[::-1], losses)
    assert lower.counts.get("overlap", 0) == overlap
    assert upper.counts.get("duplicates", 0) == (0 if losses else 30) and lower.counts.get("duplicates", 0) == (
        30 if overlap else 0
    )
    held = {name: {row.question for row in level.eval_rows} for name, level in (("upper", upper), ("lower", lower))}
    trained = {name: {row.question for row in level.rows} for name, level in (("upper", upper), ("lower", lower))}
    assert bool(trained["upper"] & held["upper"]) == bool(losses) and bool(trained["lower"] & held["lower"]) == (not overlap)
    assert bool(trained["lower"] & held["upper"]) == bool(trained["upper"] & held["lower"]) == (not overlap)


def test_near_needs_a_library(make_levels, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(configuration.ConfigError, match=r"^data.deduplicate=near needs the package datasketch: pip install"):
        make_levels(UPPER, LOWER, {"data.deduplicate": "near"})


def test_a_run_says_what_it_left_out(make_config, data, tmp_path):
    """The run of the fixture `finished`, whose compiled program it shares, with copies of some rows."""
    given = read_jsonl(data / "lower.jsonl")
    file = write_jsonl(tmp_path / "lower.jsonl", given + given[:6])
    changes = {"data.lower": str(file), "data.deduplicate": "exact", "log.tensorboard": False}
    train.run(make_config(EVERYTHING | changes), tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["rows"] == NUM_LOWER - HELD_OUT
    assert (summary["data/lower_duplicates"], summary["data/lower_duplicate_clusters"]) == (6, {"2": 6})
    assert 'id="repeated"' in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("shape", ["single turn", "tool results", "tool calls"])
def test_right_answers_of_held_out_rows(shape):
    """They are scored in place of the answer of the data, also where that is a tool call."""
    tokenizer, _ = both("qwen2_5")
    eval_rows = list(rows.parse([(1, {**SHAPES[shape], "truth": "It rains."})]))
    level = levels.Level([], [], eval_rows, templates.encode(eval_rows, tokenizer, template="chat"))
    (example,) = levels.with_truth(level, configuration.default(), tokenizer)
    assert tokenizer.decode(example.response) == "It rains.<|im_end|>"
    np.testing.assert_array_equal(example.prompt, level.eval_examples[0].prompt)


# ---- lists in configs ----


def test_lists_of_a_config_file(tmp_path):
    config = configuration.default()
    config.data.lower = [tmp_path / "a.jsonl", "b.csv"]
    config.data.upper = ("org/set:test",)
    assert checks.build(config).data.lower == f"{tmp_path}/a.jsonl,b.csv" and config.data.upper == "org/set:test"
    again = type(config)(json.loads(config.to_json()))  # as `config.json` is read
    assert checks.build(again).data == checks.build(config).data
    assert checks.build(config.copy_and_resolve_references()).data == checks.build(config).data
    with pytest.raises(configuration.ConfigError, match="data.upper: the name 'a,b.jsonl' in a list has a comma"):
        config.data.upper = ["a,b.jsonl"]


@pytest.mark.parametrize(("key", "value"), [("deduplicate", "exakt"), ("overlap", "dropped"), ("learn", "al")])
def test_choices(key, value):
    config = configuration.default()
    config.data[key] = value
    with pytest.raises(configuration.ConfigError, match=f"data.{key}='{value}' is not among .* \\(did you mean (exact|drop|all)"):
        checks.build(config)


@pytest.mark.parametrize(("method", "response"), [("offline", "hello"), ("online", None), ("dynamic", None)])
def test_a_long_conversation(make_levels, neox, capsys, method, response):
    """It ends with an earlier answer, unless the model may have to answer its last question."""
    turns = [("user", "a"), ("assistant", "hello"), ("user", "very " * 50), ("assistant", "fine")]
    long = {"messages": [{"role": role, "content": content} for role, content in turns]}
    _, lower = make_levels(UPPER, [*LOWER, long], {"method": method, "data.max_length": 60, "eval.num_lower": 0})
    shown = [load(neox)[3].decode(one.response) for row, one in zip(lower.rows, lower.examples) if row.schema == "messages"]
    assert shown == ([response] if response else [])
    note = "conversation cut to 60 tokens" if response else "question over 60 tokens"
    assert f"1: {note} (first: " in capsys.readouterr().out


def test_methods_that_generate():
    assert levels.GENERATING == configuration.ONLINE

"""Prepared rows against rows in memory: the same rows, tokens, levels, messages and errors."""

import concurrent.futures
import datetime
import decimal
import json
import re
import threading
import weakref

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet
import pytest

from bilevel_jax import checks
from bilevel_jax import config as configuration
from bilevel_jax.data import levels, templates
from bilevel_jax.data.prepared import preparation, sequences, shards, stored
from bilevel_jax.runtime import checkpoint
from tests.conftest import make_rows, write_jsonl
from tests.data.test_by_turn import FORMS, TALK
from tests.data.test_templates import ALPACA, CHATTING, PAIR, PLAIN, QA, TURNS, WITH_BOS
from tests.data.test_turns import SHAPES, answer, both, user

LONG = {"messages": [user("a"), answer("hello"), user("b " * 60), answer("the world"), user("c"), answer("fine " * 60)]}
OPENED = {"messages": [answer("hello"), user("a"), answer("the world"), user("b"), answer("fine")]}
SILENT = {"messages": [answer(" "), user("a"), answer("the world"), user("b"), answer("fine")]}  # its first answer is blank
UNUSABLE = [{"x": 1}, [], {"question": "a", "response": " "}, {"messages": [user("a")]}]
MIXED = [  # all schemas, conversations that are cut, copies, rows that cannot be used
    *(row | {"source": "sums"} for row in make_rows(9, 0, bad_every=3)),
    *[QA, ALPACA, TURNS, PAIR, *SHAPES.values(), *FORMS, LONG, OPENED, SILENT, *UNUSABLE, QA, LONG, QA],
    *({"messages": [user(f"{i}"), *TALK[1:], user("end")], "bad": i % 2, "truth": f"{i}", "context": "x"} for i in range(9)),
]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several shards of few rows, made by this process."""
    monkeypatch.setattr(preparation, "CHUNK_ROWS", 7)
    monkeypatch.setattr(preparation, "num_processes", lambda: 1)


@pytest.fixture
def load_both(tmp_path, capsys):
    """`f(source, tokenizer, changes) -> [(upper, lower, what is printed)]` of rows in memory, prepared ones, and mapped ones."""

    def load(source, tokenizer, changes=()):
        loaded = []
        for cache in ("off", str(tmp_path / "cache"), str(tmp_path / "cache")):
            config = configuration.default()
            settings = {"data.lower": str(source), "data.upper": str(source), "eval.num_upper": 2, "eval.num_lower": 3}
            config.update_from_flattened_dict(settings | {"data.max_length": 64, "data.cache": cache} | dict(changes))
            capsys.readouterr()
            try:
                upper, lower = levels.load_levels(checks.build(config), tokenizer)
            except ValueError as error:
                upper, lower = None, (type(error), str(error))
            printed = re.sub(r".*: preparing its rows in .*\n", "", capsys.readouterr().out)
            loaded.append((upper, lower, printed))
        return loaded

    return load


def plain(example: templates.Example) -> dict:
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(example).items()}


def described(level: levels.Level) -> dict:
    """Everything in a level, in types that can be compared."""
    every = [*level.rows, *level.eval_rows]
    lines = [vars(row.line) if hasattr(row.line, "file") else None for row in every]
    marks = levels.labels(level, "bad")
    return {
        "rows": every,
        "lines": lines,
        "examples": [plain(one) for one in (*level.examples, *level.eval_examples)],
        "all_examples": [plain(one) for one in level.all_examples],
        "sizes": sequences.sizes(level.examples).tolist(),
        "sources": levels.source_names(level).to_pylist(),
        "ids": list(level.ids),
        "each id": [level.ids[i] for i in range(len(level.ids))],
        "all_ids": list(level.all_ids),
        "counts": dict(level.counts),
        "labels": None if marks is None else marks.tolist(),
        "other labels": levels.labels(level, "context") is None,
        "truths": list(levels.truths(level, "truth")),
        "model": checkpoint.fingerprint_model({}, level.all_examples),
    }


def assert_same(loaded) -> None:
    (upper, lower, printed), *others = loaded
    for other_upper, other_lower, other_printed in others:
        assert other_printed == printed
        if upper is None:
            assert other_lower == lower
            continue
        assert isinstance(other_lower.rows, sequences.StoredRows) and isinstance(other_lower.examples, sequences.StoredExamples)
        assert described(other_upper) == described(upper) and described(other_lower) == described(lower)


@pytest.mark.parametrize(
    ("tokenizer", "changes"),
    [
        (PLAIN, {}),
        (WITH_BOS, {}),
        (CHATTING, {"data.learn": "last", "data.max_length": 300}),
        (CHATTING, {"selection.unit": "turn"}),
        (WITH_BOS, {"selection.unit": "turn", "data.max_length": 30}),
        (CHATTING, {"method": "online", "data.max_length": 40}),
        (CHATTING, {"data.deduplicate": "exact", "data.overlap": "drop", "data.num_upper": 12}),
        (PLAIN, {"data.num_lower": 20, "data.num_upper": 30, "seed": 3}),
        (PLAIN, {"data.template": "alpaca", "data.max_length": 400}),
        (CHATTING, {"loss.lower": "dpo", "loss.upper": "dpo", "eval.num_lower": 0, "eval.num_upper": 0}),
    ],
)
def test_levels(load_both, tmp_path, tokenizer, changes):
    loaded = load_both(write_jsonl(tmp_path / "rows.jsonl", MIXED), tokenizer, changes)
    assert_same(loaded)
    assert loaded[0][0] is not None


@pytest.mark.parametrize("name", ["qwen3", "llama3", "mistral"])
def test_published_templates(load_both, tmp_path, name):
    """Some answers, tools and system texts are refused by some templates."""
    rows = [row for row in [*SHAPES.values(), *FORMS, LONG, QA, TURNS] if row is not SHAPES["odd"]]
    assert_same(load_both(write_jsonl(tmp_path / "rows.jsonl", rows), both(name)[0], {"data.max_length": 200}))


def test_pairs(load_both, tmp_path):
    rows = [{"prompt": f"{i}", "chosen": "fine " * (i % 9 + 1), "rejected": "the world", "source": "ab"[i % 2]} for i in range(20)]
    changes = {"loss.lower": "dpo", "loss.upper": "dpo", "data.max_length": 32}
    loaded = load_both(write_jsonl(tmp_path / "pairs.jsonl", rows), PLAIN, changes)
    assert_same(loaded)
    assert "pair over 32 tokens" in loaded[0][2]
    names, index = levels.domains(loaded[0][1], "pairs")
    for _, lower, _ in loaded[1:]:
        others, other_index = levels.domains(lower, "pairs")
        assert others == names and other_index.tolist() == index.tolist() and other_index.dtype == index.dtype


@pytest.mark.parametrize("deduplicate", ["off", "exact"])
def test_pairs_of_which_only_the_chosen_answer_is_used(load_both, tmp_path, deduplicate):
    """Those that differ in the rejected answer have one content: they are copies, and none is trained on if one is held out."""
    rows = [{"prompt": f"{i}", "chosen": "fine", "rejected": f"{k}"} for i in range(10) for k in range(4)]
    loaded = load_both(write_jsonl(tmp_path / "pairs.jsonl", rows), PLAIN, {"data.deduplicate": deduplicate})
    assert_same(loaded)
    upper, lower, printed = loaded[0]
    assert "30 copies of 10 other rows" in printed
    held_out = {row.question for level in (upper, lower) for row in level.eval_rows}
    assert held_out and not held_out & {row.question for level in (upper, lower) for row in level.rows}
    assert len(lower.rows) == (10 - len(held_out)) * (4 if deduplicate == "off" else 1)
    assert len({row.id for row in lower.rows}) == len(lower.rows)


def write(tmp_path, kind):
    rows = make_rows(16, 0, bad_every=4)
    file = tmp_path / f"rows.{kind}"
    if kind == "folder":
        folder = tmp_path / "folder"
        folder.mkdir()
        write_jsonl(folder / "a.jsonl", [*rows, "x", {"question": "?"}])
        pandas.DataFrame(make_rows(9, 5)).to_csv(folder / "b.csv", index=False)
        return folder
    if kind == "saved":
        import datasets

        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
        return tmp_path / "saved"
    if kind == "json":
        file.write_text(json.dumps(rows), encoding="utf-8")
    elif kind == "csv":
        pandas.DataFrame(rows).to_csv(file, index=False)
    else:
        dates = [datetime.datetime(2024, 1, 1 + i) for i in range(16)]
        extra = {
            "time": dates,
            "price": [decimal.Decimal("1.50")] * 16,
            "raw": [b"\xff\x00"] * 16,
            "day": [d.date() for d in dates],
        }
        pa.parquet.write_table(pa.table({**pa.Table.from_pylist(rows).to_pydict(), **extra}), file)
    return file


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "folder", "saved"])
@pytest.mark.parametrize("number", [0, 11])
def test_formats(load_both, tmp_path, kind, number):
    assert_same(load_both(write(tmp_path, kind), PLAIN, {"data.num_lower": number}))


def test_columns(load_both, tmp_path):
    rows = [{"query": row["question"], "answer": row["response"], "question": "other"} for row in make_rows(20, 0)]
    file = write_jsonl(tmp_path / "rows.jsonl", [*rows, *make_rows(9, 1)])
    assert_same(load_both(file, PLAIN, {"data.columns": "question:query,response:answer"}))
    loaded = load_both(file, PLAIN, {"data.columns": "question:query,response:answer,system:sistem"})
    assert_same(loaded)
    assert "no row has the column 'sistem'" in loaded[0][1][1]


@pytest.mark.parametrize(
    ("rows", "changes"),
    [
        ([], {}),
        (UNUSABLE * 3, {}),
        ([{"query": "a", "reply": "b"}] * 9, {}),
        ([{"query": "a", "reply": "b"}] * 9, {"data.columns": "question:quer,response:reply"}),
        ([LONG] * 9, {"data.max_length": 2}),
        ([QA] * 3, {"eval.num_lower": 3}),
        ([{**QA, "question": "hello" * i} for i in range(1, 40)], {"data.max_length": 3}),
    ],
)
def test_errors(load_both, tmp_path, rows, changes):
    loaded = load_both(write_jsonl(tmp_path / "rows.jsonl", rows), PLAIN, changes)
    assert loaded[0][0] is None
    assert_same(loaded)


def test_a_chat_template_that_refuses_a_row(load_both, tmp_path):
    tokenizer = both("gemma2")[0]  # refuses system texts
    loaded = load_both(write_jsonl(tmp_path / "rows.jsonl", [*make_rows(20, 0), SHAPES["system"]]), tokenizer)
    assert "the chat template refuses the row of line 21" in loaded[0][1][1]
    assert {lower for _, lower, _ in loaded} == {loaded[0][1]}


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, None, True, "ü\ud800"], "b": {"c": [[], {}]}},
        {"t": datetime.datetime(2024, 1, 2, 3, 4, 5, 6), "d": datetime.date(2024, 1, 2), "h": datetime.time(1, 2)},
        {"x": decimal.Decimal("1.50"), "b": b"\x00\xff", "p": [("k", 1), ("l", (2, b""))]},
        {shards.TAG: "tuple", "value": [1], "t": (1,)},
        {"a": {shards.TAG: "date", "value": "x"}},
        [1, (2,)],
        None,
    ],
)
def test_values(value):
    restored = shards.load(shards.dump(value))
    assert restored == value and repr(restored) == repr(value)


def test_values_that_cannot_be_stored():
    for value in ({"a": object()}, {1: 2}, {"a": {"b": {3}}}, np.float64(1)):
        with pytest.raises(shards.Unstorable, match="values of type"):
            shards.dump(value)


def test_sequences(load_both, tmp_path):
    (_, memory, _), (_, lower, _), _ = load_both(write_jsonl(tmp_path / "rows.jsonl", MIXED), PLAIN)
    rows = list(memory.rows)
    assert lower.rows[-1] == rows[-1] and list(lower.rows[3:9:2]) == rows[3:9:2] and list(lower.rows[5:]) == rows[5:]
    assert list(lower.rows + lower.eval_rows) == rows + list(memory.eval_rows)
    assert lower.rows + [rows[0]] == [*rows, rows[0]]
    assert list(lower.ids[2:4]) == [row.id for row in rows[2:4]]
    assert lower.rows[np.int64(1)] == rows[1]
    with pytest.raises(IndexError):
        lower.rows[len(rows)]


def test_memory_is_given_back(load_both, tmp_path, monkeypatch):
    """Reading all rows again and again does not keep the pages of the shards."""
    monkeypatch.setattr(preparation, "CHUNK_ROWS", 100)
    monkeypatch.setattr(stored, "RELEASE", 16)
    rows = [row | {"filler": "x" * 100_000} for row in make_rows(300, 0)]
    *_, (_, lower, _) = load_both(write_jsonl(tmp_path / "rows.jsonl", rows), PLAIN, {"data.overlap": "warn"})

    def mapped() -> int:
        """Bytes of mapped files in the memory of this process."""
        return sum(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssFile")) << 10

    lower.rows.store.release()
    before, highest = mapped(), 0
    for row in lower.rows:
        assert len(row.fields["filler"]) == 100_000
        highest = max(highest, mapped())
    assert highest - before < 8 << 20  # of 30 MB


def test_shards_are_opened_while_memory_is_given_back(load_both, tmp_path):
    """One thread packs the next step and opens shards. Another evaluates and gives pages back."""
    *_, (_, lower, _) = load_both(write_jsonl(tmp_path / "rows.jsonl", make_rows(30, 0)), PLAIN)
    store, begun, opened = lower.rows.store, threading.Event(), threading.Event()
    shards_in_use = [store.mapped(0), store.mapped(1)]

    class Slow(weakref.WeakSet):
        """Gives the other thread time to add a shard between two elements."""

        def __iter__(self):
            for shard in super().__iter__():
                begun.set()
                opened.wait(0.3)
                yield shard

    store._open, store._shard = Slow(shards_in_use), store._open_shard  # nothing is open in the other thread's cache

    def open_another():
        begun.wait()
        shards_in_use.append(store.mapped(3))
        opened.set()

    with concurrent.futures.ThreadPoolExecutor(1) as other:
        future = other.submit(open_another)
        store.release()
        future.result()
    assert len(store._open) == 3

import json

import numpy as np
import pytest

from bilevel_jax.data import recipes, sources
from bilevel_jax.data.rows import DataError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.jsonl"
    values = [{"question": f"q{n}", "response": "r"} for n in range(50)]
    path.write_text("\n".join(json.dumps(value) for value in values) + "\nnot json\n")
    return str(path)


def open_source(name, *, seed=0, num_rows=0, bad_fraction=0.25, **options):
    return sources.open_source(name, seed=seed, num_rows=num_rows, bad_fraction=bad_fraction, **options)


def test_full_file(file):
    rows, report = open_source(file)
    assert [row.question for row in rows] == [f"q{n}" for n in range(50)]
    assert report.num_rows == 50 and report.num_kept is None and report.rejected == {"bad JSON": (1, 51)}


def test_random_subset_in_stored_order(file):
    rows, report = open_source(file, num_rows=10)
    lines = [row.line for row in rows]
    assert len(lines) == 10 and lines == sorted(set(lines)) and lines != list(range(1, 11))
    assert (report.num_rows, report.num_kept) == (50, 10)
    assert report.summary()[0] == f"{file}: 50 rows (50 question/response); a random 10 kept"
    assert [row.line for row in open_source(file, num_rows=10)[0]] == lines
    assert [row.line for row in open_source(file, num_rows=10, seed=1)[0]] != lines


@pytest.mark.parametrize("num_rows", [50, 51, 10**9])
def test_subset_of_all_rows(file, num_rows):
    rows, report = open_source(file, num_rows=num_rows)
    assert len(rows) == 50 and report.num_kept is None


@pytest.mark.parametrize(
    ("name", "bad"),
    [("synthetic:upper", 0), ("synthetic:lower", 10), ("synthetic:domains", 16), ("synthetic:tokens", 10)],
)
def test_synthetic(name, bad):
    rows, report = open_source(name, num_rows=40)
    assert len(rows) == 40 and report.path == name and not report.rejections
    assert sum(row.fields["bad"] for row in rows) == bad  # 0.25 · 40; of domains 0, 1, 2, 3, 4 and 6 among 7, 7, 7, 7, 6 and 6
    assert [row.id for row in rows] == [row.id for row in open_source(name, num_rows=40)[0]]


@pytest.mark.parametrize(("name", "bad"), [("synthetic:upper", 0), ("synthetic:lower", 10)])
def test_synthetic_pairs(name, bad):
    rows, report = open_source(name, num_rows=40, preference=True)
    assert len(rows) == 40 and report.schemas == {"prompt/chosen/rejected": 40} and not report.rejections
    assert sum(row.fields["bad"] for row in rows) == bad  # 0.25 · 40
    for row in rows:
        assert (row.rejected if row.fields["bad"] else row.response) == row.fields["truth"]


def test_recipe(monkeypatch):
    calls = []

    def build(name, *, num_rows, seed):
        calls.append((name, num_rows, seed))
        return [{"question": "q", "response": "r", "system": "", "source": "slimorca", "unsafe": False}]

    monkeypatch.setattr(recipes, "build", build)
    rows, report = open_source("recipe:blueorca", num_rows=1, seed=7)
    assert calls == [("blueorca", 1, 7)] and rows[0].source == "slimorca" and report.path == "recipe:blueorca"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("synthetic:middle", {"num_rows": 3}, "synthetic:middle: no such generator"),
        ("synthetic:domains", {"num_rows": 3, "preference": True}, "synthetic:domains has no preference rows"),
        ("synthetic:tokens", {"num_rows": 3, "preference": True}, "synthetic:tokens has no preference rows"),
        ("synthetic:upper", {}, "synthetic:upper: generated rows need a number of rows"),
        ("synthetic:upper", {"num_rows": -1}, "num_rows must not be negative, not -1"),
        ("recipe:blueorca", {"num_rows": 3, "preference": True}, "recipe:blueorca row 1: no field 'chosen'"),
        ("recipe:greenorca", {}, "unknown recipe 'greenorca'"),
        ("nowhere/a.jsonl", {}, "no such file"),
    ],
)
def test_rejects(name, options, message, monkeypatch):
    if options.get("preference"):
        monkeypatch.setattr(recipes, "build", lambda *_, **__: [{"question": "q", "response": "r"}])
    with pytest.raises(DataError, match=message):
        open_source(name, **options)


@pytest.mark.parametrize(("count", "num_eval"), [(10, 3), (10, 0), (1, 0), (1000, 999)])
def test_split(count, num_eval):
    train, held_out = sources.split(range(count), num_eval, seed=5)
    assert len(held_out) == num_eval
    np.testing.assert_array_equal(np.sort(np.concatenate([train, held_out])), np.arange(count))
    for indices in (train, held_out):
        np.testing.assert_array_equal(indices, np.sort(indices))
    for indices, again in zip((train, held_out), sources.split(range(count), num_eval, seed=5), strict=True):
        np.testing.assert_array_equal(indices, again)


def test_split_is_spread_over_the_rows():
    """Each row is held out in 20 of 100 splits on average (binomial, sd 4); the bounds are five sd for 50 rows."""
    counts = np.zeros(50)
    for seed in range(100):
        counts[sources.split(range(50), 10, seed)[1]] += 1
    assert counts.min() > 0 and counts.max() < 40


@pytest.mark.parametrize(("count", "num_eval"), [(10, 10), (10, 11), (10, -1), (0, 0)])
def test_split_needs_a_training_row(count, num_eval):
    with pytest.raises(DataError, match=f"cannot hold out {num_eval} of {count} rows"):
        sources.split(range(count), num_eval, seed=0)


def test_hub_rows_are_drawn_before_they_are_read(monkeypatch):
    """Of a million rows only the drawn ones are read, in stored order, from the full range."""

    class Million:
        touched = []

        def __len__(self):
            return 1_000_000

        def __getitem__(self, i):
            self.touched.append(i)
            return {"question": f"q{i}", "response": "r"}

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Million())
    kept, report = sources.open_source("some/hub", seed=0, num_rows=100, bad_fraction=0.0)
    assert [row.question for row in kept] == [f"q{i}" for i in Million.touched]
    assert len(set(Million.touched)) == 100 and Million.touched == sorted(Million.touched)
    assert [row.line for row in kept] == [i + 1 for i in Million.touched]
    assert max(Million.touched) > 900_000 and report.num_rows == 100


@pytest.mark.parametrize(
    "number, num_rows, expected",
    [
        (200.0, 1000, 200),
        (200, 66, 200),  # more than there are: refused where the level is loaded
        (0.0, 66, 0),
        (1.0, 66, 1),
        (0.1, 66, 7),  # 6.6
        (0.1, 300, 30),
        (0.1, 2000, 200),
        (0.1, 10**6, 200),
        (0.1, 3, 1),
        (0.9, 2, 1),
        (0.5, 1, 0),  # one must be left for training
    ],
)
def test_num_held_out(number, num_rows, expected):
    assert sources.num_held_out(number, num_rows) == expected

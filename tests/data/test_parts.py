"""Names of sources: lists, globs, folders."""

import json
import os

import datasets
import pytest

from bilevel_jax.data import parts, rows
from bilevel_jax.data.rejections import DataError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory; `f(*names)` writes files with one row each, whose question is the name."""
    monkeypatch.chdir(tmp_path)

    def write(*names):
        for name in names:
            os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
            with open(name, "w") as file:
                file.write(json.dumps({"question": name, "response": "r"}) + "\n")

    return write


@pytest.mark.parametrize(
    ("name", "paths", "sources"),
    [
        ("a.jsonl", ["a.jsonl"], [""]),
        ("a.jsonl, b.jsonl", ["a.jsonl", "b.jsonl"], ["a.jsonl", "b.jsonl"]),
        ("[ab].jsonl", ["a.jsonl", "b.jsonl"], ["a.jsonl", "b.jsonl"]),
        ("x,y.jsonl", ["x,y.jsonl"], [""]),  # a file of that name takes precedence
        ("mix", ["mix/alpaca.jsonl", "mix/dolly.json"], ["alpaca.jsonl", "dolly.json"]),
        ("mix,a.jsonl", ["mix/alpaca.jsonl", "mix/dolly.json", "a.jsonl"], ["mix", "mix", "a.jsonl"]),  # a folder is one source
        ("shards", ["shards/train-00000-of-00002.jsonl", "shards/train-00001-of-00002.jsonl"], ["", ""]),
        ("shards,mix/*.json", ["shards/train-00000-of-00002.jsonl", "shards/train-00001-of-00002.jsonl", "mix/dolly.json"], None),
        ("a.jsonl,org/set:test", ["a.jsonl", "org/set:test"], ["a.jsonl", "org/set:test"]),
        ("left/x.jsonl,right/x.jsonl", ["left/x.jsonl", "right/x.jsonl"], ["left/x.jsonl", "right/x.jsonl"]),
        ("deep", ["deep/data/one.jsonl"], [""]),
        ("**/x.jsonl", ["left/x.jsonl", "right/x.jsonl"], ["left/x.jsonl", "right/x.jsonl"]),
    ],
)
def test_parts(folder, name, paths, sources):
    folder("a.jsonl", "b.jsonl", "x,y.jsonl", "mix/alpaca.jsonl", "mix/dolly.json", "mix/README.md", "mix/.hidden.jsonl")
    folder("shards/train-00000-of-00002.jsonl", "shards/train-00001-of-00002.jsonl", "shards/dataset_info.json")
    folder("left/x.jsonl", "right/x.jsonl", "deep/data/one.jsonl", "deep/.cache/one.jsonl")
    resolved = parts.resolve(name)
    assert [part.path for part in resolved] == paths
    assert sources is None or [part.source for part in resolved] == sources


def test_sources_do_not_depend_on_the_working_directory(folder, tmp_path):
    folder("a.jsonl", "b.jsonl")
    assert [part.source for part in parts.resolve(f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl")] == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.jsonl,,b.jsonl", "a.jsonl,,b.jsonl: an empty name between commas"),
        ("a.jsonl,a.jsonl", "a.jsonl,a.jsonl: a.jsonl is named twice"),
        ("*.jsonl,a.jsonl", "a.jsonl is named twice"),
        ("*.csv", r"\*.csv: no file matches"),
        ("empty", "empty: a folder without data"),
        ("odd", "odd/part.arrow: unknown file type; name the other files with a glob"),
        ("splits", r"splits: files of several splits \(test-0.jsonl and train-0.jsonl\); name those of one with a glob"),
        ("below", r"below: files of several splits"),
        ("recipe:blueorca", "^recipe:blueorca: recipes and generated rows are for data.upper and data.lower"),
        ("a.jsonl,synthetic:lower", "^synthetic:lower: recipes and generated rows are for data.upper"),
    ],
)
def test_refused(folder, name, message):
    folder("a.jsonl", "empty/README.md", "odd/a.jsonl", "odd/part.arrow", "splits/test-0.jsonl", "splits/train-0.jsonl")
    folder("below/train/0.jsonl", "below/validation/0.jsonl")
    with pytest.raises(DataError, match=message) as error:
        rows.read_rows(name)
    assert "\n" not in str(error.value)


def test_a_missing_file_names_the_nearest(folder):
    folder("mixture.jsonl")
    with pytest.raises(DataError, match=r"mixtur.jsonl: no such file \(did you mean mixture.jsonl\?\)"):
        rows.read_rows("mixtur.jsonl")


def test_a_link_to_nothing_is_named(folder):
    """A link to itself, and one to a file that is gone, are listed in their folder: they are no hint for themselves."""
    folder("mixture.jsonl")
    os.symlink("loop.jsonl", "loop.jsonl")
    os.symlink("gone.jsonl", "gone.link.jsonl")
    for name, target in (("loop.jsonl", "loop.jsonl"), ("gone.link.jsonl", "gone.jsonl")):
        with pytest.raises(DataError, match=f"^{name}: a link to {target}, which leads to no file$"):
            rows.read_rows(name)


def test_an_output_is_no_file_of_its_sources(folder):
    folder("a.jsonl", "below/b.jsonl", "c.jsonl")
    os.symlink("a.jsonl", "link.jsonl")
    for out, source in (
        ("a.jsonl", "a.jsonl"),
        ("./below/b.jsonl", "c.jsonl,below"),
        ("link.jsonl", "a.jsonl"),
        ("a.jsonl", "link.jsonl"),
    ):
        with pytest.raises(DataError, match=f"^--out={out} is a file of {source}, which would be overwritten"):
            parts.refuse_overwriting(out, "--out", "c.jsonl", source)
    parts.refuse_overwriting("below/new.jsonl", "--out", "below")
    parts.refuse_overwriting("c.jsonl", "--out", "a.jsonl,below", "synthetic:upper", "*.csv", "someone/rows:train")


def test_rows_of_several_files(folder, tmp_path):
    """Rows keep a `source` of their own, messages name the file, and ids are those of the files alone."""
    folder("a.jsonl")
    (tmp_path / "b.jsonl").write_text('{"question": "q", "response": "r", "source": "own"}\n{"question": 1}\n')
    datasets.Dataset.from_list([{"question": "a.jsonl", "response": "r"}, {"question": "", "response": "r"}]).save_to_disk("c")
    usable, report = rows.read_rows("a.jsonl,b.jsonl,c")
    assert [row.source for row in usable] == ["a.jsonl", "own", "c"]
    (alone,) = rows.read_rows("a.jsonl")[0]
    assert (alone.source, alone.line) == ("", 1)
    assert [row.id for row in usable] == [alone.id, rows.read_rows("b.jsonl")[0][0].id, f"{alone.id}-2"]
    assert report.num_rows == 3 and report.summary()[1:] == [
        "  left out 1: field 'question' is not text (first: b.jsonl:2)",
        "  left out 1: empty question (first: c row 2)",
    ]


def test_hub_data_sets_in_a_list(folder, monkeypatch):
    folder("a.jsonl")
    calls = []

    def load_dataset(name, config, *, split, data_dir):
        calls.append((name, config, split))
        return datasets.Dataset.from_list([{"prompt": "p", "completion": "c"}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    usable, report = rows.read_rows("a.jsonl,org/set:test")
    assert [(row.question, row.source, row.line) for row in usable] == [("a.jsonl", "a.jsonl", 1), ("p", "org/set:test", 1)]
    assert calls == [("org/set", None, "test")] and report.schemas == {"question/response": 1, "prompt/completion": 1}

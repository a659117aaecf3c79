"""Files as other libraries write them."""

import csv
import gzip
import json
import os

import datasets
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
import zstandard

from bilevel_jax.data import levels, rows, sources
from bilevel_jax.data.rejections import DataError

VALUES = [
    {"question": "What is 2 + 2?", "response": '4, "four"\nor ☃', "source": "s"},
    {"question": "a;b", "response": " 007 ", "source": None},
]


def contents(usable):
    return [(row.question, row.response, row.source) for row in usable]


EXPECTED = [(value["question"], value["response"], value["source"] or "") for value in VALUES]


def write_jsonl(path):
    path.write_text("".join(json.dumps(value) + "\n" for value in VALUES))


def write_json(path):
    path.write_text(json.dumps(VALUES))


def write_csv(path, encoding="utf-8", **options):
    with open(path, "w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, VALUES[0], **options)
        writer.writeheader()
        writer.writerows(VALUES)


def write_parquet(path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(VALUES), path)


WRITERS = {"jsonl": write_jsonl, "json": write_json, "csv": write_csv, "parquet": write_parquet}


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("form", WRITERS)
def test_formats(tmp_path, form, compression):
    plain = tmp_path / f"a.{form}"
    WRITERS[form](plain)
    path = tmp_path / f"a.{form}{compression}"
    if compression == ".gz":
        path.write_bytes(gzip.compress(plain.read_bytes()[:20]) + gzip.compress(plain.read_bytes()[20:]))  # of two members
    elif compression == ".zst":
        frames = (plain.read_bytes()[:20], plain.read_bytes()[20:])
        path.write_bytes(b"".join(zstandard.compress(frame) for frame in frames))
    usable, report = rows.read_rows(path)
    assert contents(usable) == EXPECTED and not report.rejections
    assert [row.id for row in usable] == [row.id for row in rows.parse(enumerate(VALUES))]
    assert [row.line for row in usable] == ([2, 4] if form == "csv" else [1, 2])  # a header, and a response of two lines


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv_of_the_standard_library(tmp_path, delimiter, encoding):
    write_csv(tmp_path / "a.csv", encoding, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
    assert contents(rows.read_rows(tmp_path / "a.csv")[0]) == EXPECTED


def test_csv_of_arrow(tmp_path):
    pyarrow.csv.write_csv(pyarrow.Table.from_pylist(VALUES), tmp_path / "a.csv")
    assert contents(rows.read_rows(tmp_path / "a.csv")[0]) == EXPECTED


def test_csv_of_datasets(tmp_path):
    datasets.Dataset.from_list(VALUES).to_csv(tmp_path / "a.csv")
    assert contents(rows.read_rows(tmp_path / "a.csv")[0]) == EXPECTED


def test_csv_rows_that_cannot_be_used(tmp_path):
    path = tmp_path / "a.csv"
    lines = [
        b"question,response",
        b"q,r",
        b"q,r,s",
        b"",
        b"only",
        b'"q"x,r',
        b"q,\xff",
        b"q,",
        b"long," + b"r" * 200_000,
        b'"open,r',
        b"q,r",
    ]
    path.write_bytes(b"\n".join(lines))
    usable, report = rows.read_rows(path)
    assert [row.line for row in usable] == [2, 9] and len(usable[1].response) == 200_000
    assert report.rejected == {
        "3 values under a header of 2": (1, 3),
        "1 values under a header of 2": (1, 5),
        "bad CSV (',' expected after '\"')": (1, 6),
        "not UTF-8": (1, 7),
        "no field 'response'": (1, 8),
        "bad CSV (unexpected end of data)": (1, 10),
    }
    assert report.summary()[1] == f"  left out 1: 3 values under a header of 2 (first: {path}:3)"


def test_blank_lines_before_a_csv_header(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("\n  \nquestion,response\nq,r\n\nonly\n")
    usable, report = rows.read_rows(path)
    assert [(row.question, row.line) for row in usable] == [("q", 4)]
    assert report.rejected == {"1 values under a header of 2": (1, 6)}


def test_a_single_row_with_other_columns(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"query": "q", "answer": "r"}))
    assert contents(rows.read_rows(path, columns="question:query,response:answer")[0]) == [("q", "r", "")]
    with pytest.raises(rows.DataError, match="name them with data.columns=question:query,response:answer"):
        rows.read_rows(path)


def test_nan_is_no_value(tmp_path):
    """pandas writes it where a value is missing."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "q", "response": "r", "bad": NaN, "source": NaN, "system": NaN}\n')
    ((row,), _), (plain,) = rows.read_rows(path), rows.parse([(1, {"question": "q", "response": "r"})])
    assert (row.source, row.system, row.id, rows.mark(row, "bad")) == ("", "", plain.id, None)


def test_csv_texts_are_labels(tmp_path):
    """Of pandas and of the standard library: 0 and False are texts, which Python would take for true."""
    path = tmp_path / "a.csv"
    path.write_text(
        "question,response,bad\n" + "".join(f"q{i},r,{mark}\n" for i, mark in enumerate(["0", "1", "False", "True", ""]))
    )
    usable, _ = rows.read_rows(path)
    assert [rows.mark(row, "bad") for row in usable] == [False, True, False, True, None]
    assert levels.labels(levels.Level(usable, [], [], []), "bad").tolist() == [False, True, False, True, False]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"q,q\n1,2\n", "a.csv:1: the column 'q' is named twice"),
        ("a.csv", "question,response\n".encode("utf-16"), "a.csv:1: the header of the CSV file is not UTF-8 text"),
        ("a.csv", b"", "a.csv: no rows in it"),
        ("a.csv", b'"question,response\n', "a.csv:1: no header of a CSV file"),
        ("a.jsonl.gz", b"text", "a.jsonl.gz: cannot be unpacked after row 0: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"question": "q", "response": "r"}\n' * 9)[:-9], "a.jsonl.gz: cannot be unpacked after row"),
        ("a.jsonl.zst", b"text", "a.jsonl.zst: cannot be unpacked after row 0"),
        ("a.jsonl.zst", zstandard.compress(os.urandom(10**5).hex().encode())[:-9], "a.jsonl.zst: cannot be unpacked after row"),
        ("a.parquet.gz", gzip.compress(b"PAR?"), "a.parquet.gz: not a readable Parquet file after row 0"),
        ("a.txt.gz", gzip.compress(b""), "a.txt.gz: unknown file type '.txt'"),
    ],
    ids=lambda value: "content" if isinstance(value, bytes) else value,  # gzip writes the time: workers would have other names
)
def test_damaged_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        rows.read_rows(tmp_path / name)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_pipes_are_refused(tmp_path):
    """Opening one would wait for a writer."""
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="a.jsonl: not a regular file"):
        rows.read_rows(tmp_path / "a.jsonl")


# ---- datasets.save_to_disk ----


def test_saved_data_set(tmp_path):
    datasets.Dataset.from_list(VALUES).save_to_disk(tmp_path / "saved", num_shards=2)
    usable, report = rows.read_rows(tmp_path / "saved")
    assert contents(usable) == EXPECTED and [row.line for row in usable] == [1, 2] and not report.rejections


def test_saved_splits(tmp_path):
    one = datasets.Dataset.from_list(VALUES[:1])
    two = datasets.Dataset.from_list(VALUES)
    datasets.DatasetDict({"train": two, "test": one}).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"a": two, "b": one}).save_to_disk(tmp_path / "named")
    datasets.DatasetDict({"only": one}).save_to_disk(tmp_path / "single")
    assert contents(rows.read_rows(tmp_path / "saved")[0]) == EXPECTED
    for name in ("saved:test", "named:b", "single"):
        assert contents(rows.read_rows(f"{tmp_path}/{name}")[0]) == EXPECTED[:1]
    for name, message in (
        ("named", "no split is named; name one: .*named:a, .*named:b"),
        ("saved:dev", "no split 'dev'; name one"),
    ):
        with pytest.raises(DataError, match=message):
            rows.read_rows(f"{tmp_path}/{name}")


def test_rows_of_a_saved_data_set_are_drawn_before_they_are_read(tmp_path):
    """A row that cannot be used costs one of the drawn rows; a file would have been read as a whole first."""
    values = [{"question": "" if i % 2 else f"q{i}", "response": "r"} for i in range(40)]
    datasets.Dataset.from_list(values).save_to_disk(tmp_path / "saved")
    usable, report = sources.open_source(str(tmp_path / "saved"), seed=0, num_rows=20, bad_fraction=0.0)
    assert len(usable) + len(report.rejections) == 20
    assert [row.question for row in usable] == [f"q{row.line - 1}" for row in usable]


def test_damaged_saved_data_set(tmp_path):
    datasets.Dataset.from_list(VALUES).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    file.write_bytes(b"")
    with pytest.raises(DataError, match="saved: not a readable data set of datasets.save_to_disk") as error:
        rows.read_rows(tmp_path / "saved")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["synthetic:lower,a.jsonl", "a.jsonl,recipe:redorca"])
def test_generated_rows_are_not_part_of_a_list(name):
    with pytest.raises(DataError, match="(synthetic:lower|recipe:redorca) cannot be part of a list"):
        sources.open_source(name, seed=0, num_rows=5, bad_fraction=0.0)

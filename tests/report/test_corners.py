"""Plausible and useful in the report: corners known by hand, tables without the numbers, and hostile texts."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from bilevel_jax.report import corners, page, plots, run_data
from tests.report.test_report import ROWS, SCRIPT, N, make_workdir, report

PLAUSIBLE = np.arange(1, N + 1) / N  # the median is 0.525, between rows 9 and 10
USEFUL = np.arange(N) % 5 - 2.0  # -2 -1 0 1 2, again and again
BOTH = {"plausible": PLAUSIBLE, "useful": USEFUL}
CORNERS = {  # rows, mean weight in epoch 2, share of bad rows, and the rows with the largest |plausible - 0.525| · |useful|
    "Plausible and useful": (4, (1 + 1 + 1.4 + 1.6) / 4, 0, [19, 14, 18]),
    "Plausible, not useful": (6, 1, 0, [15, 16, 11]),
    "Implausible, but useful": (4, 1, 0, [4, 3, 8]),
    "Implausible, not useful": (6, (0.2 + 0.8 + 4) / 6, 2 / 6, [0, 5, 1]),
}


def make(workdir, measures, **options):
    """A finished run whose tables have more columns, NaN as null."""
    workdir, _ = make_workdir(workdir, **options)
    for file in (workdir / "weights").iterdir():
        table = pyarrow.parquet.read_table(file)
        for name, values in measures.items():
            table = table.append_column(name, pa.array(np.float32(values), mask=np.isnan(values)))
        pyarrow.parquet.write_table(table, file)
    return workdir


def words_of(result, section="corners"):
    return " ".join(result.words[section].split())


def test_corners_by_hand(tmp_path):
    run = run_data.read(make(tmp_path / "run", BOTH))
    result = corners.split(run.tables[2], run_data.labels(run))
    assert [corner.name for corner in result] == list(CORNERS)
    for corner, (number, weight, bad, examples) in zip(result, CORNERS.values()):
        assert (corner.number, corner.share, corner.examples.tolist()) == (number, number / N, examples)
        assert corner.weight == pytest.approx(weight) and corner.bad == pytest.approx(bad)


def test_rows_without_a_label_are_not_good(tmp_path):
    """Without rows 0 and 5, one of the four other rows of the last corner is bad."""
    run = run_data.read(make(tmp_path / "run", BOTH))
    bad, known = run_data.labels(run), ~np.isin(np.arange(N), (0, 5))
    *_, last = corners.split(run.tables[2], bad, known)
    assert last.number == 6 and last.bad == pytest.approx(1 / 4)


def test_page(tmp_path):
    result = report(make(tmp_path / "run", BOTH))
    head, *cells = result.tables["corners"]
    assert head == ["", "rows", "share of rows", "mean weight", "rows that are bad"]
    assert cells[:4] == [
        ["Plausible and useful", "4", "20.0%", "1.25", "0.0%"],
        ["Plausible, not useful", "6", "30.0%", "1", "0.0%"],
        ["Implausible, but useful", "4", "20.0%", "1", "0.0%"],
        ["Implausible, not useful", "6", "30.0%", "0.833", "33.3%"],
    ]
    shown = [int(re.search(r"Question (\d+)\?", row[2])[1]) for row in cells[4:] if row[0] != "rank"]
    assert shown == [i for *_, examples in CORNERS.values() for i in examples]
    assert "plausible 0.05 · useful -2 · a · 2 visits" in words_of(result, "rows")  # row 0
    for section in ("rows", "corners"):
        assert "Plausible: how likely the model finds" in words_of(result, section)
        assert "Useful: how much the row helps the trusted rows; below 0 it harms them." in words_of(result, section)
    assert "left out" not in words_of(result)
    assert len([tag for tag, _ in result.elements if tag == "svg"]) == 8


def test_without_useful_there_are_two_halves(tmp_path):
    result = report(make(tmp_path / "run", {"plausible": PLAUSIBLE, "useful": np.full(N, np.nan)}))
    assert result.tables["corners"][1:3] == [
        ["Plausible", "10", "50.0%", "1.1", "0.0%"],
        ["Implausible", "10", "50.0%", "0.9", "20.0%"],
    ]
    assert "did not measure how useful the rows are, which selection.cost=influence does" in words_of(result)
    assert "Useful:" not in words_of(result) and "useful -" not in words_of(result, "rows")
    assert "plausible 0.05 · a" in words_of(result, "rows")
    extreme = [row[2] for row in result.tables["corners"][3:] if row[0] != "rank"]
    assert [re.search(r"Question (\d+)", cell)[1] for cell in extreme] == ["19", "18", "17", "0", "1", "2"]


@pytest.mark.parametrize("measures", [{}, {"useful": USEFUL}])
def test_tables_of_earlier_versions(tmp_path, measures):
    result = report(make(tmp_path / "run", measures))
    assert "which earlier versions did not write" in words_of(result) and not result.tables["corners"]
    assert "plausible" not in words_of(result, "rows") and "Plausible" not in words_of(result, "rows")


def test_rows_that_no_step_used_are_left_out(tmp_path):
    """Without row 19 the median is that of row 9, 0.5."""
    workdir = make(tmp_path / "run", BOTH | {"plausible": np.where(np.arange(N) == 19, np.nan, PLAUSIBLE)})
    result = report(workdir)
    assert [row[1] for row in result.tables["corners"][1:5]] == ["4", "6", "3", "6"]
    assert "Rows that no step used are left out." in words_of(result)
    assert "useful 2 · b" in words_of(result, "rows")  # row 19, the heaviest


def test_without_labels_and_with_empty_corners(tmp_path):
    rows = [{name: value for name, value in row.items() if name != "bad"} for row in ROWS]
    result = report(make(tmp_path / "run", {"plausible": np.ones(N), "useful": np.ones(N)}, rows=rows))
    assert result.tables["corners"][:3] == [
        ["", "rows", "share of rows", "mean weight"],
        ["Plausible and useful", "20", "100.0%", "1"],
        ["Plausible, not useful", "0", "0.0%", ""],
    ]
    assert "other rows" not in words_of(result)


def test_texts_are_escaped(tmp_path):
    label = "<b>bad</b>"
    rows = [row | {"question": SCRIPT, "response": f"{SCRIPT} \x1b[2J {i}", label: i < 2} for i, row in enumerate(ROWS)]
    workdir = make(tmp_path / "run", BOTH, rows=rows, changes={"data.label": label})
    result = report(workdir)
    assert not {"script", "img"} & {tag for tag, _ in result.elements}
    assert SCRIPT in words_of(result) and "marked <b>bad</b>" in words_of(result)
    assert "\x1b" not in (workdir / "report.html").read_text()


def test_every_row_is_a_dot_inside_the_panel():
    rng = np.random.default_rng(0)
    kinds = {"other rows": rng.normal(size=(3000, 2)), "bad": rng.normal(size=(2000, 2))}
    kinds["bad"][0] = 1e6, -1e6
    svg = plots.scatter("two kinds", ("x", "y"), kinds, (0.0, 0.0))
    width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', svg).groups())
    for kind, color in zip(kinds.values(), ("green", "red")):
        (path,) = re.findall(rf'd="([^"]*)" style="[^"]*stroke: var\(--{color}\); stroke-width: 4', svg)
        dots = np.array([pair.split() for pair in re.findall(r"M (\S+ \S+) L", path)], float)
        assert len(dots) == len(kind) and (dots > 0).all() and (dots < (width, height)).all()
    assert len(svg) < 250_000 and svg == plots.scatter("two kinds", ("x", "y"), kinds, (0.0, 0.0))


def test_large_runs_are_sampled():
    few, many = corners.sample(np.arange(7)), corners.sample(np.arange(10, 20_000))
    assert few.tolist() == list(range(7))
    assert len(many) == corners.MAX_DOTS and (np.diff(many) > 0).all() and many[0] >= 10
    assert (many == corners.sample(np.arange(10, 20_000))).all()


def test_a_report_of_a_large_run_says_that_it_is_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(corners, "MAX_DOTS", 8)
    run = run_data.read(make(tmp_path / "run", BOTH))
    assert "shows 8 rows, drawn at random" in " ".join(page.render(run).split())


def test_rows_unlike_the_trusted_ones(tmp_path):
    """The five smallest numbers, the smallest first, whatever the other two say."""
    similar = np.arange(N)[::-1] - N / 2
    result = report(make(tmp_path / "run", BOTH | {"similar": similar}))
    words = words_of(result, "unlike")
    shown = [f"similar {value:.3g} " for value in sorted(similar)[:5]]
    assert [words.index(text) for text in shown] == sorted(words.index(text) for text in shown)
    assert f"similar {sorted(similar)[5]:.3g} " not in words
    assert "unlike" not in report(make(tmp_path / "without", BOTH)).words

"""The report: numbers against values by hand, hostile texts, and a real browser."""

import html.parser
import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from bilevel_jax import config as configuration
from bilevel_jax import finish, train
from bilevel_jax.data import rows as data_rows
from bilevel_jax.data import streaming
from bilevel_jax.errors import RunError
from bilevel_jax.report import cells, page, panels, plots, run_data, screenshot, shown_rows
from bilevel_jax.runtime import summary_table, weight_table
from bilevel_jax.runtime.workdir import read_config
from bilevel_jax.text import one_line, visible
from tests.conftest import run_command, write_jsonl

N = 20
ROWS = [
    {"question": f"Question {i}?", "response": "word " * i + "end", "source": "a" if i < 5 else "b", "bad": i < 2, "truth": "x y z"}
    for i in range(N)
]  # row i has i + 1 words
WEIGHTS = {1: {0: 0.5, 19: 1.5}, 2: {0: 0.2, 1: 0.8, 18: 1.4, 19: 1.6}}  # by epoch; all others are 1
EVENTS = [
    {"step": 0, "epoch": 0, "eval/upper_loss": 0.5, "eval/lower_loss": 0.75},
    {"step": 1, "epoch": 0.0, "online/responses": 3.0, "online/bad_answered": 2.0, "online/bad_right": 1.0},
    {"step": 5, "epoch": 1.0, "eval/upper_loss": 0.45, "eval/lower_loss": 0.77, "train/upper_loss": 0.6, "train/lower_loss": 0.9},
    {"step": 7, "epoch": 1.4, "online/responses": 4.0, "online/bad_answered": 2.0, "online/bad_right": 2.0},
    {"step": 10, "epoch": 2.0, "eval/upper_loss": 0.4, "eval/lower_loss": 0.8, "train/upper_loss": 0.5, "train/lower_loss": 0.8},
]
SUMMARY = {"steps": 10, "time/load": 5.0, "time/train": 60.0, "time/generate": 15.0}
RESPONSES = [(2, 0, 0, "old old old"), (4, 0, 0, "x y z"), (4, 0, 1, "x y z x y"), (8, 1, 0, "word")]  # step, row, sample, text


def make_workdir(workdir, rows=ROWS, responses=RESPONSES, changes=()):
    """A finished run: epochs of 5 steps, a refresh every 2 steps, rows 0 and 1 masked at the end. Returns workdir and ids."""
    workdir.mkdir()
    (workdir / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ids = [row.id for row in data_rows.read_rows(workdir / "rows.jsonl")[0]]
    config = configuration.default()
    settings = {"method": "dynamic", "batch.size": 4, "online.refresh_every": 2, "data.lower": str(workdir / "rows.jsonl")}
    config.update_from_flattened_dict(settings | dict(changes))
    (workdir / "config.json").write_text(config.to_json())
    (workdir / "summary.json").write_text(json.dumps(SUMMARY))
    write_jsonl(workdir / "metrics.jsonl", EVENTS)
    lines = [{"step": step, "id": ids[i], "sample": g, "text": text, "ratio": None} for step, i, g, text in responses]
    (workdir / "responses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))  # ASCII: any text
    (workdir / "weights").mkdir()
    for epoch, weights in WEIGHTS.items():
        weight = np.array([weights.get(i, 1.0) for i in range(len(rows))])
        rank = np.empty(len(rows), int)
        rank[sorted(range(len(rows)), key=lambda i: (-weight[i], i))] = range(1, len(rows) + 1)
        table = {"id": ids, "weight": weight, "logit": np.log(weight), "rank": rank, "visits": [epoch] * len(rows)}
        table |= {"masked": [i < epoch for i in range(len(rows))], "source": [row.get("source", "") for row in rows]}
        pyarrow.parquet.write_table(pa.table(table), workdir / "weights" / f"epoch_{epoch}.parquet")
    return workdir, ids


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("by_hand") / "run")[0]


class Parsed(html.parser.HTMLParser):
    """The content of a page: elements, words and table cells of each section, and the sections with content."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.words, self.tables, self.filled = [], {"": ""}, {}, set()
        self._section, self._cell = "", None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "section":
            self._section = dict(attributes)["id"]
            self.words[self._section], self.tables[self._section] = "", []
        self.words[self._section] += " "  # elements are not one word
        if tag in ("table", "svg") or dict(attributes).get("class") == "pair":
            self.filled.add(self._section)
        if tag == "tr":
            self.tables[self._section].append([])
        elif tag in ("td", "th"):
            self.tables[self._section][-1].append("")
            self._cell = self.tables[self._section][-1]

    def handle_endtag(self, tag):
        self.words[self._section] += " "
        if tag in ("td", "th"):
            self._cell = None

    def handle_data(self, data):
        self.words[self._section] += data
        if self._cell is not None:
            self._cell[-1] += data


def report(workdir) -> Parsed:
    return Parsed(page.write(workdir).read_text(encoding="utf-8"))


# --------------------------------------------------------------------------------------------------------------------
# Numbers, by hand
# --------------------------------------------------------------------------------------------------------------------


def test_weights_by_epoch(run_dir):
    """ESS/N = (Σw)² / (N Σw²) = 20² / (20 · 20.5) and 20² / (20 · 21.2).

    In epoch 1 one bad row is lighter than all 18 good rows, the other ties with 17 and is lighter than one: (18 + 9.5) / 36. It is
    among the 16 heaviest, because ties stay in order: one of 2 bad rows is kept, and one of 16 kept rows is bad.
    """
    head, first, second = report(run_dir).tables["weights"]
    assert head[:7] == ["epoch", "ESS / N", "lightest", "median", "heaviest", "masked", "AUROC"]
    assert head[7:] == ["bad rows that are kept, of all bad", "kept rows that are bad"]
    assert first == ["1", "97.6%", "0.5", "1", "1.5", "5.0%", "0.764", "50.0%", "6.2%"]
    assert second == ["2", "94.3%", "0.2", "1", "1.6", "10.0%", "1.000", "0.0%", "0.0%"]


def test_duplicates(tmp_path, run_dir):
    """One cluster of three rows and two of two have 2 + 1 + 1 copies."""
    workdir, _ = make_workdir(tmp_path / "run", changes={"data.deduplicate": "exact"})
    counts = {"duplicates": 4, "duplicate_clusters": {"2": 2, "3": 1}, "overlap": 5}
    summary = SUMMARY | {f"data/lower_{key}": value for key, value in counts.items()} | {"data/upper_held_out_copies": 1}
    (workdir / "summary.json").write_text(json.dumps(summary))
    assert report(workdir).tables["repeated"][1:] == [
        ["trusted rows", "0", "", "0", "1"],
        ["mixture", "4, dropped", "1 of 3 rows, 2 of 2 rows", "5", "0"],
    ]
    assert "repeated" not in report(run_dir).tables


def test_share_of_weight_by_source(run_dir):
    """Source a: 5 rows of 20, then 4.5 and 4 of a total of 20; b has the rest."""
    head, *result = report(run_dir).tables["sources"]
    assert head == ["source", "rows", "share of rows", "weight, epoch 1", "weight, epoch 2", "mean weight now"]
    a, b = ["a", "5", "25.00%", "22.50%", "20.00%", "0.8"], ["b", "15", "75.00%", "77.50%", "80.00%", "1.07"]
    assert sorted(result) == [a, b]


def test_response_lengths(run_dir):
    """Epoch 1 ends with the responses of step 4 in use: 3 and 5 words for row 0, which has 1 word in the data.

    The heaviest tenth is rows 19 and 1, with 20 and 2 words, the lightest rows 18 and 0. Epoch 2 ends with the responses of step 8:
    1 word for row 1 instead of 2, none for row 0.
    """
    head, first, second = report(run_dir).tables["lengths"]
    assert head == ["epoch", "heaviest tenth", "all rows", "lightest tenth"]
    assert first == ["1", "11.0", f"{(210 - 1 + 4) / 20:.1f}", "11.5"]
    assert second == ["2", "19.5", f"{(210 - 2 + 1) / 20:.1f}", "1.0"]


def test_top_and_bottom_rows_of_every_epoch(run_dir):
    result = report(run_dir)
    cells = [row for row in result.tables["rows"] if row[0] != "rank"]
    number = re.compile(r"Question (\d+)\?")
    shown = [(int(rank), weight, int(number.search(words)[1])) for rank, weight, words in cells]
    assert shown[:2] == [(20, "0.2", 0), (19, "0.8", 1)] and shown[5:7] == [(1, "1.6", 19), (2, "1.4", 18)]  # the last epoch first
    assert shown[10] == (20, "0.5", 0) and shown[15:17] == [(1, "1.5", 19), (2, "1", 1)]
    assert "bad" in cells[0][2] and "bad" in cells[1][2] and "bad" not in cells[2][2]
    assert "2 visits" in cells[0][2] and "1 visit " in cells[10][2]
    opened = ["open" in attributes for _, attributes in result.elements if attributes.get("class") == "epoch"]
    assert opened == [False, True, False]  # all sources, the last epoch, the first


def test_responses_of_the_data_and_of_the_model(run_dir):
    """Row 0: the first response of the latest step has no word of "end". Row 1: "word" is half of "word end": 2 · 1 / (1 + 2)."""
    words = " ".join(report(run_dir).words["responses"].split())
    first, second = re.split(r"(?=Question 1\?)", words)
    assert re.search(r"Question 0\?.* 0% of the words in common.*data end model, step 4 · right x y z $", first)
    assert re.search(r" 67% of the words in common.*data word end model, step 8 word right response x y z$", second)
    assert "old old old" not in words


@pytest.mark.parametrize(
    "a, b, expected", [("a b", "b a", 1), ("a a b", "a c", 0.4), ("", "", 1), ("a", "", 0), ("The end", "the END", 1)]
)
def test_words_in_common(a, b, expected):
    assert run_data.words_in_common(a, b) == pytest.approx(expected)


@pytest.mark.parametrize(
    "losses, right, expected",
    [
        (None, None, "The run has not measured a loss after the start yet."),
        ((0.5, 0.501), None, "The loss on held-out trusted rows stayed at 0.5010."),
        ((1.0, 0.05), (0.0, 0.9), "(−95%). Of their questions 0.0% were answered right before, 90.0% after."),
    ],
)
def test_result(losses, right, expected):
    assert page.result_text(losses, right).endswith(expected)


def test_head(run_dir):
    words = " ".join(report(run_dir).words[""].split())
    for shown in (
        "fell from 0.5000 to 0.4000 (−20%)",
        "0.5 → 0.4",
        "0.75 → 0.8",
        "94.3%",  # ESS/N
        "10% of the rows with the smallest weights",
        "Responses generated 7 75% right where the data are bad",
        "1.3 min",  # 80 s
    ):
        assert shown in words
    assert "not finished" not in words


def test_time_split(run_dir):
    result = report(run_dir)
    assert result.tables["time"] == [["train", "60.0 s"], ["generate", "15.0 s"], ["load", "5.0 s"]]
    assert "75%" in result.words["time"]


def test_figures(run_dir):
    """Two of losses, two histograms, sources, lengths, time. No event has the ESS or the percentiles."""
    result = [attributes["aria-label"] for tag, attributes in report(run_dir).elements if tag == "svg"]
    assert len(result) == 7 and len(set(result)) == 7


def test_many_points_are_averaged():
    assert plots.thinned([1, 2, 3]).tolist() == [1, 2, 3]
    result = plots.thinned(np.arange(601))
    assert len(result) == 201 and result[:2].tolist() == [1, 4] and result[-1] == 600


# --------------------------------------------------------------------------------------------------------------------
# Runs that have less to show
# --------------------------------------------------------------------------------------------------------------------


def _without(*names):
    def change(workdir):
        for name in names:
            shutil.rmtree(workdir / name) if (workdir / name).is_dir() else (workdir / name).unlink()

    return change


def _method(name):
    def change(workdir):
        config = json.loads((workdir / "config.json").read_text())
        (workdir / "config.json").write_text(json.dumps(config | {"method": name}))
        _without("responses.jsonl", *(["weights"] if name == "mixing" else []))(workdir)

    return change


def _frozen(workdir):
    for file in (workdir / "weights").iterdir():
        table = pyarrow.parquet.read_table(file)
        pyarrow.parquet.write_table(table.set_column(1, "weight", pa.array(np.ones(N))), file)


def _cut_short(workdir):
    """Killed while writing; nothing is lost but the last line."""
    for name in ("metrics.jsonl", "responses.jsonl"):
        with open(workdir / name, "a") as file:
            file.write('{"step": 11, "epo')


def _other_rows(workdir):
    write_jsonl(workdir / "rows.jsonl", [{"question": "Another?", "response": "Row."}])


WEIGHED = "weights", "sources", "rows", "lengths"
ALL = "losses", *WEIGHED, "responses", "time"


@pytest.mark.parametrize(
    "change, empty, reason",
    [
        (_cut_short, (), ""),
        (_without("summary.json"), ("time",), "not finished. The report covers it up to step 10"),
        (_without("summary.json", "weights"), (*WEIGHED, "responses", "time"), "No epoch is finished yet"),
        (_without("summary.json", "weights", "metrics.jsonl", "responses.jsonl"), ALL, "Nothing is logged yet"),
        (_without("responses.jsonl"), ("responses",), "No responses to masked rows"),
        (_without("rows.jsonl"), ("lengths", "responses"), "no such file"),
        (_other_rows, ("lengths", "responses"), "20 of 20 rows are no longer in"),
        (_method("offline"), ("responses",), "method=offline"),
        (_method("mixing"), (*WEIGHED, "responses"), "Direct mixing has no weights"),
        (_frozen, ("sources", "rows", "lengths"), "All weights are equal"),
    ],
)
@pytest.mark.slow
def test_sections_without_data_say_why(run_dir, tmp_path, change, empty, reason):
    workdir = tmp_path / "run"
    shutil.copytree(run_dir, workdir)
    config = (workdir / "config.json").read_text()
    (workdir / "config.json").write_text(config.replace(str(run_dir), str(workdir)))
    change(workdir)
    result = report(workdir)
    shown = {attributes["id"] for tag, attributes in result.elements if tag == "section"}
    assert shown == {*ALL, "corners", "settings"}
    assert reason in " ".join("".join(result.words.values()).split())
    for section in ALL:
        assert (section in result.filled) == (section not in empty), section


def test_without_its_rows_a_report_shows_ids(run_dir, tmp_path):
    result = page.render(run_data.read(run_dir, rows=[]))
    ids = pyarrow.parquet.read_table(run_dir / "weights" / "epoch_2.parquet")["id"].to_pylist()
    assert ids[0] in result and "Question 0?" not in result


def test_a_report_of_many_rows_shows_the_same(run_dir, monkeypatch):
    """Only the texts that are shown are kept: each end of the ranking has two rows here, and both masked rows are compared."""
    monkeypatch.setattr(shown_rows, "NUM_EXTREMES", 2)
    expected = page.render(run_data.read(run_dir))
    monkeypatch.setattr(shown_rows, "ALL", N - 1)
    run = run_data.read(run_dir)
    assert 2 <= len(run.rows) < N / 2
    note = f" Of so many rows only {shown_rows.ROWS:,} with a\ngenerated response, drawn at random, are compared."
    assert page.render(run).replace(note, "") == expected


def test_rows_that_are_missing_are_named(run_dir, tmp_path):
    """Rows 2 to 5, which are good. Of 14 good rows, epoch 1 has row 0 below 14, and row 1 below one and level with 13."""
    workdir = shutil.copytree(run_dir, tmp_path / "run")
    config = (workdir / "config.json").read_text()
    (workdir / "config.json").write_text(config.replace(str(run_dir), str(workdir)))
    ids = [row.id for row in data_rows.read_rows(workdir / "rows.jsonl")[0]]
    write_jsonl(workdir / "rows.jsonl", ROWS[:2] + ROWS[6:])
    stdout = run_command("report", [f"--workdir={workdir}"])
    named = f"4 of 20 rows are no longer in {workdir}/rows.jsonl: {', '.join(ids[2:6])}. Their ids are shown"
    assert named in stdout
    text = (workdir / "report.html").read_text()
    assert named in text and text.count("not found in the data") == 6  # of both epochs: 2, 3, 4 among the five heaviest
    _, first, _ = report(workdir).tables["weights"]
    assert first[6] == f"{(14 + 1 + 13 / 2) / 28:.3f}"


def test_corners_without_a_known_label(run_dir, monkeypatch):
    """Rows 10 to 19 are plausible and useful, the others neither; those that are no longer in the data have no label."""
    run = run_data.read(run_dir)
    last = run.tables[max(run.tables)]
    last["plausible"], last["useful"] = np.arange(N) / N, np.arange(N) - 9.5
    run.labels[10:] = run_data.MISSING
    result = cells.corner_rows(run)
    assert [(corner.number, corner.bad) for corner, _ in result] == [(10, None), (0, None), (0, None), (10, 0.2)]
    assert "20.0%" in page.render(run)  # and no error
    drawn = []
    monkeypatch.setattr(plots, "scatter", lambda title, names, kinds, lines: drawn.append((kinds, lines)) or "")
    panels.corner_panels(run)
    [(kinds, lines)] = drawn
    assert sorted(len(dots) for dots in kinds.values()) == [2, 8]  # bad ones, other ones
    assert lines == (pytest.approx(9.5 / N), 0.0)  # the median of all rows, where the corners are split


def test_a_report_of_pairs_shows_the_loss_of_the_pairs(run_dir, monkeypatch):
    """The chosen responses may become less likely while they are told from the rejected ones ever better."""
    run = run_data.read(run_dir)
    for event, loss in zip([event for event in run.events if "eval/upper_loss" in event], (0.7, 0.5, 0.35)):
        event["eval/upper_pair_loss"] = loss
    run.summary["eval/upper_pair_loss"] = 0.35
    assert "fell from 0.7000 to 0.3500 (−50%)" in page.render(run)
    assert ("Loss on trusted rows", "0.7 → 0.35", "loss of a pair, held out") in page.tiles(run)
    drawn = {}
    monkeypatch.setattr(
        plots, "losses", lambda title, train, held_out, unit: drawn.setdefault(title, (unit, *held_out["held out"])) and ""
    )
    panels.loss_panels(run)
    unit, _, losses = drawn["Loss on trusted rows"]
    assert unit == "loss of a pair" and losses == [0.7, 0.5, 0.35][: len(losses)]


def test_sums_over_tokens_are_not_drawn_beside_means(run_dir):
    run = run_data.read(run_dir)
    both = dict(panels.loss_panels(run))["Loss on trusted rows"]
    run.config.loss.reduction = "sum"
    assert "training" in both and "training" not in dict(panels.loss_panels(run))["Loss on trusted rows"]


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, "one weight for each row of the mixture, jointly with the model, so that"),
        ({"unit": "domain"}, "one weight for each source of the mixture, jointly with the model, so that"),
        ({"unit": "turn"}, "one weight for each answer of the mixture, jointly with the model, so that"),
        ({"rule": "metagradient"}, "one weight for each row of the mixture before it, by training several times, so that"),
        ({"rule": "uniform"}, "Data selection: all rows of the mixture had the same weight (the control)."),
        ({"freeze": True}, "Data selection: each row of the mixture had a given weight, which stayed as it was."),
    ],
)
def test_what_the_run_did(run_dir, changes, expected):
    run = run_data.read(run_dir)
    run.config.method = "offline"
    run.config.selection.update(changes)
    assert expected in page.method_text(run)


def test_a_share_that_keeps_no_row(run_dir):
    run = run_data.read(run_dir)
    run.config.eval.keep = 0.02
    assert "bad_among_kept" not in run_data.epoch_metrics(run, 2) and "nan" not in page.render(run)


def test_responses_that_were_cut_take_no_place_of_others(monkeypatch):
    """Of four responses with weights the two with the smallest ESS/T are shown, also in a large run; two others have no weights."""
    monkeypatch.setattr(shown_rows, "ALL", 0)
    monkeypatch.setattr(shown_rows, "NUM_TOKEN_WEIGHTED", 1)
    monkeypatch.setattr(shown_rows, "NUM_EXTREMES", 0)
    weights = [[], [1.0, 1.0], [0.1, 1.9], [0.5, 1.5], [], [1.0, 1.0]]
    columns = {"id": [f"{i}" for i in range(6)], "weight": weights, "start": [[]] * 6, "stop": [[]] * 6}
    tokens = pa.table(columns, schema=weight_table.TOKENS_SCHEMA)
    names = ("plausible", "useful", "similar")
    table = {"id": np.array(columns["id"]), "rank": np.arange(1, 7), "masked": np.zeros(6, bool)}
    table |= {name: np.full(6, np.nan) for name in names}
    assert np.flatnonzero(shown_rows.rows({1: table}, (), tokens)).tolist() == [2, 3]


def test_many_sources_and_epochs(tmp_path):
    rows = [row | {"source": f"source {i:03}"} for i, row in enumerate(ROWS * 3)]
    workdir, _ = make_workdir(tmp_path / "run", [row | {"question": f"{i}"} for i, row in enumerate(rows)])
    for epoch in range(3, 31):
        shutil.copy(workdir / "weights" / "epoch_2.parquet", workdir / "weights" / f"epoch_{epoch}.parquet")
    result = report(workdir)
    assert len(result.tables["sources"]) == 1 + page.MAX_SOURCES and "and 20 more sources" in result.words["sources"]
    assert [row[0] for row in result.tables["weights"][1:]] == [str(epoch) for epoch in range(1, 31)]  # by number, not by name
    assert (workdir / "report.html").stat().st_size < 1_000_000


# --------------------------------------------------------------------------------------------------------------------
# Hostile texts
# --------------------------------------------------------------------------------------------------------------------

SCRIPT = "<script>document.title = 'hacked'</script>"
NASTY = [
    SCRIPT,
    "</summary></details></section></body></html><h1>over</h1>",
    "\"'><img src=https://example.org/x onerror=\"document.title='hacked'\">",
    "{{ 7 * 7 }} {% include 'x' %} ${7 * 7} $\\frac{1}{2}$ ]]> --> <!-- &lt;b&gt;",
    "a\x00b\x1b[2J\x07\x08c\x7fd\x9be",
    "left \u202eright\u2066 end \u200f\ufeff\u2028next",
    "x" * 100_000,
    "a\u0301" + "\u0300" * 3000,
    "עברית 中文 ☃ 👩‍👩‍👧 𝔘",
    " \n\t ",
]
GENERATED = "half \ud800 a pair " + SCRIPT  # not valid in a row, but JSON can spell it


@pytest.fixture(scope="module")
def nasty(tmp_path_factory):
    """A run whose names and texts are all hostile."""
    texts = NASTY * 2
    rows = [
        {"question": text.strip() and text or "x", "response": texts[(i + 1) % 20] + f" {i}", "source": text[:200], "bad": i < 2}
        for i, text in enumerate(texts)
    ]
    changes = {"data.label": "bad", "model.path": SCRIPT, "data.truth": SCRIPT}
    directory = tmp_path_factory.mktemp("nasty")
    workdir, _ = make_workdir(directory / "<b onclick=x>&amp;'", rows, [(8, 0, 0, GENERATED), (8, 1, 0, NASTY[6])], changes)
    return workdir


def test_nothing_of_a_row_is_markup(nasty):
    text = page.write(nasty).read_text(encoding="utf-8")
    result = Parsed(text)
    tags = {tag for tag, _ in result.elements}
    assert not tags & {"script", "img", "iframe", "object", "embed", "form", "input", "base"}
    assert sum(tag == "h1" for tag, _ in result.elements) == 1
    assert sum(tag == "b" for tag, _ in result.elements) == sum(a.get("class") == "tile" for _, a in result.elements)
    for _, attributes in result.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "action")]
        assert re.match(r"#|data:,$", attributes.get("href") or attributes.get("xlink:href") or "#")
    assert not re.search(r"url\((?!#)|@import|https?://", "".join(v or "" for _, a in result.elements for v in a.values()))
    words = "".join(result.words.values())
    for shown in (SCRIPT, "</summary>", "{{ 7 * 7 }}", "$\\frac{1}{2}$", "中文 ☃ 👩‍👩‍👧 𝔘"):
        assert shown in words


def test_control_characters_are_escaped(nasty):
    raw = page.write(nasty).read_bytes()
    text = raw.decode()  # all valid UTF-8, also the half pair
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\u2028]", text)
    for shown in ("a\\x00b\\x1b[2J\\x07\\x08c\\x7fd\\x9be", "left \\u202eright\\u2066", "half \\ud800 a pair"):
        assert shown in text
    assert "and 98,000 more characters" in text and len(raw) < 500_000


def test_policy(run_dir):
    result = report(run_dir).elements
    policy = next(a["content"] for tag, a in result if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.split(maxsplit=1) for rule in policy.split("; "))
    assert rules == {
        "default-src": "'none'", "style-src": "'unsafe-inline'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'",
    }  # fmt: skip


@pytest.mark.parametrize(
    "text, expected",
    [
        ("plain\ttext\nhere", "plain\ttext\nhere"),
        ("\x1b[31mred\r", "\\x1b[31mred\\r"),
        ("a\u202eb", "a\\u202eb"),
        ("\ud800", "\\ud800"),
        ("👩‍👧", "👩‍👧"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_visible(text, expected):
    assert visible(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [("  a \n b\t", "a b"), ("x" * 60, "x" * 60), ("x" * 61, "x" * 59 + "…"), ("x" * 100_000, "x" * 59 + "…"), ("", "")],
)
def test_one_line(text, expected):
    assert one_line(text, 60) == expected


# --------------------------------------------------------------------------------------------------------------------
# The closing table
# --------------------------------------------------------------------------------------------------------------------


def test_closing_table_shows_the_least_trusted_questions(nasty):
    table = summary_table.summary_table({}, nasty)
    lines = table.split("\n")
    at = lines.index("least trusted rows (id, weight, source, question)")
    assert [line.split()[1] for line in lines[at + 1 : at + 3]] == ["0.2", "0.8"]
    assert lines[at + 1].endswith(SCRIPT) and all(len(line) < 120 for line in lines[at + 1 : at + 6])
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", table)
    assert "report.html" in lines[-1]


def test_closing_table_of_pairs(run_dir):
    table = summary_table.summary_table({"start/lower_pair_accuracy": 0.5, "eval/lower_pair_accuracy": 0.875}, run_dir)
    [line] = [line for line in table.splitlines() if "87.5%" in line]
    assert line.split() == ["mixture,", "as", "it", "is", "50.0%", "87.5%"] and "held-out pairs ranked correctly" in table
    assert "pairs ranked correctly" not in summary_table.summary_table({}, run_dir)


def test_closing_table_without_the_rows(run_dir, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(run_dir, workdir)
    (workdir / "config.json").write_text((run_dir / "config.json").read_text().replace(str(run_dir), "/nowhere"))
    assert "Question" in summary_table.summary_table({}, run_dir)
    assert "0.2" in (table := summary_table.summary_table({}, workdir)) and "Question" not in table


# --------------------------------------------------------------------------------------------------------------------
# The command, and real runs
# --------------------------------------------------------------------------------------------------------------------


def command(*arguments):
    return subprocess.run([sys.executable, "-m", "bilevel_jax.report", *arguments], capture_output=True, text=True)


def test_command_makes_the_same_report_again(finished, tmp_path):
    """The command, which reads the rows again, writes the same bytes as the run."""
    copy = tmp_path / finished.name
    shutil.copytree(finished, copy)
    (copy / "report.html").unlink()
    done = command(f"--workdir={copy}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(copy / "report.html")
    assert (copy / "report.html").read_bytes() == (finished / "report.html").read_bytes()
    lightest = pyarrow.parquet.read_table(finished / "weights" / "epoch_2.parquet").sort_by("weight")["id"][0].as_py()
    questions = {row.id: row.question for row in streaming.reopen(read_config(finished))}
    assert questions[lightest] in Parsed((copy / "report.html").read_text()).words["rows"]


def test_command_refuses_what_is_no_run(tmp_path):
    done = command(f"--workdir={tmp_path}")
    assert done.returncode == 1 and "holds no run" in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "file, path, reason",
    [
        ("report.jpg", os.environ["PATH"], "must end in .png"),
        ("absent/report.png", os.environ["PATH"], "--screenshot: there is no directory .*/absent"),
        ("report.png", "", "--screenshot needs Chromium, but none of chromium, .* is on PATH"),
    ],
)
def test_screenshots_that_are_refused(run_dir, tmp_path, monkeypatch, file, path, reason):
    monkeypatch.setenv("PATH", path)
    with pytest.raises((ValueError, OSError), match=reason) as error:
        run_command("report", [f"--workdir={run_dir}", f"--screenshot={tmp_path / file}"])
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_browser_that_fails(run_dir, tmp_path, monkeypatch):
    browser = tmp_path / "chromium"
    browser.write_text("#!/bin/sh\necho one >&2\necho no display >&2\nexit 3\n")
    browser.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(RunError, match="chromium took no picture of .*report.html: no display$"):
        run_command("report", [f"--workdir={run_dir}", f"--screenshot={tmp_path / 'report.png'}"])
    assert list(tmp_path.iterdir()) == [browser]


def test_a_failing_report_does_not_fail_the_run(make_config, tmp_path, monkeypatch, capsys):
    def fail(*arguments):
        raise RuntimeError("no\nfonts")

    monkeypatch.setattr(finish.page, "write", fail)
    changes = {"num_epochs": 1, "method": "mixing", "mixing.rho": 1.0, "eval.num_upper": 0, "eval.num_lower": 0}
    summary = train.run(make_config(changes), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    told = capsys.readouterr().err.strip().split("\n")[-1]
    assert "report.html" in told and "no fonts" in told and f"bilevel_jax.report --workdir={tmp_path / 'run'}" in told


# --------------------------------------------------------------------------------------------------------------------
# A real browser
# --------------------------------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, screenshot.NAMES)), None)
PHONE = 390, 844
QUIET = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --hide-scrollbars"
QUIET += " --disable-component-update --disable-sync --disable-dev-shm-usage"
# The page in a frame as wide as a phone, which is narrower than the smallest window. Two bad pages next to it prove that the
# measurements detect failures.
HARNESS = """<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<style>body { margin: 0 } iframe { border: 0; width: %dpx; height: %dpx; display: block }</style><title>untouched</title>
<body><script>
const pages = %s;
const results = {};
function measure(name, frame) {
  const page = frame.contentDocument, view = frame.contentWindow, root = page.documentElement;
  page.querySelectorAll("details").forEach(one => one.open = true);
  const line = page.querySelector("svg path[style*='--blue']");
  results[name] = {
    title: page.title, width: root.scrollWidth, scripts: page.querySelectorAll("script").length,
    fetched: view.performance.getEntriesByType("resource").length,
    background: view.getComputedStyle(root).backgroundColor, ink: view.getComputedStyle(root).color,
    line: line && view.getComputedStyle(line).stroke,
    figures: [...page.querySelectorAll("svg")].map(one => one.getBoundingClientRect()).map(box => [box.width, box.height]),
    text: page.body.innerText,
  };
  if (Object.keys(results).length == Object.keys(pages).length) {
    const output = document.createElement("pre");
    output.textContent = JSON.stringify(results);
    document.body.append(output);
  }
}
for (const [name, text] of Object.entries(pages)) {
  const frame = document.createElement("iframe");
  frame.onload = () => measure(name, frame);
  frame.srcdoc = text;
  document.body.append(frame);
}
</script>"""


def browse(directory, text: str, dark: bool):
    """Measurements of the pages in a browser, by name, and a picture [844, 390, 3] of the top, in [0, 1]."""
    import matplotlib.image

    pages = {"page": text, "wide": "<div style='width: 600px'>x</div>", "harm": f"<title>before</title>{SCRIPT}"}
    inside = json.dumps(pages).replace("<", "\\u003c")
    (directory / "harness.html").write_text(HARNESS % (*PHONE, inside), encoding="utf-8")
    shot = directory / "shot.png"
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    folder = f"--user-data-dir={directory / 'browser'}"
    window = "--window-size={},{}".format(*PHONE)
    address = (directory / "harness.html").as_uri()
    arguments = [CHROMIUM, *QUIET.split(), scheme, folder, window, "--dump-dom", f"--screenshot={shot}", address]
    done = subprocess.run(arguments, capture_output=True, timeout=120, cwd=directory)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]

    class Output(html.parser.HTMLParser):
        result, inside = "", False

        def handle_starttag(self, tag, attributes):
            self.inside = tag == "pre"

        def handle_data(self, data):
            self.result += data if self.inside else ""

    output = Output()
    output.feed(done.stdout.decode())
    return json.loads(output.result), matplotlib.image.imread(shot)[: PHONE[1], : PHONE[0], :3]


def luminance(color: str) -> float:
    """Of `rgb(r, g, b)`, as WCAG 2 defines it."""
    channels = [int(value) / 255 for value in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.fixture(scope="module")
def seen(nasty, run_dir, tmp_path_factory):
    """(light, dark) of the hostile run."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on PATH")
    text = page.write(nasty).read_text(encoding="utf-8")
    return [browse(tmp_path_factory.mktemp("browser"), text, dark) for dark in (False, True)]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
def test_screenshot(run_dir, tmp_path):
    import matplotlib.image

    file = tmp_path / "report.png"
    assert run_command("report", [f"--workdir={run_dir}", f"--screenshot={file}"]) == f"{run_dir / 'report.html'}\n{file}\n"
    picture = matplotlib.image.imread(file)[:, :, :3]
    assert picture.shape == (screenshot.HEIGHT, screenshot.WIDTH, 3)
    assert picture.mean() > 0.8 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 50  # light, and not blank


@pytest.mark.parametrize("dark", [False, True])
def test_browser(seen, dark):
    result, picture = seen[dark]
    assert result["wide"]["width"] > 600 and result["harm"]["title"] == "hacked"  # failures are detected
    page_results = result["page"]
    assert page_results["width"] == PHONE[0]  # nothing overflows, with all parts unfolded
    assert page_results["title"].endswith("bilevel_jax") and page_results["scripts"] == 0 and page_results["fetched"] == 0
    assert SCRIPT in page_results["text"] and "left \\u202eright" in page_results["text"]
    assert len(page_results["figures"]) == 7 and all(250 < w <= PHONE[0] and h > 100 for w, h in page_results["figures"])
    back, ink, line = (luminance(page_results[key]) for key in ("background", "ink", "line"))
    assert (back < 0.05) == dark and (back > 0.8) == (not dark)
    contrast = sorted(((a + 0.05) / (b + 0.05) for a, b in ((ink, back), (back, ink))))[-1]
    assert contrast > 7 and not math.isclose(line, back, abs_tol=0.1)
    assert picture.shape == (PHONE[1], PHONE[0], 3)
    assert (picture.mean() < 0.35) == dark and len(np.unique(picture.reshape(-1, 3), axis=0)) > 50  # not blank


# --------------------------------------------------------------------------------------------------------------------
# Words
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("learn", "unit", "shown"),
    [("all", "sample", "⟦Hey.⟧"), ("last", "sample", "Hey."), (None, "sample", "Hey."), ("all", "turn", "Hey.")],
)
def test_earlier_answers_are_marked(tmp_path, learn, unit, shown):
    """Not of row 0, which is masked: its generated response is learned alone. Runs of earlier versions have no such key."""
    turns = [("user", "Ho?"), ("assistant", "Hey."), ("user", "{}?"), ("assistant", "Yes.")]
    rows = [
        {"messages": [{"role": role, "content": content.format(i)} for role, content in turns], "bad": i < 2, "truth": "x y z"}
        for i in range(len(ROWS))
    ]
    workdir, _ = make_workdir(tmp_path / "run", rows)
    config = json.loads((workdir / "config.json").read_text())
    config["data"] = {key: value for key, value in config["data"].items() if key != "learn"} | ({"learn": learn} if learn else {})
    (workdir / "config.json").write_text(json.dumps(config))
    run = run_data.read(workdir)
    run.config.selection.unit = unit
    table = run.tables[max(run.tables)]
    of_rows = [
        cells.row_cells(run, table, list(table["id"]).index(row.id)) for row in run.rows.values() if row.line in (1, len(rows))
    ]
    questions = [cell["question"].full or cell["question"].short for cell in of_rows]
    assert questions == ["Ho?\n\nHey.\n\n0?", f"Ho?\n\n{shown}\n\n{len(rows) - 1}?"]
    assert ("between ⟦ and ⟧ are learned too" in page.write(workdir).read_text(encoding="utf-8")) == (learn == "all")


def test_words_are_tinted_by_their_weight(tmp_path):
    """Of row 1, "word end", the second word has 0.3 of 1; of row 2 all weigh the same. T/Σv²: 2/(1.7² + 0.3²) = 0.67 and 1."""
    rows = [ROWS[0], ROWS[1] | {"response": "<b> end"}, *ROWS[2:]]
    workdir, ids = make_workdir(tmp_path / "run", rows)
    assert "words" not in report(workdir).words  # this run has no token weights
    table = {"id": [ids[2], ids[1]], "weight": [[1.0, 1.0], [1.7, 0.3]], "start": [[0, 5], [0, 4]], "stop": [[4, 9], [3, 7]]}
    weight_table.write(workdir / weight_table.TOKENS, pa.table(table, schema=weight_table.TOKENS_SCHEMA))
    result = cells.token_weighted_responses(run_data.read(workdir))
    assert [row["id"] for row in result] == [ids[1], ids[2]]
    assert result[0]["pieces"] == [("<b>", 0), (" end", 3)]  # 1 - 0.3 = 0.7 of five steps
    assert result[0]["ess"] == pytest.approx(2 / (1.7**2 + 0.3**2))
    shown = report(workdir)
    assert "<b> end" in " ".join(shown.words["words"].split()) and ("span", {"class": "w3"}) in shown.elements

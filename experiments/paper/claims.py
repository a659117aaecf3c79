"""Writes the tables of the paper's claims in the README files of experiments from the JSON files of the pages.

`python -m experiments.claims`. Every entry is a claim of a page, with its difference, 95% interval and verdict, so that no number
of these tables is typed by hand.
"""

import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from absl import flags

from bilevel_jax import cli, files
from experiments import runs

FLAGS = flags.FlagValues()
ROOT = pathlib.Path("experiments")
RESULTS = ROOT / "results"
MARK = "<!-- claims: {}, written by experiments/paper/claims.py -->"
END = "<!-- end of claims -->"


class Entry(NamedTuple):
    """A claim of a page."""

    label: str  # what it is measured on or against
    page: str  # the stem of its files
    claim: str  # its text there


class Row(NamedTuple):
    """A claim of the paper, with the entries of two columns."""

    text: str
    first: Sequence[Entry]
    second: Sequence[Entry]
    remark: str


class Table(NamedTuple):
    """A table of claims."""

    file: str  # in `ROOT`
    columns: tuple[str, str]
    rows: Sequence[Row]


def _three(page: str, text: str) -> tuple[Entry, ...]:
    """The three measures of a claim of Table 3."""
    return tuple(Entry(rows, page, f"{text}: {rows}") for rows in ("trusted", "mixture", "right answers"))


def _two(page: str, text: str) -> tuple[Entry, ...]:
    """The two measures of a claim of Figure 4."""
    return tuple(Entry(name, page, f"{text}: {key}") for name, key in (("mixture", "mixture, as it is"), ("right answers",) * 2))


def _bed(text: str, entries: Sequence[Entry], remark: str = "") -> Row:
    """A claim on the test bed, of the paper's selector and of the default one."""
    return Row(text, entries, [entry._replace(claim=f"default: {entry.claim}") for entry in entries], remark)


def _figure4(text: str, label: str = "", page: str = "figure4-bed") -> list[Entry]:
    """The two measures of a claim of Figure 4 on the test bed."""
    return [Entry(f"{label}{name}", page, f"{text}: {name}") for name in ("whole mixture", "right answers")]


def _rules(page: str) -> list[Entry]:
    """The claims of Table 4 that a rule beats the other one."""
    return [
        Entry("trusted, BMO below BDS with Adam", page, "BMO below BDS, trusted"),
        Entry("mixture, BDS below BMO", page, "BDS below BMO, mixture"),
    ]


def _hard(page: str) -> tuple[list[Entry], list[Entry]]:
    """The claims of Table 8: self-refining moves to hard questions, selection prefers them."""
    label = "share of hard ones"
    moves = "online, R=10%: more hard questions on top in epoch 3 than in epoch 1"
    prefers = "offline: more hard questions on top than among all in epoch 3"
    return [Entry(label, page, moves)], [Entry(label, page, prefers)]


def _wins(page: str) -> tuple[list[Entry], list[Entry]]:
    """The claims of Table 10: of selection over mixing, of online over selection."""
    texts = "offline above mixing, ρ=0.5, win rate", "online, R=10% above offline, win rate"
    first, second = ([Entry("ties half", page, text)] for text in texts)
    return first, second


def _times(page: str) -> list[Entry]:
    """The claims of Table 2 about one response."""
    return [
        Entry("selection over mixing", page, "selection takes longer than mixing"),
        Entry("online over selection", page, "online, G=1, longer than selection"),
    ]


RATIOS = "figure4-bed-ratios"  # the panels by R, by G and of controls, with fewer seeds


BED = (
    _bed(
        "selection has a lower trusted loss than mixing (Tables 1, 3)",
        [Entry(rho, "table1-bed", f"selection below mixing, {rho}") for rho in ("ρ=0.5", "ρ=1")]
        + [Entry("ρ=0.2", "table1-bed", "control: selection below mixing, ρ=0.2")],
    ),
    _bed(
        "... because of the weights, not of the ρ-schedule (control)",
        [Entry("uniform weights", "table1-bed", "control: selection below uniform ω")],
    ),
    Row(
        "... with the paper's Adam at 1e-4 (control)",
        [Entry("uniform weights", "table1-bed", "control: the paper's Adam on ω below uniform ω")],
        [],
        "the weights hardly move",
    ),
    _bed(
        "selection lowers the loss of the mixture (Figure 4)",
        _figure4("(c) offline below mixing, ρ=0.5"),
        "most of these rows are bad or have a style that the trusted rows do not want",
    ),
    _bed(
        "online beats selection (Table 1, Figure 4)",
        [Entry("trusted", "table1-bed", "online, R=10%, below selection"), *_figure4("(a) R=10% below offline")],
    ),
    Row("more responses help: G > 1 (Figure 4 b)", _figure4("(b) G=5 below G=1", "G=5, ", RATIOS), [], ""),
    Row("R=10% is the best ratio (Figure 4 a)", _figure4("(a) R=10% below R=20%", page=RATIOS), [], "the paper prints no numbers"),
    Row(
        "dynamic beats selection (Table 3)",
        [Entry("trusted", "table3-bed", "dynamic better than selection, by loss: trusted loss")],
        [
            Entry("trusted, R=10%", "table3-bed", "default: dynamic better than selection: trusted loss"),
            Entry("R=30%", "table3-bed", "default: dynamic, R=30%, better than selection: trusted loss"),
        ],
        "",
    ),
    Row("... because responses are regenerated (control)", _figure4("(d) online below stale", page=RATIOS), [], ""),
    Row("... because of the importance ratio (control)", _figure4("(d) online below r ≡ 1", page=RATIOS), [], ""),
    Row(
        "BMO and BDS differ little (Table 4)",
        _rules("table4-bed"),
        [],
        "it depends on how far ω moves, not on the rule",
    ),
    _bed(
        "self-refining moves from easy to hard questions (Table 8)",
        _hard("table8-bed")[0],
    ),
    _bed(
        "selection prefers hard questions (Table 8)",
        _hard("table8-bed")[1],
    ),
    _bed(
        "win rate over the base model rises from mixing to selection (Table 10)",
        _wins("table10-bed")[0],
    ),
    _bed("... from selection to online (Table 10)", _wins("table10-bed")[1]),
    Row(
        "G=1 costs little time (Table 2)",
        _times("table2-default"),
        [
            Entry("selection over mixing", "table2-default", "default selection takes longer than mixing"),
            Entry("online over selection", "table2-default", "default: online, G=1, longer than selection"),
        ],
        "in units of the time of mixing; the quality task of the tiny tier, 4 seeds",
    ),
)
TINY = (
    Row(
        "selection has a lower trusted loss than mixing (Tables 1, 3)",
        [
            Entry("ρ=0.5", "table1", "selection below mixing, ρ=0.5"),
            Entry("ρ=1", "table1", "selection below mixing, ρ=1"),
            Entry("ρ=0.2, the best that was run", "table1", "control: selection below mixing, ρ=0.2"),
        ],
        [
            Entry("ρ=0.5", "table3", "selection below mixing, ρ=0.5: trusted"),
            Entry("ρ=0.1", "table3", "control: selection below mixing, ρ=0.1: trusted"),
        ],
        "Table 3 has dozens of claims, and 4 seeds are few for Holm's correction",
    ),
    Row(
        "... because of the weights, not of the ρ-schedule (control)",
        [Entry("uniform weights", "table1", "control: selection below uniform ω")],
        [Entry("uniform weights", "table3", "control: selection below uniform ω: trusted")],
        "",
    ),
    Row(
        "... with the paper's Adam at 1e-4 (control)",
        [Entry("uniform weights", "table1", "control: the paper's Adam on ω below uniform ω")],
        [Entry("uniform weights", "table3", "control: the paper's Adam on ω below uniform ω: trusted")],
        "negligible: the weights hardly move; β₂ = 0.999",
    ),
    Row(
        "selection lowers the loss of the mixture (Figure 4, Table 3)",
        _two("figure4", "(c) offline below mixing, ρ=0.5"),
        [entry for entry in _three("table3", "selection below mixing, ρ=0.5") if entry.label != "trusted"],
        "the whole mixture has bad rows, which selection does not learn",
    ),
    Row(
        "online beats selection",
        [Entry("trusted", "table1", "online, R=10%, below selection"), *_two("figure4", "(a) R=10% below offline")],
        _three("table3", "online below selection"),
        "an effect as large as the paper's is excluded where the paper has a number",
    ),
    Row(
        "more responses help: G > 1 (Figure 4 b)",
        [Entry("trusted, G=5", "table1", "G=5 below G=1"), *_two("figure4", "(b) G=5 below G=1")],
        _three("table3", "G=2 below G=1"),
        "likewise",
    ),
    Row("R=10% is the best ratio (Figure 4 a)", _two("figure4", "(a) R=10% below R=20%"), [], "the paper prints no numbers"),
    Row(
        "dynamic beats online (Table 3)",
        [],
        _three("table3", "dynamic below online"),
        "the mixture is not 15% lower, as in the paper",
    ),
    Row("dynamic beats selection (Table 3)", [], _three("table3", "dynamic below selection"), "the mixture is not 18% lower"),
    Row(
        "... because responses are regenerated (control)",
        [Entry("trusted, online", "table1", "control: online below stale answers")],
        _three("table3", "control: dynamic below stale answers"),
        "",
    ),
    Row(
        "... because of the importance ratio (control)",
        [Entry("trusted, online", "table1", "control: online below r ≡ 1")],
        _three("table3", "control: dynamic below r ≡ 1"),
        "",
    ),
    Row(
        "a negative gradient helps self-refining: DPO on the best and the worst of G=4 by likelihood (Tajwar et al., Table 3)",
        [],
        [
            Entry("right answers, all four", "table3", "a negative gradient (DPO) below learning from all G: right answers"),
            Entry("right answers, the best", "table3", "a negative gradient (DPO) below learning from the best: right answers"),
        ],
        "",
    ),
    Row(
        "BMO and BDS differ little (Table 4)",
        _rules("table4"),
        [],
        "far more than in the paper: it depends on how far ω moves, not on the rule",
    ),
    Row(
        "selection raises accuracy over mixing (Tables 5, 6)",
        [Entry(rho, "table5", f"offline above mixing, {rho}, mean accuracy") for rho in ("ρ=0.5", "ρ=1")],
        [Entry(rho, "table6", f"offline above mixing, {rho}, mean accuracy") for rho in ("ρ=0.5", "ρ=1")],
        "generated questions",
    ),
    Row(
        "... self-refining over selection",
        [Entry("online", "table5", "online, R=10% above offline, mean accuracy")],
        [Entry("dynamic", "table6", "dynamic above offline, mean accuracy")],
        "400 questions a group cannot resolve smaller differences",
    ),
    Row(
        "self-refining moves from easy to hard questions (Table 8)",
        _hard("table8")[0],
        [],
        "",
    ),
    Row(
        "selection prefers hard questions (Table 8)",
        _hard("table8")[1],
        [],
        "it prefers easy ones",
    ),
    Row(
        "win rate over the base model rises from mixing to selection (Table 10)",
        _wins("table10")[0],
        [],
        "the embedded model was trained on such tasks",
    ),
    Row("... from selection to online (Table 10)", _wins("table10")[1], [], ""),
    Row(
        "G=1 costs little time (Table 2)",
        _times("table2"),
        [],
        "in units of the time of mixing; costs less here than in the paper",
    ),
    Row("... and G=5 doubles it (Table 2)", [Entry("G=5 over G=1", "table2", "G=5 longer than G=1")], [], "costs less here"),
)
SMOLLM2 = (
    Row(
        "selection has a lower trusted loss than mixing",
        [Entry(rho, "table1-smollm2", f"selection below mixing, {rho}") for rho in ("ρ=0.5", "ρ=1")],
        [Entry("ρ=0.5", "table3-smollm2", "selection below mixing, ρ=0.5: trusted")],
        "12 steps are too few to weigh this",
    ),
    Row(
        "... because of the weights (control)",
        [Entry("uniform weights", "table1-smollm2", "control: selection below uniform ω")],
        [Entry("uniform weights", "table3-smollm2", "control: selection below uniform ω: trusted")],
        "in 12 steps the ρ-schedule is the cause",
    ),
    Row(
        "selection lowers the loss of the mixture",
        [Entry("ρ=0.5", "figure4-smollm2", "(c) offline below mixing, ρ=0.5: mixture, as it is")],
        [Entry("ρ=0.5", "table3-smollm2", "selection below mixing, ρ=0.5: mixture")],
        "the signs are those of the tiny tier",
    ),
    Row(
        "online beats selection",
        [Entry("trusted", "table1-smollm2", "online, R=10%, below selection")],
        [Entry("trusted", "table3-smollm2", "online below selection: trusted")],
        "",
    ),
    Row("dynamic beats selection", [], [Entry("trusted", "table3-smollm2", "dynamic below selection: trusted")], ""),
    Row("BMO and BDS differ little", [Entry("trusted", "table4-smollm2", "BMO below BDS, trusted")], [], "no difference was seen"),
)
TABLES = {
    "bed": Table("README.md", ("weights by the loss, as in the paper", "weights by the default"), BED),
    "tiny": Table("paper/README.md", ("quality", "safety"), TINY),
    "smollm2": Table("paper/README.md", ("quality", "safety"), SMOLLM2),
}
FILES = tuple(dict.fromkeys(table.file for table in TABLES.values()))


def entry_text(entry: Entry, folder: pathlib.Path) -> str:
    """Label, difference, interval and verdict, with a link to the page from a file in `folder`.

    Raises:
      ValueError: the page has no such claim.
    """
    claims = {claim["text"]: claim for claim in json.loads((RESULTS / f"{entry.page}.json").read_text())["claims"]}
    claim = claims.get(entry.claim)
    if claim is None or "word" not in claim:
        raise ValueError(f"{RESULTS / entry.page}.json has no verdict for {entry.claim!r}; run `python -m experiments.rejudge`")

    def signed(value: float) -> str:
        return f"{value:+.4f}".replace("-", "−")

    interval = "" if math.isnan(claim["low"]) else f" [{signed(claim['low'])}, {signed(claim['high'])}]"
    page = f"{os.path.relpath(RESULTS, folder)}/{entry.page}.md"
    label = f"{entry.label}: " if entry.label else ""
    return f"{label}{signed(claim['difference'])}{interval}, [*{claim['word']}*]({page})"


def lines(table: Table) -> list[str]:
    """A table of claims as Markdown."""

    def cell(entries: Sequence[Entry]) -> str:
        return "; ".join(entry_text(entry, (ROOT / table.file).parent) for entry in entries)

    body = [[row.text, cell(row.first), cell(row.second), row.remark] for row in table.rows]
    return runs.markdown(["claim", *table.columns, "remark"], body)


def rewritten(name: str) -> str:
    """The text of a file, one of `FILES`, with its tables of claims written again.

    Raises:
      ValueError: a mark is missing.
    """
    text = (ROOT / name).read_text()
    for table_name, table in TABLES.items():
        if table.file != name:
            continue
        mark = MARK.format(table_name)
        before, start, rest = text.partition(mark + "\n")
        _, closed, after = rest.partition(END)
        if not start or not closed:
            raise ValueError(f"the text has no {mark} with {END} after it")
        text = before + start + "\n".join(["", *lines(table), "", ""]) + closed + after
    return text


def main() -> None:
    for name in FILES:
        files.write_atomically(ROOT / name, rewritten(name))


if __name__ == "__main__":
    cli.run(main, FLAGS)

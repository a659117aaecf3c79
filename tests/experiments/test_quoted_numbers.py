"""Numbers that README.md and the README files of experiments quote against the pages and JSON files that they link to."""

import json
import pathlib
import re
import statistics

import pytest

from experiments import comparing, rejudge
from experiments.paper import claims

ROOT = pathlib.Path(__file__).parents[2]
FOLDERS = ("", "paper", "selection")
READMES = {
    str(file.relative_to(ROOT)): file
    for file in (ROOT / "README.md", *(ROOT / "experiments" / name / "README.md" for name in FOLDERS))
}
RESULTS = ROOT / "experiments" / "results"
NUMBER = re.compile(r"(?<![\w.])[-−+]?\d+\.\d+%?")
LINK = re.compile(r"\]\(((?:experiments/|\.\./)?results/[\w.-]+\.md)")
MIN_DECIMALS = 3  # numbers with fewer agree with some number of a page by chance


def value(number: str) -> float:
    return float(number.replace("−", "-").rstrip("%")) / (100 if number.endswith("%") else 1)


def decimals(number: str) -> int:
    return len(number.rstrip("%").partition(".")[2]) + (2 if number.endswith("%") else 0)


def is_precise(number: str) -> bool:
    """Whether a number would hardly agree with some number of a page by chance."""
    return decimals(number) >= MIN_DECIMALS and len(re.sub(r"\D", "", number).lstrip("0")) > 1


def agree(quoted: str, exact: float) -> bool:
    """Whether a number is the other one, rounded; signs aside, which a text may put into words."""
    return abs(abs(value(quoted)) - abs(exact)) <= 0.500001 * 10.0 ** -decimals(quoted)


def blocks(text: str) -> list[tuple[str, list[str]]]:
    """Paragraphs, points of lists and rows of tables, each with the pages that it links to.

    A row without a link has those of the paragraph above the table. Tables of claims, which are generated, are left out.
    """
    text = re.sub(r"<!-- claims.*?<!-- end of claims -->|β₂ = [\d.]+", "", text, flags=re.S)  # a setting is no result
    result: list[tuple[str, list[str]]] = []
    above: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        inherited = above if paragraph.startswith("|") else []
        for block in re.split(r"\n(?=\||- )", paragraph):
            result.append((block, LINK.findall(block) or inherited))
        above = LINK.findall(paragraph)
    return result


def quoted(text: str, folder: pathlib.Path) -> list[tuple[str, list[float]]]:
    """Every number with `MIN_DECIMALS` in a block that links to a page, with all numbers of these pages and their JSON files."""
    numbers = []
    for block, links in blocks(text):
        pages = [folder / link for link in links]
        files = [file for page in pages for file in (page, page.with_suffix(".json")) if file.exists()]
        exact = [value(number) for file in files for number in NUMBER.findall(file.read_text())]
        numbers += [(number, exact) for number in NUMBER.findall(block) if links and is_precise(number)]
    return numbers


@pytest.mark.parametrize("name", READMES)
def test_numbers_are_on_the_pages_that_are_linked(name):
    numbers = quoted(READMES[name].read_text(), READMES[name].parent)
    assert len(numbers) > 10
    assert not [number for number, exact in numbers if not any(agree(number, one) for one in exact)]


def test_a_wrong_number_is_noticed():
    text = READMES["experiments/README.md"].read_text()
    assert "trusted loss 0.0867," in text
    numbers = quoted(text.replace("trusted loss 0.0867,", "trusted loss 0.0895,"), ROOT / "experiments")
    assert [number for number, exact in numbers if not any(agree(number, one) for one in exact)] == ["0.0895"]


CELLS = {
    "mixing, ρ=1 (plain fine-tuning)": "mixing, ρ=1",
    "mixing, ρ=0.5": "mixing, ρ=0.5",
    "uniform weights, same ρ-schedule": "uniform ω, offline",
    "bilevel, Adam 1e-4 as in the paper (β₂ = 0.999)": "bds, Adam 1e-4",
    "bilevel, mirror descent: `offline`": "offline",
    "self-refining, random rows: `online`": "online, R=10%",
    "self-refining, lightest rows: `dynamic`": "dynamic",
}
KEYS = ("eval/upper_loss", "eval/lower_clean_loss", "selector/auroc", "selector/bad_kept", "selector/ess")


def test_the_table_of_the_papers_rule_is_that_of_table_3():
    """Each entry is the mean over seeds of its cell."""
    text = READMES["experiments/paper/README.md"].read_text()
    cells = json.loads((RESULTS / "table3.json").read_text())["cells"]["safety"]
    for label, cell in CELLS.items():
        [row] = [line for line in text.split("\n") if line.startswith(f"| {label} |")]
        for key, entry in zip(KEYS, (entry.strip() for entry in row.split("|")[2:-1]), strict=True):
            values = [run[key] for run in cells[cell].values() if key in run]
            assert (not entry and (not values or "mixing" in label)) or agree(entry, statistics.mean(values)), (label, key, entry)


@pytest.mark.parametrize("name", claims.FILES)
def test_tables_of_claims_are_those_of_the_pages(name):
    assert claims.rewritten(name) == (ROOT / "experiments" / name).read_text()


PAGES = sorted(page for page in RESULTS.glob("*.md") if page.with_suffix(".json").exists() and rejudge.HEAD in page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_verdicts_are_those_of_the_stored_values(page):
    """The tables of claims follow from the values of the JSON file; the rule above them is the current one."""
    record = json.loads(page.with_suffix(".json").read_text())
    results = rejudge.read_results(record)
    judged = rejudge.judge_again(page.with_suffix(".json"), record, results)
    assert rejudge.rejudged(page.read_text(), judged) == page.read_text()
    assert comparing.RULE in page.read_text()

"""The paper's tables: the paired test by hand, the contents of a page, and every table on fake runs."""

import importlib
import json
import math
import pathlib
import shutil

import numpy as np
import pytest

from bilevel_jax.data import rows
from bilevel_jax.report import run_data
from bilevel_jax.runtime import weight_table
from experiments import comparing, measures, rejudge, runs, significance, tables
from experiments.paper import accuracy, published, table5, table7, table9
from experiments.paper.tasks import generated
from experiments.selection import baselines
from tests.experiments.commands import command_line

NAMES = ("table1", "table2", "table3", "table4", "table5", "table6", "table8", "table10", "figure4", "figure5")


def results(**cells):
    """Results of one measure: the values of each cell, by seed."""
    by_cell = {
        cell: {seed: comparing.Run(pathlib.Path(), {"loss": value}) for seed, value in enumerate(values)}
        for cell, values in cells.items()
    }
    return comparing.Results("quality", by_cell, {}, [], [])


def p_value(t: float) -> float:
    """Two-sided p of Student's t with three degrees of freedom, which has a closed form."""
    x = abs(t) / math.sqrt(3)
    return 1 - 2 / math.pi * (x / (1 + x * x) + math.atan(x))


LOSS = comparing.Claim("", "a", "b", "loss")
T_3 = 3.182446305284263  # the 97.5% quantile of Student's t with three degrees of freedom, from tables


def test_paired_test_by_hand():
    [verdict] = comparing.judge(results(a=[1, 1, 1, 1], b=[2, 3, 4, 3]), [LOSS])
    # Differences -1, -2, -3, -2: mean -2, standard deviation √(2/3), t = -2 / (√(2/3) / 2).
    assert verdict.difference == -2 and verdict.spread == pytest.approx(math.sqrt(2 / 3))
    assert verdict.p == verdict.corrected == pytest.approx(p_value(2 * 2 / math.sqrt(2 / 3)), rel=1e-9) and verdict.p < 0.05
    assert (verdict.low, verdict.high) == pytest.approx((-2 - T_3 / math.sqrt(6), -2 + T_3 / math.sqrt(6)), rel=1e-9)
    assert (verdict.agreeing, verdict.seeds, verdict.word) == (4, 4, "holds")


@pytest.mark.parametrize(
    "claimed, other, higher, effect, word",
    [
        ([1, 1, 1, 1], [2, 3, 4, 3], False, None, "holds"),  # -2 ± 1.30, the half width of the interval
        ([1, 1, 1, 1], [2, 3, 4, 3], False, -3.0, "holds"),
        ([1, 1, 1, 1], [2, 3, 4, 3], False, -3.4, "holds, smaller than the paper's"),
        ([1, 1, 1, 1], [2, 3, 4, 3], True, None, "reversed"),
        ([1, 1, 1, 1], [0, 4, 4, 0], False, None, "undecided"),  # -1 ± 3.67
        ([1, 1, 1, 1], [0, 4, 4, 0], False, -4.5, "undecided"),
        ([1, 1, 1, 1], [0, 4, 4, 0], False, -4.7, "excluded"),
        ([1, 1, 1, 1], [0, 4, 4, 0], True, 2.6, "undecided"),
        ([1, 1, 1, 1], [0, 4, 4, 0], True, 2.7, "excluded"),
        ([1, 2, 3, 4], [1, 2, 3, 4], False, None, "undecided"),
        ([1, 2, 3, 4], [1, 2, 3, 4], False, -0.1, "excluded"),
        ([1], [2], False, -1.0, "untested"),
        ([1, 2], [2, 3], False, -1.0, "untested"),  # without a spread
        ([1, 2, float("nan")], [2, 4, 1], False, None, "undecided"),
    ],
)
def test_verdicts(claimed, other, higher, effect, word):
    paper = comparing.Paper({"a": {"loss": 10.0 + (effect or 0.0)}, "b": {"loss": 10.0}}, relative=False)
    assert comparing.judge(results(a=claimed, b=other), [LOSS._replace(higher=higher)], paper)[0].word == word


def test_the_table_is_corrected_by_holm():
    """Of three claims with p₁ < p₂ < p₃: 3p₁, 2p₂ and p₃. The second one's interval excludes 0, but 2p₂ > 0.05."""
    cells = results(z=[0, 0, 0, 0], a=[-1, -2, -3, -2], b=[-2, -1, -4, -2], c=[1, -1, 1, -2])
    claims = [comparing.Claim("", cell, "z", "loss") for cell in "bac"]
    paper = comparing.Paper({"z": {"loss": 1.0}, "b": {"loss": 0.0}}, relative=False)
    b, a, c = comparing.judge(cells, claims, paper)
    p = {
        "a": p_value(4 / math.sqrt(2 / 3)),
        "b": p_value(2.25 * 2 / math.sqrt(4.75 / 3)),
        "c": p_value(0.25 / math.sqrt(6.75 / 12)),
    }
    assert (
        a.corrected == pytest.approx(3 * p["a"])
        and b.corrected == pytest.approx(2 * p["b"])
        and c.corrected == pytest.approx(p["c"])
    )
    assert b.high < 0 and 0.05 < b.corrected and b.p < 0.05
    assert (a.word, b.word, c.word) == ("holds", "compatible", "undecided")


def test_effects_of_the_paper():
    """1.25 to 1.02 is 18.4% of the second cell, so 0.0184 of a loss of 0.1; nothing where the paper's sign is another."""
    paper = comparing.Paper(comparing.paper_values({"a": ("0.5", "1.02 ± 0.006"), "b": ("0.4", "1.25 ± 0.005")}, ("up", "loss")))
    assert paper.effect(LOSS, 0.1) == pytest.approx(-0.0184) and paper.effect(LOSS._replace(key="up"), 0.1) is None
    assert paper.effect(LOSS._replace(cell="c"), 0.1) is None
    of_paper = comparing.Paper({"offline": {"loss": 1.0}, "b": {"loss": 2.0}})
    assert of_paper.effect(LOSS._replace(cell="default, offline"), 0.1) == of_paper.effect(LOSS._replace(cell="offline"), 0.1) < 0
    assert paper._replace(relative=False).effect(LOSS, 0.1) == pytest.approx(-0.23)
    accuracies = table5.EFFECTS.effect(table5_claim("online, R=10%", "offline"), 0.5)
    assert accuracies == pytest.approx((0.871 + 0.812 + 0.692 + 0.703 + 0.814 - 0.863 - 0.798 - 0.689 - 0.703 - 0.804) / 5)


def table5_claim(cell, than):
    return comparing.Claim("", cell, than, "acc", higher=True)


def test_only_shared_seeds_are_compared():
    unequal = results(a=[1.0, 5.0, 2.0], b=[2.0, 7.0])
    assert comparing.judge(unequal, [LOSS])[0].difference == -1.5
    assert comparing.judge(unequal, [LOSS._replace(than="c")]) == [None]


def test_mcnemar_by_hand():
    """Of 12 items only the first model has 7 right, only the second one 1: p = 2 · (C(8,0) + C(8,1)) / 2⁸."""
    first, second = [True] * 7 + [False] + [True, False] * 2, [False] * 7 + [True] + [True, False] * 2
    assert significance.mcnemar(first, second) == (7, 1, pytest.approx(2 * (1 + 8) / 2**8))
    assert significance.mcnemar(second, first) == (1, 7, pytest.approx(2 * (1 + 8) / 2**8))
    assert significance.mcnemar(first, first) == (0, 0, 1.0)
    with pytest.raises(ValueError, match="12 with 2"):
        significance.mcnemar(first, [True, False])
    # 6 of 12 more are right; the variance of a difference in {1, 0, -1} is (8 - 6²/12) / 12.
    half = 1.959963984540054 * math.sqrt((8 - 36 / 12) / 12 / 12)
    assert significance.paired_share(first, second) == pytest.approx((0.5, 0.5 - half, 0.5 + half))


def test_the_effect_of_a_seed_is_removed():
    by_cell = comparing.without_seeds(results(a=[1.0, 11.0, 5.0], b=[3.0, 15.0]), "loss")
    # The means of seeds 0 and 1 are 2 and 13; the overall mean is 7.5.
    assert by_cell == {"a": [6.5, 5.5], "b": [8.5, 9.5]}


def test_rows_are_shown_beside_the_papers():
    lines = comparing.rows(results(a=[1.0, 2.0], b=[3.0, 3.0]), {"loss": "loss", "nowhere": "x"}, {"a": ("0.9",)}, ("Pythia",))
    assert lines == [
        "|  | paper: Pythia | loss |",
        "| --- | --- | --- |",
        "| a | 0.9 | 1.5000 ± 0.7071 |",  # of two values: |a - b| / √2
        "| b |  | 3.0000 ± 0.0000 |",
    ]


# --------------------------------------------------------------------------------------------------------------------
# All tables on fake runs, in this process
# --------------------------------------------------------------------------------------------------------------------


def fake_run(finished, cell):
    """Takes the place of `runs.run_cell`: copies a finished run. Its loss depends on the seed and is 1 lower for `offline`."""
    config = dict(argument.removeprefix("--config.").split("=", 1) for argument in cell.command[len(runs.PROGRAM) :])
    workdir, seed = pathlib.Path(cell.workdir), int(config["seed"])
    if config.get("mixing.rho") == "1.0" and seed == 1:
        return "this run fails"
    if (summary := runs.finished(cell)) is not None:
        return summary
    shutil.copytree(finished, workdir, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    summary = runs.finished(cell)
    offline = config["method"] == "offline" and "selection.rule" not in config
    summary["eval/upper_loss"] = 5.0 - offline + seed * (0.1 if offline else 0.2)
    (workdir / "summary.json").write_text(json.dumps(summary))
    return summary


def fake_command(file, module, *arguments):
    """Takes the place of `tables.once`: the second command of a table, lm-eval or `sample`, writes its file at once."""
    flags = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
    if module == "bilevel_jax.evaluate":
        accuracy = 0.75 if "offline" in str(file) else 0.5
        file.write_text(json.dumps({"results": {name: {"acc,none": accuracy} for name in flags["tasks"].split(",")}}))
    else:
        prompts, _ = rows.read_rows(flags["prompts"])
        adapted = "adapter" in flags
        answers = [{"id": row.id, "text": row.response if adapted or i < 2 else "?"} for i, row in enumerate(prompts)]
        file.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    return file


@pytest.fixture(scope="module")
def write_tables(finished):
    """`f(names, runs, out, *flags) -> errors by name`: runs the commands of these tables on two seeds."""

    def write(names, workdir, out, *more) -> dict[str, str]:
        errors = {}
        for name in names:
            module = importlib.import_module(f"experiments.{name}")
            arguments = ["--seeds=2", f"--workdir={workdir}", f"--out={out / name}.md", *more]
            with command_line(name, arguments, tables.FLAGS, *([module.FLAGS] if hasattr(module, "FLAGS") else [])):
                try:
                    module.main()
                except ValueError as error:
                    errors[name] = str(error)
        return errors

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "POLL", 0.01)
        patch.setattr(runs, "run_cell", lambda cell, stop: fake_run(finished, cell))
        patch.setattr(tables, "once", fake_command)
        yield write


@pytest.fixture(scope="module")
def written(write_tables, tmp_path_factory):
    """(directory of the pages, errors by name) of all tables."""
    directory = tmp_path_factory.mktemp("tables")
    return directory, write_tables(NAMES, directory / "runs", directory)


@pytest.mark.parametrize("name", NAMES)
def test_every_table_has_its_cells_claims_and_commands(written, name):
    directory, _ = written
    page, record = (directory / f"{name}.md").read_text(), json.loads((directory / f"{name}.json").read_text())
    assert f"python -m experiments.{name}" in page and "commit" in page and "jax " in page
    if name == "table8":  # these rows have no difficulty; only the examples are shown
        assert page.count("- offline, top, epoch ") == 2 and page.count("\n  - ") > 8
    else:
        assert "not measured" not in page
        assert (directory / f"{name}.svg").read_text().count("<path") > 10 and f"]({name}.svg)" in page
    for text in {"figure4": ("R=5%", "(b) answers G", ">epoch<"), "figure5": ("heaviest tenth", ">epoch<")}.get(name, ()):
        assert text in (directory / f"{name}.svg").read_text()
    for task, by_cell in record["cells"].items():
        for cell in by_cell:
            assert f"# {cell}\n" in page and (name == "table8" or f"| {cell} | " in page)
        controls = set(by_cell) & (set(published.CONTROLS) | set(published.SELECTORS))
        assert name == "table2" or any("uniform" in cell or "Adam" in cell for cell in controls), task


def test_the_test_bed_has_the_default_selector_beside_the_papers(write_tables, tmp_path):
    """Both tasks share the runs. Claims of the paper's cells are made of the default's too, where both cells have one."""
    write_tables(["table1", "figure4", "figure5"], tmp_path / "runs", tmp_path, "--tier=bed")
    assert [path.name for path in (tmp_path / "runs" / "bed").iterdir()] == ["safety"]
    claims = json.loads((tmp_path / "table1.json").read_text())["claims"]
    by_cells = {(claim["cell"], claim["than"]): claim["text"] for claim in claims}
    assert len(by_cells) == len(claims)
    assert by_cells["default, offline", "mixing, ρ=1"] == "default: selection below mixing, ρ=1"
    assert by_cells["default, online, R=10%", "default, offline"] == "default: online, R=10%, below selection"
    assert not {("online, R=5%", "default, offline"), ("default, online, R=10%", "online, stale")} & set(by_cells)
    assert "online, default" in (tmp_path / "figure4.svg").read_text()
    assert "safety: default, dynamic, R=10%" in (tmp_path / "figure5.svg").read_text()
    assert "default, online, R=10%: heaviest answers longer than all" in (tmp_path / "figure5.md").read_text()


def test_claims_failures_and_further_measures(written):
    directory, errors = written
    table4 = json.loads((directory / "table4.json").read_text())
    [claim] = [claim for claim in table4["claims"] if claim["text"] == "control: offline below uniform ω, trusted"]
    assert claim["difference"] == pytest.approx(-1.05) and claim["agreeing"] == claim["seeds"] == 2  # -1 and -1.1
    assert "mixing, ρ=1, seed 1: this run fails" in (directory / "table1.md").read_text()
    assert errors["table1"] == "1 runs failed" and "table4" not in errors
    assert "| offline | 0.863 |" in (directory / "table5.md").read_text()
    accuracy = json.loads((directory / "table5.json").read_text())["cells"]["quality"]
    assert accuracy["offline"]["0"]["acc"] == 0.75 and accuracy["online, R=10%"]["0"]["acc"] == 0.5
    rate = json.loads((directory / "table10.json").read_text())["cells"]["quality"]["offline"]["0"]
    # The trained model gives only right answers, the base model two of them: two ties, all others are wins.
    assert rate["right"] == 1 and rate["right_base"] < 1
    assert rate["decided"] == 1 and rate["win_rate"] == pytest.approx(1 - rate["right_base"] / 2)


def test_pages_are_judged_again(written, tmp_path):
    """From the JSON file alone: the same table of claims, also where the page had another one; the rest of the page stays."""
    directory, _ = written
    for name in ("table4", "figure5"):
        for suffix in (".md", ".json"):
            shutil.copy(directory / (name + suffix), tmp_path)
        page = tmp_path / f"{name}.md"
        text = page.read_text()
        of_claims = [line for line in text.split("\n") if line.startswith("| ") and line.endswith((" holds |", " undecided |"))]
        assert of_claims
        page.write_text(text.replace(" undecided |", " not shown |").replace(" holds |", " shown |"))
        assert rejudge.rejudge(tmp_path / f"{name}.json")
        assert page.read_text().replace(f" {rejudge.NOTE}", "") == text
    with pytest.raises(ValueError, match="has 2 tables of claims, its JSON file 1"):
        rejudge.rejudged(text, [["| claim |"]])


def test_answers_side_by_side(write_tables, tmp_path):
    assert not write_tables(["table7"], tmp_path / "runs", tmp_path)
    page = (tmp_path / "table7.md").read_text()
    assert page.count("**Human:** ") >= table7.EXAMPLES and "- *base model* [wrong]: ?" in page and "- *offline* [right]: " in page
    record = json.loads((tmp_path / "table7.json").read_text())["cells"]["quality"]
    assert record["online, R=10%"]["0"]["right"] == 1 > record["online, R=10%"]["0"]["right_base"]


def test_examples_are_drawn_from_all_and_from_those_that_differ():
    answers = {"base": ["a", "b", "c ", "d", "e", "f"], "tuned": ["a", "b", "c", "x", "y", "f"]}
    drawn, differing = table7.choose(answers, 2)
    assert len(set(drawn)) == 2 and set(differing) == {3, 4} - set(drawn)


def test_lengths_by_difficulty(tmp_path, monkeypatch):
    """Mean words of the data and of the last generated responses, by the field `difficulty`."""
    texts = {"easy": ["a b", "a b c d"], "hard": ["a b c d e f"]}
    given = {}
    for level, responses in texts.items():
        for i, text in enumerate(responses):
            given[f"{level}{i}"] = rows.Row(f"{level}{i}", "", (("user", f"{i}?"),), text, None, "", {"difficulty": level}, i, "")
    responses = [{"id": "easy1", "text": "an early one"}, {"id": "easy1", "text": "a late one indeed"}]
    table = {1: {"id": np.array(list(given))}}
    data = run_data.RunData("", None, {}, [], table, responses, rows={}, labels=np.zeros(3), words=np.zeros(3), notice="")
    monkeypatch.setattr(table9.run_data, "read", lambda workdir: data)
    monkeypatch.setattr(table9.measures, "rows_of", lambda workdir: given)
    run = comparing.Run(tmp_path, {})
    levels, generated = table9.measure(run)
    assert run.values == {"words, data, easy": 3, "words, data, hard": 6, "words, generated, easy": 4}
    lines = table9.examples(levels, generated)
    assert lines == ["- **easy**: 1?", "  - *data*: a b c d", "  - *generated*: a late one indeed"]
    with pytest.raises(ValueError, match="no row has a field difficulty"):
        table9.by_level([rows.Row("x", "", (), "", None, "", {}, 0, "")])


def test_accuracies_of_finished_runs(finished, tmp_path, monkeypatch):
    """Two models on 12 items of each benchmark, one of them right in 6 more: pooled, 5 times the counts of one benchmark."""
    right = {"base": [0] * 12, "mixing": [0] * 7 + [1] + [1, 0] * 2, "offline": [1] * 7 + [0] + [1, 0] * 2}

    def once(file, module, *arguments):
        name = "base" if any("--model=" in argument for argument in arguments) else file.parent.name
        samples = [{"doc_id": i, "acc": float(acc)} for i, acc in enumerate(right[name])]
        file.write_text(json.dumps({"samples": {task: samples[::-1] for task in accuracy.TASKS}}))
        return file

    monkeypatch.setattr(tables, "once", once)
    monkeypatch.setattr(accuracy, "read_finished", lambda workdir, read=accuracy.read_finished: read(finished))
    for name in ("mixing", "offline"):
        (tmp_path / name).mkdir()
    arguments = [f"--run=mixing={tmp_path}/mixing", f"--run=offline={tmp_path}/offline", f"--out={tmp_path}/page.md"]
    with command_line("accuracy", arguments, accuracy.FLAGS):
        accuracy.main()
    page = (tmp_path / "page.md").read_text()
    assert "| offline | 0.863 | 0.798 | 0.689 | 0.703 | 0.804 | 0.750 |" in page  # the paper's cell of this name, then 9 of 12
    record = json.loads((tmp_path / "page.json").read_text())
    pooled = next(t for t in record["tests"] if (t["first"], t["second"], t["benchmark"]) == ("offline", "mixing", "all"))
    assert (pooled["test"]["only_first"], pooled["test"]["only_second"]) == (35, 5)
    assert pooled["test"]["p"] == pytest.approx(2 * sum(math.comb(40, k) for k in range(6)) / 2**40)
    for flags_given, message in ((arguments[:1], "two runs or more"), (["--run=x"], "must be NAME=WORKDIR")):
        with command_line("accuracy", flags_given, accuracy.FLAGS), pytest.raises(ValueError, match=message):
            accuracy.main()


def test_bad_rows_with_a_certain_label_are_ranked_separately(tmp_path, monkeypatch):
    """Weights 4, 3, 2, 1: the one certain row against the other three, of which two weigh more."""
    tiers = "", "B", "H", ""
    given = [rows.Row(str(i), "", (), "", None, "", {"unsafe_tier": tier}, i, "") for i, tier in enumerate(tiers)]
    monkeypatch.setattr(measures.streaming, "reopen", lambda config: given)
    monkeypatch.setattr(measures, "read_config", lambda workdir: None)
    nothing = np.zeros(4)
    weight_table.write(
        tmp_path / "weights" / "epoch_1.parquet", weight_table.table(given, np.log([4.0, 3, 2, 1]), nothing, nothing)
    )
    selects, frozen = (comparing.Run(tmp_path, values) for values in ({"selector/auroc": 0.5}, {}))
    measures.add_certain_auroc(comparing.Results("safety", {"offline": {0: selects}, "uniform": {0: frozen}}, {}, [], []))
    assert selects.values == {"selector/auroc": 0.5, "selector/auroc_strict": pytest.approx(2 / 3)} and not frozen.values


def test_cells_are_left_out(written, write_tables, tmp_path):
    directory, _ = written
    names = "figure4", "figure5", "table8", "table3"
    left_out = "--leave_out=offline", "--leave_out=mixing, ρ=1", "--leave_out=ofline"
    errors = write_tables(names, directory / "runs", tmp_path, *left_out)
    assert errors.keys() == set(names) and not list(tmp_path.iterdir())
    assert all(error.startswith("--leave_out='ofline' is no cell; those are mixing, ρ=1; ") for error in errors.values())
    assert not write_tables(names, directory / "runs", tmp_path, *left_out[:2])
    for name in names:
        page, record = (tmp_path / f"{name}.md").read_text(), json.loads((tmp_path / f"{name}.json").read_text())
        assert "**Reduced**: without offline; mixing, ρ=1." in page and (name == "figure5" or "not measured" not in page)
        for by_cell in record["cells"].values():
            assert by_cell and not {"offline", "mixing, ρ=1"} & by_cell.keys()


def test_rankings_of_the_baselines(write_tables, tmp_path):
    errors = write_tables(["baselines"], tmp_path / "runs", tmp_path, "--ranking_only", "--leave_out=features")
    assert errors == {"baselines": "1 runs failed"}  # seed 1 of mixing, ρ=1: only seed 0 is ranked
    page = (tmp_path / "baselines.md").read_text()
    assert "python -m experiments.baselines" in page
    for name in set(baselines.SELECTORS) - {"bilevel, features"} | set(baselines.BASELINES):
        assert page.count(f"\n| {name} | ") >= 1
    rankings = sorted(file.stem for file in (tmp_path / "runs" / "tiny" / "safety" / "rankings_0").iterdir())
    assert len(rankings) == len(baselines.SELECTORS) - 1 + len(baselines.BASELINES) + 2


def test_generated_choices():
    for group in ("easy", "medium", "hard", "safety"):
        docs = generated.load(group)["validation"]
        assert len(docs) == len(set(docs["question"])) == generated.ITEMS
        assert 0.4 < sum(docs["label"]) / len(docs) < 0.6
        assert all(len(set(choices)) == 2 for choices in docs["choices"])
    refused = [doc for doc in docs if any("I cannot help" in choice for choice in doc["choices"])]
    assert refused and all("I cannot help" in doc["choices"][doc["label"]] for doc in refused)

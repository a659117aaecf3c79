"""The paper's tables: the paired test by hand, what a page says, and every table on runs that cost nothing."""

import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from bilevel_jax.data import rows
from bilevel_jax.runtime import weight_table
from experiments import comparing, measures
from experiments.paper import published
from experiments.paper.tasks import generated
from tests.experiments.test_sweep import ROOT

# Stands for the training command: a finished run is copied, and its loss is 1 less for `offline`, and depends on the seed.
FAKE = """
import json, pathlib, shutil, sys
flags = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:])
workdir = pathlib.Path(flags["workdir"])
if "mixing.rho=1.0" in " ".join(sys.argv) and flags["config.seed"] == "1":
    sys.exit("error: told to fail")
shutil.copytree(FINISHED, workdir)
summary = json.loads((workdir / "summary.json").read_text())
offline = flags["config.method"] == "offline" and "config.selection.rule" not in flags
summary["eval/upper_loss"] = 5.0 - offline + int(flags["config.seed"]) * (0.1 if offline else 0.2)
(workdir / "summary.json").write_text(json.dumps(summary))
"""

# All tables in one process: the second command of every table, lm-eval and `sample`, is answered at once.
ALL = """
import importlib, json, pathlib, sys
from absl import flags
from bilevel_jax.data import rows
from experiments import cells, tables, zero_shot
root, fake, out, *more = pathlib.Path(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[4]), *sys.argv[5:]
cells.PROGRAM = (sys.executable, "-S", fake)

def once(file, module, *arguments):
    given = dict(one.removeprefix("--").split("=", 1) for one in arguments)
    if module == "bilevel_jax.evaluate":
        accuracy = 0.75 if "offline" in str(file) else 0.5
        file.write_text(json.dumps({"results": {name: {"acc,none": accuracy} for name in given["tasks"].split(",")}}))
    else:
        asked, _ = rows.read_rows(given["prompts"])
        right = "adapter" in given
        told = [{"id": row.id, "text": row.response if right or i < 2 else "?"} for i, row in enumerate(asked)]
        file.write_text("".join(json.dumps(one) + "\\n" for one in told))
    return file

tables.once = once
modules = {name: importlib.import_module(f"experiments.{name}") for name in sys.argv[3].split(",")}
flags.FLAGS(["all", *more])
for name, module in modules.items():
    flags.FLAGS([name, "--seeds=2", f"--workdir={root / 'runs'}", f"--out={out / name}.md"])
    try:
        module.main()
    except ValueError as error:
        print(name, "failed:", error, file=sys.stderr)
"""
NAMES = ("table1", "table2", "table3", "table4", "table5", "table6", "table8", "table10", "figure4", "figure5")


def results(**cells):
    """Of each cell the values of one measure, by seed."""
    runs = {
        cell: {seed: comparing.Run(pathlib.Path(), {"loss": value}) for seed, value in enumerate(values)}
        for cell, values in cells.items()
    }
    return comparing.Results("quality", runs, {}, [], [])


def p_of_three(t: float) -> float:
    """Two-sided p of Student's t with three degrees of freedom, whose distribution has a closed form."""
    x = abs(t) / math.sqrt(3)
    return 1 - 2 / math.pi * (x / (1 + x * x) + math.atan(x))


def test_paired_test_by_hand():
    found = comparing.paired_test(results(a=[1, 1, 1, 1], b=[2, 3, 4, 3]), comparing.Claim("", "a", "b", "loss"))
    # Differences -1, -2, -3, -2: mean -2, standard deviation √(2/3), t = -2 / (√(2/3) / 2).
    assert found.difference == -2 and found.spread == pytest.approx(math.sqrt(2 / 3))
    assert found.p == pytest.approx(p_of_three(2 * 2 / math.sqrt(2 / 3)), rel=1e-9) and found.p < 0.05
    assert (found.agreeing, found.seeds, found.word) == (4, 4, "holds")


@pytest.mark.parametrize(
    "mine, theirs, higher, word",
    [
        ([1, 1, 1, 1], [2, 3, 4, 3], False, "holds"),
        ([1, 1, 1, 1], [2, 3, 4, 3], True, "reversed"),
        ([1, 1, 1, 1], [0.5, 4, 4, 2], False, "weakly"),  # -1.625 ± 1.702, t = -1.91
        ([1, 1, 1, 1], [0.5, 4, 4, 2], True, "not shown"),
        ([1, 1, 1, 1], [0, 4, 4, 0], False, "not shown"),  # -1 ± 2.31, t = -0.87
        ([1, 2, 3, 4], [1, 2, 3, 4], False, "not shown"),
        ([1], [2], False, "untested"),
        ([1, 2, float("nan")], [2, 4, 1], False, "not shown"),
    ],
)
def test_verdicts(mine, theirs, higher, word):
    found = comparing.paired_test(results(a=mine, b=theirs), comparing.Claim("", "a", "b", "loss", higher))
    assert found.word == word
    if word == "weakly":
        assert 0.05 < found.p == pytest.approx(p_of_three(1.625 * 2 / 1.7017148), rel=1e-5)


def test_only_seeds_that_both_have_are_compared():
    found = results(a=[1.0, 5.0, 2.0], b=[2.0, 7.0])
    assert comparing.paired_test(found, comparing.Claim("", "a", "b", "loss")).difference == -1.5
    assert comparing.paired_test(found, comparing.Claim("", "a", "c", "loss")) is None


def test_what_a_seed_adds_to_all_cells_is_taken_off():
    found = comparing.without_seeds(results(a=[1.0, 11.0, 5.0], b=[3.0, 15.0]), "loss")
    # Seeds 0 and 1 add 2 and 13, 7.5 in the mean.
    assert found == {"a": [6.5, 5.5], "b": [8.5, 9.5]}


def test_rows_stand_beside_the_papers():
    lines = comparing.rows(results(a=[1.0, 2.0], b=[3.0, 3.0]), {"loss": "loss", "nowhere": "x"}, {"a": ("0.9",)}, ("Pythia",))
    assert lines == [
        "|  | paper: Pythia | loss |",
        "| --- | --- | --- |",
        "| a | 0.9 | 1.5000 ± 0.7071 |",  # of two values: |a - b| / √2
        "| b |  | 3.0000 ± 0.0000 |",
    ]


@pytest.fixture(scope="module")
def written(finished, tmp_path_factory):
    """(directory of the pages, what was said) of all tables on two seeds."""
    root = tmp_path_factory.mktemp("tables")
    fake = root / "fake.py"
    fake.write_text(FAKE.replace("FINISHED", repr(str(finished))))
    done = subprocess.run(
        [sys.executable, "-c", ALL, root, fake, ",".join(NAMES), root], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return root, done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_every_table_has_its_cells_claims_and_commands(written, name):
    root, _ = written
    page, record = (root / f"{name}.md").read_text(), json.loads((root / f"{name}.json").read_text())
    assert f"python -m experiments.{name}" in page and "commit" in page and "jax " in page
    if name == "table8":  # these rows carry no difficulty; the examples remain
        assert page.count("- offline, top, epoch ") == 2 and page.count("\n  - ") > 8
    else:
        assert "not measured" not in page
        assert (root / f"{name}.svg").read_text().count("<path") > 10 and f"]({name}.svg)" in page
    for said in {"figure4": ("R=5%", "(b) answers G", ">epoch<"), "figure5": ("heaviest tenth", ">epoch<")}.get(name, ()):
        assert said in (root / f"{name}.svg").read_text()
    for task, of_task in record["cells"].items():
        for cell in of_task:
            assert f"# {cell}\n" in page and (name == "table8" or f"| {cell} | " in page)
        controls = set(of_task) & (set(published.CONTROLS) | set(published.SELECTORS))
        assert name == "table2" or any("uniform" in cell or "Adam" in cell for cell in controls), task


def test_what_the_claims_of_a_table_come_to(written):
    root, said = written
    table = json.loads((root / "table4.json").read_text())
    [claim] = [one for one in table["claims"] if one["text"] == "control: offline below uniform ω, trusted"]
    assert claim["difference"] == pytest.approx(-1.05) and claim["agreeing"] == claim["seeds"] == 2  # -1 and -1.1
    failed = (root / "table1.md").read_text()
    assert "mixing, ρ=1, seed 1: told to fail" in failed and "table1 failed: 1 runs failed" in said
    assert "table4 failed" not in said
    assert "| offline | 0.863 |" in (root / "table5.md").read_text()
    accuracy = json.loads((root / "table5.json").read_text())["cells"]["quality"]
    assert accuracy["offline"]["0"]["acc"] == 0.75 and accuracy["online, R=10%"]["0"]["acc"] == 0.5
    rate = json.loads((root / "table10.json").read_text())["cells"]["quality"]["offline"]["0"]
    # All answers of the model are right, the first two of the base are: two ties, the rest is won.
    assert rate["right"] == 1 and rate["right_base"] < 1
    assert rate["decided"] == 1 and rate["win_rate"] == pytest.approx(1 - rate["right_base"] / 2)


def test_bad_rows_with_a_sure_label_have_a_ranking_of_their_own(tmp_path, monkeypatch):
    """Weights 4, 3, 2, 1: of the sure row against the other three, and 2 of 3 weigh more."""
    tiers = "", "B", "H", ""
    given = [rows.Row(str(i), "", (), "", None, "", {"unsafe_tier": tier}, i, "") for i, tier in enumerate(tiers)]
    monkeypatch.setattr(measures.levels, "reopen", lambda config: given)
    monkeypatch.setattr(measures, "read_config", lambda workdir: None)
    nothing = np.zeros(4)
    weight_table.write(
        tmp_path / "weights" / "epoch_1.parquet", weight_table.table(given, np.log([4.0, 3, 2, 1]), nothing, nothing)
    )
    selects, frozen = (comparing.Run(tmp_path, values) for values in ({"selector/auroc": 0.5}, {}))
    measures.sure_labels(comparing.Results("safety", {"offline": {0: selects}, "uniform": {0: frozen}}, {}, [], []))
    assert selects.values == {"selector/auroc": 0.5, "selector/auroc_strict": pytest.approx(2 / 3)} and not frozen.values


def test_cells_are_left_out(written, tmp_path):
    root, _ = written
    left_out = "--leave_out=offline", "--leave_out=mixing, ρ=1", "--leave_out=ofline"
    script = [sys.executable, "-c", ALL, root, root / "fake.py", "figure4,figure5,table8,table3", tmp_path]
    refused = subprocess.run([*script, *left_out], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert refused.stderr.count("--leave_out='ofline' is no cell; those are mixing, ρ=1; ") == 4 and not list(tmp_path.iterdir())
    done = subprocess.run([*script, *left_out[:2]], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert "failed" not in done.stderr and done.returncode == 0, done.stderr
    for name in ("figure4", "figure5", "table8", "table3"):
        page, record = (tmp_path / f"{name}.md").read_text(), json.loads((tmp_path / f"{name}.json").read_text())
        assert "**Reduced**: without offline; mixing, ρ=1." in page and (name == "figure5" or "not measured" not in page)
        for of_task in record["cells"].values():
            assert of_task and not {"offline", "mixing, ρ=1"} & of_task.keys()


def test_generated_choices():
    for group in ("easy", "medium", "hard", "safety"):
        docs = generated.load(group)["validation"]
        assert len(docs) == len(set(docs["question"])) == generated.ITEMS
        assert 0.4 < sum(docs["label"]) / len(docs) < 0.6
        assert all(len(set(choices)) == 2 for choices in docs["choices"])
    refused = [doc for doc in docs if any("I cannot help" in choice for choice in doc["choices"])]
    assert refused and all("I cannot help" in doc["choices"][doc["label"]] for doc in refused)

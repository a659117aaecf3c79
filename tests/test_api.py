"""The Python interface: `select`, `Run`, `score`, `sample`, in one process, with rows in memory."""

import functools
import inspect
import json
import pathlib
import re
import shutil
import subprocess
import sys

import datasets
import numpy as np
import pandas
import pyarrow.parquet
import pytest

import bilevel_jax as bj
from bilevel_jax import config as configuration
from bilevel_jax import inputs, train
from bilevel_jax.config import ConfigError
from bilevel_jax.data import in_memory, streaming
from bilevel_jax.data.rows import DataError, iter_rows, read_rows
from bilevel_jax.errors import RunError
from bilevel_jax.runtime import weight_table
from tests.conftest import load, make_rows, read_jsonl, run_command, token_log_probs, write_jsonl

ROOT = pathlib.Path(__file__).parents[1]
SMALL = {
    "num_epochs": 1,
    "data": {"max_length": 96},
    "lora": {"rank": 2, "alpha": 4.0},
    "batch.size": 4,
    "log.tensorboard": False,
    "selection": {"cost": "loss", "coefficient_at": "current"},
}
UPPER, LOWER = make_rows(13, seed=1), make_rows(25, seed=2, bad_every=4)


@pytest.fixture(scope="module")
def arguments(neox, tmp_path_factory):
    """Of `select`."""
    lower = [row | {"tags": ["a", "b"], "score": np.float32(0.5)} for row in LOWER]
    lower[3] = {"question": "no response"}  # cannot be used
    return {"upper": UPPER, "lower": lower, "model": neox, "workdir": tmp_path_factory.mktemp("api") / "run"} | SMALL


@pytest.fixture(scope="module")
def run(arguments):
    return bj.select(**arguments)


@pytest.fixture
def no_training(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("this trains")

    monkeypatch.setattr(train, "run", refuse)


# --------------------------------------------------------------------------------------------------------------------
# A run
# --------------------------------------------------------------------------------------------------------------------


def test_weights_are_in_the_order_of_the_input(run, arguments):
    weights = run.weights
    (file,) = (run.workdir / "weights").glob("*.parquet")
    stored = pyarrow.parquet.read_table(file).to_pandas()
    assert weights["id"].tolist() == stored["id"].tolist() and weights["weight"].tolist() == stored["weight"].tolist()
    assert list(weights.index) == sorted(weights.index) and 3 not in weights.index
    for row, question, response in zip(weights.index, weights["question"], weights["response"]):
        assert (question, response) == (arguments["lower"][row]["question"], arguments["lower"][row]["response"])
    assert len(weights) == 24 - 2  # 24 usable rows, of which 10% are held out
    assert weights["weight"].mean() == pytest.approx(1)


def write_weights(workdir, lower, changes=()):
    """A run with weights of all rows, the texts of its lower files, by name, and a table of their weights in reverse order."""
    for name, text in lower.items():
        (workdir / name).write_text(text)
    config = configuration.default()
    config.update_from_flattened_dict({"data.lower": ",".join(str(workdir / name) for name in lower)} | dict(changes))
    (workdir / "config.json").write_text(config.to_json())
    given = list(streaming.reopen(config))[::-1]
    weight_table.write(workdir / "weights" / "epoch_1.parquet", weight_table.table(given, *np.zeros((3, len(given)))))
    return bj.Run(workdir)


JSONL = '\n{"question": "a", "response": "A"}\n\n[]\n{"question": "b", "response": "B"}\nbad\n{"question": "c", "response": "C"}\n'
CSV = 'question,response\n"a","A\nA"\n\n"b",""\n"b","B"\n"c","C"\n'
TALK = json.dumps({"messages": [{"role": role, "content": role} for role in ["user", "assistant"] * 2]}) + "\n"


@pytest.mark.parametrize(
    ("lower", "changes", "positions"),
    [
        ({"a.jsonl": JSONL}, {}, {0: "a", 2: "b", 4: "c"}),
        ({"a.csv": CSV}, {}, {0: "a", 2: "b", 3: "c"}),
        ({"a.csv": CSV, "b.jsonl": JSONL.replace("C", "CC")}, {}, {0: "a", 2: "b", 3: "c", 4: "a", 6: "b", 8: "c"}),
        ({"a.jsonl": JSONL * 40}, {"data.num_lower": 60}, {i: "abc"[i % 5 // 2] for i in range(200) if i % 5 in (0, 2, 4)}),
    ],
    ids=["jsonl", "csv", "several files", "a random subset"],
)
def test_the_index_of_weights_is_the_position(tmp_path, lower, changes, positions):
    """From 0, among the rows of all files; blank lines and the header are no rows, and those that cannot be used are."""
    weights = write_weights(tmp_path, lower, changes).weights
    assert weights.index.is_unique and len(weights) == (changes.get("data.num_lower") or len(positions))
    assert set(zip(weights.index, weights["question"])) <= positions.items()


def test_answers_of_a_conversation_have_its_position(tmp_path):
    """So the snippet of docs/python.md gives each conversation the mean weight of its answers."""
    run = write_weights(tmp_path, {"a.jsonl": JSONL.splitlines()[1] + "\n" + TALK + TALK}, {"selection.unit": "turn"})
    assert sorted(run.weights.index) == [0, 1, 1, 2, 2]
    (snippet,) = re.findall(r"^weights = .*$", (ROOT / "docs" / "python.md").read_text(), flags=re.M)
    names: dict = {"run": run, "mixture": range(5)}
    exec(snippet, names)
    assert names["weights"].tolist() == [1, 1, 1, 0, 0]


def test_kept_rows_are_the_heaviest_and_those_of_the_command(run, arguments, tmp_path):
    kept = run.kept(0.5)
    assert isinstance(kept, datasets.Dataset)
    assert sorted(kept["question"]) == sorted(run.weights.nlargest(11, "weight")["question"])
    assert [row["question"] for row in arguments["lower"] if row["question"] in set(kept["question"])] == kept["question"]
    assert kept[0]["tags"] == ["a", "b"] and kept[0]["score"] == 0.5
    run_command("export", [f"--workdir={run.workdir}", "--keep=0.5", f"--selected={tmp_path / 'kept.jsonl'}"])
    assert kept.to_list() == read_jsonl(tmp_path / "kept.jsonl")


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"share": 0}, "share=0 must be in"),
        ({"share": 1.1}, "share=1.1"),
        ({"share": "0.8"}, "share='0.8' is not a number"),
        ({"drop_implausible": 1.0}, "drop_implausible=1.0"),
        ({"format": "csv"}, "format='csv' is not among auto"),
    ],
)
def test_kept_refuses(run, options, reason):
    with pytest.raises(ValueError, match=reason):
        run.kept(**options)


def test_refined_needs_responses(run):
    with pytest.raises(FileNotFoundError, match="generates nothing, so refined has no"):
        run.kept(refined=True)


def test_fields_of_several_types_are_refused(run, arguments, tmp_path):
    changed = [row | {"score": "high" if i % 2 else 1} for i, row in enumerate(arguments["lower"])]  # the ids stay
    data = run.workdir / "inputs" / "lower.jsonl"
    before = data.read_bytes()
    write_jsonl(data, changed)
    with pytest.raises(ValueError, match=r"a field has values that a Dataset cannot hold \("):
        run.kept()
    write_jsonl(data, [row | {"hash": 2**70, "score": 1} for row in changed])
    with pytest.raises(ValueError, match=r"a field has values that a Dataset cannot hold \("):
        run.kept()
    data.write_bytes(before)


def test_summary_adapter_config_and_report(run, neox):
    assert run.summary == json.loads((run.workdir / "summary.json").read_text())
    assert {file.name for file in run.adapter_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert run.config.lora.rank == 2 and run.config.optimizer.learning_rate == 2e-4 and run.config.model.path == str(neox)
    report = run.report()
    page = report._repr_html_()
    assert page.startswith("<iframe srcdoc=") and "&lt;html" in page and "<html" not in page
    assert report.path == run.workdir / "report.html" and "held-out loss" in str(run)


def test_a_finished_run_is_returned_as_it_is(run, arguments, no_training):
    assert bj.select(**arguments).summary == run.summary
    assert bj.Run(run.workdir).weights.equals(run.weights)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"upper": UPPER[:-1]}, "other upper rows; give another workdir, or overwrite=True"),
        ({"lower": LOWER}, "other lower rows"),
        ({"seed": 1}, "seed: 0 there, 1 now"),
    ],
)
def test_another_run_is_not_returned(run, arguments, no_training, changes, reason):
    with pytest.raises(RunError, match=reason) as caught:
        bj.select(**arguments | changes)
    assert "--" not in str(caught.value)
    assert len(run.weights) == 22  # nothing of it has changed


def test_overwrite(run, arguments, monkeypatch, tmp_path):
    """A new run starts in an empty directory; what is no run is not removed."""
    copy = tmp_path / "copy"
    shutil.copytree(run.workdir, copy)

    def check(config, workdir):
        assert [file.name for file in workdir.iterdir()] == ["inputs"] and len(read_jsonl(workdir / "inputs" / "upper.jsonl")) == 12
        (workdir / "config.json").write_text(config.to_json())

    monkeypatch.setattr(train, "run", check)
    bj.select(**arguments | {"upper": UPPER[:-1], "workdir": copy}, overwrite=True)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    for other in (tmp_path, tmp_path / "model"):
        with pytest.raises(RunError, match="holds no run; overwrite=True removes runs only"):
            bj.select(**arguments | {"workdir": other}, overwrite=True)
    assert copy.exists() and (tmp_path / "model" / "config.json").exists()


def test_overwriting_keeps_the_inputs_of_the_new_run(arguments, tmp_path, no_training):
    run = tmp_path / "run"
    (run / "inputs").mkdir(parents=True)
    (run / "inputs" / "digests.json").write_text("{}")
    kept = run / "kept.jsonl"
    kept.write_text("".join(json.dumps(row) + "\n" for row in UPPER))
    for change, name in (({"upper": str(kept)}, "upper"), ({"selection": {"init": str(kept)}}, "selection.init")):
        with pytest.raises(RunError, match=f"^overwrite=True would remove .*kept.jsonl, which {name} names"):
            bj.select(**arguments | change | {"workdir": run}, overwrite=True)
    assert kept.exists()


def test_what_is_not_of_a_run_stays(arguments, tmp_path, monkeypatch, no_training):
    (tmp_path / "inputs").mkdir()
    (tmp_path / "inputs" / "upper.jsonl").write_text("mine")
    with pytest.raises(RunError, match="inputs exists, and no run made it"):
        bj.select(**arguments | {"workdir": tmp_path})
    (tmp_path / "run" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run" / "here")
    with pytest.raises(RunError, match="would remove the current directory"):
        bj.select(**arguments | {"workdir": ".."}, overwrite=True)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        bj.Run(tmp_path)
    assert (tmp_path / "inputs" / "upper.jsonl").read_text() == "mine" and (tmp_path / "run" / "here").exists()


def test_the_default_workdir_depends_on_rows_and_settings(arguments, tmp_path, monkeypatch):
    workdirs = []

    def note(config, workdir):
        workdirs.append(workdir)
        (workdir / "config.json").write_text(config.to_json())

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "run", note)
    arguments = arguments | {"workdir": None}
    file = write_jsonl(tmp_path / "upper.jsonl", UPPER)
    for changes in ({}, {}, {"seed": 1}, {"upper": UPPER[:-1]}, {"upper": file.name}, {"upper": file}):
        bj.select(**arguments | changes)
    assert [workdirs.index(workdir) for workdir in workdirs] == [0, 0, 2, 3, 0, 0]  # the file has the lines of the list
    write_jsonl(file, UPPER[:-1])
    bj.select(**arguments | {"upper": file})
    assert workdirs[-1] == workdirs[3]
    file.write_text("")
    first, second = write_jsonl(tmp_path / "a.jsonl", UPPER[:2]), write_jsonl(tmp_path / "b.jsonl", UPPER[2:])
    init = {"selection": {"init": str(write_jsonl(tmp_path / "weights.jsonl", [{"id": "a", "weight": 1.0}]))}}
    for changed, changes in ((second, {"upper": f"{first}, {second}"}), (tmp_path / "weights.jsonl", init)):
        bj.select(**arguments | changes)
        bj.select(**arguments | changes)
        with changed.open("a") as more:
            more.write(json.dumps(UPPER[0] | {"id": "b", "weight": 2.0}) + "\n")
        bj.select(**arguments | changes)
        assert workdirs[-3] == workdirs[-2] != workdirs[-1]  # the last file of a list, and the weights to start from, count
    assert workdirs[0].parent == tmp_path / "runs"


def test_a_run_that_cannot_start_leaves_no_rows(arguments, tmp_path):
    with pytest.raises(DataError, match="^upper, row 1: no field"):
        bj.select(**arguments | {"upper": [{"text": "a"}], "workdir": tmp_path / "run"})
    assert not (tmp_path / "run" / "inputs").exists()


def test_a_second_call_that_fails_leaves_the_rows_of_the_first(tmp_path):
    """The first one has not written its config yet."""
    given, config = {"upper": UPPER, "lower": UPPER}, inputs.configure(None, {})
    folder = tmp_path / "run" / "inputs"
    with pytest.raises(KeyboardInterrupt), inputs.read(given) as levels, inputs.stored(config, levels, folder.parent):
        with pytest.raises(RunError, match="in use"), inputs.read(given) as again, inputs.stored(config, again, folder.parent):
            raise RunError("in use")
        assert {path.name for path in folder.glob("*.jsonl")} == {"upper.jsonl", "lower.jsonl"}
        raise KeyboardInterrupt
    assert not folder.exists()


def test_rows_do_not_stay_in_the_workdir_of_another_run(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    given, config = {"upper": UPPER, "lower": UPPER}, inputs.configure(None, {})
    with pytest.raises(RunError), inputs.read(given) as levels, inputs.stored(config, levels, tmp_path):
        raise RunError("another run")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


# --------------------------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------------------------


def test_settings_by_section_and_by_full_name(neox, monkeypatch):
    settings = {"num_epochs": 2, "lora": {"rank": 4, "alpha": 8}, "optimizer.learning_rate": 1, "eval.num_upper": 20}
    config = inputs.configure(neox, settings)
    assert (config.num_epochs, config.lora.rank, config.lora.alpha, config.optimizer.learning_rate) == (2, 4, 8, 1)
    assert config.model.path == str(neox) and config.method == "offline" and config.eval.num_upper == 20
    assert inputs.configure({"path": str(neox), "remat": True}, {}).model.remat
    monkeypatch.chdir(ROOT)  # where the name of the embedded model is also a path
    for embedded in (None, "bilevel_jax/tiny"):
        config = inputs.configure(embedded, {})
        assert config.model.path == "bilevel_jax/tiny" and config.data.max_length == 512
    assert inputs.configure("org/model", {}).model.path == "org/model"


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"lr": 1e-3}, "there is no setting lr (did you mean optimizer.learning_rate or selection.learning_rate?)"),
        ({"optimizer": {"lr": 1e-3}}, "there is no setting optimizer.lr (did you mean optimizer.learning_rate?)"),
        ({"epochs": 1}, "there is no setting epochs (did you mean num_epochs?)"),
        ({"lora": 3}, "lora is a section; give lora={...} with keys alpha, dropout, init, layers, rank, rslora, targets"),
        ({"lora.rank": "8"}, "lora.rank='8' must be of type int"),
        ({"method": "ofline"}, "method='ofline' is not among"),
        ({"data.upper": "a.jsonl"}, "data.upper is set by the argument upper"),
        ({"model.path": "b"}, "model='a' and model.path='b': give one of them"),
        ({"eval.num_lower": 1.5}, "eval.num_lower=1.5 must be a number of rows, or a share"),
    ],
)
def test_wrong_settings(settings, reason):
    with pytest.raises(ConfigError) as caught:
        inputs.configure("a", settings)
    assert reason in str(caught.value)


def test_settings_may_be_numbers_of_numpy():
    config = inputs.configure("a", {"num_epochs": np.int64(3), "lora": {"alpha": np.float32(0.5)}})
    assert (config.num_epochs, type(config.num_epochs), config.lora.alpha) == (3, int, 0.5)


@pytest.mark.parametrize(
    "lower, reason",
    [([], "^lower: no rows in it"), ([{"question": "q", "response": 3}] * 9, "^lower, row 1: field 'response' is not text")],
)
def test_errors_name_rows_and_not_the_files_that_are_made_of_them(tmp_path, lower, reason):
    with pytest.raises(DataError, match=reason):
        bj.select(upper=make_rows(30, 0), lower=lower, model=None, workdir=tmp_path / "run")
    assert not (tmp_path / "run" / "inputs").exists()


def test_texts_are_no_rows():
    with pytest.raises(DataError, match=r"'What is JAX\?' is no file; rows are objects, such as"):
        in_memory.source_name(["What is JAX?", "And Flax?"])


# --------------------------------------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------------------------------------

PLAIN = [{"question": "a", "response": "b", "n": 1}, {"question": "c", "response": "d", "n": None}]


@pytest.mark.parametrize(
    "rows",
    [
        PLAIN,
        tuple(PLAIN),
        (row for row in PLAIN),
        datasets.Dataset.from_list(PLAIN),
        pandas.DataFrame(PLAIN),
        [row | {"n": row["n"] and np.int64(row["n"])} for row in PLAIN],
        [PLAIN[0], PLAIN[1] | {"n": float("nan")}],
    ],
    ids=["list", "tuple", "generator", "Dataset", "DataFrame", "NumPy", "NaN"],
)
def test_rows_in_memory(rows, tmp_path):
    in_memory.write_jsonl(rows, tmp_path / "rows.jsonl")
    assert read_jsonl(tmp_path / "rows.jsonl") == PLAIN


@pytest.mark.parametrize(
    "rows, reason",
    [
        ({"question": "a", "response": "b"}, "dict is not a list of rows; give a list of rows"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_list(PLAIN)}), "take one of its splits train"),
        (3, "int is not a list of rows"),
        (None, "NoneType is not a list of rows"),
        ([PLAIN[0], {"question": object()}], "row 2: field 'question' cannot be written as JSON (of type object"),
        (
            [{"question": "a", "nested": functools.reduce(lambda inner, _: [inner], range(9999), [])}],
            "row 1: field 'nested' cannot",
        ),
    ],
)
def test_what_is_no_rows(rows, reason, tmp_path):
    with pytest.raises(DataError) as caught:
        in_memory.write_jsonl(rows, tmp_path / "rows.jsonl")
    assert reason in str(caught.value)


def test_tables_of_parquet_files(tmp_path):
    """Pandas reads lists as arrays, also those in other lists."""
    user = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]}
    chats = [
        {"messages": [user, call], "tools": [{"name": "f"}]},
        {"messages": [user, {"role": "assistant", "content": [user["content"][0]]}]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(chats), tmp_path / "rows.parquet")
    frame = pandas.read_parquet(tmp_path / "rows.parquet")
    assert isinstance(frame["messages"][0], np.ndarray)
    expected, report = read_rows(tmp_path / "rows.parquet")
    assert list(iter_rows(frame)) == list(iter_rows(frame.to_dict("records"))) == expected and not report.rejections


@pytest.mark.parametrize("names", ["a.jsonl", ["a.jsonl"], ("a.jsonl", "b.jsonl")])
def test_names_of_sources_are_no_rows(names):
    assert in_memory.is_source(names) and not in_memory.is_source(PLAIN)


# --------------------------------------------------------------------------------------------------------------------
# Score and sample
# --------------------------------------------------------------------------------------------------------------------


def test_score(neox, tmp_path):
    rows = UPPER[:3] + [{"question": "no response"}]
    results = bj.score(rows, neox)
    for row, result in zip(rows, results[:3]):
        expected = token_log_probs(load(neox), row["question"], row["response"])
        assert result["loss"] == pytest.approx(-np.mean(expected), abs=1e-4) and result["num_tokens"] == len(expected)
    assert results[3]["loss"] is None and results[3]["reason"] == "no field 'response'"
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    run_command("score", [f"--model={neox}", f"--data={file}", f"--out={tmp_path / 'out.jsonl'}"])
    assert results == read_jsonl(tmp_path / "out.jsonl")


def test_sample_with_an_adapter(run, neox, tmp_path):
    prompts = [{"question": row["question"]} for row in UPPER[:2]]
    options = {"temperature": 0, "max_new_tokens": 4}
    results = bj.sample(prompts, neox, run.adapter_path, **options)
    file = write_jsonl(tmp_path / "prompts.jsonl", prompts)
    flags = [
        f"--{name}={value}" for name, value in ({"model": neox, "adapter": run.adapter_path, "prompts": file} | options).items()
    ]
    run_command("sample", [*flags, f"--out={tmp_path / 'out.jsonl'}"])
    assert results == read_jsonl(tmp_path / "out.jsonl") and len(results) == 2


@pytest.mark.parametrize(
    "options, reason",
    [({"top_p": 2.0}, "top_p=2.0 must be"), ({"stop": ""}, "^a stop string is empty"), ({"template": "alpacca"}, "alpacca")]
    + [({name: 0}, f"^{name}=0 must be at least 1") for name in ("num_samples", "batch_size")]
    + [
        ({"max_new_tokens": 5.5}, "^max_new_tokens=5.5 must be a whole number"),
        ({"quantization": "fp8"}, "^quantization 'fp8' is not"),
    ]
    + [({"dtype": "int32"}, "^dtype 'int32' is not among float32")],
)
def test_sample_refuses(neox, options, reason):
    with pytest.raises(ValueError, match=reason):
        bj.sample(UPPER[:1], neox, **options)


# --------------------------------------------------------------------------------------------------------------------
# The module
# --------------------------------------------------------------------------------------------------------------------


def test_the_interface_stays_callable_beside_packages_of_its_names():
    import bilevel_jax.sample.sampler
    import bilevel_jax.score.scorer

    assert {"select", "score", "sample", "Run"} <= set(dir(bj))
    for function, first in ((bj.score, "rows"), (bj.sample, "prompts"), (bj.select, "upper")):
        assert next(iter(inspect.signature(function).parameters)) == first
    assert bilevel_jax.score is bj.score and bilevel_jax.sample.sampler
    with pytest.raises(AttributeError, match="no attribute 'selekt'"):
        bj.selekt  # noqa: B018


def test_importing_the_package_imports_no_library():
    code = "import sys, bilevel_jax; sys.exit(str(sorted({'jax', 'numpy', 'datasets', 'absl', 'pandas'} & sys.modules.keys())))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == "[]"


def test_the_example_of_the_readme(tmp_path, monkeypatch):
    """From lists of dicts to kept rows in at most six lines."""
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 6
    names: dict = {}
    exec(code, names)
    kept, weights = names["kept"], names["run"].weights
    assert len(weights) == 54 and len(kept) == 43  # 10% of 60 are held out; 80% of the others are kept
    assert set(kept["question"]) == set(weights.nlargest(43, "weight")["question"])
    assert weights.groupby("response")["weight"].mean()["a cat"] < 1

"""What people do in their first hour, and what must happen: a case each, with the sentence beside it.

Cases that read rows stop before the model is loaded. Those that need a run look at the finished runs that the tests share. Other
files test the same parts in depth.
"""

import csv
import gzip
import io
import json
import os
import pathlib
import signal

import datasets
import pandas
import pyarrow.parquet
import pytest
import zstandard

import bilevel_jax as bj
from bilevel_jax import __main__ as console
from bilevel_jax import checks, cli, errors, initial_weights, train
from bilevel_jax.data import levels, rows, templates
from bilevel_jax.data.rejections import DataError
from bilevel_jax.planning import dry_run
from bilevel_jax.runtime import disk
from bilevel_jax.runtime.workdir import locked
from tests.conftest import EVERYTHING, NUM_LOWER, call_main, make_rows, read_jsonl, run_command, write_jsonl
from tests.test_train import snapshot, stop_at

PAIRS = [("What is 2 + 2?", "4"), ("Name a fruit;\nany.", 'An "apple", or ☃'), ("Say no.", "No.")]


# --------------------------------------------------------------------------------------------------------------------
# Forms of data
# --------------------------------------------------------------------------------------------------------------------


def named(question="question", response="response"):
    return [{question: q, response: r} for q, r in PAIRS]


def chats(key, role, text, user, assistant):
    return [{key: [{role: user, text: q}, {role: assistant, text: r}]} for q, r in PAIRS]


def lines(values) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def csv_bytes(values, **options) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, values[0], **options)
    writer.writeheader()
    writer.writerows(values)
    return file.getvalue().encode()


def parquet_bytes(values) -> bytes:
    file = io.BytesIO()
    pandas.DataFrame(values).to_parquet(file)
    return file.getvalue()


MESSAGES = chats("messages", "role", "content", "user", "assistant")
SHAREGPT = chats("conversations", "from", "value", "human", "gpt")
PARTS = [{"messages": [m | {"content": [{"type": "text", "text": m["content"]}]} for m in row["messages"]]} for row in MESSAGES]
THANKS = [{"messages": [*row["messages"], {"role": "user", "content": "Thanks!"}]} for row in MESSAGES]
TRL = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in MESSAGES]
LIKED = [{"prompt": q, "chosen": r, "rejected": "x"} for q, r in PAIRS]
ALPACA = [{"instruction": q, "input": "", "output": r} for q, r in PAIRS]
TWO_LINES = [{"instruction": "What is", "input": "2 + 2?", "output": "4"}]
MIXED = [named()[0], MESSAGES[1], ALPACA[2]]
SHARDS = {f"mine/train-{i:05}-of-00003.jsonl": lines(named()[i : i + 1]) for i in range(3)}
THREE = {"a.jsonl": lines(named()[:1]), "b.json": json.dumps(named()[1:2]).encode(), "c.csv": csv_bytes(named()[2:])}

FORMS = [  # name; what must happen; files; settings; a line that must be printed
    ("JSON Lines", "The rows are read.", {"a.jsonl": lines(named())}, {}, "3 rows (3 question/response)"),
    ("a JSON array", "The rows are read.", {"a.json": json.dumps(named()).encode()}, {}, ""),
    ("JSON Lines in a .json file", "The rows are read.", {"a.json": lines(named())}, {}, ""),
    ("a CSV file", "The rows are read, with quotes and line feeds.", {"a.csv": csv_bytes(named())}, {}, ""),
    (
        "a CSV file of a spreadsheet",
        "Semicolons and a byte order mark change nothing.",
        {"a.csv": b"\xef\xbb\xbf" + csv_bytes(named(), delimiter=";", quoting=csv.QUOTE_ALL)},
        {},
        "",
    ),
    (
        "a CSV file with other columns",
        "data.columns names them.",
        {"a.csv": csv_bytes(named("query", "answer"))},
        {"data.columns": "question:query,response:answer"},
        "",
    ),
    ("a Parquet file of pandas", "The rows are read.", {"a.parquet": parquet_bytes(named())}, {}, ""),
    ("a gzip file", "It is unpacked while it is read.", {"a.jsonl.gz": gzip.compress(lines(named()))}, {}, ""),
    ("a zstd file", "It is unpacked while it is read.", {"a.csv.zst": zstandard.compress(csv_bytes(named()))}, {}, ""),
    ("a folder of shards", "All are read, in order.", SHARDS, {"data.lower": "mine"}, ""),
    ("a glob", "All files that match are read.", SHARDS, {"data.lower": "mine/*.jsonl"}, ""),
    ("files of several formats", "A comma separates them.", THREE, {"data.lower": "a.jsonl,b.json,c.csv"}, ""),
    ("a list of files in a config", "It is as good as commas.", THREE, {"data.lower": ["a.jsonl", "b.json", "c.csv"]}, ""),
    ("Alpaca rows", "Instruction and output are read.", {"a.json": json.dumps(ALPACA).encode()}, {}, "3 instruction/input/output"),
    ("OpenAI chats", "The last answer is the response.", {"a.jsonl": lines(MESSAGES)}, {}, "3 messages"),
    ("ShareGPT chats", "human asks and gpt answers.", {"a.jsonl": lines(SHAREGPT)}, {}, "3 conversations"),
    ("contents in parts", "Their texts are joined.", {"a.jsonl": lines(PARTS)}, {}, ""),
    (
        "chats that end with the user",
        "The end is cut off, and counted.",
        {"a.jsonl": lines(THANKS)},
        {},
        "  3: turns after the last",
    ),
    ("prompts and completions of TRL", "Messages are read as texts are.", {"a.jsonl": lines(TRL)}, {}, "3 prompt/completion"),
    ("preference pairs", "Without DPO, the chosen response is learned.", {"a.jsonl": lines(LIKED)}, {}, "3 prompt/chosen"),
    ("rows of several schemas in a file", "Each row is read by its own.", {"a.jsonl": lines(MIXED)}, {}, "1 messages"),
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def read(here, make_config, capsys):
    """`read(files, settings) -> (lower level, what was printed)`: the rows of a run, all of them in the order of the file."""

    def read(files, settings=()):
        for name, content in files.items():
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            (here / name).write_bytes(content)
        defaults = {"data.lower": next(iter(files), ""), "eval.num_lower": 0, "data.max_length": 128}
        config = checks.build(make_config(defaults | dict(settings)))
        tokenizer = templates.load_tokenizer(config.model.path)
        return levels.load_levels(config, tokenizer)[1], capsys.readouterr().out

    return read


@pytest.mark.parametrize("must, files, settings, printed", [case[1:] for case in FORMS], ids=[case[0] for case in FORMS])
def test_forms_of_data(read, must, files, settings, printed):
    level, output = read(files, settings)
    assert [(row.question, row.response) for row in level.rows] == PAIRS, must
    assert printed in output, must


def test_an_instruction_with_an_input(read):
    """The question is both, on two lines."""
    level, _ = read({"a.jsonl": lines(TWO_LINES)})
    assert level.rows[0].question == "What is\n2 + 2?"


def test_a_data_set_of_save_to_disk(read, here):
    """Its folder is named, and the rows are read."""
    datasets.Dataset.from_list(named()).save_to_disk(here / "saved")
    assert [row.response for row in read({}, {"data.lower": "saved"})[0].rows] == [r for _, r in PAIRS]


def test_several_files_name_their_rows(read):
    """The file is the source of rows that name none, so that selection.unit=domain can weigh files."""
    level, _ = read(THREE, {"data.lower": "a.jsonl,b.json,c.csv"})
    assert [row.source for row in level.rows] == ["a.jsonl", "b.json", "c.csv"]


def test_tool_calls_without_a_template_that_renders_them(read):
    """They are left out and counted; the other rows are used."""
    call = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}
    chat = [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    level, printed = read({"a.jsonl": lines([*named(), {"messages": chat}])})
    assert len(level.rows) == 3 and "  left out 1: tools, which need a chat template" in printed and "a.jsonl:4" in printed


# --------------------------------------------------------------------------------------------------------------------
# Columns and rows that are not as they should be
# --------------------------------------------------------------------------------------------------------------------

LONG = [*named(), {"question": "Long?", "response": "no " * 300}]
UNUSED = [row | {"context": "Two is a number."} for row in named()]
ANSWERS = csv_bytes(named(response="answer"))
UNLIKE = lines([{"text": "2 + 2 = 4"}])

ODD_ROWS = [  # name; what must happen; files; settings; number of rows; lines that must be printed
    (
        "rows without a response",
        "They are left out and counted, with the line of the first.",
        {"a.jsonl": lines([*named(), {"question": "Why?"}])},
        {},
        3,
        ["  left out 1: no field 'response' (first: a.jsonl:4)"],
    ),
    ("long rows", "The response is cut, and counted.", {"a.jsonl": lines(LONG)}, {}, 4, ["  1: response cut to 128 tokens"]),
    ("rows twice", "Copies are counted; a setting drops them.", {"a.jsonl": lines(named() * 2)}, {}, 6, ["data.deduplicate=exact"]),
    ("rows twice, with data.deduplicate", "One stays.", {"a.jsonl": lines(named() * 2)}, {"data.deduplicate": "exact"}, 3, []),
    ("a field that is not used", "It is named.", {"a.jsonl": lines(UNUSED)}, {}, 3, ["context (in 3 rows)"]),
    (
        "the same file for both levels",
        "A warning says how many rows are on both, and what drops them.",
        {"a.jsonl": lines(named())},
        {"data.upper": "a.jsonl", "eval.num_upper": 0},
        3,
        ["warning: 3 of 3 rows of data.lower are also in data.upper", "data.overlap=drop"],
    ),
    ("some lines are no JSON", "They are counted.", {"a.jsonl": lines(named()) + b"{\n"}, {}, 3, ["left out 1: bad JSON"]),
    ("latin-1 in a CSV file", "Such rows are counted.", {"a.csv": csv_bytes(named()) + b"gr\xfcn,x\n"}, {}, 3, ["1: not UTF-8"]),
    ("no field has the source", "Nothing is said.", {"a.jsonl": lines(named())}, {}, 3, []),
    ("a tokenizer without a chat template", "`human` stands in.", {"a.jsonl": lines(named())}, {"data.template": "auto"}, 3, []),
]

REFUSED_ROWS = [  # name; what must happen; files; settings; what the one line says
    (
        "a CSV file with an `answer` column",
        "The line names the columns and the setting that reads them.",
        {"a.csv": ANSWERS},
        {},
        ["a.csv:2: no field 'response'", "the columns are question, answer", "data.columns=response:answer (--columns"],
    ),
    (
        "rows with a `text`",
        "The line names the known schemas and how to name the columns.",
        {"a.jsonl": UNLIKE},
        {},
        ["a.jsonl:1: no field 'messages', 'question'", "data.columns=question:text,response:COLUMN", "question/response"],
    ),
    (
        "a misspelt column",
        "The nearest column is named.",
        {"a.csv": ANSWERS},
        {"data.columns": "response:anwser"},
        ["no row has the column 'anwser' (did you mean answer?)"],
    ),
    (
        "a misspelt field in data.columns",
        "The nearest field is named.",
        {"a.csv": ANSWERS},
        {"data.columns": "respones:answer"},
        ["no schema has a field 'respones' (did you mean response?)"],
    ),
    ("an empty file", "It is named.", {"a.jsonl": b""}, {}, ["a.jsonl: no rows in it"]),
    ("an Excel file", "The formats that can be read are named.", {"a.xlsx": b"PK"}, {}, ["unknown file type '.xlsx'; use .jsonl"]),
    (
        "a misspelt file",
        "The nearest is named.",
        {"a.jsonl": b""},
        {"data.lower": "b.jsonl"},
        ["no such file (did you mean a.jsonl?)"],
    ),
    ("a glob without a match", "It is named.", {"a.jsonl": b""}, {"data.lower": "*.csv"}, ["*.csv: no file matches"]),
    ("a folder without data", "The formats are named.", {"a/b.md": b""}, {"data.lower": "a"}, ["a: a folder without data"]),
    (
        "a folder with splits",
        "Nobody trains on the test split without saying so.",
        {"a/train.jsonl": lines(named()), "a/test.jsonl": lines(named())},
        {"data.lower": "a"},
        ["files of several splits", "name those of one with a glob, such as 'a/train*'"],
    ),
    (
        "more held-out rows than there are",
        "The line says what to set instead.",
        {"a.jsonl": lines(named())},
        {"eval.num_lower": 200},
        ["eval.num_lower=200 leaves no row for training: a.jsonl has 3 usable rows", "such as eval.num_lower=0.1"],
    ),
    (
        "the same file for both levels, with data.overlap",
        "The run is refused if one asks for that.",
        {"a.jsonl": lines(named())},
        {"data.upper": "a.jsonl", "eval.num_upper": 0, "data.overlap": "refuse"},
        ["3 of 3 rows of data.lower are also in data.upper"],
    ),
    (
        "DPO without pairs",
        "The missing field is named.",
        {"a.jsonl": lines(named())},
        {"loss.lower": "dpo", "selection.cost": "loss"},
        ["a.jsonl:1: no field 'chosen'"],
    ),
    (
        "data.max_length of a few tokens",
        "The line says that no row fits.",
        {"a.jsonl": lines(named())},
        {"data.max_length": 5, "data.upper": "a.jsonl", "eval.num_upper": 0},
        ["no row fits data.max_length=5"],
    ),
]


@pytest.mark.parametrize(
    "must, files, settings, number, printed", [case[1:] for case in ODD_ROWS], ids=[case[0] for case in ODD_ROWS]
)
def test_odd_rows(read, must, files, settings, number, printed):
    level, output = read(files, settings)
    assert len(level.rows) == number, must
    for line in printed:
        assert line in output, must


@pytest.mark.parametrize("must, files, settings, told", [case[1:] for case in REFUSED_ROWS], ids=[case[0] for case in REFUSED_ROWS])
def test_rows_that_are_refused(read, must, files, settings, told):
    with pytest.raises(ValueError) as caught:
        read(files, settings)
    message = str(caught.value)
    assert "\n" not in message, must
    for part in told:
        assert part in message, must


def test_twenty_trusted_rows_with_the_default_share(read):
    """A tenth of each level is held out: 2 of 20 rows, and never more than 200."""
    level, _ = read({"a.jsonl": lines(make_rows(20, seed=3))}, {"eval.num_lower": 0.1})
    assert (len(level.rows), len(level.eval_rows)) == (18, 2)


def test_labels_of_a_csv_file(read):
    """`0` and `False` do not mark a row, although texts are true in Python."""
    content = csv_bytes([row | {"bad": mark} for row, mark in zip(named(), ("0", "False", "1"))])
    level, _ = read({"a.csv": content})
    assert levels.labels(level, "bad").tolist() == [False, False, True]


# --------------------------------------------------------------------------------------------------------------------
# Flags and mistakes
# --------------------------------------------------------------------------------------------------------------------

DATA = ["--config.data.upper=a.jsonl", "--config.data.lower=a.jsonl"]
TINY = ["--config=finetune:tiny", *DATA]
FULL = ["--config=finetune", *DATA]

MISTAKES = [  # name; what must happen; arguments; exit status; what the one line says
    ("no config", "The flag is named.", [], 2, "--config"),
    ("a misspelt config", "The nearest one is named.", ["--config=finetunes"], 2, "(did you mean finetune?)"),
    ("an unknown tier", "The tiers are named.", ["--config=finetune:small"], 2, "no tier 'small'; leave it out or choose tiny"),
    ("a misspelt flag", "It is named.", [*TINY, "--wokdir=x"], 2, "wokdir"),
    ("a flag without dashes", "Flags are explained.", [*TINY, "workdir=x"], 2, "flags are written --name=value"),
    ("lr", "The learning rates are named.", [*TINY, "--config.lr=1"], 2, "optimizer.learning_rate or selection.learning_rate?)"),
    ("TRL's max_seq_length", "Ours is named.", [*TINY, "--config.max_seq_length=1"], 2, "(did you mean data.max_length?)"),
    ("axolotl's lora_r", "Ours is named.", [*TINY, "--config.lora_r=8"], 2, "(did you mean lora.rank?)"),
    ("a key without its section", "The full key is named.", [*TINY, "--config.temperature=1"], 2, "online.temperature"),
    ("a section for a key", "Its keys are named.", [*TINY, "--config.model=x"], 2, "name a key of it: model.path"),
    ("a text for a number", "The value is named.", [*TINY, "--config.num_epochs=two"], 2, "two"),
    ("a misspelt method", "The methods are named.", [*TINY, "--config.method=ofline"], 1, "method='ofline' is not among"),
    ("no rows", "The keys are named.", ["--config=finetune"], 1, "data.upper is empty"),
    ("no model", "The key is named.", FULL, 1, "model.path is empty"),
    ("a model that is not there", "It is named.", [*FULL, "--config.model.path=./m"], 1, "./m: no such directory"),
    ("a negative batch", "The key is named.", [*TINY, "--config.batch.size=-1"], 1, "batch.size=-1"),
    ("a share over 1", "What a share is, is said.", [*TINY, "--config.eval.num_upper=1.5"], 1, "eval.num_upper=1.5"),
    ("longer rows than the model knows", "The limit is named.", [*TINY, "--config.data.max_length=9999"], 1, "512 positions"),
    ("a file for the workdir", "It is named.", [*TINY, "--workdir=a.jsonl"], 1, "a.jsonl"),
    ("GPTQ weights", "Such weights are refused by name.", [*FULL, "--config.model.path=quantised"], 1, "quantised weights (gptq)"),
    (
        "another architecture",
        "The known ones are named.",
        [*FULL, "--config.model.path=other"],
        1,
        "model_type 'mamba' is not supported",
    ),
]


@pytest.mark.parametrize("must, arguments, status, told", [case[1:] for case in MISTAKES], ids=[case[0] for case in MISTAKES])
def test_mistakes(here, monkeypatch, capsys, must, arguments, status, told):
    """Each ends with one line on standard error, and without a workdir full of files."""
    write_jsonl(here / "a.jsonl", make_rows(30, seed=1))
    for name, config in (
        ("quantised", {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}),
        ("other", {"model_type": "mamba"}),
    ):
        (here / name).mkdir()
        (here / name / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as caught:
        call_main(monkeypatch, *arguments)
    stderr = capsys.readouterr().err
    assert caught.value.code == status, must
    assert told in stderr and stderr.startswith("error: ") and stderr.count("\n") == 1, must
    assert not list(here.glob("runs/*/config.json")), must


def test_a_misspelt_command(monkeypatch, capsys):
    """`bilevel-jax` names the nearest command."""
    monkeypatch.setattr("sys.argv", ["bilevel-jax", "trian"])
    with pytest.raises(SystemExit):
        console.main()
    assert "(did you mean train?)" in capsys.readouterr().err


def test_help(monkeypatch, capsys):
    """`bilevel-jax` alone lists the commands."""
    monkeypatch.setattr("sys.argv", ["bilevel-jax"])
    console.main()
    assert "\n  train " in capsys.readouterr().out


@pytest.fixture
def checked(make_config, here, capsys):
    """What a dry run says before it compiles."""
    parts = dry_run.check(make_config(), here / "run")
    text = "\n".join(next(parts) for _ in range(3))
    return capsys.readouterr().out + text


def test_a_dry_run(checked, here):
    """It counts rows and steps, shows a row as the model sees it, and writes nothing."""
    assert "lower: 21 rows to train on, 4 held out" in checked  # of 25
    assert "steps: 12 in 2 epochs" in checked
    assert "the tokenizer has no chat template" in checked and "Human: " in checked and "⟦" in checked
    assert not any(here.iterdir())


def test_a_full_disk(make_config, here, monkeypatch):
    """The run is refused before it compiles, with what it needs and what there is."""
    monkeypatch.setattr(disk, "free_bytes", lambda workdir: 1000)
    monkeypatch.setattr("bilevel_jax.step.make_step", None)
    with pytest.raises(errors.RunError, match=r"MB are needed for checkpoints and results, 0.0 MB are free; free some"):
        train.run(make_config(), here / "run")


# --------------------------------------------------------------------------------------------------------------------
# Interruption and resumption
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(make_config, data, tmp_path_factory):
    """Workdir and rows of a run that Ctrl-C stopped after step 3 of 12, and the error."""
    directory = tmp_path_factory.mktemp("first_hour")
    lower = write_jsonl(directory / "lower.jsonl", read_jsonl(data / "lower.jsonl"))
    config = make_config(EVERYTHING | {"data.lower": str(lower)})
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop_at(monkeypatch, 3, signal.SIGINT)
        with pytest.raises(errors.Interrupted) as caught:
            train.run(config, directory / "run")
    return directory, config, caught.value


def changed(config, **changes):
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict(changes)
    return other


def test_ctrl_c(interrupted, capsys):
    """The state is saved, the message says that the same command continues, and the status is 130."""
    error = interrupted[2]

    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        cli.call(main)
    stderr = capsys.readouterr().err
    assert caught.value.code == 130 and "SIGINT: saved at step 3 of 12" in stderr and "the same command continues" in stderr


def test_the_adapter_of_an_interrupted_run(interrupted):
    """The last checkpoint left an adapter that can be used as it is."""
    assert (interrupted[0] / "run" / "adapters" / "step_3" / "adapter_model.safetensors").exists()


def test_the_results_of_an_interrupted_run(interrupted, here):
    """Export says that the run is not finished."""
    with pytest.raises(FileNotFoundError, match="holds no finished run"):
        run_command("export", [f"--workdir={interrupted[0] / 'run'}", "--selected=kept.jsonl"])
    run = bj.Run(interrupted[0] / "run")
    assert not run.finished and "not finished" in str(run)


def test_another_learning_rate_in_the_same_workdir(interrupted):
    """The key is named with both values, and nothing changes."""
    directory, config, _ = interrupted
    before = snapshot(directory / "run")
    with pytest.raises(errors.RunError, match="optimizer.learning_rate: 0.01 there, 0.1 now.*give another --workdir"):
        train.run(changed(config, **{"optimizer.learning_rate": 0.1}), directory / "run")
    assert snapshot(directory / "run") == before


def test_rows_that_changed_in_between(interrupted):
    """The run does not go on with other rows."""
    directory, config, _ = interrupted
    file = directory / "lower.jsonl"
    content = file.read_bytes()
    write_jsonl(file, read_jsonl(file)[:-1])
    with pytest.raises(errors.RunError, match="the data changed"):
        train.run(config, directory / "run")
    file.write_bytes(content)


def test_two_commands_in_a_workdir(interrupted):
    """The second one is refused and names the first."""
    directory, config, _ = interrupted
    with locked(directory / "run"), pytest.raises(errors.RunError, match=f"is in use by process {os.getpid()} on "):
        train.run(config, directory / "run")


def test_the_same_command_continues(interrupted, finished, capsys):
    """With another log too, it ends with the weights of a run that was never interrupted. Last: the run is finished then."""
    directory, config, _ = interrupted
    train.run(changed(config, **{"log.every": 3, "checkpoint.keep": 1}), directory / "run")
    assert "resuming" in capsys.readouterr().out
    for file in ("adapter/adapter_model.safetensors", "weights/epoch_2.parquet"):
        assert (directory / "run" / file).read_bytes() == (finished / file).read_bytes()


def test_the_same_command_after_the_end(finished, make_config):
    """A finished run is not touched."""
    before = snapshot(finished)
    with pytest.raises(errors.RunError, match="holds a finished run; give another --workdir, or remove it to run again"):
        train.run(make_config(EVERYTHING), finished)
    assert snapshot(finished) == before


# --------------------------------------------------------------------------------------------------------------------
# Python and notebooks
# --------------------------------------------------------------------------------------------------------------------

IN_MEMORY = [  # name; what must happen; the argument `lower`
    ("a list of objects", "Its rows are read.", named()),
    ("a Dataset", "Its rows are read.", datasets.Dataset.from_list(named())),
    (
        "a DataFrame with a missing value",
        "NaN is an absent field.",
        pandas.DataFrame([row | {"n": i or None} for i, row in enumerate(named())]),
    ),
    ("a generator", "It is read once.", (row for row in named())),
    ("a list of chats", "They have the schemas of files.", MESSAGES),
]


@pytest.fixture
def no_training(monkeypatch):
    """`train.run` only keeps what it was called with."""
    calls = []

    def run(config, workdir):
        calls.append(rows.read_rows(config.data.lower)[0])
        (workdir / "config.json").write_text(config.to_json())

    monkeypatch.setattr(train, "run", run)
    return calls


@pytest.mark.parametrize("must, lower", [case[1:] for case in IN_MEMORY], ids=[case[0] for case in IN_MEMORY])
def test_rows_in_memory(here, no_training, must, lower):
    bj.select(upper=named(), lower=lower, workdir="run")
    assert [(row.question, row.response) for row in no_training[0]] == PAIRS, must


PYTHON_MISTAKES = [  # name; what must happen; arguments; what the one line says
    ("a single row", "A list is asked for.", {"lower": named()[0]}, "give a list of rows"),
    (
        "a DatasetDict",
        "A split is asked for.",
        {"lower": datasets.DatasetDict({"train": datasets.Dataset.from_list(named())})},
        "train",
    ),
    ("lr=", "The nearest settings are named.", {"lr": 1e-3}, "did you mean optimizer.learning_rate or"),
    ("epochs=", "The nearest setting is named.", {"epochs": 1}, "did you mean num_epochs?"),
    ("lora=8", "The keys of the section are named.", {"lora": 8}, "lora is a section; give lora={...} with keys"),
    ("a text for a number", "The type is named.", {"num_epochs": "3"}, "num_epochs='3' must be of type int"),
    ("a field that is no JSON", "Row and field are named.", {"lower": [named()[0] | {"image": object()}]}, "row 1: field 'image'"),
    ("a file that is not there", "It is named.", {"lower": "absent.jsonl"}, "absent.jsonl: no such file"),
]


@pytest.mark.parametrize("must, arguments, told", [case[1:] for case in PYTHON_MISTAKES], ids=[case[0] for case in PYTHON_MISTAKES])
def test_mistakes_in_python(here, must, arguments, told):
    with pytest.raises(ValueError) as caught:
        bj.select(**{"upper": named(), "lower": named(), "workdir": "run"} | arguments)
    message = str(caught.value)
    assert told in message and "\n" not in message and "--" not in message, must


def test_a_run_of_the_command_in_python(finished, data):
    """`Run` has its weights in the order of the file, its kept rows, its adapter and its numbers."""
    run = bj.Run(finished)
    lower = read_jsonl(data / "lower.jsonl")
    assert [lower[i]["question"] for i in run.weights.index] == run.weights["question"].tolist()
    assert len(run.weights) == NUM_LOWER - 4 and run.weights["weight"].mean() == pytest.approx(1)
    heaviest = run.weights.nlargest(round(0.8 * len(run.weights)), "weight")
    assert sorted(run.kept(0.8)["id"]) == sorted(heaviest["id"])
    assert (run.adapter_path / "adapter_config.json").exists() and run.summary["steps"] == 12


def test_a_report_in_a_notebook(finished):
    """The page is shown in a frame, so that its styles do not reach the notebook."""
    assert bj.Run(finished).report()._repr_html_().startswith("<iframe srcdoc=")


def test_a_cell_twice(here, no_training):
    """A finished run is returned as it is; with other rows it is refused, not overwritten."""
    bj.select(upper=named(), lower=named(), workdir="run")
    (here / "run" / "summary.json").write_text("{}")
    bj.select(upper=named(), lower=named(), workdir="run")
    assert len(no_training) == 1
    with pytest.raises(errors.RunError, match="other lower rows; give another workdir, or overwrite=True"):
        bj.select(upper=named(), lower=named()[:2], workdir="run")


def test_a_directory_without_a_run(here):
    """`Run` says what is missing."""
    with pytest.raises(FileNotFoundError, match="holds no run"):
        bj.Run(here)


# --------------------------------------------------------------------------------------------------------------------
# Results
# --------------------------------------------------------------------------------------------------------------------


def export(workdir, *arguments) -> str:
    return run_command("export", [f"--workdir={workdir}", *map(str, arguments)])


@pytest.fixture(scope="module")
def kept(finished, tmp_path_factory) -> pathlib.Path:
    file = tmp_path_factory.mktemp("kept") / "kept.jsonl"
    assert "17 of 21 rows kept" in export(finished, "--keep=0.8", f"--selected={file}")
    return file


def test_kept_rows_in_trl(kept):
    """`datasets` reads them with the columns that SFTTrainer knows, and with their weights."""
    loaded = datasets.load_dataset("json", data_files=str(kept), split="train")
    assert {"prompt", "completion", "weight", "id", "masked"} <= set(loaded.column_names) and len(loaded) == 17


def test_kept_rows_and_their_weights(kept, finished):
    """A kept row is found in the table of weights by its id."""
    (*_, file) = sorted((finished / "weights").glob("*.parquet"))
    table = pyarrow.parquet.read_table(file).to_pandas().set_index("id")
    assert all(table.loc[row["id"], "weight"] == pytest.approx(row["weight"]) for row in read_jsonl(kept))


def test_kept_rows_in_another_run(kept):
    """They are read as the same rows, and their weights can start it."""
    read, report = rows.read_rows(str(kept))
    assert [row.id for row in read] == [row["id"] for row in read_jsonl(kept)] and not report.rejections
    assert initial_weights.read(str(kept), read).num_matched == 17


def test_rows_for_trainers_without_weights(finished, tmp_path):
    """Rows are repeated by weight, and the file has no weights that would count twice."""
    export(finished, "--keep=1", "--resampled", f"--selected={tmp_path / 'a.jsonl'}")
    resampled = read_jsonl(tmp_path / "a.jsonl")
    assert len(resampled) == 21 and not any("weight" in row for row in resampled)


EXPORT_MISTAKES = [  # name; what must happen; arguments; what the one line says
    ("a percentage", "What --keep takes is said.", ["--selected=a.jsonl", "--keep=80"], r"--keep=80.0 must be in \(0, 1\]"),
    ("an Excel file", "The formats are named.", ["--selected=a.xlsx"], "must end in .jsonl or .parquet"),
    ("neither rows nor a model", "Both flags are named.", [], "--selected=FILE.jsonl, --merged=DIR or both"),
    (
        "generated responses of a run without",
        "Why there are none is said.",
        ["--selected=a.jsonl", "--refined"],
        "generates nothing",
    ),
    ("a model directory that exists", "It is not overwritten.", ["--merged=.."], r"\.\. exists already; give another directory"),
]


@pytest.mark.parametrize("must, arguments, told", [case[1:] for case in EXPORT_MISTAKES], ids=[case[0] for case in EXPORT_MISTAKES])
def test_mistakes_of_export(finished, here, must, arguments, told):
    with pytest.raises((ValueError, OSError), match=told) as caught:
        export(finished, *arguments)
    assert "\n" not in str(caught.value), must


def test_a_report_again(finished):
    """`report` writes the page of a run again, with its questions."""
    run_command("report", [f"--workdir={finished}"])
    page = (finished / "report.html").read_text()
    assert " + " in page and "http://" not in page.split("<body")[0]


def test_scores_of_a_csv_file(neox, here):
    """`score` takes other columns too, and has a line for each row, with a reason where there is no loss."""
    (here / "faq.csv").write_bytes(csv_bytes([*named("query", "answer"), {"query": "Why?", "answer": ""}]))
    arguments = [f"--model={neox}", "--data=faq.csv", "--columns=question:query,response:answer", "--out=out.jsonl"]
    run_command("score", arguments)
    scores = read_jsonl(here / "out.jsonl")
    assert len(scores) == 4 and all(score["loss"] > 0 for score in scores[:3])
    assert scores[3]["loss"] is None and scores[3]["reason"] == "no field 'response'"


def test_a_source_that_moved(finished, make_config, data):
    """Weights of a run whose rows are gone are refused with the file's name."""
    moved = data / "elsewhere.jsonl"
    (data / "lower.jsonl").rename(moved)
    try:
        with pytest.raises(DataError, match="lower.jsonl: no such file"):
            _ = bj.Run(finished).weights
    finally:
        moved.rename(data / "lower.jsonl")

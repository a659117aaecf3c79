"""The command: its files for a finished run, and its refusals."""

import hashlib
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml

from bilevel_jax.data import rows as data_rows
from bilevel_jax.models import decoder, huggingface
from bilevel_jax.runtime import weight_table
from tests.conftest import HELD_OUT, NUM_LOWER, make_rows, read_jsonl, run_command, write_jsonl

TRAINED = NUM_LOWER - HELD_OUT
ADDED = {"id", "weight", "rank", *weight_table.MEASURES, "masked", "prompt", "completion"}


def run(*arguments):
    command_line = [sys.executable, "-m", "bilevel_jax.export", *map(str, arguments)]
    return subprocess.run(command_line, capture_output=True, text=True)


def command(*arguments):
    """The output of the command. It raises what the command raises."""
    return run_command("export", list(map(str, arguments)))


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run on data of its own, which a test may change: workdir, data file."""
    workdir, file = tmp_path / "run", tmp_path / "lower.jsonl"
    shutil.copytree(finished, workdir, ignore=shutil.ignore_patterns("checkpoints"))
    config = json.loads((workdir / "config.json").read_text())
    shutil.copy(config["data"]["lower"], file)
    config["data"]["lower"] = str(file)
    (workdir / "config.json").write_text(json.dumps(config))
    return workdir, file


def front_matter(text):
    empty, head, body = text.split("---\n", 2)
    assert not empty and body.startswith("\n# ")
    return yaml.safe_load(head)


# --------------------------------------------------------------------------------------------------------------------
# Kept rows
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_score_new(amortised, data, tmp_path):
    """Training rows given as new rows get the same weights; a row that does not fit is counted and skipped."""
    table = weight_table.latest(amortised)
    before = dict(zip(table["id"].to_pylist(), table["logit"].to_pylist()))
    rows = read_jsonl(data / "lower.jsonl")
    long = rows[0] | {"question": "very " * 200}
    new = write_jsonl(tmp_path / "new.jsonl", [long, *rows[::-1]])
    out = tmp_path / "ranked.jsonl"
    arguments = f"--workdir={amortised}", f"--score-new={new}", f"--selected={out}"  # the former name
    printed = command(*arguments, "--keep=1")
    assert f"{NUM_LOWER} of {NUM_LOWER} rows kept" in printed and "question over 96 tokens (first: " in printed
    ranked = read_jsonl(out)
    assert sorted(row["rank"] for row in ranked) == list(range(1, NUM_LOWER + 1))
    assert np.mean([row["weight"] for row in ranked]) == pytest.approx(1)
    ids = {row.fields["question"]: row.id for row in data_rows.read_rows(str(new))[0]}
    known = [(np.log(row["weight"]), before[ids[row["question"]]]) for row in ranked if ids[row["question"]] in before]
    assert len(known) == TRAINED
    shift = [new - old for new, old in known]  # logits are defined up to a constant
    np.testing.assert_allclose(shift, np.mean(shift), atol=1e-4)
    assert np.std([logit for _, logit in known]) > 1e-3

    command(*arguments, "--keep=0.2")
    assert [row["rank"] for row in sorted(read_jsonl(out), key=lambda row: row["rank"])] == list(range(1, 6))


def test_score_new_by_source(by_source, tmp_path):
    """A new row has the logit of its source; an unknown source is an error."""
    _, workdir = by_source
    table = weight_table.latest(workdir)
    logits = dict(zip(table["source"].to_pylist(), table["logit"].to_pylist()))
    objects = [{"question": f"{name}?", "response": "yes", "source": name} for name in logits]
    new, out = write_jsonl(tmp_path / "new.jsonl", objects), tmp_path / "ranked.jsonl"
    command(f"--workdir={workdir}", f"--score_new={new}", f"--selected={out}", "--keep=1")
    result = {row["source"]: row["weight"] for row in read_jsonl(out)}
    expected = np.exp([*logits.values()])
    np.testing.assert_allclose([result[name] for name in logits], len(logits) * expected / expected.sum(), rtol=1e-5)

    renamed = [{"query": row["question"], "response": row["response"], "source": row["source"]} for row in objects]
    command(f"--workdir={workdir}", f"--score_new={write_jsonl(new, renamed)}", f"--selected={out}", "--columns=question:query")
    assert {row["question"] for row in read_jsonl(out)} < {row["question"] for row in objects}

    write_jsonl(new, [*objects, {"question": "q", "response": "r", "source": "elsewhere"}])
    with pytest.raises(ValueError, match=f"new.jsonl:{len(objects) + 1}: source 'elsewhere' is none of those of"):
        command(f"--workdir={workdir}", f"--score_new={new}", f"--selected={out}", "--keep=1")


def test_jsonl_and_parquet(finished, data, tmp_path):
    original = {row["question"]: row for row in read_jsonl(data / "lower.jsonl")}
    for name in ("kept.jsonl", "new/kept.parquet"):
        printed = command(f"--workdir={finished}", f"--selected={tmp_path / name}", "--keep=0.75")
        assert f"{round(0.75 * TRAINED)} of {TRAINED}" in printed
    kept = read_jsonl(tmp_path / "kept.jsonl")
    assert kept == pyarrow.parquet.read_table(tmp_path / "new/kept.parquet").to_pylist()
    assert len(kept) == round(0.75 * TRAINED)
    table = {row["id"]: row for row in weight_table.latest(finished).to_pylist()}
    for row in kept:
        assert all(row[key] == table[row["id"]][key] for key in ("weight", "rank", "masked"))
    for row in kept:
        assert {key: row[key] for key in row.keys() - ADDED} == original[row["question"]]
        assert row["prompt"] == f"Human: {row['question']}\n\nAssistant:"  # the tiny model has no chat template
        assert row["completion"] == f" {row['response']}"
    head = front_matter((tmp_path / "new" / "kept.parquet.card.md").read_text())
    assert head["configs"] == [{"config_name": "default", "data_files": "kept.parquet"}]


def test_new_pairs_stay_pairs(by_source, tmp_path):
    workdir, out = tmp_path / "run", tmp_path / "kept.jsonl"
    shutil.copytree(by_source[1], workdir, ignore=shutil.ignore_patterns("checkpoints"))
    config = json.loads((workdir / "config.json").read_text())
    config["loss"]["lower"] = "dpo"
    (workdir / "config.json").write_text(json.dumps(config))
    pairs = [{"prompt": f"{name}?", "chosen": "yes", "rejected": "no", "source": name} for name in "abc"]
    new = write_jsonl(tmp_path / "new.jsonl", pairs)
    command(f"--workdir={workdir}", f"--score_new={new}", f"--selected={out}", "--keep=1")
    assert [{name: row[name] for name in pairs[0]} for row in read_jsonl(out)] == pairs


def measure(workdir, **measures):
    """Writes new columns into the last table of a run, or drops all if there are none."""
    file = max((workdir / "weights").glob("epoch_*.parquet"))
    table = pyarrow.parquet.read_table(file)
    table = table.drop_columns([name for name in weight_table.NULLABLE if name in table.column_names])
    for name, values in measures.items():
        table = table.append_column(name, pa.array(values, weight_table.SCHEMA.field(name).type))
    pyarrow.parquet.write_table(table, file)
    return table.to_pylist()


@pytest.mark.parametrize("name", ["kept.jsonl", "kept.parquet"])
def test_implausible_rows(copied, tmp_path, name):
    workdir, _ = copied
    rng = np.random.default_rng(0)
    useful = rng.normal(size=TRAINED).astype(np.float32)
    records = measure(workdir, plausible=rng.permutation(TRAINED) / TRAINED, useful=useful)
    out = tmp_path / name
    printed = command(f"--workdir={workdir}", f"--selected={out}", "--drop_implausible=0.2", "--keep=0.5")
    left_out, number = round(0.2 * TRAINED), round(0.5 * TRAINED)
    assert f"{number} of {TRAINED} rows kept" in printed and f"{left_out} of the others are left out as implausible" in printed
    rest = sorted((record for record in records if record["plausible"] >= left_out / TRAINED), key=lambda record: record["rank"])
    expected = {record["rank"]: record for record in rest[:number]}
    kept = read_jsonl(out) if name.endswith("jsonl") else pyarrow.parquet.read_table(out).to_pylist()
    assert {row["rank"] for row in kept} == expected.keys()
    for row in kept:
        assert all(row[key] == expected[row["rank"]][key] for key in ("weight", "plausible", "useful"))
    assert (
        f"Rows with the smallest `plausible` were left out first: {left_out}." in out.with_name(f"{out.name}.card.md").read_text()
    )


def test_dissimilar_rows(copied, tmp_path):
    """A row that is left out by both measures counts in each."""
    workdir, _ = copied
    similar = np.arange(TRAINED) - TRAINED / 2
    plausible, useful = np.arange(TRAINED) / TRAINED, np.ones(TRAINED)
    records = measure(workdir, plausible=plausible, useful=useful, similar=similar)
    out = tmp_path / "kept.jsonl"
    printed = command(f"--workdir={workdir}", f"--selected={out}", "--drop_implausible=0.1", "--drop_dissimilar=0.25", "--keep=1")
    number = round(0.25 * TRAINED)
    assert f"{round(0.1 * TRAINED)} of the others are left out as implausible" in printed
    assert f"{number} of the others are left out as dissimilar" in printed
    assert {row["rank"] for row in read_jsonl(out)} == {record["rank"] for record in records[number:]}
    assert f"Rows with the smallest `similar` were left out first: {number}." in out.with_name(f"{out.name}.card.md").read_text()
    measure(workdir, plausible=plausible, useful=useful)
    with pytest.raises(ValueError, match=r"^--drop_dissimilar: .* has no `similar` \(eval.similar=False, few trusted rows or an"):
        command(f"--workdir={workdir}", f"--selected={out}", "--drop_dissimilar=0.1")


def test_a_small_share_covers_the_trusted_rows(copied, tmp_path):
    workdir, _ = copied
    out = tmp_path / "kept.jsonl"
    arguments = f"--workdir={workdir}", f"--selected={out}", "--keep=0.2"
    measure(workdir)
    assert "by weight alone" in command(*arguments) and "round-robin" not in out.with_name(f"{out.name}.card.md").read_text()
    records = measure(workdir, nearest=np.arange(TRAINED) % 3)
    assert "round-robin over the trusted rows" in command(*arguments)
    assert "round-robin over the trusted rows" in out.with_name(f"{out.name}.card.md").read_text()
    half = sorted(range(TRAINED), key=lambda i: records[i]["rank"])[: round(TRAINED / 2)]
    firsts = {min((i for i in half if i % 3 == j), key=lambda i: records[i]["rank"]) for j in range(3)}
    assert {records[i]["rank"] for i in firsts} <= {row["rank"] for row in read_jsonl(out)}
    assert "round-robin" not in command(*arguments[:2], "--keep=0.5")


def test_tables_of_earlier_versions(copied, tmp_path):
    workdir, _ = copied
    measure(workdir)
    arguments = f"--workdir={workdir}", f"--selected={tmp_path / 'kept.jsonl'}"
    with pytest.raises(ValueError, match=r"no `plausible` \(an earlier version\); train again or remove the flag") as error:
        command(*arguments, "--drop_implausible=0.1")
    assert "\n" not in str(error.value) and not (tmp_path / "kept.jsonl").exists()
    assert "implausible" not in command(*arguments, "--drop_implausible=0")
    assert not weight_table.MEASURES.keys() & read_jsonl(tmp_path / "kept.jsonl")[0].keys()


def test_formats(finished, tmp_path):
    read = {}
    for form in ("original", "chat"):
        command(f"--workdir={finished}", f"--selected={tmp_path / form}.jsonl", f"--format={form}")
        read[form] = read_jsonl(tmp_path / f"{form}.jsonl")
    for plain, chat in zip(read["original"], read["chat"], strict=True):
        prompt = [{"role": "user", "content": plain["question"]}]
        assert chat == plain | {"prompt": prompt, "completion": [{"role": "assistant", "content": plain["response"]}]}
        assert not plain.keys() & {"prompt", "completion"}


def test_refined(copied, tmp_path):
    """Two rows are made to look masked, and one of them answered."""
    workdir, file = copied
    file.write_text(file.read_text().replace('"source"', '"text": "mine", "source"'))
    table = weight_table.latest(workdir)
    answered, silent = table["id"].to_pylist()[:2]
    masked = pa.array([row_id in (answered, silent) for row_id in table["id"].to_pylist()])
    for old in (workdir / "weights").glob("*.parquet"):
        pyarrow.parquet.write_table(table.set_column(table.column_names.index("masked"), "masked", masked), old)
    response = {"step": 4, "id": answered, "sample": 0, "text": "My own ☃.", "logprob": -1.0, "ratio": 1.0}
    write_jsonl(workdir / "responses.jsonl", [response])
    out = tmp_path / "kept.jsonl"
    printed = command(f"--workdir={workdir}", f"--selected={out}", "--refined", "--keep=1")
    assert "2 of them are masked, 1 of these have the model's response" in printed
    assert "'text' is kept as 'original_text'" in printed

    data = {row["question"]: row for row in read_jsonl(file)}
    kept = read_jsonl(out)
    assert len(kept) == TRAINED
    for row in kept:
        before = data[row["question"]]
        assert row["original_response"] == before["response"] and row["original_text"] == "mine" and "text" not in row
        assert row["response"] == ("My own ☃." if row["refined"] else before["response"])
        assert row["completion"] == f" {row['response']}"
    (refined,) = (row for row in kept if row["refined"])
    assert refined["rank"] == table["rank"].to_pylist()[0]
    card = (tmp_path / "kept.jsonl.card.md").read_text()
    assert "2 of the kept rows are masked; 1 of them have a response that the model generated." in card


def test_warns_of_masked_rows(copied, tmp_path):
    """One row was masked at the end of the first epoch, one was trained on with the model's answer, one had an unused answer."""
    workdir, _ = copied
    first, second, third, *_ = ids = weight_table.latest(workdir)["id"].to_pylist()
    file = workdir / "weights" / "epoch_1.parquet"
    table = weight_table.read(file)
    masked = pa.array([row_id == first for row_id in ids])
    weight_table.write(file, table.set_column(table.column_names.index("masked"), "masked", masked))
    answers = [(second, 0.9), (third, None)]
    lines = [{"step": 2, "id": row_id, "sample": 0, "text": "Mine.", "logprob": -1.0, "ratio": ratio} for row_id, ratio in answers]
    write_jsonl(workdir / "responses.jsonl", lines)
    out = tmp_path / "kept.jsonl"
    printed = command(f"--workdir={workdir}", f"--selected={out}", "--keep=1")
    assert "warning: 2 of them were masked in the run" in printed
    assert "2 of the kept rows were masked in the run" in out.with_name(f"{out.name}.card.md").read_text()
    assert not any(row["masked"] for row in read_jsonl(out))  # by the table of the last epoch


def test_fields_with_the_names_of_columns(copied, tmp_path):
    workdir, file = copied
    objects = [row | {"id": i, "masked": "yes"} for i, row in enumerate(read_jsonl(file))]
    write_jsonl(file, objects)
    printed = command(f"--workdir={workdir}", f"--selected={tmp_path / 'kept.jsonl'}", "--keep=1")
    assert "field 'id' is kept as 'original_id'" in printed and "field 'masked' is kept as 'original_masked'" in printed
    of_question = {row["question"]: row["id"] for row in objects}
    assert all(row["original_id"] == of_question[row["question"]] for row in read_jsonl(tmp_path / "kept.jsonl"))


@pytest.mark.parametrize("name", ["kept.jsonl", "kept.parquet"])
def test_resampled(finished, tmp_path, name):
    """Of the kept rows, each as often as n w / Σw, rounded up or down."""
    out, plain = tmp_path / name, tmp_path / "plain.jsonl"
    command(f"--workdir={finished}", f"--selected={plain}", "--keep=0.5")
    weights = {row["id"]: row["weight"] for row in read_jsonl(plain)}
    printed = command(f"--workdir={finished}", f"--selected={out}", "--keep=0.5", "--resampled", "--seed=3")
    rows = read_jsonl(out) if name.endswith("jsonl") else pyarrow.parquet.read_table(out).to_pylist()
    assert len(rows) == len(weights) and not any("weight" in row for row in rows)
    counts = {row_id: sum(row["id"] == row_id for row in rows) for row_id in weights}
    assert sum(counts.values()) == len(rows) and f"{sum(map(bool, counts.values()))} of them are in the file" in printed
    for row_id, weight in weights.items():
        assert abs(counts[row_id] - len(rows) * weight / sum(weights.values())) < 1
    card = out.with_name(f"{out.name}.card.md").read_text()
    assert "Do not weight them again" in card and "`weight` (" not in card and "`id` (" in card


def test_data_card(finished, data, tmp_path):
    command(f"--workdir={finished}", f"--selected={tmp_path / 'kept.jsonl'}", "--keep=0.5")
    card = (tmp_path / "kept.jsonl.card.md").read_text()
    kept = read_jsonl(tmp_path / "kept.jsonl")
    number, left = TRAINED, len(kept)
    for line in (f"| all | {number} |", f"| kept | {left} |", f"| dropped | {number - left} |"):
        assert line in card
    assert f"| sums-2 | {number} | {left} | {number - left} | {left / number:.1%} |" in card
    bad = {row["question"]: row["bad"] for row in read_jsonl(data / "lower.jsonl")}
    assert f"{np.mean([bad[row['question']] for row in kept]):.1%} of the kept rows" in card
    w = np.array([row["weight"] for row in kept])
    summary = json.loads((finished / "summary.json").read_text())
    assert f"| {summary['selector/ess']:.4f} |" in card  # of all, as the run measured it
    assert f"| {w.min():.3g} |" in card and f"| {np.median(w):.3g} |" in card
    assert f"| {w.max():.3g} | {w.sum() ** 2 / len(w) / (w**2).sum():.4f} |" in card
    assert hashlib.sha256((finished / "config.json").read_bytes()).hexdigest() in card
    assert front_matter(card)["license"] == "unknown"


# --------------------------------------------------------------------------------------------------------------------
# Merged models
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_merged_and_selected_in_a_process(finished, neox, tmp_path):
    merged = tmp_path / "merged"
    done = run(f"--workdir={finished}", f"--merged={merged}", f"--selected={tmp_path / 'kept.jsonl'}")
    assert done.returncode == 0, done.stderr
    model, base = huggingface.load_model(str(neox))
    model, adapter = huggingface.load_adapter(finished / "adapter", model)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (2, 24))
    expected = decoder.logits(model, base, adapter, tokens)
    again, params = huggingface.load_model(str(merged))
    logits = np.asarray(decoder.logits(again, params, None, tokens))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    assert np.abs(logits - decoder.logits(model, base, None, tokens)).max() > 1e-2  # the adapter is in it
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (merged / name).read_bytes() == (neox / name).read_bytes()

    card = (merged / "README.md").read_text()
    assert front_matter(card)["library_name"] == "transformers" and "base_model" not in front_matter(card)
    summary = json.loads((finished / "summary.json").read_text())
    assert f"| trusted rows | {summary['start/upper_loss']:.4f} | {summary['eval/upper_loss']:.4f} |" in card
    for text in (card, (tmp_path / "kept.jsonl.card.md").read_text()):
        assert f"`python -m bilevel_jax.export --workdir={finished} --merged={merged} --selected=" in text

    done = run(f"--workdir={finished}", f"--merged={merged}")
    assert done.returncode == 1 and done.stderr == f"error: {merged} exists already; give another directory\n"


# --------------------------------------------------------------------------------------------------------------------
# Refusals
# --------------------------------------------------------------------------------------------------------------------


def _changed_data(workdir, file):
    write_jsonl(file, make_rows(NUM_LOWER, seed=9))


def _unfinished(workdir, file):
    (workdir / "summary.json").unlink()


def _no_weights(workdir, file):
    shutil.rmtree(workdir / "weights")


def _mixing(workdir, file):
    _no_weights(workdir, file)
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(config | {"method": "mixing"}))


def _gone(workdir, file):
    file.unlink()


def _offline(workdir, file):
    pass


def _no_model(workdir, file):
    config = json.loads((workdir / "config.json").read_text())
    config["model"]["path"] = "/absent/model"
    (workdir / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "spoil, more, reason",
    [
        (_changed_data, [], "match no row"),
        (_unfinished, [], "no finished run"),
        (_no_weights, [], "it was removed"),
        (_mixing, [], "selects nothing"),
        (_mixing, ["--score_new=new.jsonl"], "selects nothing"),
        (_gone, [], "no such file"),
        (_offline, ["--refined"], "method=offline generates nothing"),
        (_no_model, [], "/absent/model"),
        (_no_model, ["--format=original", "--merged={}"], "/absent/model"),
    ],
)
def test_refuses_runs(copied, tmp_path, spoil, more, reason):
    spoil(*copied)
    out = tmp_path / "out"
    out.mkdir()
    more = [flag.format(out / "merged") for flag in more]
    with pytest.raises((ValueError, OSError), match=reason) as caught:
        command(f"--workdir={copied[0]}", f"--selected={out / 'kept.jsonl'}", *more)
    assert "\n" not in str(caught.value)
    assert not [file for file in out.iterdir() if not file.name.startswith("kept")]
    assert (out / "kept.jsonl").exists() == ("--format=original" in more)


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--selected=kept.csv"], ".parquet"),
        (["--selected=kept.jsonl", "--keep=1.5"], "--keep"),
        (["--selected=kept.jsonl", "--keep=0"], "--keep"),
        (["--selected=kept.jsonl", "--drop_dissimilar=-0.1"], r"--drop_dissimilar=-0.1 must be in \[0, 1\)"),
        (["--selected=kept.jsonl", "--drop_implausible=1"], r"--drop_implausible=1.0 must be in \[0, 1\)"),
        (["--selected=kept.jsonl", "--drop_implausible=-0.1"], "--drop_implausible=-0.1 must be in"),
        (["--selected=kept.jsonl", "--drop_implausible=nan"], "--drop_implausible=nan must be in"),
        (["--merged=m", "--drop_implausible=0.1"], "--drop_implausible goes with --selected"),
        (["--selected=kept.jsonl", "--score_new=new.jsonl", "--drop_implausible=0.1"], "--drop_implausible has no numbers"),
        ([], "--selected=FILE.jsonl, --merged=DIR or both"),
        (["--merged=m", "--resampled"], "--resampled goes with --selected"),
        (["--selected=kept.jsonl", "--seed=1"], "--seed goes with --resampled"),
        (["--merged=m", "--refined"], "--refined goes with --selected"),
        (["--selected=kept.jsonl", "--columns=question:query"], "--columns goes with --score_new"),
        (["--selected=kept.jsonl", "--dtype=bfloat16"], "--dtype goes with --merged"),
        (["--merged=m", "--score_new=new.jsonl"], "--score_new goes with --selected"),
        (["--selected=kept.jsonl", "--score_new=new.jsonl", "--refined"], "never saw"),
        (["--selected=kept.jsonl", "--score_new=new.jsonl"], "selection.parameterization=features"),
    ],
)
def test_refuses_flags(finished, arguments, reason):
    with pytest.raises(ValueError, match=reason):
        command(f"--workdir={finished}", *arguments)


def test_refuses_to_replace_what_the_run_wrote_or_read(copied):
    workdir, rows = copied
    table = next((workdir / "weights").glob("epoch_*.parquet"))
    metrics = workdir / "weights" / ".." / "metrics.jsonl"
    for file, reason in (
        (table, "has the name of a file of the run"),
        (metrics, "has the name of a file of the run"),
        (rows, f"is a file of {re.escape(str(rows))}, which would be overwritten"),
    ):
        before = file.read_bytes()
        with pytest.raises(ValueError, match=f"^--selected=.*{file.name} {reason}"):
            command(f"--workdir={workdir}", f"--selected={file}")
        assert file.read_bytes() == before
    for name in ("responses.jsonl", "weights/epoch_80.parquet"):  # later commands would read them
        with pytest.raises(ValueError, match=f"{name} has the name of a file of the run"):
            command(f"--workdir={workdir}", f"--selected={workdir / name}")
        assert not (workdir / name).exists()


def test_errors_are_one_line():
    done = run("--selected=kept.jsonl")
    assert done.returncode == 2 and "workdir" in done.stderr and done.stderr.count("\n") == 1
    with pytest.raises(FileNotFoundError, match="no finished run") as error:
        command("--workdir=absent", "--selected=kept.jsonl")
    assert "\n" not in str(error.value)

"""The cache of prepared rows: what names an entry, interruptions, damage, several processes, unusable directories."""

import errno
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest

from bilevel_jax import errors
from bilevel_jax.data import parts, rows, templates
from bilevel_jax.data.columns import Columns
from bilevel_jax.data.prepared import cache, preparation, sequences, shards, stored, workers
from bilevel_jax.data.rejections import DataError
from tests.conftest import EVERYTHING, TRAINED, make_rows, stop_at, train_without_report, write_jsonl
from tests.data.test_templates import CHATTING, PLAIN, make_tokenizer

OPTIONS = cache.Options(template="auto", learn="all", preference=False, columns="", num_rows=0, seed=0, label="bad")


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(preparation, "CHUNK_ROWS", 10)
    monkeypatch.setattr(preparation, "num_processes", lambda: 1)


@pytest.fixture
def source(tmp_path):
    return str(write_jsonl(tmp_path / "rows.jsonl", make_rows(45, 0, bad_every=4)))


def open_rows(folder, source, tokenizer=PLAIN, **changes):
    return cache.open_rows(str(folder), source, tokenizer, OPTIONS._replace(**changes), Columns(changes.get("columns", "")))


def entries(folder) -> list[pathlib.Path]:
    return sorted(path for path in pathlib.Path(folder).iterdir() if path.is_dir())


@pytest.fixture
def made(monkeypatch):
    """The files of the shards that are prepared."""
    names: list[str] = []
    run = workers.run

    def counted(task, encode_rows):
        names.append(task.file.name)
        return run(task, encode_rows)

    monkeypatch.setattr(workers, "run", counted)
    return names


SHARDS = [f"{number:06}.arrow" for number in range(5)]  # of 45 rows


# --------------------------------------------------------------------------------------------------------------------
# Names
# --------------------------------------------------------------------------------------------------------------------


def test_the_same_content_is_prepared_once(tmp_path, source, made):
    first, report = open_rows(tmp_path / "cache", source)
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(pathlib.Path(source).read_bytes())
    second, other_report = open_rows(tmp_path / "cache", str(copy))
    assert made == SHARDS and len(entries(tmp_path / "cache")) == 1
    assert list(sequences.rows_of(first)) == list(sequences.rows_of(second)) == rows.read_rows(source)[0]
    assert (report.path, other_report.path) == (source, str(copy)) and report.num_rows == other_report.num_rows == 45


def test_content_counts_and_no_time_stamp(tmp_path, source):
    """Another content of the same size with the same time stamp is another entry."""
    before, file = os.stat(source), pathlib.Path(source)
    first, _ = open_rows(tmp_path / "cache", source)
    changed = file.read_text(encoding="utf-8").replace("make", "mark", 1)
    file.write_text(changed, encoding="utf-8")
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(source).st_size == before.st_size and os.stat(source).st_mtime_ns == before.st_mtime_ns
    second, _ = open_rows(tmp_path / "cache", source)
    assert len(entries(tmp_path / "cache")) == 2
    truths = [[row.fields["truth"] for row in sequences.rows_of(one)] for one in (first, second)]
    assert truths[0] != truths[1] and any("mark" in text for text in truths[1])


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer": CHATTING},
        {"tokenizer": make_tokenizer(chat="{% for m in messages %}{{ m.content }}{% endfor %}")},
        {"tokenizer": make_tokenizer(pad_token="<|endoftext|>", eos_token="<s>")},
        {"learn": "last"},
        {"template": "alpaca"},
        {"num_rows": 12},
        {"columns": "system:source"},
    ],
)
def test_options_that_matter(tmp_path, source, changes):
    open_rows(tmp_path / "cache", source)
    open_rows(tmp_path / "cache", source, **changes)
    assert len(entries(tmp_path / "cache")) == 2


def test_options_that_do_not_matter(tmp_path, source, made):
    """The seed decides on subsets alone. Another label is read from the rows."""
    open_rows(tmp_path / "cache", source)
    store, _ = open_rows(tmp_path / "cache", source, template="human", seed=7, label="truth")
    assert made == SHARDS and len(entries(tmp_path / "cache")) == 1
    expected = [(rows.mark(row, "bad"), rows.mark(row, "truth")) for row in rows.read_rows(source)[0]]
    marked = sequences.rows_of(store)
    assert list(zip(marked.marks("bad").tolist(), marked.marks("truth").tolist())) == expected


def test_small_sources_and_others_are_not_cached(tmp_path, source, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    missing = str(tmp_path / "missing.jsonl")
    for name, setting in ((source, "auto"), (source, "off"), ("synthetic:lower", str(tmp_path / "cache")), (missing, "auto")):
        assert open_rows(setting, name) is None
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(cache, "SMALL", 1000)
    store, _ = open_rows("auto", source)
    assert len(store) == 45 and (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_default_directory(monkeypatch):
    monkeypatch.delenv(cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    assert cache.directory("auto") == pathlib.Path("/some/cache/bilevel_jax/rows") and cache.directory("a/b") == pathlib.Path("a/b")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.directory("auto") == pathlib.Path.home() / ".cache/bilevel_jax/rows"


# --------------------------------------------------------------------------------------------------------------------
# Interruptions
# --------------------------------------------------------------------------------------------------------------------


def fail_at(monkeypatch, number: int, error: BaseException):
    """The shard `number` cannot be prepared."""
    write = workers.files.write_atomically

    def fail(file, content):
        if file.name == SHARDS[number]:
            raise error
        write(file, content)

    monkeypatch.setattr(workers.files, "write_atomically", fail)


def test_an_interrupted_preparation_goes_on(tmp_path, source, made, monkeypatch):
    with monkeypatch.context() as interrupted:
        fail_at(interrupted, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            open_rows(tmp_path / "cache", source)
    assert made == SHARDS[:4]
    made.clear()
    store, _ = open_rows(tmp_path / "cache", source)
    assert made == SHARDS[3:] and list(sequences.rows_of(store)) == rows.read_rows(source)[0]


def test_an_interrupted_preparation_with_other_labels_starts_again(tmp_path, source, made, monkeypatch):
    """Shards hold the marks of one field of labels."""
    with monkeypatch.context() as interrupted:
        fail_at(interrupted, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            open_rows(tmp_path / "cache", source, label="bad")
    made.clear()
    store, _ = open_rows(tmp_path / "cache", source, label="source")  # a text, which marks every row
    assert made == SHARDS and (sequences.rows_of(store).marks("source") == 1).all()


def test_a_disk_that_fills(tmp_path, source, made, monkeypatch):
    with monkeypatch.context() as full:
        fail_at(full, 2, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with pytest.raises(DataError, match="cache/.*: No space left on device; what is prepared is kept.*data.cache") as error:
            open_rows(tmp_path / "cache", source)
    assert "\n" not in str(error.value)
    made.clear()
    assert len(open_rows(tmp_path / "cache", source)[0]) == 45 and made == SHARDS[2:]


def test_a_source_that_changes_while_it_is_read(tmp_path, source, monkeypatch):
    write = workers.files.write_atomically

    def change(file, content):
        with open(source, "a") as out:
            out.write("\n")
        write(file, content)

    monkeypatch.setattr(workers.files, "write_atomically", change)
    with pytest.raises(DataError, match="rows.jsonl: it changed while it was read; start again"):
        open_rows(tmp_path / "cache", source)
    assert not entries(tmp_path / "cache")


# --------------------------------------------------------------------------------------------------------------------
# Damage
# --------------------------------------------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "message", "again"),
    [
        (SHARDS[1], cut, r"000001.arrow: \d+ bytes in place of \d+; its rows are prepared again", SHARDS[1:2]),
        (SHARDS[1], pathlib.Path.unlink, "000001.arrow: it is missing; its rows are prepared again", SHARDS[1:2]),
        (stored.INDEX, flip, "index.arrow: it is damaged; its rows are prepared again", []),
        (stored.INDEX, pathlib.Path.unlink, "index.arrow: it is missing", []),
        (cache.MANIFEST, cut, "its manifest is damaged", []),
        (cache.MANIFEST, lambda path: path.write_text('{"shards": 1}'), "its manifest is damaged", []),
        (cache.JOB, cut, "its manifest is damaged", SHARDS),
    ],
)
def test_damage_is_repaired(tmp_path, source, made, capsys, name, damage, message, again):
    open_rows(tmp_path / "cache", source)
    damage(entries(tmp_path / "cache")[0] / name)
    made.clear()
    capsys.readouterr()
    store, _ = open_rows(tmp_path / "cache", source)
    assert made == again and list(sequences.rows_of(store)) == rows.read_rows(source)[0]
    assert re.search(message, capsys.readouterr().out)


def test_a_damaged_shard_is_noticed_when_it_is_used(tmp_path, source, made):
    open_rows(tmp_path / "cache", source)
    flip(entries(tmp_path / "cache")[0] / SHARDS[2])
    made.clear()
    store, _ = open_rows(tmp_path / "cache", source)
    assert len(sequences.rows_of(store)[19].response) and not made
    with pytest.raises(DataError, match="000002.arrow: it is damaged; start again: its rows are then prepared again"):
        sequences.rows_of(store)[20]
    store, _ = open_rows(tmp_path / "cache", source)
    assert made == SHARDS[2:3] and list(sequences.rows_of(store)) == rows.read_rows(source)[0]


def test_another_damaged_shard_is_noticed_while_one_is_repaired(tmp_path, source, made):
    open_rows(tmp_path / "cache", source)
    (entry,) = entries(tmp_path / "cache")
    cut(entry / SHARDS[0])
    flip(entry / SHARDS[3])
    made.clear()
    assert list(sequences.rows_of(open_rows(tmp_path / "cache", source)[0])) == rows.read_rows(source)[0]
    assert made == [SHARDS[0], SHARDS[3]]


def test_an_entry_of_another_version(tmp_path, source, made, monkeypatch, capsys):
    with monkeypatch.context() as earlier:
        earlier.setattr(cache, "version", lambda: "0")
        open_rows(tmp_path / "cache", source)
    made.clear()
    store, _ = open_rows(tmp_path / "cache", source)
    assert "it is of another version of the package or its libraries; its rows are prepared again" in capsys.readouterr().out
    assert made == SHARDS and len(store) == 45


# --------------------------------------------------------------------------------------------------------------------
# Directories
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [errno.EACCES, errno.EROFS])
def test_a_directory_that_cannot_be_written(tmp_path, source, monkeypatch, capsys, error):
    def refuse(path, *args, **options):
        raise OSError(error, os.strerror(error), str(path))

    monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    assert open_rows(tmp_path / "cache", source) is None
    expected = (
        f"{source}: its rows are not cached: {tmp_path}/cache: {os.strerror(error)}; data.cache=DIR names another directory\n"
    )
    assert capsys.readouterr().out == expected


def test_a_directory_that_can_only_be_read(tmp_path, source, monkeypatch):
    """An entry that is there is used."""
    open_rows(tmp_path / "cache", source)
    monkeypatch.setattr(pathlib.Path, "mkdir", lambda path, **options: 1 / 0)
    monkeypatch.setattr(cache, "_locked", lambda path, name: 1 / 0)
    assert len(open_rows(tmp_path / "cache", source)[0]) == 45


def test_a_default_directory_of_somebody_else(tmp_path, source, monkeypatch, capsys):
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SMALL", 0)
    with monkeypatch.context() as other:
        other.setattr(os, "geteuid", lambda: os.getuid() + 1)
        assert open_rows("auto", source) is None
    assert "cache is a link, or belongs to another user; remove it, or name another directory" in capsys.readouterr().out
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "link"))
    assert open_rows("auto", source) is None


def test_rows_that_cannot_be_stored(tmp_path, source, monkeypatch, capsys):
    def refuse(value):
        raise shards.Unstorable("values of type Image")

    monkeypatch.setattr(shards, "dump", refuse)
    assert open_rows(tmp_path / "cache", source) is None
    assert capsys.readouterr().out.endswith(f"{source}: its rows are not cached: values of type Image\n")


def test_a_tokenizer_without_a_file(tmp_path, source, capsys):
    assert open_rows(tmp_path / "cache", source, types.SimpleNamespace(is_fast=False)) is None
    assert "its rows are not cached: the tokenizer has no tokenizer.json" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------------------
# Several processes
# --------------------------------------------------------------------------------------------------------------------


def test_two_preparations_at_once(tmp_path, source, made, monkeypatch, capsys):
    """The second one waits for the first, and uses what it made."""
    monkeypatch.setattr(cache, "WAIT", 0.01)
    started, waits, results = threading.Event(), threading.Event(), []
    make, sleep = workers.run, time.sleep

    def slow(task, encode_rows):
        started.set()
        assert waits.wait(60)
        return make(task, encode_rows)

    def waiting(seconds):
        waits.set()
        sleep(seconds)

    monkeypatch.setattr(workers, "run", slow)
    monkeypatch.setattr(cache.time, "sleep", waiting)
    first = threading.Thread(target=lambda: results.append(open_rows(tmp_path / "cache", source)))
    first.start()
    assert started.wait(60)
    results.append(open_rows(tmp_path / "cache", source))
    first.join()
    assert made == SHARDS and [len(store) for store, _ in results] == [45, 45]
    assert f"{source}: waiting for another process, which prepares its rows" in capsys.readouterr().out


@pytest.fixture
def saved_tokenizer(tmp_path):
    CHATTING.save_pretrained(tmp_path / "tokenizer")
    return templates.load_tokenizer(str(tmp_path / "tokenizer"))


def test_several_processes(tmp_path, source, saved_tokenizer, monkeypatch, made):
    """They give the same files as this process. A tokenizer that was changed after it was loaded is used by this process alone."""
    open_rows(tmp_path / "one", source, saved_tokenizer)
    assert made == SHARDS
    monkeypatch.setattr(preparation, "num_processes", lambda: 2)
    made.clear()
    open_rows(tmp_path / "two", source, saved_tokenizer)
    (one,), (two,) = entries(tmp_path / "one"), entries(tmp_path / "two")
    assert 0 < len(made) < len(SHARDS) and one.name == two.name  # the others are made by the other process
    for name in (*SHARDS, stored.INDEX, cache.MANIFEST):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    saved_tokenizer.chat_template += "!"
    made.clear()
    store, _ = open_rows(tmp_path / "two", source, saved_tokenizer)
    assert sorted(made) == SHARDS and saved_tokenizer.decode(sequences.rows_of(store).examples()[0].prompt).endswith("!")


def test_a_process_that_fails(tmp_path, source, saved_tokenizer, monkeypatch):
    """Its error is raised here; no process is left."""
    monkeypatch.setattr(preparation, "num_processes", lambda: 2)
    with open(source, "a") as out:
        out.write(json.dumps({"question": "odd", "response": "fine"}) + "\n")
    saved_tokenizer.chat_template = "{% for m in messages %}{{ 1 / 0 if m.content == 'odd' else m.content }}{% endfor %}"
    saved_tokenizer.save_pretrained(tmp_path / "refuses")
    tokenizer = templates.load_tokenizer(str(tmp_path / "refuses"))
    processes = []
    start = subprocess.Popen

    def started(*args, **options):
        processes.append(start(*args, **options))
        return processes[-1]

    monkeypatch.setattr(workers.subprocess, "Popen", started)
    with pytest.raises(ValueError, match="the chat template refuses the row of line 46 .*: division by zero"):
        open_rows(tmp_path / "cache", source, tokenizer)
    assert len(processes) == 1 and processes[0].poll() is not None


def test_a_process_that_is_killed(tmp_path, source, saved_tokenizer, monkeypatch):
    worker = workers._Worker()
    try:
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(
            DataError, match="ended with status -9, perhaps for lack of memory; the same command goes on from there"
        ):
            worker.run(workers.Task(None, None, None))
    finally:
        worker.end()


def test_processes_import_no_jax():
    program = "import sys; from bilevel_jax.data.prepared import workers; import transformers; print('jax' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(workers.ROOT)}
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment).stdout
    assert printed == "False\n"


def test_chunks_of_small_sources_are_smaller(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "CHUNK_ROWS", 100)
    monkeypatch.setattr(preparation, "CHUNK_BYTES", (300, 500))
    sizes = {}
    for number in (10, 60, 100):  # lines of 100 bytes
        file = tmp_path / f"{number}.jsonl"
        file.write_text((json.dumps({"question": "x" * 70, "response": "y"}).ljust(99) + "\n") * number)
        described = preparation.Source(str(file), parts.resolve(str(file)), None, 0, 0)
        sizes[number] = [len(chunk) for chunk in preparation._chunks(described)]
    assert sizes[10] == [3, 3, 3, 1] and sizes[60] == [4] * 15 and sizes[100] == [5] * 20  # at least 300 bytes, a 16th, at most 500


def test_numbers_of_copies():
    contents = np.array([3, 5, 3, 9, 5, 3], np.uint64)
    assert preparation._copies(contents).tolist() == [1, 1, 2, 1, 2, 3]
    assert preparation._copies(contents[:0]).tolist() == []


def test_a_run_of_prepared_rows(make_config, finished, tmp_path, monkeypatch):
    """It is interrupted, and goes on with rows in memory: the same bits as a run that had them in memory from the start."""
    prepared = {"data.cache": str(tmp_path / "cache")}
    with monkeypatch.context() as stopped:
        stop_at(stopped, 5)
        with pytest.raises(errors.Interrupted):
            train_without_report(make_config(EVERYTHING | prepared), tmp_path / "run")
    assert len(entries(tmp_path / "cache")) == 2
    train_without_report(make_config(EVERYTHING | {"data.cache": "off"}), tmp_path / "run")
    for name in TRAINED:
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()

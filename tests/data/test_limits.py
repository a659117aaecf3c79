"""Templates that do not end, files that unpack to much, tokenizers that fail in Rust: one line of error, after a short time."""

import copy
import gzip
import os
import shutil
import signal
import threading
import time

import pyarrow as pa
import pyarrow.parquet
import pytest

from bilevel_jax.data import limits, readers, rows, templates, tokenization
from bilevel_jax.models import huggingface
from tests.conftest import load, make_rows, write_jsonl

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
ENDLESS = {
    LOOP: "takes more than 0.3 seconds",
    "{{ '%1000000000d' % 1 }}": "MemoryError",
    "{{ 'a' * 10 ** 11 }}": "MemoryError",
    "{{ '%70000d' % 1 }}": "writes 70000 characters, more than 65536",
}


@pytest.fixture
def encode(neox, monkeypatch):
    """Tokenizes rows with a chat template; returns the error."""
    monkeypatch.setattr(limits, "SECONDS", 0.3)
    monkeypatch.setattr(limits, "MAX_TEXT", 1 << 16)
    tokenizer = copy.copy(load(neox)[3])
    read, _ = rows.collect(rows.parse(enumerate(make_rows(3, 0), 1)), "rows")

    def encode(template):
        tokenizer.chat_template = template
        with pytest.raises((ValueError, OSError)) as caught:
            templates.encode(read, tokenizer, template="chat")
        return str(caught.value)

    return encode


@pytest.mark.parametrize("template", ENDLESS)
def test_templates(encode, template):
    began = time.monotonic()
    message = encode(template)
    assert "\n" not in message and "chat template" in message and pytest.approx(0, abs=5) == time.monotonic() - began
    assert ENDLESS[template] in message


def test_a_time_limit_leaves_other_timers_alone():
    """Those of the handler of SIGALRM before it, and the limit of memory."""
    before = signal.getsignal(signal.SIGALRM), limits.resource.getrlimit(limits.resource.RLIMIT_AS)
    signal.setitimer(signal.ITIMER_REAL, 100)
    with limits.limited(0.5):
        pass
    assert 99 < signal.setitimer(signal.ITIMER_REAL, 0)[0] <= 100
    assert (signal.getsignal(signal.SIGALRM), limits.resource.getrlimit(limits.resource.RLIMIT_AS)) == before


def test_each_of_many_renderings_has_the_time_and_memory_to_itself(monkeypatch):
    """Together they take more than one may; what they wrote before does not count."""
    monkeypatch.setattr(limits, "SECONDS", 1.0)
    monkeypatch.setattr(limits, "MEMORY", 1 << 28)

    class Tokenizer:
        def apply_chat_template(self, messages, tokenize):
            time.sleep(messages)
            return "x" * (1 << 23)

    with limits.many():
        texts = [limits.render(Tokenizer(), seconds) for seconds in (0.3, 0.3, 0.3, 0.3, *[0] * 36)]  # 320 MB
        assert len(texts) == 40 and signal.getitimer(signal.ITIMER_REAL) == (0, 0)  # no limit between them
        with pytest.raises(limits.LimitError, match="more than 1 seconds"):
            limits.render(Tokenizer(), 60)


def test_other_threads_have_no_limit():
    thread = threading.Thread(target=lambda: limits.limited(0.0).__enter__())
    thread.start()
    thread.join()


def test_a_failing_tokenizer(neox):
    """Errors of Rust are no `Exception`."""
    panic = type("PanicException", (BaseException,), {})

    class Tokenizer:
        name_or_path = "evil"

        def __call__(self, texts, **options):
            raise panic("called `Option::unwrap()` on a `None` value\nnote: run with RUST_BACKTRACE=1")

    with pytest.raises(ValueError, match="the tokenizer 'evil' failed on 1 texts: called .*value$"):
        tokenization.tokenize(Tokenizer(), ["a"])


def test_a_catastrophic_regular_expression(neox, tmp_path):
    """The real error of the library."""
    import tokenizers

    directory = shutil.copytree(neox, tmp_path / "model")
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    pattern = tokenizers.Regex(r"(x+x+)+y|(.*)*\1z")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, "isolated")
    tokenizer.save(str(directory / "tokenizer.json"))
    loaded = templates.load_tokenizer(str(directory))
    objects = [{"question": "x" * 40, "response": "r"}]
    read, _ = rows.collect(rows.parse(enumerate(objects, 1)), "rows")
    with pytest.raises(ValueError, match="the tokenizer .* failed on 1 texts") as caught:
        templates.encode(read, loaded, template="none")
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


def count(file) -> int:
    return sum(1 for _ in readers.read_objects(str(file)))


@pytest.mark.parametrize("is_dictionary", [True, False])
def test_parquet_that_unpacks_to_much(tmp_path, monkeypatch, is_dictionary):
    """A few kB that stand for 64 MB: one text, many times. Its type in Arrow is that of a dictionary, or of a text."""
    monkeypatch.setattr(limits, "FREE", 1 << 24)
    index = pa.array([0] * 256, pa.int32())
    column = pa.DictionaryArray.from_arrays(index, pa.array(["x" * (1 << 18)]))
    column = column if is_dictionary else column.dictionary_decode()
    file = tmp_path / "bomb.parquet"
    pyarrow.parquet.write_table(pa.table({"question": column, "response": ["r"] * len(index)}), file, compression="zstd")
    assert file.stat().st_size < 40_000
    with pytest.raises(rows.DataError, match="bomb.parquet: it unpacks to more than 200 times its size and more than 16 MB"):
        count(file)


@pytest.mark.parametrize("ending", [b"\n", b""])
def test_packed_zeros(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(limits, "FREE", 1 << 20)
    file = tmp_path / "bomb.jsonl.gz"
    file.write_bytes(gzip.compress((b'{"a": 1}' + ending) * (1 << 18)))
    with pytest.raises(rows.DataError, match="bomb.jsonl.gz: it unpacks to more than"):
        count(file)


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_long_lines(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(limits, "MAX_ROW", 1000)
    file = tmp_path / f"long.{suffix}"
    file.write_text("question,response\n" * 2 + "q" * 1001 + ",r\n" if suffix == "csv" else '{}\n{}\n{"question": ' + " " * 1001)
    with pytest.raises(rows.DataError, match=r"long\.\w+:[23]: a line of more than"):
        count(file)


def test_large_json(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MAX_JSON", 1000)
    (tmp_path / "large.json").write_text("[" + " " * 1000 + "]")
    with pytest.raises(rows.DataError, match="large.json: over .*, too much to be read as a whole; write it as JSON Lines"):
        count(tmp_path / "large.json")


def test_ordinary_packed_files_are_read(tmp_path):
    lines = write_jsonl(tmp_path / "rows.jsonl", make_rows(500, 0)).read_bytes()
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines))
    assert count(tmp_path / "rows.jsonl.gz") == 500


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "merges.txt"])
def test_a_pipe_in_a_model_directory(neox, tmp_path, name):
    directory = shutil.copytree(neox, tmp_path / "model")
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)
    with pytest.raises(huggingface.ModelError, match=f"{name}: not a regular file"):
        huggingface.locate(str(directory))
    (directory / name).unlink()
    (directory / name).symlink_to("/dev/zero")
    with pytest.raises(huggingface.ModelError, match=f"{name}: not a regular file"):
        huggingface.load_adapter(directory, huggingface.read_config(neox))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "rows.jsonl.gz"])
def test_a_pipe_or_device_as_data(tmp_path, name):
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(rows.DataError, match="not a regular file"):
        count(tmp_path / name)


def test_token_ids(neox):
    """The direct call of the library gives what the tokenizer gives, whatever an earlier call has set."""
    tokenizer = copy.copy(load(neox)[3])
    texts = ["Grüße ☃ nothing", "", "12 and 13 make 25<|end|>", " a"]
    expected = tokenizer(texts, add_special_tokens=False)["input_ids"]
    tokenizer(texts, truncation=True, max_length=2)
    assert tokenization.token_ids(tokenizer, texts) == expected and tokenization.token_ids(tokenizer, []) == []
    tokenizer.split_special_tokens = True
    assert tokenization.token_ids(tokenizer, texts) == tokenizer(texts, add_special_tokens=False)["input_ids"] != expected

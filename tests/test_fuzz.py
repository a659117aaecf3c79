"""Untrusted input: for any file, a reader returns its content or raises an expected error, and every lost row is counted.

`PROPERTIES` has a strategy and a check for each kind of file. Inputs that failed in the past are examples, and are tried first.
`pytest -m long tests/test_fuzz.py` generates more than 10 000 inputs.
"""

import contextlib
import copy
import csv
import gzip
import io
import json
import shutil
import types

import hypothesis
import ml_collections
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from absl import flags
from hypothesis import strategies as st
from ml_collections import config_flags

from bilevel_jax import checks, cli, errors, sampling
from bilevel_jax import config as configuration
from bilevel_jax.data import rows, templates
from bilevel_jax.export import kept_rows, records, selected_rows
from bilevel_jax.models import huggingface
from bilevel_jax.report import run_data
from bilevel_jax.runtime import metrics, response_log, weight_table
from bilevel_jax.runtime.workdir import read_config, refuse_another
from tests.conftest import make_rows

EXPECTED_ERRORS = (ValueError, OSError, errors.RunError)  # `cli.run` prints these as one line; all others keep their traceback
SECONDS = 10  # limit for one input; the slowest ones compile

# --------------------------------------------------------------------------------------------------------------------
# Strategies
# --------------------------------------------------------------------------------------------------------------------

ODD = ["", " ", "\n", "\x00", "\ud83d", "\u202e", "<|end|>", "{{", "{% x %}", "../../etc", "a\u2028b", "☃" * 9, "\ufeff", "1e400"]
TEXT = st.sampled_from(ODD) | st.text(max_size=12)
NUMBERS = st.integers(-3, 3) | st.sampled_from([2**31, 10**30, -(2**63) - 1, 0.5, 1e308, float("nan"), float("inf")])
SCALARS = st.none() | st.booleans() | NUMBERS | TEXT
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6)
CONTENT = st.sampled_from(["What?", "Add.\n1 + 1", "yes", *ODD])
ROLE = st.sampled_from(["user", "assistant", "system", "tool"])
CALLS = VALUES | st.just([{"function": {"name": "f", "arguments": "{}"}}])
TURN = st.fixed_dictionaries({"role": ROLE, "content": CONTENT | VALUES}, optional={"tool_calls": CALLS})
SHARED = st.fixed_dictionaries(
    {"from": st.sampled_from(["human", "gpt", "function_call", "observation"]), "value": CONTENT | VALUES}
)
NAMES = ["question", "response", "instruction", "input", "output", "prompt", "completion", "messages", "chosen", "rejected"]
NAMES += ["conversations", "tools"]
ROW = st.dictionaries(
    st.sampled_from([*NAMES, "system", "source"]), CONTENT | st.lists(TURN | SHARED, max_size=4) | VALUES, max_size=5
)
GOOD = st.fixed_dictionaries({"question": st.just("2 + 2?"), "response": CONTENT, "note": VALUES})
OFFSETS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=3)
DAMAGE = st.tuples(st.sampled_from(["flip", "cut", "insert"]), OFFSETS)


def to_json(value) -> str:
    return json.dumps(value, ensure_ascii=True)


def damaged(content: bytes, damage) -> bytes:
    """Flips bits of a few bytes, inserts bytes, or cuts off the end."""
    kind, offsets = damage
    changed = bytearray(content)
    for fraction, byte in offsets:
        offset = min(int(fraction * len(changed)), len(changed) - 1)
        if kind == "flip":
            changed[offset] ^= byte
        elif kind == "cut":
            return bytes(changed[:offset])
        else:
            changed[offset:offset] = bytes([byte])
    return bytes(changed)


def edited(value, changes):
    """A copy of JSON with some values replaced or removed, at any depth or at a key."""
    value = copy.deepcopy(value)
    for steps, new in changes:
        if isinstance(steps, str):
            value[steps] = new
            continue
        node, key = None, None
        for step in steps:
            inner = value if node is None else node[key]
            if not isinstance(inner, (dict, list)) or not inner:
                break
            node = inner
            key = list(inner)[step % len(inner)] if isinstance(inner, dict) else step % len(inner)
        if node is not None:
            if new == "remove":
                del node[key]
            else:
                node[key] = copy.deepcopy(new)
    return value


STEPS = st.lists(st.integers(0, 30), min_size=1, max_size=3)
EDITS = st.lists(st.tuples(STEPS, VALUES | st.just("remove")), min_size=1, max_size=3)


def attempt(function, *arguments, **options):
    """The result of the function, or None after an expected error."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            return function(*arguments, **options)
        except EXPECTED_ERRORS as error:
            assert str(error).strip(), f"{type(error).__name__} without a message"
            return None


# --------------------------------------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------------------------------------

MODES = ({}, {"preference": True}, {"questions_only": True})


def check_counts(path, number: int, at) -> None:
    """Rows and rejections add up to the number of objects, and examples and rejections to the number of rows."""
    for mode in MODES:
        items = attempt(lambda mode=mode: list(rows.iter_rows(path, **mode)))
        if items is None:
            continue
        assert len(items) == number
        kept = [item for item in items if isinstance(item, rows.Row)]
        assert all(item.reason.strip() and item.line > 0 for item in items if isinstance(item, rows.Rejection))
        assert len({row.id for row in kept}) == len(kept)
        collected = attempt(rows.collect, items, str(path))
        assert (collected is None) == (not kept)
        if not kept or "questions_only" in mode:
            continue
        _, statistics = collected
        assert statistics.num_rows + len(statistics.rejections) == number
        assert sum(count for count, _ in statistics.rejected.values()) == len(statistics.rejections)
        usable, fitting, changes = templates.fit(templates.encode(kept, at.tokenizer, template="human"), kept, 40)
        lost = sum(count for reason, (count, _) in changes.items() if "cut to" not in reason)
        assert len(usable) == len(fitting) == len(kept) - lost
        written = at.directory / "kept.jsonl"
        records.write(written, [dict(row.fields) for row in kept])
        assert len([json.loads(line) for line in written.read_bytes().splitlines()]) == len(kept)


def check_jsonl(at, lines):
    file = at.directory / "rows.jsonl"
    content = b"\n".join(line if isinstance(line, bytes) else to_json(line).encode() for line in lines)
    file.write_bytes(content)
    check_counts(file, sum(bool(line.strip()) for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n")), at)


def check_json(at, value):
    file = at.directory / "rows.json"
    file.write_text(to_json(value))
    if isinstance(value, list):
        check_counts(file, len(value), at)
    else:
        attempt(rows.read_rows, file)


def check_csv(at, case):
    """Written by the standard library, and damaged."""
    values, damage = case
    file = at.directory / "rows.csv"
    with open(file, "w", encoding="utf-8", errors="backslashreplace", newline="") as out:
        writer = csv.DictWriter(out, ["question", "response", "note"], quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(values)
    if damage:
        file.write_bytes(damaged(file.read_bytes(), damage))
        attempt(rows.read_rows, file)
    else:
        check_counts(file, len(values), at)


def check_compressed(at, case):
    """A stream that ends early or is damaged is an error of one line; the rows before it are not used."""
    suffix, damage = case
    content = at.data.read_bytes()
    packed = gzip.compress(content) if suffix == ".gz" else zstandard.compress(content)
    file = at.directory / f"rows.jsonl{suffix}"
    file.write_bytes(damaged(packed, damage))
    attempt(rows.read_rows, file)


def check_parquet(at, case):
    values, damage = case
    file, columns = at.directory / "rows.parquet", {}
    names = dict.fromkeys(name for value in values for name in value)
    for name in names:
        column = [value.get(name) for value in values]
        with contextlib.suppress(pa.ArrowException, OverflowError, UnicodeEncodeError):
            columns[name.encode(errors="replace").decode()] = pa.array(column)
    try:
        pyarrow.parquet.write_table(pa.table(columns or {"question": ["q"]}), file)
    except pa.ArrowNotImplementedError:  # Parquet has no objects without fields
        return
    if damage:
        file.write_bytes(damaged(file.read_bytes(), damage))
        attempt(rows.read_rows, file)
    elif columns:
        check_counts(file, len(values), at)


def check_parquet_types(at, array):
    """A column of a type that JSON does not have, next to valid columns."""
    size = len(array)
    file = at.directory / "typed.parquet"
    pyarrow.parquet.write_table(pa.table({"question": ["q"] * size, "response": ["r"] * size, "extra": array}), file)
    check_counts(file, size, at)


TYPED = [
    pa.array([b"\xff", None]),
    pa.array([2**62, 1], pa.timestamp("us")),
    pa.array([2**62, 1], pa.timestamp("ns", tz="UTC")),
    pa.array([0, 1], pa.timestamp("s", tz="Nowhere/Land")),
    pa.array([-(2**31), 1], pa.date32()),
    pa.array([2**40, 1], pa.duration("s")),
    pa.array([[("a", 1), ("a", 2)], None], pa.map_(pa.string(), pa.int64())),
    pa.array(["x", "y"]).dictionary_encode(),
    pa.array([{"a": [1]}, None]),
]

# --------------------------------------------------------------------------------------------------------------------
# Configs
# --------------------------------------------------------------------------------------------------------------------

KEYS = [f"{section}.{key}" for section, value in configuration.default().items() if hasattr(value, "keys") for key in value]
KEYS += ["seed", "method", "num_epochs", "lora", "unknown", "lora.unknown"]


def check_config(at, changes):
    config = configuration.default()
    with config.ignore_type(), config.unlocked():
        for key, value in changes:
            section, _, last = key.rpartition(".")
            owner = config[section] if section else config
            if isinstance(owner, ml_collections.ConfigDict):
                with contextlib.suppress(ValueError):  # keys with dots are not allowed
                    owner[last] = value
    attempt(checks.build, config)


def check_override(at, arguments):
    """Overrides on the command line: they give a config, or one line and status 2."""
    file = at.directory / "config.py"
    file.write_text("from bilevel_jax import config\nget_config = config.default\n")
    argv = ["main", f"--config={file}", *(f"--config.{key}={value}" for key, value in arguments)]
    flag_values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=flag_values, sys_argv=argv)
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        try:
            cli.parse(argv, flag_values)
        except SystemExit as error:
            assert error.code == 2 and printed.getvalue().startswith("error: ") and printed.getvalue().count("\n") == 1
        else:
            attempt(checks.build, flag_values["config"].value)


# --------------------------------------------------------------------------------------------------------------------
# Models, adapters, tokenizers
# --------------------------------------------------------------------------------------------------------------------


def check_model_config(at, changes):
    directory = at.directory / "described"
    directory.mkdir(exist_ok=True)
    for source in (at.neox, at.llama):
        content = edited(json.loads((source / "config.json").read_text()), changes)
        (directory / "config.json").write_text(to_json(content))
        config = attempt(huggingface.read_config, directory)
        if config is not None:
            attempt(huggingface.eos_ids, directory, at.tokenizer)
            attempt(huggingface.load_adapter, at.adapter, config)


def check_model_weights(at, case):
    """Damages any bytes of the file, or only its header."""
    damage, header = case
    directory = at.directory / "weighed"
    shutil.copytree(at.llama, directory, dirs_exist_ok=True)
    content = (at.llama / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    changed = damaged(content[:length], damage) + content[length:] if header else damaged(content, damage)
    (directory / "model.safetensors").write_bytes(changed)
    attempt(huggingface.load_params, directory, huggingface.read_config(directory))


def check_adapter(at, case):
    changes, damage = case
    directory = at.directory / "adapter"
    shutil.copytree(at.adapter, directory, dirs_exist_ok=True)
    content = json.loads((at.adapter / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(to_json(edited(content, changes) if changes else content))
    if damage:
        file = directory / "adapter_model.safetensors"
        file.write_bytes(damaged(file.read_bytes(), damage))
    loaded = attempt(huggingface.load_adapter, directory, huggingface.read_config(at.neox))
    if loaded is not None:
        assert np.isfinite(loaded[0].adapter_scale)


def check_safetensors(at, header):
    """A generated header."""
    directory = at.directory / "headed"
    shutil.copytree(at.adapter, directory, dirs_exist_ok=True)
    text = to_json(header).encode()
    (directory / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    attempt(huggingface.load_adapter, directory, huggingface.read_config(at.neox))


TENSOR = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "F8_E5M2", "I64", "BOOL", "F4", "U16", "F99"]),
        "shape": st.lists(st.sampled_from([0, 1, 2, 4, 8, 2**40, -1]), max_size=3),
        "data_offsets": st.lists(st.sampled_from([0, 1, 8, 16, 32, 64, 2**63]), min_size=1, max_size=3),
    }
)


def check_tokenizer(at, case):
    name, changes = case
    directory = at.directory / "tokenizer"
    shutil.copytree(at.neox, directory, dirs_exist_ok=True)
    file = directory / name
    content = json.loads(file.read_text())
    file.write_text(to_json(edited(content, changes)))
    tokenizer = attempt(templates.load_tokenizer, str(directory))
    if tokenizer is not None:
        for template in ("auto", "none"):
            attempt(templates.encode, at.rows, tokenizer, template=template)
            attempt(templates.encode, at.rows, tokenizer, template=template, eos=False)


def check_template(at, template):
    tokenizer = copy.copy(at.tokenizer)
    tokenizer.chat_template = template
    attempt(templates.encode, at.rows, tokenizer, template="auto")


PIECES = ["{% for m in messages %}", "{{ m['content'] }}", "{% endfor %}", "{{ m.role + 1 }}", "{{ 1 / 0 }}"]
PIECES += ["{{ raise_exception('no') }}", "{% if", "}}", "{{ range(10 ** 12) }}", "{{ ''.__class__.__mro__ }}", "{{ eos_token }}"]
PIECES += ["{{ messages | tojson }}", "{{ strftime_now('%Y') }}", "{% include 'x' %}", "{{ [1] | sum('a') }}", "{{ m() }}"]
PIECES += ["{{ messages[9].x.y }}", "a", "\n"]


def check_prompts(at, case):
    """The steps of the command `sample` before the model runs."""
    lines, template, numbers = case
    file = at.directory / "prompts.jsonl"
    file.write_text("\n".join(map(to_json, lines)))
    attempt(lambda: sampling.Settings(*numbers))
    items = attempt(lambda: list(rows.iter_rows(file, questions_only=True)))
    if items:
        prompts = [item for item in items if isinstance(item, rows.Row)]
        encoded = attempt(templates.encode, prompts, at.tokenizer, template=template, eos=False)
        assert encoded is None or len(encoded) == len(prompts)


# --------------------------------------------------------------------------------------------------------------------
# Files of a run
# --------------------------------------------------------------------------------------------------------------------


def check_weights(at, case):
    name, damage = case
    directory = at.directory / "run" / "weights"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    read, _ = rows.read_rows(at.data)
    file = directory / name
    weight_table.write(file, weight_table.table(read, np.arange(len(read)), np.ones(len(read)), np.zeros(len(read))))
    file.write_bytes(damaged(file.read_bytes(), damage))
    table = attempt(weight_table.latest, at.directory / "run")
    if table is not None:
        attempt(kept_rows.collect, at.directory / "run", configuration.default(), keep=0.5, form="original", new=(read, table))


ANSWER = {"step": 2, "id": "ab", "sample": 0, "text": "yes", "logprob": -1.5, "ratio": None, "finish_reason": "stop"}
EVENT = {"step": 2, "epoch": 0.5, "train/loss": 1.5}


def check_logs(at, lines):
    """Damaged responses and metrics of a run are exported, reported, and resumed from."""
    workdir = at.directory / "logs"
    shutil.rmtree(workdir, ignore_errors=True)
    workdir.mkdir()
    content = b"".join(line if isinstance(line, bytes) else to_json(line).encode() + b"\n" for line in lines)
    for name in ("responses.jsonl", "metrics.jsonl"):
        (workdir / name).write_bytes(content)
    (workdir / "config.json").write_text(configuration.default().to_json())
    attempt(selected_rows.latest_responses, workdir / "responses.jsonl")
    run = attempt(run_data.read, workdir)
    run_data.series(run.events, "train/loss")
    response_log.ResponseLog(workdir / "responses.jsonl", 9, 3).close()
    metrics.MetricsWriter(workdir, start=9, tensorboard=False, wandb="", config={}).close()
    remaining = [json.loads(line) for line in (workdir / "metrics.jsonl").read_bytes().split(b"\n")[:-1]]
    assert all(event["step"] <= 9 for event in remaining)
    num_broken = sum(isinstance(line, bytes) for line in lines)  # each may also break the next line
    assert remaining.count(EVENT) >= lines.count(EVENT) - num_broken


def check_run_config(at, content):
    workdir = at.directory / "configured"
    workdir.mkdir(exist_ok=True)
    (workdir / "config.json").write_bytes(content)
    attempt(read_config, workdir)
    attempt(refuse_another, configuration.default(), workdir)


# --------------------------------------------------------------------------------------------------------------------
# Tests
# --------------------------------------------------------------------------------------------------------------------

LINE = GOOD | ROW | VALUES | st.binary(max_size=12)
RECORD = st.sampled_from([ANSWER, EVENT])
RECORD = RECORD | st.builds(edited, RECORD, EDITS) | VALUES | st.binary(max_size=9)
OVERRIDE = st.tuples(st.sampled_from(KEYS) | TEXT, TEXT | NUMBERS)
HEADER = st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), TENSOR | VALUES, max_size=2)
DAMAGED = [[7], [[]], [{"step": "2"}], [EVENT | {"epoch": None}], [ANSWER, ANSWER | {"step": "3"}]]
PROPERTIES = {  # kind -> strategy, check, inputs in a short and a long run, inputs that failed in the past
    "jsonl": (st.lists(LINE, min_size=1, max_size=6), check_jsonl, 60, 2500, [[{"question": "q", "response": "r", "x": "\ud83d"}]]),
    "json": (st.lists(GOOD | ROW | VALUES, max_size=5) | VALUES | ROW, check_json, 40, 1500, []),
    "csv": (st.tuples(st.lists(GOOD, min_size=1, max_size=4), st.none() | DAMAGE), check_csv, 40, 1000, []),
    "compressed": (st.tuples(st.sampled_from([".gz", ".zst"]), DAMAGE), check_compressed, 40, 1000, []),
    "parquet": (st.tuples(st.lists(GOOD | ROW, min_size=1, max_size=4), st.none() | DAMAGE), check_parquet, 40, 1500, []),
    "parquet types": (st.sampled_from(TYPED), check_parquet_types, 10, 10, TYPED),
    "config": (st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=3), check_config, 60, 2000, []),
    "override": (st.lists(OVERRIDE, min_size=1, max_size=3), check_override, 30, 800, [[("data.upper[0]", "x")]]),
    "model config": (EDITS, check_model_config, 60, 1500, []),
    "model weights": (st.tuples(DAMAGE, st.booleans()), check_model_weights, 10, 300, []),
    "adapter": (st.tuples(st.none() | EDITS, st.none() | DAMAGE), check_adapter, 25, 600, []),
    "safetensors": (HEADER, check_safetensors, 40, 800, []),
    "tokenizer": (
        st.tuples(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]), EDITS),
        *(check_tokenizer, 15, 400, [("tokenizer_config.json", [("model_max_length", [])])]),
    ),
    "template": (st.lists(st.sampled_from(PIECES), max_size=5).map("".join) | VALUES, check_template, 40, 800, []),
    "prompts": (
        st.tuples(st.lists(GOOD | ROW, max_size=4), st.sampled_from(templates.TEMPLATES), st.tuples(*[NUMBERS] * 4)),
        *(check_prompts, 40, 800, []),
    ),
    "weights": (st.tuples(st.sampled_from(["epoch_1.parquet", "epoch_x.parquet"]), DAMAGE), check_weights, 30, 600, []),
    "logs": (st.lists(RECORD), check_logs, 40, 1000, DAMAGED),
    "run config": (VALUES.map(lambda x: to_json(x).encode()) | st.binary(max_size=9), check_run_config, 30, 500, []),
}


@pytest.fixture(scope="module")
def at(neox, llama, make_adapter, data, tmp_path_factory):
    """A scratch directory, models, rows and data for the checks."""
    directory = tmp_path_factory.mktemp("fuzz")
    read, _ = rows.collect(rows.parse(enumerate(make_rows(3, 0), 1)), "rows")
    return types.SimpleNamespace(
        directory=directory,
        neox=neox,
        llama=llama,
        adapter=make_adapter(neox, directory / "base_adapter"),
        tokenizer=templates.load_tokenizer(str(neox)),
        rows=read,
        data=data / "lower.jsonl",
    )


@pytest.mark.parametrize("long", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", PROPERTIES)
def test_untrusted(at, kind, long):
    strategy, check, few, many, examples = PROPERTIES[kind]
    for example in examples:
        check(at, example)
    options = {"max_examples": many if long else few, "deadline": 1000 * SECONDS, "database": None, "derandomize": not long}
    settings = hypothesis.settings(**options, suppress_health_check=list(hypothesis.HealthCheck))
    settings(hypothesis.given(strategy)(lambda value: check(at, value)))()


def test_the_long_run_is_long():
    assert sum(many for _, _, _, many, _ in PROPERTIES.values()) >= 10_000

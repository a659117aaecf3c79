"""Kept rows, their responses and columns, by hand; files read by `datasets.load_dataset`."""

import json

import datasets
import numpy as np
import pyarrow as pa
import pytest

from bilevel_jax.data import by_turn, rows, templates
from bilevel_jax.export import kept_rows, selected_rows
from bilevel_jax.export import records as exported
from bilevel_jax.runtime import weight_table
from bilevel_jax.runtime.workdir import read_config
from tests.conftest import HELD_OUT, NUM_LOWER, load, write_jsonl
from tests.data.test_templates import PLAIN
from tests.data.test_turns import both

TRAINED = NUM_LOWER - HELD_OUT
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Hey", "name": "me"},
]
MIXED = [
    {"question": "a?", "response": "b", "system": "S"},
    {"instruction": "Add.", "input": "1 2", "output": "3", "extra": {"deep": [1]}},
    {"prompt": "c ", "completion": "d", "note": None},
    {"messages": CHAT},
]


def parse(objects):
    return list(rows.parse(enumerate(objects, 1)))


def traits(parsed):
    result = selected_rows.Traits()
    for row in parsed:
        result.add(row)
    return result


def join(parsed, columns, reserved):
    """The rows with their columns, and the names of the renamed fields."""
    joined = exported.Records()
    for row, more in zip(parsed, columns, strict=True):
        joined.add(row.line, row.fields, more)
    renamed = joined.rename(reserved)
    return [*joined], renamed


def read(file, tmp_path):
    """The rows as `datasets` reads them."""
    kind = "parquet" if file.suffix == ".parquet" else "json"
    return datasets.load_dataset(kind, data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))


# --------------------------------------------------------------------------------------------------------------------
# Selection
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.8, 1.0])
def test_the_heaviest_rows_are_kept(finished, data, keep):
    table = weight_table.latest(finished)
    candidates, _ = rows.read_rows(data / "lower.jsonl")
    kept = [*kept_rows.collect(finished, read_config(finished), keep=keep, form="original").records]

    heaviest = sorted(table.to_pylist(), key=lambda record: -record["weight"])[: round(keep * TRAINED)]
    fields = {row.id: row.fields for row in candidates}
    names = "id", "weight", "rank", "masked", *weight_table.known_measures(table)
    expected = [fields[record["id"]] | {name: record[name] for name in names} for record in heaviest]
    assert sorted(kept, key=lambda record: record["rank"]) == expected
    order = [*fields]
    positions = [order.index(record["id"]) for record in kept]
    assert positions == sorted(positions)  # stored order


def kept_of(finished, candidates, table, keep):
    new = candidates, table
    return [*kept_rows.collect(finished, read_config(finished), keep=keep, form="original", new=new).records]


def test_kept_rows_do_not_depend_on_the_order_of_the_rows(finished, data):
    table = weight_table.latest(finished)
    candidates, _ = rows.read_rows(data / "lower.jsonl")
    assert kept_of(finished, candidates[::-1], table, 0.5) == kept_of(finished, candidates, table, 0.5)[::-1]


@pytest.mark.parametrize("change", [lambda parsed: parsed[:5], lambda parsed: parsed[1:]])
def test_other_rows_are_refused(finished, data, change):
    table = weight_table.latest(finished)
    trained = set(table["id"].to_pylist())
    parsed = [row for row in rows.read_rows(data / "lower.jsonl")[0] if row.id in trained]
    with pytest.raises(rows.DataError, match="match no row"):
        kept_of(finished, change(parsed), table, 1.0)


def measured(plausible, logits, useful=None):
    """Rows, and their table; a `plausible` of 0 is not known."""
    parsed = parse([{"question": f"{i}", "response": "x"} for i in range(len(plausible))])
    with np.errstate(divide="ignore"):
        loss = np.where(np.array(plausible) > 0, -np.log(plausible), np.nan)
    zeros = np.zeros(len(parsed))
    return parsed, weight_table.table(parsed, logits, zeros, zeros, loss, useful)


@pytest.mark.parametrize(
    "keep, share, expected",
    [
        (1.0, 0.0, range(10)),
        (1.0, 0.04, range(10)),  # rounds to no row
        (1.0, 0.3, [1, 3, 4, 5, 6, 8, 9]),  # 7 is the least plausible; 0 and 2 are as plausible as 4 and lighter
        (0.7, 0.3, [1, 3, 4, 5, 6, 8, 9]),  # a share of all rows, which are as many as there are
        (0.8, 0.3, [1, 3, 4, 5, 6, 8, 9]),
        (0.3, 0.3, [6, 8, 9]),
        (0.3, 0.0, [7, 8, 9]),
        (1.0, 0.9, [1]),  # row 1 has no plausible; the other 9 are left out
        (1.0, 0.99, [1]),
    ],
)
def test_implausible_rows_are_left_out(keep, share, expected):
    """Weights rise with the index."""
    _, table = measured([0.2, 0, 0.2, 0.9, 0.2, 0.8, 0.7, 0.1, 0.6, 0.5], np.arange(10.0))
    kept = selected_rows.choose(table, keep, selected_rows.smallest(table, "plausible", share))
    assert np.flatnonzero(kept).tolist() == list(expected)


def test_implausible_rows_of_many():
    rng = np.random.default_rng(0)
    plausible, logits = rng.uniform(0.01, 1, 200), rng.normal(size=200)
    parsed, table = measured(plausible, logits, useful=rng.normal(size=200))
    rest = np.argsort(plausible)[50:]
    heaviest = rest[np.argsort(-logits[rest])][:100]
    indices = np.flatnonzero(selected_rows.choose(table, 0.5, selected_rows.smallest(table, "plausible", 0.25)))
    assert indices.tolist() == sorted(heaviest)
    kept = selected_rows.with_weights([parsed[i] for i in indices], selected_rows.numbers(table), indices)
    np.testing.assert_allclose([one.plausible for one in kept], plausible[np.sort(heaviest)], rtol=1e-6)
    assert [one.useful for one in kept] == table["useful"].to_numpy()[np.sort(heaviest)].tolist()


@pytest.mark.parametrize(
    "keep, left_out, expected",
    [
        (0.5, [], [7, 8, 9, 10, 11, 12, 13]),  # half: the heaviest
        # The first round has 13, 11 and 7, the second 12 and 9, the third 10 and 8.
        (0.43, [], [7, 9, 10, 11, 12, 13]),
        (0.29, [], [7, 11, 12, 13]),
        (0.21, [], [7, 11, 13]),
        (0.07, [], [13]),
        (0.21, [11, 13], [7, 9, 12]),  # half of all rows without them: 12 to 5
    ],
)
def test_a_small_share_is_chosen_round_robin(keep, left_out, expected):
    """14 rows whose weights rise with the index. Of the heaviest half 13, 12 and 10 are nearest to the trusted row 4; 11, 9 and 8
    to 0; 7 to 2."""
    nearest = np.array([0, 1, 2, 3, 4, 4, 2, 2, 0, 0, 4, 0, 4, 4], np.int32)
    parsed = parse([{"question": f"{i}", "response": "x"} for i in range(14)])
    table = weight_table.table(parsed, np.arange(14.0), np.zeros(14), np.zeros(14), nearest=nearest)
    kept = selected_rows.choose(table, keep, np.isin(np.arange(14), left_out) if left_out else None)
    assert np.flatnonzero(kept).tolist() == expected
    assert selected_rows.is_round_robin(table, keep) == (keep < 0.5)
    by_weight = selected_rows.choose(table.set_column(7, "nearest", pa.nulls(14, pa.int32())), keep)
    assert np.flatnonzero(by_weight).tolist() == list(range(14))[-round(14 * keep) :]


def test_round_robin_of_many():
    """Against the plain loop: each trusted row in turn takes its heaviest row that is left."""
    rng = np.random.default_rng(0)
    logits, nearest = rng.normal(size=300), rng.integers(40, size=300).astype(np.int32)
    parsed = parse([{"question": f"{i}", "response": "x"} for i in range(300)])
    table = weight_table.table(parsed, logits, np.zeros(300), np.zeros(300), nearest=nearest)
    left, expected = list(np.argsort(-logits)[:150]), []
    while len(expected) < 75:
        turn = list({nearest[i]: i for i in reversed(left)}.values())  # the heaviest of each
        expected += sorted(turn, key=lambda i: -logits[i])
        left = [i for i in left if i not in turn]
    assert np.flatnonzero(selected_rows.choose(table, 0.25)).tolist() == sorted(expected[:75])


def test_leaving_all_out_is_refused():
    _, table = measured([0.5, 0.6], [0.0, 1.0])
    with pytest.raises(rows.DataError, match=r"--keep=0.5 keeps none of 2 rows without the 2 that are left out$"):
        selected_rows.choose(table, 0.5, selected_rows.smallest(table, "plausible", 0.8))


def test_keeping_nothing_is_refused():
    parsed = parse(MIXED)
    table = weight_table.table(parsed, [0.0] * 4, [1] * 4, [False] * 4)
    with pytest.raises(rows.DataError, match="none of 4 rows"):
        selected_rows.choose(table, 0.1)


# --------------------------------------------------------------------------------------------------------------------
# Generated responses
# --------------------------------------------------------------------------------------------------------------------


def response(step, row_id, sample, text, **more):
    return {"step": step, "id": row_id, "sample": sample, "text": text, "logprob": -1.0, "ratio": None} | more


def test_latest_responses(tmp_path):
    lines = [
        response(0, "a", 0, "old"),
        response(8, "a", 1, "second sample"),
        response(8, "a", 0, "first sample"),
        response(4, "a", 0, "between"),
        response(0, "b", 0, "only words"),
        response(8, "b", 0, " \n"),
        response(0, "c", 1, "whole", finish_reason="stop"),
        response(0, "c", 0, "cut in the mid", finish_reason="length"),
        response(0, "d", 0, "cut too", finish_reason="length"),
    ]
    parsed = selected_rows.latest_responses(write_jsonl(tmp_path / "responses.jsonl", lines))
    assert parsed == {"a": "first sample", "b": "only words", "c": "whole"}


def test_latest_responses_with_rewards(tmp_path):
    lines = [
        response(0, "a", 0, "old", reward=9.0),
        response(8, "a", 0, "worse", reward=-1.5),
        response(8, "a", 1, "best", reward=2),
        response(8, "a", 2, "as good", reward=2.0),
        response(8, "a", 3, "cut", reward=3.0, finish_reason="length"),
    ]
    assert selected_rows.latest_responses(write_jsonl(tmp_path / "responses.jsonl", lines)) == {"a": "best"}


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"step": 0, "id": "a", "sample": 0}', json.dumps(response(0, "a", 0, "x", reward="1"))]
)
def test_latest_responses_refuses_damage(tmp_path, line):
    file = tmp_path / "responses.jsonl"
    file.write_text(json.dumps(response(0, "a", 0, "x")) + "\n" + line + "\n")
    with pytest.raises(rows.DataError, match=r"responses.jsonl:2: not a response"):
        selected_rows.latest_responses(file)


def test_refine_replaces_masked_responses_in_their_own_field():
    parsed = parse(MIXED)
    responses = {row.id: f"own {row.line}" for row in parsed if row.line != 3}
    kept = [selected_rows.Kept(row, 1.0, row.line, masked=row.line != 2) for row in parsed]
    refined, columns = zip(*(selected_rows.refine(one, responses) for one in kept))
    assert (
        [one.row.fields for one in refined]
        == [
            MIXED[0] | {"response": "own 1"},
            MIXED[1],  # not masked
            MIXED[2],  # masked, but without a response
            {"messages": [*CHAT[:-1], CHAT[-1] | {"content": "own 4"}]},
        ]
    )
    assert [one.row.response for one in refined] == ["own 1", "3", "d", "own 4"]
    assert [one["refined"] for one in columns] == [True, False, False, True]
    assert [one["original_response"] for one in columns] == ["b", "3", "d", "Hey"]
    assert MIXED[3]["messages"][-1]["content"] == "Hey"  # the data are not changed
    assert selected_rows.with_response(parsed[1], "x").fields["output"] == "x"
    assert selected_rows.with_response(parsed[2], "x").fields["completion"] == "x"


def test_refine_refuses_preferences():
    (row,) = parse([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(rows.DataError, match="line 1: --refined"):
        selected_rows.refine(selected_rows.Kept(row, 1.0, 1, True), {row.id: "x"})


# --------------------------------------------------------------------------------------------------------------------
# Columns
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "indices, template, expected",
    [([0], "chat", "chat"), ([0, 2], "chat", "chat"), ([0, 3], "human", "text"), ([2], "chat", "as is"), ([2], "none", "as is")],
)
def test_resolve_format(indices, template, expected):
    parsed = parse([MIXED[i] for i in indices])
    assert selected_rows.resolve_format("auto", traits(parsed), template) == expected
    assert selected_rows.resolve_format("original", traits(parsed), template) == "original"


def test_pairs_stay_pairs():
    pairs = list(rows.parse([(1, {"prompt": "a", "chosen": "b", "rejected": "c"})], preference=True))
    assert selected_rows.resolve_format("auto", traits(pairs), "chat") == "original"
    assert selected_rows.resolve_format("chat", traits(pairs), "chat") == "chat"


def test_chats():
    chats = [selected_rows.prompt_columns(row, "chat", None, None) for row in parse(MIXED)]
    user = [[{"role": "user", "content": content}] for content in ("a?", "Add.\n1 2", "c ")]
    assert [columns["prompt"] for columns in chats] == [[{"role": "system", "content": "S"}] + user[0], *user[1:], CHAT[:-1]]
    answers = ["b", "3", "d", "Hey"]
    assert [columns["completion"] for columns in chats] == [[{"role": "assistant", "content": answer}] for answer in answers]


@pytest.mark.parametrize("template", ["human", "alpaca", "none"])
def test_texts_are_those_of_a_run(neox, template):
    """Together they are the text of the run, split at a token boundary."""
    *_, tokenizer = load(neox)
    parsed = parse(MIXED)
    for row, example in zip(parsed, templates.encode(parsed, tokenizer, template=template)):
        columns = selected_rows.prompt_columns(row, "text", tokenizer, template)
        expected = tokenizer.decode([*example.prompt, *example.response], clean_up_tokenization_spaces=False)
        assert columns["prompt"] + columns["completion"] + tokenizer.eos_token == expected
        assert not columns["prompt"].endswith(" ") and columns["completion"].strip() == row.response


def test_join_renames_conflicting_fields():
    objects = [{"question": "a", "response": "b", "weight": 3, "text": "t", "labels": None}, {"question": "c", "response": "d"}]
    columns = [{"weight": 0.5, "prompt": "a"}, {"weight": 1.5, "prompt": "c"}]
    joined, renamed = join(parse(objects), columns, {"text", "labels"})
    assert renamed == ["text", "weight"]
    assert joined == [
        {"question": "a", "response": "b", "labels": None, "original_weight": 3, "original_text": "t"} | columns[0],
        {"question": "c", "response": "d", "weight": 1.5, "prompt": "c"},
    ]


def test_join_keeps_equal_values():
    joined, renamed = join(parse([MIXED[2]]), [{"prompt": "c ", "completion": "d", "rank": 1}], ())
    assert joined == [MIXED[2] | {"rank": 1}] and not renamed


def test_numbers_of_earlier_exports_get_other_names():
    """Two rounds before, and the name of a third one is in the data."""
    earlier = {"rank": 3, "original_rank": 2, "original_rank_2": 1}
    joined, renamed = join(parse([{"question": "a", "response": "b"} | earlier]), [{"rank": 4}], ())
    assert joined == [{"question": "a", "response": "b", "rank": 4, "original_rank_3": 3, "original_rank": 2, "original_rank_2": 1}]
    assert renamed == ["rank"]


@pytest.mark.parametrize("other", [{"original_text": 1, "text": 2}, {"original_response": "x", "response": "y", "rank": None}])
def test_join_refuses_to_lose_a_field(other):
    parsed = parse([{"question": "a", "response": "b", "rank": 9} | other])
    with pytest.raises(rows.DataError, match="line 1: .* taken"):
        join(parsed, [{"rank": 1, "original_response": "b"}], {"response", "text"})


def test_misread():
    chats, mixed = traits(parse([MIXED[3]])), traits(parse(MIXED))
    assert "messages" not in selected_rows.misread("chat", chats) and "text" in selected_rows.misread("chat", chats)
    assert "messages" in selected_rows.misread("text", chats) and "messages" in selected_rows.misread("chat", mixed)
    assert not selected_rows.misread("original", mixed)


CALLING = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}
FORMS = [
    *MIXED,
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "cut off"}]},
    {"messages": [CHAT[1], CALLING, {"role": "tool", "content": "x"}, CHAT[-1]], "tools": [{"name": "f"}], "system": "S"},
    {"prompt": CHAT[:-1], "completion": CHAT[-1:]},
]


@pytest.mark.parametrize("name", ["kept.jsonl", "kept.parquet"])
@pytest.mark.parametrize("only_columns", [False, True])
def test_exported_chats_are_read_again(tmp_path, name, only_columns):
    """As the same rows: of the export, and of its columns for TRL alone."""
    for value in FORMS:
        parsed = parse([value])
        columns = [{"weight": 1.0} | selected_rows.prompt_columns(row, "chat", None, None) for row in parsed]
        records, _ = join(parsed, columns, selected_rows.misread("chat", traits(parsed)))
        exported.write(tmp_path / name, columns if only_columns else records)
        usable, report = rows.read_rows(tmp_path / name)
        assert [row.id for row in usable] == [row.id for row in parsed] and not report.rejections


QWEN, _ = both("qwen2_5")
PAIRS = [
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"chosen": CHAT, "rejected": [*CHAT[:-1], {"role": "assistant", "content": "No"}]},
]
UNREAD = [
    {"prompt": "a", "completion": "b", "tools": [{"name": "f"}]},
    {"prompt": "a", "completion": "b", "conversations": "unused"},
]


def exported_again(parsed, form, template, tokenizer, file):
    """Exported rows that are read again, by themselves: an export of one row has the form of that row."""
    for row in parsed:
        columns = {"id": row.id, "rank": 1} | selected_rows.prompt_columns(row, form, tokenizer, template)
        records, _ = join([row], [columns], selected_rows.misread(form, traits([row])))
        exported.write(file, records)
        ((again,), report) = rows.read_rows(file)
        assert not report.rejections
        yield row, again


@pytest.mark.parametrize("name", ["kept.jsonl", "kept.parquet"])
@pytest.mark.parametrize(
    ("form", "template", "tokenizer"), [("text", "human", PLAIN), ("text", "chat", QWEN), ("chat", "chat", QWEN)]
)
def test_exported_rows_are_read_again(tmp_path, name, form, template, tokenizer):
    """As the rows of the data, not as those of SFTTrainer, whose prompts have the template in them."""
    parsed = [row for value in [*FORMS, *PAIRS, *UNREAD] for row in parse([value]) if template == "chat" or not row.chat]
    for row, again in exported_again(parsed, form, template, tokenizer, tmp_path / name):
        assert again.id == row.id and (form == "chat" or again.schema == row.schema)
        if form == "text" and name == "kept.jsonl":  # Parquet has null for absent fields
            assert {key: again.fields[key] for key in row.fields} == row.fields


@pytest.mark.parametrize("value", UNREAD)
def test_rows_that_stay_as_they_are_are_read_again(tmp_path, value):
    """Fields of other schemas that SFTTrainer interprets are renamed, and are no content."""
    for row, again in exported_again(parse([value]), "as is", "human", PLAIN, tmp_path / "kept.jsonl"):
        assert again.id == row.id


@pytest.mark.parametrize("value", FORMS[4:])
def test_exported_answers_and_refined_rows_are_read_again(tmp_path, value):
    """Their content has not the id of the export, which is that of the conversation and of the data."""
    (row,) = parse([value])
    parts = [*by_turn.rows_of(row), selected_rows.with_response(row, "new")]
    for part, again in exported_again(parts, "text", "chat", QWEN, tmp_path / "kept.jsonl"):
        assert (again.system, again.messages, again.response) == (part.system, part.messages, part.response)
        assert again.schema == part.schema and again.chat == part.chat


def test_a_column_that_the_user_names_is_read(tmp_path):
    (row,) = parse([MIXED[3]])
    ((_, again),) = exported_again([row], "text", "human", PLAIN, tmp_path / "kept.jsonl")
    (named,) = rows.iter_rows(tmp_path / "kept.jsonl", columns="messages:original_messages")
    assert named.id == again.id == row.id


ENDS_WITH_CALL = [
    {"messages": [CHAT[1], CALLING], "tools": [{"name": "f"}]},
    {"messages": [CHAT[1], {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}]},
    {"messages": [CHAT[1], {name: value for name, value in CALLING.items() if name != "content"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}]},
    {"prompt": CHAT[1:2], "completion": [CALLING], "tools": [{"name": "f"}]},
]


@pytest.mark.parametrize("value", [*FORMS, *ENDS_WITH_CALL])
def test_refine_replaces_the_answer_of_every_form(value):
    """In the fields and in the columns for TRL, also where the answer of the data is a tool call."""
    (row,) = parse([value])
    refined = selected_rows.with_response(row, "new")
    (again,) = parse([refined.fields])
    assert again.response == "new" and again.messages == row.messages
    before = templates.messages_of(row, with_response=True)[:-1]
    for one in (refined, again):
        columns = selected_rows.prompt_columns(one, "chat", None, None)
        assert columns["prompt"] == before and columns["completion"] == [{"role": "assistant", "content": "new"}]


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kept.jsonl", "new/kept.parquet"])
def test_datasets_reads_rows_of_every_schema(name, tmp_path):
    parsed = parse(MIXED)
    columns = [{"weight": 1.0, "rank": row.line} | selected_rows.prompt_columns(row, "chat", None, None) for row in parsed]
    records, _ = join(parsed, columns, selected_rows.misread("chat", traits(parsed)))
    assert exported.write(tmp_path / name, records) == []
    assert [file.name for file in (tmp_path / name).parent.glob("kept*")] == [(tmp_path / name).name]
    loaded = read(tmp_path / name, tmp_path)
    absent = dict.fromkeys(key for record in records for key in record)
    for row, record in zip(loaded, records, strict=True):
        if record.get("original_messages"):  # a struct has one set of keys
            row["original_messages"] = [{k: v for k, v in turn.items() if v} for turn in row["original_messages"]]
        assert row == absent | record


def test_parquet_refuses_a_field_of_two_types(tmp_path):
    with pytest.raises(ValueError, match="jsonl"):
        exported.write(tmp_path / "kept.parquet", [{"bad": True}, {"bad": "yes"}])
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_file(tmp_path):
    (tmp_path / "kept.jsonl").write_text("before")
    with pytest.raises(TypeError):
        exported.write(tmp_path / "kept.jsonl", [{"a": "b"}, {"a": {("no", "key"): "of JSON"}}])
    assert [file.read_text() for file in tmp_path.iterdir()] == ["before"]


def test_lone_surrogates_are_written_as_json_escapes(tmp_path):
    """JSON can spell it, UTF-8 cannot."""
    exported.write(tmp_path / "kept.jsonl", [{"a": "☃\ud800"}])
    assert (tmp_path / "kept.jsonl").read_bytes() == b'{"a": "' + "☃".encode() + b'\\ud800"}\n'


@pytest.mark.parametrize("index, late", [(0, []), (11, ["note"])])
def test_fields_that_datasets_would_miss_are_reported(tmp_path, index, late):
    """With `note` in the eleventh megabyte, `datasets` infers fields without it and fails."""
    records = [{"text": "x" * 10**6, **({"note": "here"} if i == index else {})} for i in range(12)]
    assert exported.write(tmp_path / "kept.jsonl", records) == late
    if late:
        with pytest.raises(datasets.exceptions.DatasetGenerationError):
            read(tmp_path / "kept.jsonl", tmp_path)
    else:
        assert read(tmp_path / "kept.jsonl", tmp_path)[0]["note"] == "here"
    exported.write(tmp_path / "kept.parquet", records)
    assert read(tmp_path / "kept.parquet", tmp_path)[index]["note"] == "here"


# --------------------------------------------------------------------------------------------------------------------
# Repeated by weight
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [3.0, 0.5, 0.0, 1.0, 0.5], [0.0, 0.0, 7.0], [2.5], [1e-300, 1e300, 0.0]])
def test_resampling(weights):
    """Each row ⌊e⌋ or ⌈e⌉ times with e = n w / Σw, in stored order; e times on average over seeds."""
    number, expected = len(weights), len(weights) * np.array(weights) / sum(weights)
    counts = []
    for seed in range(300):
        indices = selected_rows.resample(weights, seed)
        assert len(indices) == number and (np.diff(indices) >= 0).all()
        counts.append(np.bincount(indices, minlength=number))
        assert (np.floor(expected) <= counts[-1]).all() and (counts[-1] <= np.ceil(expected)).all()
        np.testing.assert_array_equal(indices, selected_rows.resample(weights, seed))
    fraction = expected % 1
    deviation = np.sqrt(fraction * (1 - fraction) / len(counts))
    assert (np.abs(np.mean(counts, axis=0) - expected) <= 5 * deviation + 1e-12).all()


def test_resampling_by_hand():
    """One u for all: with NumPy's first draw of seed 0, 0.637, the points are 0.637, 1.637, 2.637 and 3.637."""
    assert np.random.default_rng(0).random() == pytest.approx(0.637, abs=1e-3)
    assert selected_rows.resample([0.5, 1.2, 0.3, 2.0], 0).tolist() == [1, 1, 3, 3]  # ends at 0.5, 1.7, 2, 4

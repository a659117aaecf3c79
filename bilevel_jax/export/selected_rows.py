"""The rows that a run keeps, as a file for others: which rows, with whose responses, in which columns.

Rows keep their fields. Beside these stand

    weight, rank          of the last epoch; mean weight 1 over all rows trained on, rank 1 the heaviest
    prompt, completion    what TRL's SFTTrainer learns from, its loss on the completion alone; see `FORMATS`
    refined               whether the response is the model's own, where that was asked for
    original_response     the response of the data, for every row of a refined file

A field that has the name of one of these, or one that SFTTrainer takes for something else, is kept as `original_NAME`.

SFTTrainer tokenizes prompt and completion together and adds the EOS. As chats its tokens are those of a run, and whatever the chat
template writes after the EOS. As texts they are those of a run unless tokens merge where the response begins, as a space does
with the word after it.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from bilevel_jax.data import rows, templates

FORMATS = {
    "auto": "chat where the run's template is the tokenizer's chat template, else text; pairs and prompt/completion rows stay",
    "chat": "prompt and completion as lists of messages, for any model with a chat template",
    "text": "prompt in the run's template and completion, as texts",
    "original": "neither: the fields as they are",
}
READ_BY_TRL = (  # names by which SFTTrainer 1.16 takes a row for another kind of row, or for tokens
    *("messages", "conversations", "text", "chosen", "rejected", "input_ids", "labels", "completion_mask", "assistant_masks"),
    *("seq_lengths", "tools", "chat_template_kwargs", "image", "images"),
)
RESPONSE_FIELDS = {"question/response": "response", "instruction/input/output": "output", "prompt/completion": "completion"}
LOOKED_AT = 10 << 20  # bytes of a JSONL file that `datasets` looks at to know its fields


class Kept(NamedTuple):
    """A row and what the run says of it."""

    row: rows.Row
    weight: float
    rank: int
    masked: bool


def select(found: Sequence[rows.Row], table, keep: float) -> list[Kept]:
    """The `keep` share of the table's rows that weighs most, in stored order.

    Args:
      found: rows of the lower level, at least all those in the table.
      table: as written by `weights.write`.
      keep: in (0, 1].

    Raises:
      DataError: the table is of other rows, or nothing is kept.
    """
    verdicts = {verdict["id"]: verdict for verdict in table.to_pylist()}
    limit = round(keep * len(verdicts))
    if not limit:
        raise rows.DataError(f"--keep={keep} keeps none of {len(verdicts)} rows")
    places = sorted(rows.select(found, [row_id for row_id, verdict in verdicts.items() if verdict["rank"] <= limit]))
    kept = ((found[place], verdicts[found[place].id]) for place in places)
    return [Kept(row, verdict["weight"], verdict["rank"], verdict["masked"]) for row, verdict in kept]


# --------------------------------------------------------------------------------------------------------------------
# The model's own responses
# --------------------------------------------------------------------------------------------------------------------


def latest_responses(file: pathlib.Path) -> dict[str, str]:
    """The latest usable response of the model's own to each row, by id, from `responses.jsonl`.

    Usable is one with words in it that came to its end, where the file says so. Of several from one refresh it is the one with the
    highest reward; without rewards, and of equals, the first sample: a fair draw from the model, whereas the most likely one would
    favour short responses.

    Raises:
      DataError: a line that is not a response.
    """
    latest: dict[str, tuple[tuple[int, float, int], str]] = {}
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                said = json.loads(line.decode())
                row_id, text, age = said["id"], said["text"], (said["step"], said.get("reward", 0.0), -said["sample"])
                numbers = all(isinstance(number, kind) for number, kind in zip(age, (int, (int, float), int)))
                if not (isinstance(row_id, str) and isinstance(text, str) and numbers):
                    raise TypeError("a field of another type")
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise rows.DataError(f"{file}:{number}: not a response ({type(error).__name__}: {error})") from error
            usable = text.strip() and said.get("finish_reason", "stop") == "stop"
            if usable and (row_id not in latest or age > latest[row_id][0]):
                latest[row_id] = age, text
    return {row_id: text for row_id, (_, text) in latest.items()}


def with_response(row: rows.Row, response: str) -> rows.Row:
    """The row with another response, in the field where its schema has it. The id stays: it names the row of the data.

    Raises:
      DataError: a preference row, whose response is one of a pair.
    """
    if row.schema == "messages":
        *turns, last = row.fields["messages"]
        changed = {"messages": [*turns, {**last, "content": response}]}
    elif row.schema in RESPONSE_FIELDS:
        changed = {RESPONSE_FIELDS[row.schema]: response}
    else:
        raise rows.DataError(f"line {row.line}: --refined cannot replace one response of a {row.schema} row; leave it out")
    return dataclasses.replace(row, response=response, fields={**row.fields, **changed})


def refine(kept: Sequence[Kept], responses: Mapping[str, str]) -> list[tuple[Kept, dict]]:
    """Every row, with its latest response of the model's own if it is masked and has one, and the columns that tell."""
    refined = []
    for one in kept:
        own = responses.get(one.row.id) if one.masked else None
        told = {"refined": own is not None, "original_response": one.row.response}
        refined.append((one if own is None else one._replace(row=with_response(one.row, own)), told))
    return refined


# --------------------------------------------------------------------------------------------------------------------
# Columns
# --------------------------------------------------------------------------------------------------------------------


def resolve_format(form: str, found: Sequence[rows.Row], template: str) -> str:
    """`chat`, `text`, `original`, or `as is`: without new columns, but with no field that SFTTrainer would misread."""
    if form != "auto":
        return form
    if all(row.rejected is not None for row in found):
        return "original"  # pairs stay pairs
    if all(row.schema == "prompt/completion" for row in found):
        return "as is"
    return "chat" if template == "chat" else "text"


def prompt_columns(row: rows.Row, form: str, tokenizer, template: str) -> dict:
    """`prompt` and `completion` of a row, if the format has them. `template` is as returned by `templates.resolve`."""
    if form == "chat":
        turns = ((("system", row.system),) if row.system else ()) + row.messages
        prompt = [{"role": role, "content": content} for role, content in turns]
        return {"prompt": prompt, "completion": [{"role": "assistant", "content": row.response}]}
    if form == "text":
        whole = templates.render(row, tokenizer, template)
        prompt = whole.rstrip(" ")  # together they are the same text, and this prompt ends where a token does
        return {"prompt": prompt, "completion": whole[len(prompt) :] + row.response}
    return {}


def misread(form: str, found: Sequence[rows.Row]) -> set[str]:
    """Names of fields that SFTTrainer would take for something else beside prompt and completion."""
    if form == "original":
        return set()
    harmless = form == "chat" and all(row.schema == "messages" for row in found)
    return set(READ_BY_TRL) - ({"messages"} if harmless else set())


def join(found: Sequence[rows.Row], columns: Sequence[Mapping], reserved: Collection[str]) -> tuple[list[dict], list[str]]:
    """The fields of every row and its columns side by side, and the names of fields that are now `original_NAME`.

    A field is renamed, in all rows, where its name is reserved or a column has it with another value. A null is no value.

    Raises:
      DataError: the other name is taken too.
    """
    renamed = set()
    for row, mine in zip(found, columns, strict=True):
        for name, value in row.fields.items():
            if value is not None and (name in reserved or name in mine and mine[name] != value):
                renamed.add(name)
    joined = []
    for row, mine in zip(found, columns, strict=True):
        fields = {}
        for name, value in row.fields.items():
            new = f"original_{name}" if name in renamed else name
            if new != name and (new in row.fields or new in mine):
                raise rows.DataError(f"line {row.line}: '{name}' would have to be '{new}', which is taken; rename one in the data")
            fields[new] = value
        joined.append(fields | mine)
    return joined, sorted(renamed)


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(out: pathlib.Path):
    """Yields another path to write to, which becomes `out` if nothing is raised."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def write(out: pathlib.Path, records: Sequence[dict]) -> list[str]:
    """Writes rows to a JSONL or Parquet file; they need not have the same fields.

    Returns:
      Fields without a value in the part of a JSONL file from which `datasets.load_dataset` infers fields: it will fail.

    Raises:
      ValueError: a field has values that do not fit into one column of Parquet.
    """
    names, late = dict.fromkeys(name for record in records for name in record), []
    with whole_file(out) as temporary:
        if out.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            try:
                table = pyarrow.table({name: [record.get(name) for record in records] for name in names})
            except pyarrow.ArrowException as error:
                raise ValueError(f"{out}: a field has values of several types ({error}); write .jsonl") from error
            pyarrow.parquet.write_table(table, temporary)
            return []
        seen = set()
        with open(temporary, "wb") as file:
            for record in records:
                new = {name for name, value in record.items() if value is not None} - seen
                if new and file.tell() > LOOKED_AT:
                    late += sorted(new)
                seen |= new
                line = json.dumps(record, ensure_ascii=False, default=str) + "\n"
                file.write(line.encode(errors="backslashreplace"))  # half a surrogate pair as JSON spells it
    return late

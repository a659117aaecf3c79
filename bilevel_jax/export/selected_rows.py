"""The rows that a run keeps, as a file: which rows, with which responses, in which columns.

Rows keep their fields and get these columns:

    id                    of the row, as in weights/*.parquet and responses.jsonl
    weight, rank          of the last epoch; the mean weight of all training rows is 1, the heaviest row has rank 1
    plausible, useful     of the last epoch, where known; see `weight_table.table`
    masked                whether the model answered the row's question itself at the end of the run
    prompt, completion    for TRL's SFTTrainer, which trains on the completion only; see `FORMATS`
    refined               whether the model generated the response (with `--refined`)
    original_response     the response of the data (with `--refined`)

Rows that are repeated by weight (`resample`) have no `weight`.

A field with the name of a column, or with a name that SFTTrainer interprets, is renamed `original_NAME`.

SFTTrainer tokenizes prompt and completion together and adds the EOS. For chats its tokens are those of the run, plus what the chat
template writes after the EOS. For texts they are those of the run unless tokens merge at the start of the response, as a space
merges with the next word.
"""

import dataclasses
import json
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bilevel_jax import files
from bilevel_jax.data import messages, rows, templates
from bilevel_jax.runtime import weight_table

FORMATS = {
    "auto": "chat where the run's template is the tokenizer's chat template, else text; pairs and prompt/completion rows stay",
    "chat": "prompt and completion as lists of messages, for any model with a chat template",
    "text": "prompt in the run's template and completion, as texts",
    "original": "neither: only the original fields",
}
READ_BY_TRL = (  # field names that SFTTrainer 1.16 interprets
    *("messages", "conversations", "text", "chosen", "rejected", "input_ids", "labels", "completion_mask", "assistant_masks"),
    *("seq_lengths", "tools", "chat_template_kwargs", "image", "images"),
)
RESPONSE_FIELDS = {"question/response": "response", "instruction/input/output": "output", "prompt/completion": "completion"}
INFERENCE_BYTES = 10 << 20  # bytes of a JSONL file from which `datasets` infers the fields


class Kept(NamedTuple):
    """A kept row with its weight in the run."""

    row: rows.Row
    weight: float
    rank: int
    masked: bool
    plausible: float | None = None
    useful: float | None = None


def implausible(table, share: float) -> set[str]:
    """Ids of the rows with the smallest `plausible`: the `share` of all rows; of equal rows the lighter ones come first.

    A row that no step used has no `plausible`, and is never among them.

    Args:
      table: a `weight_table.table`.
      share: in [0, 1).
    """
    records = [record for record in table.to_pylist() if record["plausible"] is not None]
    records.sort(key=lambda record: (record["plausible"], -record["rank"]))
    return {record["id"] for record in records[: round(share * len(table))]}


def select(candidates: Sequence[rows.Row], table, keep: float, left_out: Collection[str] = ()) -> list[Kept]:
    """The rows with the largest weights, in stored order: a share `keep` of all rows of the table, or all that are not left out.

    Args:
      candidates: rows of the lower level, at least all rows of the table.
      table: a `weight_table.table`.
      keep: in (0, 1].
      left_out: ids that are not kept, whatever their weight.

    Raises:
      DataError: the table is of other rows, or no row is kept.
    """
    records = {record["id"]: record for record in table.to_pylist()}
    rows.select(candidates, records)  # also the rows that are dropped: the card counts them
    by_rank = sorted(records.keys() - set(left_out), key=lambda row_id: records[row_id]["rank"])
    ids = by_rank[: round(keep * len(records))]
    if not ids:
        without = f" without the {len(left_out)} implausible ones" if left_out else ""
        raise rows.DataError(f"--keep={keep} keeps none of {len(records)} rows{without}")
    names = [name for name in Kept._fields if name != "row"]
    kept = (candidates[i] for i in sorted(rows.select(candidates, ids)))
    return [Kept(row, **{name: records[row.id][name] for name in names}) for row in kept]


def resample(weights: Sequence[float], seed: int) -> np.ndarray:
    """Repeats rows by weight: indices of as many rows as there are weights, ascending.

    Systematic resampling: with e_i = n w_i / Σ w and one u drawn from [0, 1), row i gets the points u, u + 1, ..., u + n - 1 in
    [e_1 + ... + e_{i-1}, e_1 + ... + e_i). It is repeated ⌊e_i⌋ or ⌈e_i⌉ times, e_i times on average.

    Args:
      weights: [n], at least 0, not all 0.
      seed: of u.
    """
    ends = np.cumsum(np.asarray(weights, np.float64))
    number = len(ends)
    ends = np.minimum(ends / ends[-1] * number, number)
    return np.searchsorted(ends, np.random.default_rng(seed).random() + np.arange(number), side="right")


# --------------------------------------------------------------------------------------------------------------------
# Generated responses
# --------------------------------------------------------------------------------------------------------------------


def _read_responses(file: pathlib.Path) -> Iterator[dict]:
    """The lines of `responses.jsonl`.

    Raises:
      DataError: a line is not a response.
    """
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                response = json.loads(line.decode())
                values = *(response[key] for key in ("id", "text", "step", "sample")), response.get("reward", 0.0)
                if not all(isinstance(value, kind) for value, kind in zip(values, (str, str, int, int, (int, float)))):
                    raise TypeError("a field of another type")
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise rows.DataError(f"{file}:{number}: not a response ({type(error).__name__}: {error})") from error
            yield response


def replaced(workdir: pathlib.Path) -> set[str]:
    """Ids of the rows that were masked in the run: at the end of an epoch, or with a generated response that a step used."""
    ids: set[str] = set()
    for file in weight_table.epoch_files(workdir).values():
        table = weight_table.read(file)
        ids.update(table.filter(table["masked"])["id"].to_pylist())
    responses = workdir / "responses.jsonl"
    if responses.exists():
        ids.update(response["id"] for response in _read_responses(responses) if response.get("ratio") is not None)
    return ids


def latest_responses(file: pathlib.Path) -> dict[str, str]:
    """The latest usable generated response of each row, by id, from `responses.jsonl`.

    A response is usable if it is not blank and ended by itself. Of several samples of one refresh the one with the highest reward
    counts; without rewards, and for ties, the first sample, which is a fair draw (the most likely sample would favour short ones).

    Raises:
      DataError: a line is not a response.
    """
    latest: dict[str, tuple[tuple[int, float, int], str]] = {}
    for response in _read_responses(file):
        row_id, text = response["id"], response["text"]
        order = response["step"], response.get("reward", 0.0), -response["sample"]
        usable = text.strip() and response.get("finish_reason", "stop") == "stop"
        if usable and (row_id not in latest or order > latest[row_id][0]):
            latest[row_id] = order, text
    return {row_id: text for row_id, (_, text) in latest.items()}


def with_response(row: rows.Row, response: str) -> rows.Row:
    """The row with another response, also in the field of its schema. The id stays that of the row of the data.

    Raises:
      DataError: the row is a preference pair.
    """
    if row.schema in ("messages", "conversations"):
        changed = {row.schema: messages.with_last_answer(row.fields[row.schema], response)}
    elif isinstance(row.fields.get("completion"), list):
        changed = {"completion": messages.with_last_answer(row.fields["completion"], response)}
    elif row.schema in RESPONSE_FIELDS:
        changed = {RESPONSE_FIELDS[row.schema]: response}
    else:
        raise rows.DataError(f"line {row.line}: --refined cannot replace one response of a {row.schema} row; remove the flag")
    return dataclasses.replace(row, response=response, fields={**row.fields, **changed})


def refine(kept: Sequence[Kept], responses: Mapping[str, str]) -> list[tuple[Kept, dict]]:
    """Each row with its columns `refined` and `original_response`. Masked rows get their generated response, if there is one."""
    refined = []
    for one in kept:
        response = responses.get(one.row.id) if one.masked else None
        columns = {"refined": response is not None, "original_response": one.row.response}
        refined.append((one if response is None else one._replace(row=with_response(one.row, response)), columns))
    return refined


# --------------------------------------------------------------------------------------------------------------------
# Columns
# --------------------------------------------------------------------------------------------------------------------


def resolve_format(form: str, kept_rows: Sequence[rows.Row], template: str) -> str:
    """`chat`, `text`, `original`, or `as is`: no new columns, but fields that SFTTrainer interprets are renamed."""
    if form != "auto":
        return form
    if all(row.rejected is not None for row in kept_rows):
        return "original"  # pairs stay pairs
    if all(row.schema == "prompt/completion" for row in kept_rows):
        return "as is"
    return "chat" if template == "chat" else "text"


def prompt_columns(row: rows.Row, form: str, tokenizer, template: str) -> dict:
    """`prompt` and `completion` of a row, if the format has them. `template` is as returned by `templates.resolve`."""
    if form == "chat":
        *prompt, completion = templates.messages_of(row, with_response=True)
        return {"prompt": prompt, "completion": [completion]} | ({"tools": row.tools} if row.tools else {})
    if form == "text":
        rendered = templates.render(row, tokenizer, template)
        prompt = rendered.rstrip(" ")  # the concatenation stays the same, and the prompt ends at a token boundary
        return {"prompt": prompt, "completion": rendered[len(prompt) :] + templates.response_text(row, tokenizer)}
    return {}


def misread(form: str, kept_rows: Sequence[rows.Row]) -> set[str]:
    """Names of fields that SFTTrainer would misinterpret."""
    if form == "original":
        return set()
    harmless = set()
    if form == "chat" and all(row.schema == "messages" for row in kept_rows):
        harmless.add("messages")
    if form == "chat" and all(row.tools for row in kept_rows if row.fields.get("tools")):
        harmless.add("tools")
    return set(READ_BY_TRL) - harmless


def join(kept_rows: Sequence[rows.Row], columns: Sequence[Mapping], reserved: Collection[str]) -> tuple[list[dict], list[str]]:
    """Joins the fields of each row with its columns. Also returns the names of fields that are renamed `original_NAME`.

    A field is renamed, in all rows, if its name is reserved or if a column has the name and another value. Nulls do not count.

    Raises:
      DataError: a new name exists already.
    """
    renamed = set()
    for row, row_columns in zip(kept_rows, columns, strict=True):
        for name, value in row.fields.items():
            if value is not None and (name in reserved or name in row_columns and row_columns[name] != value):
                renamed.add(name)
    joined = []
    for row, row_columns in zip(kept_rows, columns, strict=True):
        fields = {}
        for name, value in row.fields.items():
            new = f"original_{name}" if name in renamed else name
            if new != name and (new in row.fields or new in row_columns):
                raise rows.DataError(f"line {row.line}: '{name}' would be renamed '{new}', which is taken; rename one in the data")
            fields[new] = value
        joined.append(fields | row_columns)
    return joined, sorted(renamed)


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


def write(out: pathlib.Path, records: Sequence[dict]) -> list[str]:
    """Writes rows, which may have different fields, to a JSONL or Parquet file.

    Returns:
      Fields with no value in the first INFERENCE_BYTES of a JSONL file. `datasets.load_dataset` fails on them.

    Raises:
      ValueError: a field has values of several types, which Parquet cannot store.
    """
    names, late = dict.fromkeys(name for record in records for name in record), []
    out.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(out) as file:
        if out.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            try:
                table = pyarrow.table({name: [record.get(name) for record in records] for name in names})
            except pyarrow.ArrowException as error:
                raise ValueError(f"{out}: a field has values of several types ({error}); write .jsonl") from error
            pyarrow.parquet.write_table(table, file)
            return []
        seen = set()
        for record in records:
            new = {name for name, value in record.items() if value is not None} - seen
            if new and file.tell() > INFERENCE_BYTES:
                late += sorted(new)
            seen |= new
            line = files.to_json(record, ensure_ascii=False, default=str) + "\n"
            file.write(line.encode(errors="backslashreplace"))  # lone surrogates as JSON escapes
    return late

"""The rows that a run keeps: which rows, with which responses, in which columns.

Rows keep their fields and get these columns:

    id                    of the row, as in weights/*.parquet and responses.jsonl
    weight, rank          of the last epoch; the mean weight of all training rows is 1, the heaviest row has rank 1
    plausible, useful, similar
                          of the last epoch, where known; see `weight_table.blocks`
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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

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
ROUND_ROBIN = 0.5  # share of the rows, the heaviest, within which a smaller share is chosen round-robin
OPPOSITES = {"plausible": "implausible", "similar": "dissimilar"}  # measures by which rows can be left out
RESPONSE_FIELDS = {"question/response": "response", "instruction/input/output": "output", "prompt/completion": "completion"}


class Kept(NamedTuple):
    """A kept row with its weight in the run."""

    row: rows.Row
    weight: float
    rank: int
    masked: bool
    plausible: float | None = None
    useful: float | None = None
    similar: float | None = None


def smallest(table, measure: str, share: float) -> np.ndarray:
    """Which rows have the smallest of a measure, [n] bool: the `share` of all rows; of equal rows the lighter ones come first.

    A row without the measure, such as `plausible` of a row that no step used, is never among them.

    Args:
      table: a `weight_table.table`.
      measure: a key of `weight_table.MEASURES`.
      share: in [0, 1).
    """
    value, chosen = table[measure].to_numpy(), np.zeros(len(table), bool)
    known = np.flatnonzero(~np.isnan(value))
    order = known[np.lexsort((-table["rank"].to_numpy()[known], value[known]))]
    chosen[order[: round(share * len(table))]] = True
    return chosen


def is_round_robin(table, keep: float) -> bool:
    """Whether `choose` goes by `nearest`, too."""
    return keep < ROUND_ROBIN and table["nearest"].null_count == 0


def choose(table, keep: float, left_out: np.ndarray | None = None) -> np.ndarray:
    """Which rows are kept, [n] bool: a share `keep` of all rows, or all that are not left out.

    Of half or more, the heaviest rows are kept. Fewer are chosen among the heaviest half, round-robin over the trusted rows: first
    the heaviest of the rows that are nearest to each trusted row, then the second heaviest ones, and so on. The heaviest rows alone
    are much alike, and leave out some of what the trusted rows ask for. Without `nearest`, weights alone decide.

    Args:
      table: a `weight_table.table`.
      keep: in (0, 1].
      left_out: [n] bool, rows that are not kept, whatever their weight.

    Raises:
      DataError: no row is kept.
    """
    order = np.argsort(table["rank"].to_numpy())
    if left_out is not None:
        order = order[~left_out[order]]
    if is_round_robin(table, keep):
        order = order[: round(ROUND_ROBIN * len(table))]
        order = order[np.argsort(_rounds(table["nearest"].to_numpy()[order]), kind="stable")]
    kept = np.zeros(len(table), bool)
    kept[order[: round(keep * len(table))]] = True
    if not kept.any():
        number = 0 if left_out is None else int(left_out.sum())
        without = f" without the {number} that are left out" if number else ""
        raise rows.DataError(f"--keep={keep} keeps none of {len(table)} rows{without}")
    return kept


def _rounds(group: np.ndarray) -> np.ndarray:
    """The round in which each is taken, [n]: the number of earlier ones in its group."""
    by_group = np.argsort(group, kind="stable")
    _, first, size = np.unique(group[by_group], return_index=True, return_counts=True)
    number = np.empty(len(group), np.int64)
    number[by_group] = np.arange(len(group)) - np.repeat(first, size)
    return number


def with_weights(some: Sequence[rows.Row], columns: Mapping[str, np.ndarray], indices: np.ndarray) -> list[Kept]:
    """Rows with what the table, as columns of `numbers`, says about them at the indices, [n]."""
    values = [[None if value != value else value for value in columns[name][indices].tolist()] for name in Kept._fields[1:]]
    return [Kept(*each) for each in zip(some, *values)]


def numbers(table) -> dict[str, np.ndarray]:
    """The columns of a `weight_table.table` that a kept row has; NaN where a number is not known."""
    return {name: table[name].to_numpy() for name in Kept._fields if name != "row"}


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
                if not all(isinstance(value, kind) for value, kind in zip(values, ((str,), (str,), (int,), (int,), (int, float)))):
                    raise TypeError("a field of another type")
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise rows.DataError(f"{file}:{number}: not a response ({type(error).__name__}: {error})") from error
            yield response


def replaced(workdir: pathlib.Path, ids: pa.ChunkedArray) -> np.ndarray:
    """Which rows were masked in the run, [n] bool: at the end of an epoch, or with a generated response that a step used."""
    masked = pa.chunked_array([], pa.string())
    for file in weight_table.epoch_files(workdir).values():
        table = weight_table.read(file, weight_table.MASKS)
        masked = pa.chunked_array([*masked.chunks, *table.filter(table["masked"])["id"].chunks], pa.string())
    responses = workdir / "responses.jsonl"
    if responses.exists():
        used = {response["id"] for response in _read_responses(responses) if response.get("ratio") is not None}
        masked = pa.chunked_array([*masked.chunks, pa.array([*used], pa.string())])
    return pc.is_in(ids, value_set=masked.combine_chunks()).to_numpy()


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
        changed: dict[str, Any] = {row.schema: messages.with_last_answer(row.fields[row.schema], response)}
    elif isinstance(row.fields.get("completion"), list):
        changed = {"completion": messages.with_last_answer(row.fields["completion"], response)}
    elif row.schema in RESPONSE_FIELDS:
        changed = {RESPONSE_FIELDS[row.schema]: response}
    else:
        raise rows.DataError(f"line {row.line}: --refined cannot replace one response of a {row.schema} row; remove the flag")
    return dataclasses.replace(rows.with_answer(row, response), fields={**row.fields, **changed})


def refine(one: Kept, responses: Mapping[str, str]) -> tuple[Kept, dict]:
    """A row with its columns `refined` and `original_response`. A masked row gets its generated response, if there is one."""
    response = responses.get(one.row.id) if one.masked else None
    columns = {"refined": response is not None, "original_response": one.row.response}
    return one if response is None else one._replace(row=with_response(one.row, response)), columns


# --------------------------------------------------------------------------------------------------------------------
# Columns
# --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Traits:
    """What all rows have in common."""

    pairs: bool = True
    prompt_completion: bool = True  # the schema
    messages: bool = True  # the schema
    tools_used: bool = True  # rows with a field `tools` have tools

    def add(self, row: rows.Row) -> None:
        """Takes one more row into account."""
        self.pairs &= row.rejected is not None
        self.prompt_completion &= row.schema == "prompt/completion"
        self.messages &= row.schema == "messages"
        self.tools_used &= bool(row.tools) or not row.fields.get("tools")


def resolve_format(form: str, traits: Traits, template: str) -> str:
    """`chat`, `text`, `original`, or `as is`: no new columns, but fields that SFTTrainer interprets are renamed."""
    if form != "auto":
        return form
    if traits.pairs:
        return "original"  # pairs stay pairs
    if traits.prompt_completion:
        return "as is"
    return "chat" if template == "chat" else "text"


def prompt_columns(row: rows.Row, form: str, tokenizer, template: str) -> dict:
    """`prompt` and `completion` of a row, if the format has them. `template` is as returned by `templates.resolve`."""
    if form == "chat":
        *prompt, completion = templates.messages_of(row, with_response=True)
        return {"prompt": prompt, "completion": [completion]} | ({"tools": row.tools} if row.tools else {})
    if form == "text":
        rendered = templates.render(row, tokenizer, template)
        text = rendered.rstrip(" ")  # the concatenation stays the same, and the prompt ends at a token boundary
        return {"prompt": text, "completion": rendered[len(text) :] + templates.response_text(row, tokenizer)}
    return {}


def misread(form: str, traits: Traits) -> set[str]:
    """Names of fields that SFTTrainer would misinterpret."""
    if form == "original":
        return set()
    harmless = set()
    if form == "chat" and traits.messages:
        harmless.add("messages")
    if form == "chat" and traits.tools_used:
        harmless.add("tools")
    return set(READ_BY_TRL) - harmless

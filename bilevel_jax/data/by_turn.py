"""Every answer of a conversation as a row of its own (`selection.unit=turn`): the conversation up to that answer.

Answer k of the row ID is the row ID.k, so that weights and exported rows carry the turn. A row with one answer stays as it is.
"""

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np

from bilevel_jax.data import messages, templates
from bilevel_jax.data.rows import Row


def rows_of(row: Row, of_last: Collection[str] = ()) -> list[Row]:
    """The rows of the answers of a conversation, in order. A blank earlier answer has none, and a preference stays one row.

    Args:
      row: of any schema.
      of_last: fields that say something about the last answer, which the others do not get.
    """
    turns = _earlier_answers(row)
    if not turns:
        return [row]
    earlier = [
        dataclasses.replace(
            row,
            id=f"{row.id}.{number}",
            messages=row.messages[:i],
            response=row.messages[i][1],
            fields=_fields(row, i + 1, of_last),
            chat=None if row.chat is None else row.chat[: i + 1],
            is_cut=True,
        )
        for number, i in enumerate(turns, 1)
    ]
    return [*earlier, dataclasses.replace(row, id=f"{row.id}.{len(turns) + 1}")]


def num_rows(row: Row) -> int:
    """The number of rows of `rows_of`."""
    return len(_earlier_answers(row)) + 1


def _earlier_answers(row: Row) -> list[int]:
    """The messages before the response that are answers; none of preferences."""
    if row.rejected is not None:
        return []
    return [i for i, (role, content) in enumerate(row.messages) if role == "assistant" and content.strip()]


def split(
    rows: Sequence[Row], examples: Sequence[templates.Example], of_last: Collection[str] = ()
) -> tuple[list[Row], list[templates.Example]]:
    """The rows of all learned answers, with their tokens, in order. An answer that opens a conversation has no question: no row.

    Args:
      rows, examples: from `templates.encode` with `learn="all"`.
      of_last: as in `rows_of`.
    """
    new_rows, new_examples = [], []
    for row, example in zip(rows, examples, strict=True):
        parts = rows_of(row, of_last)
        if len(parts) == 1:
            new_rows.append(row)
            new_examples.append(example)
            continue
        tokens = np.concatenate([example.prompt, example.response])
        for part, (start, stop) in zip(parts, [*example.earlier, (len(example.prompt), example.size)]):  # fewer spans if it is cut
            if 0 < start < stop and part.messages:
                new_rows.append(part)
                new_examples.append(templates.Example(tokens[:start], tokens[start:stop], None))
    return new_rows, new_examples


def _fields(row: Row, number: int, of_last: Collection[str]) -> dict:
    """The fields of a row with the first `number` turns of its conversation, the last of which is an answer."""
    fields = {name: value for name, value in row.fields.items() if name not in of_last}
    if row.schema in ("messages", "conversations"):
        return fields | {row.schema: messages.first_turns(fields[row.schema], number)}
    if row.schema == "prompt/chosen/rejected":  # only the last answer has a rejected one, so the others are prompt and completion
        fields = {name: value for name, value in fields.items() if name not in ("chosen", "rejected")}
        *turns, answer = templates.messages_of(row, with_response=False)[: number + bool(row.system)]
        return fields | {"prompt": turns, "completion": [answer]}
    prompt = fields["prompt"] if isinstance(fields["prompt"], list) else [{"role": "user", "content": fields["prompt"]}]
    *turns, answer = messages.first_turns([*prompt, *fields["completion"]], number)
    return fields | {"prompt": turns, "completion": [answer]}

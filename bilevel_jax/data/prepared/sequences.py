"""Sequences of prepared rows, of their tokens and of their ids, whose elements are made from a `Store` when they are used."""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow as pa

from bilevel_jax import progress
from bilevel_jax.data import by_turn, rows, templates
from bilevel_jax.data.prepared.stored import TOKENS, Store
from bilevel_jax.data.rows import Row

BLOCK = 1024  # rows whose tokens are put together at a time


def rows_of(store: Store) -> "StoredRows":
    """All rows of a store."""
    return StoredRows(store, np.arange(len(store)))


class Stored(Sequence):
    """Elements that are made from a store when they are used.

    Subclasses are dataclasses. Their fields that are arrays have an element for each of this sequence.
    """

    store: Store
    index: np.ndarray  # type: ignore[assignment]  # [n] rows of the store, in place of `Sequence.index`

    def _get(self, i: int) -> Any:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.index)

    @overload
    def __getitem__(self, i: int | np.integer) -> Any: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence: ...
    def __getitem__(self, i):
        if isinstance(i, slice):
            return self.take(np.arange(len(self))[i])
        if not -len(self) <= i < len(self):
            raise IndexError(f"{i} is out of range for {len(self)} rows")
        return self._get(int(i) % len(self))

    def _arrays(self) -> dict[str, np.ndarray]:
        return {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}

    def take(self, indices: np.ndarray):
        """The elements at some indices."""
        taken = {name: array[indices] for name, array in self._arrays().items()}
        return dataclasses.replace(self, **taken)  # type: ignore[type-var]  # of a subclass, which is a dataclass

    def __add__(self, other):
        """One sequence after another of the same store."""
        both = self._arrays(), other._arrays() if isinstance(other, type(self)) and other.store is self.store else {}
        if both[0].keys() != both[1].keys():
            return [*self, *other]
        joined = {name: np.concatenate([array, both[1][name]]) for name, array in both[0].items()}
        return dataclasses.replace(self, **joined)  # type: ignore[type-var]  # as in `take`


@dataclasses.dataclass(frozen=True, eq=False)
class StoredRows(Stored):
    """Rows; with `turn`, rows of single answers, see `by_turn`."""

    store: Store
    index: np.ndarray
    turn: np.ndarray | None = None  # [n] index of the answer; -1: the row as it is
    of_last: tuple[str, ...] = ()  # as in `by_turn.rows_of`

    def _get(self, i: int) -> Row:
        row = self.store.row(self.index[i])
        if self.turn is None or self.turn[i] < 0:
            return row
        return by_turn.rows_of(row, self.of_last)[int(self.turn[i])]

    def examples(self) -> "StoredExamples":
        """The tokens of the rows as they are in the source; not those of single answers."""
        return StoredExamples(self.store, self.index)

    @property
    def ids(self) -> "StoredIds":
        return StoredIds(self.store, self.index, self.turn)

    @property
    def contents(self) -> np.ndarray:
        """`rows.content_of` of each row as a number, [n] uint64."""
        return self.store.index["content"][self.index]

    @property
    def unpaired_contents(self) -> np.ndarray:
        """`rows.unpaired_content` of each row as a number, [n] uint64."""
        return self.store.index["unpaired"][self.index]

    def sources(self) -> pa.DictionaryArray:
        """The source of each row, [n]."""
        return self.store.text["source"].take(pa.array(self.index))

    def marks(self, field: str) -> np.ndarray:
        """`rows.mark_code` of each row, [n] int8. Reads all rows if it is another field than that of the preparation."""
        if field == self.store.job.label and field not in self.of_last:
            return self.store.index["marked"][self.index]
        marks = np.empty(len(self), np.int8)
        for i in progress.bar(range(len(self)), desc=f"reading {field}", unit="row"):
            marks[i] = rows.mark_code(self[i], field)
        return marks

    def fields(self, name: str) -> "StoredField":
        return StoredField(self, name)


@dataclasses.dataclass(frozen=True, eq=False)
class StoredIds(Stored):
    """The ids of rows."""

    store: Store
    index: np.ndarray
    turn: np.ndarray | None = None

    def _get(self, i: int) -> str:
        whole = self.store.id(self.index[i])
        return whole if self.turn is None or self.turn[i] < 0 else f"{whole}.{int(self.turn[i]) + 1}"

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), BLOCK):
            part = slice(first, first + BLOCK)
            index = self.index[part]
            contents, copies = self.store.index["content"][index].tolist(), self.store.index["copy"][index].tolist()
            turns = [-1] * len(index) if self.turn is None else self.turn[part].tolist()
            for content, copy, turn in zip(contents, copies, turns):
                yield f"{content:016x}{f'-{copy}' if copy > 1 else ''}{f'.{turn + 1}' if turn >= 0 else ''}"


class StoredField(Sequence):
    """A field of each row; None where it is not a text."""

    def __init__(self, stored: StoredRows, name: str):
        self._stored, self._name = stored, name

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(len(self))[i]]
        value = self._stored[i].fields.get(self._name)
        return value if isinstance(value, str) else None


@dataclasses.dataclass(frozen=True, eq=False)
class StoredExamples(Stored):
    """Token ids; with `start` and `stop`, the answers there with what precedes them."""

    store: Store
    index: np.ndarray
    max_length: int = 0  # to which examples are cut as by `templates.fit`; 0: they are not
    cut_turns: bool = True
    start: np.ndarray | None = None  # [n] first token of the answer; -1: the example as it is
    stop: np.ndarray | None = None

    @property
    def largest_token(self) -> int:
        """A bound of all tokens."""
        return self.store.largest_token

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of each row, [n]: question and response, or a pair's question twice with both responses."""
        prompt, response, rejected = (self.store.index[name][self.index] for name in ("prompt", "response", "rejected"))
        sizes = prompt + response + np.where(rejected >= 0, prompt + rejected, 0)
        if self.max_length:
            sizes = np.where(rejected >= 0, sizes, np.minimum(sizes, self.max_length))
            for i in np.flatnonzero(prompt >= self.max_length):
                sizes[i] = self[i].size
        return sizes if self.start is None or self.stop is None else np.where(self.start >= 0, self.stop, sizes)

    def _get(self, i: int) -> templates.Example:
        example = self.store.example(self.index[i])
        if self.max_length:
            shorter, note = templates.fit_one(example, self.max_length, self.cut_turns)
            assert shorter is not None, note  # `fit` leaves the others out
            example = shorter
        if self.start is None or self.stop is None or self.start[i] < 0:
            return example
        tokens = np.concatenate([example.prompt, example.response])
        return templates.Example(tokens[: self.start[i]], tokens[self.start[i] : self.stop[i]], None)

    def fit(self, max_length: int, cut_turns: bool) -> tuple[np.ndarray, "StoredExamples", dict[str, tuple[int, int]]]:
        """`templates.fit` of these examples."""
        prompt, response, rejected = (self.store.index[name][self.index] for name in ("prompt", "response", "rejected"))
        reasons = self.store.text["reason"].take(pa.array(self.index))
        reason = reasons.indices.fill_null(-1).to_numpy()
        refused, is_pair = reason >= 0, rejected >= 0
        empty = ~refused & ((prompt == 0) | (response == 0) | (rejected == 0))
        usable = ~refused & ~empty
        over = usable & is_pair & (2 * prompt + response + rejected > max_length)
        long = usable & ~is_pair & (prompt >= max_length)
        where = {
            "question or response without a token": empty,
            f"pair over {max_length} tokens": over,
            f"response cut to {max_length} tokens": usable & ~is_pair & ~long & (prompt + response > max_length),
        }
        noted = {note: np.flatnonzero(mask).tolist() for note, mask in where.items()}
        for code, text in enumerate(reasons.dictionary.to_pylist()):
            noted[text] = np.flatnonzero(reason == code).tolist()
        keeps = usable & ~over
        for i in np.flatnonzero(long):
            shorter, note = templates.fit_one(self.store.example(self.index[i]), max_length, cut_turns)
            noted.setdefault(note, []).append(int(i))
            keeps[i] = shorter is not None
        in_order = sorted((indices[0], note, len(indices)) for note, indices in noted.items() if indices)
        counts = {note: (number, self.store.line(self.index[first])) for first, note, number in in_order}
        kept = np.flatnonzero(keeps)
        return kept, StoredExamples(self.store, self.index[kept], max_length, cut_turns), counts

    def token_blocks(self) -> Iterator[bytes]:
        """`Example.token_bytes` of all, of many at a time."""
        prompt = self.store.index["prompt"][self.index]
        cut = prompt >= self.max_length if self.max_length else np.zeros(len(self), bool)
        numbers = self.store.shard_of(self.index)
        bounds = np.flatnonzero(np.diff(numbers)) + 1
        for first, end in zip([0, *bounds.tolist()], [*bounds.tolist(), len(self)]):
            for begin in range(first, end, BLOCK):
                part = slice(begin, min(begin + BLOCK, end))
                if self.start is not None or cut[part].any():
                    yield b"".join(self[i].token_bytes for i in range(part.start, part.stop))
                else:
                    yield self._tokens(int(numbers[begin]), self.index[part]).astype("<i4").tobytes()
            self.store.release()

    def _tokens(self, number: int, index: np.ndarray) -> np.ndarray:
        """The tokens of uncut rows of one shard: each part that a row has, with -1 after it."""
        shard, local = self.store.mapped(number), index - self.store.first_row(number)
        is_pair = self.store.index["rejected"][index] >= 0
        pieces: list[_Piece] = []
        for name in TOKENS:
            offsets, values = shard.lists[name]
            start, length = offsets[local].astype(np.int64), np.diff(offsets)[local].astype(np.int64)
            has = {"rejected": is_pair, "earlier": length > 0}.get(name, np.ones(len(index), bool))
            if name == "response" and self.max_length:
                room = self.max_length - pieces[0].length
                length = np.where(is_pair, length, np.minimum(length, room))
            pieces.append(_Piece(values, start, length, has))
        sizes = np.stack([np.where(piece.has, piece.length + 1, 0) for piece in pieces], 1)
        starts = (np.cumsum(sizes) - sizes.ravel()).reshape(sizes.shape)
        out = np.full(sizes.sum(), -1, np.int32)
        for piece, destination in zip(pieces, starts.T):
            length = piece.length[piece.has]
            within = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
            out[np.repeat(destination[piece.has], length) + within] = piece.values[
                np.repeat(piece.start[piece.has], length) + within
            ]
        return out


class _Piece(NamedTuple):
    """A column of lists, and where the lists of some rows are in its values."""

    values: np.ndarray
    start: np.ndarray  # [n]
    length: np.ndarray  # [n]
    has: np.ndarray  # [n] bool, whether the row has the list


def split_turns(stored_rows: StoredRows, examples: StoredExamples, of_last: Collection[str]) -> tuple[StoredRows, StoredExamples]:
    """`by_turn.split` of stored rows."""
    turns = stored_rows.store.index["turns"][stored_rows.index]
    whole = np.flatnonzero(turns == 1)
    rows_at, numbers, starts, stops = [whole], [np.full(len(whole), -1)], [np.full(len(whole), -1)], [np.full(len(whole), -1)]
    several = np.flatnonzero(turns > 1)
    for i in progress.bar(several, desc="splitting conversations", unit="row"):
        example = examples[i]
        spans = [*example.earlier, (len(example.prompt), example.size)][: turns[i]]  # fewer spans than answers if it is cut
        role, text = stored_rows[i].messages[0]
        first = int(role == "assistant" and bool(text.strip()))  # an answer that opens the conversation has no question
        answers = [(k, start, stop) for k, (start, stop) in enumerate(spans) if 0 < start < stop and k >= first]
        learned = np.array(answers).reshape(-1, 3)
        rows_at.append(np.full(len(learned), i))
        for column, values in zip((numbers, starts, stops), learned.T):
            column.append(values)
    row_at, number, start, stop = map(np.concatenate, (rows_at, numbers, starts, stops))
    order = np.lexsort((number, row_at))
    row_at, number, start, stop = row_at[order], number[order].astype(np.int32), start[order], stop[order]
    new_rows = dataclasses.replace(stored_rows.take(row_at), turn=number, of_last=tuple(of_last))
    return new_rows, dataclasses.replace(examples.take(row_at), start=start.astype(np.int32), stop=stop.astype(np.int32))


def ids(given: Sequence[Row]) -> Sequence[str]:
    """The id of each row, [n]; prepared rows are not parsed."""
    return given.ids if isinstance(given, StoredRows) else [row.id for row in given]


def contents(given: Sequence[Row], pairs: bool = True) -> np.ndarray:
    """The content of each row as a number, [n] uint64; prepared rows are not parsed.

    Args:
      given: rows of which none is a single answer of a conversation.
      pairs: whether the rejected response of a pair is part of the content, as it is of the id.
    """
    if isinstance(given, StoredRows):
        return given.contents if pairs else given.unpaired_contents
    ids = (rows.content_of(row.id) if pairs else rows.unpaired_content(row) for row in given)
    return np.fromiter((int(one, 16) for one in ids), np.uint64, len(given))


def sizes(examples: Sequence[templates.Example]) -> np.ndarray:
    """Tokens of each row, [n]: question and response, or a pair's question twice with both responses."""
    if isinstance(examples, StoredExamples):
        return examples.sizes
    extra = [0 if one.rejected is None else len(one.prompt) + len(one.rejected) for one in examples]
    return np.array([one.size for one in examples], int) + np.array(extra, int)

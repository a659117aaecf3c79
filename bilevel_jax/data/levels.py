"""Loads the two levels: reads, tokenizes and compares their rows, and splits them into training and held-out rows."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa

from bilevel_jax.data import by_turn, duplicates, rows, sources, templates
from bilevel_jax.data.columns import Columns
from bilevel_jax.data.prepared import cache, sequences
from bilevel_jax.data.rows import Row
from bilevel_jax.text import say

OVERLAP = ("warn", "drop", "refuse")
GENERATING = ("online", "dynamic")  # methods whose responses answer the last question of a row, so that it must fit


@dataclasses.dataclass(frozen=True)
class Level:
    """Training and held-out rows, with their token ids."""

    rows: Sequence[Row]
    examples: Sequence[templates.Example]
    eval_rows: Sequence[Row]
    eval_examples: Sequence[templates.Example]
    references: np.ndarray | None = None  # [n, 2] reference log-probabilities of chosen and rejected; None: no pairs
    counts: Mapping[str, object] = dataclasses.field(default_factory=dict)  # of duplicates and overlap, for the summary

    @functools.cached_property
    def ids(self) -> Sequence[str]:
        """Those of the training rows."""
        return sequences.ids(self.rows)

    @property
    def all_ids(self) -> Iterator[str]:
        """The ids of the training rows and of the held-out rows."""
        return itertools.chain(self.ids, sequences.ids(self.eval_rows))

    @property
    def all_examples(self) -> Sequence[templates.Example]:
        """Those of the training rows and of the held-out rows."""
        return _joined(self.examples, self.eval_examples)


@dataclasses.dataclass(frozen=True)
class _Read:
    """The usable rows of a level before its split."""

    level: str
    source: str
    rows: Sequence[Row]
    examples: Sequence[templates.Example]
    counts: Mapping[str, object]
    pairs: bool  # whether rejected responses are used

    def pick(self, indices: np.ndarray) -> tuple[Sequence[Row], Sequence[templates.Example]]:
        return _pick(self.rows, indices), _pick(self.examples, indices)

    def only(self, keep: np.ndarray, **counts: object) -> "_Read":
        kept_rows, examples = self.pick(keep)
        return dataclasses.replace(self, rows=kept_rows, examples=examples, counts={**self.counts, **counts})


def _pick(items: Sequence, indices: np.ndarray) -> Sequence:
    return items.take(indices) if isinstance(items, sequences.Stored) else [items[i] for i in indices]


def _joined(first: Sequence, second: Sequence) -> Sequence:
    return first + second if isinstance(first, sequences.Stored) else [*first, *second]


def usable(config, source: str, all_rows: Sequence[Row], report, tokenizer) -> tuple[Sequence[Row], Sequence[templates.Example]]:
    """Returns the rows that fit into `data.max_length` tokens, with their token ids. Prints the report and the rows left out.

    Raises:
      DataError: no row fits.
    """
    say("\n".join(report.summary()))
    cut_turns = config.method not in GENERATING
    encoded: Sequence[templates.Example]
    examples: Sequence[templates.Example]
    counts: Mapping[str, tuple[int, int]]
    if isinstance(all_rows, sequences.StoredRows):
        encoded = all_rows.examples()
        kept, examples, counts = encoded.fit(config.data.max_length, cut_turns)
    else:
        encoded = templates.encode(all_rows, tokenizer, template=config.data.template, learn=config.data.learn)
        indices, examples, counts = templates.fit(encoded, all_rows, config.data.max_length, cut_turns)
        kept = np.array(indices, int)
    for reason, (count, line) in counts.items():
        what = f"{count}" if templates.CUT in reason else f"left out {count}"
        say(f"  {what}: {reason} (first: {rows.location(source, line)})")
    if not len(kept):
        if len(counts) == 1 and encoded[0].reason:
            raise rows.DataError(f"{rows.location(source, all_rows[0].line)}: {encoded[0].reason}; no row can be used")
        raise rows.DataError(f"{source}: no row fits data.max_length={config.data.max_length} tokens")
    return _pick(all_rows, kept), examples


def load_level(config, level: str, tokenizer) -> Level:
    """Reads, tokenizes and splits one level; prints a report.

    Raises:
      DataError: the source cannot be used, or too few rows remain for training.
    """
    (loaded,) = _split(config, [_read(config, level, tokenizer, columns_of(config))])
    return loaded


def load_levels(config, tokenizer) -> tuple[Level, Level]:
    """Both levels, upper first. No training row of either level has the content of a held-out row.

    Raises:
      DataError: a source cannot be used, too few rows remain for training, or `data.overlap=refuse` and rows are on both levels.
    """
    columns = columns_of(config)
    all_upper, all_lower = (_read(config, level, tokenizer, columns) for level in ("upper", "lower"))
    columns.check(f"{all_upper.source} and {all_lower.source}")
    upper, lower = _split(config, [all_upper, _without_overlap(config, all_upper, all_lower)])
    return upper, _by_turn(config, lower) if weighs_turns(config) else lower


def weighs_turns(config) -> bool:
    """Whether every answer of a conversation has a weight of its own."""
    return config.method != "mixing" and config.selection.unit == "turn"


def _by_turn(config, level: Level) -> Level:
    """The level with a training row for every answer; held-out rows stay whole."""
    split: Callable = sequences.split_turns if isinstance(level.rows, sequences.StoredRows) else by_turn.split
    turn_rows, examples = split(level.rows, level.examples, of_last=[config.data.truth])
    say(f"the {len(level.rows)} rows to train on have {len(examples)} answers, each with a weight of its own")
    return dataclasses.replace(level, rows=turn_rows, examples=examples)


def columns_of(config) -> Columns:
    """Other names of columns."""
    return Columns(config.data.columns, "data.columns")


def _read(config, level: str, tokenizer, columns: Columns) -> _Read:
    """Reads and tokenizes one level, and removes duplicates as `data.deduplicate` says."""
    source = getattr(config.data, level)
    all_rows, report = _open(config, level, tokenizer, columns)
    pairs = getattr(config.loss, level) != "sft"
    read = _Read(level, source, *usable(config, source, all_rows, report, tokenizer), counts={}, pairs=pairs)
    mode = config.data.deduplicate
    cluster = duplicates.clusters(read.rows, mode, pairs)
    sizes = duplicates.sizes(cluster)
    if not sizes:
        return read
    copies, kind = duplicates.num_copies(sizes), "near-duplicates" if mode == "near" else "copies"
    what = "data.deduplicate=exact drops them" if mode == "off" else "dropped"
    first = int(np.flatnonzero(cluster != np.arange(len(cluster)))[0])
    where = f"{rows.location(source, read.rows[first].line)} is one of {rows.location(source, read.rows[cluster[first]].line)}"
    say(f"  {copies} {kind} of {sum(sizes.values())} other rows, the largest cluster has {max(sizes)} ({where}); {what}")
    keep = np.arange(len(cluster)) if mode == "off" else np.unique(cluster)
    clusters = {str(size): count for size, count in sizes.items()}
    return read.only(keep, duplicates=copies, duplicate_clusters=clusters)


def _open(config, level: str, tokenizer, columns: Columns) -> tuple[Sequence[Row], rows.Report]:
    """All rows of a level: prepared ones, or rows in memory."""
    source, num_rows = getattr(config.data, level), getattr(config.data, f"num_{level}")
    preference = getattr(config.loss, level) != "sft"
    options = cache.Options(
        template=config.data.template,
        learn=config.data.learn,
        preference=preference,
        columns=config.data.columns,
        num_rows=num_rows,
        seed=config.seed,
        label=config.data.label,
    )
    prepared = cache.open_rows(config.data.cache, source, tokenizer, options, columns)
    read: Sequence[Row]
    if prepared:
        read, report = sequences.rows_of(prepared[0]), prepared[1]
    else:
        read, report = sources.open_source(
            source,
            seed=config.seed,
            num_rows=num_rows,
            bad_fraction=config.data.bad_fraction,
            preference=preference,
            columns=columns,
        )
    if len(read) < num_rows:
        say(f"data.num_{level}={num_rows} is more than there are: all {len(read)} rows of {source} are taken")
    return read, report


def _without_overlap(config, upper: _Read, lower: _Read) -> _Read:
    """The lower level, without the rows of the upper one if `data.overlap=drop`.

    Raises:
      DataError: rows are on both levels and `data.overlap=refuse`.
    """
    is_both = _are_among(lower, lower.rows, upper, upper.rows)
    both = np.flatnonzero(is_both)
    if not len(both):
        return lower
    where = rows.location(lower.source, lower.rows[int(both[0])].line)
    what = f"{len(both)} of {len(lower.rows)} rows of data.lower are also in data.upper (first: {where})"
    if config.data.overlap == "refuse":
        raise rows.DataError(f"{what}; remove them, or take data.overlap=drop or warn")
    if config.data.overlap == "warn":
        say(f"warning: {what}; data.overlap=drop leaves them out of the lower level")
        return dataclasses.replace(lower, counts={**lower.counts, "overlap": len(both)})
    say(f"{what}; left out of the lower level")
    if len(both) == len(lower.rows):
        raise rows.DataError(f"data.overlap=drop leaves no row of {lower.source}: all are also in {upper.source}")
    return lower.only(np.flatnonzero(~is_both), overlap=len(both))


def _split(config, read: Sequence[_Read]) -> list[Level]:
    """Splits each level. Rows with the content of a held-out row of any level are not trained on."""
    splits = []
    for one in read:
        num_eval = sources.num_held_out(getattr(config.eval, f"num_{one.level}"), len(one.rows))
        if num_eval >= len(one.rows):
            what = f"eval.num_{one.level}={num_eval} leaves no row for training: {one.source} has {len(one.rows)} usable rows"
            raise rows.DataError(f"{what}; hold out a share of them, such as eval.num_{one.level}=0.1")
        splits.append(sources.split(one.rows, num_eval, config.seed))
    held = [(one, _pick(one.rows, held_out)) for one, (_, held_out) in zip(read, splits)]
    return [_level(one, train, held_out, held) for one, (train, held_out) in zip(read, splits)]


def _are_among(read: _Read, some: Sequence[Row], other: _Read, others: Sequence[Row]) -> np.ndarray:
    """Which rows of a level have the content of one of the rows of another level, [n] bool.

    A rejected response counts where both levels use it: without it, pairs that differ in it alone are the same row.
    """
    pairs = read.pairs and other.pairs
    return np.isin(sequences.contents(some, pairs), sequences.contents(others, pairs))


def _level(read: _Read, train: np.ndarray, held_out: np.ndarray, held: Sequence[tuple[_Read, Sequence[Row]]]) -> Level:
    train_rows = _pick(read.rows, train)
    free = train[~np.any([_are_among(read, train_rows, other, others) for other, others in held], axis=0)]
    counts = dict(read.counts)
    if len(free) < len(train):
        counts["held_out_copies"] = len(train) - len(free)
        say(f"{len(train) - len(free)} rows of data.{read.level} are copies of held-out rows and are not trained on")
    if not len(free):
        raise rows.DataError(f"{read.source}: no row is left for training, all are also held out; hold out fewer (eval.num_*)")
    return Level(*read.pick(free), *read.pick(held_out), counts=counts)


def prefers(config) -> bool:
    """Whether the lower level has preference rows."""
    return config.loss.lower != "sft"


def with_truth(level: Level, config, tokenizer) -> list[templates.Example]:
    """The held-out questions with their right responses; rows without a right response are skipped."""
    field = config.data.truth
    answerable = [row for row in level.eval_rows if isinstance(row.fields.get(field), str) and row.fields[field].strip()]
    answered = [rows.with_answer(row, row.fields[field]) for row in answerable]
    encoded = templates.encode(answered, tokenizer, template=config.data.template, learn="last")
    return templates.fit(encoded, answered, config.data.max_length)[1]


def domains(level: Level, source: str) -> tuple[list[str], np.ndarray]:
    """Returns the distinct sources of the training rows, and the index of each row's source, [n] int32.

    Raises:
      DataError: all rows have the same source, or none has a source.
    """
    sources_of_rows = source_names(level)
    used, codes = np.unique(sources_of_rows.indices.to_numpy(), return_inverse=True)
    names, rank = np.unique(np.array(sources_of_rows.dictionary.to_pylist())[used], return_inverse=True)
    domain_of_row = rank[codes]
    if len(names) < 2:
        problem = f"all rows have source '{names[0]}'" if names[0] else "no row has a field 'source'"
        raise rows.DataError(f"{source}: {problem}; selection.unit=domain needs several sources")
    return [str(name) for name in names], domain_of_row.astype(np.int32)


def source_names(level: Level) -> pa.DictionaryArray:
    """The source of each training row, [n]."""
    if isinstance(level.rows, sequences.StoredRows):
        return level.rows.sources()
    index: dict[str, int] = {}
    codes = np.fromiter((index.setdefault(row.source, len(index)) for row in level.rows), np.int32, len(level.rows))
    return pa.DictionaryArray.from_arrays(codes, pa.array(list(index), pa.string()))


def labels(level: Level, field: str) -> np.ndarray | None:
    """Whether each training row is marked bad, [n] bool, for measurement; None if no row has the field."""
    if isinstance(level.rows, sequences.StoredRows):
        codes = level.rows.marks(field)
    else:
        codes = np.array([rows.mark_code(row, field) for row in level.rows], np.int8)
    return codes > 0 if (codes != rows.UNLABELLED).any() else None


def truths(level: Level, field: str) -> Sequence[str | None]:
    """The right response of every training row, for measurement; None if the row has none."""
    if isinstance(level.rows, sequences.StoredRows):
        return level.rows.fields(field)
    values = (row.fields.get(field) for row in level.rows)
    return [value if isinstance(value, str) else None for value in values]

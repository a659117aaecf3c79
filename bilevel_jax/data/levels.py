"""Loads one level: reads, tokenizes and splits its rows into training and held-out rows."""

import dataclasses

import numpy as np

from bilevel_jax.data import rows, sources, templates


@dataclasses.dataclass(frozen=True)
class Level:
    """Training and held-out rows, with their token ids."""

    rows: list[rows.Row]
    examples: list[templates.Example]
    eval_rows: list[rows.Row]
    eval_examples: list[templates.Example]
    references: np.ndarray | None = None  # [n, 2] reference log-probabilities of chosen and rejected; None: no pairs


def usable(config, source: str, all_rows: list[rows.Row], report, tokenizer) -> tuple[list[rows.Row], list[templates.Example]]:
    """Returns the rows that fit into `data.max_length` tokens, with their token ids. Prints the report and the rows left out.

    Raises:
      DataError: no row fits.
    """
    print("\n".join(report.summary()))
    encoded = templates.encode(all_rows, tokenizer, template=config.data.template)
    kept, examples, counts = templates.fit(encoded, all_rows, config.data.max_length)
    for reason, (count, line) in counts.items():
        print(f"  {count}: {reason} (first: {rows.location(source, line)})")
    if not kept:
        raise rows.DataError(f"{source}: no row fits data.max_length={config.data.max_length} tokens")
    return [all_rows[i] for i in kept], examples


def load_level(config, level: str, tokenizer) -> Level:
    """Reads, tokenizes and splits one level; prints a report.

    Raises:
      DataError: the source cannot be used, or too few rows remain for training.
    """
    source, limit = getattr(config.data, level), getattr(config.data, f"num_{level}")
    preference = getattr(config.loss, level) != "sft"
    all_rows, report = sources.open_source(
        source, seed=config.seed, num_rows=limit, bad_fraction=config.data.bad_fraction, preference=preference
    )
    kept, examples = usable(config, source, all_rows, report, tokenizer)
    num_eval = sources.num_held_out(getattr(config.eval, f"num_{level}"), len(kept))
    if num_eval >= len(kept):
        what = f"eval.num_{level}={num_eval} leaves no row for training: {source} has {len(kept)} usable rows"
        raise rows.DataError(f"{what}; hold out a share of them, such as eval.num_{level}=0.1")
    train, held_out = sources.split(kept, num_eval, config.seed)

    def pick(items, indices):
        return [items[i] for i in indices]

    return Level(pick(kept, train), pick(examples, train), pick(kept, held_out), pick(examples, held_out))


def reopen(config) -> list[rows.Row]:
    """Reads the lower level's rows of a run again, including the held-out rows.

    Raises:
      DataError: the source no longer exists, or has no usable row.
    """
    lower_rows, _ = sources.open_source(
        config.data.lower,
        seed=config.seed,
        num_rows=config.data.num_lower,
        bad_fraction=config.data.bad_fraction,
        preference=config.loss.get("lower", "sft") != "sft",  # earlier runs have no such key
    )
    return lower_rows


def with_truth(level: Level, config, tokenizer) -> list[templates.Example]:
    """The held-out questions with their right responses; rows without a right response are skipped."""
    field = config.data.truth
    answerable = [row for row in level.eval_rows if isinstance(row.fields.get(field), str) and row.fields[field].strip()]
    answered = [dataclasses.replace(row, response=row.fields[field], rejected=None) for row in answerable]
    encoded = templates.encode(answered, tokenizer, template=config.data.template)
    return templates.fit(encoded, answered, config.data.max_length)[1]


def domains(level: Level, source: str) -> tuple[list[str], np.ndarray]:
    """Returns the distinct sources of the training rows, and the index of each row's source, [n] int32.

    Raises:
      DataError: all rows have the same source, or none has a source.
    """
    names, domain_of_row = np.unique([row.source for row in level.rows], return_inverse=True)
    if len(names) < 2:
        problem = f"all rows have source '{names[0]}'" if names[0] else "no row has a field 'source'"
        raise rows.DataError(f"{source}: {problem}; selection.unit=domain needs several sources")
    return [str(name) for name in names], domain_of_row.astype(np.int32)


def labels(level: Level, field: str) -> np.ndarray | None:
    """Whether each training row is marked bad, [n] bool, for measurement; None if no row has the field."""
    marks = [row.fields.get(field) for row in level.rows]
    return np.array([bool(mark) for mark in marks]) if any(mark is not None for mark in marks) else None


def truths(level: Level, field: str) -> list[str | None]:
    """The right response of every training row, for measurement; None if the row has none."""
    values = (row.fields.get(field) for row in level.rows)
    return [value if isinstance(value, str) else None for value in values]

"""One level's rows, read, tokenized and split into those to train on and those held out."""

import dataclasses

import numpy as np

from bilevel_jax.data import rows, sources, templates


@dataclasses.dataclass(frozen=True)
class Level:
    """Rows to train on and rows held out, each with its token ids."""

    rows: list[rows.Row]
    examples: list[templates.Example]
    eval_rows: list[rows.Row]
    eval_examples: list[templates.Example]
    references: np.ndarray | None = None  # [n, 2] log-probabilities of chosen and rejected under the reference; None: no pairs


def usable(config, source: str, found: list[rows.Row], report, tokenizer) -> tuple[list[rows.Row], list[templates.Example]]:
    """The rows that fit into `data.max_length` tokens, with their token ids. Says what was found in `source` and left out.

    Raises:
      DataError: no row fits.
    """
    print("\n".join(report.summary()))
    encoded = templates.encode(found, tokenizer, template=config.data.template)
    kept, fitting, counts = templates.fit(encoded, found, config.data.max_length)
    for reason, (count, line) in counts.items():
        print(f"  {count}: {reason} (first: {rows.location(source, line)})")
    if not kept:
        raise rows.DataError(f"{source}: no row fits data.max_length={config.data.max_length} tokens")
    return [found[i] for i in kept], fitting


def load_level(config, level: str, tokenizer) -> Level:
    """Reads, tokenizes and splits one level, and says what was found and left out."""
    source, limit = getattr(config.data, level), getattr(config.data, f"num_{level}")
    preference = getattr(config.loss, level) != "sft"
    found, report = sources.open_source(
        source, seed=config.seed, num_rows=limit, bad_fraction=config.data.bad_fraction, preference=preference
    )
    kept, fitting = usable(config, source, found, report, tokenizer)
    num_eval = getattr(config.eval, f"num_{level}")
    if num_eval >= len(kept):
        raise rows.DataError(f"eval.num_{level}={num_eval} leaves nothing to train on: {source} has {len(kept)} usable rows")
    train, held_out = sources.split(kept, num_eval, config.seed)

    def pick(items, places):
        return [items[i] for i in places]

    return Level(pick(kept, train), pick(fitting, train), pick(kept, held_out), pick(fitting, held_out))


def reopen(config) -> list[rows.Row]:
    """The lower level's rows of a run, those held out too, read again from where its config says.

    Raises:
      DataError: if they are not there any more.
    """
    found, _ = sources.open_source(
        config.data.lower,
        seed=config.seed,
        num_rows=config.data.num_lower,
        bad_fraction=config.data.bad_fraction,
        preference=config.loss.get("lower", "sft") != "sft",  # earlier runs have no such key
    )
    return found


def with_truth(level: Level, config, tokenizer) -> list[templates.Example]:
    """The held-out questions with their right responses, where the data know them."""
    field = config.data.truth
    known = [row for row in level.eval_rows if isinstance(row.fields.get(field), str) and row.fields[field].strip()]
    right = [dataclasses.replace(row, response=row.fields[field], rejected=None) for row in known]
    encoded = templates.encode(right, tokenizer, template=config.data.template)
    return templates.fit(encoded, right, config.data.max_length)[1]


def domains(level: Level, source: str) -> tuple[list[str], np.ndarray]:
    """The sources that training rows name, and which of them each row has, [n] int32.

    Raises:
      DataError: all have the same, or none names any.
    """
    names, place = np.unique([row.source for row in level.rows], return_inverse=True)
    if len(names) < 2:
        named = f"all rows have source '{names[0]}'" if names[0] else "no row has a field 'source'"
        raise rows.DataError(f"{source}: {named}; selection.unit=domain needs several sources")
    return [str(name) for name in names], place.astype(np.int32)


def labels(level: Level, field: str) -> np.ndarray | None:
    """Which training rows are marked bad, for measuring the selector; None where the rows do not say."""
    marks = [row.fields.get(field) for row in level.rows]
    return np.array([bool(mark) for mark in marks]) if any(mark is not None for mark in marks) else None


def truths(level: Level, field: str) -> list[str | None]:
    """The right response of every training row, for measuring; None where the row does not say."""
    found = (row.fields.get(field) for row in level.rows)
    return [truth if isinstance(truth, str) else None for truth in found]

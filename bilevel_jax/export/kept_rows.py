"""The rows that a run keeps, with their columns: for the command, which writes them, and for `Run.kept`."""

import dataclasses
import pathlib
from collections.abc import Sequence

import pyarrow as pa

from bilevel_jax.data import levels, rows, templates
from bilevel_jax.export import selected_rows
from bilevel_jax.models import huggingface
from bilevel_jax.runtime import weight_table


@dataclasses.dataclass(frozen=True)
class Selection:
    """Kept rows, and what their card says about them."""

    records: list[dict]  # a row each: its fields and the columns of `selected_rows`
    kept: Sequence[selected_rows.Kept]
    refined_columns: Sequence[dict]  # of `selected_rows.refine`; empty ones without it
    candidates: list[rows.Row]
    table: pa.Table  # the weights of all candidates
    form: str  # of `selected_rows.resolve_format`
    renamed: list[str]  # fields that are now called original_NAME
    num_left_out: int  # implausible rows


def collect(
    workdir: pathlib.Path,
    config,
    *,
    keep: float,
    drop_implausible: float = 0.0,
    refined: bool = False,
    form: str = "auto",
    weight: bool = True,
    new: tuple[list[rows.Row], pa.Table] | None = None,
) -> Selection:
    """Selects the heaviest rows of a finished run, and gives them their columns.

    Args:
      workdir: of the run.
      config: of the run, a `ConfigDict`.
      keep: share of the rows, in (0, 1].
      drop_implausible: share of the rows with the smallest `plausible`, which are left out; in [0, 1).
      refined: masked rows have their latest generated response.
      form: a key of `selected_rows.FORMATS`.
      weight: whether there is a column `weight`; not where rows are repeated by weight.
      new: rows that the run never saw, and the table of their weights.

    Raises:
      FileNotFoundError: the run has no weights, or no responses where `refined` needs them.
      ValueError: nothing is kept, or a name of a column is taken.
    """
    candidates, table = new or (None, weight_table.latest(workdir))
    if table is None:
        raise FileNotFoundError(f"{workdir} has no weights/: direct mixing selects nothing")
    measures, responses = weight_table.known_measures(table), workdir / "responses.jsonl"
    if drop_implausible and "plausible" not in measures:
        raise ValueError(
            f"--drop_implausible: {workdir}/weights of an earlier version has no `plausible`; train again or remove the flag"
        )
    if refined and not responses.exists():
        raise FileNotFoundError(f"{responses} is missing: method={config.method} generates nothing, so --refined has no responses")
    candidates = candidates or levels.reopen(config)
    left_out = selected_rows.implausible(table, drop_implausible)
    kept = selected_rows.select(candidates, table, keep, left_out)
    refined_columns = [{} for _ in kept]
    if refined:
        kept, refined_columns = zip(*selected_rows.refine(kept, selected_rows.latest_responses(responses)))
    kept_rows = [one.row for one in kept]

    tokenizer, template = None, None
    if form in ("auto", "text"):
        tokenizer = templates.load_tokenizer(str(huggingface.locate(config.model.path)))
        template = templates.resolve(config.data.template, tokenizer)
    form = selected_rows.resolve_format(form, kept_rows, template)
    names = [*(["weight"] if weight else []), "rank", *([] if new else ["masked"]), *measures]
    columns = [
        {"id": one.row.id}
        | {name: getattr(one, name) for name in names}
        | more
        | selected_rows.prompt_columns(one.row, form, tokenizer, template)
        for one, more in zip(kept, refined_columns)
    ]
    records, renamed = selected_rows.join(kept_rows, columns, selected_rows.misread(form, kept_rows))
    return Selection(records, kept, refined_columns, candidates, table, form, renamed, len(left_out))

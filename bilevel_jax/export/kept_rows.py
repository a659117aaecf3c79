"""The rows that a run keeps, with their columns: for the command, which writes them, and for `Run.kept`."""

import array
import dataclasses
import itertools
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from bilevel_jax import progress
from bilevel_jax.data import matching, rows, streaming, templates
from bilevel_jax.export import selected_rows
from bilevel_jax.export.records import Records
from bilevel_jax.models import huggingface
from bilevel_jax.runtime import weight_table

UNTIL_ANOTHER = ("original", "as is")  # forms that `auto` takes as long as all rows are of one kind


@dataclasses.dataclass(frozen=True)
class KeptRows:
    """Kept rows, and what their card says about them. Arrays are of all N rows of the table, in its order."""

    records: Records  # a row each: its fields and the columns of `selected_rows`
    order: np.ndarray  # [records] index of each record in the table
    kept: np.ndarray  # [N] bool
    refined: np.ndarray | None  # [N] bool, whether a row has the model's response; None without `refined`
    labels: np.ndarray  # [N] int8, whether the data mark the row as bad; `rows.UNLABELLED` where they do not say
    table: pa.Table  # the weights of all candidates
    form: str  # of `selected_rows.resolve_format`
    renamed: list[str]  # fields that are now called original_NAME
    num_left_out: dict[str, int]  # rows that are left out for the smallest values of a measure, by measure
    round_robin: bool = False  # whether the rows were chosen round-robin over the trusted rows, see `selected_rows.choose`

    @property
    def masked(self) -> np.ndarray:
        """Whether a row's question was left to the model at the end of the run, [N] bool."""
        return self.table["masked"].to_numpy()


class _Writer(NamedTuple):
    """How kept rows get their columns."""

    asked: str  # form of `collect`
    template: str  # "" where the form needs none
    tokenizer: object
    names: list[str]  # fields of `Kept` that are columns
    responses: Mapping[str, str] | None  # generated ones by id; None for those of the data
    label: str  # field of the labels

    def form(self, traits: selected_rows.Traits) -> str:
        """The form for rows with these traits."""
        return selected_rows.resolve_format(self.asked, traits, self.template)

    def columns(self, one: selected_rows.Kept, more: Mapping, form: str) -> dict:
        rendered = selected_rows.prompt_columns(one.row, form, self.tokenizer, self.template)
        return {"id": one.row.id} | {name: getattr(one, name) for name in self.names} | dict(more) | rendered


class _Gathered(NamedTuple):
    """Kept rows before the names of their fields are final; for the fields see `KeptRows`."""

    records: Records
    order: array.array
    refined: np.ndarray
    labels: np.ndarray
    traits: selected_rows.Traits


def collect(
    workdir: pathlib.Path,
    config,
    *,
    keep: float,
    drop_implausible: float = 0.0,
    drop_dissimilar: float = 0.0,
    refined: bool = False,
    form: str = "auto",
    weight: bool = True,
    new: tuple[Sequence[rows.Row], pa.Table] | None = None,
) -> KeptRows:
    """Selects rows of a finished run, see `selected_rows.choose`, and gives them their columns.

    Args:
      workdir: of the run.
      config: of the run, a `ConfigDict`.
      keep: share of the rows, in (0, 1].
      drop_implausible, drop_dissimilar: share of the rows with the smallest `plausible`, and with the smallest `similar`, which
        are left out; in [0, 1).
      refined: masked rows have their latest generated response.
      form: a key of `selected_rows.FORMATS`.
      weight: whether there is a column `weight`; not where rows are repeated by weight.
      new: rows that the run never saw, and the table of their weights.

    Raises:
      FileNotFoundError: the run has no weights, or no responses where `refined` needs them.
      ValueError: nothing is kept, a share of rows with equal weights is asked for, or a name of a column is taken.
    """
    candidates, table = new or (None, weight_table.latest(workdir))
    if table is None:
        cause = "direct mixing selects nothing" if config.method == "mixing" else "the run wrote it, and it was removed"
        raise FileNotFoundError(f"{workdir} has no weights/: {cause}")
    if keep < 1 and weight_table.is_equal(table):
        raise ValueError(f"{workdir}: all weights are equal, so no row is heavier than another; keep all rows, or name another run")
    measures, responses = weight_table.known_measures(table), workdir / "responses.jsonl"
    if refined and not responses.exists():
        raise FileNotFoundError(f"{responses} is missing: method={config.method} generates nothing, so --refined has no responses")
    left_out = _left_out(workdir, table, {"plausible": drop_implausible, "similar": drop_dissimilar})
    kept = selected_rows.choose(table, keep, np.any([*left_out.values()], axis=0) if left_out else None)
    names = [*(["weight"] if weight else []), "rank", *([] if new else ["masked"]), *measures]
    writer = _writer(config, form, names, selected_rows.latest_responses(responses) if refined else None)
    form = writer.form(selected_rows.Traits())
    while True:  # `auto` follows from all rows, which are read again if one is unlike those before it
        gathered = _gather(candidates or streaming.reopen(config), table, kept, writer, form)
        if form not in UNTIL_ANOTHER or writer.form(gathered.traits) == form:
            break
        form = writer.form(gathered.traits)
    return KeptRows(
        records=gathered.records,
        order=np.array(gathered.order),
        kept=kept,
        refined=gathered.refined if refined else None,
        labels=gathered.labels,
        table=table,
        form=form,
        renamed=gathered.records.rename(selected_rows.misread(form, gathered.traits)),
        num_left_out={name: int(chosen.sum()) for name, chosen in left_out.items() if chosen.any()},
        round_robin=selected_rows.is_round_robin(table, keep),
    )


def _left_out(workdir: pathlib.Path, table: pa.Table, shares: Mapping[str, float]) -> dict[str, np.ndarray]:
    """The rows with the smallest values of each measure of which a share is to be left out, [N] bool each, by measure."""
    chosen = {}
    for name, share in shares.items():
        if share and name not in weight_table.known_measures(table):
            cause = "eval.similar=False, few trusted rows or an earlier version" if name == "similar" else "an earlier version"
            what = f"--drop_{selected_rows.OPPOSITES[name]}: {workdir}/weights has no `{name}` ({cause})"
            raise ValueError(f"{what}; train again or remove the flag")
        if share:
            chosen[name] = selected_rows.smallest(table, name, share)
    return chosen


def _writer(config, form: str, names: list[str], responses: Mapping[str, str] | None) -> _Writer:
    tokenizer, template = None, ""
    if form in ("auto", "text"):
        tokenizer = templates.load_tokenizer(str(huggingface.locate(config.model.path)))
        template = templates.resolve(config.data.template, tokenizer)
    return _Writer(form, template, tokenizer, names, responses, config.data.label)


def _gather(candidates: Iterable[rows.Row], table: pa.Table, kept: np.ndarray, writer: _Writer, form: str) -> _Gathered:
    """Reads the candidates once. Ends early at a kept row that calls for another form."""
    refined, labels = np.zeros(len(kept), bool), np.full(len(kept), rows.UNLABELLED, np.int8)
    gathered = _Gathered(Records(), array.array("q"), refined, labels, selected_rows.Traits())
    numbers = selected_rows.numbers(table)
    for indices, block in matching.blocks(progress.bar(candidates, desc="reading rows", unit="row"), table["id"]):
        labels[indices] = [rows.mark_code(row, writer.label) for row in block]
        is_kept = kept[indices]
        ones = selected_rows.with_weights([*itertools.compress(block, is_kept)], numbers, indices[is_kept])
        for index, one in zip(indices[is_kept].tolist(), ones):
            more: dict = {}
            if writer.responses is not None:
                one, more = selected_rows.refine(one, writer.responses)
                refined[index] = more["refined"]
            gathered.traits.add(one.row)
            if form in UNTIL_ANOTHER and writer.form(gathered.traits) != form:
                return gathered
            gathered.order.append(index)
            gathered.records.add(one.row.line, one.row.fields, writer.columns(one, more, form))
    return gathered

"""What the report shows of single rows: texts, weights and numbers, weights of tokens, generated responses."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from bilevel_jax.data import rendering
from bilevel_jax.data import rows as data_rows
from bilevel_jax.report import corners, run_data, shown_rows
from bilevel_jax.report.run_data import RunData
from bilevel_jax.runtime import weight_table
from bilevel_jax.text import one_line, visible

NUM_TINTS = 5  # tints from a weight of 1 to a weight of 0
NUM_COMPARED = 8  # generated responses shown next to those of the data
SHORT, LONG = 160, 2000  # characters of a text, folded and unfolded
MAX_SHORT_LINES = 5


class Text(NamedTuple):
    """A text of a row, escaped except for markup, which the template escapes."""

    short: str  # folded
    full: str  # unfolded; "" if `short` is the complete text
    num_cut: int  # characters that `full` leaves out


def text_of(text: str) -> Text:
    if len(text) <= SHORT and text.count("\n") < MAX_SHORT_LINES:
        return Text(visible(text), "", 0)
    return Text(one_line(text, SHORT), visible(text[:LONG]), max(0, len(text) - LONG))


def _learned_earlier(run: RunData, row: data_rows.Row, masked: bool) -> bool:
    """Whether the run learned the answers before the response of a row."""
    # Runs of earlier versions have no such keys.
    one_answer = run.config.data.learn == "last" or run.config.selection.unit == "turn"
    if masked or row.rejected is not None or one_answer:
        return False
    return any(role == "assistant" for role, _ in row.messages)


def _marked_question(row: data_rows.Row) -> str:
    """The question of a row, with the answers in it between marks."""
    answer = f"{rendering.OPENING}{{}}{rendering.CLOSING}"
    return "\n\n".join(answer.format(text) if role == "assistant" and text.strip() else text for role, text in row.messages)


def row_cells(run: RunData, table: Mapping[str, np.ndarray], i: int) -> dict:
    """Row `i` of a weight table, with the texts of the row, as the template shows it."""
    row = run.rows.get(table["id"][i])
    label = run.config.data.label
    masked = bool(table["masked"][i]) if "masked" in table else False
    marked = row is not None and _learned_earlier(run, row, masked)
    return {
        "id": visible(str(table["id"][i])),
        "weight": float(table["weight"][i]),
        "rank": int(table["rank"][i]),
        **{name: float(table[name][i]) + 0.0 for name in weight_table.MEASURES if not np.isnan(table[name][i])},
        "visits": int(table["visits"][i]),
        "source": one_line(str(table["source"][i]), 40),
        "masked": masked,
        "marked": marked,
        "question": text_of(_marked_question(row) if marked else row.question) if row else None,
        "response": text_of(row.response) if row else None,
        "bad": data_rows.mark(row, label) if row else None,
    }


def extremes(run: RunData, epoch: int) -> tuple[list[dict], list[dict]]:
    """The heaviest rows of an epoch, heaviest first, and the lightest rows, lightest first."""
    table = run.tables[epoch]
    first, last = shown_rows.extremes(table)
    return [row_cells(run, table, i) for i in first], [row_cells(run, table, i) for i in last]


def unlike_rows(run: RunData) -> list[dict]:
    """The rows of the last epoch that are least like the trusted ones."""
    table = run.tables[max(run.tables)]
    return [row_cells(run, table, i) for i in shown_rows.unlike(table)]


def corner_rows(run: RunData) -> list[tuple[corners.Corner, list[dict]]]:
    """The corners of the last epoch, each with its most extreme rows."""
    table = run.tables[max(run.tables)]
    split = corners.split(table, run_data.labels(run), run_data.in_data(run))
    return [(corner, [row_cells(run, table, i) for i in corner.examples]) for corner in split]


def _tinted_pieces(text: str, token_weights: Mapping) -> list[tuple[str, int]]:
    """(text, tint) pieces of a response. The tint is 0 for weights of 1 and more, NUM_TINTS - 1 for weights near 0.

    Args:
      token_weights: a row of the token table: `weight`, `start` and `stop` of each token.
    """
    end = token_weights["start"][0]
    pieces = [(visible(text[:end]), 0)] if end else []
    for stop, weight in zip(token_weights["stop"], token_weights["weight"]):
        # A piece includes the characters between this token and the previous one, which are mostly spaces.
        pieces.append((visible(text[end:stop]), min(NUM_TINTS - 1, int(NUM_TINTS * max(0.0, 1 - weight)))))
        end = max(end, stop)
    return pieces


def token_weighted_responses(run: RunData) -> list[dict]:
    """The responses whose token weights have the smallest ESS/T, with tinted pieces."""
    if run.tokens is None:
        return []
    table, weights = run.tables[max(run.tables)], run.tokens["weight"].to_numpy()
    ess = shown_rows.token_ess(run.tokens)
    index_of = {row_id: i for i, row_id in enumerate(table["id"])}
    ids = run.tokens["id"].to_pylist()
    order = [i for i in np.argsort(ess, kind="stable") if len(weights[i]) > 1 and ids[i] in run.rows and ids[i] in index_of]
    responses = []
    for i in order[: shown_rows.NUM_TOKEN_WEIGHTED]:
        pieces = _tinted_pieces(run.rows[ids[i]].response, run.tokens.slice(i, 1).to_pylist()[0])
        responses.append(row_cells(run, table, index_of[ids[i]]) | {"pieces": pieces, "ess": float(ess[i])})
    return responses


def compared_responses(run: RunData) -> list[dict]:
    """Masked rows whose latest generated response has the fewest words in common with that of the data; ties by weight."""
    table = run.tables[max(run.tables)]
    latest: dict[str, dict] = {}
    for response in run.responses:  # ordered by step; of several samples of a step, the first counts
        if response["id"] not in latest or response["step"] > latest[response["id"]]["step"]:
            latest[response["id"]] = response
    indices = [i for i, row_id in enumerate(table["id"]) if row_id in latest and table["masked"][i] and row_id in run.rows]
    common = {i: run_data.words_in_common(run.rows[table["id"][i]].response, latest[table["id"][i]]["text"]) for i in indices}
    compared = []
    for i in sorted(indices, key=lambda i: (common[i], table["weight"][i]))[:NUM_COMPARED]:
        row, response = run.rows[table["id"][i]], latest[table["id"][i]]
        truth = row.fields.get(run.config.data.truth)
        compared.append(
            row_cells(run, table, i)
            | {"generated": text_of(response["text"]), "step": response["step"], "common": common[i]}
            | {"truth": text_of(truth) if isinstance(truth, str) else None}
            | {"right": response["text"].strip() == truth.strip() if isinstance(truth, str) else None}
        )
    return compared

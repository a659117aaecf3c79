"""Ranks rows that a run never saw, by the logits of their sources or by their features."""

import pathlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from bilevel_jax import features, sharding
from bilevel_jax.data import by_turn, levels, rows, templates, token_ids
from bilevel_jax.models import huggingface, layer_settings
from bilevel_jax.runtime import weight_table

MAX_SOURCES = 20  # named in an error


def rank(workdir: pathlib.Path, config, file: str, columns: str | None) -> tuple[Sequence[rows.Row], pa.Table]:
    """The rows of a file that fit the model, and their `weight_table.table`.

    Args:
      workdir, config: of a finished run.
      columns: other names of columns, as `data.columns`; None for those of the run.

    Raises:
      DataError: no row can be used.
      ValueError: the run has logits for its own rows only, or none; a row has a source that the run does not know.
    """
    if config.method == "mixing":
        raise ValueError(f"--score_new: {workdir} has no weights: direct mixing selects nothing")
    by_domain = config.selection.unit == "domain"
    if not by_domain and config.selection.parameterization != "features":
        raise ValueError(
            f"--score_new: {workdir} has logits for its training rows only; run with selection.parameterization=features or "
            "selection.unit=domain, and selection.optimizer=adam"
        )
    directory = huggingface.locate(config.model.path)
    tokenizer = templates.load_tokenizer(str(directory))
    columns = config.data.columns if columns is None else columns
    readable, report = rows.read_rows(file, columns=columns, preference=levels.prefers(config))
    new, examples = levels.usable(config, file, readable, report, tokenizer)
    if config.selection.unit == "turn":
        new, examples = by_turn.split(new, examples)
    if by_domain:
        logits = _logits_of_sources(workdir, file, new)
    else:
        logits = _logits_of_features(workdir, config, examples, tokenizer)
    zeros = np.zeros(len(new))
    return new, weight_table.table(new, logits, visits=zeros, masked=zeros)


def _logits_of_sources(workdir: pathlib.Path, file: str, new: Sequence[rows.Row]) -> np.ndarray:
    """The logit of each row's source in the run."""
    table = weight_table.latest(workdir)
    if table is None:
        raise FileNotFoundError(f"{workdir} has no weights/: someone removed the tables of this run")
    logits = dict(zip(table["source"].to_pylist(), table["logit"].to_pylist()))
    for row in new:
        if row.source not in logits:
            shown, more = list(logits)[:MAX_SOURCES], len(logits) - MAX_SOURCES
            sources = ", ".join(f"{source!r:.80}" for source in shown) + (f" and {more} others" if more > 0 else "")
            where = rows.location(file, row.line)
            raise ValueError(f"--score_new: {where}: source {row.source!r:.80} is none of those of {workdir}: {sources}")
    return np.array([logits[row.source] for row in new])


def _logits_of_features(workdir: pathlib.Path, config, examples, tokenizer) -> np.ndarray:
    """ω = X φ, with the encoder of the features X and the φ of the run."""
    encoder, _ = features.read(workdir / features.FILE)
    phi = features.read_params(workdir / features.PARAMS_FILE)
    directory = str(huggingface.locate(config.model.path))
    model, base = huggingface.load_model(directory, config.model.dtype, config.model.quantization)
    model = layer_settings.for_length(model, config.data.max_length)
    token_ids.check(examples, tokenizer, model.vocab_size)
    raw = features.pooled(model, base, examples, config.batch.micro_size, config.data.max_length, sharding.make_mesh(1))
    return features.encode(encoder, raw) @ phi

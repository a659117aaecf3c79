"""The batch of each step: a pure function of the config, the rows, the step and the response store."""

import concurrent.futures
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from bilevel_jax import config as configuration
from bilevel_jax import frozen, online, train_state
from bilevel_jax.data import levels, packing, shuffle


class StepBatch(NamedTuple):
    """The batch of a step, with what the device does not need."""

    batch: packing.Batch
    ids: list[str]  # id of each entry's row
    store_index: np.ndarray  # [n] index of each entry in the response store, -1 for responses of the data
    num_tokens: int
    state_keys: np.ndarray | None = None  # [n] of `frozen.SegmentKeys`, -1 for generated responses; None where no layer is frozen


def row_segments(level: levels.Level, i: int, share: float, group: int, row_index: int = -1) -> list[packing.Segment]:
    """The segments of a row of the data: one, or the two of a pair."""
    example = level.examples[i]
    if level.references is None:
        return [packing.Segment(example.prompt, example.response, row_index, share, earlier=example.earlier)]
    assert example.rejected is not None  # as in every row of a level with references
    responses = zip((1, -1), (example.response, example.rejected), level.references[i])
    return [
        packing.Segment(example.prompt, response, row_index, share, group, sign, float(reference))
        for sign, response, reference in responses
    ]


def make_batch(
    config: configuration.Config,
    upper: levels.Level,
    lower: levels.Level,
    layout: packing.Layout,
    k: int,
    store: online.ResponseStore,
    row_keys: frozen.SegmentKeys | None = None,
) -> StepBatch:
    """The packed batch of step k; with `row_keys`, the keys of its entries too."""
    size, segments, ids, store_index, keys = config.batch.size, [], [], [], []
    used = configuration.used_levels(config)
    lower_rows = shuffle.lower_rows(config.seed, len(lower.rows), size, k) if "lower" in used else ()
    for group, i in enumerate(lower_rows, size):
        i, share, prompt = int(i), 1 / len(lower_rows), lower.examples[i].prompt
        generated = online.response_segments(store, i, prompt, share, group, config.online.objective, config.data.max_length)
        indexed = generated or [(-1, segment) for segment in row_segments(lower, i, share, group, row_index=i)]
        if row_keys:
            keys += [-1] * len(generated) if generated else row_keys.of_row("lower", i)
        segments += [segment for _, segment in indexed]
        store_index += [index for index, _ in indexed]
        ids += [lower.ids[i]] * len(indexed)
    upper_rows = shuffle.upper_rows(config.seed, len(upper.rows), size, k) if "upper" in used else ()
    for group, j in enumerate(upper_rows):
        of_row = row_segments(upper, j, 1 / len(upper_rows), group)
        segments += of_row
        if row_keys:
            keys += row_keys.of_row("upper", int(j))
        ids += [upper.ids[j]] * len(of_row)
    store_index += [-1] * (len(segments) - len(store_index))
    batch = packing.pack_step(segments, len(lower.rows), len(lower_rows), layout)
    if config.method in configuration.ONLINE and config.online.normalization == "eq7":
        batch = batch._replace(row_factor=store.factors[batch.row_index])
    num_tokens = sum(segment.size for segment in segments)
    return StepBatch(batch, ids, np.array(store_index), num_tokens, np.array(keys) if row_keys else None)


def level_scales(config: configuration.Config, epoch: int) -> train_state.Scales:
    """The factors of the levels' means in `epoch`: (1-ρ, ρ) for mixing, (1, ρ/(1-ρ)) for selection."""
    rho = configuration.rho(config, epoch)
    pair = (1 - rho, rho) if config.method == "mixing" else (1.0, rho / (1 - rho))
    return train_state.Scales(*(jnp.float32(value) for value in pair))


class Prefetcher:
    """Packs the batch of the next step in a background thread while the device computes.

    Args:
      make_batch: `(k, store) -> StepBatch`.
      num_steps: of the run.
      refresh_due: whether the store is replaced before step k; such a batch waits for the new responses.
    """

    def __init__(self, make_batch: Callable, num_steps: int, refresh_due: Callable[[int], bool]):
        self._make_batch, self._num_steps, self._refresh_due = make_batch, num_steps, refresh_due
        self._worker = concurrent.futures.ThreadPoolExecutor(1)
        self._next: concurrent.futures.Future | None = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._worker.shutdown()

    def get(self, k: int, store: online.ResponseStore) -> StepBatch:
        """The batch of step k; steps are asked for in order."""
        batch = (self._next or self._worker.submit(self._make_batch, k, store)).result()
        self._next = None
        if k + 1 < self._num_steps and not self._refresh_due(k + 1):
            self._next = self._worker.submit(self._make_batch, k + 1, store)
        return batch

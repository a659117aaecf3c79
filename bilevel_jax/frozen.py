"""The layers below the first adapter (`lora.layers=last:K`): their results, computed once for each row, and fed to the step.

They have no adapter and no gradient, so the hidden states that leave them never change. A program of its own computes them, and the
joint step begins with the layer after them.

The states of a segment do not depend on what it is packed with. But their last bit depends on where it is: sums over keys are
grouped by position. So each segment is computed at the start of a sequence of its own, of a length that its own size sets, and the
same program computes it at each visit or once (`model.cache_frozen`). Runs with and without the cache have the same bits.

Generated responses are replaced at each refresh and are computed at each visit.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax import sharding
from bilevel_jax.data import levels, packing
from bilevel_jax.data.prepared import sequences
from bilevel_jax.errors import RunError
from bilevel_jax.models import decoder, layer_range, model_config
from bilevel_jax.runtime import state_store

CACHES = ("off", "memory", "disk")
SHORTEST = 64  # tokens of the shortest sequences of the program
TOKENS = 1024  # of one call of the program, with short sequences


def num_frozen(config: model_config.ModelConfig, adapter) -> int:
    """The number of layers below the first one with an adapter; 0 where all layers are learned."""
    return config.num_layers - (layer_range.num_adapted(adapter) or config.num_layers)


def padded_length(size: int) -> int:
    """The length of the sequence in which a segment of this size is computed: 64, 96, 128, 192, 256, ... tokens."""
    length = SHORTEST
    while length < size:
        length = length * 3 // 2 if length & (length - 1) == 0 else length * 4 // 3
    return length


def num_sequences(length: int, num_parts: int) -> int:
    """The number of sequences of one call, a multiple of the devices that split rows."""
    return num_parts * max(1, TOKENS // (length * num_parts))


def num_tokens(*of: levels.Level) -> int:
    """Tokens of the segments of all training rows of levels."""
    return sum(int(sequences.sizes(level.examples).sum()) for level in of)


class SegmentKeys:
    """Numbers for the segments of the data: those of the upper level first, two for a pair.

    Args:
      upper, lower: the levels, with references where their rows are pairs.
    """

    def __init__(self, upper: levels.Level, lower: levels.Level):
        self._of_upper, self._of_lower = (1 if level.references is None else 2 for level in (upper, lower))
        self._first_lower = self._of_upper * len(upper.rows)
        self.number = self._first_lower + self._of_lower * len(lower.rows)
        self.num_tokens = num_tokens(upper, lower)

    def of_row(self, level: str, i: int) -> list[int]:
        """The keys of the segments of a row, in the order of `batches.row_segments`."""
        width, first = (self._of_upper, 0) if level == "upper" else (self._of_lower, self._first_lower)
        return [first + width * i + k for k in range(width)]


@dataclasses.dataclass(frozen=True)
class FrozenLayers:
    """Puts the states that enter the first adapted layer into batches."""

    model: model_config.ModelConfig
    base: dict
    num_layers: int  # below the first adapter
    mesh: jax.sharding.Mesh
    store: state_store.StateStore | None  # None: nothing is kept
    buffer: list[jax.Array] = dataclasses.field(default_factory=list)  # `entering` of the latest batch of `put_batch`, if any

    def states_of(self, tokens: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The states [size, D] of segments, in their order."""
        by_length: dict[int, list[int]] = {}
        for i, ids in enumerate(tokens):
            by_length.setdefault(padded_length(len(ids)), []).append(i)
        calls, states = [], [np.zeros(0)] * len(tokens)
        for length, members in sorted(by_length.items()):
            number = num_sequences(length, sharding.num_parts(self.mesh, "rows"))
            for first in range(0, len(members), number):
                part = members[first : first + number]
                padded = np.zeros((number, length), np.int32)
                for row, i in enumerate(part):
                    padded[row, : len(tokens[i])] = tokens[i]
                calls.append((part, self._dispatch(padded)))
        for part, result in calls:
            for i, array in zip(part, sharding.to_host(result)):
                states[i] = array[: len(tokens[i])]
        return states

    def _dispatch(self, tokens_SxL: np.ndarray) -> jax.Array:
        tokens = sharding.device_put(tokens_SxL, sharding.shardings(self.mesh, tokens_SxL, "rows"))
        with jax.set_mesh(self.mesh):
            return enter(self.model, self.num_layers, self.base, tokens)

    def fill(self, batch: packing.Batch, keys: np.ndarray) -> packing.Batch:
        """The batch with `entering`.

        Args:
          batch: on the host.
          keys: of each entry, -1 for a generated response.
        """
        packed = batch.packed
        entering = empty_states(self.model, packed.tokens.shape)
        by_sequence = entering.reshape(-1, *entering.shape[2:])
        indices = segment_indices(packed, len(keys))
        kept = [self.store.get(key) if self.store and key >= 0 else None for key in keys]
        missing = [i for i, states in enumerate(kept) if states is None and indices[i] is not None]
        tokens = packed.tokens.reshape(by_sequence.shape[:2])
        computed = self.states_of([tokens[indices[i]] for i in missing])
        for i, states in zip(missing, computed):
            kept[i] = states
            if self.store and keys[i] >= 0:
                self.store.put(keys[i], states)
        for index, of_segment in zip(indices, kept):
            if index is not None:
                by_sequence[index] = of_segment
        return with_states(batch, entering)

    def put_batch(self, batch: packing.Batch, keys: np.ndarray) -> packing.Batch:
        """The batch of `fill` on the devices. It takes the memory of `entering` from the batch before, which cannot be used again.

        Only micro-batches in use are sent. The others have states of earlier batches, which no step reads.

        Args:
          batch, keys: see `fill`.
        """
        states = self.fill(batch, keys).packed.entering
        assert states is not None  # `fill` adds them
        target = sharding.shardings(self.mesh, states, None, "rows")
        on_devices = self.buffer.pop() if self.buffer else jnp.zeros(states.shape, states.dtype, device=target)
        for m in range(int(batch.packed.num_micro)):
            micro = sharding.device_put(states[m], sharding.shardings(self.mesh, states[m], "rows"))
            on_devices = _overwriting(target)(on_devices, micro, np.int32(m))
        self.buffer.append(on_devices)
        return with_states(sharding.put_batch(batch, self.mesh), on_devices)


@functools.cache
def _overwriting(target: jax.sharding.NamedSharding) -> Callable:
    """The jitted function that overwrites micro-batch m of `entering` in place."""
    overwrite = functools.partial(jax.lax.dynamic_update_index_in_dim, axis=0)
    return jax.jit(overwrite, donate_argnums=0, out_shardings=target)


@functools.partial(jax.jit, static_argnums=(0, 1))
def enter(model: model_config.ModelConfig, num_layers: int, base, tokens_SxL) -> jax.Array:
    """`decoder.enter` of one segment in each sequence, from its start, replicated."""
    positions = jnp.broadcast_to(jnp.arange(tokens_SxL.shape[1]), tokens_SxL.shape)
    states = decoder.enter(model, base, num_layers, tokens_SxL, positions, jnp.ones_like(tokens_SxL))
    return sharding.constrain(states)


def segment_indices(packed: packing.Packed, number: int) -> list[tuple[int, slice] | None]:
    """Sequence and positions of each of the first `number` entries; None for an entry without learned tokens, which has no part."""
    M, S, L = packed.tokens.shape
    indices: list[tuple[int, slice] | None] = [None] * number
    for m in range(int(packed.num_micro)):
        targets = slice(0, int(packed.num_targets[m]))
        entries, first = np.unique(packed.entry[m, targets], return_index=True)
        for entry, logit_index in zip(entries, packed.logit_index[m, targets][first]):
            sequence, position = divmod(int(logit_index), L)
            start = position - int(packed.positions[m, sequence, position])
            segment = packed.segment_ids[m, sequence, start]
            end = start + int(np.sum(packed.segment_ids[m, sequence] == segment))
            indices[entry] = m * S + sequence, slice(start, end)
    return indices


def with_states(batch: packing.Batch, entering) -> packing.Batch:
    """The batch with the states that enter the first layer with an adapter."""
    return batch._replace(packed=batch.packed._replace(entering=entering))


def empty_states(model: model_config.ModelConfig, shape: tuple[int, ...]) -> np.ndarray:
    """Zeros for the states of packed tokens of this shape. Pages that are not written take no memory."""
    return np.zeros((*shape, model.hidden_size), jnp.dtype(model.activations))


def make(
    cache: str,
    model: model_config.ModelConfig,
    base,
    adapter,
    mesh: jax.sharding.Mesh,
    keys: SegmentKeys,
    directory: pathlib.Path | None,
    resumed: bool,
) -> FrozenLayers | None:
    """The frozen layers of a run, with the store of their states; None where no layer is frozen.

    Args:
      cache: `model.cache_frozen`.
      model, base, adapter, mesh: of the run.
      keys: of its rows.
      directory: its workdir; None keeps nothing, for a run that only tries its step.
      resumed: whether the run goes on from a checkpoint.

    Raises:
      RunError: the memory, or the disk, does not suffice.
    """
    number = num_frozen(model, adapter)
    if not number:
        return None
    store, sizes = None, (keys.number, keys.num_tokens, model.hidden_size, jnp.dtype(model.activations))
    if cache == "memory" and directory is not None:
        store = state_store.in_memory(*sizes)
    elif cache == "disk" and directory is not None:
        # All processes compute what is missing together, and only the first one has a directory that stays.
        resumed = resumed and jax.process_count() == 1
        try:
            store = state_store.on_disk(directory / state_store.FOLDER, *sizes, resumed=resumed)
        except OSError as error:
            what = f"{error.strerror}, for {state_store.num_bytes(*sizes) / 1e9:.2f} GB of model.cache_frozen=disk"
            raise RunError(f"{directory / state_store.FOLDER}: {what}; free some space, or take off") from error
    return FrozenLayers(model, base, number, mesh, store)

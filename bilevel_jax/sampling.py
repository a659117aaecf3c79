"""Autoregressive sampling with a static cache, jitted decoding and slot refill.

S slots decode side by side inside one jitted loop. The loop returns to the host only when enough slots are free to take new
prompts, never for a single token. Prompts are prefilled in batches of a few padded lengths, once for all samples of a prompt.

A response depends only on the model, the prompt, the settings and its random key. Keys come from (seed, row id, refresh step, g);
each token uses one uniform number from (key, index of the token in the response); attention never crosses slots.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from bilevel_jax import decoding, progress, sharding
from bilevel_jax.decoding import Slots
from bilevel_jax.models import attention, model_config
from bilevel_jax.token_choice import Settings

PREFILL_TOKENS = 1024  # approximate number of padded tokens in one prefill batch
SHORTEST_PREFILL = 32  # padded prompt lengths are this times a power of 2
STEPS = 256  # maximum number of tokens per slot before the host updates the progress bar and checks for a signal
STEPS_TO_STOP = 16  # the same where the host searches for stop strings
FREE_SHARE = 8  # new prompts start when one in this many slots is free
NUM_SAMPLERS = 32  # samplers of a process whose compiled programs are cached


class Response(NamedTuple):
    """One generated response."""

    tokens: np.ndarray  # [n] int32, without the EOS
    eos: int | None  # the EOS that ended it; None if a stop string or the limit ended it
    log_probs: np.ndarray  # float64 log-probability of every token, the EOS last, under the plain model: temperature 1, no filter
    sampled_log_probs: np.ndarray  # the same under the sampled distribution; 0 for greedy decoding
    finish_reason: str  # "stop" or "length"

    @property
    def ids(self) -> np.ndarray:
        """The tokens, with the EOS if there is one: the tokens to which the log-probabilities belong."""
        return self.tokens if self.eos is None else np.append(self.tokens, np.int32(self.eos))


def row_keys(seed: int, ids: Iterable[str], refresh: int, num_samples: int) -> np.ndarray:
    """Random keys [n, G, 2] uint32: the first eight bytes of SHA-256 over seed, row id, refresh step and g."""
    text = (f"{seed}/{row_id}/{refresh}/{g}" for row_id in ids for g in range(num_samples))
    words = b"".join(hashlib.sha256(part.encode()).digest()[:8] for part in text)
    return np.frombuffer(words, "<u4").reshape(-1, num_samples, 2)


# --------------------------------------------------------------------------------------------------------------------
# Scheduling on the host
# --------------------------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """One response to generate."""

    prompt: int  # index of the prompt
    sample_index: int  # g
    prefill_row: int  # row of the prefill batch


def _prefill_batches(
    prompts: Sequence[np.ndarray], num_samples: int, cache_length: int, full_batches: bool
) -> list[tuple[list[Job], np.ndarray]]:
    """Prompts without their last token, grouped by padded length: (jobs, tokens [rows, length]), the longest last."""
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        padded = max(SHORTEST_PREFILL, 1 << max(len(prompt) - 2, 0).bit_length())
        by_length.setdefault(min(padded, cache_length), []).append(i)
    batches = []
    for length, members in sorted(by_length.items()):
        num_rows = max(1, PREFILL_TOKENS // length)
        if not full_batches:
            num_rows = min(num_rows, 1 << (len(members) - 1).bit_length())
        for first in range(0, len(members), num_rows):
            part = members[first : first + num_rows]
            tokens = np.zeros((num_rows, length), np.int32)
            for row, i in enumerate(part):
                tokens[row, : len(prompts[i]) - 1] = prompts[i][:-1]
            batches.append(([Job(i, g, row) for row, i in enumerate(part) for g in range(num_samples)], tokens))
    return batches


class Functions(NamedTuple):
    """The compiled functions of all samplers with equal arguments, see `jit_functions`."""

    shardings: Any  # a `Slots` of shardings
    init: Callable  # () -> Slots
    weights: Callable  # (base, adapter) -> weights of `decode`
    prefill: Callable  # (base, adapter, tokens) -> prefilled
    fill: Callable  # (Slots, prefilled, Starts) -> Slots
    decode: Callable  # (num_blocks, base, adapter, Slots, min_free, steps) -> Slots
    replicate: Callable  # (*arrays) -> arrays that the host can read


@dataclasses.dataclass(frozen=True)
class Sampler:
    """What all calls of one sampler share."""

    functions: Functions
    settings: Settings
    eos: tuple[int, ...]
    num_slots: int
    length: int  # maximum number of tokens of prompt and response together
    max_new_tokens: int
    full_batches: bool  # see `make_sampler`
    mesh: jax.sharding.Mesh
    detokenize: Callable[[Sequence[int]], str] | None


@dataclasses.dataclass
class Schedule:
    """The responses of one call: to prefill, waiting for a slot, in a slot, and finished."""

    prompts: Sequence[np.ndarray]
    keys: np.ndarray  # [n, G, 2]
    batches: list[tuple[list[Job], np.ndarray]]  # not prefilled yet; the last one is the next
    responses: list[list[Any]]  # [n][G], `Response` each, None until finished
    prefilled: list = dataclasses.field(default_factory=list)  # the cache of the latest prefill batch
    waiting: list[Job] = dataclasses.field(default_factory=list)  # its jobs without a slot
    running: dict[int, Job] = dataclasses.field(default_factory=dict)  # slot -> job
    num_read: dict[int, int] = dataclasses.field(default_factory=dict)  # slot -> number of tokens at the last `_collect`

    @property
    def has_queue(self) -> bool:
        return bool(self.waiting or self.batches)


def _starts(sampler: Sampler, schedule: Schedule, jobs: Sequence[Job], slots: Sequence[int]) -> decoding.Starts:
    """The i-th job starts in the i-th slot."""
    int_S = functools.partial(np.zeros, sampler.num_slots, np.int32)
    starts = decoding.Starts(
        number=np.int32(len(jobs)),
        prefill_row=int_S(),
        slot=np.full(sampler.num_slots, sampler.num_slots, np.int32),
        token=int_S(),
        position=int_S(),
        key=np.zeros((sampler.num_slots, 2), np.uint32),
        limit=int_S(),
    )
    for i, (job, slot) in enumerate(zip(jobs, slots, strict=True)):
        prompt = schedule.prompts[job.prompt]
        starts.prefill_row[i], starts.slot[i], starts.key[i] = job.prefill_row, slot, schedule.keys[job.prompt, job.sample_index]
        starts.token[i], starts.position[i] = prompt[-1], len(prompt) - 1
        starts.limit[i] = min(sampler.max_new_tokens, sampler.length - len(prompt))
    return starts


def _fill_free_slots(sampler: Sampler, schedule: Schedule, base, adapter, state: Slots) -> Slots:
    """Starts waiting jobs in the free slots, and prefills batches for them."""
    free = [slot for slot in range(sampler.num_slots) if slot not in schedule.running]
    while free and schedule.has_queue:
        if not schedule.waiting:
            schedule.waiting, tokens = schedule.batches.pop()  # the longest first, so that none remains for the end
            schedule.prefilled = sampler.functions.prefill(base, adapter, tokens)
        number = min(len(free), len(schedule.waiting))
        jobs, schedule.waiting = schedule.waiting[:number], schedule.waiting[number:]
        slots, free = free[:number], free[number:]
        state = sampler.functions.fill(state, schedule.prefilled, _starts(sampler, schedule, jobs, slots))
        schedule.running |= zip(slots, jobs)
        schedule.num_read |= dict.fromkeys(slots, 0)
    return state


def _decode_some(sampler: Sampler, schedule: Schedule, weights, state: Slots) -> Slots:
    """Decodes until slots are free for the queue, or until the host must look at the responses."""
    min_free = max(1, sampler.num_slots // FREE_SHARE) if schedule.has_queue else sampler.num_slots
    ends = (len(schedule.prompts[job.prompt]) - 1 + schedule.num_read[slot] for slot, job in schedule.running.items())
    longest = max(ends)
    window = decoding.window_size(longest, attention.cache_window(sampler.length))
    steps = min(STEPS_TO_STOP if sampler.settings.stop else STEPS, window - longest)
    return sampler.functions.decode(window // attention.CACHE_BLOCK, *weights, state, min_free, steps)


def _tokens_to_stop(tokens: np.ndarray, num_read: int, stop: Sequence[str], detokenize) -> int | None:
    """Number of tokens that complete the first stop string, more than `num_read`; None if there is no stop string."""

    def complete(count: int) -> bool:
        text = detokenize(tokens[:count])
        return any(end in text for end in stop)

    if not complete(len(tokens)):
        return None
    return next(count for count in range(num_read + 1, len(tokens) + 1) if complete(count))


def _collect(sampler: Sampler, schedule: Schedule, state: Slots) -> Slots:
    """Moves finished responses from their slots to `schedule.responses`."""
    arrays = state.tokens, state.log_probs, state.sampled_log_probs, state.count, state.active
    tokens_SxX, plain_SxX, sampled_SxX, count_S, active_S = jax.device_get(sampler.functions.replicate(*arrays))
    active_S, stop = active_S.copy(), sampler.settings.stop
    for slot, job in list(schedule.running.items()):
        count = int(count_S[slot])
        tokens = tokens_SxX[slot, :count]
        eos = int(tokens[-1]) if count and tokens[-1] in sampler.eos else None
        stopped_at = _tokens_to_stop(tokens, schedule.num_read[slot], stop, sampler.detokenize) if stop else None
        schedule.num_read[slot] = count
        if stopped_at is not None:
            count, eos, active_S[slot] = stopped_at, None, False
        if active_S[slot]:
            continue
        del schedule.running[slot]
        schedule.responses[job.prompt][job.sample_index] = Response(
            tokens=tokens[: count - (eos is not None)].copy(),
            eos=eos,
            log_probs=plain_SxX[slot, :count].astype(np.float64),
            sampled_log_probs=sampled_SxX[slot, :count].astype(np.float64),
            finish_reason="length" if stopped_at is None and eos is None else "stop",
        )
    target = sampler.functions.shardings.active
    return state._replace(active=sharding.device_put(active_S, target)) if stop else state


# --------------------------------------------------------------------------------------------------------------------
# Sampling
# --------------------------------------------------------------------------------------------------------------------


def _sample(
    sampler: Sampler,
    base,
    adapter,
    prompts: Sequence[np.ndarray],
    keys: np.ndarray,
    description: str = "sampling",
    stopped: Callable[[], bool] = lambda: False,
) -> list[list[Response]] | None:
    """The function that `make_sampler` returns, of its first argument."""
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < sampler.length:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens; there is room for 1 to {sampler.length - 1}")
    num_samples = keys.shape[1]
    batches = _prefill_batches(prompts, num_samples, attention.cache_window(sampler.length), sampler.full_batches)
    schedule = Schedule(prompts, keys, batches, [[None] * num_samples for _ in prompts])
    total = len(prompts) * num_samples
    bar = progress.bar(desc=description, unit="response", total=total)
    with bar, jax.set_mesh(sampler.mesh):
        weights, state = sampler.functions.weights(base, adapter), sampler.functions.init()
        while schedule.running or schedule.has_queue:
            state = _fill_free_slots(sampler, schedule, base, adapter, state)
            state = _decode_some(sampler, schedule, weights, state)
            num_running = len(schedule.running)
            state = _collect(sampler, schedule, state)
            bar.update(num_running - len(schedule.running))
            if stopped():
                return None
    return schedule.responses


def make_sampler(
    model: model_config.ModelConfig,
    settings: Settings,
    eos: Sequence[int],
    *,
    slots: int,
    length: int,
    mesh: jax.sharding.Mesh,
    detokenize: Callable[[Sequence[int]], str] | None = None,
    full_batches: bool = False,
) -> Callable:
    """Builds `sample(base, adapter, prompts, keys, description="sampling", stopped=...) -> [[Response] * G] * n`.

    `prompts` are int32 token ids, in any order and of any length, none empty. `keys` is [n, G, 2], from `row_keys`. The sampler
    calls `stopped()` regularly; if it returns True, the result is None. Samplers with equal arguments share compiled programs.

    Args:
      model: of base and adapter.
      settings: the distribution, and the conditions that end a response.
      eos: ids that end a response.
      slots: number of responses decoded side by side. If it is not a multiple of the number of parts into which rows are split,
        the slots are replicated.
      length: maximum number of tokens of prompt and response together; longer responses are cut.
      mesh: slots are sharded over its `data` and `fsdp` axes.
      detokenize: token ids -> text; required for stop strings.
      full_batches: every prefill batch has all its rows, however few prompts there are. Calls with other numbers of prompts then
        compile nothing, and a call with few prompts computes more.

    Raises:
      ValueError: there are stop strings but no `detokenize`. `sample` raises it for a prompt that is empty or too long.
    """
    if settings.stop and not detokenize:
        raise ValueError("stop strings need a tokenizer")
    compiled_for = dataclasses.replace(settings, stop=())  # the host searches for stop strings
    ends, max_new_tokens = tuple(int(token) for token in eos), min(settings.max_new_tokens, length - 1)
    functions = jit_functions(model, compiled_for, ends, slots, length, mesh)
    sampler = Sampler(functions, settings, ends, slots, length, max_new_tokens, full_batches, mesh, detokenize)
    return functools.partial(_sample, sampler)


@functools.lru_cache(maxsize=NUM_SAMPLERS)
def jit_functions(
    model: model_config.ModelConfig, settings: Settings, eos: tuple[int, ...], slots: int, length: int, mesh: jax.sharding.Mesh
) -> Functions:
    """The jitted functions of a sampler; arguments as of `make_sampler`. Equal arguments give the same functions."""
    max_new_tokens = min(settings.max_new_tokens, length - 1)
    init = functools.partial(decoding.init_slots, model, slots, length, max_new_tokens)
    shardings = decoding.slot_shardings(mesh, jax.eval_shape(init))
    decode = functools.partial(decoding.decode_steps, model, settings, eos)
    return Functions(
        shardings=shardings,
        init=jax.jit(init, out_shardings=shardings),
        weights=decoding.make_weights(model, mesh),
        prefill=jax.jit(functools.partial(decoding.prefill, model)),
        fill=jax.jit(decoding.fill, donate_argnums=0, out_shardings=shardings),
        decode=jax.jit(decode, static_argnums=0, donate_argnums=3, out_shardings=shardings),
        replicate=jax.jit(lambda *arrays: arrays, out_shardings=sharding.replicated(mesh)),
    )

"""Autoregressive sampling: prompts in, responses out, with a static cache, jitted decoding and no idle slots.

S slots decode side by side inside one jitted loop. It comes back to the host only when enough slots are free to take new prompts,
never for a token. Prompts are prefilled in batches of few padded lengths, once for all samples of a prompt, and wait for slots.

A response is a function of the model, the prompt, the settings and its key alone: keys come from (seed, row id, refresh step, g),
each token takes one uniform number from (key, place in the response), and attention in one slot does not see the others.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from bilevel_jax import sharding
from bilevel_jax.models import attention, decoder, lora

PREFILL_TOKENS = 1024  # padded tokens of one prefill batch, roughly
SHORTEST_PREFILL = 32  # padded lengths are this, doubled until they fit
STEPS = 256  # tokens per slot after which the host looks at the progress bar, and for a signal
STEPS_TO_STOP = 16  # the same where it looks for stop strings
SHORTEST_WINDOW = 256  # positions of the cache that are looked at are this, doubled until they suffice
LEEWAY = 32  # tokens for which they suffice, at least
FREE_SHARE = 8  # one in so many slots must be free before new prompts are started
HALVINGS = 32  # of the range in which the last token within top-p lies: down to what float32 tells apart
UNDERFLOW = 104.0  # e^-104 is 0 in float32
COLUMNS = 128  # the most vocabulary entries in one column of `_inverse_cdf`


@dataclasses.dataclass(frozen=True)
class Settings:
    """The distribution to sample from, and where a response ends.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: only the k most likely tokens; 0 for all. Tokens that tie with the k-th stay.
      top_p: only the smallest set of most likely tokens whose probability, after temperature and top-k, reaches p. Tokens that tie
        with its last stay.
      max_new_tokens: a response's most tokens, its EOS included.
      stop: texts before which a response ends, as soon as it contains one.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        if not (self.temperature == 0 or 1e-4 <= self.temperature < float("inf")):
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy), or at least 0.0001")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be 0 (off) or positive")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not all(self.stop):
            raise ValueError("a stop string is empty")


class Response(NamedTuple):
    """What the model said."""

    tokens: np.ndarray  # [n] int32, without the EOS
    eos: int | None  # the EOS that ended it; None where a stop string or the limit did
    log_probs: np.ndarray  # float64 log-probability of every token, the EOS last, under the plain model: temperature 1, no filter
    sampled_log_probs: np.ndarray  # the same under the distribution that was sampled; 0 where greedy
    finish_reason: str  # "stop" or "length"

    @property
    def ids(self) -> np.ndarray:
        """Tokens with the EOS where there was one: what the log-probabilities belong to."""
        return self.tokens if self.eos is None else np.append(self.tokens, np.int32(self.eos))


def row_keys(seed: int, ids: Iterable[str], refresh: int, num_samples: int) -> np.ndarray:
    """Random keys [n, G, 2] uint32: the first eight bytes of SHA-256 over seed, row id, refresh step and g."""
    text = (f"{seed}/{row_id}/{refresh}/{g}" for row_id in ids for g in range(num_samples))
    words = b"".join(hashlib.sha256(part.encode()).digest()[:8] for part in text)
    return np.frombuffer(words, "<u4").reshape(-1, num_samples, 2)


# --------------------------------------------------------------------------------------------------------------------
# One token
# --------------------------------------------------------------------------------------------------------------------


def filtered(settings: Settings, logits_SxV: jax.Array) -> jax.Array:
    """Logits over temperature, -inf for tokens outside top-k and top-p. Not for temperature 0."""
    values = scaled = logits_SxV / settings.temperature
    if 0 < settings.top_k < scaled.shape[-1]:
        values = jax.lax.top_k(scaled, settings.top_k)[0]
        lowest = values.min(axis=-1, keepdims=True)  # for values[:, -1:] XLA would sort the whole vocabulary
        scaled = jnp.where(scaled >= lowest, scaled, -jnp.inf)
    if settings.top_p == 1:
        return scaled
    probs = jnp.exp(values - jax.nn.logsumexp(scaled, axis=-1, keepdims=True))
    highest = values.max(axis=-1, keepdims=True)

    def halve(_, bounds):  # all above `low` reach p together, all above `high` do not; quicker than to sort
        low, high = bounds
        middle = (low + high) / 2
        enough = jnp.where(values > middle, probs, 0).sum(axis=-1, keepdims=True) >= settings.top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low, _ = jax.lax.fori_loop(0, HALVINGS, halve, (highest - UNDERFLOW, highest))
    return jnp.where(scaled > low, scaled, -jnp.inf)


def _inverse_cdf(weight_SxV: jax.Array, uniform_S: jax.Array) -> jax.Array:
    """The first index whose cumulative weight exceeds uniform · total. Sums go first by column of tokens, then within one."""

    def first_beyond(weight_SxN, goal_S):
        cumulative = jnp.cumsum(weight_SxN, axis=-1)
        possible = weight_SxN > 0
        beyond = possible & (cumulative > goal_S[:, None])
        last = possible.shape[-1] - 1 - jnp.argmax(possible[:, ::-1], axis=-1)  # where rounding leaves none beyond
        found = jnp.where(beyond.any(axis=-1), jnp.argmax(beyond, axis=-1), last)
        return found, goal_S - (_pick(cumulative, found) - _pick(weight_SxN, found))

    S, V = weight_SxV.shape
    width = min(COLUMNS, V)
    columns = jnp.pad(weight_SxV, ((0, 0), (0, -V % width))).reshape(S, -1, width)
    sums = columns.sum(axis=-1)
    column, rest = first_beyond(sums, uniform_S * sums.sum(axis=-1))
    within, _ = first_beyond(_pick(columns, column), rest)
    return column * width + within


def _pick(values_SxNx: jax.Array, index_S: jax.Array) -> jax.Array:
    """values[s, index[s]] for every s."""
    return values_SxNx[jnp.arange(values_SxNx.shape[0]), index_S]


def choose(settings: Settings, logits_SxV: jax.Array, uniform_S: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One token per row, from one uniform number in [0, 1) per row.

    Returns:
      token [S]; its log-probability [S] under the plain model; the same under the sampled distribution.
    """
    plain = jax.nn.log_softmax(logits_SxV, axis=-1)
    if settings.temperature == 0:
        token = jnp.argmax(logits_SxV, axis=-1)
        return token, _pick(plain, token), jnp.zeros(token.shape, jnp.float32)
    sampled = jax.nn.log_softmax(filtered(settings, logits_SxV), axis=-1)
    token = _inverse_cdf(jnp.exp(sampled), uniform_S)
    return token, _pick(plain, token), _pick(sampled, token)


# --------------------------------------------------------------------------------------------------------------------
# Slots
# --------------------------------------------------------------------------------------------------------------------


class Slots(NamedTuple):
    """S responses under way, of at most M tokens."""

    cache: list  # see `decoder.init_cache`
    token: jax.Array  # [S] int32, the latest token, not in the cache yet
    position: jax.Array  # [S] int32, where it stands; 0 while the slot is free
    key: jax.Array  # [S, 2] uint32
    count: jax.Array  # [S] int32, tokens generated
    limit: jax.Array  # [S] int32, the most it may generate
    active: jax.Array  # [S] bool
    tokens: jax.Array  # [S, M] int32, generated, the EOS included
    log_probs: jax.Array  # [S, M] float32
    sampled_log_probs: jax.Array  # [S, M] float32


class Starts(NamedTuple):
    """Up to S responses to start; the first `number` of each array are meant."""

    number: np.ndarray  # [] int32
    source: np.ndarray  # [S] int32, row of the prefill batch
    slot: np.ndarray  # [S] int32, S for none
    token: np.ndarray  # [S] int32, the prompt's last token
    position: np.ndarray  # [S] int32, its position
    key: np.ndarray  # [S, 2] uint32
    limit: np.ndarray  # [S] int32


def init_slots(config: decoder.ModelConfig, num_slots: int, length: int, max_new_tokens: int) -> Slots:
    """Slots that are all free."""
    int_S = functools.partial(jnp.zeros, num_slots, jnp.int32)
    float_SxM = functools.partial(jnp.zeros, (num_slots, max_new_tokens), jnp.float32)
    return Slots(
        cache=decoder.init_cache(config, num_slots, length),
        token=int_S(),
        position=int_S(),
        key=jnp.zeros((num_slots, 2), jnp.uint32),
        count=int_S(),
        limit=int_S(),
        active=jnp.zeros(num_slots, bool),
        tokens=jnp.zeros((num_slots, max_new_tokens), jnp.int32),
        log_probs=float_SxM(),
        sampled_log_probs=float_SxM(),
    )


def slot_shardings(mesh, slots: Slots) -> Slots:
    """The sharding of each array: slots over `data` and `fsdp`, the cache's heads over `tensor`."""
    return sharding.shardings(mesh, slots, "rows")._replace(cache=sharding.shardings(mesh, slots.cache, "rows", "heads"))


def _fill(slots: Slots, prefilled: list, starts: Starts) -> Slots:
    """Starts responses in free slots, from rows of a prefill batch."""

    def copy(i, caches):
        def one(cache, prefix):
            row = jax.lax.dynamic_index_in_dim(prefix, starts.source[i])
            return jax.lax.dynamic_update_slice(cache, row, (starts.slot[i], 0, 0, 0, 0))

        return jax.tree.map(one, caches, prefilled)

    def put(old, new):
        return old.at[starts.slot].set(new, mode="drop")

    return slots._replace(
        cache=jax.lax.fori_loop(0, starts.number, copy, slots.cache),
        token=put(slots.token, starts.token),
        position=put(slots.position, starts.position),
        key=put(slots.key, starts.key),
        count=put(slots.count, 0),
        limit=put(slots.limit, starts.limit),
        active=put(slots.active, True),
    )


def _uniform(key: jax.Array, count: jax.Array) -> jax.Array:
    return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), count))


def _advance(config: decoder.ModelConfig, settings: Settings, eos: tuple[int, ...], params, adapter, slots: Slots) -> Slots:
    """One token for every active slot."""
    hidden, cache = decoder.decode(config, params, adapter, slots.cache, slots.token, slots.position)
    logits = sharding.constrain(decoder.project(hidden, decoder.head(params)), "rows")
    chosen = choose(settings, logits, jax.vmap(_uniform)(slots.key, slots.count))
    token = chosen[0].astype(jnp.int32)
    here = jnp.arange(token.shape[0]), jnp.where(slots.active, slots.count, slots.tokens.shape[1])
    count = slots.count + slots.active
    ended = jnp.isin(token, jnp.array(eos, jnp.int32)) | (count == slots.limit)
    active = slots.active & ~ended
    return slots._replace(
        cache=cache,
        token=token,
        position=jnp.where(active, slots.position + 1, 0),  # free slots do not lengthen the attention of the others
        count=count,
        active=active,
        tokens=slots.tokens.at[here].set(token, mode="drop"),
        log_probs=slots.log_probs.at[here].set(chosen[1], mode="drop"),
        sampled_log_probs=slots.sampled_log_probs.at[here].set(chosen[2], mode="drop"),
    )


def _run(config, settings, eos, blocks: int, params, adapter, slots: Slots, free_enough: jax.Array, steps: jax.Array) -> Slots:
    """Decodes until `free_enough` slots are free, or for `steps` tokens, within the first `blocks` blocks of the cache."""

    def go_on(carry):
        done, slots = carry
        return (done < steps) & (jnp.sum(~slots.active) < free_enough)

    def body(carry):
        return carry[0] + 1, _advance(config, settings, eos, params, adapter, carry[1])

    small = jax.tree.map(lambda cache: cache[:, :, :blocks], slots.cache)
    after = jax.lax.while_loop(go_on, body, (0, slots._replace(cache=small)))[1]
    return after._replace(cache=jax.tree.map(lambda cache, new: cache.at[:, :, :blocks].set(new), slots.cache, after.cache))


def _window(longest: int, room: int) -> int:
    """Positions of the cache to decode in, where the longest response under way stands at `longest`.

    Few sizes, as each is compiled, and not far more than needed, as all of it is read for every token.
    """
    window = SHORTEST_WINDOW
    while window < longest + LEEWAY:
        window *= 2
    return min(window, room)


# --------------------------------------------------------------------------------------------------------------------
# Many prompts
# --------------------------------------------------------------------------------------------------------------------


def merges(config: decoder.ModelConfig) -> bool:
    """Whether an adapter is folded into the weights for decoding: quicker, and as exact in float32. Rounding W + ΔW to half
    precision would lose small updates, so there the adapter stays apart."""
    return config.dtype == "float32"


def _by_layer(config: decoder.ModelConfig, mesh: jax.sharding.Mesh, base, adapter):
    """Weights as `decode` takes them, where they were."""
    if adapter is not None and merges(config):
        base, adapter = lora.merge_adapter(config, base, adapter), None
    base = decoder.split_layers(base, config)
    base = jax.lax.with_sharding_constraint(base, sharding.weight_shardings(mesh, base))
    return base, adapter if adapter is None else decoder.split_layers(adapter, config)


class Job(NamedTuple):
    """One response to be made."""

    prompt: int  # place among the prompts
    sample: int  # g
    row: int  # of the prefill batch


def _prefill_batches(prompts: Sequence[np.ndarray], num_samples: int, window: int) -> list[tuple[list[Job], np.ndarray]]:
    """Prompts less their last token, grouped by padded length: (responses to make, tokens [rows, length]), the longest last."""
    by_length: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        padded = max(SHORTEST_PREFILL, 1 << max(len(prompt) - 2, 0).bit_length())
        by_length.setdefault(min(padded, window), []).append(place)
    batches = []
    for length, members in sorted(by_length.items()):
        rows = min(max(1, PREFILL_TOKENS // length), 1 << (len(members) - 1).bit_length())
        for first in range(0, len(members), rows):
            part = members[first : first + rows]
            tokens = np.zeros((rows, length), np.int32)
            for row, place in enumerate(part):
                tokens[row, : len(prompts[place]) - 1] = prompts[place][:-1]
            batches.append(([Job(place, g, row) for row, place in enumerate(part) for g in range(num_samples)], tokens))
    return batches


def _starts(jobs: Sequence[Job], free: Sequence[int], prompts, keys, num_slots: int, length: int, most: int) -> Starts:
    """The i-th job goes to slot free[i]."""
    int_S = functools.partial(np.zeros, num_slots, np.int32)
    slot = np.full(num_slots, num_slots, np.int32)
    starts = Starts(np.int32(len(jobs)), int_S(), slot, int_S(), int_S(), np.zeros((num_slots, 2), np.uint32), int_S())
    for i, (job, place) in enumerate(zip(jobs, free, strict=True)):
        prompt = prompts[job.prompt]
        starts.source[i], starts.slot[i], starts.key[i] = job.row, place, keys[job.prompt, job.sample]
        starts.token[i], starts.position[i] = prompt[-1], len(prompt) - 1
        starts.limit[i] = min(most, length - len(prompt))
    return starts


def _stop_at(tokens: np.ndarray, seen: int, stop: Sequence[str], detokenize) -> int | None:
    """How many of the tokens it takes to complete a stop string, given that the first `seen` do not; None where none is there."""

    def complete(count: int) -> bool:
        text = detokenize(tokens[:count])
        return any(end in text for end in stop)

    if not complete(len(tokens)):
        return None
    return next(count for count in range(seen + 1, len(tokens) + 1) if complete(count))


def make_sampler(
    config: decoder.ModelConfig,
    settings: Settings,
    eos: Sequence[int],
    *,
    slots: int,
    length: int,
    mesh: jax.sharding.Mesh,
    detokenize: Callable[[Sequence[int]], str] | None = None,
    refill: bool = True,
) -> Callable:
    """Builds `sample(base, adapter, prompts, keys, description="sampling", stopped=...) -> [[Response] * G] * n`.

    `prompts` are int32 token ids, none empty, in any order of any lengths; `keys` is [n, G, 2], from `row_keys`. `stopped()` is
    asked now and then, and where it is true the result is None. Compilations are kept from call to call.

    Args:
      config: of base and adapter.
      settings: what to sample.
      eos: ids that end a response.
      slots: responses decoded side by side; a multiple of the parts that rows are split into, or every device has all.
      length: room for prompt and response together, in tokens; a response is cut there.
      mesh: the slots are split over its `data` and `fsdp` axes.
      detokenize: token ids -> text; needed for stop strings.
      refill: give a free slot to the next prompt at once, instead of waiting until all are free. For comparison only.

    Raises:
      ValueError: there are stop strings and no `detokenize`; from `sample`, a prompt that is empty or leaves no room.
    """
    if settings.stop and not detokenize:
        raise ValueError("stop strings need a tokenizer")
    eos = tuple(int(token) for token in eos)
    most, room = min(settings.max_new_tokens, length - 1), attention.cache_window(length)
    start = functools.partial(init_slots, config, slots, length, most)
    homes = slot_shardings(mesh, jax.eval_shape(start))
    init = jax.jit(start, out_shardings=homes)
    by_layer = jax.jit(functools.partial(_by_layer, config, mesh))
    prefill = jax.jit(functools.partial(decoder.prefill, config))
    look = jax.jit(lambda *arrays: arrays, out_shardings=sharding.replicated(mesh))
    fill = jax.jit(_fill, donate_argnums=0, out_shardings=homes)
    run = jax.jit(functools.partial(_run, config, settings, eos), static_argnums=0, donate_argnums=3, out_shardings=homes)

    def harvest(state: Slots, owner: dict[int, Job], seen: dict[int, int], found) -> Slots:
        """Moves what has ended from its slot to `found`."""
        arrays = state.tokens, state.log_probs, state.sampled_log_probs, state.count, state.active
        tokens_SxM, plain_SxM, sampled_SxM, count_S, active_S = jax.device_get(look(*arrays))
        active_S = active_S.copy()
        for slot, job in list(owner.items()):
            count = int(count_S[slot])
            tokens = tokens_SxM[slot, :count]
            ended_by = int(tokens[-1]) if count and tokens[-1] in eos else None
            stopped = _stop_at(tokens, seen[slot], settings.stop, detokenize) if settings.stop else None
            seen[slot] = count
            if stopped is not None:
                count, ended_by, active_S[slot] = stopped, None, False
            if active_S[slot]:
                continue
            del owner[slot]
            found[job.prompt][job.sample] = Response(
                tokens=tokens[: count - (ended_by is not None)].copy(),
                eos=ended_by,
                log_probs=plain_SxM[slot, :count].astype(np.float64),
                sampled_log_probs=sampled_SxM[slot, :count].astype(np.float64),
                finish_reason="length" if stopped is None and ended_by is None else "stop",
            )
        return state._replace(active=sharding.device_put(active_S, homes.active)) if settings.stop else state

    def sample(base, adapter, prompts, keys, description: str = "sampling", stopped: Callable[[], bool] = lambda: False):
        for place, prompt in enumerate(prompts):
            if not 0 < len(prompt) < length:
                raise ValueError(f"prompt {place} has {len(prompt)} tokens; there is room for 1 to {length - 1}")
        num_samples = keys.shape[1]
        found: list[list[Response | None]] = [[None] * num_samples for _ in prompts]
        batches = _prefill_batches(prompts, num_samples, room)
        waiting: list[Job] = []  # for a slot, all of the prefill batch at hand
        owner: dict[int, Job] = {}  # of each slot in use
        seen: dict[int, int] = {}  # tokens of each when last looked at
        total = len(prompts) * num_samples
        bar = tqdm.tqdm(total=total, desc=description, unit="response", delay=2, leave=False, disable=None)
        with bar, jax.set_mesh(mesh):
            weights, state = by_layer(base, adapter), init()
            while owner or waiting or batches:
                free = [slot for slot in range(slots) if slot not in owner] if refill or not owner else []
                while free and (waiting or batches):
                    if not waiting:
                        waiting, tokens = batches.pop()  # the longest first, so that none is left for the end
                        prefilled = prefill(base, adapter, tokens)
                    number = min(len(free), len(waiting))
                    now, waiting, taken, free = waiting[:number], waiting[number:], free[:number], free[number:]
                    state = fill(state, prefilled, _starts(now, taken, prompts, keys, slots, length, most))
                    owner |= zip(taken, now)
                    seen |= dict.fromkeys(taken, 0)
                enough = max(1, slots // FREE_SHARE) if refill and (waiting or batches) else slots
                longest = max(len(prompts[job.prompt]) - 1 + seen[slot] for slot, job in owner.items())
                window = _window(longest, room)
                steps = min(STEPS_TO_STOP if settings.stop else STEPS, window - longest)
                state = run(window // attention.CACHE_BLOCK, *weights, state, enough, steps)
                before = len(owner)
                state = harvest(state, owner, seen, found)
                bar.update(before - len(owner))
                if stopped():
                    return None
        return found

    return sample

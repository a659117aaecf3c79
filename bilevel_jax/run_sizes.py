"""Bytes that a run writes into its workdir, before it writes them."""

import pathlib

import jax
import jax.numpy as jnp

from bilevel_jax import config as configuration
from bilevel_jax import frozen, online, preferences, train_state
from bilevel_jax import setup as setups
from bilevel_jax.runtime import checkpoint, state_store

TABLE_BYTES = 128  # of a row in the table of weights of an epoch
OTHER = 1 << 20  # bytes of config, metrics, summary and report


def response_store_bytes(config: configuration.Config, num_rows: int) -> int:
    """The most bytes that the generated responses of one refresh take, all of maximum length."""
    max_new_tokens = min(config.online.max_new_tokens, config.data.max_length - 1)
    masked, visited = online.num_masked(num_rows, config.online.ratio), config.online.refresh_every * config.batch.size
    answered = masked if config.online.generate == "all" else min(masked, visited)
    num_fields = 4 + bool(config.online.reward) + (config.online.objective in preferences.PAIRS)  # float64 or int64, per response
    return answered * config.online.num_samples * (4 * max_new_tokens + 8 * num_fields) + num_rows


def checkpoint_bytes(config: configuration.Config, state: train_state.State, num_rows: int) -> int:
    """The most bytes of a checkpoint, with the most generated responses there can be."""
    responses = response_store_bytes(config, num_rows) if config.method in configuration.ONLINE else num_rows
    best = _adapter_bytes(state) if config.eval.keep_best else 0
    return checkpoint.num_bytes(state) + responses + best


def _adapter_bytes(state: train_state.State) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state.policy.adapter))


def cache_bytes(config: configuration.Config, setup: setups.Setup) -> int:
    """The most bytes that the states that leave the frozen layers take, in memory or on disk; 0 where they are not kept."""
    if config.model.cache_frozen == "off" or not frozen.num_frozen(setup.model, setup.adapter):
        return 0
    both = setup.upper, setup.lower
    num_keys, num_tokens = 2 * sum(len(level.rows) for level in both), frozen.num_tokens(*both)
    return state_store.num_bytes(num_keys, num_tokens, setup.model.hidden_size, jnp.dtype(setup.model.activations))


def disk_bytes(config: configuration.Config, state: train_state.State, num_rows: int, num_saved: int) -> int:
    """Bytes that a run still writes into a workdir with `num_saved` checkpoints, without what frozen layers compute."""
    adapter = _adapter_bytes(state)
    size = checkpoint_bytes(config, state, num_rows) + (adapter if config.lora.rank else 0)  # no `adapters/step_K` of all weights
    number = max(1, config.checkpoint.keep + 1 - num_saved)  # one more is on disk while it is being written
    return number * size + adapter + TABLE_BYTES * num_rows * config.num_epochs + OTHER


def new_bytes(
    config: configuration.Config, setup: setups.Setup, state: train_state.State, workdir: pathlib.Path, num_saved: int
) -> int:
    """Bytes that a run still writes: `disk_bytes`, and what frozen layers compute where that is kept on disk."""
    needed = disk_bytes(config, state, len(setup.lower.rows), num_saved)
    if config.model.cache_frozen == "disk":
        needed += max(0, cache_bytes(config, setup) - state_store.bytes_on_disk(workdir))
    return needed

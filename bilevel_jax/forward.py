"""Forward passes over packed micro-batches: hidden states, and the NLL of each target and of each response."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel_jax import losses
from bilevel_jax.data import packing
from bilevel_jax.models import decoder, lora, model_config, probes


class Probe(NamedTuple):
    """Measures the derivatives of the entries' losses along a direction of the learned parameters, see `models.probes`."""

    directions: dict  # from `probes.along`
    values: dict  # from `probes.zeros`; the derivative in them is what is measured


def token_entries(packed: packing.Packed, m) -> jax.Array:
    """The entry of each token of micro-batch m, [T] int32; E for padding."""
    E, (S, L) = packed.length.shape[0], packed.tokens.shape[1:]
    # Segment ids restart in every sequence; these are unique in the micro-batch. Targets map them to entries.
    segment_T = (jnp.arange(S)[:, None] * (L + 1) + packed.segment_ids[m]).reshape(-1)
    segment_P = segment_T.at[packed.logit_index[m]].get(mode="fill", fill_value=S * (L + 1))
    return jnp.full(S * (L + 1), E, jnp.int32).at[segment_P].set(packed.entry[m], mode="drop")[segment_T]


def hidden_states(
    model: model_config.ModelConfig, base, adapter, packed: packing.Packed, m, key=None, probe: Probe | None = None
) -> jax.Array:
    """Final hidden states [T, D] of micro-batch m; with a key, the adapter's dropout is on."""
    base, adapter = lora.in_use(model, base, adapter)
    if probe is not None:
        entry_T = token_entries(packed, m)
        of_tokens = jax.tree.map(lambda value_YxE: value_YxE.at[:, entry_T].get(mode="fill", fill_value=0.0), probe.values)
        adapter = probes.attach(adapter, probe.directions, of_tokens)
    rngs = {} if key is None else {"dropout": jax.random.fold_in(key, m)}
    batch = packed.tokens[m], packed.positions[m], packed.segment_ids[m]
    entering_TxD = None if packed.entering is None else packed.entering[m].reshape(-1, model.hidden_size)
    hidden_SxLxD: Any = decoder.Decoder(model).apply(decoder.variables(base, adapter), *batch, entering_TxD, rngs=rngs)
    return hidden_SxLxD.reshape(-1, model.hidden_size)


def loss_inputs(
    model: model_config.ModelConfig, base, adapter, packed: packing.Packed, m, key=None, probe: Probe | None = None
) -> tuple[jax.Array, jax.Array, Any, Any, Any]:
    """The first five arguments of `losses.token_nll` for micro-batch m; with a key, the adapter's dropout is on."""
    hidden_TxD = hidden_states(model, base, adapter, packed, m, key, probe)
    head_VxD = decoder.head(lora.in_use(model, base, adapter)[0])
    return hidden_TxD, head_VxD, packed.logit_index[m], packed.target[m], packed.num_targets[m]


def target_nll(
    model: model_config.ModelConfig, base, adapter, packed: packing.Packed, m, key=None, probe: Probe | None = None
) -> jax.Array:
    """NLL of every target [P] of micro-batch m, nats; 0 for padding."""
    # The fast version has no derivative in the output matrix.
    token_nll = losses.token_nll_plain if model.second_order or lora.is_full(adapter) else losses.token_nll
    return token_nll(*loss_inputs(model, base, adapter, packed, m, key, probe), model.logit_cap)


def micro_nll(
    model: model_config.ModelConfig, base, adapter, packed: packing.Packed, m, token_weights: Callable | None = None, key=None
) -> jax.Array:
    """The first result of `micro_nll_and_power`."""
    return micro_nll_and_power(model, base, adapter, packed, m, token_weights, key)[0]


def micro_nll_and_power(
    model: model_config.ModelConfig,
    base,
    adapter,
    packed: packing.Packed,
    m,
    token_weights: Callable | None = None,
    key=None,
    probe: Probe | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sums over the tokens of every entry's response in micro-batch m: of their NLL, and of its power `losses.POWER`.

    Args:
      adapter: the learned parameters, see `lora`; None for the base model alone.
      m: index of the micro-batch.
      token_weights: `(nll_P, entry_P) -> weight_P`, the factor of each token's NLL; None for 1.
      key: of the adapter's dropout in this step; None for none.
      probe: see `Probe`.

    Returns:
      Two arrays [E] float32, nats and their power; 0 for entries of other micro-batches. The second has no derivative.
    """
    nll_P = target_nll(model, base, adapter, packed, m, key, probe)
    power_P = jax.lax.stop_gradient(nll_P) ** losses.POWER
    if token_weights is not None:
        nll_P *= token_weights(nll_P, packed.entry[m])

    def per_entry(value_P):
        return jax.ops.segment_sum(value_P, packed.entry[m], num_segments=packed.length.shape[0])

    return per_entry(nll_P), per_entry(power_P)


def entry_nll(
    model: model_config.ModelConfig,
    base,
    adapter,
    packed: packing.Packed,
    num_micro=None,
    token_weights: Callable | None = None,
) -> jax.Array:
    """Summed NLL of every entry [E], nats, over the first `num_micro` micro-batches (default: all in use).

    It has no reverse-mode derivative: the device knows how many turns the loop takes.
    """
    num_micro = packed.num_micro if num_micro is None else num_micro
    start = jnp.zeros(packed.length.shape[0], jnp.float32)

    def add(m, nll_E):
        return nll_E + micro_nll(model, base, adapter, packed, m, token_weights)

    return jax.lax.fori_loop(0, num_micro, add, start)

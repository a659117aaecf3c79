"""The compiled programs of a run, without its weights and rows: shapes and shardings stand for all arrays."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax import batches, decoding, features, frozen, sampling, scoring, sharding
from bilevel_jax import config as configuration
from bilevel_jax import setup as setups
from bilevel_jax.data import packing
from bilevel_jax.models import attention, layer_settings, lora, model_config
from bilevel_jax.planning import memory

EOS = (0,)  # stands for the ids that end a response, which are values and not shapes


class Program(NamedTuple):
    """A jitted function with the shapes of its arguments."""

    name: str
    function: Any  # jitted
    arguments: tuple  # trees of `jax.ShapeDtypeStruct` with shardings, and static values
    held: int  # bytes on one device that the run holds meanwhile and that are not arguments
    when: str  # `memory.TRAINING` or `memory.SAMPLING`
    loop: str  # what one turn of its loops of unknown length computes


class Shapes(NamedTuple):
    """The arrays of a run, as trees of `jax.ShapeDtypeStruct` with shardings."""

    model: model_config.ModelConfig
    base: dict
    state: Any  # `train_state.State`
    features: jax.ShapeDtypeStruct | None

    @property
    def adapter(self):
        return self.state.policy.adapter


def sharded(tree, shardings):
    """The tree as shapes with shardings."""

    def leaf(x, target):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=target, weak_type=getattr(x, "weak_type", False))

    return jax.tree.map(leaf, tree, shardings)


def replicated(tree, mesh):
    """The tree as shapes that every device holds completely."""
    return sharded(tree, jax.tree.map(lambda leaf: sharding.replicated(mesh), tree))


def device_bytes(tree) -> int:
    """Bytes of a tree of shapes with shardings on one device."""
    return memory.size_of(tree, jax.tree.map(lambda leaf: leaf.sharding, tree))


def run_shapes(config: configuration.Config, plan: memory.Plan, mesh) -> Shapes:
    """The arrays that a run holds all the time."""
    model = setups.trained_model(config, layer_settings.for_length(plan.model, config.data.max_length))
    base = memory.base_shapes(model)
    adapter = memory.config_adapter_shapes(config, model)
    optimizer, num_rows = setups.make_optimizer(config, plan.num_rows), plan.num_rows
    state = jax.eval_shape(lambda adapter: setups.new_state(config, adapter, num_rows, optimizer, features.SIZE), adapter)
    shardings = sharding.state_shardings(mesh, state, config.mesh.shard_selector)
    values = None
    if configuration.to_selector(config).parameterization == "features":
        by_row = configuration.has_row_features(config)
        shape, dtype = ((num_rows, features.SIZE), jnp.float32) if by_row else ((num_rows,), jnp.int32)
        values = jax.ShapeDtypeStruct(shape, dtype, sharding=shardings.selector.logits)
    return Shapes(model, sharded(base, sharding.weight_shardings(mesh, base)), sharded(state, shardings), values)


def step_program(config: configuration.Config, num_rows: int, shapes: Shapes, mesh) -> Program:
    """The joint update of θ and ω."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes.state)
    function = setups.jit_step(config, shapes.model, setups.make_optimizer(config, num_rows), shardings, mesh)
    empty = packing.pack_step([], num_rows, config.batch.size, setups.batch_layout(config, mesh))
    if frozen.num_frozen(shapes.model, shapes.adapter):
        states = jax.eval_shape(lambda: frozen.empty_states(shapes.model, empty.packed.tokens.shape))
        empty = frozen.with_states(empty, states)
    batch = sharded(empty, sharding.batch_shardings(empty, mesh))
    scales = replicated(jax.eval_shape(lambda: batches.level_scales(config, 0)), mesh)
    arguments = shapes.base, shapes.state, batch, scales, shapes.features
    copy = device_bytes(shapes.state)  # for a checkpoint
    return Program("step", function, arguments, copy, memory.TRAINING, "a micro-batch")


def frozen_program(config: configuration.Config, shapes: Shapes, mesh, other: int) -> Program:
    """The layers below the first adapter, for the longest rows. `other` as in `scoring_program`."""
    length = frozen.padded_length(config.data.max_length)
    tokens = np.zeros((frozen.num_sequences(length, sharding.num_parts(mesh, "rows")), length), np.int32)
    on_devices = sharded(tokens, sharding.shardings(mesh, tokens, "rows"))
    arguments = shapes.model, frozen.num_frozen(shapes.model, shapes.adapter), shapes.base, on_devices
    held = other + device_bytes(shapes.adapter)
    return Program("frozen layers", frozen.enter, arguments, held, memory.TRAINING, "a batch of rows")


def scoring_program(config: configuration.Config, shapes: Shapes, mesh, other: int) -> Program:
    """Losses of given responses, as in an evaluation. `other`: bytes of what is neither base nor adapter."""
    layout = packing.Layout(config.batch.micro_size, config.data.max_length, scoring.ENTRIES)
    empty = packing.pack([], layout)
    function = jax.jit(scoring.entry_scores, static_argnums=0, out_shardings=sharding.replicated(mesh))
    arguments = shapes.model, shapes.base, shapes.adapter, sharded(empty, sharding.batch_shardings(empty, mesh))
    return Program("scoring", function, arguments, other, memory.TRAINING, "a micro-batch")


def sampling_programs(config: configuration.Config, shapes: Shapes, mesh, other: int) -> list[Program]:
    """Prefill of a batch of the longest prompts, and decoding in a part of the cache and in all of it.

    `other` is as in `scoring_program`.
    """
    length = config.data.max_length
    settings = sampling.Settings(temperature=config.online.temperature, max_new_tokens=config.online.max_new_tokens)
    sampler = sampling.jit_functions(shapes.model, settings, EOS, config.online.slots, length, mesh)
    slots = sharded(jax.eval_shape(sampler.init), sampler.shardings)
    params, adapter = jax.eval_shape(sampler.weights, shapes.base, shapes.adapter)
    params = sharded(params, sharding.weight_shardings(mesh, params))
    adapter = None if adapter is None else replicated(adapter, mesh)
    is_copy = decoding.merges_adapter(shapes.model) or lora.is_full(shapes.adapter)
    window = attention.cache_window(length)
    tokens = np.zeros((max(1, sampling.PREFILL_TOKENS // window), window), np.int32)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh), weak_type=True)
    prefill = shapes.base, shapes.adapter, replicated(tokens, mesh)
    decode = params, adapter, slots, number, number
    copy = device_bytes(params) if is_copy else 0
    resident = other + (device_bytes((shapes.base, shapes.adapter)) if is_copy else 0)
    # A part of the cache is a copy, so that decoding in the longest part takes the most memory.
    sizes = {"decoding" if size == window else f"decoding in {size} positions": size for size in decoding.window_sizes(window)[-2:]}
    return [
        Program("prefill", sampler.prefill, prefill, other + copy + device_bytes(slots), memory.SAMPLING, "a batch of prompts"),
        *(
            Program(
                name, sampler.decode, (size // attention.CACHE_BLOCK, *decode), resident, memory.SAMPLING, "a token of every slot"
            )
            for name, size in sizes.items()
        ),
    ]


def of_run(config: configuration.Config, plan: memory.Plan, mesh) -> list[Program]:
    """The programs of a run; those of sampling only where its method samples. To be called with `jax.set_mesh(mesh)`."""
    shapes = run_shapes(config, plan, mesh)
    step = step_program(config, plan.num_rows, shapes, mesh)
    other = step.held + device_bytes((shapes.state, shapes.features)) - device_bytes(shapes.adapter)
    programs = [step, scoring_program(config, shapes, mesh, other)]
    if frozen.num_frozen(shapes.model, shapes.adapter):
        programs.insert(1, frozen_program(config, shapes, mesh, other))
    return programs + (sampling_programs(config, shapes, mesh, other) if config.method in configuration.ONLINE else [])

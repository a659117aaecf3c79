"""Memory plan of a run, per device: `python -m bilevel_jax.main --config=... --plan`.

The plan reads only the `config.json` of the model: no weights, rows or tokenizer. Shapes come from `jax.eval_shape` of the
functions that a run calls, and shards from the rules of `sharding`, so any mesh can be planned on any machine. XLA's temporaries
are only known after compilation (`compile_plan`); leave a fifth of a device free for them.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jax.sharding import AbstractMesh, AxisType

from bilevel_jax import checks, decoding, features, forward, frozen, preferences, run_sizes, sharding, startup_checks, train_state
from bilevel_jax import config as configuration
from bilevel_jax import setup as setups
from bilevel_jax.data import packing, sources
from bilevel_jax.models import decoder, fused_attention, huggingface, layer_settings, lora, model_config
from bilevel_jax.models.layers import Layer

ASSUMED_ROWS = 100_000  # N if `data.num_lower` is 0
ALWAYS, TRAINING, SAMPLING, HOST = "always", "while training", "while sampling", "in the host's memory"
DISK = "on the disk"
DEVICES_GB = (16, 24, 32, 40, 48, 64, 80, 96, 141, 192)
FREE = 0.2  # share of a device that is left to XLA's temporaries


class Item(NamedTuple):
    """One entry of the plan: memory on one device, or on the host."""

    name: str
    size: int  # bytes
    when: str  # `ALWAYS`, `TRAINING`, `SAMPLING`, `HOST` or `DISK`
    source: str = "shapes"  # how the size was computed


@dataclasses.dataclass(frozen=True)
class Plan:
    """The memory plan of a run."""

    model: model_config.ModelConfig
    mesh: AbstractMesh
    layout: packing.Layout  # of a step
    num_parameters: int  # of the base
    num_rows: int  # N
    rows_assumed: bool  # N is `ASSUMED_ROWS`
    items: tuple[Item, ...]

    def total(self, when: str) -> int:
        """Bytes on one device during `TRAINING` or `SAMPLING`, including the `ALWAYS` items."""
        return sum(item.size for item in self.items if item.when in (ALWAYS, when))

    @property
    def peak(self) -> int:
        """Bytes on one device, the maximum of training and sampling."""
        return max(self.total(TRAINING), self.total(SAMPLING))


def make_mesh(data: int, fsdp: int, tensor: int) -> AbstractMesh:
    """The mesh of a run, with devices that need not exist; `data=0` uses the remaining devices of this machine, at least one."""
    data = data or max(1, len(jax.devices()) // (fsdp * tensor))
    return AbstractMesh((data, fsdp, tensor), sharding.AXES, axis_types=(AxisType.Auto,) * len(sharding.AXES))


def bits(dtype) -> int:
    """Bits of an element. JAX counts a byte for those of four bits, which XLA packs."""
    return 4 if dtype == jnp.uint4 else 8 * dtype.itemsize


def size_of(tree, shardings=None) -> int:
    """Bytes of a tree of shapes on one device, with a tree of shardings; replicated without one."""

    def size(leaf, leaf_sharding=None):
        shape = leaf_sharding.shard_shape(leaf.shape) if leaf_sharding else leaf.shape
        return math.prod(shape) * bits(leaf.dtype) // 8

    return sum(jax.tree.leaves(jax.tree.map(size, tree, *([shardings] if shardings else []))))


def base_shapes(model: model_config.ModelConfig):
    """The base as a tree of shapes."""
    return jax.eval_shape(lambda: decoder.init_params(model, jax.random.key(0)))


def config_adapter_shapes(config: configuration.Config, model: model_config.ModelConfig):
    """What a run learns, as a tree of shapes.

    Raises:
      ValueError: the model does not have the layers or targets.
    """
    num_layers = lora.resolve_layers(model, config.lora.layers)
    return adapter_shapes(model, config.lora.rank, lora.resolve_targets(model, config.lora.targets), num_layers)


def adapter_shapes(model: model_config.ModelConfig, rank: int, targets: tuple[str, ...], num_layers: int | None = None):
    """What is learned, as a tree of shapes: an adapter, of the last `num_layers` or all layers, or all weights if the rank is 0."""
    if not rank:
        return jax.eval_shape(lora.init_full, base_shapes(model))
    return jax.eval_shape(lambda: lora.init_adapter(model, jax.random.key(0), rank, targets, num_layers))


def on_one_device(model: model_config.ModelConfig, mesh) -> model_config.ModelConfig:
    """The decoder with the sizes that one device computes: its heads and its part of the feed-forward layer."""

    def part(size, name):
        return size if size % sharding.num_parts(mesh, name) else size // sharding.num_parts(mesh, name)

    heads = part(model.num_heads, "heads")
    return dataclasses.replace(
        model,
        num_heads=heads,
        num_kv_heads=math.gcd(heads, part(model.num_kv_heads, "heads")),
        intermediate_size=part(model.intermediate_size, "mlp"),
    )


def _result_bytes(function, *shapes) -> int:
    """Bytes of the results of an abstract function that are not its arguments."""
    jaxpr = jax.make_jaxpr(function)(*shapes).jaxpr
    results = {id(var): var.aval for var in jaxpr.outvars if not isinstance(var, Literal) and var not in jaxpr.invars}
    return size_of(list(results.values()))


def residuals(model: model_config.ModelConfig, rank: int, targets, sequences: int, length: int, num_targets: int) -> int:
    """Bytes that the forward pass of one micro-batch keeps for the backward pass, without weights: the results of `jax.vjp`."""

    def shape(*axes, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(axes, dtype)

    tokens, target_ids = shape(1, sequences, length), shape(1, num_targets)
    packed = packing.Packed(tokens, tokens, tokens, target_ids, target_ids, target_ids, shape(1), shape(sequences), shape())

    def kept(base, adapter, packed):
        return jax.vjp(lambda adapter: forward.micro_nll(model, base, adapter, packed, 0), adapter)[1]

    return _result_bytes(kept, base_shapes(model), adapter_shapes(model, rank, targets), packed)


def layer_residuals(model: model_config.ModelConfig, rank: int, targets, sequences: int, length: int) -> int:
    """Bytes that the backward pass of one layer uses, without weights. The decoder keeps some of them and recomputes the others,
    one layer at a time."""
    base, adapter = (
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), tree["layers"])
        for tree in (base_shapes(model), adapter_shapes(model, rank, targets))
    )
    x = jax.ShapeDtypeStruct((sequences * length, model.hidden_size), model.activations)

    def kept(base, adapter, x, positions):
        def layer(adapter, x):
            table = layer_settings.rotary_table(positions, model)
            settings = {name: values[0] for name, values in layer_settings.settings(model, length).items()}
            variables = {"params": base, "adapter": adapter} if rank else {"params": adapter}
            return Layer(model).apply(variables, x, table, positions, settings)[0]

        return jax.vjp(layer, adapter, x)[1]

    return _result_bytes(kept, base, adapter, x, jax.ShapeDtypeStruct((sequences, length), jnp.int32))


def activations(model: model_config.ModelConfig, rank: int, targets, sequences: int, length: int, num_targets: int) -> int:
    """`residuals`, and the activations that the backward pass recomputes for one layer."""

    def kept(num_layers: int) -> int:
        return residuals(dataclasses.replace(model, num_layers=num_layers), rank, targets, sequences, length, num_targets)

    recomputed = layer_residuals(model, rank, targets, sequences, length) - (kept(2) - kept(1))
    return kept(model.num_layers) + recomputed


def make_plan(config, num_rows: int | None = None, platform: str | None = None) -> Plan:
    """The memory plan of a run.

    Args:
      config: a `ConfigDict`, as for a run.
      num_rows: the lower-level rows N to train on; None takes `data.num_lower` without the held-out rows, or `ASSUMED_ROWS`.
      platform: of the devices; by default that of this machine, or a TPU where the config has what only a TPU can do.

    Raises:
      ConfigError, ModelError: as in the run itself, as far as they can be detected without weights and rows.
    """
    config = checks.build(config)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    directory = huggingface.locate(config.model.path, ("config.json",))
    dtype = "bfloat16" if config.model.dtype == "auto" else config.model.dtype  # as on an accelerator, whatever this machine has
    model = huggingface.read_config(directory, dtype, activations=dtype, quantization=config.model.quantization)
    startup_checks.check_fit(config, model.max_positions, sharding.num_parts(mesh, "rows"))
    if platform is None:
        here = jax.default_backend()
        platform = "tpu" if config.model.attention == "fused" and here not in fused_attention.KERNELS else here
    attention, _ = startup_checks.resolve_attention(config, model, platform, sharding.num_parts(mesh, "heads"))
    model = dataclasses.replace(model, remat=config.model.remat, attention=attention)
    assumed = num_rows is None and not config.data.num_lower
    if num_rows is None:
        num_lower = config.data.num_lower
        num_rows = num_lower - sources.num_held_out(config.eval.num_lower, num_lower) if num_lower else ASSUMED_ROWS
    if not assumed:
        startup_checks.check_rows(config, num_rows, mesh.size)
    base = base_shapes(model)
    adapter = config_adapter_shapes(config, model)
    layout = setups.batch_layout(config, mesh)
    items = _state_items(config, model, mesh, num_rows, base, adapter)
    items += _step_items(config, model, mesh, layout, num_rows, adapter)
    if config.method in configuration.ONLINE:
        items += _refresh_items(config, model, mesh, num_rows, base)
    dense = base_shapes(dataclasses.replace(model, quantization="none"))
    num_parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(dense))
    return Plan(model, mesh, layout, num_parameters, num_rows, assumed, tuple(items))


def _state_items(config: configuration.Config, model: model_config.ModelConfig, mesh, num_rows: int, base, adapter) -> list[Item]:
    """The arrays that a run always holds: weights, learners, selector, features."""
    optimizer, selector = setups.make_optimizer(config, num_rows), configuration.to_selector(config)
    state = jax.eval_shape(lambda start: setups.new_state(config, start, num_rows, optimizer, features.SIZE), adapter)
    shardings = sharding.state_shardings(mesh, state, config.mesh.shard_selector)

    def learned(part: str):
        return getattr(state.policy, part), getattr(shardings.policy, part)

    items = [
        Item("base parameters", size_of(base, sharding.weight_shardings(mesh, base)), ALWAYS),
        Item("adapter θ" if config.lora.rank else "all weights θ", size_of(*learned("adapter")), ALWAYS),
        Item("its optimizer", size_of(*learned("optimizer")), ALWAYS),
    ]
    if state.tracker is not None:
        items.append(Item("second adapter θ', its optimizer", size_of(state.tracker, shardings.tracker), ALWAYS))
    if state.influence is not None:
        items.append(Item("running mean of the trusted rows' gradient", size_of(state.influence, shardings.influence), ALWAYS))
    items.append(Item("ω, its optimizer, visits", size_of(state.selector, shardings.selector), ALWAYS))
    if selector.parameterization == "features":
        num_parts = mesh.size if config.mesh.shard_selector else 1
        size = features.SIZE if configuration.has_row_features(config) else 1
        items.append(Item("features of all rows", 4 * size * num_rows // num_parts, ALWAYS, "formula"))
    if config.eval.keep_best:
        items.append(Item("best θ so far", size_of(*learned("adapter")), ALWAYS))
    items.append(Item("copy of all these but the base, for a checkpoint", size_of(state, shardings), ALWAYS))
    if mesh.shape["fsdp"] > 1:
        gathered = AbstractMesh((1, 1, mesh.shape["tensor"]), sharding.AXES)
        trees = {"layers": base["layers"]}, {"lm_head": decoder.head(base)}
        layers, head = (size_of(tree, sharding.weight_shardings(gathered, tree)) for tree in trees)
        items.append(Item("base gathered over fsdp: one layer, head", layers // model.num_layers + head, ALWAYS, "formula"))
    return items


def _step_items(
    config: configuration.Config, model: model_config.ModelConfig, mesh, layout: packing.Layout, num_rows: int, adapter
) -> list[Item]:
    """The arrays of a training step."""
    sequences, num_targets = layout.sequences // sharding.num_parts(mesh, "rows"), layout.targets
    targets = lora.resolve_targets(model, config.lora.targets)
    # Frozen layers keep nothing for the backward pass, and are not in the step.
    adapted = dataclasses.replace(model, num_layers=lora.resolve_layers(model, config.lora.layers))
    kept = activations(on_one_device(adapted, mesh), config.lora.rank, targets, sequences, layout.length, num_targets)
    chunk = jax.ShapeDtypeStruct((min(packing.CHUNK, num_targets), model.vocab_size), jnp.float32)
    rows, columns = sharding.NamedSharding(mesh, sharding.spec(mesh, chunk.shape, ("rows", "vocab"))).shard_shape(chunk.shape)
    logit_bytes = 4 + 4 + jnp.dtype(model.dtype).itemsize
    learned = None if config.lora.rank else sharding.weight_shardings(mesh, adapter)
    return _entering_items(config, model, mesh, layout, num_rows, adapter) + [
        Item("activations of a micro-batch", kept, TRAINING, "shapes of jax.vjp"),
        Item("logits chunk: logits, exp, exp rounded", rows * columns * logit_bytes, TRAINING, "formula"),
        gradient_item(config, size_of(adapter, learned)),
    ]


def gradient_item(config: configuration.Config, size: int) -> Item:
    """The gradients of a step; `size` is that of one, in bytes."""
    if train_state.measures_influence(configuration.to_objective(config), configuration.to_selector(config)):
        return Item("gradients: both levels, one micro-batch's, D m", 4 * size, TRAINING, "formula")
    return Item("gradient: sum and one micro-batch's", 2 * size, TRAINING, "formula")


def _entering_items(
    config: configuration.Config, model: model_config.ModelConfig, mesh, layout: packing.Layout, num_rows: int, adapter
) -> list[Item]:
    """The hidden states that leave the layers below the first adapter: of the rows of a step, and of all rows."""
    if not frozen.num_frozen(model, adapter):
        return []
    width = model.hidden_size * jnp.dtype(model.activations).itemsize
    size = layout.micro_batches * layout.sequences * layout.length * width // sharding.num_parts(mesh, "rows")
    size += size // layout.micro_batches  # a micro-batch is on its way while a step reads the others
    items = [Item("hidden states that leave the frozen layers", size, TRAINING, "formula: all sequences")]
    if config.model.cache_frozen != "off":
        where = HOST if config.model.cache_frozen == "memory" else DISK
        lower = num_rows * (1 + (config.loss.lower in preferences.PAIRS)) * config.data.max_length * width
        items.append(Item("the same of the lower level, kept", lower, where, "formula: all of maximum length; --check: exact"))
    return items


def _refresh_items(config: configuration.Config, model: model_config.ModelConfig, mesh, num_rows: int, base) -> list[Item]:
    """The arrays of a refresh: the sampler and the response store."""
    length = config.data.max_length
    max_new_tokens = min(config.online.max_new_tokens, length - 1)
    slots = jax.eval_shape(lambda: decoding.init_slots(model, config.online.slots, length, max_new_tokens))
    shardings = decoding.slot_shardings(mesh, slots)
    cache = size_of(slots.cache, shardings.cache)
    is_copied = decoding.merges_adapter(model) or not config.lora.rank
    copy = [Item("base for decoding, a copy", size_of(base, sharding.weight_shardings(mesh, base)), SAMPLING)] if is_copied else []
    return copy + [
        Item("KV cache", cache, SAMPLING),
        Item("KV cache, copy of the decoding window", cache, SAMPLING, "formula: the full cache"),
        Item("responses in progress", size_of(slots, shardings) - cache, SAMPLING),
        Item("response store", run_sizes.response_store_bytes(config, num_rows), HOST, "formula: all of maximum length"),
    ]


def _gb(size: int) -> str:
    return f"{size / 1e9:.3f}" if size < 1e9 else f"{size / 1e9:.2f}"


def table(config, plan: Plan) -> str:
    """The plan as text."""
    model, shape = plan.model, plan.mesh.shape
    mesh = " × ".join(f"{axis} {shape[axis]}" for axis in sharding.AXES)
    layout, parts = plan.layout, sharding.num_parts(plan.mesh, "rows")
    generates = config.method in configuration.ONLINE
    slots = f", {config.online.slots // parts} of {config.online.slots} decoding slots" if generates else ""
    quantised = "" if model.quantization == "none" else f", linear layers in {model.quantization}"
    lines = [
        f"{config.model.path}: {model.architecture}, {plan.num_parameters / 1e9:.4g}e9 parameters in {model.dtype}{quantised}",
        f"mesh: {mesh} = {math.prod(shape.values())} devices",
        f"each: {layout.sequences // parts} of {layout.sequences} sequences of {layout.length} tokens{slots}",
        f"lower-level rows: {plan.num_rows}" + (" (assumed: data.num_lower=0 takes all there are)" if plan.rows_assumed else ""),
    ]
    for when in (ALWAYS, TRAINING, SAMPLING, HOST, DISK):
        items = [item for item in plan.items if item.when == when]
        if not items:
            continue
        lines += ["", f"{when + ', GB' + ('' if when in (HOST, DISK) else ' a device'):<52}"]
        lines += [f"  {item.name:<50}{_gb(item.size):>10}  {item.source}" for item in items]
    lines.append("")
    for when in (TRAINING, SAMPLING):
        if any(item.when == when for item in plan.items):
            lines.append(f"{'together ' + when:<52}{_gb(plan.total(when)):>10}")
    fitting = [size for size in DEVICES_GB if plan.peak <= (1 - FREE) * size * 1e9]
    verdict = f"fits devices of {fitting[0]} GB and more" if fitting else f"fits no device of {DEVICES_GB[-1]} GB"
    return "\n".join([*lines, f"{verdict}, a fifth left to XLA's temporaries"])

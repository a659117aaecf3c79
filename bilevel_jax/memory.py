"""What a device would hold: `python -m bilevel_jax.main --config=... --plan`.

Sizes alone: no weights, rows or tokenizer are read, and of the model nothing but its `config.json`. Shapes come from
`jax.eval_shape` of the very functions that a run calls, their parts from the rules of `sharding`, so that any mesh can be planned
on any machine. What XLA adds in temporaries is not known before it has compiled for that machine: leave a fifth of a device free.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jax.sharding import AbstractMesh, AxisType

from bilevel_jax import checks, decoding, features, forward, losses, preferences, sharding, step
from bilevel_jax import config as configuration
from bilevel_jax.data import packing
from bilevel_jax.models import decoder, huggingface, lora

ASSUMED_ROWS = 100_000  # N where `data.num_lower` leaves it open
ALWAYS, TRAINING, SAMPLING, HOST = "always", "while training", "while sampling", "in the host's memory"
DEVICES_GB = (16, 24, 32, 40, 48, 64, 80, 96, 141, 192)
FREE = 0.2  # share of a device that is left to XLA


class Item(NamedTuple):
    """Something that takes memory on one device, or on the host."""

    name: str
    size: int  # bytes
    when: str
    source: str  # how the size was found


@dataclasses.dataclass(frozen=True)
class Plan:
    model: decoder.ModelConfig
    mesh: AbstractMesh
    num_parameters: int  # of the base
    num_rows: int  # N
    items: tuple[Item, ...]

    def total(self, when: str) -> int:
        """Bytes on one device at a time of `TRAINING` or `SAMPLING`, what is always there included."""
        return sum(item.size for item in self.items if item.when in (ALWAYS, when))

    @property
    def peak(self) -> int:
        return max(self.total(TRAINING), self.total(SAMPLING))


def make_mesh(data: int, fsdp: int, tensor: int) -> AbstractMesh:
    """The mesh of a run, of devices that need not exist; `data=0` takes what this machine has left, one at least."""
    data = data or max(1, len(jax.devices()) // (fsdp * tensor))
    return AbstractMesh((data, fsdp, tensor), sharding.AXES, axis_types=(AxisType.Auto,) * len(sharding.AXES))


def size_of(tree, places=None) -> int:
    """Bytes of a tree of shapes on one device, placed by a tree of shardings; whole without one."""

    def size(leaf, place=None):
        return math.prod(place.shard_shape(leaf.shape) if place else leaf.shape) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(size, tree, *([places] if places else []))))


def base_shapes(model: decoder.ModelConfig):
    return jax.eval_shape(lambda: decoder.init_params(model, jax.random.key(0)))


def adapter_shapes(model: decoder.ModelConfig, rank: int, targets: tuple[str, ...]):
    return jax.eval_shape(lambda: lora.init_adapter(model, jax.random.key(0), rank, targets))


def on_one_device(model: decoder.ModelConfig, mesh) -> decoder.ModelConfig:
    """The decoder as one device computes it: its heads, its part of the feed-forward."""

    def part(size, name):
        return size if size % sharding.num_parts(mesh, name) else size // sharding.num_parts(mesh, name)

    heads = part(model.num_heads, "heads")
    return dataclasses.replace(
        model,
        num_heads=heads,
        num_kv_heads=math.gcd(heads, part(model.num_kv_heads, "heads")),
        intermediate_size=part(model.intermediate_size, "mlp"),
    )


def _made(function, *shapes) -> int:
    """Bytes of the results of an abstract function that are not its arguments."""
    found = jax.make_jaxpr(function)(*shapes).jaxpr
    made = {id(var): var.aval for var in found.outvars if not isinstance(var, Literal) and var not in found.invars}
    return size_of(list(made.values()))


def residuals(model: decoder.ModelConfig, rank: int, targets, sequences: int, length: int, num_targets: int) -> int:
    """Bytes that the backward pass of one micro-batch has from its forward pass, weights left out: the results of `jax.vjp`."""

    def shape(*axes, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(axes, dtype)

    tokens, aims = shape(1, sequences, length), shape(1, num_targets)
    packed = packing.Packed(tokens, tokens, tokens, aims, aims, aims, shape(1), shape(sequences), shape())

    def kept(base, adapter, packed):
        return jax.vjp(lambda adapter: forward.micro_nll(model, base, adapter, packed, 0), adapter)[1]

    return _made(kept, base_shapes(model), adapter_shapes(model, rank, targets), packed)


def layer_residuals(model: decoder.ModelConfig, rank: int, targets, sequences: int, length: int) -> int:
    """Bytes that the backward pass of one layer works with, weights left out. The decoder keeps some of them and recomputes the
    others a layer at a time."""
    base, adapter = (
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), tree["layers"])
        for tree in (base_shapes(model), adapter_shapes(model, rank, targets))
    )
    x = jax.ShapeDtypeStruct((sequences * length, model.hidden_size), model.activations)

    def kept(base, adapter, x, place):
        def layer(adapter, x):
            table = decoder.rotary_table(place, model)
            return decoder.Layer(model).apply({"params": base, "adapter": adapter}, x, table, place)[0]

        return jax.vjp(layer, adapter, x)[1]

    return _made(kept, base, adapter, x, jax.ShapeDtypeStruct((sequences, length), jnp.int32))


def activations(model: decoder.ModelConfig, rank: int, targets, sequences: int, length: int, num_targets: int) -> int:
    """`residuals`, and of one layer also what it recomputes."""

    def of(layers: int) -> int:
        changed = dataclasses.replace(model, num_layers=layers)
        return residuals(changed, rank, targets, sequences, length, num_targets)

    anew = layer_residuals(model, rank, targets, sequences, length) - (of(2) - of(1))
    return of(model.num_layers) + anew


def make(config) -> Plan:
    """The plan of a run.

    Raises:
      ConfigError, ModelError: as of the run itself, as far as it shows without weights and rows.
    """
    config = checks.build(config)
    mesh, dtype = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor), jnp.dtype(config.model.dtype)
    directory = huggingface.locate(config.model.path, ("config.json",))
    model = huggingface.read_config(directory, config.model.dtype, activations=config.model.dtype)
    checks.check_fit(config, model.max_positions, sharding.num_parts(mesh, "rows"))
    model = dataclasses.replace(model, remat=config.model.remat)
    targets, rank = lora.resolve_targets(model, config.lora.targets), config.lora.rank
    num_rows = config.data.num_lower - config.eval.num_lower if config.data.num_lower else ASSUMED_ROWS
    if config.data.num_lower:
        checks.check_rows(config, num_rows, mesh.size)
    items = []

    def add(name: str, size: int, when: str, source: str = "shapes") -> None:
        items.append(Item(name, size, when, source))

    # Weights, and what learns.
    base = base_shapes(model)
    base_size = size_of(base, sharding.weight_shardings(mesh, base))
    tracked = configuration.to_objective(config).value_function == "tracked"
    optimizer, select = configuration.to_optimizer(config), configuration.to_selector(config)
    adapter = adapter_shapes(model, rank, targets)
    state = jax.eval_shape(lambda start: step.init(start, optimizer, select, num_rows, tracked, features.SIZE), adapter)
    places = sharding.state_shardings(mesh, state, config.mesh.shard_selector)
    add("base parameters", base_size, ALWAYS)
    add("adapter θ", size_of(state.policy.adapter), ALWAYS)
    add("its optimizer", size_of(state.policy.optimizer), ALWAYS)
    if tracked:
        add("second adapter θ', its optimizer", size_of(state.tracker), ALWAYS)
    add("ω, its optimizer, visits", size_of(state.selector, places.selector), ALWAYS)
    if select.parameterization == "features":
        parts, size = mesh.size if config.mesh.shard_selector else 1, features.SIZE if config.selection.unit == "sample" else 1
        add("features of all rows", 4 * size * num_rows // parts, ALWAYS, "formula")
    add("copy of all these but the base, for a checkpoint", size_of(state, places), ALWAYS)
    if mesh.shape["fsdp"] > 1:
        gathered = AbstractMesh((1, 1, mesh.shape["tensor"]), sharding.AXES)
        layers, head = {"layers": base["layers"]}, {"lm_head": decoder.head(base)}
        layers, head = (size_of(tree, sharding.weight_shardings(gathered, tree)) for tree in (layers, head))
        add("base gathered over fsdp: one layer, head", layers // model.num_layers + head, ALWAYS, "formula")

    # A step.
    sequences = config.batch.micro_size // sharding.num_parts(mesh, "rows")
    num_targets = packing.Layout(config.batch.micro_size, config.data.max_length, 1).targets
    local = on_one_device(model, mesh)
    kept = activations(local, rank, targets, sequences, config.data.max_length, num_targets)
    add("activations of a micro-batch", kept, TRAINING, "shapes of jax.vjp")
    chunk = jax.ShapeDtypeStruct((min(losses.CHUNK, num_targets), model.vocab_size), jnp.float32)
    rows, columns = sharding.NamedSharding(mesh, sharding.spec(mesh, chunk.shape, ("rows", "vocab"))).shard_shape(chunk.shape)
    add("logits chunk: logits, exp, exp rounded", rows * columns * (4 + 4 + dtype.itemsize), TRAINING, "formula")
    add("gradient: sum and one micro-batch's", 2 * size_of(adapter), TRAINING, "formula")

    # A refresh.
    if config.method in configuration.ONLINE:
        slots, length = config.online.slots, config.data.max_length
        most = min(config.online.max_new_tokens, length - 1)
        held = jax.eval_shape(lambda: decoding.init_slots(model, slots, length, most))
        places = decoding.slot_shardings(mesh, held)
        add("base by layer, a copy", base_size, SAMPLING)
        cache = size_of(held.cache, places.cache)
        add("KV cache", cache, SAMPLING)
        add("KV cache, the part that is decoded in, a copy", cache, SAMPLING, "formula: all of it")
        add("responses under way", size_of(held, places) - cache, SAMPLING)
        masked, visited = int(config.online.ratio * num_rows), config.online.refresh_every * config.batch.size
        answered = masked if config.online.generate == "all" else min(masked, visited)
        responses = answered * config.online.num_samples
        numbers = 4 + bool(config.online.reward) + (config.online.objective in preferences.PAIRS)  # of each, float64 or int64
        add("response store", responses * (4 * most + 8 * numbers) + num_rows, HOST, "formula: all as long as can be")
    number = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(base))
    return Plan(model, mesh, number, num_rows, tuple(items))


def _gb(size: int) -> str:
    return f"{size / 1e9:.3f}" if size < 1e9 else f"{size / 1e9:.2f}"


def table(config, plan: Plan) -> str:
    """The plan as a person reads it."""
    model, shape = plan.model, plan.mesh.shape
    mesh = " × ".join(f"{axis} {shape[axis]}" for axis in sharding.AXES)
    parts = sharding.num_parts(plan.mesh, "rows")
    lines = [
        f"{config.model.path}: {model.architecture}, {plan.num_parameters / 1e9:.4g}e9 parameters in {model.dtype}",
        f"mesh: {mesh} = {math.prod(shape.values())} devices",
        f"each: {config.batch.micro_size // parts} of {config.batch.micro_size} sequences of {config.data.max_length} tokens, "
        f"{config.online.slots // parts} of {config.online.slots} decoding slots",
        f"lower-level rows: {plan.num_rows}"
        + ("" if config.data.num_lower else " (assumed: data.num_lower=0 takes all there are)"),
    ]
    for when in (ALWAYS, TRAINING, SAMPLING, HOST):
        items = [item for item in plan.items if item.when == when]
        if not items:
            continue
        lines += ["", f"{when + ', GB' + ('' if when == HOST else ' a device'):<52}"]
        lines += [f"  {item.name:<50}{_gb(item.size):>10}  {item.source}" for item in items]
    lines.append("")
    for when in (TRAINING, SAMPLING):
        if any(item.when == when for item in plan.items):
            lines.append(f"{'together ' + when:<52}{_gb(plan.total(when)):>10}")
    fitting = [size for size in DEVICES_GB if plan.peak <= (1 - FREE) * size * 1e9]
    verdict = f"fits devices of {fitting[0]} GB and more" if fitting else f"fits no device of {DEVICES_GB[-1]} GB"
    return "\n".join([*lines, f"{verdict}, a fifth left to XLA's temporaries"])

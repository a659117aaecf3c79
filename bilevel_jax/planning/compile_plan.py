"""Compiles the programs of a run for accelerators that need not be there: `main --config=... --plan --compile=tpu-v5e:2x2`.

XLA says what each program needs on each device. Nothing is run, and no weights, rows or tokenizer are read.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import jax
import ml_collections
import tqdm

from bilevel_jax import checks, compilations, sharding
from bilevel_jax.errors import RunError
from bilevel_jax.planning import memory, program_costs, programs, targets
from bilevel_jax.runtime.disk import amount
from bilevel_jax.text import one_line

OPTIONS = {"gpu": {"xla_gpu_autotune_level": "0"}}  # without a device there is nothing to time
LOWERING = {"tpu": "tpu", "gpu": "cuda"}
LOOPS = ("outside loops", "in a loop", "in a loop of a loop")
SMALLER = {
    memory.TRAINING: "lower batch.micro_size or data.max_length, set model.remat=True, or raise mesh.fsdp or mesh.tensor",
    memory.SAMPLING: "lower online.slots or data.max_length, or raise mesh.fsdp or mesh.tensor",
}


class Memory(NamedTuple):
    """Bytes of a program on one device."""

    arguments: int
    temporaries: int
    code: int  # the program itself, on a TPU
    results: int  # that do not take the place of arguments
    held: int  # what the run holds besides

    @property
    def peak(self) -> int:
        return sum(self)


class Compiled(NamedTuple):
    """What XLA says of a program, and the plan of the same part of the run."""

    program: programs.Program
    memory: Memory
    planned: int  # bytes
    cost: program_costs.Cost
    counted: bool  # by XLA
    collectives: list[program_costs.Collective]


def memory_of(analysis, held: int) -> Memory:
    """The memory of a program from XLA's `memory_analysis`."""
    return Memory(
        analysis.argument_size_in_bytes,
        analysis.temp_size_in_bytes,
        analysis.generated_code_size_in_bytes,
        analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        held,
    )


def compile_program(program: programs.Program, target: targets.Target, plan: memory.Plan) -> Compiled:
    """Compiles a program for the devices of its shardings.

    Raises:
      RunError: it does not compile; the message says what to change.
    """
    traced = program.function.trace(*program.arguments)
    lowered = traced.lower(lowering_platforms=(LOWERING[target.platform],))
    try:
        compiled = lowered.compile(compiler_options=OPTIONS.get(target.platform))
    except jax.errors.JaxRuntimeError as error:
        raise RunError(refusal(program, target, str(error))) from error
    cost, counted = program_costs.of_device(compiled.cost_analysis(), traced.jaxpr.jaxpr, plan.mesh.size)
    return Compiled(
        program,
        memory_of(compiled.memory_analysis(), program.held),
        plan.total(program.when),
        cost,
        counted,
        program_costs.parse_collectives(compiled.as_text()),
    )


def refusal(program: programs.Program, target: targets.Target, message: str) -> str:
    """One line on a program that does not compile, and what to change."""
    what = f"{program.name} does not compile for {target}"
    used = re.search(r"Used (\S+) of (\S+) hbm", message)
    if used:
        return f"{what}: it needs {used[1]} of {used[2]} on each device; {SMALLER[program.when]}"
    return f"{what}: {one_line(message, 200)}; try another data.max_length, batch.micro_size or mesh, or another target"


def is_planned(name: str) -> bool:
    """Whether `--plan` counts what this program needs, and not less."""
    return name.startswith(("step", "decoding"))


class CompilePlan(NamedTuple):
    """What is to be compiled."""

    plan: memory.Plan
    mesh: jax.sharding.Mesh
    programs: list[programs.Program]
    target: targets.Target


def make_plan(config: ml_collections.ConfigDict, target: targets.Target) -> CompilePlan:
    """The programs of a run for a target.

    Args:
      config: of the run. Its mesh is laid over the devices of the target; `mesh.data=0` takes all that are left.
      target: what to compile for.

    Raises:
      ConfigError, ModelError: as `memory.make_plan`.
      RunError: the compiler is not installed.
      ValueError: the target has fewer devices than the mesh.
    """
    config = config.copy_and_resolve_references()
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, targets.devices(target))
    config.mesh.data = mesh.shape["data"]
    plan = memory.make_plan(config, platform=target.platform)
    with jax.set_mesh(mesh):
        return CompilePlan(plan, mesh, programs.of_run(checks.build(config), plan, mesh), target)


def compile_all(todo: CompilePlan) -> Iterator[Compiled]:
    """Yields each program as soon as it is compiled.

    Raises:
      RunError: a program does not compile.
    """
    with jax.set_mesh(todo.mesh), compilations.not_cached():
        with tqdm.tqdm(todo.programs, desc=f"compiling for {todo.target}", unit="program", leave=False, disable=None) as bar:
            for program in bar:
                bar.set_postfix_str(program.name)
                compiled = compile_program(program, todo.target, todo.plan)
                bar.clear()
                yield compiled


def compile_run(config: ml_collections.ConfigDict, target: targets.Target) -> Iterator[str]:
    """Yields the header, and the text of each program as soon as it is compiled; arguments and errors as in `make_plan`."""
    todo = make_plan(config, target)
    yield header(todo.plan, target)
    for compiled in compile_all(todo):
        yield program_text(compiled, target)


# --------------------------------------------------------------------------------------------------------------------
# Text
# --------------------------------------------------------------------------------------------------------------------


def header(plan: memory.Plan, target: targets.Target) -> str:
    """What is compiled, and for what."""
    chip, shape = target.chip, plan.mesh.shape
    axes = " × ".join(f"{axis} {shape[axis]}" for axis in sharding.AXES)
    chips = f"{chip.flops / 1e12:g} TFLOP/s in bfloat16, {chip.bandwidth / 1e9:g} GB/s, {chip.memory / 1e9:g} GB"
    model = f"{plan.model.architecture}, {plan.num_parameters / 1e9:.4g}e9 parameters, attention {plan.model.attention}"
    return f"{model}, for {target}: {axes}; each device has {chips}"


def seconds(value: float) -> str:
    """A time as text."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms" if value >= 1e-3 else f"{value * 1e6:.1f} µs"


def cost_text(compiled: Compiled, chip: targets.Chip) -> str:
    """FLOPs and bytes, and the least time for them."""
    cost = compiled.cost
    by_flops, by_bandwidth = program_costs.least_seconds(cost, chip.flops, chip.bandwidth)
    turn = f"for {compiled.program.loop}"
    if not compiled.counted:
        known = f"{cost.flops:.3g} FLOP of products outside of kernels {turn}: at least {seconds(by_flops)}"
        return f"{known}; bytes are not counted for this target"
    times = f"at least {seconds(by_flops)} by FLOP, {seconds(by_bandwidth)} by bandwidth"
    return f"{cost.flops:.3g} FLOP and {amount(round(cost.bytes))} moved {turn}: {times}"


def program_text(compiled: Compiled, target: targets.Target) -> str:
    """All of one program, on one device."""
    used, chip = compiled.memory, target.chip
    parts = zip(("arguments", "temporaries", "code", "results", "held besides"), used)
    verdict = "fits" if used.peak <= chip.memory else f"does not fit; {SMALLER[compiled.program.when]}"
    ratio = compiled.planned / used.peak - 1
    lines = [
        f"{compiled.program.name}, on each device",
        f"  {', '.join(f'{name} {amount(size)}' for name, size in parts)}",
        f"  peak {amount(used.peak)} of {amount(round(chip.memory))}: {verdict}",
        f"  {cost_text(compiled, chip)}",
    ]
    if is_planned(compiled.program.name):
        lines.insert(3, f"  --plan says {amount(compiled.planned)} {compiled.program.when}, {ratio:+.0%}")
    for one in compiled.collectives:
        where = LOOPS[min(one.loops, len(LOOPS) - 1)]
        lines.append(f"  {one.number} {one.kind} {where}, {amount(one.bytes)}")
    return "\n".join(lines)

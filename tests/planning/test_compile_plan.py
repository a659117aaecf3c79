"""Compiling for devices that are not there: the command's errors, its text, and one run really compiled for eight TPUs."""

import importlib.util
import json
import math
import types

import jax
import pytest

from bilevel_jax import config as configuration
from bilevel_jax.planning import compile_plan, memory, program_costs, programs, targets
from tests.conftest import call_main

V5E, H100 = targets.parse("tpu-v5e:2x4"), targets.parse("gpu-h100:8")
PACKAGES = {"tpu": ("libtpu", "compile"), "gpu": ("jax_cuda13_plugin", "compile-gpu")}  # of a compiler, and what installs it
STEP = programs.Program("step", None, (), 100, memory.TRAINING, "a micro-batch")
DECODING = STEP._replace(name="decoding", when=memory.SAMPLING)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--plan", "--compile=tpu-v7:2x2"], "--compile='tpu-v7:2x2' is no known target"),
        (["--compile=tpu-v5e:2x2"], "--compile=tpu-v5e:2x2 belongs to --plan; add --plan"),
        (["--plan", "--check", "--compile=tpu-v5e:2x2"], "add --plan, without --check"),
    ],
)
def test_refused_commands(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_code:
        call_main(monkeypatch, "--config=configs/safety.py", *arguments)
    error = capsys.readouterr().err
    assert exit_code.value.code == 1 and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "target, extra, package", [("tpu-v5e:2x2", "tpu", "libtpu"), ("gpu-h100", "cuda13", "jax_cuda13_plugin")], ids=["tpu", "gpu"]
)
def test_a_missing_compiler_names_the_extra(monkeypatch, capsys, target, extra, package):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(SystemExit):
        call_main(monkeypatch, "--config=configs/safety.py", "--plan", f"--compile={target}")
    assert f"install the extra {extra}: pip install 'bilevel_jax[{extra}]'" in capsys.readouterr().err


def test_memory_that_does_not_suffice():
    """The message of XLA for a TPU, shortened."""
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 22.20G of 15.75G hbm. Exceeded hbm capacity by 6.45G."
    )
    what = "step does not compile for tpu-v5e:2x4: it needs 22.20G of 15.75G on each device; lower batch.micro_size"
    assert compile_plan.refusal(STEP, V5E, message).startswith(what)
    assert "lower online.slots" in compile_plan.refusal(DECODING, V5E, message)


def test_other_failures_of_the_compiler_are_one_line():
    line = compile_plan.refusal(STEP, V5E, "INTERNAL: no such layout\nmore\n" * 50)
    assert "INTERNAL: no such layout" in line and "\n" not in line and line.endswith("or another target")


def test_text_of_a_program():
    """Peak and times by hand: 2 + 3 + 1 + (5 - 4) + 0.1 GB; 1.97e12 FLOP at 197e12 a second; 8.19e9 bytes at 819e9."""
    sizes = dict(zip(("argument", "temp", "generated_code", "output", "alias"), (2, 3, 1, 5, 4)))
    analysis = types.SimpleNamespace(**{f"{name}_size_in_bytes": size * 10**9 for name, size in sizes.items()})
    used = compile_plan.memory_of(analysis, 10**8)
    gathered = [program_costs.Collective("all-gather", 2, 7, 5 * 10**6)]
    compiled = compile_plan.Compiled(STEP, used, 6_390_000_000, program_costs.Cost(1.97e12, 8.19e9), True, gathered)
    text = compile_plan.program_text(compiled, V5E)
    for shown in (
        "arguments 2.00 GB, temporaries 3.00 GB, code 1.00 GB, results 1.00 GB, held besides 100.0 MB",
        "peak 7.10 GB of 16.00 GB: fits",
        "--plan says 6.39 GB while training, -10%",
        "at least 10.00 ms by FLOP, 10.00 ms by bandwidth",
        "7 all-gather in a loop of a loop, 5.0 MB",
    ):
        assert shown in text
    large = compiled._replace(memory=used._replace(temporaries=13 * 10**9))
    assert "of 16.00 GB: does not fit; lower batch.micro_size" in compile_plan.program_text(large, V5E)
    uncounted = compiled._replace(cost=program_costs.Cost(1.97e12, math.nan), counted=False)
    assert "at least 10.00 ms; bytes are not counted" in compile_plan.program_text(uncounted, V5E)


# --------------------------------------------------------------------------------------------------------------------
# Compiled
# --------------------------------------------------------------------------------------------------------------------

SIZES = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "max_position_embeddings": 512}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}  # of width 64
MATRICES = 2 * 1024 * 256 + 3 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512)
NORMS = 7 * 256


@pytest.fixture(scope="module")
def compile_small(tmp_path_factory):
    """`f(changes, names)` -> the named programs of a run with `data`, `fsdp` and `tensor` of 2, compiled, by name; None: all."""
    directory = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"} | SIZES | HEADS))

    def compile_programs(changes, names=None, target=V5E):
        package, command = PACKAGES[target.platform]
        if not importlib.util.find_spec(package):
            pytest.skip(f"{package} is not installed; make {command} has it")
        config = configuration.default()
        small = {"model.path": str(directory), "model.dtype": "bfloat16", "data.max_length": 512}
        small |= {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "batch.size": 8, "data.num_lower": 1200, "lora.rank": 8}
        small |= {"selection.cost": "loss", "selection.coefficient_at": "current", "online.slots": 8}
        config.update_from_flattened_dict(small | changes)
        jax.config.update("jax_disable_most_optimizations", False)  # all of them, as in the command
        try:
            todo = compile_plan.make_plan(config, target)
            chosen = [program for program in todo.programs if names is None or program.name in names]
            return {one.program.name: one for one in compile_plan.compile_all(todo._replace(programs=chosen))}
        finally:
            jax.config.update("jax_disable_most_optimizations", True)

    return compile_programs


@pytest.fixture(scope="module")
def compiled(compile_small):
    """All programs of an online run."""
    return compile_small({"method": "online"})


VARIANTS = {  # of the step -> changes; MB of temporaries and of results of all-gathers, GFLOP of a micro-batch, by libtpu 0.0.42.1
    "mixing": ({"method": "mixing"}, 8.4, 2.8, 4.4),
    "offline": ({"method": "offline", "selection.cost": "influence", "selection.coefficient_at": "next"}, 16.2, 6.5, 10.3),
    "dynamic": ({"method": "dynamic"}, 8.5, 2.8, 4.4),
    "features": ({"selection.parameterization": "features", "selection.optimizer": "sgd"}, 8.8, 2.8, 4.4),
    "token": ({"selection.unit": "token", "selection.coefficient_at": "next"}, 10.5, 4.1, 5.9),
    "dpo": ({"loss.upper": "dpo", "loss.lower": "dpo"}, 8.6, 2.8, 4.4),
    "last": ({"lora.layers": "last:1"}, 6.3, 1.3, 1.4),
}
RANGE = 1.4  # memory that doubles, or another all-gather of the base, fails


def gathered_bytes(program) -> int:
    """Bytes of the results of all-gathers."""
    return sum(one.bytes for one in program.collectives if one.kind == "all-gather")


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_steps_of_all_kinds(compile_small, name):
    """Sizes as they were, within a range; and the layers below the first adapter compile where there are some."""
    changes, temporaries, gathered, flops = VARIANTS[name]
    compiled = compile_small(changes, ("step", "frozen layers"))
    assert ("frozen layers" in compiled) == (name == "last")
    step = compiled["step"]
    measured = step.memory.temporaries / 1e6, gathered_bytes(step) / 1e6, step.cost.flops / 1e9
    for size, expected in zip(measured, (temporaries, gathered, flops)):
        assert expected / RANGE < size < expected * RANGE, measured


@pytest.mark.slow
def test_arguments_of_tpu_programs(compiled):
    """A quarter of the matrices in bfloat16, the norms, three float32 copies of the adapter, and little else."""
    adapter = 3 * 8 * (2 * (256 + 256) + 2 * (256 + 128) + 3 * (256 + 512))
    base, learned = 2 * (MATRICES / 4 + NORMS), 3 * 4 * adapter
    assert base + learned < compiled["step"].memory.arguments < 1.5 * (base + learned)
    assert base < compiled["prefill"].memory.arguments < 1.5 * (base + learned / 3)
    cache = 2 * 3 * 8 * 512 * 2 * 64 * 2 / 8  # keys and values, layers, slots, positions, heads, width, bytes; on 8 devices
    assert base + cache < compiled["decoding"].memory.arguments < 1.6 * (base + learned / 3 + cache)


@pytest.mark.slow
def test_sizes_of_tpu_programs(compiled):
    """Ranges: memory that doubles, or an all-gather of the whole base, fails."""
    sizes = {"step": 12e6, "scoring": 6e6, "prefill": 4e6, "decoding": 14e6, "decoding in 256 positions": 16e6}
    assert set(compiled) == set(sizes)
    for name, most in sizes.items():
        assert compiled[name].memory.temporaries < most
        assert 0 < gathered_bytes(compiled[name]) < 2 * MATRICES


@pytest.mark.slow
def test_tpu_programs_take_the_kernel(compiled):
    """`auto`, with rows and heads split over the devices; FLOPs of both products of attention by hand."""
    program = compiled["scoring"].program
    assert program.arguments[0].attention == "splash"
    with jax.set_mesh(program.arguments[3].tokens.sharding.mesh):
        flops = program_costs.kernel_flops(program.function.trace(*program.arguments).jaxpr.jaxpr)
    assert flops == 3 * 4 * 4 * 512 * 512 * 4 * 64  # layers, FLOPs of a query and a key, sequences, positions, heads, width


@pytest.mark.slow
def test_flops_of_tpu_programs(compiled):
    """Scoring: 2 FLOPs for each weight of the layers and token, and attention. A step: at least twice that."""
    tokens = 4 * 512 / 4  # of four sequences, on one of four devices that split rows; two split heads and columns
    least = 2 * tokens * (MATRICES - 2 * 1024 * 256) / 2
    assert least < compiled["scoring"].cost.flops < 2.5 * least
    assert 2 * least < compiled["step"].cost.flops < 7 * least
    assert all(one.counted and one.cost.bytes > one.memory.arguments / 2 for one in compiled.values())


@pytest.mark.slow
@pytest.mark.parametrize("target", [V5E, H100], ids=str)
def test_dequantised_weights_are_of_one_layer(compile_small, target):
    """NF4 adds to a step a few copies of the weights of a layer, and none for each of its 16 values."""
    plain, quantised = (compile_small({"model.quantization": kind}, ("step",), target)["step"] for kind in ("none", "nf4"))
    layer = 4 * (MATRICES - 2 * 1024 * 256) / 3 / 2  # bytes of its weights in float32 on one of two devices that split them
    assert quantised.memory.temporaries < plain.memory.temporaries + 5 * layer


@pytest.mark.slow
@pytest.mark.parametrize("attention, kernel", [("auto", "xla"), ("fused", "triton")])
def test_gpu_programs(compile_small, attention, kernel):
    """The same run for eight H100, rows and heads of the kernel split: arguments as on a TPU, ranges for the rest."""
    compiled = compile_small({"method": "online", "model.attention": attention}, target=H100)
    assert compiled["scoring"].program.arguments[0].attention == kernel
    adapter = 3 * 8 * (2 * (256 + 256) + 2 * (256 + 128) + 3 * (256 + 512))
    base, learned = 2 * (MATRICES / 4 + NORMS), 3 * 4 * adapter
    assert base + learned < compiled["step"].memory.arguments < 1.5 * (base + learned)
    for name, most in (("step", 60e6), ("scoring", 20e6), ("prefill", 20e6), ("decoding", 20e6)):
        assert compiled[name].memory.temporaries < most
        assert 0 < gathered_bytes(compiled[name]) < 2 * MATRICES

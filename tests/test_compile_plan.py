"""Compiling for devices that are not there: the command's errors, its text, and one run really compiled for eight TPUs."""

import importlib.util
import json
import math
import types

import jax
import pytest

from bilevel_jax import compile_plan, memory, program_costs, programs, targets
from bilevel_jax import config as configuration
from tests.conftest import call_main

V5E = targets.parse("tpu-v5e:2x4")
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
def compiled(tmp_path_factory):
    """The programs of an online run with `data`, `fsdp` and `tensor` of 2, by name."""
    if not importlib.util.find_spec("libtpu"):
        pytest.skip("libtpu is not installed; make compile has it")
    directory = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"} | SIZES | HEADS))
    config = configuration.default()
    changes = {"model.path": str(directory), "model.dtype": "bfloat16", "method": "online", "data.max_length": 512}
    changes |= {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "batch.size": 8, "data.num_lower": 1200, "lora.rank": 8}
    changes |= {"selection.cost": "loss", "selection.coefficient_at": "current", "online.slots": 8}
    config.update_from_flattened_dict(changes)
    with pytest.MonkeyPatch.context() as patch:
        results = {}

        def keep(result, target):
            results[result.program.name] = result
            return ""

        patch.setattr(compile_plan, "program_text", keep)
        jax.config.update("jax_disable_most_optimizations", False)  # all of them, as in the command
        try:
            list(compile_plan.compile_run(config, V5E))
        finally:
            jax.config.update("jax_disable_most_optimizations", True)
    return results


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
    assert set(compiled) == {"step", "scoring", "prefill", "decoding"}
    for name, most in (("step", 40e6), ("scoring", 6e6), ("prefill", 4e6), ("decoding", 14e6)):
        assert compiled[name].memory.temporaries < most
        gathered = [one.bytes for one in compiled[name].collectives if one.kind == "all-gather"]
        assert gathered and sum(gathered) < 2 * MATRICES


@pytest.mark.slow
def test_tpu_programs_take_the_kernel(compiled):
    """`auto`, with rows and heads split over the devices; FLOPs of both products of attention by hand."""
    program = compiled["scoring"].program
    assert program.arguments[0].attention == "fused"
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

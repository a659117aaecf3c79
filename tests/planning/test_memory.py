"""The memory plan against numbers by hand for published models, and against the memory analysis of a compiled step."""

import dataclasses
import functools
import json
import math
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from bilevel_jax import config as configuration
from bilevel_jax import presets, step, train_state
from bilevel_jax.data import packing
from bilevel_jax.models import huggingface, model_config
from bilevel_jax.planning import memory

ROOT = pathlib.Path(__file__).parents[2]
LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
EIGHT = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
SEVENTY = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
# Embedding and head, then per layer q and o, k and v, three of the feed-forward, two norms; then the last norm.
NUM_8B = 2 * 128256 * 4096 + 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096) + 4096
NUM_70B = 2 * 128256 * 8192 + 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192) + 8192
NORMS_8B, NORMS_70B = 65 * 4096, 161 * 8192
ADAPTER_8B = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))  # rank 16
CACHE_8B = 2 * 32 * 16 * 2048 * 8 * 128 * 2  # keys and values, layers, slots, positions, heads, width, bytes


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """`f(sizes, mesh, changes) -> Plan, {item: bytes}` of the 8B tier, for a model with these sizes."""
    root = tmp_path_factory.mktemp("models")

    @functools.cache
    def make(sizes, mesh, changes):
        directory = root / str(dict(sizes)["hidden_size"])
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(LLAMA | dict(sizes)))
        config = presets.get("llama3-8b")
        settings = {"model.path": str(directory), "method": "dynamic", "batch.micro_size": 8, "online.slots": 16}
        config.update_from_flattened_dict(settings | dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh)) | dict(changes))
        plan = memory.make_plan(config)
        return plan, {item.name: item.size for item in plan.items}

    return lambda sizes, mesh, changes=(): make(tuple(sizes.items()), mesh, tuple(dict(changes).items()))


@pytest.mark.parametrize("sizes, number, billions", [(EIGHT, NUM_8B, 8.03), (SEVENTY, NUM_70B, 70.6)], ids=["8B", "70B"])
def test_parameters(planned, sizes, number, billions):
    assert planned(sizes, (1, 1, 1))[0].num_parameters == number == pytest.approx(billions * 1e9, rel=1e-3)


def sizes_of(model_type, vocabulary, hidden, mlp, layers, heads, kv_heads, **more):
    sizes = {"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    return {"model_type": model_type, **sizes, "num_attention_heads": heads, "num_key_value_heads": kv_heads, **more}


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
PUBLISHED = {  # model -> the sizes of its config.json, and the number of parameters that its card on the hub gives
    "Qwen2.5-0.5B": (sizes_of("qwen2", 151936, 896, 4864, 24, 14, 2, tie_word_embeddings=True), 494_032_768),
    "Qwen3-0.6B": (sizes_of("qwen3", 151936, 1024, 3072, 28, 16, 8, tie_word_embeddings=True), 596_049_920),
    "Mistral-7B": (sizes_of("mistral", 32000, 4096, 14336, 32, 32, 8), 7_241_732_096),
    "Phi-3-mini": (sizes_of("phi3", 32064, 3072, 8192, 32, 32, 32, rope_parameters=LONG), 3_821_079_552),
    "Gemma-2-2B": (sizes_of("gemma2", 256000, 2304, 9216, 26, 8, 4), 2_614_341_888),
    "Gemma-3-1B": (sizes_of("gemma3_text", 262144, 1152, 6912, 26, 4, 1), 999_885_952),
    "OLMo-2-1B": (sizes_of("olmo2", 100352, 2048, 8192, 16, 16, 16), 1_484_916_736),
    "SmolLM3-3B": (sizes_of("smollm3", 128256, 2048, 11008, 36, 16, 4), 3_075_098_624),
    "StableLM-2-1.6B": (sizes_of("stablelm", 100352, 2048, 5632, 24, 32, 32, use_qkv_bias=True), 1_644_515_328),
    "Granite-3.3-2B": (sizes_of("granite", 49159, 2048, 8192, 40, 32, 8, tie_word_embeddings=True), 2_533_539_840),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers_of_parameters(name, tmp_path):
    sizes, number = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    shapes = jax.tree.leaves(memory.base_shapes(huggingface.read_config(tmp_path)))
    assert sum(math.prod(leaf.shape) for leaf in shapes) == number


@pytest.mark.parametrize("name", ["Gemma-3-1B", "Phi-3-mini"])
@pytest.mark.slow
def test_layers_that_differ_and_fused_projections_are_planned(planned, name):
    sizes, number = PUBLISHED[name]
    sizes = {key: value for key, value in sizes.items() if key != "rope_parameters"}
    plan, items = planned(sizes, (1, 1, 2), {"lora.targets": "all-linear", "model.remat": True})
    assert plan.num_parameters == number
    layers, hidden, kv_heads = (sizes[key] for key in ("num_hidden_layers", "hidden_size", "num_key_value_heads"))
    width = {"Gemma-3-1B": 256, "Phi-3-mini": hidden // 32}[name]
    parts = 2 if kv_heads % 2 == 0 else 1
    assert items["KV cache"] == 2 * layers * 16 * 2048 * kv_heads // parts * width * 2
    assert layers * 8 * 2048 * hidden * 2 < items["activations of a micro-batch"]  # the input of each layer, at least


@pytest.mark.parametrize(
    "sizes, mesh, base",
    [
        (EIGHT, (1, 1, 1), 2 * NUM_8B),
        (EIGHT, (8, 1, 1), 2 * NUM_8B),  # `data` does not split weights
        (EIGHT, (1, 8, 1), 2 * ((NUM_8B - NORMS_8B) // 8 + NORMS_8B)),
        (EIGHT, (2, 2, 2), 2 * ((NUM_8B - NORMS_8B) // 4 + NORMS_8B)),
        (EIGHT, (1, 1, 3), 2 * (NUM_8B - 2 * 128256 * 4096 * 2 // 3)),  # 3 divides only the vocabulary
        (SEVENTY, (1, 8, 1), 2 * ((NUM_70B - NORMS_70B) // 8 + NORMS_70B)),
        (SEVENTY, (1, 4, 4), 2 * ((NUM_70B - NORMS_70B) // 16 + NORMS_70B)),
    ],
    ids=str,
)
@pytest.mark.slow
def test_base_on_a_device(planned, sizes, mesh, base):
    assert planned(sizes, mesh)[1]["base parameters"] == base


def test_trained_parameters_are_replicated(planned):
    for mesh in ((1, 1, 1), (1, 4, 2)):
        plan, items = planned(EIGHT, mesh)
        assert plan.num_rows == 56000 - 1000
        assert items["adapter θ"] == 4 * ADAPTER_8B
        assert items["its optimizer"] == 2 * 4 * ADAPTER_8B + 4  # two moments and the count of Adam
        assert items["ω, its optimizer, visits"] == (5 + 2) * 4 * 55000 + 4 + 4  # the count of its Adam; the running baseline


def test_sharded_omega(planned):
    """The five arrays of the selector and both moments are sharded; θ and the scalars are replicated."""
    name, copy = "ω, its optimizer, visits", "copy of all these but the base, for a checkpoint"
    (_, replicated), (_, split) = (planned(EIGHT, (2, 2, 2), {"mesh.shard_selector": flag}) for flag in (False, True))
    assert split[name] == (5 + 2) * 4 * 55000 // 8 + 4 + 4
    assert replicated[copy] - split[copy] == replicated[name] - split[name] and replicated["adapter θ"] == split["adapter θ"]


@pytest.mark.parametrize("mesh, parts", [((1, 1, 1), 1), ((2, 2, 1), 4), ((1, 4, 2), 8), ((1, 1, 16), 1)], ids=str)
def test_cache(planned, mesh, parts):
    """16 devices cannot share 8 key heads, so each device has all of them."""
    assert planned(EIGHT, mesh)[1]["KV cache"] == CACHE_8B // parts


@pytest.mark.parametrize("mesh, rows, columns", [((1, 1, 1), 256, 128256), ((2, 2, 2), 64, 64128)], ids=str)
def test_logits(planned, mesh, rows, columns):
    """Logits and exponentials in float32, and exponentials in bfloat16, for 256 positions that the devices share."""
    assert planned(EIGHT, mesh)[1]["logits chunk: logits, exp, exp rounded"] == rows * columns * 10


def test_response_store(planned):
    changes = {"online.ratio": 0.1, "online.num_samples": 3, "online.max_new_tokens": 100, "online.refresh_every": 10}
    _, needed = planned(EIGHT, (1, 1, 1), changes)
    _, every = planned(EIGHT, (1, 1, 1), changes | {"online.generate": "all"})
    one = 100 * 4 + 4 * 8  # tokens; row, sample, two log-probabilities
    assert needed["response store"] == 10 * 32 * 3 * one + 55000  # rows in ten batches of 32
    assert every["response store"] == 5500 * 3 * one + 55000


def test_offline_selection_has_no_cache(planned):
    _, items = planned(EIGHT, (1, 1, 1), {"method": "offline"})
    assert "KV cache" not in items and "response store" not in items


@pytest.mark.slow
def test_activations_with_remat(planned):
    """The input of each of the 32 layers, and all activations of one layer, with [S, H, L, L] of attention in float32."""
    full, part = (planned(EIGHT, mesh, {"model.remat": True})[1]["activations of a micro-batch"] for mesh in ((1, 1, 1), (2, 2, 2)))
    inputs, attention = 32 * 8 * 2048 * 4096 * 2, 8 * 32 * 2048 * 2048 * 4
    assert inputs + attention < full < inputs + 4 * attention
    assert full / 8 < part < full / 4  # heads and feed-forward have eight parts, the inputs of layers four


def test_8b_fits_a_card_of_80_gb(planned):
    """With the micro-batch of the tier, and with 8 and `remat`, as in the paper; both with a refresh."""
    for changes in ({"batch.micro_size": presets.get("llama3-8b").batch.micro_size}, {"model.remat": True}):
        assert planned(EIGHT, (1, 1, 1), changes)[0].peak < (1 - memory.FREE) * 80e9


SMALL = model_config.ModelConfig("llama", 4096, 256, 1024, 4, 8, 4, 32, 32, 512, "silu", 1e-5, 1e4)
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.slow
def test_residuals_of_a_layer():
    """Per token: the input of the layer; q, k, v; the output of attention, its maximum and sum; the outputs of `o_proj`,
    `gate_proj` and `up_proj`; and x A of all seven. With `remat`, only the input."""
    sequences, length, rank = 2, 512, 8
    by_hand = 256 + (256 + 128 + 128) + 256 + 2 * 8 + 256 + 2 * 1024 + 7 * rank
    for remat, floats in ((False, by_hand), (True, 256)):
        two, three = (
            memory.residuals(dataclasses.replace(SMALL, num_layers=n, remat=remat), rank, ALL_LINEAR, sequences, length, length)
            for n in (2, 3)
        )
        assert three - two == 4 * sequences * length * floats


@pytest.mark.parametrize("remat, cost, rank", [(False, "loss", 8), (True, "loss", 8), (False, "influence", 256)])
@pytest.mark.slow
def test_plan_agrees_with_xla(remat, cost, rank):
    """For a compiled step: arguments to the byte, temporaries within the free share of the plan."""
    sequences, length, num_rows, targets = 2, 512, 10, ALL_LINEAR
    model = dataclasses.replace(SMALL, remat=remat)
    layout = packing.Layout(sequences, length, sequences, separate_levels=cost == "influence")
    one = jnp.zeros(8, jnp.int32)
    batch = packing.pack_step([packing.Segment(one, one, i, 0.5) for i in range(2)], num_rows, 2, layout)
    config = dataclasses.replace(configuration.Config(), selection=configuration.Selection(cost=cost, coefficient_at="current"))
    optimizer, selector = configuration.to_optimizer(config, 10), configuration.to_selector(config)
    adapter, base = memory.adapter_shapes(model, rank, targets), memory.base_shapes(model)
    arguments = optimizer, configuration.to_objective(config), selector, num_rows
    state = jax.eval_shape(lambda start: train_state.init(start, *arguments), adapter)
    update = step.make_step(model, configuration.to_objective(config), selector, optimizer)
    scales = train_state.Scales(jnp.float32(1), jnp.float32(1))
    compiled = jax.jit(update, donate_argnums=1).lower(base, state, batch, scales).compile().memory_analysis()
    held = memory.size_of(base) + memory.size_of(state)
    assert held <= compiled.argument_size_in_bytes <= held + 1.01 * sum(leaf.nbytes for leaf in jax.tree.leaves((batch, scales)))
    planned = memory.activations(model, rank, targets, sequences, length, layout.targets)
    planned += packing.chunk_size(layout.targets) * model.vocab_size * 12
    planned += memory.gradient_item(config, memory.size_of(adapter)).size
    assert (1 - memory.FREE) * compiled.temp_size_in_bytes < planned < 1.05 * compiled.temp_size_in_bytes


def test_slots_that_the_mesh_does_not_divide(planned):
    with pytest.raises(ValueError, match="online.slots=12 must be a multiple of mesh.data · mesh.fsdp, 8 devices"):
        planned(EIGHT, (1, 8, 1), {"online.slots": 12})
    planned(EIGHT, (1, 8, 1), {"online.slots": 12, "method": "offline"})  # samples nothing


def test_the_tracking_weights_are_sharded_as_the_others(planned):
    tracked = {"method": "offline", "selection.cost": "loss", "selection.value_function": "tracked", "lora.rank": 0}
    _, items = planned(EIGHT, (1, 8, 1), tracked)
    assert items["second adapter θ', its optimizer"] == items["all weights θ"] + items["its optimizer"]


def test_rows_that_the_number_of_devices_does_not_divide(planned):
    rows = {"data.num_lower": 1007, "eval.num_lower": 4, "mesh.shard_selector": True}  # 1003 = 8 · 125 + 3
    reason = "8 devices do not divide 1003 lower-level rows; hold out some more .eval.num_lower=7."
    with pytest.raises(ValueError, match=f"^mesh.shard_selector=True: {reason}"):
        planned(EIGHT, (2, 2, 2), rows)
    planned(EIGHT, (2, 2, 2), rows | {"eval.num_lower": 7})


def test_command(tmp_path):
    """With only a config.json and eight absent devices; the command writes no files."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | SEVENTY))
    changes = [f"--config.model.path={tmp_path}", "--config.mesh.fsdp=8", "--config.batch.micro_size=8"]
    changes.append("--config.model.remat=True")
    arguments = ["--config=configs/safety.py:llama3-8b", "--plan", f"--workdir={tmp_path / 'run'}", *changes]
    done = subprocess.run([sys.executable, "-m", "bilevel_jax.main", *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for shown in ("70.55e9 parameters in bfloat16", "data 1 × fsdp 8 × tensor 1 = 8 devices", "17.64", "fits devices of 48 GB"):
        assert shown in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


LINEAR_8B = NUM_8B - 2 * 128256 * 4096 - NORMS_8B
REST_8B = 2 * (NUM_8B - LINEAR_8B)


@pytest.mark.parametrize(
    "kind, bytes_of_layers",
    [
        ("nf4", LINEAR_8B / 2 + LINEAR_8B / 64 + LINEAR_8B / 64 / 256 * 4 + 7 * 32 * 4),
        ("int8", LINEAR_8B + 32 * 4 * (2 * 4096 + 2 * 1024 + 2 * 14336 + 4096)),
    ],
)
def test_quantised_base(planned, kind, bytes_of_layers):
    """Four bits a weight, a byte for 64 and a float for 64 · 256 of them, a mean a matrix; or a byte, and a float an output."""
    plan, items = planned(EIGHT, (1, 1, 1), {"model.quantization": kind})
    assert items["base parameters"] == REST_8B + bytes_of_layers and plan.num_parameters == NUM_8B


def test_a_refresh_copies_the_base_in_float32_alone(planned):
    name = "base for decoding, a copy"
    items = {dtype: planned(EIGHT, (1, 1, 1), {"model.dtype": dtype})[1] for dtype in ("bfloat16", "float32")}
    assert name not in items["bfloat16"] and items["float32"][name] == 4 * NUM_8B


def test_llama_8b_fits(planned):
    """The published model on one device: online with 16 slots in bfloat16, and trained in NF4."""
    plan, _ = planned(EIGHT, (1, 1, 1), {"method": "online", "batch.micro_size": 2})
    assert plan.total(memory.SAMPLING) < 32e9
    small = {"method": "offline", "batch.micro_size": 1, "model.remat": True, "model.quantization": "nf4"}
    assert planned(EIGHT, (1, 1, 1), small)[0].peak < 12e9


def test_an_assumed_number_of_rows_is_printed():
    config = presets.get("")
    assert "lower-level rows: 100000 (assumed: data.num_lower=0" in memory.table(config, memory.make_plan(config))


def test_a_share_of_the_rows_is_held_out(planned):
    assert planned(EIGHT, (2, 2, 2), {"data.num_lower": 1000, "eval.num_lower": 0.1})[0].num_rows == 900


def test_auto_plans_an_accelerator(planned):
    assert planned(EIGHT, (2, 2, 2), {"model.dtype": "auto"})[0].model.dtype == "bfloat16"

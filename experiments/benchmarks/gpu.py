"""All measurements on one GPU in one process: `experiments/benchmarks/gpu.sh [--toy]`, at most 8 minutes on one H100 or H200.

Models have the published shapes and random weights, made on the device. Rows have the lengths of the paper's data: prompts of 75
tokens and responses of 100 on average. Each section is skipped where the time that is left would not do, and results are written
after each: gpu.json, and gpu.md from it.

    step       ours by method, and with fused attention; the share of the peak by useful FLOPs, see `train_step`
    pytorch    the published step, and the best packed one: one pass over packed sequences, logits of responses only, compiled,
               with flex attention or, where that fails, SDPA
    decoding   ours against `generate`, greedy, without a stop; the share of the bandwidth by base and cache read once a token
"""

import dataclasses
import functools
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from bilevel_jax import cli, files, objective, sampling, selector, sharding, step, train_state
from bilevel_jax.data import packing
from bilevel_jax.models import decoder, fused_attention, huggingface, lora
from bilevel_jax.models.kv_cache import init_cache
from bilevel_jax.planning import memory, targets
from experiments.benchmarks import random_model, timing, train_step

LIMIT = 450  # seconds after which no section starts
RATIO, NEW = 0.1, 128  # R of `online`, and the tokens of a response
TOY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 256}

FLAGS = flags.FlagValues()
OUT = flags.DEFINE_string("out", "experiments/results", "Directory for gpu.json and gpu.md.", flag_values=FLAGS)
IS_TOY = flags.DEFINE_bool("toy", False, "Tiny shapes, to rehearse the script on a CPU.", flag_values=FLAGS)


class Shape(NamedTuple):
    """What is measured."""

    raw: dict  # config.json
    rows: int  # of each level in a step
    length: int
    micro: int  # sequences of a micro-batch
    rounds: int
    slots: int
    new: int  # tokens decoded


def shape(name: str) -> Shape:
    """The shape of a model; a tiny one of its architecture in a rehearsal."""
    raw = random_model.SHAPES[name]
    if IS_TOY.value:
        heads = {"num_attention_heads": 4} | ({"num_key_value_heads": 2} if "num_key_value_heads" in raw else {})
        return Shape(raw | TOY | heads, 4, 128, 2, 2, 4, 8)
    return Shape(raw, 32, 2048, 4 if name == "pythia-1b" else 2, 5, 64, NEW)


def random_base(of: Shape, quantization: str = "none"):
    """Config and random weights on the device."""
    with tempfile.TemporaryDirectory() as directory:
        (pathlib.Path(directory) / "config.json").write_text(json.dumps(of.raw | {"dtype": "bfloat16"}))
        model = huggingface.read_config(directory, "bfloat16", activations="bfloat16", quantization=quantization)
    model = dataclasses.replace(model, adapter_scale=1.0)
    return model, jax.jit(decoder.init_params, static_argnums=0)(model, jax.random.key(0))


def rows(of: Shape, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Prompts and responses of one step, of both levels."""
    rng = np.random.default_rng(seed)
    most = of.length // 2
    sizes = np.clip(rng.lognormal(np.log([55, 70]), 0.8, (2 * of.rows, 2)).astype(int), 2, most)
    return [tuple(rng.integers(1, of.raw["vocab_size"], size).astype(np.int32) for size in pair) for pair in sizes]


def batch(of: Shape, seed: int, separate: bool) -> packing.Batch:
    """The packed batch of one step."""
    segments = [packing.Segment(*pair, i if i < of.rows else -1, 1 / of.rows) for i, pair in enumerate(rows(of, seed))]
    return packing.pack_step(segments, of.rows, of.rows, packing.update_layout(of.micro, of.length, 2 * of.rows, separate))


# --------------------------------------------------------------------------------------------------------------------
# Ours
# --------------------------------------------------------------------------------------------------------------------

METHODS = {  # name -> cost and rule of the selector, attention
    "mixing": ("loss", "uniform", "xla"),
    "offline, current": ("loss", "bds", "xla"),
    "offline, influence": ("influence", "bds", "xla"),
    "offline, influence, fused": ("influence", "bds", "triton"),
}
MIXING, CURRENT, INFLUENCE, FUSED = METHODS


def measure_steps(name: str, quantization: str, methods) -> dict:
    """Seconds of a step by method, tokens a second, the share of the peak."""
    of = shape(name)
    model, base = random_base(of, quantization)
    mesh, optimizer = sharding.make_mesh(1), optax.adam(5e-6)
    runs, losses, began = {}, {}, time.perf_counter()
    for method in methods:
        cost, rule, attention = METHODS[method]
        select, aim = selector.Selector(rule=rule), objective.Objective(cost=cost, coefficient_at="current")
        influence = train_state.measures_influence(aim, select)
        steps = [sharding.put_batch(batch(of, k, influence), mesh) for k in range(of.rounds)]
        adapter = lora.init_adapter(model, jax.random.key(0), 16, lora.resolve_targets(model, "all-linear"))
        start = train_state.init(adapter, optimizer, aim, select, of.rows)
        shardings = sharding.state_shardings(mesh, start, False)
        state = [jax.tree.map(sharding.device_put, start, shardings)]
        results = shardings, sharding.replicated(mesh)  # as the state that goes in, so that one compilation serves all steps
        update = step.make_step(dataclasses.replace(model, attention=attention), aim, select, optimizer)
        jitted = jax.jit(update, donate_argnums=1, out_shardings=results)

        def run(k, jitted=jitted, state=state, steps=steps, method=method):
            state[0], metrics = jitted(base, state[0], steps[k], train_state.Scales(jnp.float32(1), jnp.float32(0.1)))
            losses[method] = metrics["loss"]
            return metrics["loss"]

        runs[method] = run
    seconds = timing.in_turn(runs, of.rounds)
    tokens, responses = (sum(sum(len(pair[i]) for i in used) for pair in rows(of, 0)) for used in ((0, 1), (1,)))
    result = {"tokens": tokens, "responses": responses, "compile_and_run_s": time.perf_counter() - began}
    if quantization == "none":
        peak, flops = (
            train_step.peak_flops(model.dtype, 256 if IS_TOY.value else 8192),
            train_step.useful_flops(base, tokens, responses),
        )
        result |= {"peak_flops": peak}
    for method, times in seconds.items():
        middle = statistics.median(times)
        result[method] = {"s": middle, "tokens_per_s": tokens / middle, "loss": float(losses[method])}
        if quantization == "none":
            result[method]["of_peak"] = flops / middle / peak
    return result


def measure_decoding(name: str, quantization: str = "none") -> dict:
    """Tokens a second with all slots busy, and the share of the bandwidth."""
    of = shape(name)
    model, base = random_base(of, quantization)
    prompts = [pair[0][:64] for pair in rows(of, 0)][: of.slots]
    settings = sampling.Settings(temperature=0, max_new_tokens=of.new)
    mesh = sharding.make_mesh(1)
    sample = sampling.make_sampler(model, settings, (), slots=of.slots, length=64 + of.new, mesh=mesh)
    keys = sampling.row_keys(0, map(str, range(len(prompts))), 0, 1)

    def generate(_):
        return [response.ids for (response,) in sample(base, None, prompts, keys)]

    seconds = statistics.median(timing.in_turn({"ours": generate}, 2)["ours"])
    tokens = len(prompts) * of.new
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(base))
    cache = memory.size_of(jax.eval_shape(lambda: init_cache(model, of.slots, 64 + of.new)))
    result = {"slots": of.slots, "s": seconds, "tokens_per_s": tokens / seconds}
    kind = jax.devices()[0].device_kind.lower()
    chip = next((chip for key, chip in targets.GPUS.items() if key in kind), None)
    if chip:
        result["of_bandwidth"] = (weights + cache) * of.new / seconds / chip.bandwidth
    return result


# --------------------------------------------------------------------------------------------------------------------
# PyTorch
# --------------------------------------------------------------------------------------------------------------------


def _torch_model(of: Shape, attention: str):
    torch, peft, transformers = train_step.load_torch()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    raw = {key: value for key, value in of.raw.items() if key not in ("model_type", "architectures")}
    config = transformers.AutoConfig.for_model(of.raw["model_type"], **raw)
    dtype = torch.float32 if IS_TOY.value else torch.bfloat16
    with torch.device(device):
        base = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    settings = peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return torch, device, base, peft.get_peft_model(base, settings).train()


def _published(of: Shape) -> tuple:
    """The model and its losses of a step: micro-batches of 8 rows of one level, padded to the longest, all logits, activations
    recomputed."""
    torch, device, _, model = _torch_model(of, "sdpa")
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})

    def losses(k: int) -> Iterator:
        pairs = rows(of, k)
        for first in range(0, len(pairs), train_step.ROWS):
            part = pairs[first : first + train_step.ROWS]
            ids, mask, learned = np.zeros((3, len(part), max(sum(map(len, pair)) for pair in part)), np.int64)
            for row, (prompt, response) in enumerate(part):
                size = len(prompt) + len(response)
                ids[row, :size], mask[row, :size] = np.concatenate([prompt, response]), 1
                learned[row, len(prompt) : size] = 1
            ids, mask, learned = (torch.from_numpy(array).to(device) for array in (ids, mask, learned))
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
            nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            yield ((nll.view(len(part), -1) * learned[:, 1:]).sum(1) / learned.sum(1)).sum() / of.rows

    return model, losses


def _packed(of: Shape, attention: str) -> tuple:
    """The model and its losses of a step: packed sequences of both levels; positions that restart mark the rows."""
    torch, device, base, model = _torch_model(of, attention)
    body = base.get_decoder()
    forward = body if IS_TOY.value else torch.compile(body, dynamic=False)

    def losses(k: int) -> Iterator:
        packed = batch(of, k, False).packed
        for m in range(int(packed.num_micro)):
            number = int(packed.num_targets[m])
            arrays = packed.tokens[m], packed.positions[m], packed.logit_index[m, :number], packed.target[m, :number]
            entry = packed.entry[m, :number]
            ids, positions, index, target = (torch.from_numpy(np.asarray(array, np.int64)).to(device) for array in arrays)
            hidden = forward(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state.flatten(0, 1)
            logits = base.get_output_embeddings()(hidden[index]).float()
            weight = torch.from_numpy(np.float32(1 / (np.maximum(packed.length, 1)[entry] * of.rows))).to(device)
            yield (torch.nn.functional.cross_entropy(logits, target, reduction="none") * weight).sum()

    return model, losses


def measure_pytorch(name: str) -> dict:
    """Seconds of the published and the best packed step."""
    of = shape(name)
    result = {"published": {"s": _median(of, *_published(of))}}
    failed = {}
    for attention in ("sdpa",) if IS_TOY.value else ("flex_attention", "sdpa"):
        try:
            return result | {"packed": {"s": _median(of, *_packed(of, attention)), "attention": attention}} | failed
        except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:  # what a version of PyTorch does not have
            failed[f"{attention} failed"] = f"{type(error).__name__}: {str(error)[:200]}"
    return result | failed


def _median(of: Shape, model, losses: Callable[[int], Iterator]) -> float:
    """Seconds of an optimizer step on the sum of the losses, with a backward pass for each."""
    torch, _, _ = train_step.load_torch()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-6)

    def run(k: int) -> float:
        total = 0.0
        for loss in losses(k):
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        return total

    return statistics.median(timing.in_turn({"run": run}, min(of.rounds, 3))["run"])


def measure_generate(name: str) -> dict:
    """Tokens a second of `generate`, for the same prompts."""
    of = shape(name)
    torch, device, base, _ = _torch_model(of, "sdpa")
    prompts = [pair[0][:64] for pair in rows(of, 0)][: of.slots]
    ids, mask = np.zeros((2, len(prompts), 64), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, 64 - len(prompt) :], mask[row, 64 - len(prompt) :] = prompt, 1
    ids, mask = (torch.from_numpy(array).to(device) for array in (ids, mask))
    base.eval()
    base.generation_config.eos_token_id = None
    options = {"max_new_tokens": of.new, "min_new_tokens": of.new, "do_sample": False, "pad_token_id": 0}

    def run(_):
        with torch.inference_mode():
            return base.generate(input_ids=ids, attention_mask=mask, **options).cpu().sum().item()

    seconds = statistics.median(timing.in_turn({"generate": run}, 2)["generate"])
    return {"s": seconds, "tokens_per_s": len(prompts) * of.new / seconds}


# --------------------------------------------------------------------------------------------------------------------
# The run
# --------------------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, tuple[int, Callable[[], dict]]] = {  # name -> seconds that it may take, function; the most useful first
    "step pythia-1b": (120, functools.partial(measure_steps, "pythia-1b", "none", tuple(METHODS))),
    "pytorch pythia-1b": (90, functools.partial(measure_pytorch, "pythia-1b")),
    "decoding pythia-1b": (45, functools.partial(measure_decoding, "pythia-1b")),
    "generate pythia-1b": (30, functools.partial(measure_generate, "pythia-1b")),
    "step llama3-8b nf4": (75, functools.partial(measure_steps, "llama3-8b", "nf4", (INFLUENCE,))),
    "step llama3-8b": (75, functools.partial(measure_steps, "llama3-8b", "none", (MIXING, INFLUENCE, FUSED))),
    "decoding llama3-8b": (45, functools.partial(measure_decoding, "llama3-8b")),
}


def page(results: dict) -> str:
    """The page in Markdown."""
    sections = results["sections"]
    lines = [
        "# One GPU",
        "",
        "`experiments/benchmarks/gpu.sh" + (" --toy`" if results["toy"] else "`"),
        "",
        results["hardware"],
        "",
    ]
    if results["toy"]:
        lines += ["A rehearsal with tiny shapes: the numbers say nothing.", ""]
    lines += ["| section | variant | seconds | tokens/s | share of the peak or bandwidth |", "| --- | --- | --- | --- | --- |"]
    for name, result in sections.items():
        parts = {key: value for key, value in result.items() if isinstance(value, dict)} or {"": result}
        for variant, one in parts.items():
            share = one.get("of_peak", one.get("of_bandwidth"))
            numbers = [f"{one[key]:.4g}" if key in one else "" for key in ("s", "tokens_per_s")]
            lines.append(f"| {name} | {variant} | {' | '.join(numbers)} | {'' if share is None else f'{share:.0%}'} |")
    lines += ["", *(f"- {line}" for line in comparisons(sections))]
    lines += [f"- {name}: {result['skipped']}" for name, result in sections.items() if "skipped" in result]
    return "\n".join(lines) + "\n"


def comparisons(sections: dict) -> list[str]:
    """The ratios of the targets, as far as their sections were measured."""
    ours, torch = sections.get("step pythia-1b", {}), sections.get("pytorch pythia-1b", {})
    decoding, generate = sections.get("decoding pythia-1b", {}), sections.get("generate pythia-1b", {})
    influence, mixing, current = (ours.get(name, {}).get("s") for name in (INFLUENCE, MIXING, CURRENT))
    lines = []
    for variant in ("published", "packed"):
        if current and variant in torch:
            lines.append(f"{variant} PyTorch over ours (offline, current): {torch[variant]['s'] / current:.2f}")
    if influence and mixing:
        lines.append(
            f"selection over mixing: {current / mixing:.2f} (costs of losses at θ^k), {influence / mixing:.2f} (influence)"
        )
    if influence and FUSED in ours:
        losses = " and ".join(f"{ours[name]['loss']:.4f}" for name in (FUSED, INFLUENCE))
        lines.append(
            f"fused attention over XLA's: {ours[FUSED]['s'] / influence:.2f} of the time, losses of the last step {losses}"
        )
    if "tokens_per_s" in decoding and influence and mixing:
        batch_rows, new = (4, 8) if IS_TOY.value else (32, NEW)
        refresh = RATIO * batch_rows * new / decoding["tokens_per_s"]
        how = f"with R = {RATIO:.0%} of {batch_rows} rows a step answered in {new} tokens each at the measured rate of decoding"
        lines.append(f"online over mixing: {(influence + refresh) / mixing:.2f}, {how}")
    if "tokens_per_s" in decoding and "tokens_per_s" in generate:
        lines.append(f"decoding over `generate`: {decoding['tokens_per_s'] / generate['tokens_per_s']:.2f}")
    return lines


def main() -> None:
    if IS_TOY.value:  # a CPU cannot run the kernel itself
        fused_attention.attend = functools.partial(fused_attention.attend, interpret=True)
    began, out = time.perf_counter(), pathlib.Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    results = {"toy": IS_TOY.value, "hardware": timing.hardware(), "sections": {}}
    for name, (needed, function) in SECTIONS.items():
        left = LIMIT - (time.perf_counter() - began)
        if left < needed and not IS_TOY.value:
            results["sections"][name] = {"skipped": f"{left:.0f} s were left, {needed} are needed"}
        else:
            print(f"{name}, {time.perf_counter() - began:.0f} s so far", flush=True)
            try:
                results["sections"][name] = function()
            except Exception as error:  # one section that fails must not cost the others: time on the machine is short
                results["sections"][name] = {"skipped": f"{type(error).__name__}: {str(error)[:500]}"}
            jax.clear_caches()
        files.write_atomically(out / "gpu.json", files.to_json(results, indent=1) + "\n")
        files.write_atomically(out / "gpu.md", page(results))
    print(page(results))


if __name__ == "__main__":
    cli.run(main, FLAGS)

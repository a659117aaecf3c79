"""Decoding against `generate` of transformers (PyTorch): float32, KV cache, SDPA attention, every core, greedy, equal batch.

Both sides generate responses to the same real prompts, in turn. `decode alone` is the time of a long generation minus that of a
single token, per step, which removes prompts, padding and start-up. `natural stop` is a queue of prompts, each with a response up
to the EOS: `generate` processes them batch by batch, in order; ours refills slots. Only tokens up to the EOS count. With an
adapter, `generate` applies it beside the weights, as PEFT does between training steps, and ours as `sampling` does.
"""

import functools
import statistics
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax import sampling, sharding
from bilevel_jax.models import decoder, huggingface, kv_cache, lora
from experiments.benchmarks import timing, train_step

BATCHES = 8, 32
NEW = 64  # tokens of the long generation beyond the first
QUEUE, QUEUE_NEW = 96, 128  # number of prompts, maximum number of tokens of each
ADAPTER_STEPS = 32


def _load_torch(directory: str):
    torch, peft, transformers = train_step.load_torch()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa")
    return torch, peft, model.eval()


def _generate(torch, model, prompts, new: int, eos: tuple[int, ...]) -> list[np.ndarray]:
    """Greedy responses of `generate`, each up to and including its EOS."""
    longest = max(map(len, prompts))
    ids, mask = np.zeros((2, len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):  # padded on the left, as decoder-only models need it
        ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
    model.generation_config.eos_token_id = list(eos) or None
    with torch.inference_mode():
        sequences = model.generate(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            max_new_tokens=new,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )
    answers = []
    for row in sequences[:, longest:].numpy():
        ends = np.flatnonzero(np.isin(row, eos))
        answers.append(row[: ends[0] + 1] if len(ends) else row)
    return answers


def _ours(model, base, adapter, prompts, new: int, eos: tuple[int, ...], slots: int):
    """`f(round)`: the same with `sampling`."""
    length = max(map(len, prompts)) + new
    settings = sampling.Settings(temperature=0, max_new_tokens=new)
    sample = sampling.make_sampler(model, settings, eos, slots=slots, length=length, mesh=sharding.make_mesh(1))
    keys = sampling.row_keys(0, map(str, range(len(prompts))), 0, 1)
    return lambda k: [response.ids for (response,) in sample(base, adapter, prompts, keys)]


def _recorded(run, results: dict, name):
    """The same `f(round)`; it stores its last result in `results`."""

    def recorded(k):
        results[name] = run(k)
        return results[name]

    return recorded


def _equal(responses, others) -> float:
    """The share of equal tokens, relative to the longer response of each pair."""
    same = sum(int((a[: len(b)] == b[: len(a)]).sum()) for a, b in zip(responses, others, strict=True))
    return same / sum(max(len(a), len(b)) for a, b in zip(responses, others, strict=True))


def _cells(low_middle_high) -> str:
    return " | ".join(f"{value:.2f}" for value in low_middle_high)


def _fixed_length(torch, reference, model, base, adapter, prompts, rounds: int) -> list[str]:
    lines = [
        "| batch | measured | ours | generate | generate over ours: min | median | max | equal tokens |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for batch in BATCHES:
        part, results, runs = prompts[:batch], {}, {}
        for new in (NEW + 1, 1):
            runs["ours", new] = _recorded(_ours(model, base, adapter, part, new, (), batch), results, ("ours", new))
            torch_run = functools.partial(_generate, torch, reference, part, new, ())
            runs["torch", new] = _recorded(lambda k, torch_run=torch_run: torch_run(), results, ("torch", new))
        seconds = timing.in_turn(runs, rounds)
        equal = _equal(results["ours", NEW + 1], results["torch", NEW + 1])
        whole = {side: seconds[side, NEW + 1] for side in ("ours", "torch")}
        alone = {
            side: [(long - short) / NEW for long, short in zip(seconds[side, NEW + 1], seconds[side, 1], strict=True)]
            for side in ("ours", "torch")
        }
        rate = {side: batch * (NEW + 1) / statistics.median(whole[side]) for side in whole}
        step = {side: 1000 * statistics.median(alone[side]) for side in alone}
        ratio = [_cells(timing.ratios(side, "ours")["torch"]) for side in (whole, alone)]
        lines.append(
            f"| {batch} | whole call | {rate['ours']:.0f} tokens/s | {rate['torch']:.0f} tokens/s | {ratio[0]} | {equal:.4f} |"
        )
        lines.append(f"| {batch} | decode alone | {step['ours']:.1f} ms/step | {step['torch']:.1f} ms/step | {ratio[1]} | |")
    return lines


def _natural_stop(torch, reference, model, base, prompts, eos) -> list[str]:
    """Timed once: it takes minutes, which averages out other load on the machine."""
    lines = [
        f"{QUEUE} prompts, each to its natural stop, at most {QUEUE_NEW} tokens:",
        "",
        "| batch or slots | tokens | ours, tokens/s | generate, tokens/s | generate over ours | equal tokens |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    part = prompts[:QUEUE]
    for batch in BATCHES:
        batches = [part[first : first + batch] for first in range(0, len(part), batch)]

        def torch_run(k, batches=batches):
            return [answer for some in batches for answer in _generate(torch, reference, some, QUEUE_NEW, eos)]

        results = {}
        ours = _ours(model, base, None, part, QUEUE_NEW, eos, batch)
        ours(0)  # compiles
        runs = {"ours": _recorded(ours, results, "ours"), "torch": _recorded(torch_run, results, "torch")}
        seconds = timing.in_turn(runs, 1, warmup=0)
        rate = {side: sum(map(len, results[side])) / seconds[side][0] for side in runs}
        tokens, equal = sum(map(len, results["ours"])), _equal(results["ours"], results["torch"])
        times = rate["ours"] / rate["torch"]
        lines.append(f"| {batch} | {tokens} | {rate['ours']:.0f} | {rate['torch']:.0f} | {times:.2f} | {equal:.4f} |")
    return lines


def _random_adapter(config, model):
    """An adapter of every projection in `config`, with random weights."""
    targets = lora.resolve_targets(model, config.lora.targets)
    leaves, tree = jax.tree.flatten(lora.init_adapter(model, jax.random.key(0), config.lora.rank, targets))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([leaf + 0.01 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)])


def _merged_or_applied(model, base, adapter, rounds: int) -> list[str]:
    """The adapter merged into the weights against applied beside them."""
    merge = jax.jit(functools.partial(lora.merge_adapter, model))
    split = jax.jit(lambda base, adapter: tuple(tree and kv_cache.split_layers(tree) for tree in (base, adapter)))
    weights = {"merged": split(merge(base, adapter), None), "applied": split(base, adapter)}

    @jax.jit
    def decode(weights, cache, token_S):
        def step(i, carry):
            cache, token_S = carry
            position_S = jnp.full_like(token_S, NEW) + i
            hidden, cache = kv_cache.decode(model, *weights, cache, token_S, position_S)
            return cache, jnp.argmax(hidden @ decoder.head(weights[0]).T, axis=-1).astype(jnp.int32)

        return jax.lax.fori_loop(0, ADAPTER_STEPS, step, (cache, token_S))[1]

    lines = [
        "| batch | merged, ms/step | applied, ms/step | applied over merged: min | median | max |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for batch in BATCHES:
        start = kv_cache.init_cache(model, batch, NEW + ADAPTER_STEPS), jnp.arange(batch, dtype=jnp.int32)
        runs = {name: lambda k, used=used, start=start: decode(used, *start) for name, used in weights.items()}
        seconds = timing.in_turn(runs, rounds)
        step = {name: 1000 * statistics.median(times) / ADAPTER_STEPS for name, times in seconds.items()}
        cells = _cells(timing.ratios(seconds, "merged")["applied"])
        lines.append(f"| {batch} | {step['merged']:.1f} | {step['applied']:.1f} | {cells} |")
    once = timing.in_turn({"merge": lambda k: split(merge(base, adapter), None)}, rounds)["merge"]
    return [*lines, "", f"Merging takes {statistics.median(once):.2f} s, once for each set of prompts."]


def measure(config, model, base, directory: str, prompts, eos: tuple[int, ...], rounds: int) -> list[str]:
    """Markdown lines: throughput of both, ratios and share of equal tokens; the adapter merged against applied.

    Raises:
      ValueError: PyTorch is missing, or there are too few prompts.
    """
    torch, peft, reference = _load_torch(directory)
    if len(prompts) < QUEUE:
        raise ValueError(f"suite 'decode' needs {QUEUE} prompts; {len(prompts)} found")
    mean = statistics.mean(len(prompt) for prompt in prompts[:QUEUE])
    adapter = _random_adapter(config, model)
    lines = [
        f"torch {torch.__version__}, {torch.get_num_threads()} threads. Prompts of {mean:.0f} tokens on average.",
        "",
        f"{NEW + 1} tokens for every prompt, no stop:",
        "",
        *_fixed_length(torch, reference, model, base, None, prompts, rounds),
        "",
        *_natural_stop(torch, reference, model, base, prompts, eos),
    ]
    with tempfile.TemporaryDirectory() as folder:
        huggingface.save_adapter(folder, model, adapter, alpha=config.lora.alpha, base=directory)
        reference = peft.PeftModel.from_pretrained(reference, folder).eval()
    return [
        *lines,
        "",
        f"{NEW + 1} tokens for every prompt, no stop, with an adapter of rank {config.lora.rank} on {config.lora.targets}:",
        "",
        *_fixed_length(torch, reference, model, base, adapter, prompts, rounds),
        "",
        "Ours alone, the adapter merged into the weights or applied beside them:",
        "",
        *_merged_or_applied(model, base, adapter, rounds),
    ]

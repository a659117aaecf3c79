"""Peak memory of the training step, ours and PyTorch, each in its own process: the same rows, adapter and selector.

On a GPU this is the peak of the framework's allocator. On a CPU it is the largest resident set from the first step on: in total
(`all`), and in excess of the resident set before that step, because interpreters and libraries differ. Both need Linux.
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import pathlib
import re

import jax
import ml_collections

from bilevel_jax.data import levels, templates
from bilevel_jax.models import huggingface
from experiments.benchmarks import train_step

OURS = {"ours": False, "ours, recomputing": True}  # name -> model.remat
STEPS = 2  # the second step includes the state of the first, such as the moments of Adam


def measure(config) -> list[str]:
    """Markdown lines: peak of every variant and the part that the steps added, in GiB."""
    train_step.load_torch()
    context = multiprocessing.get_context("spawn")
    lines = [
        f"{STEPS} steps of {config.batch.size} + {config.batch.size} rows of up to {config.data.max_length} tokens.",
        "",
        "| step | GiB, all | added by the steps | loss |",
        "| --- " * 4 + "|",
    ]
    for name in (*OURS, *train_step.PYTORCH):
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            before, peak, loss = pool.submit(_peak, name, config.to_json()).result()
        lines.append(f"| {name} | {peak / 2**30:.2f} | {(peak - before) / 2**30:.2f} | {loss:.4f} |")
    return lines


def _peak(name: str, config: str) -> tuple[int, int, float]:
    """Bytes before the first step, peak bytes from then on, and the last loss."""
    config = ml_collections.ConfigDict(json.loads(config))
    directory = str(huggingface.locate(config.model.path))
    tokenizer = templates.load_tokenizer(directory)
    upper, lower = (levels.load_level(config, level, tokenizer) for level in ("upper", "lower"))
    work = train_step.Work(config, directory, upper, lower, STEPS)
    model = huggingface.read_config(directory, config.model.dtype)
    model = dataclasses.replace(model, adapter_scale=config.lora.alpha / config.lora.rank, remat=OURS.get(name, False))
    if name in OURS:
        _, base = huggingface.load_model(directory, config.model.dtype)
        run = train_step.ours(work, model, base, "current")
    else:
        run = train_step.pytorch(work, model, *train_step.PYTORCH[name])
    before = _allocated(name, peak=False)
    _reset_peak()
    for k in range(STEPS):
        loss = run(k)
    return before, _allocated(name, peak=True), loss


def _allocated(name: str, peak: bool) -> int:
    """Bytes allocated now, or the peak so far."""
    if name in OURS:
        stats = jax.local_devices()[0].memory_stats()
        if stats:
            return stats["peak_bytes_in_use" if peak else "bytes_in_use"]
    else:
        torch, _, _ = train_step.load_torch()
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB" if peak else r"VmRSS:\s+(\d+) kB", status)[1])


def _reset_peak() -> None:
    """Resets the peak of the resident set, which includes loading. See proc_pid_clear_refs(5)."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")

"""The training step against PyTorch (transformers + PEFT): the same rows, adapter, optimizers and selector, in turn.

    published    as in the paper's code: a forward pass per level, micro-batches of 8 rows padded to the longest, logits at every
                 position, all activations recomputed
    published, no checkpointing
    best         one forward pass for both levels, rows grouped by length, logits of responses only, no recomputation
    ours         packed, levels together; `next` includes the second forward pass on the lower level of (10c), the others do not

ω is updated as in the paper, by Adam at 1e-4, with coefficients at θ^k except for `ours, next`. All start from the same adapter and
use the same rows, and their losses are compared step by step. Useful FLOPs are 4 per weight and token with LoRA (forward, and
gradients of activations), without padding, and the head for response tokens only. The peak is that of a large matrix product,
measured in the same process.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from bilevel_jax import batches, objective, online, selector, sharding, step, train_state
from bilevel_jax.data import levels, packing, shuffle
from bilevel_jax.models import huggingface, lora
from experiments.benchmarks import timing

ROWS = 8  # of a padded micro-batch, as in the paper
RHO = 0.1  # of the first epoch
OURS = {"ours": "current", "ours, next": "next"}  # name -> coefficient_at
PYTORCH = {"published": (True, False), "published, no checkpointing": (False, False), "best": (False, True)}  # recompute, grouped


def load_torch():
    """torch, peft and transformers.

    Raises:
      ValueError: a package is not installed.
    """
    try:
        import peft
        import torch
        import transformers
    except ImportError as error:
        raise ValueError("this suite needs PyTorch: run it with .venv-parity/bin/python, from make parity") from error
    torch.set_num_threads(os.cpu_count() or 1)
    return torch, peft, transformers


def micro_batches(upper, lower, rows: np.ndarray, grouped: bool) -> list[list[tuple]]:
    """Micro-batches of PyTorch: `ROWS` pairs (example, row index) each; the index is -1 for the upper level.

    Args:
      upper, lower: examples of each level.
      rows: row indices of the lower ones.
      grouped: orders all rows by length; otherwise level by level.
    """
    runs = [[(example, -1) for example in upper], [(example, int(i)) for example, i in zip(lower, rows)]]
    if grouped:
        runs = [sorted(runs[0] + runs[1], key=lambda item: item[0].size)]
    return [run[first : first + ROWS] for run in runs for first in range(0, len(run), ROWS)]


class TorchTrainer:
    """A PyTorch model in training."""

    def __init__(self, directory: str, adapter: str, config, num_lower: int, recompute: bool, grouped: bool):
        self.torch, peft, transformers = load_torch()
        torch = self.torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, config.model.dtype)
        base = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa")
        self.model = peft.PeftModel.from_pretrained(base.to(self.device), adapter, is_trainable=True).train()
        if recompute:
            self.model.enable_input_require_grads()
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.grouped = grouped
        self.omega = torch.zeros(num_lower, device=self.device, requires_grad=True)
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.theta_step = torch.optim.Adam(trainable, lr=config.optimizer.learning_rate)
        self.omega_step = torch.optim.Adam([self.omega], lr=1e-4)

    def row_losses(self, examples):
        """ℓ [B] of padded rows."""
        torch = self.torch
        sizes = [example.size for example in examples]
        ids, mask, is_target = np.zeros((3, len(examples), max(sizes)), np.int64)
        for row, (example, size) in enumerate(zip(examples, sizes)):
            ids[row, :size] = np.concatenate([example.prompt, example.response])
            mask[row, :size] = 1
            is_target[row, len(example.prompt) : size] = 1
        ids, mask, is_target = (torch.from_numpy(array).to(self.device) for array in (ids, mask, is_target))
        target, is_target = ids[:, 1:], is_target[:, 1:].bool()
        if self.grouped:
            inner = self.model.get_base_model()
            hidden = inner.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
            logits = inner.get_output_embeddings()(hidden[is_target]).float()
            nll = torch.nn.functional.cross_entropy(logits, target[is_target], reduction="none")
            sums = torch.zeros(len(examples), device=self.device).index_add(0, is_target.nonzero()[:, 0], nll)
        else:
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
            nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
            sums = (nll.view_as(target) * is_target).sum(1)
        return sums / is_target.sum(1)

    def step(self, upper, lower, rows: np.ndarray) -> float:
        """One update of θ and ω; returns the loss before it.

        Args:
          upper, lower: examples of each level.
          rows: row indices of the lower ones.
        """
        torch, gamma, total = self.torch, RHO / (1 - RHO), 0.0
        for part in micro_batches(upper, lower, rows, self.grouped):
            row_index = torch.tensor([i for _, i in part], device=self.device)
            weight = len(self.omega) * torch.softmax(self.omega, 0)[row_index.clamp(min=0)] * gamma / len(lower)
            loss = (self.row_losses([example for example, _ in part]) * torch.where(row_index < 0, 1 / len(upper), weight)).sum()
            loss.backward()
            total += loss.item()
        for optimizer in (self.theta_step, self.omega_step):
            optimizer.step()
            optimizer.zero_grad()
        return total


def peak_flops(dtype: str, size: int = 2048, trips: int = 5) -> float:
    """FLOPs per second of a large matrix product, the best of several trials."""
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: jnp.dot(a, a, preferred_element_type=jnp.float32))
    product(a).block_until_ready()
    times = []
    for _ in range(trips):
        start = time.perf_counter()
        product(a).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def useful_flops(base, tokens: int, responses: int) -> float:
    """FLOPs of a training step on this number of tokens and response tokens, without the products inside attention."""
    layers = sum(leaf.size for leaf in jax.tree.leaves(base["layers"]) if leaf.ndim > 2)  # [layers, in, out]: no norms, no biases
    head = max(leaf.size for name, part in base.items() if name != "layers" for leaf in jax.tree.leaves(part))
    return 4.0 * (layers * tokens + head * responses)


class Work(NamedTuple):
    """The steps of every variant."""

    config: ml_collections.ConfigDict
    directory: str  # of the model
    upper: levels.Level
    lower: levels.Level
    steps: int

    def packed(self) -> list[batches.StepBatch]:
        """The packed batches of all steps."""
        size = self.config.batch.size
        layout = packing.Layout(self.config.batch.micro_size, self.config.data.max_length, 2 * size)
        store = online.empty(len(self.lower.rows))
        return [batches.make_batch(self.config, self.upper, self.lower, layout, k, store) for k in range(self.steps)]

    def plain(self, k: int) -> tuple[list, list, np.ndarray]:
        """The same rows of step k as examples: upper, lower, and the row indices of the lower ones."""
        config = self.config
        rows = shuffle.lower_rows(config.seed, len(self.lower.rows), config.batch.size, k)
        trusted = shuffle.upper_rows(config.seed, len(self.upper.rows), config.batch.size, k)
        return [self.upper.examples[j] for j in trusted], [self.lower.examples[i] for i in rows], rows

    def padded(self, grouped: bool) -> int:
        """Number of positions of PyTorch's micro-batches in all steps, with padding."""
        parts = [part for k in range(self.steps) for part in micro_batches(*self.plain(k), grouped)]
        return sum(len(part) * max(example.size for example, _ in part) for part in parts)


def start_adapter(config, model):
    """The initial adapter of all variants."""
    return lora.init_adapter(model, jax.random.key(0), config.lora.rank, lora.resolve_targets(model, config.lora.targets))


def ours(work: Work, model, base, coefficient_at: str) -> Callable[[int], float]:
    """Returns `run(k)`, which executes step k of our implementation and returns its loss."""
    mesh, optimizer = sharding.make_mesh(1), optax.adam(work.config.optimizer.learning_rate)
    step_batches = [sharding.put_batch(host.batch, mesh) for host in work.packed()]
    scales = train_state.Scales(jnp.float32(1), jnp.float32(RHO / (1 - RHO)))
    select = selector.Selector(optimizer="adam", learning_rate=1e-4, baseline="none")
    aim = objective.Objective(coefficient_at=coefficient_at)
    jitted = jax.jit(step.make_step(model, aim, select, optimizer), donate_argnums=1)
    state = [train_state.init(start_adapter(work.config, model), optimizer, aim, select, len(work.lower.rows))]

    def run(k: int) -> float:
        state[0], metrics = jitted(base, state[0], step_batches[k], scales)
        return float(metrics["loss"])

    return run


def pytorch(work: Work, model, recompute: bool, grouped: bool) -> Callable[[int], float]:
    """Returns `run(k)`, which executes step k of PyTorch and returns its loss."""
    config, N = work.config, len(work.lower.rows)
    with tempfile.TemporaryDirectory() as folder:
        huggingface.save_adapter(folder, model, start_adapter(config, model), alpha=config.lora.alpha, base=work.directory)
        trainer = TorchTrainer(work.directory, folder, config, N, recompute, grouped)

    def run(k: int) -> float:
        return trainer.step(*work.plain(k))

    return run


def measure(config, model, base, directory: str, upper: levels.Level, lower: levels.Level, rounds: int) -> list[str]:
    """Markdown lines: seconds of a step of each variant, ratios to ours, losses, and the share of the peak."""
    work = Work(config, directory, upper, lower, rounds)
    variants = {name: ours(work, model, base, coefficient_at) for name, coefficient_at in OURS.items()}
    variants |= {name: pytorch(work, model, *options) for name, options in PYTORCH.items()}
    losses: dict[str, list[float]] = {name: [] for name in variants}
    seconds = timing.in_turn(
        {name: lambda k, name=name, run=run: losses[name].append(run(k)) for name, run in variants.items()}, rounds
    )
    hosts, size = work.packed(), config.batch.size
    tokens, responses = sum(host.num_tokens for host in hosts), sum(int(host.batch.packed.num_targets.sum()) for host in hosts)
    packed = sum(int(host.batch.packed.num_micro) for host in hosts) * config.batch.micro_size * config.data.max_length
    peak, flops = peak_flops(config.model.dtype), useful_flops(base, tokens, responses)
    columns = ("step", "positions a token", "seconds, median", "response tokens/s", "time over ours: min", "median", "max")
    columns += ("of all steps", "of the peak", "loss: maximum difference")
    lines = [
        f"{rounds} steps of {size} + {size} rows: {tokens} tokens, {responses} of them responses. Peak of a matrix product: "
        f"{peak / 1e9:.0f} GFLOP/s.",
        "",
        f"| {' | '.join(columns)} |",
        "| --- " * len(columns) + "|",
    ]
    for name, ratios in timing.ratios(seconds, "ours").items():
        difference = max(abs(loss - other) for loss, other in zip(losses[name], losses["ours"], strict=True))
        total, all_of_ours = sum(seconds[name]), sum(seconds["ours"])
        positions = packed if name in OURS else work.padded(PYTORCH[name][1])
        over = " | ".join(f"{ratio:.2f}" for ratio in (*ratios, total / all_of_ours))
        lines.append(
            f"| {name} | {positions / tokens:.2f} | {statistics.median(seconds[name]):.2f} | {responses / total:.1f} "
            f"| {over} | {flops / total / peak:.0%} | {difference:.1e} |"
        )
    lines += ["", f"Losses of ours, step by step: {', '.join(f'{loss:.4f}' for loss in losses['ours'])}."]
    return lines

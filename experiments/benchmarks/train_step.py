"""The joint step against PyTorch (transformers + PEFT): the same rows, adapter, optimizers and selector, in turn.

    published    as the paper's code does it: levels forwarded apart, micro-batches of 8 rows padded to their longest, logits at
                 every position, activations recomputed throughout
    published, no checkpointing
    best         one forward for both levels, rows grouped by length, logits of responses alone, nothing recomputed
    ours         packed, levels together; `next` has the second look at the lower level that (10c) asks for and the others lack

ω moves as in the paper, by Adam at 1e-4, with coefficients at θ^k but for `ours, next`. Losses of all are compared step by step:
they share start and rows. Useful FLOPs are 4 per weight and token with LoRA (forward, and gradients of activations), padding left
out, and the head for response tokens alone; the peak is that of a large matrix product, measured in the same process.
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

from bilevel_jax import batches, objective, online, selector, sharding, step
from bilevel_jax.data import levels, packing, shuffle
from bilevel_jax.models import huggingface, lora
from experiments.benchmarks import timing

ROWS = 8  # of a padded micro-batch, as in the paper
RHO = 0.1  # of the first epoch
OURS = {"ours": "current", "ours, next": "next"}  # name -> coefficient_at
THEIRS = {"published": (True, False), "published, no checkpointing": (False, False), "best": (False, True)}  # recompute, grouped


def load_torch():
    """torch, peft and transformers.

    Raises:
      ValueError: they are not installed.
    """
    try:
        import peft
        import torch
        import transformers
    except ImportError as error:
        raise ValueError("this compares with PyTorch: run it with .venv-parity/bin/python, from make parity") from error
    torch.set_num_threads(os.cpu_count() or 1)
    return torch, peft, transformers


def micro_batches(upper, lower, rows: np.ndarray, grouped: bool) -> list[list[tuple]]:
    """PyTorch's: `ROWS` examples each, with their places in the lower level's data, -1 for those of the upper level. Level by
    level, or all in order of length."""
    runs = [[(one, -1) for one in upper], [(one, int(i)) for one, i in zip(lower, rows)]]
    if grouped:
        runs = [sorted(runs[0] + runs[1], key=lambda item: item[0].size)]
    return [run[first : first + ROWS] for run in runs for first in range(0, len(run), ROWS)]


class Theirs:
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
        learned = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.theta_step = torch.optim.Adam(learned, lr=config.optimizer.learning_rate)
        self.omega_step = torch.optim.Adam([self.omega], lr=1e-4)

    def row_losses(self, examples):
        """ℓ [B] of padded rows."""
        torch = self.torch
        sizes = [one.size for one in examples]
        ids, mask, told = np.zeros((3, len(examples), max(sizes)), np.int64)
        for row, (one, size) in enumerate(zip(examples, sizes)):
            ids[row, :size] = np.concatenate([one.prompt, one.response])
            mask[row, :size] = 1
            told[row, len(one.prompt) : size] = 1
        ids, mask, told = (torch.from_numpy(array).to(self.device) for array in (ids, mask, told))
        target, told = ids[:, 1:], told[:, 1:].bool()
        if self.grouped:
            inner = self.model.get_base_model()
            hidden = inner.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
            logits = inner.get_output_embeddings()(hidden[told]).float()
            nll = torch.nn.functional.cross_entropy(logits, target[told], reduction="none")
            sums = torch.zeros(len(examples), device=self.device).index_add(0, told.nonzero()[:, 0], nll)
        else:
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
            nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
            sums = (nll.view_as(target) * told).sum(1)
        return sums / told.sum(1)

    def step(self, upper, lower, rows: np.ndarray) -> float:
        """One update of θ and ω; the loss before it.

        Args:
          upper, lower: examples of each level.
          rows: places of the lower ones in the data.
        """
        torch, gamma, total = self.torch, RHO / (1 - RHO), 0.0
        for part in micro_batches(upper, lower, rows, self.grouped):
            place = torch.tensor([i for _, i in part], device=self.device)
            weight = len(self.omega) * torch.softmax(self.omega, 0)[place.clamp(min=0)] * gamma / len(lower)
            loss = (self.row_losses([one for one, _ in part]) * torch.where(place < 0, 1 / len(upper), weight)).sum()
            loss.backward()
            total += loss.item()
        for optimizer in (self.theta_step, self.omega_step):
            optimizer.step()
            optimizer.zero_grad()
        return total


def peak_flops(dtype: str, size: int = 2048, trips: int = 5) -> float:
    """FLOPs a second of a large matrix product, the best of a few."""
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
    """FLOPs of a joint step on so many tokens, so many of them responses, attention's own products left out."""
    layers = sum(leaf.size for leaf in jax.tree.leaves(base["layers"]) if leaf.ndim > 2)  # [layers, in, out]: no norms, no biases
    head = max(leaf.size for name, part in base.items() if name != "layers" for leaf in jax.tree.leaves(part))
    return 4.0 * (layers * tokens + head * responses)


class Work(NamedTuple):
    """The steps that every variant makes."""

    config: ml_collections.ConfigDict
    directory: str  # of the model
    upper: levels.Level
    lower: levels.Level
    steps: int

    def drawn(self) -> list[batches.StepBatch]:
        """The packed rows of every step."""
        size = self.config.batch.size
        layout = packing.Layout(self.config.batch.micro_size, self.config.data.max_length, 2 * size)
        own = online.empty(len(self.lower.rows))
        return [batches.make_batch(self.config, self.upper, self.lower, layout, k, own) for k in range(self.steps)]

    def plain(self, k: int) -> tuple[list, list, np.ndarray]:
        """The same rows of step k as examples: upper, lower, and the places of the lower ones in the data."""
        config = self.config
        rows = shuffle.lower_rows(config.seed, len(self.lower.rows), config.batch.size, k)
        trusted = shuffle.upper_rows(config.seed, len(self.upper.rows), config.batch.size, k)
        return [self.upper.examples[j] for j in trusted], [self.lower.examples[i] for i in rows], rows

    def padded(self, grouped: bool) -> int:
        """Positions of PyTorch's micro-batches in all steps, padding among them."""
        parts = [part for k in range(self.steps) for part in micro_batches(*self.plain(k), grouped)]
        return sum(len(part) * max(one.size for one, _ in part) for part in parts)


def start_adapter(config, model):
    """The adapter that all variants start from."""
    return lora.init_adapter(model, jax.random.key(0), config.lora.rank, lora.resolve_targets(model, config.lora.targets))


def ours(work: Work, model, base, coefficient_at: str) -> Callable[[int], float]:
    """Step k of ours; its loss."""
    mesh, optimizer = sharding.make_mesh(1), optax.adam(work.config.optimizer.learning_rate)
    batches = [sharding.split_batch(drawn.batch, mesh) for drawn in work.drawn()]
    scales = step.Scales(jnp.float32(1), jnp.float32(RHO / (1 - RHO)))
    select = selector.Selector(optimizer="adam", learning_rate=1e-4, baseline="none")
    jitted = jax.jit(step.make_step(model, objective.Objective(coefficient_at=coefficient_at), select, optimizer), donate_argnums=1)
    state = [step.init(start_adapter(work.config, model), optimizer, select, len(work.lower.rows), tracked=False)]

    def run(k: int) -> float:
        state[0], found = jitted(base, state[0], batches[k], scales)
        return float(found["loss"])

    return run


def theirs(work: Work, model, recompute: bool, grouped: bool) -> Callable[[int], float]:
    """Step k of PyTorch's; its loss."""
    config, N = work.config, len(work.lower.rows)
    with tempfile.TemporaryDirectory() as folder:
        huggingface.save_adapter(folder, model, start_adapter(config, model), alpha=config.lora.alpha, base=work.directory)
        one = Theirs(work.directory, folder, config, N, recompute, grouped)

    def run(k: int) -> float:
        return one.step(*work.plain(k))

    return run


def measure(config, model, base, directory: str, upper: levels.Level, lower: levels.Level, rounds: int) -> list[str]:
    """Markdown lines: seconds of a step of each variant, ratios to ours, losses, and the share of the peak."""
    work = Work(config, directory, upper, lower, rounds)
    variants = {name: ours(work, model, base, coefficient_at) for name, coefficient_at in OURS.items()}
    variants |= {name: theirs(work, model, *how) for name, how in THEIRS.items()}
    losses: dict[str, list[float]] = {name: [] for name in variants}
    seconds = timing.in_turn(
        {name: lambda k, name=name, one=one: losses[name].append(one(k)) for name, one in variants.items()}, rounds
    )
    hosts, size = work.drawn(), config.batch.size
    tokens, responses = sum(drawn.tokens for drawn in hosts), sum(int(drawn.batch.packed.num_targets.sum()) for drawn in hosts)
    packed = sum(int(drawn.batch.packed.num_micro) for drawn in hosts) * config.batch.micro_size * config.data.max_length
    peak, flops = peak_flops(config.model.dtype), useful_flops(base, tokens, responses)
    columns = ("step", "positions a token", "seconds, median", "response tokens/s", "time over ours: min", "median", "max")
    columns += ("of all steps", "of the peak", "loss: most it differs")
    lines = [
        f"{rounds} steps of {size} + {size} rows: {tokens} tokens, {responses} of them responses. Peak of a matrix product: "
        f"{peak / 1e9:.0f} GFLOP/s.",
        "",
        f"| {' | '.join(columns)} |",
        "| --- " * len(columns) + "|",
    ]
    for name, ratios in timing.ratios(seconds, "ours").items():
        apart = max(abs(mine - theirs) for mine, theirs in zip(losses[name], losses["ours"], strict=True))
        total, all_of_ours = sum(seconds[name]), sum(seconds["ours"])
        positions = packed if name in OURS else work.padded(THEIRS[name][1])
        over = " | ".join(f"{ratio:.2f}" for ratio in (*ratios, total / all_of_ours))
        lines.append(
            f"| {name} | {positions / tokens:.2f} | {statistics.median(seconds[name]):.2f} | {responses / total:.1f} "
            f"| {over} | {flops / total / peak:.0%} | {apart:.1e} |"
        )
    lines += ["", f"Losses of ours, step by step: {', '.join(f'{loss:.4f}' for loss in losses['ours'])}."]
    return lines

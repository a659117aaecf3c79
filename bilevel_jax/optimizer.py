"""The optimizer of θ: its update rule, the schedule of its learning rate, weight decay, and clipping of the gradient.

The gradient is that of the θ-loss of `step`, both levels together. Clipping takes its global norm: one norm for the joint gradient,

    g ← g · min(1, clip_norm / ‖g‖)

Weight decay is decoupled (Loshchilov & Hutter 2019): θ ← θ - rate · (update + weight_decay · θ).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("constant", "cosine", "linear")


@dataclasses.dataclass(frozen=True)
class Settings:
    """An optimizer of θ, before the number of steps is known.

    Raises:
      ValueError: a value out of range; the message starts with its name.
    """

    name: str = "adam"
    learning_rate: float = 1e-3
    schedule: str = "constant"
    warmup: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    eps_root: float = 0.0  # of Adam

    def __post_init__(self):
        in_range = {
            "name": (self.name in OPTIMIZERS, f"among {', '.join(OPTIMIZERS)}"),
            "schedule": (self.schedule in SCHEDULES, f"among {', '.join(SCHEDULES)}"),
            "learning_rate": (self.learning_rate > 0, "positive"),
            "warmup": (0 <= self.warmup < 1 or self.warmup == int(self.warmup) > 0, "a number of steps, or a share below 1"),
            "b1": (0 <= self.b1 < 1, "in [0, 1)"),
            "b2": (0 <= self.b2 < 1, "in [0, 1)"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "clip_norm": (self.clip_norm >= 0, "at least 0"),
        }
        for field, (is_valid, words) in in_range.items():
            if not is_valid:
                raise ValueError(f"{field}={getattr(self, field)!r} must be {words}")
        if self.weight_decay and self.name != "adamw":
            raise ValueError(f"weight_decay={self.weight_decay} has no effect with name={self.name}; take name=adamw")


def warmup_steps(settings: Settings, num_steps: int) -> int:
    """Steps in which the rate rises. A part of a step counts as one, but not what rounding adds, as to 0.07 · 100."""
    return math.ceil(settings.warmup * num_steps - 1e-9) if settings.warmup < 1 else int(settings.warmup)


def learning_rate(settings: Settings, num_steps: int) -> float | optax.Schedule:
    """The rate: constant, or a function of the number of steps taken.

    With peak η, w steps of warmup and K steps in all, the rate of step k = 0 ... K-1 is

        η (k + 1) / w                          k < w
        η                                      constant
        η (1 - u)                              linear,  u = (k - w) / (K - w)
        η (1 + cos πu) / 2                     cosine

    Raises:
      ValueError: the warmup does not end before the last step.
    """
    peak, rising = settings.learning_rate, warmup_steps(settings, num_steps)
    if rising >= num_steps:
        raise ValueError(f"warmup={settings.warmup:g} reaches to the end of this run of {num_steps} steps; lower it")
    falling = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, num_steps - rising),
        "cosine": optax.cosine_decay_schedule(peak, num_steps - rising),
    }[settings.schedule]
    if rising:
        return optax.join_schedules([lambda k: peak * (k + 1) / rising, falling], [rising])
    return peak if settings.schedule == "constant" else falling


def learning_rates(settings: Settings, num_steps: int) -> np.ndarray:
    """The rate of every step, [num_steps] float32."""
    rate = learning_rate(settings, num_steps)
    return np.asarray(jax.vmap(rate)(jnp.arange(num_steps))) if callable(rate) else np.full(num_steps, rate, np.float32)


def make(settings: Settings, num_steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of `num_steps` steps.

    Raises:
      ValueError: the warmup does not end before the last step.
    """
    rate = learning_rate(settings, num_steps)
    if settings.name == "sgd":
        update = optax.sgd(rate)
    elif settings.name == "adam":
        update = optax.adam(rate, settings.b1, settings.b2, eps_root=settings.eps_root)
    else:
        moments = {"b1": settings.b1, "b2": settings.b2, "eps_root": settings.eps_root}
        update = optax.adamw(rate, weight_decay=settings.weight_decay, **moments)
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), update) if settings.clip_norm else update

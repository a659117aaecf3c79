"""Checks of a config against its model, rows and devices, which are known once a run starts or is planned."""

from bilevel_jax import config as configuration
from bilevel_jax import near_names, online
from bilevel_jax.config import Config, ConfigError
from bilevel_jax.data import levels
from bilevel_jax.models import fused_attention, model_config

MIN_TRUSTED_ROWS = 6  # of `search`, so that each of its three parts has one
MAX_RHO = 0.5  # above it, γ is more than 1
FEW_TRUSTED_ROWS = 20


def check_fit(config: Config, max_positions: int, num_parts: int) -> None:
    """Refuses lengths beyond the model's `max_positions`, and sizes that the `num_parts` of mesh.data · mesh.fsdp do not divide.

    Raises:
      ConfigError: one line that names the key.
    """
    if config.data.max_length > max_positions:
        what = f"data.max_length={config.data.max_length} is over the model's {max_positions} positions"
        raise ConfigError(f"{what}; set data.max_length={max_positions} or less")
    sizes = {"batch.micro_size": config.batch.micro_size}
    if config.method in configuration.ONLINE:
        sizes["online.slots"] = config.online.slots
    for key, number in sizes.items():
        if number % num_parts:
            raise ConfigError(f"{key}={number} must be a multiple of mesh.data · mesh.fsdp, {num_parts} devices")


def resolve_attention(config: Config, model: model_config.ModelConfig, platform: str, tensor: int) -> tuple[str, str]:
    """What `model.attention` is on these devices: `xla` or a kernel, and why `auto` is `xla` on a TPU, or an empty text.

    Args:
      config: of the run.
      model: its model.
      platform: the name that JAX has for the kind of device, such as `tpu`.
      tensor: length of the axis of the mesh that splits heads.

    Raises:
      ConfigError: `fused`, which this platform or these shapes do not allow; one line that names the key.
    """
    setting, kernel = config.model.attention, fused_attention.KERNELS.get(platform)
    # No GPU has run the kernel for GPUs yet.
    if setting == "xla" or setting == "auto" and kernel != "splash":
        return "xla", ""
    if kernel is None:
        problem, change = f"the kernels are for TPUs and GPUs, and this run is for a {platform.upper()}", ""
    else:
        problem, change = fused_attention.problem(kernel, model, config.data.max_length, tensor)
        if not problem:
            return kernel, ""
    if setting == "fused":
        raise ConfigError(f"model.attention=fused: {problem}; set {change + ' or ' if change else ''}model.attention=xla")
    return "xla", problem


def check_masks(config: Config, num_steps: int, num_rows: int) -> None:
    """Refuses a ratio that masks none of the lower-level rows.

    Also `dynamic` where its only refresh is before the first step, when all weights are equal and nothing is masked.

    Raises:
      ConfigError: one line that names the key.
    """
    o = config.online
    if config.method in configuration.ONLINE and o.ratio and not online.num_masked(num_rows, o.ratio):
        what = f"online.ratio={o.ratio:g} of {num_rows} lower-level rows masks none"
        raise ConfigError(f"{what}; set it to at least {1 / num_rows:.2g}, or take method=offline")
    if config.method != "dynamic" or config.selection.init or o.ratio in (0, 1) or o.refresh_every < num_steps:
        return
    raise ConfigError(
        f"method=dynamic masks nothing before the weights have moved, and online.refresh_every={o.refresh_every} reaches to the "
        f"end of this run of {num_steps} steps; lower it, or take method=online or offline"
    )


def check_profile(config: Config, num_steps: int) -> None:
    """Refuses to trace steps that a run of `num_steps` does not have.

    Raises:
      ConfigError: one line that names the key.
    """
    traced = configuration.profiled_steps(config)
    if traced and traced[1] > num_steps:
        raise ConfigError(f"log.profile={config.log.profile!r} goes beyond the {num_steps} steps of this run")


def check_trusted_rows(config: Config, num_rows: int, num_held_out: int) -> None:
    """Refuses a metagradient search with too few trusted rows, and `eval.keep_best` or `eval.patience` without held-out ones.

    Args:
      num_rows: trusted rows for training, see `search`.
      num_held_out: those that are held out.

    Raises:
      ConfigError: one line that names the key and the number to have.
    """
    for key, is_set in (("eval.keep_best", config.eval.keep_best), ("eval.patience", config.eval.patience)):
        if is_set and not num_held_out:
            what = f"{key} needs held-out trusted rows: eval.num_upper={config.eval.num_upper:g} of {num_rows} holds none out"
            raise ConfigError(f"{what}; raise it, or give more rows")
    if configuration.searches(config) and num_rows < MIN_TRUSTED_ROWS:
        what = f"selection.rule=metagradient needs {MIN_TRUSTED_ROWS} trusted rows for training, not {num_rows}"
        raise ConfigError(f"{what}; give more, hold out fewer (eval.num_upper), or take selection.rule=bds")


def notices(config: Config, upper: levels.Level, lower: levels.Level) -> list[str]:
    """What a user would want to know of the numbers of rows, and of a label that no row has; one line each."""
    lines, num_upper, num_held_out = [], len(upper.rows), len(upper.eval_rows)
    used = configuration.used_levels(config)
    for name, number in (("upper", num_upper), ("lower", len(lower.rows))):
        if name in used and config.batch.size > number:
            what = "repeats some of them in every step" if name == "upper" else "has all of them in every step"
            lines.append(f"batch.size={config.batch.size} is more than the {number} rows of data.{name} to train on, and {what}")
    if "upper" in used and num_upper + num_held_out < FEW_TRUSTED_ROWS:
        what = f"data.upper has only {num_upper + num_held_out} trusted rows"
        lines.append(f"{what}; what they want is clearer with {FEW_TRUSTED_ROWS} or more")
    if config.eval.num_upper and not num_held_out:
        what = f"eval.num_upper={config.eval.num_upper:g} of {num_upper} trusted rows holds none out"
        lines.append(f"{what}, so the trusted loss is not measured")
    lines += _notices_of_weights(config)
    label = config.data.label
    if label != configuration.Data().label and levels.labels(lower, label) is None:
        near = near_names.hint(label, next(iter(lower.rows)).fields)
        lines.append(f"data.label={label}: no row of data.lower has this field{near}, so nothing is measured by labels")
    return lines


def _notices_of_weights(config: Config) -> list[str]:
    """What concentrates the weights on few rows."""
    s = config.selection
    lines: list[str] = []
    if config.method == "mixing" or configuration.to_selector(config).frozen:
        return lines
    if s.optimizer == "adam" and s.learning_rate >= 1:
        what = f"selection.learning_rate={s.learning_rate:g}: adam moves each logit by about this much in every step"
        lines.append(f"{what}, so few rows may get all the weight; usual are 1e-4 to 0.1")
    last = configuration.rho(config, config.num_epochs - 1)
    if last > MAX_RHO:
        what = f"ρ grows to {last:g} in {config.num_epochs} epochs, and with it how far the weights move"
        lines.append(f"{what}, so few rows may get all the weight; lower penalty.rho_step")
    return lines


def check_rows(config: Config, num_rows: int, devices: int) -> None:
    """Refuses to split ω where the number of `devices` does not divide the lower-level rows.

    Raises:
      ConfigError: one line that names the key and the number to take.
    """
    left = num_rows % devices
    if config.mesh.shard_selector and left:
        what = f"mesh.shard_selector=True: {devices} devices do not divide {num_rows} lower-level rows"
        held_out = config.eval.num_lower
        more = (
            f"some more (eval.num_lower={held_out + left:g})" if held_out.is_integer() else f"{left} more of them (eval.num_lower)"
        )
        raise ConfigError(f"{what}; hold out {more}, or leave ω whole")

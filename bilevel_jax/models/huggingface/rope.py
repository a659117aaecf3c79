"""The rotary positions of a config.json, of transformers 5 (`rope_parameters`) or earlier (`rope_theta`, `rope_scaling`)."""

import math
import pathlib
from typing import NamedTuple

from bilevel_jax.models import architectures, rotary
from bilevel_jax.models.huggingface.directory import ModelError, positive

KINDS = ("default", "linear", "llama3", "yarn", "longrope")
GLOBAL, LOCAL = "full_attention", "sliding_attention"  # layers without and with a window, where their rotary positions differ


class Rope(NamedTuple):
    """The rotary positions of a model, except for the scaling."""

    theta: float
    local_theta: float | None  # of layers with a window, where it differs
    fraction: float  # rotated part of a head
    parameters: dict  # of the scaling, see `read_scaling`


def read_rope(raw: dict, record: architectures.Architecture, file: pathlib.Path) -> Rope:
    """Base and rotated part.

    Raises:
      ModelError: a value is not a positive number.
    """
    new = _object(raw, "rope_parameters", file)
    local_theta = record.local_rope_theta.read(raw)
    if GLOBAL in new or LOCAL in new:
        local, new = (_object(new, key, file) for key in (LOCAL, GLOBAL))
        if local and _kind(local) != "default":
            raise ModelError(
                f"{file}: rope type '{_kind(local)}' of layers with a sliding window is not supported; it must be default"
            )
        local_theta = local.get("rope_theta", local_theta)
    scaling = new or _object(raw, "rope_scaling", file)
    theta = new.get("rope_theta", raw.get("rope_theta", raw.get("rotary_emb_base", record.rope_theta)))
    default = raw.get("rotary_pct", record.rotary_fraction)
    return Rope(
        positive(file, "rope_theta", theta),
        None if local_theta is None else positive(file, "the local rope_theta", local_theta),
        positive(
            file, "the rotated fraction of a head", new.get("partial_rotary_factor", raw.get("partial_rotary_factor", default))
        ),
        scaling,
    )


def _object(raw: dict, key: str, file: pathlib.Path) -> dict:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise ModelError(f"{file}: {key} must be an object, got {value!r:.80}")
    return value


def _kind(parameters: dict) -> str:
    if "long_factor" in parameters:  # early Phi-3 models call it `su` or `yarn`
        return "longrope"
    return parameters.get("rope_type", parameters.get("type", "default"))


def read_scaling(raw: dict, rope: Rope, rotary_dim: int, max_positions: int, file: pathlib.Path) -> rotary.Scaling | None:
    """The scaling of the frequencies.

    Raises:
      ModelError: a scaling that is not supported, or an invalid value.
      KeyError: a value is missing.
    """
    parameters, kind = rope.parameters, _kind(rope.parameters)
    if kind == "default":
        return None

    def number(key: str, default=None) -> float:
        value = parameters[key] if default is None else parameters.get(key)
        return positive(file, f"rope's {key}", default if value is None and default is not None else value)

    if kind == "linear":
        return rotary.LinearScaling(number("factor"))
    key = "original_max_position_embeddings"
    original = raw.get(key) or parameters.get(key) or max_positions
    if positive(file, f"rope's {key}", original, is_integer=True) < 2 or rope.theta <= 1:
        raise ModelError(f"{file}: rope type '{kind}' needs an {key} and a rope_theta above 1, got {original} and {rope.theta}")
    if kind == "llama3":
        return rotary.Llama3(number("factor"), number("low_freq_factor"), number("high_freq_factor"), original)
    factor = number("factor", max_positions / original)
    if kind == "yarn":
        fast, slow = number("beta_fast", 32), number("beta_slow", 1)
        truncate = parameters.get("truncate", True)
        return rotary.Yarn(factor, _yarn_attention(number, parameters, factor), fast, slow, original, bool(truncate))
    if kind == "longrope":
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        short, long = (_factors(parameters, name, rotary_dim // 2, file) for name in ("short_factor", "long_factor"))
        return rotary.LongRope(short, long, number("attention_factor", attention), original)
    raise ModelError(f"{file}: rope type '{kind}' is not supported; known are {', '.join(KINDS)}")


def _yarn_attention(number, parameters: dict, factor: float) -> float:
    """The factor of rotated queries and keys."""

    def mscale(scale: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1

    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return number("attention_factor", mscale(number("mscale")) / mscale(number("mscale_all_dim")))
    return number("attention_factor", mscale())


def _factors(parameters: dict, name: str, length: int, file: pathlib.Path) -> tuple[float, ...]:
    values = parameters[name]
    if not isinstance(values, list) or len(values) != length:
        raise ModelError(f"{file}: rope's {name} must be a list of {length} numbers, one per pair of rotated features")
    return tuple(positive(file, f"rope's {name}", value) for value in values)

"""Checks the files of a run before they are used: a workdir may be damaged, edited, or of an earlier version."""

import math
import pathlib
from collections.abc import Collection, Mapping

import ml_collections

from bilevel_jax import checks, files
from bilevel_jax import config as configuration
from bilevel_jax.errors import RunError

NEEDED = (  # keys that commands read from the config of a run; all versions wrote them
    *("method", "num_epochs", "seed", "model.path", "model.dtype", "data.upper", "data.lower", "data.template", "data.max_length"),
    *("data.label", "data.truth", "data.num_lower", "data.bad_fraction", "lora.rank", "lora.alpha", "lora.targets", "eval.keep"),
    *("selection.rule", "batch.size", "batch.micro_size", "online.ratio", "online.refresh_every"),
)
EARLIER = {  # other keys that commands read, and what runs of earlier versions did, whose configs lack them
    "data.cache": "auto",
    "data.columns": "",
    "data.deduplicate": "off",
    "data.learn": "last",
    "eval.keep_best": False,
    "loss.lower": "sft",
    "model.quantization": "none",
    "selection.freeze": False,
    "selection.init": "",
    "selection.parameterization": "table",
    "selection.unit": "sample",
}
READ = (*NEEDED, *EARLIER)
CLUSTERS = "duplicate_clusters"  # the end of a key of the summary whose value is an object
REMEDY = "restore the file from a copy, or name the workdir of another run"


def check_config(config: ml_collections.ConfigDict, file: pathlib.Path) -> None:
    """Refuses a config in which a key that commands read is missing or invalid.

    Raises:
      RunError: names the file and the key.
    """
    default = configuration.default()
    for key in READ:
        section, _, name = key.rpartition(".")
        values = config.get(section) if section else config
        is_section = isinstance(values, ml_collections.ConfigDict)
        if section and values is not None and not is_section:
            raise RunError(f"{file}: {section}={values!r:.80} is not a section; {REMEDY}")
        if not is_section or name not in values:
            if key in NEEDED:
                raise RunError(f"{file}: {key} is missing; {REMEDY}")
            continue
        if problem := checks.problem(key, values[name], default[section][name] if section else default[name]):
            raise RunError(f"{file}: {problem}; {REMEDY}")


def complete_config(config: ml_collections.ConfigDict) -> None:
    """Gives a config the `EARLIER` values that it lacks."""
    for key, value in EARLIER.items():
        section, _, name = key.partition(".")
        if section not in config:
            config[section] = ml_collections.ConfigDict()
        if name not in config[section]:
            config[section][name] = value


def read_summary(workdir: pathlib.Path, needed: Collection[str] = ()) -> dict:
    """The numbers of summary.json.

    Args:
      workdir: of a finished run.
      needed: keys that must be in it.

    Raises:
      RunError: the file is missing or damaged, or a value is not a finite number; one line that names the key.
    """
    file = workdir / "summary.json"
    if not file.exists():
        raise RunError(f"{workdir} holds no finished run (summary.json is missing)")
    summary = files.read_json(file)
    for key in needed:
        if key not in summary:
            raise RunError(f"{file}: {key} is missing; {REMEDY}")
    for key, value in summary.items():
        if not (_is_clusters(value) if key.endswith(CLUSTERS) else _is_number(value)):
            raise RunError(f"{file}: {key}={value!r:.80} is not a finite number; {REMEDY}")
    return summary


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300 and math.isfinite(value)


def _is_clusters(value: object) -> bool:
    """Whether a value gives the number of clusters by their size."""
    return isinstance(value, dict) and all(size.isascii() and size.isdigit() and _is_number(count) for size, count in value.items())


def kept_step(summary: Mapping[str, float], keep_best: bool) -> float | None:
    """The step of the adapter that a run left, where `eval.keep_best` made it another one than the last; else None."""
    best = summary.get("best_step")
    return best if keep_best and best != summary.get("steps") else None

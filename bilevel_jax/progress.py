"""What a run tells while it goes on: seconds by activity, and the measures of its steps."""

import contextlib
import math
import pathlib
import time
from typing import NamedTuple

import jax
import numpy as np
import tqdm

from bilevel_jax import config as configuration
from bilevel_jax import metrics, online, preferences, workspace
from bilevel_jax.data import packing


class Clock:
    """Seconds by activity, up to date at every change of activity. One inside another counts for itself alone.

    All of them together are the time since the clock was made, and what went before it: `start`, importing packages for the most
    part. `other` is what has no name.

    Args:
      began: `time.perf_counter()` when the process started; now, if not given.
    """

    def __init__(self, began: float | None = None):
        activities = ("start", "load", "compile", "train", "generate", "eval", "checkpoint", "report", "other")
        self.seconds = dict.fromkeys(activities, 0.0)
        self._under_way: list[str] = []  # the innermost last
        self._since = time.perf_counter()
        self.seconds["start"] = self._since - began if began is not None else 0.0

    @contextlib.contextmanager
    def __call__(self, activity: str):
        self._settle()
        self._under_way.append(activity)
        try:
            yield
        finally:
            self._settle()
            self._under_way.pop()

    def share(self, activity: str, of: tuple[str, ...]) -> float:
        """The part of the time of some activities that one of them took."""
        self._settle()
        return self.seconds[activity] / sum(self.seconds[name] for name in of)

    def so_far(self) -> dict[str, float]:
        """Seconds by activity until now."""
        self._settle()
        return dict(self.seconds)

    def _settle(self) -> None:
        now = time.perf_counter()
        self.seconds[self._under_way[-1] if self._under_way else "other"] += now - self._since
        self._since = now


class Profile:
    """Traces steps with `jax.profiler` into `directory`: device and host, for XProf, TensorBoard or Perfetto.

    Args:
      steps: the first one, counted from 0, and the one that is left out again; None traces nothing.
    """

    def __init__(self, directory: pathlib.Path, steps: tuple[int, int] | None):
        self._directory, self._steps, self._on = directory, range(*steps or (0, 0)), False

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self._on:
            jax.profiler.stop_trace()

    def before(self, k: int, state) -> None:
        """Starts or stops before step k, when `state` is there: the device is at work on traced steps alone."""
        if (k in self._steps) != self._on:
            jax.block_until_ready(state)
            jax.profiler.stop_trace() if self._on else jax.profiler.start_trace(self._directory)
            self._on = not self._on


class Drawn(NamedTuple):
    """What a step sees, with what the device need not know."""

    batch: packing.Batch
    ids: list[str]  # the row of each entry
    places: np.ndarray  # [n] of each entry in the model's own responses, -1 for responses of the data
    tokens: int


class StepLog:
    """Reads each step's metrics one step late, so that the device never waits, and stops the run at the first NaN."""

    def __init__(self, config, writer: metrics.Writer, bar: tqdm.tqdm, epoch_steps: int):
        self._config, self._writer, self._bar, self._epoch_steps = config, writer, bar, epoch_steps
        self._pending = None
        self.restart_clock()

    def restart_clock(self) -> None:
        """Speed is measured from here; what came in between was not training."""
        self._since = time.perf_counter()
        self._sums: dict[str, float] = {}
        self._steps = self._tokens = self._responses = 0
        self._log_ratio: list[np.ndarray] = []
        self._clipped: list[np.ndarray] = []
        self._ess: list[float] = []

    @contextlib.contextmanager
    def elsewhere(self):
        """What goes on meanwhile does not count as the time of steps."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def dispatched(self, done: int, found: dict, spread: dict, drawn: Drawn, own: online.Own) -> None:
        self.settle()
        self._pending = done, found, spread, drawn, own

    def settle(self) -> None:
        if self._pending is None:
            return
        done, found, spread, drawn, own = self._pending
        self._pending = None
        found, spread = jax.device_get((found, spread))
        row_loss, log_ratio, weight = (found.pop(key)[: len(drawn.ids)] for key in ("row_loss", "log_ratio", "response_weight"))
        if not math.isfinite(found["loss"]) or not math.isfinite(found["gradient_norm"]):
            rows_at_fault = [row_id for row_id, loss in zip(drawn.ids, row_loss) if not math.isfinite(loss)]
            where = f"rows {', '.join(rows_at_fault)}" if rows_at_fault else "its gradient, no single row"
            raise workspace.RunError(f"step {done}: the loss is not finite ({where}); {workspace.REMEDY}")
        self._note_ratios(drawn, own, log_ratio, weight)
        self._responses += int(found.pop("response_tokens"))
        self._tokens += drawn.tokens
        self._steps += 1
        for key, value in found.items():
            self._sums[key] = self._sums.get(key, 0.0) + float(value)
        self._bar.update()
        if done % self._config.log.every == 0 or done % self._epoch_steps == 0:
            self._write(done, spread)

    def _note_ratios(self, drawn: Drawn, own: online.Own, log_ratio: np.ndarray, weight: np.ndarray) -> None:
        mine = drawn.places >= 0
        if not mine.any():
            return
        own.log_ratio[drawn.places[mine]] = log_ratio[mine]
        self._log_ratio.append(log_ratio[mine])
        pairs = self._config.online.objective in preferences.PAIRS
        if self._config.online.response_weight in ("sequence", "geometric") and not pairs:
            self._clipped.append(weight[mine] >= np.float32(self._config.online.clip))
        self._ess += online.group_ess(weight[mine], drawn.batch.group[: len(mine)][mine])

    def _write(self, done: int, spread: dict) -> None:
        seconds = time.perf_counter() - self._since
        levels = configuration.levels(self._config)
        unseen = [f"{level}_loss" for level in ("upper", "lower") if level not in levels]
        values = {f"train/{key}": total / self._steps for key, total in self._sums.items() if key not in unseen}
        values["train/rho"] = configuration.rho(self._config, (done - 1) // self._epoch_steps)
        values["speed/tokens_per_s"] = self._tokens / seconds
        values["speed/response_tokens_per_s"] = self._responses / seconds
        values |= {f"selector/{key}": float(value) for key, value in spread.items()}
        if self._log_ratio:
            values |= online.ratio_measures(np.concatenate(self._log_ratio), self._clipped, self._ess)
        self._writer.write(done, done / self._epoch_steps, values)
        shown = {level: values[f"train/{level}_loss"] for level in levels}
        if spread:
            shown["ess"] = float(spread["ess"])
        self._bar.set_postfix({key: f"{value:.3f}" for key, value in shown.items()}, refresh=False)
        self._bar.set_postfix_str(f"{self._bar.postfix}, {values['speed/tokens_per_s']:.0f} tok/s", refresh=False)
        self.restart_clock()

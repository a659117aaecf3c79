"""Logs the metrics of training steps to the progress bar and to metrics.jsonl."""

import contextlib
import math
import time
from typing import NamedTuple

import jax
import numpy as np
import tqdm

from bilevel_jax import config as configuration
from bilevel_jax import errors, online, preferences, selector, sharding
from bilevel_jax.batches import StepBatch
from bilevel_jax.runtime import metrics, response_metrics


class _Pending(NamedTuple):
    """A dispatched step whose metrics are still on the device."""

    done: int  # number of optimizer steps including it
    metrics: dict[str, jax.Array]
    weights: dict[str, jax.Array]  # `selector.summary`, or empty
    batch: StepBatch
    store: online.ResponseStore


class StepLog:
    """Reads each step's metrics one step late, so that the device never waits, and stops the run at the first NaN.

    Args:
      config: of the run.
      writer: where events go.
      bar: the progress bar.
      epoch_steps: steps of an epoch.
      rates: learning rate of every step.
    """

    def __init__(
        self, config: configuration.Config, writer: metrics.MetricsWriter, bar: tqdm.tqdm, epoch_steps: int, rates: np.ndarray
    ):
        self._config, self._writer, self._bar, self._epoch_steps, self._rates = config, writer, bar, epoch_steps, rates
        self._pending: _Pending | None = None
        self.restart_clock()

    def restart_clock(self) -> None:
        """Starts a new measurement of speed, without the time before."""
        self._since = time.perf_counter()
        self._sums: dict[str, float] = {}
        self._steps = self._tokens = self._response_tokens = 0
        self._log_ratio: list[np.ndarray] = []
        self._clipped: list[np.ndarray] = []
        self._ess: list[float] = []

    @contextlib.contextmanager
    def paused(self):
        """Excludes the time inside this context from the measurement of speed."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def push(self, done: int, metrics: dict, weights: dict, batch: StepBatch, store: online.ResponseStore) -> None:
        """Logs the previous step, and keeps the metrics of the step that was just dispatched."""
        self.flush()
        self._pending = _Pending(done, metrics, weights, batch, store)

    def flush(self) -> None:
        """Waits for the pending step and logs it.

        Raises:
          RunError: the loss or the gradient is not finite; the message names the rows.
        """
        if self._pending is None:
            return
        done, values, weights, batch, store = self._pending
        self._pending = None
        values, weights = jax.device_get(values), jax.tree.map(sharding.to_host, weights)
        num_entries = len(batch.ids)
        row_loss, log_ratio, weight = (values.pop(key)[:num_entries] for key in ("row_loss", "log_ratio", "response_weight"))
        self._check_finite(done, values, batch, row_loss)
        self._record_ratios(batch, store, log_ratio, weight)
        self._response_tokens += int(values.pop("response_tokens"))
        self._tokens += batch.num_tokens
        self._steps += 1
        for key, value in values.items():
            self._sums[key] = self._sums.get(key, 0.0) + float(value)
        self._bar.update()
        # An evaluation begins a new interval, so the steps before it are written first.
        if any(every and done % every == 0 for every in (self._config.log.every, self._epoch_steps, self._config.eval.every)):
            self._write(done, weights)

    @staticmethod
    def _check_finite(done: int, values: dict, batch: StepBatch, row_loss: np.ndarray) -> None:
        if math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"]):
            return
        rows = [row_id for row_id, loss in zip(batch.ids, row_loss) if not math.isfinite(loss)]
        where = f"rows {', '.join(rows)}" if rows else "its gradient, no single row"
        raise errors.RunError(f"step {done}: the loss is not finite ({where}); {errors.REMEDY}")

    def _record_ratios(self, batch: StepBatch, store: online.ResponseStore, log_ratio: np.ndarray, weight: np.ndarray) -> None:
        generated = batch.store_index >= 0
        if not generated.any():
            return
        store.log_ratio[batch.store_index[generated]] = log_ratio[generated]
        self._log_ratio.append(log_ratio[generated])
        online_config = self._config.online
        if online_config.response_weight in ("sequence", "geometric") and online_config.objective not in preferences.PAIRS:
            self._clipped.append(weight[generated] >= np.float32(online_config.clip))
        self._ess += response_metrics.group_ess(weight[generated], batch.batch.group[: len(generated)][generated])

    def _write(self, done: int, weights: dict) -> None:
        seconds = time.perf_counter() - self._since
        levels = configuration.used_levels(self._config)
        unused = [f"{level}_loss" for level in ("upper", "lower") if level not in levels]
        values = {f"train/{key}": total / self._steps for key, total in self._sums.items() if key not in unused}
        values["train/rho"] = configuration.rho(self._config, (done - 1) // self._epoch_steps)
        values["train/learning_rate"] = float(self._rates[done - 1])
        values["speed/tokens_per_s"] = self._tokens / seconds
        values["speed/response_tokens_per_s"] = self._response_tokens / seconds
        values |= {f"selector/{key}": value for key, value in selector.numbers(weights).items()}
        if self._log_ratio:
            values |= response_metrics.ratio_metrics(np.concatenate(self._log_ratio), self._clipped, self._ess)
        self._writer.write(done, done / self._epoch_steps, values)
        shown = {level: values[f"train/{level}_loss"] for level in levels}
        if weights:
            shown["ess"] = float(weights["ess"])
        self._bar.set_postfix({key: f"{value:.3f}" for key, value in shown.items()}, refresh=False)
        self._bar.set_postfix_str(f"{self._bar.postfix}, {values['speed/tokens_per_s']:.0f} tok/s", refresh=False)
        self.restart_clock()

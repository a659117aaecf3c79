"""Measures where a run spends its time: seconds by activity, and profiler traces of chosen steps."""

import contextlib
import pathlib
import threading
import time

import jax

ACTIVITIES = ("start", "load", "compile", "search", "train", "generate", "eval", "checkpoint", "report", "other")


class Compiling:
    """Counts the seconds in which the main thread traces, lowers and compiles programs, from the events that JAX reports.

    JAX reports how long something took when it ends. What was part of something longer is counted once.
    """

    EVENTS = "/jax/core/compile/"

    def __init__(self) -> None:
        self.seconds = 0.0
        self._counted: list[tuple[float, float]] = []  # start, and seconds counted since

    def __call__(self, event: str, duration_secs: float, **_: str | int) -> None:
        if not event.startswith(self.EVENTS) or threading.current_thread() is not threading.main_thread():
            return
        start, inside = time.perf_counter() - duration_secs, 0.0
        while self._counted and self._counted[-1][0] >= start:
            inside += self._counted.pop()[1]
        self._counted.append((start, duration_secs))
        self.seconds += max(0.0, duration_secs - inside)


COMPILING = Compiling()
jax.monitoring.register_event_duration_secs_listener(COMPILING)  # once for the process: JAX removes no listener


class Clock:
    """Counts seconds by activity. Time in a nested activity is not counted for the outer one.

    Programs that are compiled where they are first needed, such as those of sampling, count as `compile` in any activity.
    All activities add up to the time since the clock was created, plus `start`, the time before that (mostly imports). `other` is
    time outside of any activity.

    Args:
      began: `time.perf_counter()` when the process started; None for now.
    """

    def __init__(self, began: float | None = None):
        self.seconds = dict.fromkeys(ACTIVITIES, 0.0)
        self._active: list[str] = []  # innermost last
        self._since = time.perf_counter()
        self._compiled = COMPILING.seconds
        self.seconds["start"] = self._since - began if began is not None else 0.0

    @contextlib.contextmanager
    def __call__(self, activity: str):
        """Counts the time inside this context as `activity`."""
        self._flush()
        self._active.append(activity)
        try:
            yield
        finally:
            self._flush()
            self._active.pop()

    def share(self, activity: str, of: tuple[str, ...]) -> float:
        """Time of `activity` as a fraction of the total time of the activities `of`."""
        self._flush()
        return self.seconds[activity] / sum(self.seconds[name] for name in of)

    def elapsed(self) -> dict[str, float]:
        """Seconds by activity until now."""
        self._flush()
        return dict(self.seconds)

    def _flush(self) -> None:
        now, compiled = time.perf_counter(), COMPILING.seconds
        elapsed = now - self._since
        compiling = min(compiled - self._compiled, elapsed)
        self.seconds["compile"] += compiling
        self.seconds[self._active[-1] if self._active else "other"] += elapsed - compiling
        self._since, self._compiled = now, compiled


class Profile:
    """Writes a `jax.profiler` trace of device and host for XProf, TensorBoard or Perfetto.

    Args:
      directory: where the trace goes.
      steps: first traced step, counted from 0, and end (exclusive); None traces nothing.
    """

    def __init__(self, directory: pathlib.Path, steps: tuple[int, int] | None):
        self._directory, self._steps, self._tracing = directory, range(*steps or (0, 0)), False

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self._tracing:
            jax.profiler.stop_trace()

    def before(self, k: int, state) -> None:
        """Starts or stops the trace before step k.

        It first waits until `state` is computed, so that the device runs no other steps during the trace.
        """
        if (k in self._steps) != self._tracing:
            jax.block_until_ready(state)
            jax.profiler.stop_trace() if self._tracing else jax.profiler.start_trace(self._directory)
            self._tracing = not self._tracing

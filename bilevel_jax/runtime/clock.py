"""Where the time of a run goes: seconds by activity, and traces of chosen steps."""

import contextlib
import pathlib
import time

import jax

ACTIVITIES = ("start", "load", "compile", "train", "generate", "eval", "checkpoint", "report", "other")


class Clock:
    """Seconds by activity. A nested activity counts for itself alone.

    The activities add up to the time since the clock was made, plus `start`, the time before that (mostly imports). `other` is
    time outside any activity.

    Args:
      began: `time.perf_counter()` when the process started; now, if not given.
    """

    def __init__(self, began: float | None = None):
        self.seconds = dict.fromkeys(ACTIVITIES, 0.0)
        self._active: list[str] = []  # innermost last
        self._since = time.perf_counter()
        self.seconds["start"] = self._since - began if began is not None else 0.0

    @contextlib.contextmanager
    def __call__(self, activity: str):
        self._flush()
        self._active.append(activity)
        try:
            yield
        finally:
            self._flush()
            self._active.pop()

    def share(self, activity: str, of: tuple[str, ...]) -> float:
        """The share of one activity in the time of several."""
        self._flush()
        return self.seconds[activity] / sum(self.seconds[name] for name in of)

    def elapsed(self) -> dict[str, float]:
        """Seconds by activity until now."""
        self._flush()
        return dict(self.seconds)

    def _flush(self) -> None:
        now = time.perf_counter()
        self.seconds[self._active[-1] if self._active else "other"] += now - self._since
        self._since = now


class Profile:
    """Traces steps with `jax.profiler` into `directory`: device and host, for XProf, TensorBoard or Perfetto.

    Args:
      steps: the first traced step, counted from 0, and the first one after it that is not traced; None traces nothing.
    """

    def __init__(self, directory: pathlib.Path, steps: tuple[int, int] | None):
        self._directory, self._steps, self._on = directory, range(*steps or (0, 0)), False

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self._on:
            jax.profiler.stop_trace()

    def before(self, k: int, state) -> None:
        """Starts or stops tracing before step k, once `state` is computed, so that only traced steps run on the device."""
        if (k in self._steps) != self._on:
            jax.block_until_ready(state)
            jax.profiler.stop_trace() if self._on else jax.profiler.start_trace(self._directory)
            self._on = not self._on

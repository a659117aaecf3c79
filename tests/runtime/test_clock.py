"""Seconds by activity with a fake clock, and profiler traces of chosen steps."""

import time

import jax
import jax.numpy as jnp
import pytest

from bilevel_jax.runtime.clock import Clock, Compiling, Profile


@pytest.fixture
def fake_time(monkeypatch):
    """A list whose only item is the time that `time.perf_counter` returns."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_seconds_by_activity(fake_time):
    clock = Clock(began=96.0)
    fake_time[0] = 101  # 1 of other
    with clock("train"):
        fake_time[0] = 103  # 2 of train
        with clock("eval"):
            fake_time[0] = 108  # 5 of eval
        fake_time[0] = 111  # 3 of train
    fake_time[0] = 118  # 7 of other
    seconds = clock.elapsed()
    assert {key: value for key, value in seconds.items() if value} == {"start": 4, "train": 5, "eval": 5, "other": 8}
    assert sum(seconds.values()) == 118 - 96
    assert clock.share("train", of=("train", "eval")) == 0.5


def test_compiling_inside_of_an_activity_is_counted_apart():
    """The function is traced, which takes a tenth of a second, and then only runs."""

    def traced_slowly(x):
        time.sleep(0.1)
        return x + 1

    clock, program, began = Clock(), jax.jit(traced_slowly), time.perf_counter()
    with clock("generate"):
        program(jnp.zeros(3)).block_until_ready()
        first = clock.elapsed()
        program(jnp.zeros(3)).block_until_ready()
    assert first["compile"] >= 0.1 and first["generate"] <= time.perf_counter() - began - first["compile"]
    assert clock.elapsed()["compile"] == first["compile"]


def test_nested_compilations_are_counted_once(fake_time):
    compiling, event = Compiling(), Compiling.EVENTS + "jaxpr_trace_duration"
    fake_time[0] = 103
    compiling(event, 1.0)  # 102 to 103
    fake_time[0] = 105
    compiling(event, 1.5)  # 103.5 to 105
    compiling(event, 4.0)  # 101 to 105, with both inside
    fake_time[0] = 109
    compiling(event, 2.0)
    compiling("/jax/another/event", 50.0)
    assert compiling.seconds == 6.0


def test_clock_without_a_start(fake_time):
    assert set(Clock().elapsed().values()) == {0.0}


@pytest.mark.parametrize("first", [0, 3])  # 3: of a run that resumes inside the range
def test_profile_traces_only_its_steps(tmp_path, first, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda directory: calls.append(("start", directory, k)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop", k)))
    with Profile(tmp_path, (2, 5)) as profile:
        for k in range(first, 8):
            profile.before(k, jnp.zeros(2))
    assert calls == [("start", tmp_path, max(first, 2)), ("stop", 5)]


def test_profile_is_written_after_an_error(tmp_path):
    with pytest.raises(KeyError), Profile(tmp_path, (0, 9)) as profile:
        profile.before(0, None)
        jax.jit(lambda x: x + 1)(jnp.zeros(2)).block_until_ready()
        raise KeyError
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_no_profile(tmp_path):
    with Profile(tmp_path, None) as profile:
        profile.before(0, None)
    assert not list(tmp_path.iterdir())

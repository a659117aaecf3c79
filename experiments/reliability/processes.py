"""Processes of the soak: training runs that report their activity and are killed at chosen moments, and pairs of them."""

import concurrent.futures
import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
PROCESS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Wraps the training command: reports each activity on a pipe, and after each event the memory and the number of files.
WRAPPER = """
import contextlib, os, pathlib, runpy, sys
import jax
from bilevel_jax.runtime import clock, metrics

pipe, workdir = int(sys.argv[1]), pathlib.Path(sys.argv[2])
sys.argv[1:] = [f"--workdir={workdir}", *sys.argv[3:]]
begin, write, active = clock.Clock.__call__, metrics.MetricsWriter.write, ["start"]

def report(*words):
    os.write(pipe, (" ".join(map(str, words)) + "\\n").encode())

@contextlib.contextmanager
def announced(timer, activity):
    with begin(timer, activity):
        active.append(activity)
        report(activity)
        try:
            yield
        finally:
            active.pop()
            report(active[-1])

def measured(writer, step, *rest):
    write(writer, step, *rest)
    resident = int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    arrays = jax.live_arrays()
    files = sum(len(names) for *_, names in os.walk(workdir))  # unlike rglob, os.walk tolerates concurrent removals
    report("holds", step, resident, len(arrays), sum(x.nbytes for x in arrays), files)

clock.Clock.__call__ = announced
if "--measured" in sys.argv:
    sys.argv.remove("--measured")
    metrics.MetricsWriter.write = measured
runpy.run_module("bilevel_jax.main", run_name="__main__")
"""


class Ended(NamedTuple):
    """A process that has ended."""

    code: int  # exit status; -9: killed
    reports: list[str]  # lines of the pipe
    output: str
    at: float = 0.0  # time of its end, by `time.monotonic`


# --------------------------------------------------------------------------------------------------------------------
# Processes
# --------------------------------------------------------------------------------------------------------------------


def environment(directory: pathlib.Path) -> dict[str, str]:
    """Environment variables of a run. Compilations are cached, so that repeated attempts are cheap."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(directory / "compilations"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | cache | {"JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", "PYTHONPATH": path}


def train(
    workdir: pathlib.Path,
    settings: dict,
    kill: tuple[str, int, float] | None = None,
    measured: bool = False,
    process: tuple = (),
    first: str = "",
    act: Callable[[subprocess.Popen], None] = subprocess.Popen.kill,
    prefix: Sequence[str] = (),
) -> Ended:
    """One attempt of a run.

    Args:
      workdir: of the run.
      settings: config keys and values.
      kill: the moment of the SIGKILL, or of `act`: an activity, how often it has started before, and a delay in seconds.
      measured: whether the run reports memory and files after each event.
      process: coordinator address, number of processes, index of this process; empty for a single process.
      first: code that the process runs before.
      act: what is done to the process at the moment of `kill`.
      prefix: of the command, for example that of another host.
    """
    read_end, write_end = os.pipe()
    changes = [f"--config.{key}={value}" for key, value in settings.items()]
    config = ["--config", str(ROOT / "configs" / "safety.py"), *changes, *(["--measured"] if measured else [])]
    command = [*prefix, sys.executable, "-u", "-c", first + WRAPPER, str(write_end), str(workdir), *config]
    log = workdir.with_name("_".join([workdir.name, *process[2:]]) + ".log")
    environ = environment(workdir.parent) | dict(zip(PROCESS, process))
    with log.open("ab") as output, open(read_end, encoding="utf-8") as pipe:
        start = output.tell()
        child = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environ, pass_fds=[write_end])
        os.close(write_end)
        reports = []
        try:
            for line in pipe:
                reports.append(line.strip())
                if kill and reports.count(kill[0]) > kill[1] and reports[-1] == kill[0]:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.wait(kill[2])
                    act(child)
                    kill = None
        finally:
            if sys.exc_info()[0]:
                child.kill()
            child.wait()
    return Ended(child.returncode, reports, log.read_bytes()[start:].decode(errors="replace"), time.monotonic())


def train_pair(workdir: pathlib.Path, settings: dict, kill: tuple[str, int, float] | None = None, victim: int = 0) -> list[Ended]:
    """One attempt of a run with two processes, of which `victim` is killed."""
    with socket.socket() as free_port:
        free_port.bind(("localhost", 0))
        address = f"localhost:{free_port.getsockname()[1]}"
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        moments = [kill if i == victim else None for i in range(2)]
        futures = [pool.submit(train, workdir, settings, kill, False, (address, "2", str(i))) for i, kill in enumerate(moments)]
        return [future.result() for future in futures]


def last_line(ended: Ended) -> str:
    """The last line of the output of a process."""
    return next((line for line in reversed(ended.output.splitlines()) if line.strip()), "no message")


def check(ended: Ended, name: str) -> None:
    """Raises RuntimeError if a process neither succeeded nor was killed."""
    if ended.code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{name} ended with status {ended.code}: {last_line(ended)}")

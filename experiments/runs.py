"""A cell of a table or a sweep is a run of `bilevel_jax.main` in a process and a workdir of its own; here is how they are run.

Cells that are finished are not run again, killed ones continue, and one that fails does not stop the others.
"""

import concurrent.futures
import fcntl
import json
import pathlib
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, NamedTuple, Protocol

import tqdm

from bilevel_jax import errors
from bilevel_jax.runtime import interruption

PROGRAM = (sys.executable, "-u", "-m", "bilevel_jax.main")  # unbuffered: the last line of a log is the last thing that happened
POLL = 0.2  # seconds
STOPPED = "stopped before it started"
COLUMNS = {  # of every table: heading -> key of summary.json
    "upper loss": "eval/upper_loss",
    "lower loss": "eval/lower_loss",
    "lower, right answers": "eval/lower_clean_loss",
    "AUROC": "selector/auroc",
    "bad kept": "selector/bad_kept",
}


class Cell(NamedTuple):
    workdir: str  # absolute, on a file system that every machine sees
    command: tuple[str, ...]

    @property
    def log(self) -> pathlib.Path:
        """What the run prints, every try of it."""
        return pathlib.Path(self.workdir + ".log")


class Handle(Protocol):
    """A cell under way: a future, or a job of submitit."""

    def done(self) -> bool: ...

    def result(self) -> dict | str: ...


Start = Callable[[Sequence[Cell]], tuple[Sequence[Handle], Callable[[], object]]]  # -> a handle for each cell, and what stops them


def make(config: str, workdir: pathlib.Path, settings: Mapping[str, object]) -> Cell:
    """The cell of config keys and values; `config` is the file, with its tier after a colon."""
    workdir = workdir.absolute()
    changes = (f"--config.{key}={value}" for key, value in settings.items())
    return Cell(str(workdir), (*PROGRAM, f"--config={config}", f"--workdir={workdir}", *changes))


def slug(name: str) -> str:
    """A cell's name as a directory."""
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in name.replace("ρ=", "rho").replace("ω", "w").replace("≡", "is"))


def entry(summaries: Sequence[Mapping], key: str) -> str:
    """Mean of `key` and, of several seeds, its standard deviation; empty where no summary has it."""
    values = [summary[key] for summary in summaries if key in summary]
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}" if values else ""


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table."""
    return ["| " + " | ".join(row) + " |" for row in (headings, ["---"] * len(headings), *rows)]


# --------------------------------------------------------------------------------------------------------------------
# One cell
# --------------------------------------------------------------------------------------------------------------------


def finished(cell: Cell) -> dict | None:
    """The summary of a finished run."""
    file = pathlib.Path(cell.workdir, "summary.json")
    return json.loads(file.read_text()) if file.exists() else None


def run_cell(cell: Cell, stop: threading.Event | None = None, cwd: str | None = None) -> dict | str:
    """The summary of one cell, or the reason why there is none. A run that is to stop saves what it has.

    Args:
      stop: ends the run when it is set.
      cwd: where the run starts; here by default.
    """
    stop = stop or threading.Event()
    cell.log.parent.mkdir(parents=True, exist_ok=True)
    with cell.log.open("ab") as output:
        while not _locked(output):
            if stop.wait(POLL):
                return STOPPED
        if stop.is_set():
            return STOPPED
        if (summary := finished(cell)) is not None:
            return summary
        start = output.tell()
        process = subprocess.Popen(cell.command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, cwd=cwd)
        try:
            while process.poll() is None and not stop.wait(POLL):
                pass
        finally:  # an engine may take this process away by an exception, too
            process.terminate()
            process.wait()
    if process.returncode:
        return reason(process.returncode, cell.log.read_bytes()[start:].decode(errors="replace"))
    return finished(cell) or "it ended without a summary.json"


def _locked(log: IO) -> bool:
    """Takes the log. The run inherits the lock, so that two sweeps, or a run that outlived its sweep, never share a workdir."""
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def reason(code: int, printed: str) -> str:
    """Why a process ended, from its status and what it printed."""
    last = next((line.strip() for line in reversed(printed.splitlines()) if line.strip()), "no message")
    if code == -signal.SIGKILL:
        return "killed by SIGKILL, as happens when memory runs out"
    killed = f"killed by {signal.Signals(-code).name}: " if code < 0 else ""
    return killed + last.removeprefix("error: ")


# --------------------------------------------------------------------------------------------------------------------
# All of them
# --------------------------------------------------------------------------------------------------------------------


def local(jobs: int) -> Start:
    """Processes on this machine, `jobs` at a time."""

    def start(todo):
        stop = threading.Event()
        pool = concurrent.futures.ThreadPoolExecutor(jobs)
        handles = [pool.submit(run_cell, cell, stop) for cell in todo]
        pool.shutdown(wait=False)  # takes no more; what it has is run
        return handles, stop.set

    return start


def run_all(cells: Sequence[Cell], start: Start) -> list[dict | str]:
    """Of each cell its summary, or the reason why there is none.

    Raises:
      Interrupted: after SIGTERM or SIGINT, when the runs under way have been stopped.
    """
    results = {cell: summary for cell in cells if (summary := finished(cell)) is not None}
    todo = [cell for cell in cells if cell not in results]
    with interruption.catch_signals() as signals, tqdm.tqdm(total=len(cells), initial=len(results), unit="run") as bar:
        handles, cancel = start(todo) if todo else ((), None)
        waiting, cancelled = list(zip(handles, todo)), False
        while waiting:
            done = [pair for pair in waiting if pair[0].done()]
            waiting = [pair for pair in waiting if pair not in done]
            if signals and not cancelled:
                cancel()
                cancelled = True
            for handle, cell in done if not signals else ():
                results[cell] = _result(handle)
                if isinstance(results[cell], str):
                    bar.write(f"failed: {cell.workdir}: {results[cell]}")
                bar.update()
            if not done:
                time.sleep(POLL)
    if signals:
        whole = sum(finished(cell) is not None for cell in cells)
        name = signal.Signals(signals[0]).name
        raise errors.Interrupted(f"{name}: {whole} of {len(cells)} runs are finished; the same command continues")
    return [results[cell] for cell in cells]


def _result(handle: Handle) -> dict | str:
    try:
        return handle.result()
    except Exception as error:  # each engine has its own for a machine that went away; whatever it is, it is this cell's
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"

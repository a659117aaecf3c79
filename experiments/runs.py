"""Runs the cells of a table or a sweep. A cell is a run of `bilevel_jax.main` in its own process and its own workdir.

Finished cells are not run again, killed cells continue, and a cell that fails does not stop the others.
"""

import concurrent.futures
import fcntl
import os
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

from bilevel_jax import errors, files
from bilevel_jax.runtime import interruption, metrics

PROGRAM = (sys.executable, "-u", "-m", "bilevel_jax.main")  # unbuffered: the log is complete when a run is killed
WITH_PARENT = (sys.executable, "-S", str(pathlib.Path(__file__).with_name("with_parent.py")))  # a killed sweep leaves no run
POLL = 0.2  # seconds
STOPPED = "stopped before it started"
COLUMNS = {  # of every table: heading -> key of summary.json
    "upper loss": "eval/upper_loss",
    "lower loss": "eval/lower_loss",
    "lower, right answers": "eval/lower_clean_loss",
    "AUROC": "selector/auroc",
    "share of bad rows kept": "selector/bad_kept",
    "share of kept rows that are bad": "selector/bad_among_kept",
}


class Cell(NamedTuple):
    """One run: its workdir and its command."""

    workdir: str  # absolute, on a file system that all machines share
    command: tuple[str, ...]

    @property
    def log(self) -> pathlib.Path:
        """The file that collects the output of all attempts."""
        return pathlib.Path(self.workdir + ".log")


class Handle(Protocol):
    """A cell that was started: a future, or a submitit job."""

    def done(self) -> bool: ...

    def result(self) -> dict | str: ...


Start = Callable[[Sequence[Cell]], tuple[Sequence[Handle], Callable[[], object]]]  # -> handles, function to stop


def make(config: str, workdir: pathlib.Path, settings: Mapping[str, object]) -> Cell:
    """The cell with these config keys and values; `config` is the config file, optionally followed by a colon and the tier."""
    workdir = workdir.absolute()
    changes = (f"--config.{key}={value}" for key, value in settings.items())
    return Cell(str(workdir), (*PROGRAM, f"--config={config}", f"--workdir={workdir}", *changes))


def overrides(pairs: Sequence[str]) -> dict[str, str]:
    """Config keys and values of --set.

    Raises:
      ValueError: a malformed pair, or a key that is set twice.
    """
    values = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    if len(values) < len(pairs):
        raise ValueError("--set takes key=value, each key once")
    return values


def slug(name: str) -> str:
    """The name of a cell as a directory name."""
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in name.replace("ρ=", "rho").replace("ω", "w").replace("≡", "is"))


def entry(summaries: Sequence[Mapping], key: str) -> str:
    """Mean of `key`, with the standard deviation if there are several values; empty if no summary has it."""
    values = [summary[key] for summary in summaries if key in summary]
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}" if values else ""


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(row) + " |" for row in (headings, ["---"] * len(headings), *rows)]


# --------------------------------------------------------------------------------------------------------------------
# One cell
# --------------------------------------------------------------------------------------------------------------------


def finished(cell: Cell) -> dict | None:
    """The summary of a finished run; None if the run is not finished."""
    file = pathlib.Path(cell.workdir, "summary.json")
    return metrics.with_current_keys(files.read_json(file)) if file.exists() else None


def run_cell(cell: Cell, stop: threading.Event | None = None, cwd: str | None = None) -> dict | str:
    """Runs one cell. Returns its summary, or the reason for its failure.

    Args:
      stop: when this event is set, the run is terminated; it saves a checkpoint first.
      cwd: working directory of the run; the current one by default.
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
        process = subprocess.Popen(
            (*WITH_PARENT, str(os.getpid()), *cell.command),
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            cwd=cwd,
            start_new_session=True,  # Ctrl-C reaches it through `terminate` only: a second signal would end it without saving
        )
        try:
            while process.poll() is None and not stop.wait(POLL):
                pass
        finally:  # also if the launcher interrupts this process by an exception
            process.terminate()
            process.wait()
    if process.returncode:
        return reason(process.returncode, cell.log.read_bytes()[start:].decode(errors="replace"))
    return finished(cell) or "the run ended without a summary.json"


def _locked(log: IO) -> bool:
    """Locks the log. The run inherits the lock, so two sweeps, or a run that outlived its sweep, never share a workdir."""
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def reason(code: int, printed: str) -> str:
    """Why a process failed, from its exit status and its output."""
    last = next((line.strip() for line in reversed(printed.splitlines()) if line.strip()), "no message")
    if code == -signal.SIGKILL:
        return "killed by SIGKILL, as happens when memory runs out"
    killed = f"killed by {signal.Signals(-code).name}: " if code < 0 else ""
    return killed + last.removeprefix("error: ")


# --------------------------------------------------------------------------------------------------------------------
# All cells
# --------------------------------------------------------------------------------------------------------------------


def local(jobs: int) -> Start:
    """Starts processes on this machine, `jobs` at a time."""

    def start(cells):
        stop = threading.Event()
        pool = concurrent.futures.ThreadPoolExecutor(jobs)
        handles = [pool.submit(run_cell, cell, stop) for cell in cells]
        pool.shutdown(wait=False)  # submitted cells still run
        return handles, stop.set

    return start


def run_all(cells: Sequence[Cell], start: Start) -> list[dict | str]:
    """Runs all cells. Returns the summary of each cell, or the reason for its failure.

    Raises:
      Interrupted: after SIGTERM or SIGINT, once the active runs have stopped.
    """
    results = {cell: summary for cell in cells if (summary := finished(cell)) is not None}
    unfinished = [cell for cell in cells if cell not in results]
    with interruption.catch_signals() as signals, tqdm.tqdm(total=len(cells), initial=len(results), unit="run") as bar:
        handles, cancel = start(unfinished) if unfinished else ((), None)
        waiting, cancelled = list(zip(handles, unfinished)), False
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
        num_finished = sum(finished(cell) is not None for cell in cells)
        name = signal.Signals(signals[0]).name
        message = f"{name}: {num_finished} of {len(cells)} runs are finished; the same command continues"
        raise errors.Interrupted(message, signals[0])
    return [results[cell] for cell in cells]


def _result(handle: Handle) -> dict | str:
    try:
        return handle.result()
    except Exception as error:  # launchers have their own exceptions, for a lost machine for example; all belong to this cell
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"

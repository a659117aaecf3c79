"""Lines that say what a run is doing. No phase is silent for longer than `EVERY` seconds."""

import contextlib
import sys
import threading
import time

import tqdm

from bilevel_jax.text import is_first_process, visible

EVERY = 30.0  # seconds between two lines of a phase that has no progress bar


def announce(text: str) -> None:
    """Prints an escaped line, above the progress bars; only in the first process of a run."""
    if is_first_process():
        tqdm.tqdm.write(visible(text))
        sys.stdout.flush()


@contextlib.contextmanager
def phase(text: str):
    """Says what begins, and how long it takes every `EVERY` seconds until the end of this context."""
    announce(text)
    began, ended = time.monotonic(), threading.Event()

    def report() -> None:
        while not ended.wait(EVERY):
            announce(f"{text}: {time.monotonic() - began:.0f} s so far")

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()

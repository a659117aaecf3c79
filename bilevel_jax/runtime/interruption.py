"""Signals that a run notices between steps instead of dying in the middle of one."""

import contextlib
import signal


@contextlib.contextmanager
def catch_signals():
    """Yields a list to which SIGTERM and SIGINT are appended instead of ending the process."""
    caught: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in handlers:
        signal.signal(number, lambda number, frame: caught.append(number))
    try:
        yield caught
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

"""Signals that a run handles between steps."""

import contextlib
import signal


@contextlib.contextmanager
def catch_signals():
    """Yields a list to which received SIGTERM and SIGINT are appended. They do not end the process inside this context."""
    received: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in handlers:
        signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

"""Signals that a run handles between steps."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

HANDLED = (signal.SIGTERM, signal.SIGINT)
SAME = 0.2  # seconds in which further signals count as the first one: `timeout` and terminals may deliver one twice


@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Yields a list to which received SIGTERM and SIGINT are appended. The first one does not end the process inside this context.

    A second one ends it at once, with status 128 + its number: nothing more is saved. Outside the main thread Python allows no
    handlers, and the list stays empty.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    handlers = {number: signal.signal(number, lambda number, frame: received.append(number)) for number in HANDLED}
    # Python calls a handler only when the main thread is back from a computation, which may hang. It writes to this socket at once.
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    wakeup = signal.set_wakeup_fd(writing.fileno())
    watcher = threading.Thread(target=_exit_on_second, args=(reading,), daemon=True)
    watcher.start()
    try:
        yield received
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        writing.close()  # ends the watcher
        watcher.join()
        reading.close()


def _exit_on_second(reading: socket.socket) -> None:
    """Reads the numbers of signals, says that the first one has arrived, and ends the process at the second one."""
    first = None
    while byte := reading.recv(1):
        if byte[0] not in HANDLED:
            continue
        if first is None:
            first = time.monotonic()
            os.write(2, f"\n{signal.Signals(byte[0]).name}: stopping; a second signal ends the process without saving\n".encode())
        if time.monotonic() - first > SAME:
            os.write(2, f"\n{signal.Signals(byte[0]).name}: the second signal ends the process, without saving\n".encode())
            os._exit(128 + byte[0])

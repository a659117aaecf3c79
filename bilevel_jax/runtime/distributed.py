"""Processes of a run on several machines: how they connect, and how they exit together.

If a process dies, the others would block in their next collective operation until JAX's heartbeat fails after 100 seconds, and end
with a traceback or an abort of the runtime. So every process keeps a TCP connection to process 0. The kernel closes a connection
when its process ends for any reason, and the other processes then exit at once with one line. Where a machine or the network fails,
nothing is closed, and the kernel gives the connection up after 25 seconds. The run continues from its last checkpoint when all
processes are started again.
"""

import atexit
import contextlib
import ctypes
import itertools
import os
import selectors
import signal
import socket
import sys
import threading
from typing import Any

import jax
from jax._src import distributed  # the coordinator's address and its key-value store have no public API

from bilevel_jax import errors
from bilevel_jax.errors import Interrupted, RunError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
CONNECT_TIMEOUT = 60  # seconds
GRACE = 2.0  # seconds to wait for the cause from another process before this process reports its own error
DONE, LOST = b".", b"?"  # a process is done; its machine does not answer
# An unreachable machine is detected after 25 seconds, also where data were sent that it has not confirmed.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 25_000}
_contexts = itertools.count()
_connection: Any = distributed.global_state  # with an address and a client, once JAX is connected


def join() -> None:
    """Connects to the other processes of this run. Must be called before JAX initializes its devices.

    JAX detects the processes of a cluster (Slurm, TPU pods, Kubernetes, Open MPI). Otherwise the environment must set all of
    `VARIABLES`. Without either, the run has a single process.

    Raises:
      ValueError: some of the variables are missing or invalid.
    """
    address, *numbers = (os.environ.get(name, "") for name in VARIABLES)
    if address or any(numbers):
        if not address or not all(number and number.isdigit() for number in numbers):
            raise ValueError(
                f"{', '.join(VARIABLES)} must all be set: host:port, number of processes, index of this process from 0"
            )
        number, index = map(int, numbers)
        return jax.distributed.initialize(address, number, index)
    try:
        jax.distributed.initialize()
    except ValueError as error:
        if "coordinator_address should be defined" not in str(error):  # JAX's error if there is no cluster
            raise


# --------------------------------------------------------------------------------------------------------------------
# Exiting together
# --------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def exit_together():
    """Makes all processes of a run exit if one of them dies or fails inside this context.

    If a process dies, the others print one line and exit with status 1. If a process raises, all exit, each with its own error if
    it has one. A single process is not affected.

    Raises:
      RunError: another process cannot be reached.
    """
    if jax.process_count() == 1:
        yield
        return
    links, reports_own_error = _connect(), threading.Event()
    watcher = threading.Thread(target=_watch, args=(links, reports_own_error), daemon=True)
    watcher.start()
    # JAX aborts a process that lost its coordinator, and may be faster than the watcher, which can name the cause. The handler
    # `sleep` gets the number of SIGABRT, 6, as its argument, and delays the abort by that many seconds.
    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGABRT, libc.sleep)
    try:
        yield
    except Interrupted:  # raised by all processes at the same step
        _leave(links, watcher)
        raise
    except BaseException:
        watcher.join(GRACE)  # if a collective failed because a process died, the watcher reports that and exits
        reports_own_error.set()
        _send(links, f"process {jax.process_index()} failed and prints the cause".encode())
        atexit.register(_exit, links)  # JAX's own exit handler would wait for the other processes
        raise
    _leave(links, watcher)


def _leave(links: dict[socket.socket, str], watcher: threading.Thread) -> None:
    """Returns when all processes are done."""
    if jax.process_index():
        _send(links, DONE)
    watcher.join()
    if not jax.process_index():
        _send(links, DONE)


# --------------------------------------------------------------------------------------------------------------------
# Connections
# --------------------------------------------------------------------------------------------------------------------


def _connect() -> dict[socket.socket, str]:
    """Opens the connections of this process: to all others in process 0, to process 0 in all others.

    Returns:
      Connections, with the names of the processes at the other ends.
    """
    key = f"bilevel_jax/{next(_contexts)}"
    host = _connection.coordinator_address.rpartition(":")[0].strip("[]")
    try:
        links = _connect_to_first(key, host) if jax.process_index() else _accept_others(key)
    except (OSError, jax.errors.JaxRuntimeError) as error:
        reason = errors.first_line(error)
        atexit.register(_exit, {})
        what = f"process {jax.process_index()} cannot connect to the others at {host} ({reason})"
        raise RunError(f"{what}; all machines of a run must be up and accept connections from each other") from error
    for link in links:
        link.settimeout(None)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):  # not on every operating system
                link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return links


def _connect_to_first(key: str, host: str) -> dict[socket.socket, str]:
    port = int(_connection.client.blocking_key_value_get(key, 1000 * CONNECT_TIMEOUT))
    link = socket.create_connection((host, port), CONNECT_TIMEOUT)
    link.sendall(jax.process_index().to_bytes(4))
    return {link: "process 0"}


def _accept_others(key: str) -> dict[socket.socket, str]:
    """Listens on a free port, publishes it under `key`, and accepts one connection from each other process."""
    dual_stack = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual_stack else socket.AF_INET
    backlog = jax.process_count()
    with socket.create_server(("", 0), family=family, dualstack_ipv6=dual_stack, backlog=backlog) as server:
        _connection.client.key_value_set(key, str(server.getsockname()[1]))
        server.settimeout(CONNECT_TIMEOUT)
        accepted = [server.accept()[0] for _ in range(jax.process_count() - 1)]
    return {link: f"process {int.from_bytes(link.recv(4, socket.MSG_WAITALL))}" for link in accepted}


def _send(links: dict[socket.socket, str], message: bytes) -> None:
    for link in links:
        with contextlib.suppress(OSError):  # the other process may have ended
            link.sendall(message)


def _receive(link: socket.socket) -> bytes:
    """The next message; empty if the connection is closed, LOST if the machine at its other end does not answer."""
    try:
        return link.recv(256)
    except ConnectionError:
        return b""
    except OSError:
        return LOST


# --------------------------------------------------------------------------------------------------------------------
# Watching the others
# --------------------------------------------------------------------------------------------------------------------


def _watch(links: dict[socket.socket, str], reports_own_error: threading.Event) -> None:
    """Reads messages of the other processes, and returns when all are done.

    If one died or failed, it ends this process with one line, unless this process reports an error of its own.
    """
    with selectors.DefaultSelector() as selector:
        for link in links:
            selector.register(link, selectors.EVENT_READ, link)
        while selector.get_map():
            for ready, _ in selector.select():
                link = ready.data
                message = _receive(link)
                if message == DONE:
                    selector.unregister(link)
                    continue
                ended = {b"": "died", LOST: "cannot be reached"}.get(message)
                if reports_own_error.wait(0 if ended else GRACE / 2):
                    return
                reason = f"{links[link]} {ended}" if ended else message.decode(errors="replace")
                _send(links, reason.encode())
                what_to_do = "start the same command on every machine again to continue from the last checkpoint"
                _print_last(f"\nerror: {reason}, so this process exits; {what_to_do}\n")
                _exit(links)


def _print_last(line: str) -> None:
    """Writes a line to standard error and closes it: JAX's runtime prints its own errors when it loses its coordinator."""
    sys.stderr.flush()
    error, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.write(error, line.encode())


def _exit(links: dict[socket.socket, str]) -> None:
    """Ends this process without waiting for the others to finish.

    Process 0 ends last, because JAX aborts processes that lose their coordinator.
    """
    if not jax.process_index():
        for link in links:
            link.settimeout(3 * GRACE)
            while _receive(link) not in (b"", LOST):
                pass  # until the other process closes it
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)

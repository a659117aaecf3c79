"""The processes of a run on several machines: how they find each other, and how they end together.

Where one of them dies, the others would wait for it in their next exchange until JAX's heartbeat gives up after 100 seconds, or
end by a traceback or an abort of the runtime, whichever comes first. So every process holds a connection to the first one, which
the kernel closes when a process ends, however it does: the others then end at once, in one line. The run goes on from its last
checkpoint when all of them are started again.
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

import jax
from jax._src import distributed  # the coordinator's address and its table have no public name

from bilevel_jax.errors import Interrupted, RunError

PROCESS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SECONDS = 60  # that a connection may take
GRACE = 2.0  # seconds: what fails may have the same cause everywhere, and the death of another process comes first
DONE = b"."
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # a machine that is gone closes nothing: 25 seconds
_calls = itertools.count()


def join() -> None:
    """Joins the processes of this run on other machines, before JAX looks for devices: those that a cluster announces (Slurm, TPU
    pods, Kubernetes, Open MPI), or that the environment names by all of `PROCESS`. Where there is neither, a process is alone.

    Raises:
      ValueError: only some of the variables are set, or not to numbers where these are due.
    """
    address, *numbers = (os.environ.get(name) for name in PROCESS)
    if address or any(numbers):
        if not address or not all(number and number.isdigit() for number in numbers):
            raise ValueError(f"{', '.join(PROCESS)} must all be set: host:port, how many processes, and which of them, from 0")
        return jax.distributed.initialize(address, *map(int, numbers))
    try:
        jax.distributed.initialize()
    except ValueError as error:
        if "coordinator_address should be defined" not in str(error):  # how it says that there is no cluster
            raise


# --------------------------------------------------------------------------------------------------------------------
# Ending together
# --------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ending_together():
    """Around a run, in every process of it: should one die in there, all others end with one line and status 1, and should one
    fail, all end, each with its own error if it has one. Nothing for a process that is alone.

    Raises:
      RunError: another process cannot be reached.
    """
    if jax.process_count() == 1:
        yield
        return
    links, speaks = _connect(), threading.Event()
    watch = threading.Thread(target=_watch, args=(links, speaks), daemon=True)
    watch.start()
    # JAX aborts a process that lost its coordinator, as fast as the watch can tell why. This handler takes its signal's number, 6,
    # for seconds: time enough for the watch, and any other abort is only late.
    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGABRT, libc.sleep)
    try:
        yield
    except Interrupted:  # they have agreed on it
        _leave(links, watch)
        raise
    except BaseException:
        watch.join(GRACE)  # where an exchange was cut off, the watch knows why, and ends this process
        speaks.set()
        _tell(links, f"process {jax.process_index()} failed and says why".encode())
        atexit.register(_end, links)  # JAX would wait here for processes that are not coming
        raise
    _leave(links, watch)


def _leave(links, watch: threading.Thread) -> None:
    """Returns when all processes are done."""
    if jax.process_index():
        _tell(links, DONE)
    watch.join()
    if not jax.process_index():
        _tell(links, DONE)


def _connect() -> dict[socket.socket, str]:
    """This process's connections, and who is at their other ends: all others for the first one, the first one for all others."""
    state, key = distributed.global_state, f"bilevel_jax/{next(_calls)}"
    host = state.coordinator_address.rpartition(":")[0].strip("[]")
    try:
        if jax.process_index():
            port = int(state.client.blocking_key_value_get(key, 1000 * SECONDS))
            link = socket.create_connection((host, port), SECONDS)
            link.sendall(jax.process_index().to_bytes(4))
            links = {link: "process 0"}
        else:
            dual = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual else socket.AF_INET
            with socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=jax.process_count()) as server:
                state.client.key_value_set(key, str(server.getsockname()[1]))
                server.settimeout(SECONDS)
                found = [server.accept()[0] for _ in range(jax.process_count() - 1)]
            links = {link: f"process {int.from_bytes(link.recv(4, socket.MSG_WAITALL))}" for link in found}
    except (OSError, jax.errors.JaxRuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        atexit.register(_end, {})
        what = f"process {jax.process_index()} cannot connect to the others by way of {host} ({reason})"
        raise RunError(f"{what}; all machines of a run must be up and let each other connect") from error
    for link in links:
        link.settimeout(None)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):  # not on every system
                link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return links


def _tell(links, word: bytes) -> None:
    for link in links:
        with contextlib.suppress(OSError):  # it may be gone itself
            link.sendall(word)


def _heard(link: socket.socket) -> bytes:
    try:
        return link.recv(256)
    except OSError:
        return b""


def _watch(links: dict[socket.socket, str], speaks: threading.Event) -> None:
    """Waits for what the others have to say, and ends this process with the first that is not done but gone or failed, unless it
    speaks for itself."""
    with selectors.DefaultSelector() as selector:
        for link in links:
            selector.register(link, selectors.EVENT_READ)
        while selector.get_map():
            for ready, _ in selector.select():
                word = _heard(ready.fileobj)
                if word == DONE:
                    selector.unregister(ready.fileobj)
                    continue
                if speaks.wait(GRACE / 2 if word else 0):
                    return
                reason = word.decode(errors="replace") or f"{links[ready.fileobj]} died"
                _tell(links, reason.encode())
                told = "this one ends with it; start the same command on every machine again to go on from the last checkpoint"
                _speak_last(f"\nerror: {reason}, {told}\n")
                _end(links)


def _speak_last(line: str) -> None:
    """Writes to standard error what nobody adds to: JAX's runtime has its own word where it lost its coordinator."""
    sys.stderr.flush()
    error, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.write(error, line.encode())


def _end(links: dict[socket.socket, str]) -> None:
    """Ends this process without waiting for others. The first one goes last, since JAX aborts those that lose its coordinator."""
    if not jax.process_index():
        for link in links:
            link.settimeout(3 * GRACE)
            while _heard(link):
                pass  # until it is closed
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)

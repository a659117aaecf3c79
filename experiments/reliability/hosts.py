"""Two hosts on one machine: network namespaces with addresses and names of their own, joined by a link that can be cut.

It takes root, `ip` of iproute2 and `unshare` of util-linux. Everything that is made is removed at the end.
"""

import concurrent.futures
import contextlib
import os
import pathlib
import shutil
import subprocess
import time
from typing import NamedTuple

from experiments.reliability import kills, processes

PORT = 12351  # of the coordinator; every host has all ports
NETWORK = "10.213.77"  # of addresses that this machine does not use otherwise
COMMANDS = ("ip", "unshare")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def problem() -> str:
    """Why there can be no two hosts here; "" if there can be."""
    if missing := [name for name in COMMANDS if not shutil.which(name)]:
        return f"{' and '.join(missing)} not installed"
    name = f"bilevel-probe-{os.getpid()}"
    try:
        _run("ip", "netns", "add", name)
        _run("ip", "netns", "exec", name, "true")
    except subprocess.CalledProcessError as error:
        return f"ip netns is not permitted: {(error.stderr.strip() or 'no reason given').splitlines()[0]}"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return ""


class Hosts:
    """Two hosts, 0 and 1. Each has a link to the other and its loopback, and no other network."""

    def __init__(self):
        self.names = [f"bilevel-{os.getpid()}-{i}" for i in range(2)]
        self.addresses = [f"{NETWORK}.{i + 1}" for i in range(2)]

    def prefix(self, i: int) -> list[str]:
        """What a command starts with that runs on host i. Its process has the id of the command."""
        named = f'hostname {self.names[i]} && exec "$@"'
        return ["ip", "netns", "exec", self.names[i], "unshare", "--uts", "sh", "-c", named, "sh"]

    def cut(self) -> None:
        """Takes the link down, as if the cable was pulled."""
        self._set("down")

    def restore(self) -> None:
        """Takes the link up again."""
        self._set("up")

    def _set(self, state: str) -> None:
        # That of host 1 alone: host 0 sees the loss of the carrier, as at the other end of a cable.
        _run("ip", "-n", self.names[1], "link", "set", "cable", state)

    def _create(self) -> None:
        for name, address in zip(self.names, self.addresses):
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
            # `ip netns exec` shows this file as /etc/hosts. Gloo listens at the address of the host's own name.
            folder = pathlib.Path("/etc/netns", name)
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{address} {name}\n")
        _run("ip", "-n", self.names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", self.names[1])
        for name, address in zip(self.names, self.addresses):
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "cable")
            _run("ip", "-n", name, "link", "set", "cable", "up")

    def _remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(pathlib.Path("/etc/netns", name), ignore_errors=True)
        with contextlib.suppress(OSError):
            pathlib.Path("/etc/netns").rmdir()  # if it is empty


def _remove_stale() -> None:
    """Removes the hosts of processes that were killed."""
    for line in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.splitlines():
        name = line.split()[0]
        if (parts := name.split("-"))[0] == "bilevel" and parts[1].isdecimal() and not pathlib.Path("/proc", parts[1]).exists():
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(pathlib.Path("/etc/netns", name), ignore_errors=True)


@contextlib.contextmanager
def two_hosts():
    """Two hosts with a link between them, for as long as the context lasts."""
    hosts = Hosts()
    _remove_stale()
    try:
        hosts._create()
        yield hosts
    finally:
        hosts._remove()


# --------------------------------------------------------------------------------------------------------------------
# A run on both
# --------------------------------------------------------------------------------------------------------------------


class Fault(NamedTuple):
    """What a fault did to a run on two hosts."""

    name: str
    seconds: tuple[float, float]  # from the fault to the end of each process
    codes: tuple[int, int]  # exit statuses
    lines: tuple[str, str]  # last line of each process
    tracebacks: int


FAULTS = ("process 0 killed", "process 1 killed", "link cut")


def train(hosts: Hosts, workdir: pathlib.Path, settings: dict, fault: str = "", moment: tuple | None = None) -> Fault:
    """One attempt of a run with a process on each host, in a directory that both have.

    Args:
      hosts: the two.
      workdir: of the run.
      settings: config keys and values.
      fault: one of `FAULTS`, or "" for none.
      moment: of the fault, in the first process, or in the killed one; see `processes.train`.
    """
    struck = []

    def act(child) -> None:
        struck.append(time.monotonic())
        hosts.cut() if fault == FAULTS[2] else child.kill()

    victim = int(fault == FAULTS[1])
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        futures = []
        for i in range(2):
            process = (f"{hosts.addresses[0]}:{PORT}", "2", str(i))
            mine = moment if i == victim else None
            options = {"process": process, "act": act, "prefix": hosts.prefix(i)}
            futures.append(pool.submit(processes.train, workdir, settings, mine, **options))
        ended = [future.result() for future in futures]
    hosts.restore()
    seconds = tuple(round(one.at - struck[0], 1) if struck else 0.0 for one in ended)
    tracebacks = sum(one.output.count("Traceback") for one in ended)
    return Fault(fault, seconds, tuple(one.code for one in ended), tuple(map(processes.last_line, ended)), tracebacks)


def interrupt(directory: pathlib.Path, settings: dict, moment: tuple = ("train", 3, 0.1)) -> dict:
    """A run on two hosts with each of `FAULTS` in turn, compared with one that is left alone.

    Returns:
      `faults`, and the names of the files that differ at the end, `mismatches`.
    """
    outcomes = []
    with two_hosts() as hosts:
        undisturbed = train(hosts, directory / "hosts", settings)
        if any(undisturbed.codes):
            raise RuntimeError(f"the undisturbed run ended with statuses {undisturbed.codes}: {undisturbed.lines}")
        workdir = directory / "hosts_0"
        for fault in FAULTS:
            outcomes.append(train(hosts, workdir, settings, fault, moment)._asdict())
        last = train(hosts, workdir, settings)
    differing = [f"status {last.codes}: {last.lines}"] if any(last.codes) else []
    differing += kills.differing(kills.results(workdir), kills.results(directory / "hosts"))
    return {"faults": outcomes, "mismatches": differing}

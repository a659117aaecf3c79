"""How processes find each other, and how all of them end where one dies or fails, over loopback."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

from bilevel_jax.runtime import distributed

ROOT = pathlib.Path(__file__).parents[2]
# Of two processes, each in turn lives, fails, hangs or dies by SIGKILL, after both are under way.
MEMBER = """
import os, signal, sys, time
from bilevel_jax import cli, processes, sharding, workspace

def main():
    processes.join()
    with processes.ending_together():
        sharding.anywhere(False)
        print("under way", flush=True)
        if fate == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if fate == "fails":
            raise workspace.RunError("the disk is full")
        if fate == "hangs":
            time.sleep(60)
        if fate == "is done late":
            time.sleep(1)
        while fate == "waits":
            sharding.anywhere(False)

fate = sys.argv.pop()
cli.run(main)
"""
FATES = {  # what either does -> how the error of either begins, where it says something
    ("waits", "dies"): ("process 1 died, ", None),
    ("dies", "waits"): (None, "process 0 died, "),
    ("hangs", "dies"): ("process 1 died, ", None),
    ("waits", "fails"): ("process 1 failed and says why, ", "the disk is full"),
    ("fails", "hangs"): ("the disk is full", "process 0 failed and says why, "),
    ("fails", "fails"): ("the disk is full", "the disk is full"),
    ("is done", "is done late"): ("", ""),
}


def start(fate: str, address: str, number: int) -> subprocess.Popen:
    place = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(number), "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", MEMBER, fate], cwd=ROOT, env=os.environ | place, **pipes)


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


@pytest.mark.parametrize("fates", FATES, ids=", ".join)
def test_all_end_together(fates):
    """With status 1, in one line; quickly, where JAX itself takes minutes."""
    address = free_address()
    pair = [start(fate, address, number) for number, fate in enumerate(fates)]
    assert "under way\n" in iter(pair[0].stdout.readline, "")
    began = time.monotonic()
    told = [process.communicate(timeout=60) for process in pair]
    assert time.monotonic() - began < 20
    for fate, process, (_, errors), beginning in zip(fates, pair, told, FATES[fates]):
        lines = [line for line in errors.splitlines() if line.startswith("error: ") or "Traceback" in line]
        if beginning:
            assert process.returncode == 1 and len(lines) == 1 and lines[0].startswith(f"error: {beginning}"), errors
            assert errors.splitlines()[-1] == lines[0]  # whatever JAX itself may have said before
        else:
            assert process.returncode == (-9 if fate == "dies" else 0) and not lines, errors


@pytest.mark.parametrize(
    "variables, reason",
    [
        ({"JAX_COORDINATOR_ADDRESS": "localhost:1"}, "JAX_NUM_PROCESSES"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS"),
        ({"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID"),
    ],
)
def test_half_an_address_is_refused(monkeypatch, variables, reason):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=reason):
        distributed.join()


def test_a_process_that_is_alone_has_nothing_to_watch():
    with pytest.raises(KeyError), distributed.ending_together():
        raise KeyError

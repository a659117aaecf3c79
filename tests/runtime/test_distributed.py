"""How processes connect over loopback, and how all of them exit if one dies or fails."""

import json
import pathlib
import socket
import subprocess
import sys

import pytest

from bilevel_jax.runtime import distributed

ROOT = pathlib.Path(__file__).parents[2]
# Imports JAX once. For each line of its input, a JSON object, it forks two members, which join each other and then wait, fail, hang
# or die by SIGKILL. It prints their exit statuses, and the seconds from their start of work to the end of both.
SERVER = """
import json, os, pathlib, signal, sys, time
import jax
from bilevel_jax import cli, errors, sharding
from bilevel_jax.runtime import distributed

def member(fate, ready):
    distributed.join()
    with distributed.exit_together():
        any_process = sharding.AnyProcess()
        any_process(False), any_process(False)
        ready.touch()
        if fate in ("is stopped", "listens"):
            print("ANY", *(any_process(fate == "is stopped" and call == 1) for call in range(4)), flush=True)
        if fate == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if fate == "fails":
            raise errors.RunError("the disk is full")
        if fate == "hangs":
            time.sleep(60)
        if fate == "is done late":
            time.sleep(1)
        while fate == "waits":
            any_process(False)

for line in sys.stdin:
    task, children = json.loads(line), []
    ready = pathlib.Path(task["directory"], "ready")
    for number, fate in enumerate(task["fates"]):
        children.append(os.fork())
        if not children[-1]:
            output = os.open(f"{task['directory']}/{number}", os.O_WRONLY | os.O_CREAT)
            os.dup2(output, 1)
            os.dup2(output, 2)
            variables = dict(zip(distributed.VARIABLES, (task["address"], "2", str(number))))
            os.environ.update(variables)
            sys.argv = ["member"]
            cli.run(lambda: member(fate, ready))  # ends this process
    deadline = time.monotonic() + 60
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    began = time.monotonic()
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps([codes, time.monotonic() - began]), flush=True)
"""
FATES = {  # of both processes -> how the error of each begins; None: it is killed, "": it has no error
    ("waits", "dies"): ("process 1 died, ", None),
    ("dies", "waits"): (None, "process 0 died, "),
    ("hangs", "dies"): ("process 1 died, ", None),
    ("waits", "fails"): ("process 1 failed and prints the cause, ", "the disk is full"),
    ("fails", "hangs"): ("the disk is full", "process 0 failed and prints the cause, "),
    ("fails", "fails"): ("the disk is full", "the disk is full"),
    ("is done", "is done late"): ("", ""),
}


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("JAX_PLATFORMS", "cpu")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, **pipes) as process:
            yield process
            process.stdin.close()


def run_members(server, directory, fates) -> tuple[list[int], float]:
    """Exit statuses of two members, and seconds."""
    task = {"fates": fates, "address": free_address(), "directory": str(directory)}
    server.stdin.write(json.dumps(task) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


def test_what_is_true_in_one_process_is_known_to_both_a_call_later(server, tmp_path):
    codes, _ = run_members(server, tmp_path, ("is stopped", "listens"))
    for number in range(2):
        output = (tmp_path / str(number)).read_text()
        assert codes[number] == 0 and "ANY False False True False" in output, output


@pytest.mark.parametrize("fates", FATES, ids=", ".join)
def test_all_exit_together(server, tmp_path, fates):
    """With status 1 and one line, within seconds; JAX alone takes minutes."""
    codes, seconds = run_members(server, tmp_path, fates)
    assert (tmp_path / "ready").exists() and seconds < 20
    for number, (fate, code, beginning) in enumerate(zip(fates, codes, FATES[fates])):
        output = (tmp_path / str(number)).read_text()
        lines = [line for line in output.splitlines() if line.startswith("error: ") or "Traceback" in line]
        if beginning:
            assert code == 1 and len(lines) == 1 and lines[0].startswith(f"error: {beginning}"), output
            assert output.splitlines()[-1] == lines[0]  # JAX may print before
        else:
            assert code == (-9 if fate == "dies" else 0) and not lines, output


@pytest.mark.parametrize(
    "variables, reason",
    [
        ({"JAX_COORDINATOR_ADDRESS": "localhost:1"}, "JAX_NUM_PROCESSES"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS"),
        ({"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID"),
    ],
)
def test_incomplete_variables_are_refused(monkeypatch, variables, reason):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=reason):
        distributed.join()


def test_a_single_process_has_nothing_to_watch():
    with pytest.raises(KeyError), distributed.exit_together():
        raise KeyError

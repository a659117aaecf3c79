"""A run on two hosts, which are network namespaces with addresses and names of their own: a process is killed, the link is cut."""

import functools

import pytest

from experiments.reliability import hosts, kills, page

problem = functools.cache(hosts.problem)
SETTINGS = kills.SMALL | {"mesh.fsdp": 2, "num_epochs": 1, "data.num_lower": 80, "checkpoint.every": 2, "log.tensorboard": False}
DETECTED = 25  # seconds, see `distributed.KEEPALIVE`


@pytest.mark.long
def test_both_processes_end_in_one_line_and_the_pair_goes_on_to_the_same_bits(tmp_path):
    if problem():
        pytest.skip(problem())
    result = hosts.interrupt(tmp_path, SETTINGS)
    assert result["mismatches"] == []
    by_name = {fault["name"]: fault for fault in result["faults"]}
    assert list(by_name) == list(hosts.FAULTS)
    for victim in (0, 1):
        fault = by_name[f"process {victim} killed"]
        other = 1 - victim
        assert fault["codes"][victim] == -9 and fault["codes"][other] == 1
        assert fault["lines"][other].startswith(f"error: process {victim} died, so this process exits; ")
        assert fault["seconds"][other] < 10
    cut = by_name["link cut"]
    assert cut["codes"] == (1, 1)
    assert all(line.startswith(f"error: process {1 - i} cannot be reached, ") for i, line in enumerate(cut["lines"])), cut
    assert all(0.5 * DETECTED < seconds < DETECTED + 15 for seconds in cut["seconds"]), cut
    assert all(fault["tracebacks"] == 0 for fault in result["faults"])


def test_the_page_has_seconds_and_lines():
    fault = hosts.Fault("link cut", (25.1, 26.0), (1, 1), ("error: one", "error: other"), 0)
    lines = page.hosts_lines({"faults": [fault._asdict()], "mismatches": []})
    assert "| link cut | 25.1 s: error: one | 26.0 s: error: other |" in lines

"""The lock file of `make install` against setup.cfg: `make lock` after a change of the requirements."""

import configparser
import pathlib
import re

import pytest
from packaging import requirements, utils

ROOT = pathlib.Path(__file__).parents[1]
LOCKED_EXTRAS = ("dev", "smollm2")  # as in the Makefile


def locked() -> dict[str, tuple[str, int]]:
    """name -> (version, number of hashes), of the lines that hold for this Python and platform."""
    text = (ROOT / "third_party" / "requirements.lock").read_text()
    pins = {}
    for entry in re.split(r"\n(?=\S)", text.strip()):
        line = requirements.Requirement(entry.split(" \\\n")[0])
        if line.marker is None or line.marker.evaluate():
            (version,) = line.specifier
            assert version.operator == "=="
            pins[utils.canonicalize_name(line.name)] = version.version, entry.count("--hash=sha256:")
    return pins


def wanted() -> list[str]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    sections = [setup["options"]["install_requires"], *(setup["options.extras_require"][extra] for extra in LOCKED_EXTRAS)]
    return [line for section in sections for line in section.strip().splitlines()]


@pytest.mark.parametrize("line", wanted())
def test_a_requirement_is_locked_in_its_range(line):
    needed = requirements.Requirement(line)
    version, _ = locked()[utils.canonicalize_name(needed.name)]
    assert version in needed.specifier


def test_every_package_has_a_hash():
    pins = locked()
    assert len(pins) > 50 and min(hashes for _, hashes in pins.values()) > 0

"""Commands of `experiments` in the process of the test."""

import contextlib
import pathlib
import sys
from collections.abc import Sequence

import pytest
from absl import flags
from absl.testing import flagsaver

ROOT = pathlib.Path(__file__).parents[2]


@contextlib.contextmanager
def command_line(name: str, arguments: Sequence[str], *command_flags: flags.FlagValues):
    """Parses the flags of `python -m experiments.NAME ARGUMENTS`, as `cli.run` does; restores them at the end."""
    combined = flags.FlagValues()
    saved = [flagsaver.save_flag_values(values) for values in command_flags]
    for values in command_flags:
        combined.append_flag_values(values)
        values.mark_as_parsed()
        for name in values:
            if hasattr(values[name], "flag_values"):  # a config flag, which defines a flag for each --config.KEY
                values[name].flag_values = combined
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [name, *arguments])
            combined(sys.argv)
            yield
    finally:
        for values, before in zip(command_flags, saved):
            flagsaver.restore_flag_values(before, values)

"""Errors that end a run with one line."""

import signal

REMEDY = "the last checkpoint precedes this step. Lower the learning rates, or inspect the rows"


def first_line(error: BaseException) -> str:
    """The first line of the message of an error; its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(error: BaseException) -> str:
    """The type and the message of an error, as one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


class RunError(RuntimeError):
    """A run cannot start or continue. The message is one line with the cause and what to do."""


class Interrupted(Exception):
    """SIGTERM or SIGINT was received. The state is saved, and the same command continues the run.

    Args:
      message: one line that starts with the name of the signal.
      number: of the signal; commands exit with status 128 + number.
    """

    def __init__(self, message: str, number: int = signal.SIGTERM):
        super().__init__(message)
        self.number = number

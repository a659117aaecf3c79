"""Exceptions that end a run with one line for a person."""

REMEDY = "the last checkpoint precedes this step. Lower the learning rates, or inspect the rows"


class RunError(RuntimeError):
    """A run that cannot start or continue; the message is one line with the cause and what to do."""


class Interrupted(Exception):
    """SIGTERM or SIGINT arrived; everything is saved and the same command continues."""

"""Errors that end a run with one line."""

REMEDY = "the last checkpoint precedes this step. Lower the learning rates, or inspect the rows"


class RunError(RuntimeError):
    """A run cannot start or continue. The message is one line with the cause and what to do."""


class Interrupted(Exception):
    """SIGTERM or SIGINT was received. The state is saved, and the same command continues the run."""

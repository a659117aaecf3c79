"""Escapes control and bidirectional characters of untrusted text, so that it is safe to print."""

import sys
import unicodedata
from typing import IO, Any

ESCAPED_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format, surrogate and separator characters
NOT_ESCAPED = "\n\t\u200c\u200d"  # the last two join letters and parts of emoji


def visible(text: str) -> str:
    """Escapes characters that control a terminal or browser, such as `\\x1b` or `\\u202e`; line feeds and tabs stay."""

    def escape(c: str) -> str:
        controls = unicodedata.category(c) in ESCAPED_CATEGORIES and c not in NOT_ESCAPED
        return c.encode("unicode_escape").decode() if controls else c

    return "".join(map(escape, text))


def one_line(text: str, max_length: int) -> str:
    """The beginning of `text` as one escaped line of at most `max_length` characters."""
    line = " ".join(visible(text[: 8 * max_length]).split())
    complete = len(text) <= 8 * max_length and len(line) <= max_length
    return line if complete else line[: max_length - 1] + "…"


def is_first_process() -> bool:
    """Whether this is the first process of a run, or the only one."""
    jax = sys.modules.get("jax")  # processes that belong to one run have loaded it
    return jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0


def say(message: object = "", file: IO[str] | None = None, **options: Any) -> None:
    """Prints a message that contains something of the data, the model or the workdir, escaped.

    Args:
      message: what to print.
      file: a file to which every process prints, such as standard error; None: standard output, only in the first process of a run.
      options: as for `print`.
    """
    if file is not None or is_first_process():
        print(visible(str(message)), file=file, **options)

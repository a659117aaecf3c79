"""Limits for what comes from strangers: chat templates, and files that unpack to much more than their size."""

import contextlib
import io
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from typing import IO, Any

from bilevel_jax.data.rejections import DataError

SECONDS = 5.0  # for one row in a chat template
MEMORY = 1 << 29  # bytes that a chat template may take beyond what the process has
MAX_TEXT = 1 << 24  # characters of a rendered row
MAX_ROW = 1 << 26  # bytes of a row in a file
MAX_JSON = 1 << 31  # bytes of a file that is read as a whole
RATIO, FREE = 200, 1 << 28  # a file may unpack to RATIO times its size, and to FREE bytes in any case


class LimitError(OSError):
    """A limit is exceeded; the message is a part of a line."""


# --------------------------------------------------------------------------------------------------------------------
# Chat templates
# --------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def limited(seconds: float | None = None) -> Iterator[None]:
    """Ends a computation in Python that takes too long or too much memory.

    Only in the main thread, and for memory on Linux: elsewhere there are no signals, and no limit for this computation alone.

    Raises:
      LimitError: after `seconds`, by default SECONDS.
      MemoryError: where the process would grow by more than MEMORY.
    """
    with many(seconds), _Timer():
        yield


@contextlib.contextmanager
def many(seconds: float | None = None) -> Iterator[None]:
    """Sets up `limited` once for many calls of `render`, since that takes as long as a call. Each has time and memory to itself."""
    global _limits
    if threading.current_thread() is not threading.main_thread() or _limits is not None:
        yield
        return

    def stop(number, frame):
        raise LimitError(f"it takes more than {limit:g} seconds")

    limit = SECONDS if seconds is None else seconds
    handler, timer = signal.signal(signal.SIGALRM, stop), signal.setitimer(signal.ITIMER_REAL, 0)
    memory = resource.getrlimit(resource.RLIMIT_AS)
    try:
        _limits = _Limits(limit, memory)
        _limits.renew()
        yield
    finally:
        _limits = None
        resource.setrlimit(resource.RLIMIT_AS, memory)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)


class _Limits:
    """The limits that are in force."""

    def __init__(self, seconds: float, memory: tuple[int, int]):
        self.seconds, self._memory, self._written = seconds, memory, 0

    def renew(self) -> None:
        """Limits the growth of this process from now on to MEMORY bytes."""
        soft, hard = self._memory
        if sys.platform == "linux":
            with open("/proc/self/statm", encoding="ascii") as file:
                size = int(file.read().split()[0]) * resource.getpagesize() + MEMORY
            is_lower = soft == resource.RLIM_INFINITY or size < soft
            resource.setrlimit(resource.RLIMIT_AS, (size if is_lower else soft, hard))

    def count(self, text: str) -> None:
        """Notes a text that was written, so that what earlier ones take is not counted to the next ones."""
        self._written += len(text)
        if self._written > MEMORY >> 7:
            self._written = 0
            self.renew()


_limits: _Limits | None = None  # of this process, in its main thread


class _Timer:
    """Limits the time of a computation, where `many` is in force."""

    def __enter__(self) -> None:
        self._is_on = _limits is not None and threading.current_thread() is threading.main_thread()
        if _limits and self._is_on:
            signal.setitimer(signal.ITIMER_REAL, _limits.seconds)

    def __exit__(self, *error: object) -> None:
        if self._is_on:
            signal.setitimer(signal.ITIMER_REAL, 0)


def render(tokenizer, messages: list[dict], **options) -> str:
    """The text that the chat template of a tokenizer writes.

    Raises:
      LimitError: it takes too long, or the text is too long.
      Exception: whatever the template raises.
    """
    with _Timer() if _limits else limited():
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    if _limits:
        _limits.count(text)
    if len(text) > MAX_TEXT:
        raise LimitError(f"it writes {len(text)} characters, more than {MAX_TEXT}")
    text.encode()  # a template may write half a surrogate pair, which cannot be encoded
    return text


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


class Budget:
    """The bytes to which a file may unpack.

    Args:
      path: of the file.
    """

    def __init__(self, path: str):
        self._path, self._left = path, max(RATIO * os.path.getsize(path), FREE)

    def spend(self, size: int) -> None:
        """Counts unpacked bytes.

        Raises:
          DataError: there are too many.
        """
        self._left -= size
        if self._left < 0:
            limit = f"{RATIO} times its size and more than {FREE >> 20} MB"
            raise DataError(f"{self._path}: it unpacks to more than {limit}; unpack it yourself if you trust it")


class Unpacked(io.RawIOBase):
    """A stream of unpacked bytes, which are counted."""

    def __init__(self, stream: io.BufferedIOBase, budget: Budget):
        super().__init__()
        self._stream, self._budget = stream, budget

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        content = self._stream.read(len(buffer))
        self._budget.spend(len(content))
        buffer[: len(content)] = content
        return len(content)


def text_size(value: Any) -> int:
    """The length of all texts in a value of JSON."""
    if isinstance(value, (str, bytes)):
        return len(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(map(text_size, inner))


def lines(file: IO, path: str) -> Iterator:
    """The lines of a file, of bytes or text.

    Raises:
      DataError: a line is over MAX_ROW.
    """
    number = 0
    while line := file.readline(MAX_ROW + 1):
        number += 1
        if len(line) > MAX_ROW:
            raise DataError(f"{path}:{number}: a line of more than {MAX_ROW >> 20} MB; is it JSON Lines?")
        yield line

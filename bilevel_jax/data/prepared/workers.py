"""Prepares shards in processes of their own: `python -m bilevel_jax.data.prepared.workers` is one of them.

They import no JAX, start no threads of tokenizers, and never run the main module of this process again, as `multiprocessing` would.
A task goes in by standard input and its result comes back by standard output, both as pickles between these two processes. The
process that starts them does tasks too.
"""

import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import pickle
import queue
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from bilevel_jax import files
from bilevel_jax.data import templates
from bilevel_jax.data.prepared import shards
from bilevel_jax.data.prepared.stored import Shard
from bilevel_jax.data.rejections import DataError

ROOT = pathlib.Path(__file__).parents[2]  # from which the package is imported


class Task(NamedTuple):
    """A shard to prepare, or rows to count."""

    job: shards.Job
    chunk: shards.Chunk
    file: pathlib.Path | None  # None: only the contents of the usable rows are wanted


class OtherTokenizer(ValueError):
    """A process reads another tokenizer at the given place than the one that this process has."""


def tokenizer_digest(tokenizer) -> str:
    """Identifies a tokenizer with its chat template by content; "" if it has no form of the library `tokenizers`."""
    if not getattr(tokenizer, "is_fast", False):
        return ""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for name in ("truncation", "padding"):  # of the last call
        backend.pop(name, None)
    templates_of = tokenizer.chat_template
    names = {name: str(getattr(tokenizer, name, None)) for name in ("bos_token", "eos_token", "add_bos_token", "add_eos_token")}
    content = [type(tokenizer).__name__, backend, templates_of, names, sorted(tokenizer.all_special_tokens)]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def run(task: Task, encode_rows: Callable) -> np.ndarray | Shard:
    """Does a task.

    Args:
      task: what to do.
      encode_rows: from `templates.make_encoder`.
    """
    if task.file is None:
        return shards.scan(task.job, task.chunk)
    content, rows = shards.make(task.job, task.chunk, encode_rows)
    files.write_atomically(task.file, content)
    return Shard(rows, len(content), zlib.crc32(content))


def encoder(tokenizer, job: shards.Job) -> Callable:
    """The `encode_rows` of a job."""
    return templates.make_encoder(tokenizer, template=job.template, learn=job.learn)


# --------------------------------------------------------------------------------------------------------------------
# The processes
# --------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _encoder_of(job: shards.Job) -> Callable:
    tokenizer = templates.load_tokenizer(job.tokenizer)
    if tokenizer_digest(tokenizer) != job.tokenizer_digest:
        raise OtherTokenizer(f"the tokenizer at {job.tokenizer} is another one than that of this run")
    return encoder(tokenizer, job)


def serve() -> None:
    """Does the tasks of standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process ends this one
    tasks, results = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else may print between the results
    while True:
        try:
            task = pickle.load(tasks)
        except EOFError:
            return
        try:
            result: Any = run(task, _encoder_of(task.job))
        except Exception as error:  # the other process raises it
            result = _sendable(error)
        pickle.dump(result, results)
        results.flush()


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # of a library, with arguments of its own
        return ValueError(f"{type(error).__name__}: {error}")


class _Worker:
    """One process."""

    def __init__(self) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        variables = {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
        command = [sys.executable, "-m", "bilevel_jax.data.prepared.workers"]
        self._process = subprocess.Popen(command, stdin=-1, stdout=-1, env={**os.environ, **variables})
        self.is_ready = False  # whether it has given a result

    def run(self, task: Task) -> Any:
        assert self._process.stdin and self._process.stdout
        try:
            pickle.dump(task, self._process.stdin)
            self._process.stdin.flush()
            result = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            status = self._process.wait()
            what = (
                f"a process that prepares rows ended with status {status}{', perhaps for lack of memory' if status == -9 else ''}"
            )
            raise DataError(f"{what}; the same command goes on from there") from None
        self.is_ready = True
        if isinstance(result, Exception):
            raise result
        return result

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what was not written yet
                assert pipe
                pipe.close()


def _done_here(task: Task | Shard, encode_rows: Callable) -> concurrent.futures.Future:
    """The result of a task, or its error, which is raised in its turn."""
    future: concurrent.futures.Future = concurrent.futures.Future()
    try:
        future.set_result(run(task, encode_rows) if isinstance(task, Task) else task)
    except Exception as error:
        future.set_exception(error)
    return future


def in_order(tasks: Iterable[Task | Shard], number: int, encode_rows: Callable) -> Iterator[Any]:
    """Yields the result of every task in order; results among the tasks are yielded as they are.

    This process does tasks too: its tokenizer is loaded, while the others first import libraries and load it.

    Args:
      tasks: are read a few ahead.
      number: of processes, at most, with this one; each other is started when there is a task for it.
      encode_rows: of this process, from `encoder`.
    """
    with contextlib.ExitStack() as stack:
        free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        threads = stack.enter_context(concurrent.futures.ThreadPoolExecutor(number - 1))
        started: list[_Worker] = []

        @stack.callback
        def end() -> None:  # before the threads end, which may wait for them
            for worker in started:
                worker.end()

        def do(task: Task) -> Any:
            try:
                worker = free.get_nowait()
            except queue.Empty:
                started.append(worker := _Worker())
            try:
                return worker.run(task)
            finally:
                free.put(worker)

        pending: collections.deque[concurrent.futures.Future] = collections.deque()
        stack.callback(lambda: [future.cancel() for future in pending])
        others: list[concurrent.futures.Future] = []  # tasks of the other processes
        for task in tasks:
            others = [future for future in others if not future.done()]
            # A process that has given a result also has a task that waits for it; the first task of a process takes long.
            if isinstance(task, Task) and len(others) < number - 1 + sum(worker.is_ready for worker in started):
                others.append(threads.submit(do, task))
                pending.append(others[-1])
            else:
                pending.append(_done_here(task, encode_rows))
            while pending and pending[0].done():
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


if __name__ == "__main__":
    from bilevel_jax.data.prepared import workers  # so that its classes have the same name in both processes

    workers.serve()

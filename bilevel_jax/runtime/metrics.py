"""Writers of a run's metrics: metrics.jsonl, TensorBoard, Weights & Biases."""

import contextlib
import json
import pathlib
import secrets
import time

from bilevel_jax import files

RENAMED = {"online/another_chance": "online/correction_rate"}  # old key -> key, in files of earlier versions


def with_current_keys(values: dict) -> dict:
    """A summary or an event, possibly of an earlier version, with the current names of its keys."""
    return {RENAMED.get(key, key): value for key, value in values.items()}


class TensorBoardWriter:
    """Writes scalars to a TensorBoard event file.

    tensorboardX's `SummaryWriter` writes in a thread, and blocks forever if a full disk ended that thread.

    Args:
      directory: of the event file.
      purge_step: TensorBoard hides earlier events from this step on.
    """

    def __init__(self, directory: pathlib.Path, purge_step: int):
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2

        directory.mkdir(parents=True, exist_ok=True)
        self._scalar, self._event = summary.scalar, event_pb2.Event
        self._file = event_file_writer.EventsWriter(str(directory / "events"))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._file.write_event(self._event(wall_time=time.time(), step=purge_step, session_log=start))

    def write(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            scalar = self._scalar(key, float(value))
            self._file.write_event(self._event(wall_time=time.time(), step=step, summary=scalar))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class MetricsWriter:
    """Appends events to metrics.jsonl, and sends the same scalars to TensorBoard and Weights & Biases.

    Args:
      workdir: of the run.
      start: events after this step are removed from the file, because a resumed run writes them again; -1 removes all.
      tensorboard: whether to write TensorBoard files.
      wandb: project name; empty for none.
      config: shown in Weights & Biases.
    """

    def __init__(self, workdir: pathlib.Path, *, start: int, tensorboard: bool, wandb: str, config: dict):
        file = workdir / "metrics.jsonl"
        if file.exists():
            lines = [line for line in file.read_bytes().split(b"\n") if _step_of(line) <= start]
            files.write_atomically(file, b"".join(line + b"\n" for line in lines))
        self._file = open(file, "a", buffering=1)
        self._board = self._run = None
        if tensorboard:
            self._board = TensorBoardWriter(workdir / "tensorboard", purge_step=start + 1)
        if wandb:
            import wandb as service

            name, run_id = workdir.name, wandb_id(workdir)
            self._run = service.init(project=wandb, name=name, id=run_id, resume="allow", dir=str(workdir), config=config)

    def write(self, step: int, epoch: float, values: dict[str, float]) -> None:
        """Writes one event."""
        event = {"step": step, "epoch": round(epoch, 4)} | {key: float(value) for key, value in values.items()}
        self._file.write(files.to_json(event) + "\n")
        if self._board:
            self._board.write(step, values)
        if self._run:
            self._run.log({key: float(value) for key, value in values.items()}, step=step)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # closes all, also if one of them fails
            if self._run:
                stack.callback(self._run.finish)
            if self._board:
                stack.callback(self._board.close)
            stack.callback(self._file.close)


def wandb_id(workdir: pathlib.Path) -> str:
    """The id of a workdir's run in Weights & Biases: drawn once, since other workdirs may have the same name."""
    file = workdir / "wandb_id.txt"
    if not file.exists():
        files.write_atomically(file, secrets.token_hex(8))
    return file.read_text()


def _step_of(line: bytes) -> float:
    """The step of an event; infinite, so that the line is removed, if a crash cut it short."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")
    return step if isinstance(step, (int, float)) else float("inf")

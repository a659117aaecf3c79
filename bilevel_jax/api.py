"""The Python interface: `select` runs a selection, `Run` reads what it left. docs/python.md has examples.

Both work on a workdir, as the commands do: a run that was started here can be resumed, exported and reported by the commands, and
the other way round.
"""

import contextlib
import dataclasses
import html
import numbers
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from bilevel_jax import compilations  # JAX is imported in functions, after its cache of compiled programs is set
from bilevel_jax.errors import RunError


@contextlib.contextmanager
def started():
    """Caches compiled programs, and lets errors name arguments (`workdir`) instead of flags (`--workdir`)."""
    compilations.enable()
    try:
        yield
    except (ValueError, OSError, RunError) as error:
        if error.args == (str(error),):
            error.args = (re.sub(r"(?<!\S)--(?=[a-z])", "", str(error)),)
        raise


def select(upper: Any, lower: Any, model: Any = None, workdir: Any = None, *, overwrite: bool = False, **settings: Any) -> "Run":
    """Fine-tunes a model on two levels of rows, and learns a weight for each row of the lower one.

        run = bj.select(upper=trusted, lower=mixture, model="HuggingFaceTB/SmolLM2-135M-Instruct", num_epochs=2)
        run.weights, run.kept(0.8)

    The settings are those of `configs/finetune.py`: selection by influence on the trusted rows, without generation, a LoRA adapter
    of rank 16, 10% of each level held out for measurement, at most 200 rows.

    An interrupted call has saved its state; the same call continues it. A finished run of the same rows and settings is returned as
    it is.

    Args:
      upper: the rows that you trust, 20 or more. A list of objects with the fields of a schema (docs/data.md), such as
        `{"question": ..., "response": ...}`; a `datasets.Dataset`; a `pandas.DataFrame`; or what `data.upper` takes, such as the
        name of a file or a hub id.
      lower: the rows to select from, in the same forms.
      model: a model directory in Hugging Face format, or a hub id. None is the embedded model of 1M parameters, which is for trying
        things out.
      workdir: directory of the run. By default `runs/select-HASH` in the current directory, with a hash of rows and settings.
      overwrite: remove the run in `workdir`, with all files in the directory, and run again.
      **settings: keys of docs/configuration.md: at the top level (`num_epochs=2`), by section (`lora={"rank": 8}`), or with their
        full name (`**{"optimizer.learning_rate": 1e-4}`).

    Returns:
      The finished run.

    Raises:
      ConfigError: a setting does not exist, or cannot run; one line that names it and the nearest one.
      DataError, ModelError: rows or model cannot be used.
      RunError: the workdir holds another run, or training diverged.
      Interrupted: after SIGTERM or an interrupted cell, with everything saved.
    """
    with started():
        from bilevel_jax import inputs, train
        from bilevel_jax.runtime.workdir import refuse_another

        config = inputs.configure(model, settings)
        with inputs.read({"upper": upper, "lower": lower}) as levels:
            directory = pathlib.Path(os.path.abspath(workdir or inputs.default_workdir(config, levels)))
            if overwrite:
                inputs.remove_run(directory, config, levels)
            with inputs.stored(config, levels, directory):
                if (directory / "summary.json").exists():
                    refuse_another(config, directory)
                else:
                    train.run(config, directory)
        return Run(directory)


def _dataset(records: Iterable[Mapping]):
    """A `datasets.Dataset` of records, which are read twice, with null for what a record lacks.

    Raises:
      ValueError: a field has values that it cannot hold.
    """
    import datasets
    import pyarrow

    names = dict.fromkeys(name for record in records for name in record)
    columns: dict[str, list] = {name: [] for name in names}
    for record in records:
        for name, values in columns.items():
            values.append(record.get(name))
    try:
        return datasets.Dataset.from_dict(columns)
    except (pyarrow.ArrowException, OverflowError) as error:
        raise ValueError(f"a field has values that a Dataset cannot hold ({error})") from error


class Run:
    """A run in a workdir.

        run = bj.Run("runs/mine")    # of a command, or of an earlier call of `select`

    In a notebook it shows the closing table of the run, as `print(run)` does.

    Attributes:
      workdir: its directory.
    """

    def __init__(self, workdir: str | os.PathLike):
        """Opens a run.

        Raises:
          FileNotFoundError: the directory holds no run.
        """
        self.workdir = pathlib.Path(os.path.abspath(workdir))
        _ = self.config  # it exists, and can be read

    @property
    def config(self):
        """The settings of the run, an `ml_collections.ConfigDict`: `run.config.lora.rank`."""
        from bilevel_jax.runtime.workdir import read_config

        return read_config(self.workdir)

    @property
    def finished(self) -> bool:
        """Whether the run has reached its last step."""
        return (self.workdir / "summary.json").exists()

    @property
    def summary(self) -> dict[str, float]:
        """The numbers of summary.json: `eval/*`, `selector/*` and `time/*`; docs/report.md explains them."""
        from bilevel_jax.runtime import stored

        self._require_finished()
        return stored.read_summary(self.workdir)

    @property
    def adapter_path(self) -> pathlib.Path:
        """The adapter, a directory in PEFT's format: `PeftModel.from_pretrained(base, run.adapter_path)`.

        With `lora.rank=0` there is none; `run.workdir / "model"` is the model then.
        """
        self._require_finished()
        return self.workdir / "adapter"

    @property
    def weights(self):
        """The weights of the last epoch: a `pandas.DataFrame` with a line for each training row, in the order of the input.

        The index `row` is the position of the row in the list, table or file of the lower level, from 0, and goes on from file to
        file. Rows that were held out or could not be used are missing, but count. With `selection.unit="turn"` there is a line for
        each answer of a row, all with the position of the row. The columns:

            id                    hash of the content
            weight, rank          the mean weight is 1; the heaviest row has rank 1
            logit                 ω, whose softmax times the number of rows is the weight
            plausible, useful     how likely the model finds the response; how much the row helps the trusted rows, below 0 if it
                                  harms them; missing where they are not known
            similar               how much question and answer are like those of the trusted rows, 0 on average
            nearest               the trusted row that it is most like, by its index among those that the run trained on
            visits, masked        steps that used the row; whether the model answered its question itself
            source                the field of that name
            question, response    of the data

        Raises:
          FileNotFoundError: the run has no weights: no epoch is finished, or `method="mixing"`.
          DataError: the rows of the run are no longer there, or are others.
        """
        from bilevel_jax.data import matching, streaming
        from bilevel_jax.runtime import weight_table

        with started():
            table = weight_table.latest(self.workdir)
            if table is None:
                raise FileNotFoundError(f"{self.workdir} has no weights: no epoch is finished, or the method is direct mixing")
            texts = [None] * len(table)
            # `match` returns the rows alone, so they carry their position in place of their line.
            rows = (dataclasses.replace(row, line=position) for position, row in streaming.numbered(self.config))
            for index, row in matching.match(rows, table["id"]):
                texts[index] = row.line, row.question, row.response
            frame = table.to_pandas()
            positions, frame["question"], frame["response"] = zip(*texts)
            frame.index = list(positions)
            return frame.rename_axis("row")

    def kept(
        self,
        share: float = 0.8,
        *,
        drop_implausible: float = 0.0,
        drop_dissimilar: float = 0.0,
        refined: bool = False,
        format: str = "auto",
    ):
        """The rows with the largest weights, as `python -m bilevel_jax.export` writes them.

        Args:
          share: of the training rows, in (0, 1]: the heaviest; below one half chosen among the heaviest half, round-robin over
            the trusted rows that they are most like.
          drop_implausible, drop_dissimilar: shares of the rows to leave out whatever their weight, those with the smallest
            `plausible` and with the smallest `similar`; in [0, 1).
          refined: whether masked rows have the response of the model (`method="online"` and `"dynamic"`).
          format: `auto`, `chat`, `text` or `original`: the columns `prompt` and `completion` for TRL's SFTTrainer; see
            docs/export.md.

        Returns:
          A `datasets.Dataset` in the order of the input: the fields of the rows, `weight`, `rank` and the other columns of an
          export.

        Raises:
          ValueError: an argument is out of range, or a field has values that a Dataset cannot hold, such as some of several types.
          FileNotFoundError: the run is not finished.
        """
        from bilevel_jax.export import kept_rows, selected_rows

        with started():
            dropped = {"drop_implausible": drop_implausible, "drop_dissimilar": drop_dissimilar}
            for name, value in ({"share": share} | dropped).items():
                if not isinstance(value, numbers.Real):
                    raise ValueError(f"{name}={value!r} is not a number")
            if not 0 < share <= 1:
                raise ValueError(f"share={share} must be in (0, 1]")
            for name, value in dropped.items():
                if not 0 <= value < 1:
                    raise ValueError(f"{name}={value} must be in [0, 1)")
            if format not in selected_rows.FORMATS:
                raise ValueError(f"format={format!r} is not among {', '.join(selected_rows.FORMATS)}")
            self._require_finished()
            records = kept_rows.collect(
                self.workdir,
                self.config,
                keep=share,
                drop_implausible=drop_implausible,
                drop_dissimilar=drop_dissimilar,
                refined=refined,
                form=format,
            ).records
            return _dataset(records)

    def report(self) -> "Report":
        """The report of the run, which a notebook shows inline: losses, weights, sources, most and least trusted rows.

        It is written if it is missing or the run is not finished.
        """
        from bilevel_jax.report import page

        file = self.workdir / "report.html"
        if not (self.finished and file.exists()):
            with started():
                page.write(self.workdir)
        return Report(file)

    def _require_finished(self) -> None:
        if not self.finished:
            raise FileNotFoundError(f"{self.workdir} holds no finished run; the call that started it continues it")

    def __str__(self) -> str:
        from bilevel_jax.runtime import summary_table

        return summary_table.summary_table(self.summary, self.workdir) if self.finished else f"{self!r}, not finished"

    def __repr__(self) -> str:
        return f"Run({str(self.workdir)!r})"

    def _repr_pretty_(self, printer, cycle: bool) -> None:
        """What IPython shows."""
        del cycle
        printer.text(str(self))


class Report:
    """A report, one HTML page without references to other files.

    Attributes:
      path: the file.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def __repr__(self) -> str:
        return f"Report({str(self.path)!r})"

    def _repr_html_(self) -> str:
        """What IPython shows: the page in a frame, so that its styles do not reach the notebook."""
        page = html.escape(self.path.read_text(encoding="utf-8"))
        return f'<iframe srcdoc="{page}" width="100%" height="700" style="border: none"></iframe>'

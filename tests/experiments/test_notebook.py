"""The notebook in a clean kernel and a fresh copy of the repository, with fewer rows."""

import configparser
import fnmatch
import glob
import os
import pathlib
import shutil
import subprocess

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[2]
SMALLER = {  # in the first run
    "num_epochs": 2,  # in the first one no row comes back that lost weight, so no question is answered
    "data.num_upper": 120,
    "data.num_lower": 160,
    "data.max_length": 160,
    "log.every": 2,
}
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def shrink(book) -> None:
    """Fewer rows and epochs, short sequences, and the embedded model for the one of the hub; everything else stays as it is."""
    (first,) = [cell for cell in book.cells if 'workdir="runs/notebook"' in cell.source]
    first.source = first.source.replace(
        '    data={"num_upper": 2200, "num_lower": 2200, "max_length": 256},\n', f"    **{SMALLER},\n"
    )
    first.source = first.source.replace('"refresh_every": 30, "max_new_tokens": 128', '"refresh_every": 2, "max_new_tokens": 128')
    (model,) = [cell for cell in book.cells if MODEL in cell.source]
    model.source = model.source.replace(MODEL, "bilevel_jax/tiny")
    own = [cell for cell in book.cells if "lower=mixture" in cell.source]
    for cell in own:
        cell.source = cell.source.replace("lower=mixture", 'lower=mixture, num_epochs=1, data={"max_length": 128}')
    assert str(SMALLER) in first.source and '"refresh_every": 2,' in first.source and len(own) == 2


def install_cell(book) -> str:
    (cell,) = [cell for cell in book.cells if "def accelerator" in cell.source]
    return cell.source


@pytest.mark.parametrize(
    "shown, files, environment, extra",
    [
        ("| NVIDIA-SMI 580.65    CUDA Version: 13.0 |", (), {}, "[cuda13]"),
        ("| NVIDIA-SMI 550.54    CUDA Version: 12.4 |", (), {}, "[cuda12]"),
        ("NVIDIA-SMI has failed", ("/dev/accel0",), {}, "[cuda12]"),
        (None, ("/dev/accel0", "/dev/accel1"), {}, "[tpu]"),
        (None, ("/dev/vfio/0",), {}, "[tpu]"),
        (None, (), {"TPU_ACCELERATOR_TYPE": "v5litepod-8"}, "[tpu]"),
        (None, (), {}, ""),
    ],
)
def test_the_extra_is_that_of_the_machine(monkeypatch, shown, files, environment, extra):
    source = install_cell(nbformat.read(ROOT / "experiments" / "colab.ipynb", as_version=4))
    namespace = {}
    exec(source.split("if pathlib.Path")[0], namespace)  # without the magics
    done = subprocess.CompletedProcess("nvidia-smi", 0, stdout=shown)
    monkeypatch.setattr(shutil, "which", lambda name: shown and f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: done)
    monkeypatch.setattr(glob, "glob", lambda pattern: fnmatch.filter(files, pattern))
    monkeypatch.delenv("TPU_ACCELERATOR_TYPE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert namespace["accelerator"]() == extra
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert not extra or setup["options.extras_require"][extra.strip("[]")] == f"jax{extra}"


@pytest.mark.slow
def test_the_notebook_runs_from_start_to_finish(tmp_path, monkeypatch):
    for part in ("bilevel_jax", "configs"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE", "experiments/colab.ipynb"):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / part, tmp_path / part)
    monkeypatch.setenv("PIP_DRY_RUN", "1")  # pip finds what to install, but this environment stays as it is
    monkeypatch.setenv("PYTHONPATH", os.fspath(tmp_path))
    book = nbformat.read(ROOT / "experiments" / "colab.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in book.cells)
    shrink(book)
    nbclient.NotebookClient(book, timeout=900, resources={"metadata": {"path": tmp_path / "experiments"}}).execute()

    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "error:" not in text and "with its adapter" in text
    shown = [output.data for output in outputs if "data" in output]
    assert sum("held-out loss, nats per token" in data.get("text/plain", "") for data in shown) == 1
    assert sum("image/png" in data for data in shown) == 2  # loss and effective sample size
    pages = [data["text/html"] for data in shown if "text/html" in data]
    reports = [page for page in pages if page.startswith("<iframe")]
    tables = [page for page in pages if "<td>" in page]
    assert (len(reports), len(tables)) == (2, 4)  # of both models; weights, kept rows, refined rows, answers
    assert any("no idea" in data.get("text/plain", "") for data in shown)  # mean weights by response
    for name in ("notebook/report.html", "notebook/kept.jsonl", "merged/model.safetensors"):
        assert (tmp_path / "runs" / name).stat().st_size > 0

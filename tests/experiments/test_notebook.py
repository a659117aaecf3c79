"""The notebook in a clean kernel and a fresh copy of the repository, with fewer rows."""

import os
import pathlib
import shutil

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[2]
SMALLER = {
    "num_epochs": 1,
    "data.num_upper": 120,
    "data.num_lower": 160,
    "data.max_length": 160,
    "eval.num_upper": 16,
    "eval.num_lower": 16,
    "online.refresh_every": 2,  # nothing is masked before the first step
    "online.max_new_tokens": 16,
    "log.every": 2,
}


def shrink(book) -> None:
    """Adds changes of the config before the run; everything else stays as it is."""
    (cell,) = [cell for cell in book.cells if "train.run(config" in cell.source]
    cell.source = cell.source.replace("summary = train.run(", f"config.update_from_flattened_dict({SMALLER})\nsummary = train.run(")


@pytest.mark.slow
def test_the_notebook_runs_from_start_to_finish(tmp_path, monkeypatch):
    for part in ("bilevel_jax", "configs"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "experiments/colab.ipynb"):
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
    assert "held-out loss, nats per token" in text and "error:" not in text
    kinds = [kind for output in outputs for kind in output.get("data", ())]
    assert kinds.count("image/png") == 2  # loss and effective sample size
    tables = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", ())]
    assert len(tables) == 4 and "<iframe" in tables[0]  # the report, rows kept, rows refined, answers
    assert all("<td>" in table for table in tables[1:])
    workdir = tmp_path / "runs" / "notebook"
    for name in ("report.html", "kept.jsonl", "refined.jsonl", "merged/model.safetensors", "answers.jsonl"):
        assert (workdir / name).stat().st_size > 0

"""The notebook, as it is, in a clean kernel and a fresh copy of the repository."""

import os
import pathlib
import shutil

import nbclient
import nbformat

ROOT = pathlib.Path(__file__).parents[2]


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
    nbclient.NotebookClient(book, timeout=900, resources={"metadata": {"path": tmp_path / "experiments"}}).execute()

    said = {cell.id: cell.outputs for cell in book.cells if cell.cell_type == "code"}
    text = "".join(one.text for outputs in said.values() for one in outputs if one.output_type == "stream")
    assert "held-out loss, nats per token" in text and "error:" not in text
    kinds = [kind for outputs in said.values() for one in outputs for kind in one.get("data", ())]
    assert kinds.count("image/png") == 2  # loss and effective sample size
    tables = [one.data["text/html"] for outputs in said.values() for one in outputs if "text/html" in one.get("data", ())]
    assert len(tables) == 4 and "<iframe" in tables[0]  # the report, rows kept, rows refined, answers
    assert all("<td>" in table for table in tables[1:])
    left = tmp_path / "runs" / "notebook"
    for name in ("report.html", "kept.jsonl", "refined.jsonl", "merged/model.safetensors", "answers.jsonl"):
        assert (left / name).stat().st_size > 0

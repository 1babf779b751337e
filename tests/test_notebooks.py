"""The notebooks run from the first cell to the last, in a folder of their own."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from test_docs import broken_links


FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
SECONDS = 600


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    notebook = nbformat.read(FOLDER / name, as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=where).execute()
    last = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
    assert last.outputs


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_holds_no_outputs(name):
    """They would go stale, and name the machine that made them."""
    notebook = nbformat.read(FOLDER / name, as_version=4)
    assert [cell.outputs for cell in notebook.cells if cell.cell_type == "code" and cell.outputs] == []


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_links_of_a_notebook_lead_somewhere(name):
    notebook = nbformat.read(FOLDER / name, as_version=4)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert broken_links(FOLDER / name, prose) == []


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 2

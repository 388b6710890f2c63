"""examples/quickstart.ipynb, run from its first cell to its last on a CPU, with a tiny base."""

import os

import pytest

from tests.conftest import REPOSITORY, make_run_arguments

NOTEBOOK = REPOSITORY / "examples" / "quickstart.ipynb"


def test_notebook_goes_from_rows_to_an_answer(tiny_base, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = {tag: cell for cell in notebook.cells for tag in cell.metadata.get("tags", ())}
    _, _, *overrides = make_run_arguments(tmp_path, tiny_base)
    options = [word for word in overrides if not word.startswith("output_dir=")]
    cells["parameters"].source += f"\noptions = {' '.join(options)!r}\n"
    # A model with random weights does not end its turn, which the proof would report.
    cells["export"].source = cells["export"].source.replace("--force", "--force --quantization F32 --proof-rows 0")
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "its GGUF: tune2gguf export runs/quickstart" in printed
    assert "Q  Can I bring my dog on the boat?\n   " in printed
    assert any("<iframe srcdoc=" in output.data.get("text/html", "") for output in outputs if "data" in output)
    assert list(tmp_path.glob("tune2gguf-quickstart/runs/quickstart/export/*.gguf"))


def test_notebook_is_committed_without_outputs():
    assert '"outputs": []' in NOTEBOOK.read_text(encoding="utf-8")
    assert '"output_type"' not in NOTEBOOK.read_text(encoding="utf-8")

"""examples/notebook.ipynb, committed without outputs, runs from its first cell to its last and makes what it says."""

import ast
import json
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

REASON = "running notebooks takes nbformat, nbclient and ipykernel (extra: dev)"
nbformat = pytest.importorskip("nbformat", reason=REASON)
nbclient = pytest.importorskip("nbclient", reason=REASON)
pytest.importorskip("ipykernel", reason=REASON)
pytest.importorskip("skimage", reason="the notebook's images are scikit-image's")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples" / "notebook.ipynb"
# What a cell may import beside the standard library.
IMPORTED = {"medmax_fast", "IPython", "PIL", "numpy", "pyarrow", "skimage"}
# Seconds for one cell, on a machine with other work.
LIMIT = 300
FIGURES = ("reconstructions.png", "loss.png", "bars.png", "roofline.png")
FIGURES += ("store/histogram.png", "store/packing.png", "store/codes.png")


@pytest.fixture()
def notebook():
    found = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(found)
    return found


def code_of(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_is_committed_without_outputs(notebook):
    cells = code_of(notebook)
    assert len(cells) > 10 and len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
    assert "widgets" not in notebook.metadata


def test_it_needs_nothing_of_a_checkout(notebook):
    names = set()
    for cell in code_of(notebook):
        lines = [line for line in cell.source.splitlines() if not line.startswith("%")]
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.split(".")[0])
    assert names - set(sys.stdlib_module_names) == IMPORTED


def test_it_runs_and_makes_what_it_says(notebook, tmp_path, monkeypatch):
    # As in a checkout: beside the results, started in the folder of the notebook.
    (tmp_path / "examples").mkdir()
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "TMPDIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    # The kernel of this environment, whatever else the user has installed.
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    notebook.cells.append(nbformat.v4.new_code_cell("import sys\n\nsys.executable"))
    resources = {"metadata": {"path": str(tmp_path / "examples")}}
    nbclient.NotebookClient(notebook, timeout=LIMIT, kernel_name="python3", resources=resources).execute()
    *cells, last = code_of(notebook)
    assert Path(ast.literal_eval(last.outputs[0].data["text/plain"])) == Path(sys.executable)
    (work,) = (tmp_path / "TMPDIR").glob("medmax-notebook-*")
    for name in FIGURES:
        assert Image.open(work / name).width > 300, name
    shown = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    # Every figure, and the picture that is being drawn.
    assert len(shown) == len(FIGURES) + 1
    losses = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    for kind in ("text_loss", "image_loss"):
        assert losses[-1][kind] < losses[0][kind] / 4
    right = {}
    for name in ("before", "after"):
        tasks = json.loads((work / name / "results.json").read_text())["tasks"]
        right[name] = sum(task["accuracy"] * task["n"] for task in tasks.values())
    assert right["before"] < right["after"]
    assert (work / "report" / "report.html").stat().st_size > 100_000
    # All of it went where the notebook said, nothing beside it.
    assert not any((tmp_path / "examples").iterdir())

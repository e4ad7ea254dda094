"""Notebooks run from start to end, and each pair of files holds the same cells.

After a change of `NAME.py`, in `notebooks/`:

    jupytext --update --to ipynb NAME.py && jupyter-execute --inplace NAME.ipynb
"""

import os
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest


FOLDER = Path(__file__).parents[1] / "notebooks"
SCRIPTS = sorted(FOLDER.glob("*.py"))
# Small sizes, no display.
ENVIRONMENT = {**os.environ, "GRADFLOW_SMOKE": "1", "MPLBACKEND": "agg"}


def test_there_are_notebooks():
    assert SCRIPTS
    assert [p.stem for p in SCRIPTS] == [p.stem for p in sorted(FOLDER.glob("*.ipynb"))]


@pytest.mark.slow  # a minute each; continuous integration runs them
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_runs(script, tmp_path):
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "95 % interval" in done.stdout
    assert "Warning" not in done.stderr
    assert list(tmp_path.iterdir()) == []  # a notebook leaves no files behind


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_pair_holds_the_same_cells(script):
    text = jupytext.read(script)
    notebook = jupytext.read(script.with_suffix(".ipynb"))
    cells = lambda book: [(cell.cell_type, cell.source) for cell in book.cells]
    assert cells(notebook) == cells(text)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_outputs_are_kept(script):
    """The stored notebook was executed once from start to end, without errors, at full
    size, and names no machine."""
    path = script.with_suffix(".ipynb")
    code = [c for c in jupytext.read(path).cells if c.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    kinds = [output.output_type for output in outputs]
    assert "error" not in kinds
    assert any("image/png" in output.get("data", {}) for output in outputs)
    printed = "".join(output.get("text", "") for output in outputs)
    assert "of 256, 95 % interval" in printed
    assert "Warning" not in printed
    assert str(Path.home()) not in path.read_text()
    assert path.stat().st_size < 500_000


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_notebook_executes(script):
    """The notebook itself, in a Jupyter kernel, as `pytest --nbmake` runs it."""
    path = str(script.with_suffix(".ipynb"))
    options = ["-o", "addopts=", "-o", "filterwarnings=", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--nbmake", path, *options],
        cwd=FOLDER.parent,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout

"""The notebook runs in a fresh kernel, and the page of the documentation shows it as it is committed."""

import re
from pathlib import Path

import pytest

pytest.importorskip("nbclient")
pytest.importorskip("transformers")

from tests.examples import notebook


def test_runs_from_top_to_bottom(monkeypatch):
    """The assertions about memory and losses stand in its cells."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    executed = notebook.execute(notebook.read())
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum(cell.source.count("assert ") for cell in code) >= 8
    pictures = [output for cell in code for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2


def test_an_assertion_that_fails_ends_it():
    import nbformat
    from nbclient.exceptions import CellExecutionError

    broken = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 > 2, 'more memory than that'")])
    with pytest.raises(CellExecutionError, match="more memory than that"):
        notebook.execute(broken)


def test_is_committed_with_its_outputs_and_nothing_of_the_machine():
    code = [cell for cell in notebook.read().cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    text = notebook.NOTEBOOK.read_text("utf-8")
    assert len(text) < 200_000
    assert not re.search(rf"{Path.home()}/|site-packages|/tmp/|/home/|Traceback|Warning", text)
    assert {output.output_type for cell in code for output in cell.outputs} == {"stream", "display_data"}


def test_the_page_shows_the_notebook():
    text, pictures = notebook.page(notebook.read())
    assert notebook.PAGE.read_text("utf-8") == text, "python -m tests.examples.notebook --page writes it anew"
    assert {path.name: path.read_bytes() for path in notebook.PICTURES.iterdir()} == pictures

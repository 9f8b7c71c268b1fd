"""Runs the notebook of the examples, and writes the page of the documentation that shows it.

python -m tests.examples.notebook            # run it anew, then write its outputs and the page
python -m tests.examples.notebook --page     # write the page from the outputs that it has
"""

import argparse
import base64
import sys
import tempfile
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from traitlets.config import Config

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "from_full_logits_to_a_sharded_head.ipynb"
PAGE = ROOT / "docs" / "notebook.md"
PICTURES = ROOT / "docs" / "pictures" / "notebook"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
INTRODUCTION = """\
<!-- python -m tests.examples.notebook writes this page -->
The notebook is `{path}`.
It needs no GPU and takes about half a minute on 2 cores. Beside Jupyter it needs
`pip install '.[examples,transformers]'`.
"""


class Kernel(AsyncKernelManager):
    """This Python, whatever kernels are installed."""

    @property
    def kernel_spec(self) -> KernelSpec:
        command = [sys.executable, "-Xfrozen_modules=off", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="Python 3", language="python")


def read() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def execute(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Runs all cells in a fresh kernel, in the notebook's folder; the first error is raised."""
    with tempfile.TemporaryDirectory() as sockets:
        connection = {"transport": "ipc", "ip": f"{sockets}/kernel"}
        NotebookClient(
            notebook,
            timeout=600,
            startup_timeout=300,
            kernel_manager_class=Kernel,
            config=Config({"KernelManager": connection, "AsyncKernelManager": connection}),
            resources={"metadata": {"path": str(NOTEBOOK.parent)}},
        ).execute()
    return notebook


def save(notebook: nbformat.NotebookNode) -> None:
    """Without times, and without the version of Python."""
    notebook.metadata = METADATA
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
    nbformat.write(notebook, NOTEBOOK)


def page(notebook: nbformat.NotebookNode) -> tuple[str, dict[str, bytes]]:
    """The page as Markdown, and its pictures by their names."""
    title, *rest = notebook.cells
    introduction = INTRODUCTION.format(path=NOTEBOOK.relative_to(ROOT).as_posix())
    parts, pictures = [title.source, introduction.strip()], {}
    for cell in rest:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```py\n{cell.source}\n```")
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                about = cell.source.splitlines()[0].removeprefix("# ")
                parts.append(f"![{about}](pictures/notebook/{name})")
            else:
                text = output.text if output.output_type == "stream" else data["text/plain"]
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n", pictures


def write_page(notebook: nbformat.NotebookNode) -> None:
    text, pictures = page(notebook)
    PAGE.write_text(text, "utf-8")
    PICTURES.mkdir(parents=True, exist_ok=True)
    for old in PICTURES.glob("*.png"):
        old.unlink()
    for name, content in pictures.items():
        (PICTURES / name).write_bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="do not run the notebook")
    if not parser.parse_args().page:
        save(execute(read()))
    write_page(read())


if __name__ == "__main__":
    main()

"""Parts of a page in Markdown."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


class Table(NamedTuple):
    """A table's cells, as they are written."""

    header: list[str]
    rows: list[list[str]]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def run(page: Path) -> None:
    """The blocks marked ``python``, in order and in one namespace."""
    namespace: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), namespace)


def tables(page: Path) -> Iterator[Table]:
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for found in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        header, line, *rows = ([cell.strip() for cell in row.strip()[1:-1].split("|")] for row in found.splitlines())
        assert set("".join(line)) <= set("-:| "), line
        yield Table(header, rows)


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)

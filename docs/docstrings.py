"""An extension of griffe: the docstrings of the package as Markdown.

Examples become fenced blocks, ``::`` before a formula becomes a colon, and a public name between single backticks
becomes a link to its place in the reference.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = (  # where two of them have a name, a bare name is that of the first
    "chunked_ce",
    "chunked_ce.objectives",
    "chunked_ce.preference",
    "chunked_ce.plan",
    "chunked_ce.pipeline",
    "chunked_ce.sharded.costs",
    "chunked_ce.integrations.deepspeed",
    "chunked_ce.integrations.deepspeed_pipeline",
    "chunked_ce.integrations.transformers",
    "chunked_ce.integrations.trl",
    "chunked_ce.integrations.verl",
    "chunked_ce.integrations.torchtitan",
    "chunked_ce.integrations.liger",
    "chunked_ce.integrations.cce",
)
EXAMPLE = re.compile(r"^( *)>>> .*?(?=\n\s*\n|\Z)", re.DOTALL | re.MULTILINE)
NAME = re.compile(r"(?<![`\[\w])`([A-Za-z_][\w.]*)`(?!`)")


def public_names(module: str) -> list[str]:
    """``__all__`` of a module, which need not be importable here."""
    path = ROOT.joinpath(*module.split("."))
    text = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text("utf-8")
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    raise ValueError(f"{module} has no __all__")


def identifiers() -> dict[str, str]:
    """Where the reference has a name, by the forms in which docstrings write it."""
    found: dict[str, str] = {}
    for module in PUBLIC:
        for name in public_names(module):
            found.setdefault(name, f"{module}.{name}")
            found.setdefault(f"{module}.{name}", f"{module}.{name}")
    return found


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def __init__(self) -> None:
        super().__init__()
        self.identifiers = identifiers()

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Rewrite the docstring of ``obj``, if it has one."""
        if obj.docstring:
            obj.docstring.value = self.markdown(obj.docstring.value)

    def markdown(self, text: str) -> str:
        """``text`` in Markdown; sections such as ``Args:`` stay for griffe's parser."""
        text = re.sub(r"::(?=\n|$)", ":", text)
        text = re.sub(r"^( *(?:[\w, ]+: )?)>(?!>)", r"\1\\>", text, flags=re.MULTILINE)  # a bound, no quotation
        text = EXAMPLE.sub(lambda example: _fenced(example[0], example[1]), text)
        return NAME.sub(self._link, text)

    def _link(self, match: re.Match[str]) -> str:
        known = self.identifiers.get(match[1])
        return f"[`{match[1]}`][{known}]" if known else match[0]


def _fenced(example: str, indent: str) -> str:
    return f"{indent}```pycon\n{example}\n{indent}```"

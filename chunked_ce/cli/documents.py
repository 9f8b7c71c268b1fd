"""The JSON of measurements: its types, and the names in files that older versions wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "BUSY",
    "CASE_SIZES",
    "Document",
    "Result",
    "case_title",
    "modern",
    "ranks_text",
    "read_document",
    "status_of",
    "swept_size",
]

Document = dict[str, Any]  # the conditions, and the results of all implementations and cases
Result = dict[str, Any]  # one implementation on one case

CASE_SIZES = ("tokens", "hidden", "vocab", "chunk", "ignored", "dtype")
BUSY = "busy"  # the key of why a result is not to be trusted
_RENAMED = {
    "contestant": "implementation",
    "loss_error": "loss_error_nats",
    "hidden_grad_error": "hidden_grad_relative_error",
    "weight_grad_error": "weight_grad_relative_error",
}
_RENAMED_DATA = {"loss": "loss_nats", "entropy": "entropy_nats"}


def read_document(path: Path) -> Document:
    """The document in a file, with today's names.

    Raises ``ValueError`` if it is not the JSON of a measurement.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # no such file, not text, not JSON
        raise ValueError(f"{path} must be a file that chunked-ce bench --json wrote: {error}") from None
    results = document.get("results") if isinstance(document, dict) else None
    if not isinstance(results, list) or not isinstance(document.get("conditions"), dict):
        raise ValueError(f"{path} must be a file that chunked-ce bench --json wrote: it has no conditions and results")
    return modern(document)


def modern(document: Document) -> Document:
    """The document with the names that this version writes.

    >>> modern({"results": [{"contestant": "chunked_ce", "ratio": 1.1}]})["results"]
    [{'implementation': 'chunked_ce', 'ratio': 1.1}]
    """
    return document | {
        name: [{_renamed(key, value, renamed): value for key, value in row.items()} for row in document[name]]
        for name, renamed in (("results", _RENAMED), ("data", _RENAMED_DATA))
        if name in document
    }


def _renamed(key: str, value: object, renamed: dict[str, str]) -> str:
    if key == "loss" and isinstance(value, str):  # the name of one in what benchmarks.objectives wrote
        return "implementation"
    return renamed.get(key, key)


def case_title(result: Result) -> str:
    """The case of a result as people read it.

    >>> case_title({"tokens": 4096, "hidden": 256, "vocab": 32768, "dtype": "bf16", "ignored": 0.5})
    'N=4,096 D=256 V=32,768 bf16, 50% ignored'
    """
    chunk = f", chunks of {result['chunk']:,}" if result.get("chunk") else ""
    ignored = f", {result['ignored']:.0%} ignored" if result.get("ignored") else ""
    sizes = f"N={result['tokens']:,} D={result['hidden']:,} V={result['vocab']:,} {result['dtype']}"
    return f"{sizes}{chunk}{ignored}{ranks_text(result.get('ranks'))}"


def ranks_text(ranks: int | None) -> str:
    """The end of a title.

    >>> ranks_text(None), ranks_text(2)
    ('', ', 2 ranks')
    """
    return f", {ranks} rank{'s' * (ranks != 1)}" if ranks else ""


def status_of(result: Result) -> str:
    """What a table says beside a result: nothing, why it failed, or why it is not to be trusted."""
    status = str(result.get("status", "ok"))
    if status != "ok":
        return status
    return f"{BUSY}: {result[BUSY]}" if result.get(BUSY) else ""


def swept_size(results: Sequence[Result]) -> str | None:
    """The size that differs between results; None if there is one shape."""
    sizes = ("tokens", "vocab", "hidden", "chunk")
    return next((name for name in sizes if len({result.get(name) for result in results}) > 1), None)

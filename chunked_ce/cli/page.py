"""The results of ``chunked-ce bench`` as one HTML file, which loads nothing from elsewhere."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from chunked_ce.cli.plots import svg
from chunked_ce.cli.tables import COLUMNS, cells

__all__ = ["page", "save_page"]

_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 2em } caption { text-align: left; font-weight: 600 }
th, td { padding: .25em .8em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child, td:last-child { text-align: left }
img { max-width: 100% } .failed { color: #a00 } .dim { color: #777 }
"""

_LEGEND = {
    "x products": "time as a multiple of the three matrix products alone in the same round: the median over rounds, "
    "beside the least and the most",
    "peak MiB": "above the inputs, gradients included",
    "law MiB": "what chunked_ce's memory law, or the one for full logits, predicts",
    "dX error, dW error": "of the gradients against float64, root mean square, as a share of the gradient's own",
}


def save_page(document: dict[str, object], path: Path) -> None:
    """The results of ``chunked-ce bench``, with their pictures and the conditions, into a file."""
    path.write_text(page(document), encoding="utf-8")


def page(document: dict[str, object]) -> str:
    conditions, results = document["conditions"], document["results"]
    picture = base64.b64encode(svg(document).encode()).decode()
    facts = {name.replace("_", " "): value for name, value in conditions.items() if name != "versions"}
    facts |= conditions["versions"]
    cases = dict.fromkeys(map(_case, results))
    tables = "".join(_table(case, [row for row in results if _case(row) == case]) for case in cases)
    softmax = {
        str(note["case"]): f"{note['kind']}: loss {note['loss']}, entropy {note['entropy']} nats"
        for note in document["data"]
    }
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>chunked-ce bench</title>'
        f"<style>{_CSS}</style></head><body>\n"
        "<h1>Cross-entropy of a large vocabulary: time and memory</h1>\n"
        f'<p><img alt="Memory and time of every contestant" src="data:image/svg+xml;base64,{picture}"></p>\n'
        f"{tables}{_list('Columns', _LEGEND)}{_list('Conditions', facts)}{_list('Softmax', softmax)}"
        f"{_list('Left out', document['left_out'], empty='<li>nobody</li>')}</body></html>\n"
    )


def _case(row: dict[str, object]) -> str:
    chunk = f", chunks of {row['chunk']:,}" if row["chunk"] else ""
    ignored = f", {row['ignored']:.0%} ignored" if row["ignored"] else ""
    return f"N={row['tokens']:,} D={row['hidden']:,} V={row['vocab']:,} {row['dtype']}{chunk}{ignored}"


def _table(title: str, rows: Sequence[dict[str, object]]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in COLUMNS)
    body = "".join(
        f"<tr{'' if row['status'] == 'ok' else ' class=failed'}>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(row))
        + "</tr>\n"
        for row in rows
    )
    return (
        f"<table><caption>{html.escape(title)}</caption><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>\n"
    )


def _list(title: str, items: dict[str, object], empty: str = "") -> str:
    lines = "".join(f"<li><b>{html.escape(name)}</b>: {html.escape(str(value))}</li>" for name, value in items.items())
    return f"<h2>{title}</h2><ul>{lines or empty}</ul>\n"

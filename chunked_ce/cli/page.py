"""The results of ``chunked-ce bench`` as one HTML file, which loads nothing from elsewhere."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from chunked_ce.cli.documents import BUSY, Document, Result, case_title
from chunked_ce.cli.files import write_whole
from chunked_ce.cli.machine_load import ADVICE
from chunked_ce.cli.plots import COLORS, Style, legend, svg_panels, swept_of
from chunked_ce.cli.tables import cells, columns_of
from chunked_ce.cli.units import threads_text

__all__ = ["page", "save_page"]

_LIGHT, _DARK = (
    " ".join(f"--c{number}: {color};" for number, color in enumerate(colors))
    for colors in (COLORS.keys(), COLORS.values())
)
_CSS = f"""
:root {{ color-scheme: light dark; {_LIGHT} --back: #fff; --ink: #1b1f24; --soft: #5c6670; --rule: #dfe3e7;
  --failed: #a3162b; --busy: #7a5200; --raised: #f5f6f8 }}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} --back: #14171b; --ink: #e6e9ed; --soft: #a3adb7;
  --rule: #343a41; --failed: #ff8a96; --busy: #f0c24e; --raised: #1d2126 }} }}
* {{ box-sizing: border-box }}
body {{ margin: 0 auto; max-width: 76rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif;
  background: var(--back); color: var(--ink); overflow-wrap: anywhere }}
h1 {{ font-size: 1.5rem; line-height: 1.25; margin: .5rem 0 1rem }} h2 {{ font-size: 1.15rem; margin: 2rem 0 .5rem }}
pre, .scroll {{ overflow-x: auto; overflow-wrap: normal }}
pre {{ background: var(--raised); border-radius: .4rem; padding: .7rem .9rem; font-size: .85rem; line-height: 1.45;
  white-space: pre-wrap }}
.panels {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 1rem }}
.panels svg {{ width: 100%; height: auto; display: block }}
.legend {{ display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; margin: .5rem 0; padding: 0;
  font-size: .9rem }}
.legend svg {{ width: 2.2rem; height: .9rem; vertical-align: -.1rem; margin-right: .4rem }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; min-width: 100% }}
caption, th:first-child, td:first-child, td:last-child {{ text-align: left }}
th, td {{ padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap }}
th {{ color: var(--soft); font-weight: 600 }}
th:first-child, td:first-child {{ position: sticky; left: 0; background: var(--back); padding-left: 0 }}
.failed {{ color: var(--failed) }} .busy {{ color: var(--busy) }} .soft {{ color: var(--soft) }}
.notice {{ border-left: .25rem solid var(--busy); background: var(--raised); padding: .5rem .9rem; margin: 1rem 0 }}
dl {{ display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .25rem 1rem; margin: 0 }}
dt {{ color: var(--soft) }} dd {{ margin: 0 }}
@media (max-width: 40rem) {{ th:first-child, td:first-child {{ white-space: normal; min-width: 7.5rem }}
  dl {{ grid-template-columns: 1fr; gap: 0 }} dd {{ margin-bottom: .5rem }} }}
"""

_COLUMNS = {
    "x products": "time as a multiple of the matrix products alone in the same round: the median over rounds, beside "
    "the least and the most",
    "peak MiB": "above the inputs, gradients included",
    "law MiB": "what chunked_ce's memory law, or the one for full logits, predicts",
    "sent MiB": "what a rank sends in one step, where collectives go round a ring",
    "dX error, dW error": "of the gradients against float64, root mean square, as a share of the gradient's own",
    "busy": "other work on the machine disturbed the row; its point in a picture is hollow",
}


def save_page(document: Document, path: Path) -> None:
    """The results of ``chunked-ce bench``, with their pictures and the conditions, into a file."""
    write_whole(path, page(document))


def page(document: Document) -> str:
    """The page as text."""
    conditions, results = document["conditions"], document["results"]
    facts = {name.replace("_", " "): value for name, value in conditions.items() if name != "versions"}
    facts |= conditions["versions"]
    softmax = {
        str(note["case"]): f"{note['kind']}: loss {note['loss_nats']}, entropy {note['entropy_nats']} nats"
        for note in document["data"]
    }
    cases: dict[str, list[Result]] = {}
    for row in results:
        cases.setdefault(case_title(row), []).append(row)
    shown = columns_of(results)
    explained = {names: text for names, text in _COLUMNS.items() if names == BUSY or names.split(", ")[0] in shown}
    command = f"<pre>{html.escape(document['command'])}</pre>\n" if document.get("command") else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>chunked-ce bench</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_CSS}</style></head><body>\n'
        f"<h1>Time and memory of a loss over a large vocabulary</h1>\n{command}{_notices(document)}"
        f'<p class="soft">{html.escape(str(conditions["device"]))}, {threads_text(conditions["threads"])}, '
        f"{html.escape(str(conditions['date']))}</p>\n"
        f"{_legend(legend(document)) if swept_of(document) else ''}"
        f'<div class="panels">\n{"".join(svg for _, svg in svg_panels(document))}</div>\n'
        f"{''.join(_table(title, rows) for title, rows in cases.items())}"
        f"{_list('Columns', explained)}{_list('Conditions', facts)}{_list('Softmax of the inputs', softmax)}"
        f"{_list('Left out', document['left_out'])}</body></html>\n"
    )


def _notices(document: Document) -> str:
    results, planned = document["results"], document.get("planned")
    notices = list(document.get("notes", ()))
    if planned and not document["complete"]:
        wanted = len(planned["implementations"]) * len(planned["cases"])
        notices.append(f"The measurement ended early: {len(results)} of {wanted} results.")
    busy = sum(bool(row.get(BUSY)) for row in results)
    if busy:
        notices.append(f"{busy} of {len(results)} rows: {ADVICE}.")
    return "".join(f'<p class="notice">{html.escape(notice)}</p>\n' for notice in notices)


def _legend(entries: Mapping[str, Style]) -> str:
    return f'<ul class="legend">{"".join(_entry(name, style) for name, style in entries.items())}</ul>\n'


def _entry(name: str, style: Style) -> str:
    color = f"var(--c{list(COLORS).index(style.color)})"
    dashes = {"--": ' stroke-dasharray="6 3"', ":": ' stroke-dasharray="2 2"'}.get(style.line, "")
    line = f'<path d="M0 7H36" stroke="{color}" stroke-width="2"{dashes}/>' if style.line else ""
    solid, hollow = f'fill="{color}"', f'fill="none" stroke="{color}" stroke-width="1.5"'
    marker = {
        "o": f'<circle cx="18" cy="7" r="4" {solid}/>',
        "s": f'<path d="M14 3h8v8h-8z" {solid}/>',
        "x": f'<path d="M14 3l8 8m0-8l-8 8" {hollow}/>',
        "D": f'<path d="M18 2l5 5l-5 5l-5-5z" {hollow}/>',
    }.get(style.marker, f'<path d="M18 2l5 9h-10z" {solid}/>' if style.marker else "")
    return f'<li><svg viewBox="0 0 36 14" aria-hidden="true">{line}{marker}</svg>{html.escape(name)}</li>'


def _table(title: str, rows: Sequence[Result]) -> str:
    columns = columns_of(rows)  # a row is marked by its colour and in its last column
    body = "".join(f"<tr{_class(row)}>{_cells('td', cells(row, columns))}</tr>\n" for row in rows)
    return (
        f'<h2>{html.escape(title)}</h2>\n<div class="scroll" tabindex="0" role="region" '
        f'aria-label="{html.escape(title)}"><table><thead><tr>{_cells("th", columns)}</tr></thead><tbody>\n'
        f"{body}</tbody></table></div>\n"
    )


def _class(row: Result) -> str:
    if row["status"] != "ok":
        return ' class="failed"'
    return ' class="busy"' if row.get(BUSY) else ""


def _cells(kind: str, texts: Iterable[str]) -> str:
    return "".join(f"<{kind}>{html.escape(text)}</{kind}>" for text in texts)


def _list(title: str, items: Mapping[str, object]) -> str:
    lines = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>" for name, value in items.items())
    return f"<h2>{title}</h2><dl>{lines}</dl>\n" if items else ""

"""Memory and time of every implementation as a picture: lines against a size that was swept, or bars for one shape."""

from __future__ import annotations

import collections
import io
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from chunked_ce.cli.documents import BUSY, Document, Result, swept_size
from chunked_ce.cli.files import write_whole

__all__ = ["COLORS", "Panel", "Style", "figure", "legend", "save", "styles", "svg_panels", "swept_of"]

COLORS = {  # on a light background, and on a dark one
    "#0067b8": "#63b3ff",
    "#00868b": "#3fd0d4",
    "#6a3fc4": "#b8a1ff",
    "#2e8b2e": "#74d674",
    "#c2410c": "#ff9d61",
    "#b3123f": "#ff809f",
    "#8a6d00": "#e2c346",
    "#7a4a2b": "#d6a688",
    "#4f6475": "#a9bccb",
    "#b0249b": "#f08fe2",
    "#1b1f24": "#e6e9ed",  # text, and what everything else is compared with
    "#c9ced4": "#454c55",  # lines of the grid
}
_PALETTE = list(COLORS)[:-2]
INK, _RULE = list(COLORS)[-2:]
_SWEPT = {"tokens": "tokens N", "vocab": "vocabulary V", "hidden": "hidden size D", "chunk": "tokens in a chunk"}
_PRODUCTS = ("three products", "four products")  # what a time is compared with, and no loss
_MEMORY, _TIME = "peak_mib", "seconds"
_TITLES = {_MEMORY: "peak memory above the inputs, MiB", _TIME: "forward and backward, seconds"}
_FAR = {True: 2.5, False: 1.5}  # times the largest value: a limit beyond it is named, not drawn; of lines, of bars
_FONTS = {"font.size": 9.5, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}
_RC: dict[Any, Any] = _FONTS | {
    "axes.edgecolor": INK,
    "grid.color": _RULE,
    "axes.titlecolor": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "chunked-ce",
}


class Style(NamedTuple):
    """How an implementation is drawn, in pictures and legends alike."""

    color: str
    line: Literal["-", "--", ":", ""] = "-"
    marker: str = "o"


_NUMBER = FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}")
OUT_OF_MEMORY = Style(INK, "", "x")
UNFINISHED = Style(INK, "", "D")


class Panel(NamedTuple):
    """One picture: a dtype, and memory or time."""

    dtype: str
    measured: str

    @property
    def title(self) -> str:
        return f"{self.dtype}: {_TITLES[self.measured]}"


def styles(document: Document) -> dict[str, Style]:
    """The style of every implementation but the products, by its name."""
    names = [
        name for name in dict.fromkeys(row["implementation"] for row in document["results"]) if name not in _PRODUCTS
    ]
    markers = {True: "o^v", False: "sPX"}
    return {
        name: Style(
            _PALETTE[at % len(_PALETTE)],
            "-" if "chunked_ce" in name else "--",
            markers["chunked_ce" in name][at // len(_PALETTE) % 3],
        )
        for at, name in enumerate(names)
    }


def legend(document: Document) -> dict[str, Style]:
    """All that the pictures of a sweep show, by what it is called."""
    entries = styles(document)
    results = document["results"]
    products = [row["implementation"] for row in results if row["implementation"] in _PRODUCTS]
    entries |= {f"{name} alone": Style(INK, ":", "") for name in products[:1]}
    gaps = [gap for panel in panels(document) for name in styles(document) for gap in _gaps(document, panel, name)]
    if any(gap.out_of_memory for gap in gaps):
        entries["out of memory"] = OUT_OF_MEMORY
    if not all(gap.out_of_memory for gap in gaps):
        entries["not measured, or not to its end"] = UNFINISHED
    return entries


def panels(document: Document) -> list[Panel]:
    """Memory and time for each dtype."""
    dtypes = dict.fromkeys(row["dtype"] for row in document["results"])
    return [Panel(dtype, measured) for dtype in dtypes for measured in (_MEMORY, _TIME)]


def save(document: Document, path: Path) -> None:
    """Draw into a file, in the format that its ending names."""
    buffer = io.BytesIO()
    figure(document).savefig(buffer, dpi=150, format=path.suffix[1:].lower())
    write_whole(path, buffer.getvalue())


def figure(document: Document) -> Figure:
    """The results of ``chunked-ce bench``: a row for each dtype, memory to the left and time to the right."""
    with matplotlib.rc_context(_RC):
        all_panels = panels(document)
        drawn = Figure(figsize=(13, 2.3 * len(all_panels)), layout="constrained", facecolor="white")
        axes = drawn.subplots(len(all_panels) // 2, 2, squeeze=False).flat
        for at, panel in zip(axes, all_panels, strict=True):
            _draw(at, document, panel)
        if swept_of(document):
            entries = legend(document)
            handles = [
                Line2D(
                    [],
                    [],
                    color=style.color,
                    linestyle=style.line or "none",
                    marker=style.marker,
                    markersize=5,
                    fillstyle="none" if style == UNFINISHED else "full",
                )
                for style in entries.values()
            ]
            drawn.legend(handles, list(entries), loc="outside right center", frameon=False)
        conditions = document["conditions"]
        torch_version = conditions["versions"]["torch"]
        where = f"{conditions['device']}, torch {torch_version}, {conditions['date']}"
        drawn.suptitle(f"{_fixed(document['results'])}{where}", fontsize=10, color=INK)
    return drawn


def svg_panels(document: Document) -> Iterator[tuple[Panel, str]]:
    """Each panel as SVG to stand within HTML, whose colors are the variables ``--c0``, ``--c1`` ... of `COLORS`."""
    for place, panel in enumerate(panels(document)):
        with matplotlib.rc_context(_RC):
            bars = 0 if swept_of(document) else len(styles(document))
            drawn = Figure(figsize=(4.9, 3.4 + max(0, bars - 8) * 0.3), layout="constrained", facecolor="none")
            at = drawn.subplots()
            _draw(at, document, panel)
            buffer = io.StringIO()
            drawn.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        # Several pictures stand in one page, where an id must be that of one element.
        text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>p{place}-", text)
        for number, color in enumerate(COLORS):
            text = text.replace(color, f"var(--c{number})")
        text = text.replace("#ffffff", "var(--back)")
        text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{panel.title}">', text)
        yield panel, text


def swept_of(document: Document) -> str | None:
    """The size that differs between the cases that were planned, of which some may not have been measured."""
    return swept_size(document.get("planned", {}).get("cases") or document["results"])


def _fixed(results: Sequence[Result]) -> str:
    names = {"tokens": "N", "hidden": "D", "vocab": "V", "ranks": "ranks"}
    return "".join(
        f"{short}={results[0][name]:,}  "
        for name, short in names.items()
        if len({row.get(name) for row in results}) == 1 and results[0].get(name) is not None
    )


def _draw(at: Axes, document: Document, panel: Panel) -> None:
    results = [row for row in document["results"] if row["dtype"] == panel.dtype]
    limit = document.get("limits", {}).get("memory_mib") if panel.measured == _MEMORY else None
    swept = swept_of(document)
    values = [value for row in results if (value := _value(row, panel.measured)) is not None]
    notes = [panel.title]
    if limit and limit > max(values, default=limit) * _FAR[swept is not None]:
        notes.append(f"available: {limit:,} MiB, outside the picture")
        limit = None
    if swept:
        _lines(at, document, panel, swept, limit)
    else:
        notes += _bars(at, document, results, panel.measured, limit)
    at.set_title("\n".join(notes), fontsize=9.5)
    at.set_axisbelow(True)
    at.grid(visible=True, axis="both" if swept else "x")


def _value(row: Result, measured: str) -> float | None:
    """What is drawn: a value that was measured to its end, and not that of the products' memory."""
    if row.get("status", "ok") != "ok" or (row["implementation"] in _PRODUCTS and measured == _MEMORY):
        return None
    value = row.get(measured)
    return None if value is None else float(value)


class _Gap(NamedTuple):
    size: float
    out_of_memory: bool


def _planned_sizes(document: Document, dtype: str) -> list[float]:
    swept = swept_of(document)
    cases = document.get("planned", {}).get("cases") or document["results"]
    return sorted({case[swept] or 0 for case in cases if swept and case["dtype"] == dtype})


def _gaps(document: Document, panel: Panel, name: str) -> list[_Gap]:
    """Where an implementation of a sweep has no value, and why."""
    swept = swept_of(document)
    own = {row[swept] or 0: row for row in _rows_of(document, panel.dtype, name)} if swept else {}
    return [
        _Gap(size, str(own.get(size, {}).get("status", "")).startswith("out of memory"))
        for size in _planned_sizes(document, panel.dtype)
        if size not in own or _value(own[size], panel.measured) is None
    ]


def _rows_of(document: Document, dtype: str, name: str) -> list[Result]:
    return [row for row in document["results"] if row["dtype"] == dtype and row["implementation"] == name]


def _lines(at: Axes, document: Document, panel: Panel, swept: str, limit: float | None) -> None:
    sizes = _planned_sizes(document, panel.dtype)
    at.set_xscale("log", base=2)
    at.set_yscale("log")
    products = {row["implementation"]: Style(INK, ":", "") for row in document["results"]}
    for name, style in ({key: products[key] for key in _PRODUCTS if key in products} | styles(document)).items():
        rows = {row[swept] or 0: row for row in _rows_of(document, panel.dtype, name)}
        values = [_value(rows[size], panel.measured) if size in rows else None for size in sizes]
        drawn = [math.nan if value is None else value for value in values]
        label = f"{name} alone" if name in _PRODUCTS else name
        at.plot(sizes, drawn, style.line, color=style.color, marker=style.marker, markersize=4.5, label=label)
        busy = [(x, y) for x, y in zip(sizes, drawn, strict=True) if rows.get(x, {}).get(BUSY)]
        if busy and style.marker and panel.measured == _TIME:  # hollow: other work disturbed it
            hollow: dict[str, Any] = {"markerfacecolor": "white", "markeredgecolor": style.color}
            at.plot(*zip(*busy, strict=True), linestyle="", marker=style.marker, markersize=4.5, **hollow)
    _mark_gaps(at, document, panel)
    if limit:
        at.axhline(limit, color=INK, linestyle=(0, (1, 1)), linewidth=1.5)
        at.annotate(
            f"available: {limit:,} MiB",
            (0.02, limit),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=8,
        )
    at.set_xlabel(_SWEPT[swept])
    at.set_xticks(sizes, [f"{size:,}" for size in sizes], minor=False)
    at.xaxis.minorticks_off()
    at.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    at.yaxis.set_major_formatter(_NUMBER)
    at.yaxis.set_minor_formatter(NullFormatter())


def _mark_gaps(at: Axes, document: Document, panel: Panel) -> None:
    """A cross at the upper edge for out of memory, a diamond at the lower one for what has no value."""
    gaps = [(gap, style) for name, style in styles(document).items() for gap in _gaps(document, panel, name)]
    seen: collections.Counter[_Gap] = collections.Counter()
    for gap, style in gaps:
        seen[gap] += 1
        height = 1 - 0.05 * seen[gap] if gap.out_of_memory else 0.05 * seen[gap]
        sign = OUT_OF_MEMORY if gap.out_of_memory else UNFINISHED
        place: dict[str, Any] = {"transform": at.get_xaxis_transform(), "linestyle": "", "markersize": 6}
        at.plot([gap.size], [height], marker=sign.marker, color=style.color, fillstyle="none", **place)
    above, below = (
        0.06 * max((count for gap, count in seen.items() if gap.out_of_memory == out), default=0)
        for out in (True, False)
    )
    low, high = at.get_ylim()
    at.set_ylim(low * (low / high) ** below, high * (high / low) ** above)  # marks stand beside lines, not on them


def _bars(at: Axes, document: Document, results: Sequence[Result], measured: str, limit: float | None) -> list[str]:
    """A bar for each implementation; the answer says what the lines beside them are."""
    own = [row for row in results if row["implementation"] not in _PRODUCTS]
    values = [_value(row, measured) or 0.0 for row in own]
    colors = [styles(document)[row["implementation"]].color for row in own]
    at.barh([row["implementation"] for row in own], values, color=colors, height=0.7)
    for place, (row, value) in enumerate(zip(own, values, strict=True)):
        status = str(row.get("status", "ok"))
        failed = status if status != "ok" else "not measured"
        text = f" {value:,.0f}" if value >= 100 else f" {value:.3g}" if value else f" {failed}"
        busy = " (busy)" if row.get(BUSY) and value and measured == _TIME else ""
        at.text(value, place, text + busy, va="center", fontsize=8)
    products = {row["implementation"]: _value(row, measured) for row in results if row["implementation"] in _PRODUCTS}
    lines = {f"{name} alone, {value:.3g} s": value for name, value in products.items() if value is not None}
    lines |= {f"available, {limit:,} MiB": limit} if limit else {}
    for value in lines.values():
        at.axvline(value, color=INK, linestyle=":")
    at.invert_yaxis()
    at.set_xlim(0, max([*values, *lines.values(), 1e-9]) * 1.35)  # room for the words beside a bar
    at.xaxis.set_major_formatter(_NUMBER)
    return [f"dotted: {name}" for name in lines]

"""Memory and time of every implementation as a picture: lines against a size that was swept, or bars for one shape."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chunked_ce.cli.implementations import PRODUCTS
from chunked_ce.cli.report import GIB, MIB

__all__ = ["figure", "save", "svg"]

_SWEPT = {"tokens": "tokens N", "vocab": "vocabulary V", "hidden": "hidden size D", "chunk": "tokens in a chunk"}
_MEMORY, _TIME = "peak_mib", "seconds"
_MIB_IN_GIB = GIB / MIB


def save(document: dict[str, object], path: Path) -> None:
    """Draw into a file, in the format that its ending names."""
    figure(document).savefig(path, dpi=150)


def svg(document: dict[str, object]) -> str:
    """The picture as text."""
    buffer = io.StringIO()
    figure(document).savefig(buffer, format="svg")
    return buffer.getvalue()


def figure(document: dict[str, object]) -> Figure:
    """The results of ``chunked-ce bench``: a row for each dtype, memory to the left and time to the right."""
    results = document["results"]
    dtypes = list(dict.fromkeys(result["dtype"] for result in results))
    drawn = Figure(figsize=(13, 4.6 * len(dtypes)), layout="constrained")
    axes = drawn.subplots(len(dtypes), 2, squeeze=False)
    for row, dtype in zip(axes, dtypes, strict=True):
        of_dtype = [result for result in results if result["dtype"] == dtype]
        swept = swept_of(of_dtype)
        for at, measured in zip(row, (_MEMORY, _TIME), strict=True):
            limit = document["limits"]["memory_mib"] / _MIB_IN_GIB if measured == _MEMORY else None
            if swept:
                _lines(at, of_dtype, swept, measured, limit)
            else:
                _bars(at, of_dtype, measured, limit)
            title = "peak memory above the inputs" if measured == _MEMORY else "forward and backward"
            at.set_title(f"{title}, {dtype}")
            at.grid(alpha=0.3)
        if swept:
            lines = {line.get_label(): line for at in row for line in at.lines if line.get_label()[0] != "_"}
            where = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5), "fontsize": "small", "frameon": False}
            row[1].legend(lines.values(), lines.keys(), **where)
    conditions = document["conditions"]
    torch_version = conditions["versions"]["torch"]
    drawn.suptitle(f"{_fixed(results)}{conditions['device']}, torch {torch_version}, {conditions['date']}", fontsize=10)
    return drawn


def swept_of(results: Sequence[dict[str, object]]) -> str | None:
    """The size that differs between results; None if there is one shape."""
    return next((name for name in _SWEPT if len({result[name] for result in results}) > 1), None)


def _fixed(results: Sequence[dict[str, object]]) -> str:
    names = {"tokens": "N", "hidden": "D", "vocab": "V"}
    swept = swept_of(results)
    return "".join(f"{names[name]}={results[0][name]:,}  " for name in names if name != swept)


def _lines(at: Axes, results: Sequence[dict[str, object]], swept: str, measured: str, limit: float | None) -> None:
    for name in dict.fromkeys(result["contestant"] for result in results):
        own = sorted((r for r in results if r["contestant"] == name), key=lambda r: r[swept] or 0)
        points = [(r[swept], _scaled(r, measured)) for r in own if r.get(measured) is not None]
        failed = [r[swept] for r in own if str(r["status"]).startswith("out of memory")]
        if name == PRODUCTS:
            if measured == _TIME and points:
                at.plot(*zip(*points, strict=True), "k:", linewidth=2, label="limit: three products alone")
            continue
        style = "-o" if name.startswith("chunked_ce") else "--s"
        line = at.plot(*(zip(*points, strict=True) if points else ([], [])), style, label=name, markersize=4)[0]
        if failed and limit:  # out of memory: a cross at the limit
            at.plot(failed, [limit] * len(failed), "x", color=line.get_color(), markersize=8)
    if limit:
        at.axhline(limit, color="k", linestyle=":", linewidth=2, label="limit: memory there is")
    at.set_xscale("log", base=2)
    at.set_yscale("log")
    at.set_xlabel(_SWEPT[swept])
    at.set_ylabel("GiB" if measured == _MEMORY else "seconds")
    values = sorted({r[swept] for r in results if r[swept]})
    at.set_xticks(values, [f"{value:,}" for value in values], minor=False, fontsize="small")
    at.xaxis.minorticks_off()


def _bars(at: Axes, results: Sequence[dict[str, object]], measured: str, limit: float | None) -> None:
    own = [result for result in results if result["contestant"] != PRODUCTS]
    names = [result["contestant"] for result in own]
    values = [_scaled(result, measured) if result.get(measured) is not None else 0 for result in own]
    colors = ["tab:blue" if name.startswith("chunked_ce") else "tab:gray" for name in names]
    at.barh(names, values, color=colors)
    for place, (result, value) in enumerate(zip(own, values, strict=True)):
        text = f" {value:.3g}" if value else f" {result['status'] if result['status'] != 'ok' else 'not measured'}"
        at.text(value, place, text, va="center", fontsize="small")
    products = next((r for r in results if r["contestant"] == PRODUCTS and r.get(measured) is not None), None)
    if measured == _TIME and products:
        at.axvline(products[measured], color="k", linestyle=":", label="limit: three products alone")
    if limit:
        at.axvline(limit, color="k", linestyle=":", label="limit: memory there is")
        at.set_xscale("log")
    at.invert_yaxis()
    at.margins(x=0.15)
    at.set_xlabel("GiB" if measured == _MEMORY else "seconds")
    at.legend(fontsize="small", loc="lower right")


def _scaled(result: dict[str, object], measured: str) -> float:
    """In the unit that is drawn, GiB or seconds."""
    return result[measured] / _MIB_IN_GIB if measured == _MEMORY else result[measured]

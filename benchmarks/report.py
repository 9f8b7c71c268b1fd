"""Results for people: tables on the output, and the tables of README and docs from results in JSON.

python -m benchmarks.report benchmarks/results/vocabulary.json
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

from chunked_ce.cli.documents import Document, Result, modern, ranks_text
from chunked_ce.cli.report import MIB, conditions, conditions_text, dump

__all__ = ["MIB", "conditions", "dump", "markdown", "print_conditions", "print_table"]


def print_conditions(where: dict[str, object]) -> None:
    print(conditions_text(where), flush=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need; the first one to the left, the others to the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    for row in (header, *rows):
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join((first.strip().ljust(widths[0]), *others)), flush=True)


def markdown(document: Document) -> str:
    """The results of ``chunked-ce bench --json``, or of a script, as a table.

    There is a row for each implementation, and two columns for each case.

    The first is the time as a multiple of the three products, the second the peak in MiB, which the scripts that
    measure time alone leave out. One that failed says why; the time of one that other work disturbed is marked busy.
    """
    results = modern(document)["results"]
    if not any("ratio" in result for result in results):
        return f"{_conditions(document)}\n\n{_plain_table(results)}\n"
    cases = list(dict.fromkeys(map(_case, results)))
    columns = ["time", "MiB"] if any(result.get("peak_mib") is not None for result in results) else ["time"]
    header = ["implementation", *(f"{case}: {what}" for case in cases for what in columns)]
    lines = [header, ["---"] * len(header)]
    for name in dict.fromkeys(result["implementation"] for result in results):
        by_case = {_case(result): result for result in results if result["implementation"] == name}
        lines.append([name, *(cell for case in cases for cell in _cells(by_case.get(case))[: len(columns)])])
    return f"{_conditions(document)}\n\n{_lines(lines)}\n"


def _conditions(document: Document) -> str:
    """In lines as wide as those of the pages."""
    return "\n".join(textwrap.fill(line, 100) for line in conditions_text(document["conditions"]).splitlines())


def _plain_table(results: Sequence[Result]) -> str:
    """Every figure of every result, for scripts with figures of their own."""
    names = list(dict.fromkeys(name for result in results for name in result))
    rows = [["-" if result.get(name) is None else _text(result[name]) for name in names] for result in results]
    return _lines([[name.replace("_", " ") for name in names], ["---"] * len(names), *rows])


def _text(value: object) -> str:
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def _lines(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _case(result: Result) -> str:
    chunk = f" C={result['chunk']}" if result.get("chunk") else ""
    ignored = f", {result['ignored']:.0%} ignored" if result.get("ignored") else ""
    sizes = f"{result['tokens']} x {result['hidden']} x {result['vocab']}"
    return f"{sizes}{chunk} {result['dtype']}{ignored}{ranks_text(result.get('ranks'))}"


def _cells(result: Result | None) -> tuple[str, str]:
    if result is None:
        return "-", "-"
    if result.get("status", "ok") != "ok":
        return str(result["status"]), "-"
    peak = result.get("peak_mib")
    busy = " (busy)" if result.get("busy") else ""
    return f"{result['ratio']:.2f}{busy}", "-" if peak is None else f"{peak:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="files that chunked-ce bench --json wrote")
    for path in parser.parse_args().results:
        print(markdown(json.loads(path.read_text())))


if __name__ == "__main__":
    main()

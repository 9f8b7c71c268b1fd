"""Results for people: tables on the output, and the README's table from results in JSON.

python -m benchmarks.report benchmarks/results/bench_cpu.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

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


def markdown(document: dict[str, object]) -> str:
    """The results of ``chunked-ce bench --json`` as a table: a row for each implementation, two columns for each case.

    The first is the time as a multiple of the three products, the second the peak in MiB. One that failed says why.
    """
    results = document["results"]
    cases = list(dict.fromkeys(map(_case, results)))
    header = ["implementation", *(f"{case}: {what}" for case in cases for what in ("time", "MiB"))]
    lines = [header, ["---"] * len(header)]
    for name in dict.fromkeys(result["implementation"] for result in results):
        by_case = {_case(result): result for result in results if result["implementation"] == name}
        lines.append([name, *(cell for case in cases for cell in _cells(by_case.get(case)))])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{conditions_text(document['conditions'])}\n\n{text}\n"


def _case(result: dict[str, object]) -> str:
    chunk = f" C={result['chunk']}" if result.get("chunk") else ""
    ignored = f", {result['ignored']:.0%} ignored" if result.get("ignored") else ""
    return f"{result['tokens']} x {result['hidden']} x {result['vocab']}{chunk} {result['dtype']}{ignored}"


def _cells(result: dict[str, object] | None) -> tuple[str, str]:
    if result is None:
        return "-", "-"
    if result.get("status", "ok") != "ok":
        return str(result["status"]), "-"
    peak = result.get("peak_mib")
    return f"{result['ratio']:.2f}", "-" if peak is None else f"{peak:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="files that chunked-ce bench --json wrote")
    for path in parser.parse_args().results:
        print(markdown(json.loads(path.read_text())))


if __name__ == "__main__":
    main()

"""``chunked-ce bench --compare OLD NEW``: what became slower, larger or less exact from one measurement to another.

Times are compared as multiples of the matrix products in the same round, so that a quicker machine or a warmer one
changes both. A time is slower if its median grew by more than `MORE_TIME` and its rounds do not overlap with the old
ones; with fewer than three rounds, which say little about their spread, the growth has to be `MORE_TIME_OF_FEW`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import NamedTuple

from rich.console import Console

from chunked_ce.cli import files
from chunked_ce.cli.arguments import parser
from chunked_ce.cli.console import simple_table, wide_console
from chunked_ce.cli.documents import BUSY, CASE_SIZES, Document, Result, case_title, read_document

__all__ = ["Comparison", "Verdict", "compare", "conditions_that_differ", "run"]

MORE_TIME, MORE_TIME_OF_FEW = 1.05, 1.15
MORE_MEMORY, MEMORY_NOISE = 1.05, 4.0  # MiB: what pages and the C allocator change from run to run
MORE_ERROR = 1.5
_FEW = 3  # rounds
_GRADIENT_ERRORS = ("hidden_grad_relative_error", "weight_grad_relative_error")
_YARDSTICKS = ("three products", "four products")


class Verdict(NamedTuple):
    """Words for the table, and whether they are of a regression or of an improvement."""

    words: tuple[str, ...]
    regressed: bool = False
    improved: bool = False


class Comparison(NamedTuple):
    """One implementation on one case in both measurements."""

    implementation: str
    case: str
    old: Result
    new: Result
    verdict: Verdict

    def ratio(self, name: str) -> float | None:
        """New to old."""
        old, new = self.old.get(name), self.new.get(name)
        return new / old if old and new is not None else None


def run(arguments: argparse.Namespace) -> int:
    """Print the comparison; 1 if something regressed, else 0."""
    _refuse_others(arguments)
    old, new = (read_document(path) for path in arguments.compare)
    rows, missing = compare(old, new)
    if not rows:
        raise ValueError("--compare needs measurements of the same case and implementation: these two have none")
    differing = conditions_that_differ(old, new)
    regressed = [row for row in rows if row.verdict.regressed]
    if arguments.json:
        document = {
            "conditions": {"old": old["conditions"], "new": new["conditions"]},
            "differing_conditions": differing,
            "only_in_one": missing,
            "regressed": bool(regressed),
            "results": [_as_json(row) for row in rows],
        }
        files.dump(document, arguments.json)
    if arguments.json != "-":
        _print(rows, missing, differing, [path.name for path in arguments.compare], wide_console())
    return 1 if regressed else 0


def _refuse_others(arguments: argparse.Namespace) -> None:
    """Raise ``ValueError`` for options that would have no effect."""
    defaults = vars(parser().parse_args(["bench"])) | {"compare": arguments.compare, "json": arguments.json}
    others = [f"--{name.replace('_', '-')}" for name, value in vars(arguments).items() if value != defaults.get(name)]
    if others:
        raise ValueError(f"--compare measures nothing and takes --json alone, was given {', '.join(others)} too")


def compare(old: Document, new: Document) -> tuple[list[Comparison], list[str]]:
    """What both have in the old one's order, and what only one of them has, in words."""
    of_old, of_new = (_by_case(document) for document in (old, new))
    rows = [
        Comparison(name, case_title(of_old[key]), of_old[key], of_new[key], _verdict(of_old[key], of_new[key]))
        for key in of_old
        if key in of_new and (name := str(of_old[key]["implementation"])) not in _YARDSTICKS
    ]
    missing = [
        f"the {which} measurement ended early" for which, part in (("old", old), ("new", new)) if _ended_early(part)
    ]
    missing += [
        f"{row['implementation']}, {case_title(row)}: only in the {which} file"
        for which, own, others in (("old", of_old, of_new), ("new", of_new, of_old))
        for key, row in own.items()
        if key not in others
    ]
    return rows, missing


def _ended_early(document: Document) -> bool:
    return document.get("complete") is False


def _by_case(document: Document) -> dict[tuple[object, ...], Result]:
    names = ("implementation", *CASE_SIZES, "ranks")
    return {tuple(row.get(name) or None for name in names): row for row in document["results"]}


def _verdict(old: Result, new: Result) -> Verdict:
    before, after = (str(row.get("status", "ok")) for row in (old, new))
    if before != "ok" or after != "ok":
        if before == after:
            return Verdict((after,))
        return Verdict((f"{before} -> {after}",), regressed=before == "ok", improved=after == "ok")
    worse: list[str] = []
    better: list[str] = []
    words: list[str] = []
    if old.get(BUSY) or new.get(BUSY):
        which = " and ".join(name for name, row in (("old", old), ("new", new)) if row.get(BUSY))
        words.append(f"busy ({which}): the time is not counted")
    else:
        _judge(_slower(old, new), _slower(new, old), ("slower", "faster"), worse, better)
    _judge(_larger(old, new), _larger(new, old), ("more memory", "less memory"), worse, better)
    _judge(_less_exact(old, new), _less_exact(new, old), ("less exact", "more exact"), worse, better)
    return Verdict((*worse, *better, *words), bool(worse), bool(better))


def _judge(is_worse: bool, is_better: bool, words: tuple[str, str], worse: list[str], better: list[str]) -> None:
    if is_worse:
        worse.append(words[0].upper())
    elif is_better:
        better.append(words[1])


def _slower(old: Result, new: Result) -> bool:
    if old.get("ratio") is None or new.get("ratio") is None:
        return False
    few = min(old.get("rounds", 1), new.get("rounds", 1)) < _FEW
    grown = bool(new["ratio"] > old["ratio"] * (MORE_TIME_OF_FEW if few else MORE_TIME))
    least, most = (row[name if name in row else "ratio"] for row, name in ((new, "ratio_least"), (old, "ratio_most")))
    return grown and bool(least > most)


def _larger(old: Result, new: Result) -> bool:
    if old.get("peak_mib") is None or new.get("peak_mib") is None:
        return False
    return bool(new["peak_mib"] > max(old["peak_mib"] * MORE_MEMORY, old["peak_mib"] + MEMORY_NOISE))


def _less_exact(old: Result, new: Result) -> bool:
    errors: list[tuple[float | None, float | None]] = [(old.get(name), new.get(name)) for name in _GRADIENT_ERRORS]
    return any(after > before * MORE_ERROR for before, after in errors if before is not None and after is not None)


def conditions_that_differ(old: Document, new: Document) -> dict[str, tuple[object, object]]:
    """Devices, threads and versions by name, each old and new."""
    before, after = (
        {name: document["conditions"].get(name) for name in ("device", "threads")}
        | dict(document["conditions"].get("versions", {}))
        for document in (old, new)
    )
    return {name: (before.get(name), after.get(name)) for name in before | after if before.get(name) != after.get(name)}


def _as_json(row: Comparison) -> dict[str, object]:
    sizes = {name: row.old.get(name) for name in CASE_SIZES}
    return {
        "implementation": row.implementation,
        **sizes,
        "time_to_old": row.ratio("ratio"),
        "memory_to_old": row.ratio("peak_mib"),
        "verdict": list(row.verdict.words),
        "regressed": row.verdict.regressed,
    }


def _print(
    rows: list[Comparison],
    missing: list[str],
    differing: Mapping[str, tuple[object, object]],
    names: list[str],
    console: Console,
) -> None:
    old_name, new_name = names
    console.print(
        f"old: {old_name}, new: {new_name}; x products is the time as a multiple of the matrix products alone"
    )
    for name, (before, after) in differing.items():
        console.print(f"differs: {name}: {before} -> {after}", style="yellow", soft_wrap=True)
    columns = ("implementation", "old x", "new x", "time", "old MiB", "new MiB", "memory", "")
    for case in dict.fromkeys(row.case for row in rows):
        table = simple_table(case, columns, left=(columns[0], ""))
        for row in rows:
            if row.case == case:
                style = "red" if row.verdict.regressed else "green" if row.verdict.improved else None
                table.add_row(*_cells(row), style=style)
        console.print(table)
    for line in missing:
        console.print(line, style="dim", soft_wrap=True)
    regressed = sum(row.verdict.regressed for row in rows)
    uncounted = sum(bool(row.old.get(BUSY) or row.new.get(BUSY)) for row in rows)
    without = f"; the times of {uncounted} are not counted: a machine was busy" if uncounted else ""
    console.print(f"{regressed or 'none'} of {len(rows)} regressed{without}")


def _cells(row: Comparison) -> list[str]:
    numbers = (
        (row.old.get("ratio"), ".2f"),
        (row.new.get("ratio"), ".2f"),
        (row.ratio("ratio"), ".2f"),
        (row.old.get("peak_mib"), ",.0f"),
        (row.new.get("peak_mib"), ",.0f"),
        (row.ratio("peak_mib"), ".2f"),
    )
    texts = ("-" if number is None else format(number, form) for number, form in numbers)
    return [row.implementation, *texts, ", ".join(row.verdict.words)]

"""``chunked-ce check``: does the library compute the right thing on this machine, with this torch."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from chunked_ce.cli import files, objective_checks, process_checks, report
from chunked_ce.cli.console import progress_bar, simple_table, wide_console
from chunked_ce.cli.self_checks import Kernels, Row, cases
from chunked_ce.rows.backend import triton_runs

__all__ = ["run"]

_TIMEOUT = 180.0  # seconds for each part that runs in other processes
_TRITON: list[Kernels] = ["triton"]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Outcome(NamedTuple):
    """What was found until now: lists and dictionaries that grow."""

    rows: list[Row]
    failed: dict[str, str]  # the error of each part that did not end
    skipped: dict[str, str]  # the reason for each part

    @property
    def passed(self) -> bool:
        return not self.failed and not any(row.wrong for row in self.rows)


def run(arguments: argparse.Namespace) -> int:
    """Print every case's worst error; 1 if any is too large or a part failed, 130 if it was interrupted, else 0."""
    errors = wide_console(stderr=True)
    available = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    devices = arguments.device or available
    missing = sorted(set(devices) - set(available))
    if missing:
        raise ValueError(f"--device must be among those there are, {', '.join(available)}, was {missing[0]!r}")
    if arguments.json and arguments.json != "-":
        made = files.prepare(Path(arguments.json), "--json")
        if made is not None:
            errors.print(f"made the folder {made}", style="dim", soft_wrap=True)
    started, complete = time.monotonic(), False
    outcome = Outcome([], {}, {})
    try:
        _compare_all(list(parts(devices, arguments.no_processes, outcome.skipped)), outcome, errors)
        complete = True
    except KeyboardInterrupt:
        errors.print("ended early: the parts until then are kept", soft_wrap=True)
    seconds = time.monotonic() - started
    if arguments.json:
        document = {
            "conditions": report.conditions(devices[0]),
            "complete": complete,
            "passed": complete and outcome.passed,
            "seconds": round(seconds, 1),
            "failed": outcome.failed,
            "skipped": outcome.skipped,
            "results": [_as_json(row) for row in outcome.rows],
        }
        files.dump(document, arguments.json)
    if arguments.json != "-":
        _print(outcome, devices[0], seconds, complete=complete)
        if arguments.json:
            errors.print(f"wrote {arguments.json}", soft_wrap=True)
    return 130 if not complete else 0 if outcome.passed else 1


def _compare_all(planned: list[tuple[str, Callable[[], list[Row]]]], outcome: Outcome, errors: Console) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads would wait for each other longer than they work
    try:
        with progress_bar(errors) as progress:
            bar = progress.add_task("", total=len(planned))
            for done, (name, compute) in enumerate(planned):
                progress.update(bar, description=name, completed=done)
                try:
                    outcome.rows.extend(compute())
                except Exception as error:
                    outcome.failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            progress.update(bar, description="done", completed=len(planned))
    finally:
        torch.set_num_threads(threads)


def parts(devices: list[str], alone: bool, skipped: dict[str, str]) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    """The parts of the check by name; those that are left out are put into ``skipped``, with the reason."""
    for device in devices:
        for dtype in _DTYPES:
            backends: list[Kernels] = ["torch", *_TRITON * triton_runs(torch.device(device), dtype)]
            for backend in backends:
                name = f"{device}, {str(dtype).removeprefix('torch.')}, {backend} kernels"
                yield name, functools.partial(_on_device, device, dtype, backend)
    reason = "left out by --no-processes" if alone else None
    interpreter = "Triton's kernels in its interpreter"
    if torch.cuda.is_available():
        skipped[interpreter] = "they ran on the GPU"
    elif reason or importlib.util.find_spec("triton") is None:
        skipped[interpreter] = reason or "triton is not installed"
    else:
        yield interpreter, lambda: process_checks.interpreted_rows(_TIMEOUT)
    if reason or not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        skipped["two processes"] = reason or "this torch has no gloo"
        return
    yield "two gloo processes", lambda: process_checks.sharded_rows(_TIMEOUT)
    if importlib.util.find_spec("deepspeed") is None:
        skipped["DeepSpeed"] = "it is not installed"
    else:
        yield "DeepSpeed on two gloo processes", lambda: process_checks.deepspeed_rows(_TIMEOUT)


def _as_json(row: Row) -> dict[str, object]:
    """Errors are shares of the exact value's own size."""
    errors = {"relative_error": row.error, "plain_relative_error": row.plain, "allowed_relative_error": row.allowed}
    return {"case": row.case, "where": row.where, "quantity": row.quantity, **errors, "wrong": row.wrong}


def _on_device(device: str, dtype: torch.dtype, backend: Kernels) -> list[Row]:
    return [*cases(device, dtype, backend), *objective_checks.cases(device, dtype, backend)]


def _print(outcome: Outcome, device: str, seconds: float, *, complete: bool) -> None:
    console = wide_console()
    rows, failed = outcome.rows, outcome.failed
    console.print(report.conditions_text(report.conditions(device)), style="dim", soft_wrap=True)
    console.print(_table(rows))
    for name, reason in outcome.skipped.items():
        console.print(f"skipped {name}: {reason}", style="dim", soft_wrap=True)
    for name, reason in failed.items():
        console.print(f"failed {name}: {reason}", style="red", soft_wrap=True)
    wrong = sum(row.wrong for row in rows)
    verdict = f"WRONG: {wrong} errors are too large, {len(failed)} parts failed" if wrong or failed else "right"
    early = "" if complete else ", ended early"
    console.print(f"{len(rows)} comparisons in {seconds:.0f} s{early}: {verdict}")


def _table(rows: list[Row]) -> Table:
    """For each case and place the quantity whose error is the largest share of what is allowed."""
    worst: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = row.case, row.where.removesuffix(", forward").removesuffix(", backward")
        if key not in worst or not row.error / row.allowed <= worst[key].error / worst[key].allowed:
            worst[key] = row
    columns = ("case", "where", "worst", "error", "plain's own", "allowed", "")
    table = simple_table("the worst of each case, against float64", columns, left=("case", "where", "worst", ""))
    for (case, where), row in worst.items():
        way = row.where.removeprefix(where).removeprefix(", ")
        quantity = f"{row.quantity} ({way})" if way else row.quantity
        numbers = (f"{number:.1e}" for number in (row.error, row.plain, row.allowed))
        table.add_row(case, where, quantity, *numbers, "WRONG" if row.wrong else "", style="red" if row.wrong else None)
    return table

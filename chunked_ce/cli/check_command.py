"""``chunked-ce check``: does the library compute the right thing on this machine, with this torch."""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable, Iterator

import torch
from rich.table import Table

from chunked_ce.cli import objective_checks, process_checks, report
from chunked_ce.cli.console import simple_table, wide_console
from chunked_ce.cli.self_checks import Row, cases
from chunked_ce.rows.backend import triton_runs

__all__ = ["run"]

_TIMEOUT = 90.0  # seconds for each part that runs in other processes
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def run(arguments: argparse.Namespace) -> int:
    """Print every case's worst error; 1 if any is too large or a part failed, else 0."""
    errors = wide_console(stderr=True)
    available = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    devices = arguments.device or available
    missing = sorted(set(devices) - set(available))
    if missing:
        raise ValueError(f"--device must be among those there are, {', '.join(available)}, was {missing[0]!r}")
    started, rows, failed, skipped = time.monotonic(), [], {}, {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads would wait for each other longer than they work
    try:
        with errors.status("") as status:
            for name, compute in parts(devices, arguments.no_processes, skipped):
                status.update(name)
                try:
                    rows += compute()
                except Exception as error:
                    failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        torch.set_num_threads(threads)
    seconds = time.monotonic() - started
    passed = not failed and not any(row.wrong for row in rows)
    if arguments.json:
        document = {
            "conditions": report.conditions(devices[0]),
            "passed": passed,
            "seconds": round(seconds, 1),
            "failed": failed,
            "skipped": skipped,
            "results": [row._asdict() | {"wrong": row.wrong} for row in rows],
        }
        report.dump(document, arguments.json)
    if arguments.json != "-":
        _print(rows, failed, skipped, devices[0], seconds)
    return 0 if passed else 1


def parts(devices: list[str], alone: bool, skipped: dict[str, str]) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    """The parts of the check by name; those that are left out are put into ``skipped``, with the reason."""
    for device in devices:
        for dtype in _DTYPES:
            for backend in ["torch", "triton"] if triton_runs(torch.device(device), dtype) else ["torch"]:
                name = f"{device}, {str(dtype).removeprefix('torch.')}, {backend} kernels"
                yield name, lambda at=(device, dtype, backend): [*cases(*at), *objective_checks.cases(*at)]
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


def _print(rows: list[Row], failed: dict[str, str], skipped: dict[str, str], device: str, seconds: float) -> None:
    console = wide_console()
    console.print(report.conditions_text(report.conditions(device)), style="dim", soft_wrap=True)
    console.print(_table(rows))
    for name, reason in skipped.items():
        console.print(f"skipped {name}: {reason}", style="dim", soft_wrap=True)
    for name, reason in failed.items():
        console.print(f"failed {name}: {reason}", style="red", soft_wrap=True)
    wrong = sum(row.wrong for row in rows)
    verdict = f"WRONG: {wrong} errors are too large, {len(failed)} parts failed" if wrong or failed else "right"
    console.print(f"{len(rows)} comparisons in {seconds:.0f} s: {verdict}")


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

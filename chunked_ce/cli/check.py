"""``chunked-ce check``: does it compute the right thing on this machine, with this torch."""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable, Iterator

import torch
from rich.box import SIMPLE
from rich.table import Table

from chunked_ce.cli import ranks, report
from chunked_ce.cli.bench import wide_console
from chunked_ce.cli.checking import Row, cases

__all__ = ["run"]

_TIMEOUT = 90.0  # of what runs in other processes


def run(arguments: argparse.Namespace) -> int:
    """Print every case's worst error; 1 if any is too large or anything failed, else 0."""
    console, errors = wide_console(), wide_console(stderr=True)
    there = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    devices = arguments.device or there
    missing = sorted(set(devices) - set(there))
    if missing:
        raise ValueError(f"--device must be among those there are, {', '.join(there)}, was {missing[0]!r}")
    started, rows, failed, skipped = time.monotonic(), [], {}, {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads would wait for each other longer than they work
    try:
        with errors.status("") as status:
            for name, find in parts(devices, arguments.no_processes, skipped):
                status.update(name)
                try:
                    rows += find()
                except Exception as error:
                    failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        torch.set_num_threads(threads)
    wrong = [row for row in rows if row.wrong]
    passed = not wrong and not failed
    if arguments.json:
        document = {
            "conditions": report.conditions(devices[0]),
            "passed": passed,
            "seconds": round(time.monotonic() - started, 1),
            "failed": failed,
            "skipped": skipped,
            "results": [row._asdict() | {"wrong": row.wrong} for row in rows],
        }
        report.dump(document, arguments.json)
    if arguments.json != "-":
        console.print(report.conditions_text(report.conditions(devices[0])), style="dim", soft_wrap=True)
        console.print(_table(rows))
        for name, reason in skipped.items():
            console.print(f"skipped {name}: {reason}", style="dim", soft_wrap=True)
        for name, reason in failed.items():
            console.print(f"failed {name}: {reason}", style="red", soft_wrap=True)
        verdict = "right" if passed else f"WRONG: {len(wrong)} errors are too large, {len(failed)} parts failed"
        console.print(f"{len(rows)} comparisons in {time.monotonic() - started:.0f} s: {verdict}")
    return 0 if passed else 1


def parts(devices: list[str], alone: bool, skipped: dict[str, str]) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    """What is checked, by name, and in ``skipped`` what is not."""
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for backend in _backends(torch.device(device), dtype):
                name = f"{device}, {str(dtype).removeprefix('torch.')}, {backend} kernels"
                yield name, lambda at=(device, dtype, backend): list(cases(*at))
    reason = "left out by --no-processes" if alone else None
    interpreter = "Triton's kernels in its interpreter"
    if torch.cuda.is_available():
        skipped[interpreter] = "they ran on the GPU"
    elif reason or importlib.util.find_spec("triton") is None:
        skipped[interpreter] = reason or "triton is not installed"
    else:
        yield interpreter, lambda: ranks.interpreted_rows(_TIMEOUT)
    if reason or not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        skipped["two processes"] = reason or "this torch has no gloo"
        return
    yield "two gloo processes", lambda: ranks.sharded_rows(_TIMEOUT)
    if importlib.util.find_spec("deepspeed") is None:
        skipped["DeepSpeed"] = "it is not installed"
    else:
        yield "DeepSpeed on two gloo processes", lambda: ranks.deepspeed_rows(_TIMEOUT)


def _backends(device: torch.device, dtype: torch.dtype) -> list[str]:
    """The kernels' twins where both run, else the one that does."""
    from chunked_ce.engine.kernels import triton_runs

    return ["torch", "triton"] if triton_runs(device, dtype) else ["torch"]


def _table(rows: list[Row]) -> Table:
    """For each case and place the quantity that is nearest to what is allowed, or beyond it."""
    worst: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = row.case, row.where.removesuffix(", forward").removesuffix(", backward")
        if key not in worst or not row.error / row.allowed <= worst[key].error / worst[key].allowed:
            worst[key] = row
    table = Table(title="the worst of each case, against float64", title_justify="left", box=SIMPLE)
    for column in ("case", "where", "worst", "error", "plain's own", "allowed", ""):
        table.add_column(column, justify="right" if column in ("error", "plain's own", "allowed") else "left")
    for (case, where), row in worst.items():
        way = row.where.removeprefix(where).removeprefix(", ")
        quantity = f"{row.quantity} ({way})" if way else row.quantity
        numbers = (f"{number:.1e}" for number in (row.error, row.plain, row.allowed))
        table.add_row(case, where, quantity, *numbers, "WRONG" if row.wrong else "", style="red" if row.wrong else None)
    return table

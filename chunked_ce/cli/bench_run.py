"""The measurements of ``chunked-ce bench``, one after another, each in a process of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from chunked_ce.cli.console import progress_bar, simple_table
from chunked_ce.cli.documents import Document, Result
from chunked_ce.cli.machine_load import mark_busy
from chunked_ce.cli.measure import INTERRUPTED, Prepared, measure, not_measured, prepared
from chunked_ce.cli.tables import cells, columns_of
from chunked_ce.cli.worker import Task, Worker

__all__ = ["Request", "measure_all"]


class Request(NamedTuple):
    """What to measure."""

    cases: Sequence[Task]
    implementations: Sequence[str]
    data: str  # "random" or "trained"
    kind: str  # the same for people, or the file that holds the tensors
    errors: bool  # compare with float64
    timeout: float  # seconds, per implementation and case


def measure_all(request: Request, document: Document, errors: Console, out: Console, save: Callable[[], None]) -> None:
    """Add to the document's results, and to its data the softmax of each case; ``save`` is called after each result.

    Raises ``KeyboardInterrupt`` after Ctrl-C, when what was measured until then has been added and printed.
    """
    with tempfile.TemporaryDirectory(prefix="chunked-ce-") as folder, progress_bar(errors) as progress:
        steps = max((case.rounds for case in request.cases), default=0) + 1  # the rounds and the peak memory
        bar = progress.add_task("", total=len(request.cases) * len(request.implementations) * steps)
        save()
        for case in request.cases:
            rows: list[Result] = []
            note: dict[str, Any] = {}
            try:
                progress.update(bar, description=f"{case.title}: inputs")
                ready = _prepared(request, case, Path(folder))
                if isinstance(ready, Prepared):
                    softmax = {f"{name}_nats": value for name, value in ready.softmax.items()}
                    note = {"case": case.title, "kind": request.kind, **softmax}
                    document["data"].append(note)
                for name in request.implementations:
                    done = len(document["results"]) * steps
                    progress.update(bar, description=f"{case.title}: {name}", completed=done)
                    row = _measured(case, ready, name, request.timeout, lambda: progress.advance(bar))
                    rows.append(row)
                    document["results"].append(row)
                    save()
                    if row["status"] == INTERRUPTED:
                        raise KeyboardInterrupt
            finally:
                if rows:
                    mark_busy(document["results"])
                    out.print(_table(rows, case.title, note))
        progress.update(bar, description="done", completed=len(document["results"]) * steps)


def _prepared(request: Request, case: Task, folder: Path) -> Prepared | str:
    with Worker(case.device) as worker:
        return prepared(worker, case, request.data, folder, errors=request.errors, timeout=request.timeout)


def _measured(case: Task, ready: Prepared | str, name: str, timeout: float, tick: Callable[[], None]) -> Result:
    if isinstance(ready, str):
        return not_measured(case._replace(implementation=name), ready)
    with Worker(case.device, case.ranks) as worker:
        return measure(worker, ready.task._replace(implementation=name), timeout, tick)


def _table(rows: Sequence[Result], title: str, note: dict[str, Any]) -> Table:
    softmax = f"loss {note['loss_nats']}, entropy {note['entropy_nats']} nats" if note else ""
    columns = columns_of(rows)
    table = simple_table(title, columns, left=(columns[0], ""), caption=softmax)
    for column in table.columns[:-1]:  # only the reason of a failure may wrap
        column.no_wrap = True
    for row in rows:
        style = "red" if row["status"] != "ok" else "yellow" if row.get("busy") else None
        table.add_row(*cells(row, columns), style=style)
    return table

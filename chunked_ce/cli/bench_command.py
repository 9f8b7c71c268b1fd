"""``chunked-ce bench``: time, memory and errors of every implementation on this machine."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from chunked_ce.cli import memory, report
from chunked_ce.cli.console import simple_table, wide_console
from chunked_ce.cli.heads import head_of
from chunked_ce.cli.implementations import CROSS_ENTROPY, DEVICE, PRODUCTS, select
from chunked_ce.cli.measure import INTERRUPTED, Prepared, Result, measure, not_measured, prepared
from chunked_ce.cli.synthetic_inputs import load
from chunked_ce.cli.tables import COLUMNS, cells
from chunked_ce.cli.worker import Task, Worker

__all__ = ["run"]

_DEFAULTS = {"cpu": (2048, 768, 50257), "cuda": (8192, 2304, 256000)}  # N, D, V


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write the files; 130 if it was interrupted, else 0."""
    cases = cases_of(arguments)
    chunk_only = bool(arguments.sweep and arguments.sweep[0] == "chunk")
    names, missing = select(arguments.only, kind=arguments.loss, chunk_only=chunk_only)
    _check_files(arguments)
    conditions = report.conditions()
    console, errors = wide_console(), wide_console(stderr=True)
    out = errors if arguments.json == "-" else console
    out.print(report.conditions_text(conditions), style="dim", soft_wrap=True)
    for name, reason in missing.items():
        out.print(f"left out {name}: {reason}", style="dim", soft_wrap=True)
    results, notes, interrupted = _measure_all(cases, names, arguments, errors, out)
    document = {
        "conditions": conditions,
        "limits": {"memory_mib": round((arguments.memory_limit or memory.total(DEVICE)) / report.MIB)},
        "left_out": missing,
        "data": notes,
        "results": results,
    }
    _write_files(document, arguments, out)
    return 130 if interrupted else 0


def cases_of(arguments: argparse.Namespace) -> list[Task]:
    """One task per dtype and value of the sweep, each for the products as yet."""
    tokens, hidden, vocab = _shape(arguments)
    base = {"tokens": tokens, "hidden": hidden, "vocab": vocab, "chunk": arguments.chunk}
    name, values = arguments.sweep or ("tokens", [tokens])
    if arguments.sweep and arguments.tensors:
        raise ValueError("--sweep needs tensors that it can make, --tensors gives one shape: use one of them")
    return [
        Task(
            implementation=PRODUCTS,
            dtype=dtype,
            device=DEVICE,
            ignored=arguments.ignored,
            tensors=arguments.tensors and str(arguments.tensors),
            rounds=arguments.rounds,
            memory_limit=arguments.memory_limit,
            **base | {name: value},
        )
        for dtype in arguments.dtype or (("fp32", "bf16") if DEVICE == "cpu" else ("bf16",))
        for value in values
    ]


def _shape(arguments: argparse.Namespace) -> tuple[int, int, int]:
    """N, D and V."""
    if arguments.tensors:
        hidden, weight, _ = load(arguments.tensors, None)
        return *hidden.shape, len(weight)
    head = head_of(arguments)
    tokens, *sizes = _DEFAULTS[DEVICE]
    hidden, vocab = (head.hidden, head.vocab) if head else sizes
    return arguments.tokens or tokens, arguments.hidden or hidden, arguments.vocab or vocab


def _measure_all(
    cases: list[Task], names: list[str], arguments: argparse.Namespace, errors: Console, out: Console
) -> tuple[list[Result], list[dict[str, object]], bool]:
    """The results, the loss and entropy of each case's softmax, and whether Ctrl-C ended the measurement."""
    results: list[Result] = []
    notes: list[dict[str, object]] = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    steps = arguments.rounds + 1  # the rounds and the peak memory
    with tempfile.TemporaryDirectory(prefix="chunked-ce-") as folder, Progress(*columns, console=errors) as progress:
        bar = progress.add_task("", total=len(cases) * len(names) * steps)
        for case in cases:
            rows: list[Result] = []
            interrupted = False
            try:
                progress.update(bar, description=f"{case.title}: inputs")
                ready = _prepared(case, arguments, Path(folder))
                if isinstance(ready, Prepared):
                    kind = f"from {arguments.tensors.name}" if arguments.tensors else arguments.data
                    notes.append({"case": case.title, "kind": kind} | ready.softmax)
                for name in names:
                    done = (len(results) + len(rows)) * steps
                    progress.update(bar, description=f"{case.title}: {name}", completed=done)
                    rows.append(_measured(case, ready, name, arguments.timeout, lambda: progress.advance(bar)))
                    if rows[-1]["status"] == INTERRUPTED:
                        raise KeyboardInterrupt
            except KeyboardInterrupt:
                interrupted = True
            results += rows
            if rows:
                out.print(_table(rows, case.title, notes[-1] if notes else {}))
            if interrupted:
                errors.print("interrupted: what was measured until then is kept")
                return results, notes, True
        progress.update(bar, description="done", completed=len(cases) * len(names) * steps)
    return results, notes, False


def _prepared(case: Task, arguments: argparse.Namespace, folder: Path) -> Prepared | str:
    with Worker(case.device) as worker:
        # The float64 reference is that of cross-entropy; `chunked-ce check` compares the others.
        errors, timeout = not arguments.no_errors and arguments.loss == CROSS_ENTROPY, arguments.timeout
        return prepared(worker, case, arguments.data, folder, errors=errors, timeout=timeout)


def _measured(case: Task, ready: Prepared | str, name: str, timeout: float, tick: Callable[[], None]) -> Result:
    if isinstance(ready, str):
        return not_measured(case._replace(implementation=name), ready)
    with Worker(case.device) as worker:
        return measure(worker, ready.task._replace(implementation=name), timeout, tick)


def _table(rows: list[Result], title: str, note: dict[str, object]) -> Table:
    softmax = f"loss {note['loss']}, entropy {note['entropy']} nats" if note else ""
    table = simple_table(title, COLUMNS, left=("contestant", ""), caption=softmax)
    for column in table.columns[:-1]:  # only the reason of a failure may wrap
        column.no_wrap = True
    for row in rows:
        table.add_row(*cells(row), style="red" if row["status"] != "ok" else None)
    return table


def _write_files(document: dict[str, object], arguments: argparse.Namespace, out: Console) -> None:
    """JSON always, pictures only of results. The modules that draw are imported here, because they need matplotlib."""
    if arguments.json:
        report.dump(document, arguments.json)
    if not document["results"]:
        return
    if arguments.plot:
        from chunked_ce.cli.plots import save

        save(document, arguments.plot)
    if arguments.html:
        from chunked_ce.cli.page import save_page

        save_page(document, arguments.html)
    for path in filter(None, (arguments.plot, arguments.html)):
        out.print(f"wrote {path}", soft_wrap=True)


def _check_files(arguments: argparse.Namespace) -> None:
    """Raise ``ValueError`` for a file that cannot be written, before anything is measured."""
    if arguments.plot:
        _check_ending(arguments.plot)
    for name in ("json", "plot", "html"):
        path = getattr(arguments, name)
        if path and str(path) != "-":
            try:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                Path(path).touch()
            except OSError as error:
                raise ValueError(f"--{name} must be a file that can be written: {error}") from None


def _check_ending(path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    allowed = sorted(FigureCanvasAgg.get_supported_filetypes())
    if path.suffix[1:].lower() not in allowed:
        raise ValueError(f"--plot must end with one of {', '.join('.' + kind for kind in allowed)}, was {path}")

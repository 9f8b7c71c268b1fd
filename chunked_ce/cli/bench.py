"""``chunked-ce bench``: what every contestant takes on this machine, beside what the memory law says."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from chunked_ce.cli import memory, report
from chunked_ce.cli.contestants import CONTESTANTS, DEVICE, LOSSES, PRODUCTS, why_not
from chunked_ce.cli.heads import HEADS, head_of_config
from chunked_ce.cli.measure import Result, measure, not_measured, prepared
from chunked_ce.cli.worker import Task, Worker

__all__ = ["COLUMNS", "cells", "run"]

_DEFAULTS = {"cpu": (2048, 768, 50257), "cuda": (8192, 2304, 256000)}  # N, D, V

COLUMNS = ("contestant", "seconds", "x products", "least", "most", "peak MiB", "law MiB", "dX error", "dW error", "")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write the files; 130 if it was interrupted, else 0."""
    cases = cases_of(arguments)
    contestants, missing = contestants_of(
        arguments.only, chunk_only=bool(arguments.sweep and arguments.sweep[0] == "chunk")
    )
    _writable(arguments)
    found = report.conditions()
    console, errors = wide_console(), wide_console(stderr=True)
    out = errors if arguments.json == "-" else console
    out.print(report.conditions_text(found), style="dim", soft_wrap=True)
    for contestant, reason in missing.items():
        out.print(f"left out {contestant}: {reason}", style="dim", soft_wrap=True)
    results, notes, interrupted = _measure_all(cases, contestants, arguments, errors, out)
    document = {
        "conditions": found,
        "limits": {"memory_mib": round((arguments.memory_limit or memory.total(DEVICE)) / report.MIB)},
        "left_out": missing,
        "data": notes,
        "results": results,
    }
    if arguments.json:
        report.dump(document, arguments.json)
    if arguments.plot and results:
        from chunked_ce.cli.plots import save

        save(document, arguments.plot)
    if arguments.html and results:
        from chunked_ce.cli.page import save_page

        save_page(document, arguments.html)
    for path in (arguments.plot, arguments.html):
        if path and results:
            out.print(f"wrote {path}", soft_wrap=True)
    return 130 if interrupted else 0


def wide_console(*, stderr: bool = False) -> Console:
    """The terminal; in a file or a pipe, wide enough for the tables."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=120)


def cases_of(arguments: argparse.Namespace) -> list[Task]:
    """One task per dtype and value of the sweep, of the products yet."""
    tokens, hidden, vocab = _shape(arguments)
    base = {"tokens": tokens, "hidden": hidden, "vocab": vocab, "chunk": arguments.chunk}
    name, values = arguments.sweep or ("tokens", [tokens])
    if arguments.sweep and arguments.tensors:
        raise ValueError("--sweep needs tensors that it can make, --tensors gives one shape: use one of them")
    return [
        Task(
            contestant=PRODUCTS,
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
    if arguments.tensors:
        from chunked_ce.cli.problems import load

        hidden, weight, _ = load(arguments.tensors, None)
        return *hidden.shape, len(weight)
    if arguments.model and arguments.config:
        raise ValueError("--model and --config both give a head: use one of them")
    tokens, hidden, vocab = _DEFAULTS[DEVICE]
    head = HEADS[arguments.model] if arguments.model else head_of_config(arguments.config) if arguments.config else None
    if head:
        hidden, vocab = head.hidden, head.vocab
    return arguments.tokens or tokens, arguments.hidden or hidden, arguments.vocab or vocab


def contestants_of(only: Sequence[str] | None, *, chunk_only: bool) -> tuple[list[str], dict[str, str]]:
    """Who runs, the products first, and why the others do not."""
    keys = {contestant.key: name for name, contestant in LOSSES.items()}
    unknown = [key for key in only or () if key not in keys]
    if unknown:
        raise ValueError(f"--only must name some of {', '.join(keys)}, was {unknown[0]!r}")
    chosen = [keys[key] for key in only] if only else list(CONTESTANTS[1:])
    missing = {}
    for name in chosen:
        reason = why_not(name)
        if reason is None and chunk_only and not LOSSES[name].takes_chunk:
            reason = "it cannot be told its chunk size"
        if reason:
            missing[name] = reason
    return [PRODUCTS, *(name for name in chosen if name not in missing)], missing


def _measure_all(
    cases: list[Task], contestants: list[str], arguments: argparse.Namespace, errors: Console, out: Console
) -> tuple[list[Result], list[dict[str, object]], bool]:
    """The results, what the softmax of each case is like, and whether Ctrl-C ended it."""
    results: list[Result] = []
    notes: list[dict[str, object]] = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with tempfile.TemporaryDirectory(prefix="chunked-ce-") as folder, Progress(*columns, console=errors) as progress:
        bar = progress.add_task("", total=len(cases) * len(contestants) * (arguments.rounds + 1))
        done = 0
        for case in cases:
            title = case_title(case)
            progress.update(bar, description=f"{title}: inputs")
            rows: list[Result] = []
            interrupted = False
            try:
                wanted = {"errors": not arguments.no_errors, "timeout": arguments.timeout}
                with Worker(case.device) as worker:
                    ready = prepared(worker, case, arguments.data, Path(folder), **wanted)
                if isinstance(ready, str):
                    rows = [not_measured(case._replace(contestant=name), ready) for name in contestants]
                else:
                    notes.append({"case": title, "kind": _data(arguments)} | ready.softmax)
                    for contestant in contestants:
                        progress.update(bar, description=f"{title}: {contestant}", completed=done)
                        with Worker(case.device) as worker:
                            task = ready.task._replace(contestant=contestant)
                            row, pressed = measure(worker, task, arguments.timeout, lambda: progress.advance(bar))
                        rows.append(row)
                        if pressed:
                            raise pressed
                        done += arguments.rounds + 1
            except KeyboardInterrupt:
                interrupted = True
            results += rows
            if rows:
                out.print(_table(rows, title, notes[-1] if notes else {}))
            if interrupted:
                errors.print("interrupted: what was measured until then is kept")
                return results, notes, True
        progress.update(bar, description="done", completed=len(cases) * len(contestants) * (arguments.rounds + 1))
    return results, notes, False


def _data(arguments: argparse.Namespace) -> str:
    return f"from {arguments.tensors.name}" if arguments.tensors else arguments.data


def case_title(case: Task) -> str:
    chunk = f" chunk={case.chunk}" if case.chunk else ""
    ignored = f", {case.ignored:.0%} ignored" if case.ignored else ""
    return f"N={case.tokens} D={case.hidden} V={case.vocab}{chunk} {case.dtype}{ignored}"


def cells(row: Result) -> tuple[str, ...]:
    """A result as text, in the order of `COLUMNS`."""

    def text(name: str, form: str) -> str:
        value = row.get(name)
        return "-" if value is None else format(value, form)

    contestant = str(row["contestant"])
    return (
        LOSSES[contestant].key if contestant in LOSSES else contestant,
        text("seconds", ".4g"),
        text("ratio", ".2f"),
        text("ratio_least", ".2f"),
        text("ratio_most", ".2f"),
        text("peak_mib", ",.0f"),
        text("predicted_mib", ",.0f"),
        text("hidden_grad_error", ".1e"),
        text("weight_grad_error", ".1e"),
        "" if row["status"] == "ok" else str(row["status"]),
    )


def _table(rows: list[Result], title: str, note: dict[str, object]) -> Table:
    softmax = f"loss {note['loss']}, entropy {note['entropy']} nats" if "loss" in note else ""
    table = Table(title=title, caption=softmax, title_justify="left", caption_justify="left", box=SIMPLE)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("contestant", "") else "right", no_wrap=column != "")
    for row in rows:
        table.add_row(*cells(row), style="red" if row["status"] != "ok" else None)
    return table


def _check_ending(path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    allowed = sorted(FigureCanvasAgg.get_supported_filetypes())
    if path.suffix[1:].lower() not in allowed:
        raise ValueError(f"--plot must end with one of {', '.join('.' + kind for kind in allowed)}, was {path}")


def _writable(arguments: argparse.Namespace) -> None:
    """Rather now than after all that was measured."""
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
    sys.stdout.flush()

"""``chunked-ce bench``: time, memory and errors of every implementation on this machine."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from chunked_ce.cli import bench_run, compare, files, machine_load, memory, report
from chunked_ce.cli.bench_run import Request
from chunked_ce.cli.console import wide_console
from chunked_ce.cli.documents import BUSY, CASE_SIZES, Document
from chunked_ce.cli.heads import head_of
from chunked_ce.cli.implementations import CROSS_ENTROPY, DEVICE, PRODUCTS, SHARDED, select
from chunked_ce.cli.sharded_losses import NOTE
from chunked_ce.cli.synthetic_inputs import load
from chunked_ce.cli.worker import Task

__all__ = ["cases_of", "command_line", "run"]

_DEFAULTS = {"cpu": (2048, 768, 50257), "cuda": (8192, 2304, 256000)}  # N, D, V
_FILES = ("json", "plot", "html")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write the files; 130 if it was interrupted, else 0. Or compare two files that exist."""
    if arguments.compare:
        return compare.run(arguments)
    cases = cases_of(arguments)
    ranks, device = _ranks(arguments), _device(arguments)
    sharing = ranks if ranks and device == "cpu" else 1
    chunk_only = bool(arguments.sweep and arguments.sweep[0] == "chunk")
    names, missing = select(arguments.only, kind=arguments.loss, chunk_only=chunk_only)
    console, errors = wide_console(), wide_console(stderr=True)
    _prepare_files(arguments, errors)
    out = errors if arguments.json == "-" else console
    document: Document = {
        "command": command_line(sys.argv[1:]),
        "complete": False,
        "conditions": report.conditions(device) | machine_load.shares_now(),
        "limits": {"memory_mib": round((arguments.memory_limit or memory.total(device) / sharing) / report.MIB)},
        "notes": [NOTE.format(ranks=ranks)] if ranks else [],
        "left_out": missing,
        "planned": {
            "implementations": names,
            "cases": [{name: getattr(case, name) for name in CASE_SIZES} for case in cases],
        },
        "data": [],
        "results": [],
    }
    _introduce(document, out)
    # The float64 reference is that of cross-entropy; `chunked-ce check` compares the others.
    with_errors = not arguments.no_errors and arguments.loss == CROSS_ENTROPY
    kind = arguments.data if arguments.tensors is None else f"from {arguments.tensors.name}"
    request = Request(cases, names, arguments.data, kind, with_errors, arguments.timeout)
    interrupted = False
    try:
        bench_run.measure_all(request, document, errors, out, lambda: _save(document, arguments.json))
        document["complete"] = True
    except KeyboardInterrupt:
        interrupted = True
    finally:  # on a crash as well
        _finish(document, arguments, out, errors)
    return 130 if interrupted else 0


def cases_of(arguments: argparse.Namespace) -> list[Task]:
    """One task per dtype and value of the sweep, each for the products as yet."""
    ranks, device = _ranks(arguments), _device(arguments)
    tokens, hidden, vocab = _shape(arguments)
    name, values = arguments.sweep or ("tokens", [tokens])
    sizes: list[dict[str, Any]] = [{name: value} for value in values]
    if arguments.sweep and arguments.tensors:
        raise ValueError("--sweep needs tensors that it can make, --tensors gives one shape: use one of them")
    cases = [
        Task(
            implementation=PRODUCTS,
            dtype=dtype,
            tokens=tokens,
            hidden=hidden,
            vocab=vocab,
            device=device,
            chunk=arguments.chunk,
            ignored=arguments.ignored,
            tensors=arguments.tensors and str(arguments.tensors),
            rounds=arguments.rounds,
            memory_limit=arguments.memory_limit,
            ranks=ranks,
        )._replace(**size)
        for dtype in arguments.dtype or (("fp32", "bf16") if device == "cpu" else ("bf16",))
        for size in sizes
    ]
    for case in cases:
        if ranks is not None and ranks > min(case.tokens, case.vocab):
            raise ValueError(f"--ranks must be at most the tokens and the vocabulary entries of {case.title}")
    return cases


def _ranks(arguments: argparse.Namespace) -> int | None:
    """The processes that share a head; None if the loss has no ranks."""
    if arguments.loss != SHARDED:
        if arguments.ranks is not None:
            raise ValueError(f"--ranks needs --loss {SHARDED}, the loss was {arguments.loss}")
        return None
    if arguments.no_errors:
        raise ValueError(
            f"--no-errors has no effect with --loss {SHARDED}: `chunked-ce check` compares it with float64"
        )
    return 2 if arguments.ranks is None else int(arguments.ranks)


def _device(arguments: argparse.Namespace) -> str:
    """GPUs if there is one for each rank."""
    enough = DEVICE == "cpu" or torch.cuda.device_count() >= (_ranks(arguments) or 1)
    return DEVICE if enough else "cpu"


def _shape(arguments: argparse.Namespace) -> tuple[int, int, int]:
    """N, D and V."""
    if arguments.tensors:
        hidden_states, weight, _ = load(arguments.tensors, None)
        return len(hidden_states), hidden_states.shape[1], len(weight)
    head = head_of(arguments)
    tokens, hidden, vocab = _DEFAULTS[_device(arguments)]
    if head:
        hidden, vocab = head.hidden, head.vocab
    return arguments.tokens or tokens, arguments.hidden or hidden, arguments.vocab or vocab


def command_line(words: list[str]) -> str:
    """The command, to measure the same again; of a path outside the current folder, the file's name alone.

    >>> command_line(["bench", "--sweep", "vocab=1,2", "--tensors=/home/me/head.pt", "--json", "/tmp/out.json"])
    'chunked-ce bench --sweep vocab=1,2 --tensors=head.pt --json out.json'
    """
    shown = []
    for word in words:
        option, equals, value = word.rpartition("=") if word.startswith("-") else ("", "", word)
        shown.append(option + equals + (Path(value).name if Path(value).is_absolute() else value))
    return shlex.join(["chunked-ce", *shown])


def _introduce(document: Document, out: Console) -> None:
    conditions = document["conditions"]
    out.print(report.conditions_text(conditions), style="dim", soft_wrap=True)
    found = machine_load.reasons(conditions)
    if found:
        out.print(f"this machine is busy before anything is measured: {', '.join(found)}", style="yellow")
    for note in document["notes"]:
        out.print(note, style="dim")
    for name, reason in document["left_out"].items():
        out.print(f"left out {name}: {reason}", style="dim", soft_wrap=True)


def _save(document: Document, to: str | None) -> None:
    """What is known so far, into the file: whatever ends this process, the file is whole."""
    machine_load.mark_busy(document["results"])
    if to and to != "-":
        files.dump(document, to)


def _finish(document: Document, arguments: argparse.Namespace, out: Console, errors: Console) -> None:
    """JSON always, pictures only of results. The modules that draw are imported here, because they need matplotlib."""
    results = document["results"]
    machine_load.mark_busy(results)
    if arguments.json:
        files.dump(document, arguments.json)
    if results and arguments.plot:
        from chunked_ce.cli.plots import save

        save(document, arguments.plot)
    if results and arguments.html:
        from chunked_ce.cli.page import save_page

        save_page(document, arguments.html)
    busy = sum(bool(row.get(BUSY)) for row in results)
    if busy:
        out.print(f"{busy} of {len(results)} rows: {machine_load.ADVICE}", style="yellow", soft_wrap=True)
    written = [arguments.json, *((arguments.plot, arguments.html) if results else ())]
    names = ", ".join(str(path) for path in written if path and path != "-")
    if not document["complete"]:
        where = f" and is in {names}" if names else ": --json FILE keeps it"
        errors.print(f"ended early: {len(results)} results; what was measured is printed{where}", soft_wrap=True)
    elif names:
        out.print(f"wrote {names}", soft_wrap=True)


def _prepare_files(arguments: argparse.Namespace, errors: Console) -> None:
    """Make the folders of the files, with a word; ``ValueError`` for a file that cannot be written."""
    if arguments.plot:
        _check_ending(arguments.plot)
    for name in _FILES:
        path = getattr(arguments, name)
        if path and str(path) != "-":
            made = files.prepare(Path(path), f"--{name}")
            if made is not None:
                errors.print(f"made the folder {made}", style="dim", soft_wrap=True)


def _check_ending(path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    allowed = sorted(FigureCanvasAgg.get_supported_filetypes())
    if path.suffix[1:].lower() not in allowed:
        raise ValueError(f"--plot must end with one of {', '.join('.' + kind for kind in allowed)}, was {path}")

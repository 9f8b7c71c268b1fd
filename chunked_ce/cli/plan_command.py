"""``chunked-ce plan``: will it fit, without running anything and without torch."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path as PathOfFile
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from chunked_ce.cli import files
from chunked_ce.cli.capacity import ESTIMATED, HELD, TERMS, RankCost, Request, cost_of, largest
from chunked_ce.cli.console import progress_bar, simple_table, wide_console
from chunked_ce.cli.planning.device import Room, room_of
from chunked_ce.cli.planning.document import NOTE, document_of, facts, paths_table, verdict_lines
from chunked_ce.cli.planning.requests import runs_of
from chunked_ce.cli.planning.run import Run
from chunked_ce.cli.planning.verdict import Verdict, verdict
from chunked_ce.cli.units import bytes_text

__all__ = ["run"]

_TENSOR_PARALLEL = (1, 2, 4, 8)  # of the details, unless some are asked for


class _Plan(NamedTuple):
    """The loss one way on one tensor-parallel size: its cost, and the largest sizes that fit."""

    cost: RankCost
    largest_tokens: int
    largest_vocab: int


def run(arguments: argparse.Namespace) -> int:
    """Print the verdict; 0 if it fits, else 1. With ``--verify``, 1 if a prediction does not hold."""
    if arguments.budget and arguments.memory:
        raise ValueError("--budget is memory for the loss alone, --memory that of the device: use one of them")
    if arguments.budget and arguments.html:
        raise ValueError("--html shows a whole step beside --memory, --budget is for the loss alone: use one of them")
    for option in ("html", "details"):
        if arguments.verify and getattr(arguments, option):
            raise ValueError(f"--verify measures in place of a plan, --{option} is of a plan: use one of them")
    runs = runs_of(arguments)
    for option in ("json", "html"):
        if getattr(arguments, option) not in (None, "-"):
            made = files.prepare(PathOfFile(getattr(arguments, option)), f"--{option}")
            if made is not None:
                wide_console(stderr=True).print(f"made the folder {made}", style="dim", soft_wrap=True)
    room = (
        Room(arguments.budget, "for the loss alone")
        if arguments.budget
        else room_of(arguments.device, arguments.memory)
    )
    found = _verdict(arguments, runs, room)
    if arguments.verify:
        return _verify(arguments, found)
    plans = _plans(arguments, found, room) if arguments.details or arguments.json else []
    if arguments.json:
        request = _request(found.run)
        names = {"head": found.run.model.source, "model": found.run.model.name}
        document = document_of(found) | {
            "request": dataclasses.asdict(request) | names,
            "room": {"bytes": room.size, "is": room.source},
            "unit": "bytes per rank",
            "plans": [_document(plan, request) for plan in plans],
            "exact_and_estimated": ESTIMATED,
        }
        files.dump(document, arguments.json)
    if arguments.json != "-":
        _print(found, room, plans if arguments.details else [])
    if arguments.html:
        from chunked_ce.cli.calculator import save_calculator

        save_calculator(found.run, room.size, found.path, arguments.words, arguments.html)
        print(f"wrote {arguments.html}", file=sys.stderr if arguments.json == "-" else sys.stdout)
    return 0 if found.fits else 1


def _verdict(arguments: argparse.Namespace, runs: Sequence[Run], room: Room) -> Verdict:
    """Of the first run that fits, else of the last."""
    path = None if arguments.loss == "auto" else arguments.loss
    verdicts = (verdict(one, room.size, path, loss_only=bool(arguments.budget)) for one in runs)
    tried = []
    for found in verdicts:
        if found.fits:
            return found
        tried.append(found)
    return tried[-1]


def _print(found: Verdict, room: Room, plans: Sequence[_Plan]) -> None:
    console = wide_console()
    for line in verdict_lines(found):
        console.print(line, soft_wrap=True, markup=False)
    console.print()
    console.print(facts(found.run, f"{bytes_text(room.size)}, {room.source}"), soft_wrap=True, markup=False)
    console.print(paths_table(found))
    console.print(NOTE, soft_wrap=True)
    if plans:
        _print_details(console, _request(found.run), plans)


def _verify(arguments: argparse.Namespace, found: Verdict) -> int:
    """Print each prediction beside its measurement."""
    from chunked_ce.cli import verify

    cases, outcomes = verify.cases_of(found.run, found.path), []
    with progress_bar(wide_console(stderr=True)) as bar:
        task = bar.add_task("measuring", total=len(cases))
        for outcome in verify.measured(cases):
            outcomes.append(outcome)
            bar.advance(task)
    if arguments.json:
        files.dump({"verify": [outcome.document() for outcome in outcomes]}, arguments.json)
    if arguments.json != "-":
        console = wide_console()
        console.print(verify.summary(outcomes), soft_wrap=True, markup=False)
        console.print(verify.table(outcomes))
    return 0 if all(outcome.holds for outcome in outcomes) else 1


# ---- the loss alone, way by way ----


def _request(run: Run) -> Request:
    return Request(
        tokens=run.forward_tokens,
        hidden=run.model.hidden,
        vocab=run.model.vocab,
        dtype=run.dtype,
        train_input=run.train_input,
        train_head=run.trains_head,
        data=run.data,
        sequence=run.sequence,
        zero=run.zero,
        accumulation=run.accumulation,
        chunk=run.chunk,
        device=run.device,
        teacher=run.teacher_width,
        ids=run.ids,
        adapter=run.adapter,
    )


def _plans(arguments: argparse.Namespace, found: Verdict, room: Room) -> list[_Plan]:
    """The loss and the head's state in the memory that the rest of the model leaves, for each tensor-parallel size."""
    request, heads = _request(found.run), found.run.model.heads
    sizes = arguments.tp or [size for size in _TENSOR_PARALLEL if not heads or heads % size == 0]

    def left(cost: RankCost) -> int:
        return room.size if found.loss_only else room.size - found.run.other - sum(cost.held.values())

    return [_plan(request, way, tensor, left) for tensor in sizes for way in request.ways]


def _plan(request: Request, way: str, tensor: int, room: Callable[[RankCost], int]) -> _Plan:
    tokens = largest(request, way, tensor, "tokens", room)
    vocab = largest(request, way, tensor, "vocab", room)
    return _Plan(cost_of(request, way, tensor), tokens, vocab)


def _document(plan: _Plan, request: Request) -> dict[str, object]:
    cost = plan.cost
    totals: dict[str, object] = {
        "ranks": cost.tensor_parallel * request.replicas,
        "peak": cost.peak,
        "total": cost.total,
    }
    return cost._asdict() | totals | {"largest_tokens": plan.largest_tokens, "largest_vocab": plan.largest_vocab}


def _print_details(console: Console, request: Request, plans: Sequence[_Plan]) -> None:
    trained = {"hidden states": request.train_input, "head": request.train_head}
    gradients = " and ".join(name for name, trains in trained.items() if trains)
    sizes = f"N={request.tokens:,} D={request.hidden:,} V={request.vocab:,} {request.dtype}"
    tokens = f"{request.local_tokens:,} tokens per rank and call"
    console.print(f"\nThe loss alone: {sizes}, gradients of {gradients}; {tokens}", soft_wrap=True)
    for tensor in dict.fromkeys(plan.cost.tensor_parallel for plan in plans):
        columns = [plan for plan in plans if plan.cost.tensor_parallel == tensor]
        console.print(_table(tensor, tensor * request.replicas, columns))
        for cost in (plan.cost for plan in columns if plan.cost.why):
            text = f"  {cost.way}: {cost.chunk:,} tokens in a chunk, {cost.why}"
            console.print(text, style="dim", soft_wrap=True)
    console.print("Largest: beside the head and its state, nothing else of the model.", soft_wrap=True)
    console.print(ESTIMATED, soft_wrap=True)


def _table(tensor: int, ranks: int, plans: Sequence[_Plan]) -> Table:
    title = f"tensor parallel {tensor}: {ranks:,} rank{'s' if ranks > 1 else ''}, each with"
    costs = [plan.cost for plan in plans]
    table = simple_table(title, ("", *(cost.way for cost in costs)), left=("",))

    def sizes(label: str, values: Sequence[int], *, style: str = "", end_section: bool = False) -> None:
        """A row of bytes, unless all are 0."""
        if any(values):
            cells = (bytes_text(value) if value else "-" for value in values)
            table.add_row(label, *cells, style=style, end_section=end_section)

    for name in dict.fromkeys([*TERMS, *(name for cost in costs for name in cost.terms)]):
        sizes(TERMS.get(name, name), [cost.terms.get(name, 0) for cost in costs])
    sizes("peak of the loss", [cost.peak for cost in costs], style="bold", end_section=True)
    for name, label in HELD.items():
        sizes(label, [cost.held.get(name, 0) for cost in costs])
    sizes("with the head and its state", [cost.total for cost in costs], end_section=True)
    table.add_row("operations, 10^12", *(f"{cost.operations / 1e12:,.2f}" for cost in costs))
    for name in dict.fromkeys(name for cost in costs for name in cost.communication):
        sizes(f"sent: {name}", [cost.communication.get(name, 0) for cost in costs])
    table.add_row("largest N that fits", *(f"{plan.largest_tokens:,}" for plan in plans))
    table.add_row("largest V that fits", *(f"{plan.largest_vocab:,}" for plan in plans))
    return table

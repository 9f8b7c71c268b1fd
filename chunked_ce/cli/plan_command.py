"""``chunked-ce plan``: will it fit, without running anything."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from rich.table import Table

from chunked_ce.cli import memory, report
from chunked_ce.cli.capacity import ESTIMATED, HELD, TERMS, RankCost, Request, cost_of, largest
from chunked_ce.cli.console import simple_table, wide_console
from chunked_ce.cli.heads import head_of
from chunked_ce.cli.report import bytes_text

__all__ = ["run"]

_DEVICE_MEMORY = 80 * 2**30  # of the cards most planned for


class _Plan(NamedTuple):
    """One way on one tensor-parallel size: its cost, and the largest sizes that fit."""

    cost: RankCost
    largest_tokens: int
    largest_vocab: int


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; always 0."""
    request, source = request_of(arguments)
    size, size_text, room = _room(arguments)
    plans = [_plan(request, way, tensor, room) for tensor in arguments.tp for way in request.ways]
    if arguments.json:
        document = {
            "request": dataclasses.asdict(request) | {"head": source},
            "room": {"bytes": size, "is": size_text},
            "left_out": {},
            "unit": "bytes per rank",
            "plans": [_document(plan, request) for plan in plans],
            "exact_and_estimated": ESTIMATED,
        }
        report.dump(document, arguments.json)
    if arguments.json != "-":
        _print(request, source, plans, size_text)
    return 0


def request_of(arguments: argparse.Namespace) -> tuple[Request, str]:
    """The request, and where the head's sizes come from."""
    head = head_of(arguments)
    hidden = arguments.hidden or (head and head.hidden)
    vocab = arguments.vocab or (head and head.vocab)
    if not hidden or not vocab:
        raise ValueError("the head is unknown: give --hidden and --vocab, or --model, or --config")
    if arguments.frozen_head and arguments.frozen_input:
        raise ValueError("--frozen-head and --frozen-input leave no gradient to plan for: use at most one of them")
    request = Request(
        tokens=arguments.tokens or 8192,
        hidden=hidden,
        vocab=vocab,
        dtype=arguments.dtype,
        train_input=not arguments.frozen_input,
        train_head=not arguments.frozen_head,
        data=arguments.dp,
        sequence=arguments.sp,
        zero=arguments.zero,
        accumulation=arguments.accumulation,
        chunk=arguments.chunk,
        device=arguments.device,
        teacher=arguments.teacher_hidden,
        ids=arguments.ids,
        adapter=arguments.adapter,
    )
    return request, head.source if head else "as given"


def _room(arguments: argparse.Namespace) -> tuple[int, str, Callable[[RankCost], int]]:
    """Bytes, what they are, and the room that they leave for the peak at a cost."""
    if arguments.budget:
        return arguments.budget, f"a budget of {bytes_text(arguments.budget)} for the loss", lambda _: arguments.budget
    size, whose = arguments.memory, "as given"
    if size is None:
        is_local = arguments.device == "cpu" or torch.cuda.is_available()
        size = memory.total(arguments.device) if is_local else _DEVICE_MEMORY
        whose = "this machine's" if is_local else "assumed; --memory says otherwise"
    other = arguments.other
    text = f"{bytes_text(size)} of memory ({whose}), less the head, its state and {bytes_text(other)} for the rest"
    return size, text, lambda cost: size - other - sum(cost.held.values())


def _plan(request: Request, way: str, tensor: int, room: Callable[[RankCost], int]) -> _Plan:
    tokens, vocab = (largest(request, way, tensor, name, room) for name in ("tokens", "vocab"))
    return _Plan(cost_of(request, way, tensor), tokens, vocab)


def _document(plan: _Plan, request: Request) -> dict[str, object]:
    cost = plan.cost
    totals = {"ranks": cost.tensor_parallel * request.replicas, "peak": cost.peak, "total": cost.total}
    return cost._asdict() | totals | {"largest_tokens": plan.largest_tokens, "largest_vocab": plan.largest_vocab}


def _print(request: Request, source: str, plans: Sequence[_Plan], room: str) -> None:
    console = wide_console()
    trained = {"hidden states": request.train_input, "head": request.train_head}
    console.print(
        f"N={request.tokens:,} D={request.hidden:,} V={request.vocab:,} {request.dtype}, gradients of "
        f"{' and '.join(name for name, trains in trained.items() if trains)}; head: {source}",
        soft_wrap=True,
    )
    console.print(
        f"data parallel {request.data}, sequence parallel {request.sequence}, ZeRO {request.zero}, "
        f"{request.accumulation} micro-batches a step; {request.local_tokens:,} tokens per rank and call",
        soft_wrap=True,
    )
    for tensor in dict.fromkeys(plan.cost.tensor_parallel for plan in plans):
        columns = [plan for plan in plans if plan.cost.tensor_parallel == tensor]
        console.print(_table(tensor, tensor * request.replicas, columns))
        for cost in (plan.cost for plan in columns if plan.cost.why):
            text = f"  {cost.way}: {cost.chunk:,} tokens in a chunk, {cost.why}"
            console.print(text, style="dim", soft_wrap=True)
    console.print(f"Largest: with {room}.", soft_wrap=True)
    console.print(ESTIMATED, soft_wrap=True)


def _table(tensor: int, ranks: int, plans: Sequence[_Plan]) -> Table:
    title = f"tensor parallel {tensor}: {ranks:,} rank{'s' if ranks > 1 else ''}, each with"
    costs = [plan.cost for plan in plans]
    table = simple_table(title, ("", *(cost.way for cost in costs)), left=("",))

    def sizes(label: str, values: Sequence[int], **style: object) -> None:
        """A row of bytes, unless all are 0."""
        if any(values):
            table.add_row(label, *(bytes_text(value) if value else "-" for value in values), **style)

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

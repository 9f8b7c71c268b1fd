"""``chunked-ce plan``: will it fit, without running anything."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence

import torch
from rich.box import SIMPLE
from rich.table import Table

from chunked_ce.cli import memory, planning, report
from chunked_ce.cli.bench import wide_console
from chunked_ce.cli.heads import HEADS, head_of_config
from chunked_ce.cli.planning import ESTIMATED, HELD, TERMS, Plan, Request, largest, plan_of
from chunked_ce.cli.report import bytes_text

__all__ = ["run"]

_DEVICE_MEMORY = 80 * 2**30  # of the cards most planned for


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; always 0."""
    request, source = request_of(arguments)
    missing = {way: reason for way, reason in planning.ways().items() if reason}
    chosen = [way for way in planning.ways() if way not in missing]
    size, room_text, room = _room(arguments)
    plans = [plan_of(request, way, tensor) for tensor in arguments.tp for way in chosen]
    fits = [
        {name: largest(request, plan.way, plan.tensor, name, room) for name in ("tokens", "vocab")} for plan in plans
    ]
    if arguments.json:
        report.dump(_document(request, source, plans, fits, missing, {"bytes": size, "is": room_text}), arguments.json)
    if arguments.json != "-":
        _print(request, source, plans, fits, missing, room_text)
    return 0


def request_of(arguments: argparse.Namespace) -> tuple[Request, str]:
    """What is asked, and where the head's sizes come from."""
    if arguments.model and arguments.config:
        raise ValueError("--model and --config both give a head: use one of them")
    head = HEADS[arguments.model] if arguments.model else head_of_config(arguments.config) if arguments.config else None
    hidden = arguments.hidden or (head and head.hidden)
    vocab = arguments.vocab or (head and head.vocab)
    if not hidden or not vocab:
        raise ValueError("the head is unknown: give --hidden and --vocab, or --model, or --config")
    if arguments.frozen_head and arguments.frozen_input:
        raise ValueError("--frozen-head and --frozen-input leave no gradient to plan for: use at most one of them")
    source = head.link if arguments.model else str(arguments.config) if arguments.config else "as given"
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
    )
    return request, source


def _room(arguments: argparse.Namespace) -> tuple[int, str, Callable[[Plan], int]]:
    """Bytes, what they are, and the room that they leave for the peak of a plan."""
    if arguments.budget:
        return arguments.budget, f"a budget of {bytes_text(arguments.budget)} for the loss", lambda _: arguments.budget
    size, whose = arguments.memory, "as given"
    if size is None:
        here = arguments.device == "cpu" or torch.cuda.is_available()
        size = memory.total(arguments.device) if here else _DEVICE_MEMORY
        whose = "this machine's" if here else "assumed; --memory says otherwise"
    other = arguments.other
    text = f"{bytes_text(size)} of memory ({whose}), less the head, its state and {bytes_text(other)} for the rest"
    return size, text, lambda plan: size - other - sum(plan.held.values())


def _print(
    request: Request,
    source: str,
    plans: Sequence[Plan],
    fits: Sequence[dict[str, int]],
    missing: dict[str, str],
    room: str,
) -> None:
    console = wide_console()
    trained = " and ".join(
        name for name, on in (("hidden states", request.train_input), ("head", request.train_head)) if on
    )
    console.print(
        f"N={request.tokens:,} D={request.hidden:,} V={request.vocab:,} {request.dtype}, gradients of {trained}; "
        f"head: {source}",
        soft_wrap=True,
    )
    console.print(
        f"data parallel {request.data}, sequence parallel {request.sequence}, ZeRO {request.zero}, "
        f"{request.accumulation} micro-batches a step; {request.local_tokens:,} tokens per rank and call",
        soft_wrap=True,
    )
    for way, reason in missing.items():
        console.print(f"left out, {way}: {reason}", style="dim", soft_wrap=True)
    for tensor in dict.fromkeys(plan.tensor for plan in plans):
        here = [(plan, fit) for plan, fit in zip(plans, fits, strict=True) if plan.tensor == tensor]
        console.print(_table(request, tensor, here))
        for plan, _ in here:
            if plan.why:
                console.print(
                    f"  {plan.way}: {plan.chunk:,} tokens in a chunk, {plan.why}", style="dim", soft_wrap=True
                )
    console.print(f"Largest: with {room}.", soft_wrap=True)
    console.print(ESTIMATED, soft_wrap=True)


def _table(request: Request, tensor: int, plans: Sequence[tuple[Plan, dict[str, int]]]) -> Table:
    ranks = tensor * request.replicas
    title = f"tensor parallel {tensor}: {ranks:,} rank{'s' if ranks > 1 else ''}, each with"
    table = Table(title=title, title_justify="left", box=SIMPLE)
    table.add_column("")
    for plan, _ in plans:
        table.add_column(plan.way, justify="right")

    def row(name: str, values: Sequence[str], **style: object) -> None:
        if any(value != "-" for value in values):
            table.add_row(name, *values, **style)

    names = dict.fromkeys([*TERMS, *(name for plan, _ in plans for name in plan.terms)])
    for name in names:
        row(TERMS.get(name, name), [bytes_text(plan.terms[name]) if name in plan.terms else "-" for plan, _ in plans])
    row("peak of the loss", [bytes_text(plan.peak) for plan, _ in plans], style="bold", end_section=True)
    for name, text in HELD.items():
        row(text, [bytes_text(plan.held[name]) if plan.held.get(name) else "-" for plan, _ in plans])
    row("with the head and its state", [bytes_text(plan.total) for plan, _ in plans], end_section=True)
    row("operations, 10^12", [f"{plan.operations / 1e12:,.2f}" for plan, _ in plans])
    for name in dict.fromkeys(name for plan, _ in plans for name in plan.communication):
        row(f"sent: {name}", [bytes_text(plan.communication.get(name, 0)) for plan, _ in plans])
    row("largest N that fits", [f"{fit['tokens']:,}" for _, fit in plans])
    row("largest V that fits", [f"{fit['vocab']:,}" for _, fit in plans])
    return table


def _document(
    request: Request,
    source: str,
    plans: Sequence[Plan],
    fits: Sequence[dict[str, int]],
    missing: dict[str, str],
    room: dict[str, object],
) -> dict[str, object]:
    return {
        "request": dataclasses.asdict(request) | {"head": source},
        "room": room,
        "left_out": missing,
        "unit": "bytes per rank",
        "plans": [
            {
                "way": plan.way,
                "tensor_parallel": plan.tensor,
                "ranks": plan.tensor * request.replicas,
                "terms": plan.terms,
                "peak": plan.peak,
                "held": plan.held,
                "total": plan.total,
                "chunk": plan.chunk,
                "why": plan.why,
                "operations": plan.operations,
                "communication": plan.communication,
                "largest_tokens": fit["tokens"],
                "largest_vocab": fit["vocab"],
            }
            for plan, fit in zip(plans, fits, strict=True)
        ],
        "exact_and_estimated": ESTIMATED,
    }

"""One implementation in processes of its own: its peak memory, its errors, and rounds beside the three products.

There is one process, or one for each rank. It serves tasks through a pipe. For each it sends messages:
``("memory", bytes)``, ``("errors", dict)``, ``("sent", bytes)`` of collectives,
``("control", seconds)`` before and after the rounds, ``("round", (seconds, seconds of its products))`` after every
round, ``("shares", dict)`` of others' work meanwhile, and last ``("done", None)`` or ``("failed", reason)``. In a round
the implementation and the products take turns at being first. So no two implementations are in memory at a time, and a
machine that gets slower or faster changes both times of a round. Ranks go through all of this in step: a time is that
of the slowest rank, memory that of the rank with the most, and rank 0 speaks for all.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from chunked_ce.cli import machine_load, memory, ranked, synthetic_inputs
from chunked_ce.cli.accuracy import Reference, errors_of, gradient_of, reference
from chunked_ce.cli.counted_collectives import counted, sent_bytes
from chunked_ce.cli.documents import ranks_text
from chunked_ce.cli.implementations import DTYPES, LOSSES, loss_of, train_step, yardstick_of
from chunked_ce.cli.processes import OUT_OF_MEMORY, Member, Message, Processes, failed
from chunked_ce.cli.sharded_losses import SHARDED_LOSSES, RankInputs
from chunked_ce.cli.synthetic_inputs import LossInputs

__all__ = ["OUT_OF_MEMORY", "WARM_UP", "Preparation", "Task", "Worker"]

WARM_UP = (64, 64, 4100)  # N, D and V: small, with more vocabulary entries than one product covers on a CPU
_AVAILABLE = 0.9  # the share of free memory that a process may take


class Task(NamedTuple):
    """One case, and what to measure of an implementation on it."""

    implementation: str
    dtype: str
    tokens: int
    hidden: int
    vocab: int
    device: str
    chunk: int | None = None
    ignored: float = 0.0
    tensors: str | None = None  # the file that holds the inputs, if one does
    exact: str | None = None  # the file that holds the `Reference`
    rounds: int = 5
    memory_limit: int | None = None  # bytes above the inputs
    ranks: int | None = None  # processes that share the head; None for a process alone

    @property
    def title(self) -> str:
        chunk = f" chunk={self.chunk}" if self.chunk else ""
        ignored = f", {self.ignored:.0%} ignored" if self.ignored else ""
        return f"N={self.tokens} D={self.hidden} V={self.vocab}{chunk} {self.dtype}{ignored}{ranks_text(self.ranks)}"

    def inputs(self, kind: str = "random") -> LossInputs:
        """Those of the file if there is one, else random ones or, with ``"trained"``, a sharp softmax."""
        dtype = DTYPES[self.dtype]
        if self.tensors is not None:
            return synthetic_inputs.load(Path(self.tensors), dtype, self.device)
        make = LossInputs.trained if kind == "trained" else LossInputs.random
        return make(self.tokens, self.hidden, self.vocab, dtype, ignored=self.ignored, device=self.device)


class Preparation(NamedTuple):
    """The files to make for the tasks of a case; the answer is ``("prepared", (task, summary of the softmax))``."""

    task: Task
    data: str  # "random" or "trained"
    folder: str
    errors: bool


class Worker:
    """The processes of an implementation, one without ``ranks``; they end with the ``with`` block."""

    def __init__(self, device: str, ranks: int | None = None) -> None:
        self._group = Processes(_serve, ranks or 1, device, ranks is not None)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._group.__exit__()

    @property
    def processes(self) -> tuple[Any, ...]:
        """By rank."""
        return self._group.processes

    def run(self, task: Task | Preparation, timeout: float) -> Iterator[Message]:
        """The messages of one task, at the latest after ``timeout`` seconds. It may end the processes.

        They are those of rank 0; a failure is that of any rank, which it names.
        """
        self._group.send((task, timeout))
        for rank, (kind, content) in self._group.messages(timeout):
            if kind == "failed":
                is_one_of_many = rank is not None and len(self.processes) > 1
                yield kind, f"{content} (rank {rank})" if is_one_of_many else content
                return
            if kind != "done":
                yield kind, content
        yield "done", None  # once, when all ranks are


def _serve(member: Member, pipe: Connection, device: str, is_group: bool) -> None:
    while True:
        try:
            task, timeout = pipe.recv()
        except EOFError:
            return
        try:
            if is_group and not ranked.is_group():
                # Threads are shared out, or ranks would take the cores from one another.
                torch.set_num_threads(max(1, torch.get_num_threads() // member.size))
                member.join(device, timeout)
            memory.limit_memory(_available(device), device)
            for message in _prepared(task) if isinstance(task, Preparation) else _measured(task):
                if member.rank == 0:
                    pipe.send(message)
            pipe.send(("done", None))
        except Exception as error:
            reason = OUT_OF_MEMORY if memory.out_of_memory(error) else _one_line(error)
            pipe.send(failed(reason))
            return


def _available(device: str) -> int:
    """Bytes that this process may take: ranks on a CPU share its memory."""
    sharing = ranked.size() if device == "cpu" else 1
    return int(_AVAILABLE * memory.available(device) / sharing)


def _prepared(preparation: Preparation) -> Iterator[Message]:
    task, folder = preparation.task, Path(preparation.folder)
    inputs = task.inputs(preparation.data)
    if preparation.data == "trained" and task.tensors is None:
        place = str(folder / "tensors.pt")
        task = task._replace(tensors=place)
        torch.save({name: tensor.detach() for name, tensor in inputs._asdict().items()}, place)
    if preparation.errors:
        place = str(folder / "exact.pt")
        task = task._replace(exact=place)
        torch.save(reference(inputs)._asdict(), place)
    yield "prepared", (task, synthetic_inputs.softmax_summary(inputs))


def _measured(task: Task) -> Iterator[Message]:
    implementation, chunk, device = task.implementation, task.chunk, task.device
    inputs = _of_this_rank(task, task.inputs())
    small = _of_this_rank(task, LossInputs.random(*WARM_UP, DTYPES[task.dtype], device=device))
    yardstick = yardstick_of(implementation)
    for name in (yardstick, implementation):
        at_shape = device == "cuda" or (name in LOSSES and LOSSES[name].compiles)
        train_step(name, (inputs if at_shape else small)(name), chunk)
    del small
    if task.memory_limit is not None:
        memory.limit_memory(task.memory_limit, device)

    def step(name: str = implementation) -> None:
        train_step(name, inputs(name), chunk)

    if memory.why_not_measured(device) is None:
        ranked.together()
        yield "memory", ranked.largest(memory.peak_of(step, device))[0]
    elif task.memory_limit is not None:
        step()
    memory.limit_memory(_available(device), device)  # the products may take more
    if task.ranks is not None:
        with counted() as collectives:
            step()
        yield "sent", ranked.largest(sent_bytes(collectives(), task.ranks))[0]
    elif task.exact is not None and implementation in LOSSES:
        yield "errors", _errors(task, task.exact, inputs(implementation))
    watch = machine_load.Watch(own=lambda: ranked.total(time.process_time()))
    yield "control", _control(device)
    for turn in range(-1, task.rounds):
        names = (yardstick, implementation) if turn % 2 else (implementation, yardstick)
        seconds = {name: ranked.slowest(functools.partial(step, name)).wall for name in names}
        if turn >= 0:
            yield "round", (seconds[implementation], seconds[yardstick])
    yield "control", _control(device)
    yield "shares", watch.shares()  # with the control tasks, since rounds may be too short to count anything


def _of_this_rank(task: Task, whole: LossInputs) -> Callable[[str], LossInputs | RankInputs]:
    """The inputs by implementation: whole, or this rank's part of them."""
    if task.ranks is None:
        return lambda name: whole
    own, same = RankInputs.of(whole)
    return lambda name: own if name in SHARDED_LOSSES and not SHARDED_LOSSES[name].same_tokens else same


def _control(device: str) -> float:
    """The control task's time, on the slowest of the ranks, which run it at once."""
    ranked.together()
    return ranked.largest(machine_load.control_seconds(device))[0]


def _errors(task: Task, file: str, inputs: LossInputs | RankInputs) -> dict[str, float]:
    exact = Reference(**torch.load(file, map_location=task.device, weights_only=True))
    loss = loss_of(task.implementation, task.chunk)(*inputs).mean()
    loss.backward()
    errors = errors_of(exact, loss.detach(), gradient_of(inputs.hidden), gradient_of(inputs.weight))
    inputs.hidden.grad = inputs.weight.grad = None
    return errors


def _one_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"

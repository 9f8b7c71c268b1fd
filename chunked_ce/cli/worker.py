"""One implementation in a process of its own: its peak memory, its errors, and rounds beside the three products.

The process serves tasks through a pipe. For each it sends messages: ``("memory", bytes)``, ``("errors", dict)``,
``("control", seconds)`` before and after the rounds, ``("round", (seconds, seconds of its products))`` after every
round, ``("shares", dict)`` of others' work meanwhile, and last ``("done", None)`` or ``("failed", reason)``. In a round
the implementation and the products take turns at being first. So no two implementations are in memory at a time, and a
machine that gets slower or faster changes both times of a round.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from chunked_ce.cli import machine_load, memory, synthetic_inputs
from chunked_ce.cli.accuracy import Reference, errors_of, gradient_of, reference
from chunked_ce.cli.implementations import DTYPES, LOSSES, loss_of, train_step, yardstick_of
from chunked_ce.cli.synthetic_inputs import LossInputs

__all__ = ["OUT_OF_MEMORY", "WARM_UP", "Preparation", "Task", "Worker"]

OUT_OF_MEMORY = "out of memory"
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

    @property
    def title(self) -> str:
        chunk = f" chunk={self.chunk}" if self.chunk else ""
        ignored = f", {self.ignored:.0%} ignored" if self.ignored else ""
        return f"N={self.tokens} D={self.hidden} V={self.vocab}{chunk} {self.dtype}{ignored}"

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


Message = tuple[str, Any]


class Worker:
    """The process of an implementation; it ends with the ``with`` block."""

    def __init__(self, device: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, child_end = context.Pipe()
        descriptor, self._log = tempfile.mkstemp(prefix="chunked-ce-")
        os.close(descriptor)
        self._process = context.Process(target=_serve, args=(child_end, self._log, device), daemon=True)
        self._process.start()
        child_end.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(2)  # it ends by itself unless it is in the middle of something
        self._process.kill()
        self._process.join()
        os.unlink(self._log)

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def run(self, task: Task | Preparation, timeout: float) -> Iterator[Message]:
        """The messages of one task, at the latest after ``timeout`` seconds. It may end the process."""
        deadline = time.monotonic() + timeout
        try:
            self._pipe.send(task)
            while True:
                if not self._pipe.poll(max(0.0, deadline - time.monotonic())):
                    self._process.kill()
                    yield "failed", f"not done after {timeout:g} s"
                    return
                message = self._pipe.recv()
                yield message
                if message[0] in ("done", "failed"):
                    return
        except (EOFError, OSError):
            self._process.join(10)
            yield "failed", self._end()

    def _end(self) -> str:
        code = self._process.exitcode
        if code == -signal.SIGKILL:
            return f"{OUT_OF_MEMORY} (killed)"
        text = Path(self._log).read_text(errors="replace").strip()
        if any(sign in text for sign in ("bad_alloc", "llocate memory")):
            return OUT_OF_MEMORY
        last = text.splitlines()[-1] if text else ""
        how = f"ended by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        return f"{how} {last}".strip()


def _serve(pipe: Connection, log: str, device: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which keeps what was measured
    with open(log, "w", buffering=1) as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    with contextlib.suppress(OSError):  # should the system run out of memory, this process is the one to end
        Path("/proc/self/oom_score_adj").write_text("1000")
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            memory.limit_memory(int(_AVAILABLE * memory.available(device)), device)
            for message in _prepared(task) if isinstance(task, Preparation) else _measured(task):
                pipe.send(message)
            pipe.send(("done", None))
        except Exception as error:
            reason = OUT_OF_MEMORY if memory.out_of_memory(error) else _one_line(error)
            pipe.send(("failed", reason))
            return


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
    inputs = task.inputs()
    small = LossInputs.random(*WARM_UP, DTYPES[task.dtype], device=device)
    yardstick = yardstick_of(implementation)
    for name in (yardstick, implementation):
        at_shape = device == "cuda" or (name in LOSSES and LOSSES[name].compiles)
        train_step(name, inputs if at_shape else small, chunk)
    del small
    if task.memory_limit is not None:
        memory.limit_memory(task.memory_limit, device)
    if memory.why_not_measured(device) is None:
        yield "memory", memory.peak_of(lambda: train_step(implementation, inputs, chunk), device)
    elif task.memory_limit is not None:
        train_step(implementation, inputs, chunk)
    memory.limit_memory(int(_AVAILABLE * memory.available(device)), device)  # the products may take more
    if task.exact is not None and implementation in LOSSES:
        yield "errors", _errors(task, task.exact, inputs)
    watch = machine_load.Watch()
    yield "control", machine_load.control_seconds(device)
    for turn in range(-1, task.rounds):
        names = (yardstick, implementation) if turn % 2 else (implementation, yardstick)
        seconds = {name: _seconds(name, inputs, chunk) for name in names}
        if turn >= 0:
            yield "round", (seconds[implementation], seconds[yardstick])
    yield "control", machine_load.control_seconds(device)
    yield "shares", watch.shares()  # with the control tasks, since rounds may be too short to count anything


def _errors(task: Task, file: str, inputs: LossInputs) -> dict[str, float]:
    exact = Reference(**torch.load(file, map_location=task.device, weights_only=True))
    loss = loss_of(task.implementation, task.chunk)(*inputs).mean()
    loss.backward()
    errors = errors_of(exact, loss.detach(), gradient_of(inputs.hidden), gradient_of(inputs.weight))
    inputs.hidden.grad = inputs.weight.grad = None
    return errors


def _seconds(implementation: str, inputs: LossInputs, chunk: int | None) -> float:
    start = time.perf_counter()
    train_step(implementation, inputs, chunk)
    return time.perf_counter() - start


def _one_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"

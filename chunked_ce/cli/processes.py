"""Processes that report to this one through pipes, and end together, whatever becomes of one of them."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

__all__ = ["OUT_OF_MEMORY", "Member", "Message", "Processes", "failed"]

OUT_OF_MEMORY = "out of memory"
Message = tuple[str, Any]
_GRACE = 1.0  # seconds for other processes to say that they failed too


class Member(NamedTuple):
    """One of the processes, as it knows itself."""

    rank: int
    size: int
    folder: str  # of all of them

    def join(self, device: str = "cpu", timeout: float = 600.0) -> None:
        """Form a group with the others: NCCL with a GPU for each rank, gloo on a CPU."""
        os.environ.update(RANK=str(self.rank), LOCAL_RANK=str(self.rank), WORLD_SIZE=str(self.size))
        backend, place = "gloo", None
        if device == "cuda":
            backend, place = "nccl", torch.device("cuda", self.rank)
            torch.cuda.set_device(place)
        dist.init_process_group(
            backend,
            init_method=f"file://{self.folder}/rendezvous",
            rank=self.rank,
            world_size=self.size,
            timeout=datetime.timedelta(seconds=timeout),
            device_id=place,
        )


def failed(reason: str) -> Message:
    """A process's last message if it fails; the time tells the cause from its consequences in other processes."""
    return "failed", (time.monotonic(), reason)


class Processes:
    """Some processes that run ``target(member, pipe, *arguments)``; they end with the ``with`` block."""

    def __init__(self, target: Callable[..., object], size: int, *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.mkdtemp(prefix="chunked-ce-")
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(size):
            pipe, child_end = context.Pipe()
            given = target, Member(rank, size, self._folder), child_end, arguments
            process = context.Process(target=_main, args=given, daemon=True)
            process.start()
            child_end.close()
            self._pipes.append(pipe)
            self._processes.append(process)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        deadline = time.monotonic() + 2  # they end by themselves unless they are in the middle of something
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self._kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def processes(self) -> tuple[Any, ...]:
        """The processes by rank."""
        return tuple(self._processes)

    def send(self, task: object) -> None:
        """Give the same to all; one that has ended shows in `messages`."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(task)

    def messages(self, timeout: float) -> Iterator[tuple[int | None, Message]]:
        """Ranks and what they say, until all are done, or one has failed: then it is the last, and all end.

        A failure is ``("failed", reason)``: also that of a process that ended without a word. Its rank is None if not
        all are done after ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        busy = dict(enumerate(self._pipes))
        while busy:
            ready = wait(list(busy.values()), max(0.0, deadline - time.monotonic()))
            if not ready:
                self._kill()
                yield None, ("failed", f"not done after {timeout:g} s")
                return
            for rank in [rank for rank, pipe in busy.items() if pipe in ready]:
                message = self._receive(rank)
                if message[0] == "failed":
                    rank, reason = self._cause(rank, message)
                    yield rank, ("failed", reason)
                    return
                if message[0] == "done":
                    del busy[rank]
                yield rank, message

    def _receive(self, rank: int) -> Message:
        try:
            message: Message = self._pipes[rank].recv()
        except (EOFError, OSError):
            self._processes[rank].join(10)
            return "failed", (0.0, self._end(rank))
        return message

    def _cause(self, rank: int, message: Message) -> tuple[int, str]:
        """The first failure: a process that fails takes those along that wait for it."""
        failures = {rank: message[1]}
        others = {at: pipe for at, pipe in enumerate(self._pipes) if at != rank}
        deadline = time.monotonic() + _GRACE
        while others and (ready := wait(list(others.values()), max(0.0, deadline - time.monotonic()))):
            for at in [at for at, pipe in others.items() if pipe in ready]:
                kind, content = self._receive(at)
                if kind in ("failed", "done"):
                    del others[at]
                if kind == "failed":
                    failures[at] = content
        if len(self._processes) > 1:
            self._kill()
        first = min(failures, key=lambda at: failures[at][0])
        reason: str = failures[first][1]
        return first, reason

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def _end(self, rank: int) -> str:
        code = self._processes[rank].exitcode
        if code == -signal.SIGKILL:
            return f"{OUT_OF_MEMORY} (killed)"
        text = _log(self._folder, rank).read_text(errors="replace").strip()
        if any(sign in text for sign in ("bad_alloc", "llocate memory")):
            return OUT_OF_MEMORY
        last = text.splitlines()[-1] if text else ""
        how = f"ended by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        return f"{how} {last}".strip()


def _log(folder: str, rank: int) -> Path:
    return Path(folder, f"{rank}.log")


def _main(target: Callable[..., object], member: Member, pipe: Connection, arguments: tuple[object, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which keeps what was measured
    with _log(member.folder, member.rank).open("w", buffering=1) as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    with contextlib.suppress(OSError):  # should the system run out of memory, this process is the one to end
        Path("/proc/self/oom_score_adj").write_text("1000")
    target(member, pipe, *arguments)
    if dist.is_available() and dist.is_initialized():
        os._exit(0)  # leaving the group properly would wait for ranks that may have failed

"""Jobs in processes that may hang or die: each has a cap, and its rows arrive as soon as they are known.

While one process works, the next one is already importing torch.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

__all__ = ["Job", "Processes", "Row"]

Row = dict[str, object]
Message = tuple[str, object]
_START_SECONDS = 180.0  # the longest that a process may take to import torch, from a cold disk
_PRELOADED = "chunked_ce.cli.implementations"


class Job(NamedTuple):
    """Rows from ``work(item, *arguments)`` for one item after the other."""

    name: str
    work: Callable[..., Iterator[Row]]  # a function of a module, which another process can import
    items: tuple[object, ...] = (None,)
    arguments: tuple[object, ...] = ()


class Processes:
    """Runs jobs, one at a time; ends the processes with the ``with`` block.

    ``method`` is that of `multiprocessing`: ``"spawn"``, or ``"forkserver"``, which starts faster but must not be used
    with CUDA, whose driver does not survive a fork.
    """

    def __init__(self, log: Path, method: str = "spawn") -> None:
        self._log = log
        self._context = multiprocessing.get_context(method)
        if method == "forkserver":
            self._context.set_forkserver_preload([_PRELOADED])
        self._next: _Process | None = None

    def __enter__(self) -> Processes:
        self._next = _Process(self._context, self._log)
        return self

    def __exit__(self, *_: object) -> None:
        if self._next is not None:
            self._next.end()

    def rows(self, job: Job, seconds: float) -> Iterator[Row]:
        """The rows of a job; those of an item say which it is. What went wrong is a row with an ``error``.

        An item whose process dies is left out, and another process goes on with the next one.
        """
        patience, rest = _Patience(seconds), list(job.items)
        while rest:
            process, self._next = self._next, _Process(self._context, self._log)
            at = -1
            with contextlib.closing(process.run(job._replace(items=tuple(rest)), patience)) as messages:
                for kind, content in messages:
                    if kind == "item":
                        at, process.log_start = content
                    elif kind != "done":
                        yield _labelled(rest[max(0, at)], {"error": content} if kind == "ended" else content)
            process.end()
            if kind == "done":
                return
            rest = rest[max(0, at) + 1 :]
            if patience.left <= 0:
                for item in rest:
                    yield _labelled(item, {"error": f"left out: {seconds:.0f} s had passed"})
                return


class _Patience:
    """Waits for messages, for some seconds in all. Seconds in which this process is stopped do not count."""

    def __init__(self, seconds: float) -> None:
        self.seconds = self.left = seconds

    def arrives(self, pipe: Connection) -> bool:
        while self.left > 0:
            start, slice = time.monotonic(), min(1.0, self.left)
            arrived = pipe.poll(slice)
            self.left -= min(time.monotonic() - start, slice)
            if arrived:
                return True
        return False


def _labelled(item: object, row: Row) -> Row:
    return row if item is None else {"item": str(item)} | row


class _Process:
    def __init__(self, context: multiprocessing.context.BaseContext, log: Path) -> None:
        self._pipe, child_end = context.Pipe()
        self._log = log
        self.log_start = log.stat().st_size if log.exists() else 0  # of what it writes about its current item
        self._process = context.Process(target=_serve, args=(child_end, str(log)), daemon=True)
        self._process.start()
        child_end.close()

    def run(self, job: Job, patience: _Patience) -> Iterator[Message]:
        """The messages of a job; the last one is "done", or "ended" with the reason."""
        try:
            if not _Patience(_START_SECONDS).arrives(self._pipe):
                yield "ended", f"no process after {_START_SECONDS:.0f} s"
                return
            self._pipe.recv()
            self._pipe.send(job)
            while True:
                if not patience.arrives(self._pipe):
                    yield "ended", f"not done after {patience.seconds:.0f} s"
                    return
                message = self._pipe.recv()
                yield message
                if message[0] in ("done", "ended"):
                    return
        except (EOFError, OSError):
            self._process.join(10)
            yield "ended", self._reason()

    def end(self) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.join()

    def _reason(self) -> str:
        code = self._process.exitcode
        how = f"ended by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        lines = (
            self._log.read_text(errors="replace")[self.log_start :].strip().splitlines() if self._log.exists() else []
        )
        return f"{how} {lines[-1] if lines else ''}".strip()


def _serve(pipe: Connection, log: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which keeps what was measured
    with open(log, "a", buffering=1) as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    importlib.import_module(_PRELOADED)
    try:
        pipe.send(("ready", None))
        job = pipe.recv()
    except (EOFError, OSError):  # not needed any more
        return
    for place, item in enumerate(job.items):
        pipe.send(("item", (place, os.path.getsize(log))))
        try:
            for row in job.work(item, *job.arguments):
                pipe.send(("row", row))
        except Exception as error:
            traceback.print_exc()
            text = f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]
            if not _device_works():
                pipe.send(("ended", text))
                return
            pipe.send(("row", {"error": text[:300]}))
        _free()
    pipe.send(("done", None))


def _device_works() -> bool:
    """Whether the device still answers: after an illegal access, nothing runs in this process any more."""
    import torch

    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception:
        return False
    return True


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

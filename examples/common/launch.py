"""Runs a part of an example in processes of its own, which end when it ends."""

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


def run_ranks(script: Path, arguments: Iterable[object], ranks: int) -> int:
    """Runs a script once per rank, with the variables that torchrun sets; returns 0, or the first other status.

    If one rank fails, this ends the others. It also ends all of them at Ctrl-C and SIGTERM, which reach only this
    process, so that no rank prints a traceback of its own.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    command = [sys.executable, str(script), *map(str, arguments)]
    processes: list[subprocess.Popen] = []
    with handling(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)):
        try:
            for rank in range(ranks):
                own = variables | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1}
                environment = os.environ | {name: str(value) for name, value in own.items()}
                with handling(signal.SIGINT, signal.SIG_IGN):
                    processes.append(subprocess.Popen(command, env=environment))
            while True:
                statuses = [process.poll() for process in processes]
                if any(statuses) or None not in statuses:
                    return next(filter(None, statuses), 0)
                time.sleep(0.05)
        finally:
            end(processes)


def run_function(function: Callable[..., None], *arguments: object) -> int | None:
    """Calls a function in a process of its own, which Ctrl-C ends without a traceback; returns its status."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments, daemon=True)
    with handling(signal.SIGINT, signal.SIG_IGN):
        process.start()
    try:
        process.join()
    finally:
        process.terminate()
        process.join()
    return process.exitcode


@contextlib.contextmanager
def handling(number: signal.Signals, handler: signal.Handlers) -> Iterator[None]:
    """Sets the handler of a signal for a while. A process that is started meanwhile inherits `SIG_IGN`."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def end(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

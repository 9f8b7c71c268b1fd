"""Run a function on several real processes that form a gloo group.

    def worker(rank, world_size, *args): ...      # at module level: the processes import it
    results = run(worker, 2, *args)               # [what rank 0 returned, what rank 1 returned]

The ranks are forked from a server that has imported torch and `chunked_ce`, so that a rank need not. A launch still
costs what its worker imports and the group's start, a case inside it milliseconds: put many cases into one.
"""

import faulthandler
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LOG_LINES = 40
LAST_RESORT = 900.0  # seconds after which ranks that hang are ended, however busy the machine is
GRACE = 60.0  # seconds for ranks to see that another one failed, which they mostly do at once

SERVER = mp.get_context("forkserver")  # it starts with the first launch and ends with this process
SERVER.set_forkserver_preload(["chunked_ce", "torch._inductor.compile_fx", __name__])


def run(worker: Callable, world_size: int, *args, timeout: float = LAST_RESORT) -> list:
    """Each rank's `worker(rank, world_size, *args)`, in rank order; arguments and results are picklable.

    Raises RuntimeError with the traceback of every rank that failed, and with the stack of every rank that
    still ran after `timeout` seconds. No process outlives the call.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        deadline = time.monotonic() + timeout
        environment = dict(os.environ)  # the server's own is that of its start
        ranks = [
            SERVER.Process(target=_rank_main, args=(rank, world_size, environment, folder, deadline, worker, args))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            _wait(ranks, deadline)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        failures = [
            f"rank {rank} of {world_size} {_what_happened(process, folder, rank)}"
            for rank, process in enumerate(ranks)
            if process.exitcode != 0 or not _file(folder, rank, "result").exists()
        ]
        if failures:
            raise RuntimeError(f"{worker.__qualname__} failed\n" + "\n".join(failures))
        # The results are this module's own files, and may hold more than tensors.
        return [torch.load(_file(folder, rank, "result"), weights_only=False) for rank in range(world_size)]


def _wait(ranks: list, deadline: float) -> None:
    """Until every rank has ended, or the time is up, which it soon is for ranks that outlive one that failed."""
    failed = False
    while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        if not failed and any(process.exitcode not in (None, 0) for process in ranks):
            # A failure spreads: let the other ranks write their tracebacks too. Some may wait for it for ever.
            failed, deadline = True, min(deadline, time.monotonic() + GRACE)
        time.sleep(0.01)


def _rank_main(
    rank: int, world_size: int, environment: dict, folder: str, deadline: float, worker: Callable, args: tuple
):
    log = _file(folder, rank, "log").open("w")
    os.dup2(log.fileno(), sys.stdout.fileno())
    os.dup2(log.fileno(), sys.stderr.fileno())
    faulthandler.enable()
    # Where a rank hangs, its stack says so before it is ended.
    faulthandler.dump_traceback_later(max(deadline - time.monotonic() - 1.0, 0.1))
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    try:
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
        dist.barrier()
        result = worker(rank, world_size, *args)
    except BaseException:
        _file(folder, rank, "error").write_text(traceback.format_exc())
        os._exit(1)  # without a farewell that would wait for the other ranks
    partial = _file(folder, rank, "partial")
    torch.save(result, partial)
    partial.rename(_file(folder, rank, "result"))
    dist.destroy_process_group()


def _what_happened(process: mp.Process, folder: str, rank: int) -> str:
    error = _file(folder, rank, "error")
    if error.exists():
        return f"raised:\n{error.read_text()}"
    log = _file(folder, rank, "log")
    lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:] if log.exists() else []
    return f"was ended (exit code {process.exitcode}); its output ends:\n" + "\n".join(lines)


def _file(folder: str, rank: int, kind: str) -> Path:
    return Path(folder, f"rank{rank}.{kind}")

"""Many ranks as threads of one process, over torch's own threaded process group."""

import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import multi_threaded_pg


def run_threads(worker: Callable, world_size: int, *args) -> list:
    """Each rank's `worker(rank, world_size, *args)`, in rank order. RuntimeError if one of them fails."""
    results, failures = [None] * world_size, {}
    store = dist.HashStore()

    def rank_main(rank: int) -> None:
        dist.init_process_group("threaded", rank=rank, world_size=world_size, store=store)
        try:
            with torch.autograd.set_multithreading_enabled(False):
                results[rank] = worker(rank, world_size, *args)
        except BaseException as error:
            failures[rank] = traceback.format_exc()
            multi_threaded_pg.ProcessLocalGroup.exception_handle(error)  # or the others would wait for ever
        finally:
            dist.destroy_process_group()

    with _threaded_groups():
        threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    # Ranks that were only woken up by the failure of another one say SystemExit.
    errors = [error for error in failures.values() if "SystemExit" not in error] or list(failures.values())
    if errors:
        raise RuntimeError(f"{len(errors)} of {world_size} ranks failed, the first one with\n{errors[0]}")
    return results


@contextmanager
def _threaded_groups() -> Iterator[None]:
    """Every thread has a world of its own, and its backward runs in itself."""
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    multi_threaded_pg._install_threaded_pg()
    multi_threaded_pg.ProcessLocalGroup.reset()
    try:
        yield
    finally:
        multi_threaded_pg._uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)

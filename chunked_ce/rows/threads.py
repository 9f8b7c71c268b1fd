"""Work divided among threads, each of which runs all operations of its share alone.

An operation of torch divides itself among the threads of OpenMP and waits for all of them. Work of many small
operations then waits as often, and each time for a thread whose core another process may have taken: on two busy
cores, 1,024 rows of 50,257 bf16 logits took 22 times as long as at best. Threads of our own meet once, at the end, and
those whose core is free take more of the work: twice as long.

Within such a thread, denormal numbers count as 0: a CPU computes with them many times slower. Exponentials of logits
that are 88 below the largest are denormal.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled

__all__ = ["num_threads", "share", "without_denormals"]

Item = TypeVar("Item")

_MOST = os.cpu_count() or 1
_DENORMAL = 5e-324  # equals 0 where denormals count as 0
_lock = threading.Lock()
_this_thread = threading.local()
_pool: ThreadPoolExecutor | None = None


def num_threads(*tensors: Tensor) -> int:
    """Among how many threads work on ``tensors`` is divided: those that torch's own operations would take.

    One where other threads would not do what this one does: where a mode, a transform, a tracer or the profiler is to
    see every operation, and in one of these threads itself.
    """
    count = min(torch.get_num_threads(), _MOST)
    if count < 2 or getattr(_this_thread, "is_ours", False):
        return 1
    on_cpu = all(type(tensor) is Tensor and tensor.device.type == "cpu" for tensor in tensors)
    return count if on_cpu and not _is_watched() else 1


def share(items: Sequence[Item], work: Callable[[Iterable[Item]], None], threads: int) -> None:
    """Call ``work`` in up to so many ``threads``, or in this one, with items that each takes one by one until none is
    left.

    The threads record no graph and dispatch operations as this one does. An error, or an interrupt, stops them after
    the items in hand; an error is raised here.
    """
    threads = min(threads, len(items))
    if threads < 2:
        with without_denormals():
            return work(items)
    queue, state = deque(items), _state()
    running: list[Future[None]] = []
    try:
        with contextlib.suppress(RuntimeError):  # no thread starts while the interpreter exits
            for _ in range(threads):
                running.append(_threads().submit(_work, queue, work, state))
        if not running:
            with without_denormals():
                work(_taken(queue))
        error = next(filter(None, [future.exception() for future in running]), None)
    except BaseException:
        queue.clear()
        for future in running:
            future.exception()
        raise
    try:
        if error is not None:
            raise error
    finally:  # an error whose frames refer to it would keep their tensors
        del error, running


@contextlib.contextmanager
def without_denormals() -> Iterator[None]:
    """Denormal numbers count as 0 if this thread works alone: threads that OpenMP starts within would keep to it."""
    if torch.get_num_threads() > 1 or _DENORMAL == 0 or not torch.set_flush_denormal(True):
        yield
        return
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def _is_watched() -> bool:
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or _profiler_enabled()
    )


_State = tuple[bool, torch._C.DispatchKeySet, torch._C.DispatchKeySet]  # how a thread dispatches operations


def _state() -> _State:
    """How this thread dispatches operations: within an operator, for example, autograd is off."""
    keys = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    return torch.is_inference_mode_enabled(), *keys


def _work(queue: deque[Item], work: Callable[[Iterable[Item]], None], state: _State) -> None:
    inference, *keys = state
    try:
        with torch.inference_mode(inference), torch.no_grad(), torch._C._ForceDispatchKeyGuard(*keys):
            work(_taken(queue))
    except BaseException:
        queue.clear()
        raise


def _taken(queue: deque[Item]) -> Iterator[Item]:
    while True:
        try:
            item = queue.popleft()
        except IndexError:
            return
        yield item


def _threads() -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(_MOST, thread_name_prefix="chunked_ce", initializer=_prepare)
        return _pool


def _prepare() -> None:
    """Make operations in this thread use no other one.

    torch sets a thread's own number of threads together with the number that new threads start with. So OpenMP is asked
    for the former alone, if it can be found; else a thread that ends at once sets the latter back, and a thread of the
    user's that starts in the meantime keeps a single one.
    """
    _this_thread.is_ours = True
    torch.set_flush_denormal(True)
    before = torch.get_num_threads()  # torch sets a new thread's number here, and not again
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another OpenMP, hidden symbols, Windows
        ctypes.CDLL(None).omp_set_num_threads(1)
    if torch.get_num_threads() == 1:
        return
    with _lock:
        torch.set_num_threads(1)
        other = threading.Thread(target=torch.set_num_threads, args=(before,))
        other.start()
        other.join()


def _forget() -> None:
    """In a forked process, which has none of the threads."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)

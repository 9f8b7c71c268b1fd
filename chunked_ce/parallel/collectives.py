"""Collectives that overlap with work: started, then waited for, with errors that say which one failed."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

__all__ = ["Collectives", "Issued", "Pending", "all_gather_single", "exchange", "reduce_scatter_single"]

# Torch 2.13 warns about the names that older versions have.
_HAS_SINGLE = hasattr(dist, "all_gather_single")


def all_gather_single(gathered: Tensor, part: Tensor, **keywords) -> dist.Work | None:
    gather = dist.all_gather_single if _HAS_SINGLE else dist.all_gather_into_tensor
    return gather(gathered, part, **keywords)


def reduce_scatter_single(mine: Tensor, parts: Tensor, **keywords) -> dist.Work | None:
    scatter = dist.reduce_scatter_single if _HAS_SINGLE else dist.reduce_scatter_tensor
    return scatter(mine, parts, **keywords)


@dataclasses.dataclass
class Issued:
    """The collectives that a thread has started since it began to count."""

    number: int = 0
    broken: bool = False  # one of them failed: some ranks can no longer be reached


_counting = threading.local()


class Pending:
    """A collective in flight; `wait` returns its result."""

    def __init__(self, result: Tensor, work: dist.Work | None, what: str) -> None:
        self._result, self._work, self._what = result, work, what

    def wait(self) -> Tensor:
        if self._work is not None:
            try:
                self._work.wait()
            except RuntimeError as error:
                raise _broken(self._what, error) from error
        return self._result


class Collectives:
    """The collectives of the group with this name; custom operators take the name, but no group."""

    def __init__(self, group_name: str) -> None:
        self._group = _resolve_process_group(group_name)
        self.size = dist.get_world_size(self._group)
        self.rank = dist.get_rank(self._group)

    def all_gather(self, part: Tensor, what: str) -> Pending:
        """Every rank's ``part`` (n, ...), of one shape, as (R, n, ...)."""
        gathered = part.new_empty(self.size, *part.shape)
        return self._start(what, all_gather_single, gathered.flatten(0, 1), part.contiguous(), result=gathered)

    def all_reduce_(self, part: Tensor, what: str) -> Pending:
        """The sum of every rank's ``part``, in place."""
        return self._start(what, dist.all_reduce, part, result=part)

    def reduce_scatter(self, parts: Tensor, what: str) -> Pending:
        """This rank's (n, ...) of the sum of every rank's ``parts`` (R * n, ...)."""
        mine = parts.new_empty(len(parts) // self.size, *parts.shape[1:])
        return self._start(what, reduce_scatter_single, mine, parts, result=mine)

    def all_to_all(self, part: Tensor, what: str, sent: list[int], received: list[int]) -> Pending:
        """What all ranks send to this one, one after another: each sends ``part`` (n,), ``sent[r]`` elements to rank r.

        Sizes differ between ranks, so that a rank takes part that has nothing to send or to get.
        """
        size = part.element_size()
        mine, parts = part.new_empty(sum(received)), part.contiguous().view(torch.uint8)
        splits = [number * size for number in received], [number * size for number in sent]
        self._count()
        try:
            work = dist.all_to_all_single(mine.view(torch.uint8), parts, *splits, group=self._group, async_op=True)
        except RuntimeError as error:
            raise _broken(what, error) from error
        return Pending(mine, work, what)

    def gather_numbers(self, numbers: Tensor, what: str) -> list[list[int]]:
        """Every rank's integers (n,), as many on each; the host waits for them."""
        gathered = numbers.new_empty(self.size * len(numbers))
        try:
            all_gather_single(gathered, numbers, group=self._group)
        except RuntimeError as error:
            raise _broken(what, error) from error
        return gathered.view(self.size, -1).tolist()

    def any_failed(self, failed: bool) -> bool:
        """Whether any rank ``failed``; reduced on the CPU."""
        flag = torch.tensor([int(failed)])
        try:
            self._group.allreduce([flag]).wait()
        except RuntimeError as error:
            raise _broken("chunked_ce: the end of a call", error) from error
        return bool(flag)

    def raise_together(self, failure: Exception | None) -> NoReturn:
        """Raise on every rank, of which one failed at least: its own failure, or an error that names a failed rank and
        its message."""
        messages = self.gather_objects(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        rank, message = next((rank, message) for rank, message in enumerate(messages) if message is not None)
        raise RuntimeError(f"vocab: rank {rank} of the group failed in this call, and all ranks with it: {message}")

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value."""
        return exchange(value, self._group)

    @staticmethod
    @contextlib.contextmanager
    def counted() -> Iterator[Issued]:
        """Count the collectives that this thread starts."""
        before, _counting.issued = getattr(_counting, "issued", None), Issued()
        try:
            yield _counting.issued
        finally:
            _counting.issued = before

    @staticmethod
    def _count() -> None:
        issued = getattr(_counting, "issued", None)
        if issued is not None:
            issued.number += 1

    def _start(self, what: str, collective, *tensors: Tensor, result: Tensor) -> Pending:
        self._count()
        if result.numel() == 0 and all(tensor.numel() == 0 for tensor in tensors):
            return Pending(result, None, what)  # empty on every rank, since sizes are equal
        try:
            work = collective(*tensors, group=self._group, async_op=True)
        except RuntimeError as error:
            raise _broken(what, error) from error
        return Pending(result, work, what)


def exchange(value: Any, group: dist.ProcessGroup, what: str = "chunked_ce: the comparison of calls") -> list[Any]:
    """Every rank's value."""
    values = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(values, value, group=group)
    except RuntimeError as error:
        raise _broken(what, error) from error
    return values


def _broken(what: str, error: RuntimeError) -> RuntimeError:
    issued = getattr(_counting, "issued", None)
    if issued is not None:
        issued.broken = True
    return RuntimeError(f"{what} over the vocabulary group failed: {error}")

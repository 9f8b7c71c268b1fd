"""Collectives that overlap with work: started, then waited for, with errors that say which one failed."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed.distributed_c10d import _get_object_coll_device

__all__ = [
    "CollectiveError",
    "Collectives",
    "Issued",
    "Pending",
    "all_gather_single",
    "broken_as",
    "exchange",
    "object_device",
    "reduce_scatter_single",
]

# Torch 2.13 warns about the names that older versions have.
_HAS_SINGLE = hasattr(dist, "all_gather_single")


def all_gather_single(
    gathered: Tensor, part: Tensor, group: dist.ProcessGroup | None = None, async_op: bool = False
) -> dist.Work | None:
    gather = dist.all_gather_single if _HAS_SINGLE else dist.all_gather_into_tensor
    work: dist.Work | None = gather(gathered, part, group=group, async_op=async_op)
    return work


def reduce_scatter_single(
    mine: Tensor, parts: Tensor, group: dist.ProcessGroup | None = None, async_op: bool = False
) -> dist.Work | None:
    scatter = dist.reduce_scatter_single if _HAS_SINGLE else dist.reduce_scatter_tensor
    work: dist.Work | None = scatter(mine, parts, group=group, async_op=async_op)
    return work


class CollectiveError(RuntimeError):
    """A collective failed: some ranks of its group can no longer be reached."""


@dataclasses.dataclass
class Issued:
    """The collectives that a thread has started since it began to count."""

    number: int = 0


_counting = threading.local()


class Pending:
    """A collective in flight; `wait` returns its result."""

    def __init__(self, result: Tensor, work: dist.Work | None, what: str) -> None:
        self._result, self._work, self._what = result, work, what

    def wait(self) -> Tensor:
        if self._work is not None:
            with broken_as(self._what):
                self._work.wait()
        return self._result


class Collectives:
    """The collectives of the group with this name; custom operators take the name, but no group."""

    def __init__(self, group_name: str) -> None:
        self.group = _resolve_process_group(group_name)  # type: ignore[arg-type]  # a str, as operators take it
        self.size = dist.get_world_size(self.group)
        self.rank = dist.get_rank(self.group)

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
        with broken_as(what):
            work = dist.all_to_all_single(mine.view(torch.uint8), parts, *splits, group=self.group, async_op=True)
        return Pending(mine, work, what)

    def gather_numbers(self, numbers: list[int | Tensor], device: torch.device, what: str) -> list[list[int]]:
        """Every rank's integers, as many on each; the host waits for them.

        On the CPU by a collective that ranks need nowhere else. Out of step, gloo lets two kinds of collectives wait
        for the timeout, but of one kind it ends the process that is sent more bytes than it expects.
        """
        if self.size == 1:
            return [[int(number) for number in numbers]]
        mine = torch.tensor([0 if isinstance(number, Tensor) else number for number in numbers], device=device)
        for place, number in zip(mine, numbers, strict=True):
            if isinstance(number, Tensor):
                place.copy_(number)
        gathered = mine.new_empty(self.size * len(numbers))
        with broken_as(what):
            if device.type == "cpu":
                dist.all_to_all_single(gathered, mine.repeat(self.size), group=self.group)
            else:
                all_gather_single(gathered, mine, group=self.group)
        return gathered.view(self.size, -1).tolist()

    def sum_number(self, number: int, what: str) -> int:
        """The sum of every rank's ``number``, on the CPU."""
        total = torch.tensor([number])
        with broken_as(what):
            self.group.allreduce([total]).wait()
        return int(total)

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
        return exchange(value, self.group, "chunked_ce: the exchange of errors")

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

    def _start(
        self, what: str, collective: Callable[..., dist.Work | None], *tensors: Tensor, result: Tensor
    ) -> Pending:
        self._count()
        if result.numel() == 0 and all(tensor.numel() == 0 for tensor in tensors):
            return Pending(result, None, what)  # empty on every rank, since sizes are equal
        with broken_as(what):
            work = collective(*tensors, group=self.group, async_op=True)
        return Pending(result, work, what)


def object_device(group: dist.ProcessGroup) -> torch.device:
    """Where the group's ranks exchange what is not in tensors: the same kind of device on every rank."""
    return torch.device(_get_object_coll_device(group))


def exchange(value: Any, group: dist.ProcessGroup, what: str) -> list[Any]:
    """Every rank's value."""
    values = [None] * dist.get_world_size(group)
    with broken_as(what):
        dist.all_gather_object(values, value, group=group)
    return values


@contextlib.contextmanager
def broken_as(what: str) -> Iterator[None]:
    """The error of a collective that fails here says ``what`` it is."""
    try:
        yield
    except RuntimeError as error:
        raise CollectiveError(f"{what} over the vocabulary group failed: {error}") from error

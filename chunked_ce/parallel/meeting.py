"""Meetings of ranks before they work together: each says what it is about to do, so that no two do different things.

Collectives are paired by their order alone. A rank that makes a call more or less than the others would put its tensors
into theirs: if sizes happen to be equal, results are wrong and nobody knows; if not, gloo ends the process. So all that
ranks do together starts with a meeting, the same small collective everywhere, and ranks that meet there with different
intentions all raise, name what each of them is doing, and are in step again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import weakref
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from chunked_ce.parallel.collectives import CollectiveError, Collectives

__all__ = ["Doing", "check_facts", "digest", "end", "meet", "number_of_calls", "shared_errors"]

_NUMBERS = 4  # all meetings are of one size
_FAILED = -1  # as the number of a call: the rank has an error
_TAG, _COUNT = 2**32, 2**20  # one sum over ranks adds tags, and in their lower bits the number of ranks that failed


@dataclasses.dataclass(frozen=True)
class Doing:
    """What a rank is about to do with the others."""

    what: str
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)  # by name: what must be equal on every rank
    call: int = 0  # the number of the call in whose backward this is; 0 for none, and in compiled code
    starts_call: bool = False

    @property
    def digest(self) -> int:
        return digest(repr((self.what, self.facts)).encode())


class _Count:
    """Of one process group: a new group of restarted processes starts anew on every rank."""

    meetings = 0
    calls = 0  # those of a forward


_counts: weakref.WeakKeyDictionary[dist.ProcessGroup, _Count] = weakref.WeakKeyDictionary()


def digest(text: bytes) -> int:
    """An int64."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big", signed=True)


def meet(
    ranks: Collectives,
    doing: Doing,
    *numbers: int | Tensor,  # () int64
    device: torch.device,
    failure: Exception | None = None,
) -> list[list[int]]:
    """Every rank's ``numbers``, four at most, once all ranks have come here to do the same; the host waits for them.

    Raises on every rank, and leaves the ranks in step:
        RuntimeError, ValueError: ranks are about to do different things, or in different ways.
        the ``failure`` of a rank, and on the others a RuntimeError that names the rank and its message.
    """
    count = _count(ranks)
    count.meetings += 1
    mine = [doing.digest, doing.call if failure is None else _FAILED, *numbers, *[0] * (_NUMBERS - len(numbers))]
    found = ranks.gather_numbers(mine, device, f"chunked_ce: {doing.what}")
    calls = {call for _, call, *_ in found}
    if _FAILED in calls:
        ranks.raise_together(failure)
    if len({text for text, *_ in found}) > 1 or len(calls - {0}) > 1:
        _raise_out_of_step(ranks, doing)
    count.calls += doing.starts_call  # those that all ranks start
    return [rest for _, _, *rest in found]


def end(ranks: Collectives, doing: Doing, failure: Exception | None) -> None:
    """Raise on every rank if one of them failed; on the CPU, in one sum over the ranks."""
    tag = doing.digest % _TAG * _COUNT
    failed = ranks.sum_number(tag + (failure is not None), "chunked_ce: the end of a call") - ranks.size * tag
    if not 0 <= failed <= ranks.size:
        _raise_out_of_step(ranks, dataclasses.replace(doing, what=doing.what.replace("the start of", "the end of")))
    if failed:
        ranks.raise_together(failure)


def number_of_calls(ranks: Collectives) -> int:
    """The calls that the group's ranks have started together: the number of the last one."""
    return _count(ranks).calls


@contextlib.contextmanager
def shared_errors(group: dist.ProcessGroup, device: torch.device) -> Iterator[None]:
    """Raise an error that one rank has here, before it meets the others, on all: the others come to a meeting."""
    ranks = Collectives(group.group_name)
    before = _count(ranks).meetings
    try:
        yield
    except (NotImplementedError, CollectiveError):
        raise  # on every rank, or the others cannot be reached
    except Exception as error:
        if _count(ranks).meetings == before:
            meet(ranks, Doing("an error"), device=device, failure=error)
        raise


def _count(ranks: Collectives) -> _Count:
    return _counts.setdefault(ranks.group, _Count())


def check_facts(calls: list[dict[str, Any]]) -> None:
    """Raise if the facts that each rank has about its call, by name, are not the same on all."""
    for name in dict.fromkeys(name for call in calls for name in call):
        values = [call.get(name) for call in calls]
        if any(value != values[0] and (value == value or values[0] == values[0]) for value in values):  # NaNs are equal
            said = ", ".join(f"rank {rank} has {other!r}" for rank, other in enumerate(values))
            raise ValueError(f"ranks of the vocabulary group disagree on {name}: {said}")


def _raise_out_of_step(ranks: Collectives, doing: Doing) -> NoReturn:
    """Raise what every rank is doing, which all of them exchange."""
    everyone = ranks.gather_objects(doing)
    told = [each.what if each.call == 0 else f"{each.what} of call {each.call}" for each in everyone]
    if len(set(told)) == 1:
        check_facts([each.facts for each in everyone])
    said = ", ".join(f"rank {rank} is at {each}" for rank, each in enumerate(told))
    raise RuntimeError(f"chunked_ce: ranks of the vocabulary group are in different calls: {said}")

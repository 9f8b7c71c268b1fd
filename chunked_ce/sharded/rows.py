"""`RowSharding`: a parameter whose rows are spread over ranks: made from a whole tensor, and gathered to one."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import warnings
from collections.abc import Iterator
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from chunked_ce.parallel.collectives import Pending
from chunked_ce.parallel.vocab import VocabShard

__all__ = ["RowSharding", "forget", "record", "rows_in", "shardings_of"]

_RECORD = "_row_shardings"
_PATIENCE = 20.0  # seconds


@dataclasses.dataclass(frozen=True, eq=False)
class RowSharding:
    """Rows [vocab.start, vocab.stop) of a parameter with ``vocab.total`` rows; the bounds are those of a DTensor.

    The methods are all that differs between a process group, whose ranks hold plain parameters, and a device mesh,
    whose ranks hold DTensors.
    """

    vocab: VocabShard

    @classmethod
    def over(cls, total: int, group_or_mesh: Any) -> RowSharding:
        """``total`` rows, split evenly over the ranks of a process group; None for all ranks."""
        if not isinstance(group_or_mesh, dist.ProcessGroup | None):
            raise TypeError(
                "group_or_mesh must be None, a ProcessGroup that this rank is in, or a DeviceMesh, was "
                f"{type(group_or_mesh).__name__}"
            )
        return cls(VocabShard.split(total, group_or_mesh, tokens="own"))

    @property
    def has_dtensors(self) -> bool:
        """Whether the parameters are DTensors, whose gradients know their norms."""
        return False

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """The groups of which every rank has this parameter, or other rows of it."""
        return [self.vocab.group]

    @property
    def ranks(self) -> list[int]:
        """The ranks over which gradients are averaged."""
        return list(self.vocab.ranks)

    def __deepcopy__(self, _memo: dict[int, Any]) -> RowSharding:
        return self  # it does not change

    def whole_shape(self, parameter: Tensor) -> torch.Size:
        return torch.Size((self.vocab.total, *parameter.shape[1:]))

    def mine(self, whole: Tensor) -> Tensor:
        """A copy of this rank's rows of a ``whole`` tensor (V, ...)."""
        return whole.detach()[self.vocab.start : self.vocab.stop].clone()

    def parameter(self, rows: Tensor, requires_grad: bool) -> nn.Parameter:
        """The parameter that holds this rank's ``rows`` (V_r, ...)."""
        return nn.Parameter(rows, requires_grad)

    def loaded(self, given: Tensor) -> Tensor:
        """What a parameter takes of the tensor that a state dict ``given`` to it has."""
        return self.mine(given)

    def refresh(self, parameter: Tensor) -> None:
        """Called with a parameter before its rows are used, which others may have changed."""

    def is_saved_whole(self, parameter: Tensor) -> bool:
        """Whether a state dict that is asked for now holds the whole of a parameter, not the parameter as it is."""
        return True

    def local(self, parameter: Tensor) -> Tensor:
        """This rank's rows (V_r, ...) of a parameter, differentiable."""
        return parameter

    def bounds(self, rank: int) -> tuple[int, int]:
        """The rows [start, stop) of a rank of the group."""
        total, size = self.vocab.total, -(-self.vocab.total // self.vocab.size)
        return min(rank * size, total), min((rank + 1) * size, total)

    @overload
    def whole(self, rows: Tensor, what: str, *, device: Any = None) -> Tensor: ...
    @overload
    def whole(self, rows: Tensor, what: str, *, device: Any = None, keep: bool) -> Tensor | None: ...
    def whole(self, rows: Tensor, what: str, *, device: Any = None, keep: bool = True) -> Tensor | None:
        """The rows (V, ...) of all ranks, each of which calls this with its own; None on those that do not ``keep``."""
        with _impatient(what):
            return self._gathered(rows, what, device, keep)

    def _gathered(self, rows: Tensor, what: str, device: Any, keep: bool) -> Tensor | None:
        rows = self.local(rows).detach()
        whole = rows.new_empty(self.whole_shape(rows), device=device) if keep else None
        for owner in range(self.vocab.size):
            start, stop = self.bounds(owner)
            if start == self.vocab.start and start < stop:
                part = rows.contiguous()
            else:  # in place, where that saves memory
                held = whole if whole is not None and whole.device == rows.device else None
                part = rows.new_empty(stop - start, *rows.shape[1:]) if held is None else held[start:stop]
            self._broadcast(part, owner, what, self.vocab.group)
            if whole is not None:
                whole[start:stop] = part
        return whole

    def take_from_first(self, whole: Tensor, what: str) -> None:
        """Let every rank's ``whole`` (V, ...) have the values of the first rank."""
        for group in self.groups:
            self._broadcast(whole, 0, what, group)

    @staticmethod
    def _broadcast(part: Tensor, sender: int, what: str, group: dist.ProcessGroup) -> None:
        if part.numel():
            work = dist.broadcast(part, group=group, group_src=sender, async_op=True)
            Pending(part, work, f"chunked_ce: {what}").wait()


@contextlib.contextmanager
def _impatient(what: str) -> Iterator[None]:
    """Warn if other ranks let this one wait: code for models that are whole on every rank saves on one rank alone."""
    warning = (
        f"chunked_ce: {what} is gathered from all ranks of a sharded head, and some have let this one wait for "
        f"{_PATIENCE:g} s: call it on every rank, then save on one"
    )
    timer = threading.Timer(_PATIENCE, warnings.warn, (warning, UserWarning))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def shardings_of(module: nn.Module) -> dict[str, RowSharding]:
    """The parameters of a module that hold only this rank's rows, by name."""
    found: dict[str, RowSharding] = vars(module).get(_RECORD, {})
    return found


def rows_in(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, RowSharding]]:
    """The same with the parameters, without those that are kept out of the sight of a DeepSpeed engine."""
    for name, sharding in shardings_of(module).items():
        parameter = module._parameters.get(name)
        if parameter is not None:
            yield name, parameter, sharding


def record(module: nn.Module, name: str, sharding: RowSharding) -> None:
    vars(module).setdefault(_RECORD, {})[name] = sharding


def forget(module: nn.Module) -> None:
    vars(module).pop(_RECORD, None)

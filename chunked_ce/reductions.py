"""How a scalar loss was reduced: whether it is a mean already, or scaled for an engine's backward.

`chunked_ce.TokenMean` takes sums of losses. A mean in the place of a sum, or a scaled loss in that of a value to log,
is a number like any other, and a wrong one; so the makers of both leave a mark.

A mark is left on the node of the autograd graph, and for the memory of the value, which ``detach()`` shares. It is gone
once the value is changed, in place or by another operation. Compiled code leaves none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.multiprocessing.reductions import StorageWeakRef

from chunked_ce.tracing import runs_at_once

__all__ = ["MEAN", "SCALED", "marked", "reduction_of"]

MEAN, SCALED = "mean", "scaled"

_KEY = "chunked_ce.reduction"
_TORCHS_MEAN = 1  # of its losses' nodes: `torch.nn._reduction.get_enum("mean")`
_MEANS = ("MeanBackward0", "MeanBackward1")
# Nodes that leave the value as it is: casts, copies, views, and those that DDP wraps around a module's outputs. So does
# the mean of one value, which loops take that once averaged over devices.
_SAME_VALUE = (
    "AliasBackward0",
    "CloneBackward0",
    "ReshapeAliasBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "ToCopyBackward0",
    "UnsafeViewBackward0",
    "UnsqueezeBackward0",
    "ViewBackward0",
    "_DDPSinkBackward",
)
_MOST_NODES = 16  # followed from a value to the node that reduced it
_LEAST_FULL = 256  # marks, at which those whose memory is gone are dropped


class _Mark(NamedTuple):
    reduction: str
    version: int  # of the value, which changes in place
    memory: StorageWeakRef  # keeps its address, not its bytes


class _Marks(dict[int, _Mark]):
    """Marks by the address of a value's memory.

    A search for those whose memory is gone waits until there are twice as many marks as the last one left, so that a
    loop that keeps all its losses pays a constant time for each.
    """

    full = _LEAST_FULL

    def add(self, memory: StorageWeakRef, mark: _Mark) -> None:
        if len(self) >= self.full:
            for address, old in list(self.items()):
                if old.memory.expired():
                    self.pop(address, None)  # another thread may have dropped it
            self.full = max(_LEAST_FULL, 2 * len(self))
        self[memory.cdata] = mark


_marks = _Marks()


def marked(value: Tensor, reduction: str) -> Tensor:
    """``value``, whose ``reduction`` `reduction_of` will tell."""
    if not _is_plain(value):
        return value
    if value.grad_fn is not None:
        _metadata(value.grad_fn)[_KEY] = reduction
    if not value.is_inference():  # such tensors count no versions
        memory = StorageWeakRef(value.untyped_storage())
        _marks.add(memory, _Mark(reduction, value._version, memory))
    return value


def reduction_of(value: Tensor) -> str | None:
    """``"mean"`` or ``"scaled"`` where it is known that ``value`` () was reduced or scaled; None if nothing is known.

    A sum of means, such as that of a loss and an auxiliary loss, is no mean.
    """
    if not _is_plain(value):
        return None
    found = None if value.grad_fn is None else _reduction_by(value.grad_fn, value.output_nr)
    if found is not None or value.is_inference():
        return found
    mark = _marks.get(value.untyped_storage()._cdata)
    fits = mark is not None and not mark.memory.expired() and mark.version == value._version
    return mark.reduction if mark is not None and fits else None


def _reduction_by(node: Node, output: int) -> str | None:
    for _ in range(_MOST_NODES):
        found: str | None = _metadata(node).get(_KEY)
        if found is not None:
            return found
        name = node.name()
        is_mean = name in _MEANS and getattr(node, "_saved_self_sym_numel", None) != 1
        if is_mean or getattr(node, "_saved_reduction", None) == _TORCHS_MEAN:
            return MEAN
        if name not in _SAME_VALUE + _MEANS or output >= len(node.next_functions):
            return None
        following, output = node.next_functions[output]
        if following is None:
            return None
        node = following
    return None


def _metadata(node: Any) -> dict[str, Any]:
    """What Python code keeps at a node: a property, which torch's stub has as a method."""
    metadata: dict[str, Any] = node.metadata
    return metadata


def _is_plain(value: Tensor) -> bool:
    """Whether a value has a memory and a graph that can be read now."""
    return runs_at_once(value) and not torch._C._are_functorch_transforms_active()

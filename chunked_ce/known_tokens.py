"""Which tokens of a target count, where the host is about to know without waiting for later work.

`TokenMean.over` reads the targets of a window before the first loss: it leaves here, for each target, what the device
copies to the host in the meantime, and a loss that is given the very same tensor finds it. So do functions that make
targets of which none is ignored.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from chunked_ce import devices
from chunked_ce.tracing import runs_at_once

__all__ = ["counted_on_host", "remember"]


class _Known(NamedTuple):
    finish: Callable[[], Tensor]  # gives the flags (...) in the shape of the target, on the host
    ignore_index: int
    version: int  # of the target, which code may change in place


_KNOWN = WeakTensorKeyDictionary()


def remember(target: Tensor, ignore_index: int, counted: Tensor | None) -> None:
    """Start to read which tokens of ``target`` are ``counted``, None for all, unless that takes no waiting or cannot be
    done."""
    if devices.reads_at_once(target.device) or not runs_at_once(target) or target.is_inference():
        return
    if devices.captures(target.device):
        return
    finish: Callable[[], Tensor]
    if counted is None:
        finish = functools.partial(torch.ones, target.shape, dtype=torch.bool)
    else:
        finish = devices.start_reading(counted)
    _KNOWN[target] = _Known(finish, ignore_index, target._version)


def counted_on_host(target: Tensor, ignore_index: int) -> Tensor | None:
    """Which tokens of ``target`` count, flags in its shape on the host; None if the host would have to wait."""
    if devices.reads_at_once(target.device):
        return target != ignore_index
    known: _Known | None = None if target.is_inference() else _KNOWN.get(target)
    if known is None or (known.ignore_index, known.version) != (ignore_index, target._version):
        return None
    return known.finish()

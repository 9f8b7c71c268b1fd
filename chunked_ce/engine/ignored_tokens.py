"""Whether a call drops its ignored tokens or masks them, decided once, and on an accelerator which tokens it keeps.

To drop them the host must know which tokens count. That is the one wait of a loss on an accelerator, and it is here:
the places that it finds go through forward and backward with the call. Nothing waits where the host knows them already
(`chunked_ce.known_tokens`). On the CPU, where reading takes no wait, each operator reads the targets itself, so that
compiled code drops them too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chunked_ce import devices
from chunked_ce.engine.call import Call
from chunked_ce.engine.counted_tokens import Places
from chunked_ce.known_tokens import counted_on_host
from chunked_ce.tracing import runs_at_once

__all__ = ["with_ignored"]


def with_ignored(call: Call, ignored: str, targets: Sequence[Tensor], *, transformed: bool) -> Call:
    """The call with what becomes of its ignored tokens: ``ignored`` is the option, ``targets`` are those of each depth
    as its user gave them, on the host or the device."""
    device = call.target.device
    if ignored == "mask":
        return _with(call, "mask")
    if devices.reads_at_once(device):
        return _with(call, "drop")
    has_products = call.is_head or call.specification.settings.teacher_dtype is not None
    if ignored == "auto" and not has_products:
        return _with(call, "mask")
    counted = None
    if not transformed and runs_at_once(call.target, *call.tensors) and not devices.captures(device):
        counted = _counted(call, targets)
    if counted is None:  # something records operations or replaces them: operators may read values when they run
        return _with(call, "mask" if ignored == "auto" else "drop")
    places = Places.of(counted, device)
    return _with(call, "none") if places is None else _with(call, "drop").with_places(places)


def _with(call: Call, ignored: str) -> Call:
    settings = call.specification.settings._replace(ignored=ignored)
    return call._replace(specification=call.specification._replace(settings=settings))


def _counted(call: Call, targets: Sequence[Tensor]) -> Tensor:
    """Which of all tokens count, (N,) on the host, which waits for the device if it has to."""
    known = [counted_on_host(target, call.ignore_index) for target in targets]
    flat = [flags.reshape(-1) for flags in known if flags is not None]
    return torch.cat(flat) if len(flat) == len(known) else devices.read(call.target != call.ignore_index)

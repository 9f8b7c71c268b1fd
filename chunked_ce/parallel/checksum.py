"""A number by which ranks tell whether they hold the same values."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["checksum"]

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK = 2**18  # values at a time, whose integers stay in a cache
_ODD = 0x1E3779B97F4A7C15  # its set bits are spread out


def checksum(values: Tensor) -> int:
    """A sum of the values' bits, each times a number for its place: equal for equal values on any processor.

    Integers wrap around, so neither the order of summation nor rounding makes a difference. All NaNs are equal, and so
    are 0 and -0. Reads one number from the device.
    """
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    with torch.no_grad():
        flat = values.detach().reshape(-1)
        places = _ODD * torch.arange(1, 1 + min(_BLOCK, len(flat)), device=values.device)
        places = (places ^ (places >> 29)) * _ODD | 1
        for block in flat.split(_BLOCK):
            total = total * _ODD + (_integers(block) * places[: len(block)]).sum()
    return int(total)


def _integers(values: Tensor) -> Tensor:
    if not values.is_floating_point():
        return values.long()
    values = (values + 0.0).masked_fill(values.isnan(), torch.nan)  # -0 + 0 is 0
    return values.view(_BITS[values.dtype.itemsize]).long()

"""Numbers of a device that the host decides by."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["HostNumbers"]


class HostNumbers:
    """A copy of a few numbers to the host, which the device makes in turn: work launched before `wait` goes on."""

    def __init__(self, numbers: Tensor) -> None:
        self._event = None
        self._numbers = numbers
        if numbers.device.type == "cuda":
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(numbers.device))

    def wait(self) -> list[int]:
        """The numbers, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._numbers.tolist()

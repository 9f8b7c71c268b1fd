"""The compiler of Triton's kernels and the device of their launch, for type checkers.

Triton's own annotations give a compiled kernel the signature of its function, without the options of a launch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import triton
from torch import Tensor

__all__ = ["device_of", "jit"]

jit: Callable[..., Any] = triton.jit


def device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Launch on the device of ``tensor``; a context without effect on a CPU, where the interpreter runs kernels."""
    context: AbstractContextManager[None] = torch.cuda.device_of(tensor)
    return context
